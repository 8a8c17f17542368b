"""Denoising loss by noise level on held-out images: a comparison of arms without an extractor or a sampler.

All generators of a study are measured on the same images, noise draws and levels, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from haste_core import checkpoint
from haste_core.analysis.law import Law
from haste_core.analysis.statistics import NEAR_DATA, STRUCTURE
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
# Of data whose law is known: excess loss over the best velocity, and the share of the direction that is made use of.
EXCESS = ("excess", "excess_texture", "excess_template", "informed")
LAW_SUMMARIES = (*EXCESS, "excess_structure", "gap")
INFORMED = (0.1, 0.3)  # noise levels over which `informed` is averaged: lower ones show the direction to anybody
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
        self.seed, self.law = seed, dataset.law
        self._best: list[tuple[Tensor, Tensor]] = []

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
        `nats` the integrand of the likelihood bound at t (`Objective.bound`), both means over images and draws. Where
        the law of the data is known, held-out rows have EXCESS (`excess_of`).
        """
        rows = []
        for split, (x, y) in self.splits.items():
            drawn, best = (x, y, DRAWS[split], stream(f"denoising {split}", self.seed)), None
            if self.law is not None and split == "held-out":
                self._best = self._best or list(best_velocities(self.law, *drawn))
                best = (self.law, self._best)
            found = losses(model, *drawn, best)
            rows += [{"split": split, **row, "n": len(x), "draws": DRAWS[split]} for row in found]
        return rows


def noised(x: Tensor, y: Tensor, draws: int, seed: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Number of the level, images (B, C, S, S), labels and noise: every level for every draw of every part of x."""
    generator = Generator().manual_seed(seed)
    for images, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        for eps in torch.randn(draws, *images.shape, generator=generator):
            for i in range(len(LEVELS)):
                yield i, images, labels, eps


def best_velocities(law: Law, x: Tensor, y: Tensor, draws: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Best velocities (B, C, S, S) float32 for what `noised` yields: that of the law, and without its directions."""
    blind = law.blind()
    for i, images, labels, eps in noised(x, y, draws, seed):
        t, x_t = LEVELS[i], (1 - LEVELS[i]) * images + LEVELS[i] * eps
        yield law.velocity(x_t, t, labels).float(), blind.velocity(x_t, t, labels).float()


def excess_of(law: Law, output: Tensor, best: Tensor, blind: Tensor) -> list[float]:
    """Sums over images of the excess loss, in all and by band (`Law.excess`), and two terms of `informed`.

    `informed` is the first over the second: the projection of a velocity's way from the best velocity without
    directions to the best one; 0 for a network that makes no use of the direction, 1 for one that knows it.
    """
    way = (best - blind).double()
    along = (way * (output.double() - blind)).flatten(1).sum(), way.square().flatten(1).sum()
    return [len(output) * value for value in law.excess(output, best).values()] + [float(term) for term in along]


@torch.no_grad()
def losses(
    model: DiffusionTransformer,
    x: Tensor,
    y: Tensor,
    draws: int,
    seed: int,
    best: tuple[Law, Iterable[tuple[Tensor, Tensor]]] | None = None,
) -> list[dict[str, float]]:
    """Mean denoising loss and bound of a generator at each of LEVELS, one row per level: `t`, `loss`, `nats`.

    Args:
        model: in eval mode. x, y: images or latents (n, C, S, S), and their labels.
        draws: noise draws of each image, the same at every level. seed: of the noise.
        best: the law and its `best_velocities`; rows have EXCESS then.

    Raises:
        HasteError: a loss is not finite.
    """
    objective, device = objective_of(model.kind), default_device()
    sums, more = torch.zeros(len(LEVELS), 2, dtype=torch.float64), torch.zeros(len(LEVELS), 5, dtype=torch.float64)
    known = iter(best[1]) if best else None
    for i, images, labels, eps in noised(x, y, draws, seed):
        shown, noise, label = images.to(device), eps.to(device), labels.to(device)
        t = objective.timesteps(torch.full((len(images),), LEVELS[i], device=device))
        output = model(objective.noised(shown, noise, t), t, label)
        loss = objective.loss(output, shown, noise, t).double().flatten(1).mean(1)
        sums[i] += torch.stack([loss.sum(), objective.bound(output, shown, noise, t).sum()]).cpu()
        if best and known:
            more[i] += torch.tensor(excess_of(best[0], output.float().cpu(), *next(known)), dtype=torch.float64)
    means, count = sums / (draws * len(x)), draws * len(x)
    rows = [{"t": t, "loss": loss, "nats": nats} for t, (loss, nats) in zip(LEVELS, means.tolist(), strict=True)]
    for row, (*excess, along, whole) in zip(rows, more.tolist() if best else [], strict=bool(best)):
        row |= dict(zip(EXCESS, [*(value / count for value in excess), along / whole], strict=True))
    for row in rows:
        if not all(map(math.isfinite, row.values())):
            raise HasteError(
                f"the denoising loss at t = {row['t']} is {row['loss']}: outputs of the generator are not finite"
            )
    return rows


def summaries(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """SUMMARIES of a generator's held-out rows.

    `near_data`, `structure`, `denoising`: mean loss over levels t <= 0.1, t >= 0.3, and all; `nats`: the bound's
    integral over the measured range of t, in nats an image, by the trapezoidal rule in log t. Where the law is known,
    LAW_SUMMARIES: `excess` and its parts over t <= 0.1, `excess_structure` over t >= 0.3, `informed` over INFORMED, and
    `gap`, the bound's integral minus that of the best predictor, in nats an image.
    """
    held_out = sorted((row for row in rows if row["split"] == "held-out"), key=lambda row: row["t"])
    t, loss, nats = (np.array([row[key] for row in held_out]) for key in ("t", "loss", "nats"))
    found = {
        "near_data": float(loss[t <= NEAR_DATA].mean()),
        "structure": float(loss[t >= STRUCTURE].mean()),
        "denoising": float(loss.mean()),
        "nats": float(np.trapezoid(nats * t, np.log(t))),
    }
    if "excess" not in held_out[0]:
        return found
    excess, *parts, informed = (np.array([row[name] for row in held_out]) for name in EXCESS)
    within = (t >= INFORMED[0]) & (t <= INFORMED[1])
    return found | {
        "excess": float(excess[t <= NEAR_DATA].mean()),
        **{name: float(part[t <= NEAR_DATA].mean()) for name, part in zip(EXCESS[1:3], parts, strict=True)},
        "informed": float(informed[within].mean()),
        "excess_structure": float(excess[t >= STRUCTURE].mean()),
        # The bound weighs squared errors by a factor of t alone.
        "gap": float(np.trapezoid(nats / loss * excess * t, np.log(t))),
    }
