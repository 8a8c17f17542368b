"""The angle between the denoising gradient and the alignment gradients at one block, on modules as they are.

Needs no checkpoint and no run, so that a trigger can ask it in the middle of phase I; `analysis.gradients` asks it for
the checkpoints of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from haste_core.compiling import uncompiled
from haste_core.errors import HasteError, unknown
from haste_core.haste import HASTE
from haste_core.paths import Objective
from haste_core.training import Batch, step_losses

LOSSES = ("feature", "attention", "holistic")
# Groups of images with a gradient each: enough for a bootstrap, few enough for the memory of an XL block.
CHUNKS = 32
# Parameters that are widened to float64 at a time.
COLUMNS = 2**20


@dataclass(frozen=True)
class Products:
    """Inner products between the gradients of all chunks of images, each (chunks, chunks) float64.

    Every chunk's gradient is its share of the gradient of all images, so a sum over a matrix is the product of the
    gradients of all images.

    Attributes:
        cross: of the denoising gradient (rows) with that of the alignment loss (columns).
        denoising, alignment: of each with itself.
    """

    cross: np.ndarray
    denoising: np.ndarray
    alignment: np.ndarray

    def rho(self, weights: np.ndarray | None = None) -> np.ndarray:
        """The cosine of the gradients of all images, in [-1, 1]; NaN where one of them is zero.

        Eq. 2, arXiv 2505.16792.

        Args:
            weights: (..., chunks), how often each chunk counts; by default once. A product of a chunk with itself
                counts that often, not its square: a chunk drawn twice would otherwise agree with its own copy.

        Returns:
            (...,) float64.
        """
        w = np.ones(len(self.cross)) if weights is None else np.asarray(weights, dtype=np.float64)
        return _cosine(*(_total(g, w) for g in (self.cross, self.denoising, self.alignment)))

    @property
    def rho_corrected(self) -> float:
        """The cosine from products of different chunks only; NaN where a squared norm comes out negative.

        Not in the paper: noise in the gradients of finitely many images lengthens them and so shrinks every cosine
        towards 0. Noise of different chunks is independent, so their products are unbiased. May leave [-1, 1].
        """
        return float(_cosine(*(float(g.sum() - np.trace(g)) for g in (self.cross, self.denoising, self.alignment))))

    @property
    def norm_ratio(self) -> float:
        """Length of the alignment gradient over that of the denoising gradient."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.sqrt(self.alignment.sum() / self.denoising.sum()))

    def interval(self, resamples: int, confidence: float, seed: int) -> tuple[float, float]:
        """The ends of a percentile interval of `rho`, from a bootstrap over chunks seeded by `seed`."""
        chunks = len(self.cross)
        weights = np.random.default_rng(seed).multinomial(chunks, np.full(chunks, 1 / chunks), size=resamples)
        low, high = np.quantile(self.rho(weights), [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)


def _total(gram: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.einsum("...i,ij,...j->...", w, gram, w, optimize=True) - (w * w - w) @ np.diagonal(gram)


def _cosine(cross: np.ndarray | float, first: np.ndarray | float, second: np.ndarray | float) -> np.ndarray:
    positive = (np.asarray(first) > 0) & (np.asarray(second) > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(positive, np.asarray(cross) / np.sqrt(np.where(positive, first, 1) * second), np.nan)


def noise(like: Tensor, seed: int) -> Tensor:
    """eps shaped like x (B, C, S, S), float32 on the CPU, from `seed` alone: that of `probe.noised`."""
    return torch.randn(like.shape, generator=Generator().manual_seed(seed))


def reaching(haste: HASTE, block: int) -> tuple[str, ...]:
    """Which of `LOSSES` have a gradient at the parameters of `block` (from 0), given what the alignment compares.

    A loss has none where it is off or read below the block; "holistic" needs both parts.
    """
    feature = haste.projector is not None and block < haste.depth
    attention = any(block <= student for student, _ in haste.pairs)
    found = zip(LOSSES, (feature, attention, feature and attention), strict=True)
    return tuple(loss for loss, reaches in found if reaches)


def losses_at(
    model: nn.Module, haste: HASTE, objective: Objective, batch: Batch, eps: Tensor, t: float, watch: bool = False
) -> dict[str, Tensor]:
    """Weighted losses of a phase I step at one noise level: "denoising", and of "feature", "attention" what is on.

    Args:
        model, haste, objective: as in training; labels are those of the batch, none is dropped.
        batch: on any device. eps: (B, C, S, S). t: the noise level in [0, 1].
        watch: let the online angle see the pass.
    """
    device = next(model.parameters()).device
    batch, eps, u = batch.to(device), eps.to(device), torch.full((len(batch.x),), t, device=device)
    found = step_losses(model, objective, batch, u, eps, batch.y, haste, watch)
    losses = {"denoising": found.denoising}
    assert found.alignment is not None
    if found.alignment.feature is not None:
        losses["feature"] = haste.lambda_feature * found.alignment.feature
    if found.alignment.attention is not None:
        losses["attention"] = haste.lambda_attention * found.alignment.attention
    return losses


def split(batch: Batch, eps: Tensor, chunks: int) -> Iterator[tuple[Batch, Tensor]]:
    """A batch and its noise in `chunks` parts of (nearly) equal size, at most one per image."""
    pieces = (part.tensor_split(min(chunks, len(eps))) for part in (batch.x, batch.y, batch.images, eps))
    for x, y, images, noise_part in zip(*pieces, strict=True):
        yield Batch(x, y, images), noise_part


def gradient_cosine(
    model: nn.Module,
    haste: HASTE,
    objective: Objective,
    batch: Batch,
    t: float,
    block: int,
    losses: Sequence[str] | None = None,
    chunks: int = CHUNKS,
    seed: int = 0,
) -> dict[str, Products]:
    """Inner products of the denoising gradient and of each alignment loss's gradient at the parameters of one block.

    Eq. 2, arXiv 2505.16792: `gradient_cosine(...)["feature"].rho()`. Gradients are of the parameters' own precision,
    products float64. Every loss has its weight of Eq. 4, which moves `norm_ratio` and the holistic sum
    lambda_R L_REPA + lambda_A L_ATTA and leaves the other cosines alone. Modules are left as they were: no `.grad`, no
    mode and no global random state changes.

    Args:
        model, haste, objective: those of a run in phase I.
        batch: images with their true labels, on any device.
        t: the noise level in [0, 1]. block: whose parameters, from 0.
        losses: of `LOSSES`; by default all that reach the block.
        chunks: groups of images with a gradient each. seed: of the noise.

    Raises:
        HasteError: there is no such block, or a loss has no gradient there.
    """
    count = len(model.blocks)  # type: ignore[arg-type]
    if not 0 <= block < count:
        raise unknown("block (from 0) to compare gradients on", block, range(count))
    possible = reaching(haste, block)
    losses = possible if losses is None else losses
    if not losses or not set(losses) <= set(possible):
        raise HasteError(
            f"block {block} (from 0) and losses {', '.join(losses) or 'none'}; expected there: "
            f"{', '.join(possible) or 'none'} (the feature loss is read after block {haste.depth - 1}, "
            f"attention in blocks {sorted({s for s, _ in haste.pairs})})"
        )
    alone = [part for part in LOSSES[:2] if part in losses or "holistic" in losses]
    names = ["denoising", *alone]
    parameters = list(model.blocks[block].parameters())  # type: ignore[index, union-attr]
    size = sum(p.numel() for p in parameters)
    gradients = torch.empty(len(names), min(chunks, len(batch.x)), size, dtype=parameters[0].dtype)
    with torch.enable_grad():
        for i, (part, eps) in enumerate(split(batch, noise(batch.x, seed), chunks)):
            found = losses_at(model, haste, objective, part, eps, t)
            for row, name in zip(gradients[:, i], names, strict=True):
                row.copy_(_gradient(found[name] * (len(eps) / len(batch.x)), parameters))
    grams = _grams(gradients)
    return {loss: _products(grams, [names.index(p) for p in (LOSSES[:2] if loss == "holistic" else [loss])])
            for loss in losses}  # fmt: skip


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    # What a loss does not use (an MLP above the last aligned attention) has the gradient zero.
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.detach().flatten() for gradient in found])


def _grams(gradients: Tensor) -> np.ndarray:
    """All inner products of gradients (L, C, P), as (L, L, C, C) float64."""
    count, chunks, _ = gradients.shape
    total = torch.zeros(count * chunks, count * chunks, dtype=torch.float64)
    for columns in gradients.flatten(0, 1).split(COLUMNS, dim=1):
        wide = columns.double()
        total += wide @ wide.T
    return total.reshape(count, chunks, count, chunks).transpose(1, 2).numpy()


def _products(grams: np.ndarray, parts: list[int]) -> Products:
    """Products of the denoising gradient (index 0) with the sum of the gradients `parts`: they add up."""
    cross = grams[0, parts].sum(0)
    return Products(cross, grams[0, 0], grams[np.ix_(parts, parts)].sum((0, 1)))


def exact(
    model: nn.Module, haste: HASTE, objective: Objective, batch: Batch, timesteps: Sequence[float], block: int
) -> float:
    """Mean cosine between denoising and alignment gradients over the losses that are on and over noise levels.

    Eq. 2, Tables 9 and 10, arXiv 2505.16792: on the parameters of one block, on fixed images with fixed noise.

    Args:
        model, haste, objective: of a run in phase I. batch: images with their true labels.
        timesteps: noise levels in [0, 1]. block: from 0.
    """
    which = [loss for loss in reaching(haste, block) if loss != "holistic"]
    with uncompiled():  # one graph gives gradients of several losses
        found = [gradient_cosine(model, haste, objective, batch, t, block, which) for t in timesteps]
    return float(np.mean([products.rho() for by_loss in found for products in by_loss.values()]))
