"""Small classifiers trained inside a study: the pretrained teacher and the extractor behind FID."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from haste_core import config
from haste_core.data import Batches, Dataset
from haste_core.errors import HasteError


class SmallCNN(nn.Module):
    """A convolutional classifier for small images; `features` are what FID is computed on.

    Input (B, channels, S, S) in [-1, 1] with S a multiple of 4; features (B, width); logits (B, classes).
    """

    def __init__(self, classes: int, width: int, channels: int = 1, image_size: int = 8) -> None:
        super().__init__()
        if image_size % 4:
            raise HasteError(f"the extractor takes images whose side is a multiple of 4, these have {image_size}")
        self.channels = channels
        early = 2 if image_size > 8 else 1  # 8x8 has no resolution to spare

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        self.trunk = nn.Sequential(stage(channels, 32, 1), stage(32, 64, early), stage(64, 64, 2), stage(64, 96, 2))
        # Standardised features: distances on them are in units of the training data's own spread.
        self.embed = nn.Sequential(
            nn.Linear(96 * (image_size // (4 * early)) ** 2, width), nn.BatchNorm1d(width, affine=False)
        )
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (B, width), about zero mean and unit variance, before the last non-linearity."""
        return self.embed(self.trunk(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(F.relu(self.features(x)))


@torch.no_grad()
def accuracy(logits_of: Callable[[Tensor], Tensor], dataset: Dataset, split: str = "test") -> float:
    """The share of a split's images that are classified correctly, in [0, 1]."""
    x, y = dataset.images(split)
    correct = [(logits_of(a).argmax(1) == b).float() for a, b in zip(x.split(512), y.split(512), strict=True)]
    return float(torch.cat(correct).mean())


def fit_classifier(model: nn.Module, dataset: Dataset, fitting: config.Fitting, what: str) -> dict[str, float]:
    """Train `model` (images to logits) on the augmented training split, leaving it in eval mode.

    AdamW under a one-cycle schedule; every draw comes from `fitting.seed`.

    Returns:
        Accuracy in [0, 1] on "train" and "test", as `train_accuracy` and `test_accuracy`.

    Raises:
        HasteError: the held-out accuracy stays below `fitting.min_accuracy`.
    """
    batches = Batches(dataset, min(fitting.batch_size, len(dataset)), fitting.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=fitting.lr, weight_decay=fitting.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fitting.lr, fitting.steps + 1)
    model.train()
    bar = tqdm(range(fitting.steps), desc=what, unit="step", mininterval=1.0)
    for step in bar:
        batch = batches.next()
        loss = F.cross_entropy(model(batch.images), batch.y, label_smoothing=fitting.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    result = {f"{split}_accuracy": accuracy(model, dataset, split) for split in ("train", "test")}
    if result["test_accuracy"] < fitting.min_accuracy:
        raise HasteError(
            f"{what}: held-out accuracy {result['test_accuracy']:.4f} is below the required {fitting.min_accuracy}; "
            f"possible: more steps than {fitting.steps}, a larger model, or a lower fitting.min_accuracy"
        )
    return result
