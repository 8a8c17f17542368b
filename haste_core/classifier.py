"""Small classifiers trained inside a study: the pretrained teacher and the extractor behind FID."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from haste_core import checkpoint, config, signals
from haste_core.data import Batches, Dataset
from haste_core.devices import default_device
from haste_core.errors import HasteError, Interrupted

# Steps between two saved states of a classifier in training.
SAVE_EVERY = 500


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
    device = default_device()
    correct = [
        (logits_of(a.to(device)).argmax(1).cpu() == b).float() for a, b in zip(x.split(512), y.split(512), strict=True)
    ]
    return float(torch.cat(correct).mean())


def fit_classifier(
    model: nn.Module, dataset: Dataset, fitting: config.Fitting, what: str, partial: Path | None = None
) -> dict[str, float]:
    """Train `model` (images to logits) on the augmented training split, leaving it in eval mode on the CPU.

    AdamW under a one-cycle schedule; every draw comes from `fitting.seed`.

    Args:
        model, dataset, fitting: what is trained, on what, and how.
        what: the progress bar's label.
        partial: where the state is kept every `SAVE_EVERY` steps and on SIGTERM or SIGINT, so that the next call goes
            on from there and ends in the same bits on the CPU; removed at the end.

    Returns:
        Accuracy in [0, 1] on "train" and "test", as `train_accuracy` and `test_accuracy`.

    Raises:
        HasteError: the held-out accuracy stays below `fitting.min_accuracy`.
        Interrupted: a signal arrived; the state is saved if `partial` is given.
    """
    batches, device = Batches(dataset, min(fitting.batch_size, len(dataset)), fitting.seed), default_device()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=fitting.lr, weight_decay=fitting.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fitting.lr, fitting.steps + 1)
    model.train()
    first = _go_on(partial, model, optimizer, schedule, batches) if partial and partial.is_file() else 0
    bar = tqdm(range(first, fitting.steps), desc=what, unit="step", mininterval=1.0, initial=first, total=fitting.steps)
    with signals.catch() as stopping:
        for step in bar:
            batch = batches.next().to(device)
            loss = F.cross_entropy(model(batch.images), batch.y, label_smoothing=fitting.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if partial and ((step + 1) % SAVE_EVERY == 0 or stopping.is_set()):
                _keep(partial, step + 1, model, optimizer, schedule, batches)
            if stopping.is_set():
                raise Interrupted(f"{what} stopped at step {step + 1} of {fitting.steps}; run again to go on")
    model.eval()
    result = {f"{split}_accuracy": accuracy(model, dataset, split) for split in ("train", "test")}
    model.cpu()
    if partial:
        partial.unlink(missing_ok=True)
    if result["test_accuracy"] < fitting.min_accuracy:
        raise HasteError(
            f"{what}: held-out accuracy {result['test_accuracy']:.4f} is below the required {fitting.min_accuracy}; "
            f"possible: more steps than {fitting.steps}, a larger model, or a lower fitting.min_accuracy"
        )
    return result


def _keep(
    path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, batches: Batches
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer_tensors(optimizer, model).items()}
    tensors |= {f"data.{name}": value for name, value in batches.state_dict().items()}
    checkpoint.save(
        path,
        tensors,
        {"step": step, "schedule": schedule.state_dict(), "betas": [g["betas"] for g in optimizer.param_groups]},
    )


def _go_on(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, batches: Batches) -> int:
    tensors, state = checkpoint.load(path)
    model.load_state_dict(checkpoint.under(tensors, "model."))
    checkpoint.load_optimizer(optimizer, model, checkpoint.under(tensors, "optimizer."))
    batches.load_state_dict(checkpoint.under(tensors, "data."))
    schedule.load_state_dict(state["schedule"])
    for group, rate, betas in zip(optimizer.param_groups, schedule.get_last_lr(), state["betas"], strict=True):
        group["lr"], group["betas"] = rate, tuple(betas)
    return int(state["step"])
