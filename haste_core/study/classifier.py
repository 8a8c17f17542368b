"""Small networks trained inside a study: classifiers (the pretrained teacher, an extractor) and an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from haste_core import checkpoint
from haste_core.devices import default_device
from haste_core.errors import HasteError, Interrupted
from haste_core.seeding import stream
from haste_core.study import config, signals
from haste_core.study.data import Batches, Dataset
from haste_core.training import Batch

# Steps between two saved states of a network in training.
SAVE_EVERY = 500
# Standard deviation of the Gaussian noise that the autoencoder removes from images in [-1, 1].
NOISE = 0.5


class FeatureNetwork(nn.Module):
    """A convolutional encoder of small images with standardised features, on which Frechet distances are computed.

    Input (B, channels, S, S) in [-1, 1] with S a multiple of 4; features (B, width).
    """

    def __init__(self, width: int, channels: int, image_size: int) -> None:
        super().__init__()
        if image_size % 4:
            raise HasteError(f"the extractor takes images whose side is a multiple of 4, these have {image_size}")
        self.channels = channels
        self.early = 2 if image_size > 8 else 1  # 8x8 has no resolution to spare
        self.side = image_size // (4 * self.early)  # of the trunk's 96 output channels
        self.trunk = nn.Sequential(
            _stage(channels, 32, 1), _stage(32, 64, self.early), _stage(64, 64, 2), _stage(64, 96, 2)
        )
        # Standardised features: distances on them are in units of the training data's own spread.
        self.embed = nn.Sequential(nn.Linear(96 * self.side**2, width), nn.BatchNorm1d(width, affine=False))

    def features(self, x: Tensor) -> Tensor:
        """Features (B, width), about zero mean and unit variance, before any non-linearity."""
        return self.embed(self.trunk(x).flatten(1))


class SmallCNN(FeatureNetwork):
    """A convolutional classifier: images (B, channels, S, S) to logits (B, classes); `features` are penultimate."""

    def __init__(self, classes: int, width: int, channels: int = 1, image_size: int = 8) -> None:
        super().__init__(width, channels, image_size)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(F.relu(self.features(x)))


class Autoencoder(FeatureNetwork):
    """A convolutional denoising autoencoder: its features come from images alone, without labels."""

    def __init__(self, width: int, channels: int = 1, image_size: int = 8) -> None:
        super().__init__(width, channels, image_size)

        def larger(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Upsample(scale_factor=2), *_stage(inputs, outputs, 1))

        self.decoder = nn.Sequential(
            nn.Linear(width, 96 * self.side**2),
            nn.ReLU(),
            nn.Unflatten(1, (96, self.side, self.side)),
            larger(96, 48),
            larger(48, 16),
            larger(16, 16) if self.early == 2 else nn.Identity(),
            nn.Conv2d(16, channels, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions (B, channels, S, S) of clean images from noisy ones."""
        return self.decoder(self.features(x))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


@torch.no_grad()
def accuracy(logits_of: Callable[[Tensor], Tensor], dataset: Dataset, split: str) -> float:
    """The share of a split's images that are classified correctly, in [0, 1]."""
    x, y = dataset.images(split)
    device = default_device()
    correct = [
        (logits_of(a.to(device)).argmax(1).cpu() == b).float() for a, b in zip(x.split(512), y.split(512), strict=True)
    ]
    return float(torch.cat(correct).mean())


@torch.no_grad()
def explained(reconstructed: Callable[[Tensor], Tensor], dataset: Dataset, split: str, seed: int) -> float:
    """The share of a split's pixel variance that reconstructions from noised images explain, in [0, 1].

    One minus the mean square error over the variance around the mean image, 0 where the error is larger. Noise comes
    from `seed` and `split`.
    """
    x, _ = dataset.images(split)
    device, generator = default_device(), Generator().manual_seed(stream(f"autoencoder {split} noise", seed))
    parts = ((part, reconstructed(_noised(part, generator).to(device)).cpu()) for part in x.split(512))
    error = sum(float((made - part).double().square().sum()) for part, made in parts)
    return max(1 - error / float((x - x.mean(0)).double().square().sum()), 0.0)


def _noised(x: Tensor, generator: Generator) -> Tensor:
    """x (B, C, S, S) on the CPU with Gaussian noise."""
    return x + NOISE * torch.randn(x.shape, generator=generator)


class Goal(NamedTuple):
    """What a small network is trained for.

    loss: of a batch on the CPU, with a generator for its noise. measure: of a split ("train", "validation", "test");
    its `name` is that of the results, its `text` that of errors.
    """

    name: str
    text: str
    loss: Callable[[Batch, Generator], Tensor]
    measure: Callable[[str], float]


def fit_classifier(
    model: nn.Module, dataset: Dataset, fitting: config.Fitting, what: str, partial: Path | None = None
) -> dict[str, float]:
    """Train `model` (images to logits) by cross-entropy; see `fit`.

    Returns:
        Accuracies in [0, 1]: `train_accuracy`, `validation_accuracy`, `test_accuracy`.
    """
    device = default_device()

    def loss(batch: Batch, generator: Generator) -> Tensor:
        batch = batch.to(device)
        return F.cross_entropy(model(batch.images), batch.y, label_smoothing=fitting.label_smoothing)

    goal = Goal("accuracy", "validation accuracy", loss, lambda split: accuracy(model, dataset, split))
    return fit(model, dataset, fitting, what, goal, partial)


