"""Denoising loss by noise level on held-out images: a comparison of arms without an extractor or a sampler.

All generators of a study are measured on the same images, noise draws and levels, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from haste_core import checkpoint
from haste_core.devices import default_device
from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer
from haste_core.paths import objective_of
from haste_core.seeding import stream
from haste_core.study.data import Batches, Dataset

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
# Noise draws of an image, by split, and training images per held-out image; training images only show memorisation.
DRAWS = {"held-out": 3, "training": 1}
TRAINING_SHARE = 1 / 3
SUMMARIES = ("near_data", "structure", "denoising", "nats")
NEAR, STRUCTURE = 0.1, 0.3
# Noise is drawn for this many images at a time on every device, so that it is the same everywhere.
CHUNK = 250


class Probe:
    """The fixed images that denoising is measured on: at most `count` held-out ones, and a third as many training ones.

    seed: of the noise, and of the choice and augmentation of training images.
    """

    def __init__(self, dataset: Dataset, count: int, seed: int) -> None:
        held_out = dataset.examples("test", count, with_images=False)
        shown = min(math.ceil(TRAINING_SHARE * len(held_out.x)), len(dataset))
        training = Batches(dataset, shown, stream("denoising images", seed), with_images=False).next()
        self.splits = {"held-out": (held_out.x, held_out.y), "training": (training.x, training.y)}
        self.seed = seed

    @property
    def facts(self) -> dict[str, Any]:
        """Settings and images that affect the numbers, for the card."""
        images = {split: len(x) for split, (x, _) in self.splits.items()}
        content = {f"{split} {part}": pair[i] for split, pair in self.splits.items() for i, part in enumerate("xy")}
        facts = {"levels": list(LEVELS), "draws": DRAWS, "images": images, "seed": self.seed}
        return {"denoising": facts | {"images_hash": checkpoint.fingerprint(content)}}

    def measure(self, model: DiffusionTransformer) -> list[dict[str, Any]]:
        """Rows of `split`, `t`, `loss`, `nats`, `n` and `draws` for a generator in eval mode.

        `loss` is its own training objective per value (the squared error of the velocity; for a DiT the hybrid loss),
        `nats` the integrand of the likelihood bound at t (`Objective.bound`), both means over images and draws.
        """
        return [
            {"split": split, **row, "n": len(x), "draws": DRAWS[split]}
            for split, (x, y) in self.splits.items()
            for row in losses(model, x, y, DRAWS[split], stream(f"denoising {split}", self.seed))
        ]


@torch.no_grad()
def losses(model: DiffusionTransformer, x: Tensor, y: Tensor, draws: int, seed: int) -> list[dict[str, float]]:
    """Mean denoising loss and bound of a generator at each of LEVELS, one row per level: `t`, `loss`, `nats`.

    Args:
        model: in eval mode. x, y: images or latents (n, C, S, S), and their labels.
        draws: noise draws of each image, the same at every level. seed: of the noise.

    Raises:
        HasteError: a loss is not finite.
    """
    objective, generator, device = objective_of(model.kind), Generator().manual_seed(seed), default_device()
    sums = torch.zeros(len(LEVELS), 2, dtype=torch.float64)
    for images, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        for eps in torch.randn(draws, *images.shape, generator=generator):
            shown, noise, label = images.to(device), eps.to(device), labels.to(device)
            for i, level in enumerate(LEVELS):
                t = objective.timesteps(torch.full((len(images),), level, device=device))
                output = model(objective.noised(shown, noise, t), t, label)
                loss = objective.loss(output, shown, noise, t).double().flatten(1).mean(1)
                sums[i] += torch.stack([loss.sum(), objective.bound(output, shown, noise, t).sum()]).cpu()
    rows = [
        {"t": level, "loss": loss, "nats": nats}
        for level, (loss, nats) in zip(LEVELS, (sums / (draws * len(x))).tolist(), strict=True)
    ]
    for row in rows:
        if not all(map(math.isfinite, row.values())):
            raise HasteError(
                f"the denoising loss at t = {row['t']} is {row['loss']}: outputs of the generator are not finite"
            )
    return rows


def summaries(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """SUMMARIES of a generator's held-out rows.

    `near_data`, `structure`, `denoising`: mean loss over levels t <= 0.1, t >= 0.3, and all; `nats`: the bound's
    integral over the measured range of t, in nats an image, by the trapezoidal rule in log t.
    """
    held_out = sorted((row for row in rows if row["split"] == "held-out"), key=lambda row: row["t"])
    t, loss, nats = (np.array([row[key] for row in held_out]) for key in ("t", "loss", "nats"))
    return {
        "near_data": float(loss[t <= NEAR].mean()),
        "structure": float(loss[t >= STRUCTURE].mean()),
        "denoising": float(loss.mean()),
        "nats": float(np.trapezoid(nats * t, np.log(t))),
    }