def fit_autoencoder(
    model: Autoencoder, dataset: Dataset, fitting: config.Fitting, what: str, partial: Path | None = None
) -> dict[str, float]:
    """Train `model` to remove Gaussian noise from images, by the mean square error and without labels; see `fit`.

    Returns:
        Shares of pixel variance explained from noised images: `train_explained`, `validation_explained`,
        `test_explained`.
    """
    device = default_device()

    def loss(batch: Batch, generator: Generator) -> Tensor:
        noised = _noised(batch.images, generator).to(device)
        return F.mse_loss(model(noised), batch.images.to(device))

    def measure(split: str) -> float:
        return explained(model, dataset, split, fitting.seed)

    goal = Goal("explained", "explained validation variance", loss, measure)
    return fit(model, dataset, fitting, what, goal, partial)


def fit(
    model: nn.Module, dataset: Dataset, fitting: config.Fitting, what: str, goal: Goal, partial: Path | None = None
) -> dict[str, float]:
    """Train `model` on the augmented training split, leaving it in eval mode on the CPU.

    AdamW under a one-cycle schedule. Batches and noise come from the streams "<what> order" and "<what> noise" of
    `fitting.seed`. Validation images decide on acceptance; test images are measured once the model is accepted.

    Args:
        model, dataset, fitting: network, data and settings.
        what: the network's role, which names its streams, the progress bar and errors.
        goal: loss and measure.
        partial: where the state is kept every `SAVE_EVERY` steps and on SIGTERM or SIGINT, so that the next call goes
            on from there and ends in the same bits on the CPU; removed at the end.

    Returns:
        The measure on each split, as `train_<name>`, `validation_<name>` and `test_<name>`.

    Raises:
        HasteError: the measure on validation images stays below `fitting.min_accuracy`.
        Interrupted: a signal arrived; the state is saved if `partial` is given.
    """
    batches = Batches(dataset, min(fitting.batch_size, len(dataset)), stream(f"{what} order", fitting.seed))
    noise = Generator().manual_seed(stream(f"{what} noise", fitting.seed))
    model.to(default_device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=fitting.lr, weight_decay=fitting.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, fitting.lr, fitting.steps + 1)
    model.train()
    fitted = _Fitted(model, optimizer, schedule, batches, noise)
    first = _go_on(partial, fitted) if partial and partial.is_file() else 0
    bar = tqdm(range(first, fitting.steps), desc=what, unit="step", mininterval=1.0, initial=first, total=fitting.steps)
    with signals.catch() as stopping:
        for step in bar:
            loss = goal.loss(batches.next(), noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if partial and ((step + 1) % SAVE_EVERY == 0 or stopping.is_set()):
                _keep(partial, step + 1, fitted)
            if stopping.is_set():
                raise Interrupted(f"{what} stopped at step {step + 1} of {fitting.steps}; run again to go on")
    model.eval()
    result = {f"{split}_{goal.name}": goal.measure(split) for split in ("train", "validation")}
    if partial:
        partial.unlink(missing_ok=True)
    reached = result[f"validation_{goal.name}"]
    if not reached >= fitting.min_accuracy:
        raise HasteError(
            f"{what}: {goal.text} {reached:.4f} is below the required {fitting.min_accuracy}; use more steps than "
            f"{fitting.steps}, a larger model, or a lower fitting.min_accuracy"
        )
    result[f"test_{goal.name}"] = goal.measure("test")
    model.cpu()
    return result


class _Fitted(NamedTuple):
    """Everything that resuming a fit to the bit needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    batches: Batches
    noise: Generator


def _keep(path: Path, step: int, fitted: _Fitted) -> None:
    optimizer = fitted.optimizer
    tensors = {f"model.{name}": value for name, value in fitted.model.state_dict().items()}
    tensors |= {
        f"optimizer.{name}": value for name, value in checkpoint.optimizer_tensors(optimizer, fitted.model).items()
    }
    tensors |= {f"data.{name}": value for name, value in fitted.batches.state_dict().items()}
    tensors["noise"] = fitted.noise.get_state()
    checkpoint.save(
        path,
        tensors,
        {"step": step, "schedule": fitted.schedule.state_dict(), "betas": [g["betas"] for g in optimizer.param_groups]},
    )


def _go_on(path: Path, fitted: _Fitted) -> int:
    model, optimizer, schedule, batches, noise = fitted
    tensors, state = checkpoint.load(path)
    model.load_state_dict(checkpoint.under(tensors, "model."))
    checkpoint.load_optimizer(optimizer, model, checkpoint.under(tensors, "optimizer."))
    batches.load_state_dict(checkpoint.under(tensors, "data."))
    noise.set_state(tensors["noise"])
    schedule.load_state_dict(state["schedule"])
    for group, rate, betas in zip(optimizer.param_groups, schedule.get_last_lr(), state["betas"], strict=True):
        group["lr"], group["betas"] = rate, tuple(betas)
    return int(state["step"])
