"""The angle between denoising and alignment gradients: the exact cosine (Eq. 2, arXiv 2505.16792), and an estimate.

The estimate is read off ordinary phase I steps, without a backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from haste_core.errors import HasteError, unknown
from haste_core.paths import Objective
from haste_core.taps import QK, Seen
from haste_core.training import Batch, step_losses

if TYPE_CHECKING:
    from haste_core.haste import HASTE

LOSSES = ("feature", "attention", "holistic")
# Groups of images with a gradient each: enough for a bootstrap, few enough for the memory of an XL block.
CHUNKS = 32
# Parameters that are widened to float64 at a time.
COLUMNS = 2**20
# Noise levels between bins of the online estimate; the first bin is "near data" of Fig. 4, arXiv 2505.16792.
EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


# -- the exact cosine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Products:
    """Inner products between the gradients of chunks of images, each (chunks, chunks) float64.

    cross: of the denoising gradient (rows) with that of the alignment loss (columns). denoising, alignment: of each
    with itself. The gradients of all chunks add up to that of all images.
    """

    cross: np.ndarray
    denoising: np.ndarray
    alignment: np.ndarray

    def rho(self, weights: np.ndarray | None = None) -> np.ndarray:
        """The cosine of the gradients of all images, (...,) in [-1, 1]; NaN where one of them is zero.

        weights: (..., chunks), how often each chunk counts; by default once. A product of a chunk with itself counts
        that often, not its square: a chunk drawn twice would otherwise agree with its own copy.
        """
        w = np.ones(len(self.cross)) if weights is None else np.asarray(weights, dtype=np.float64)

        def total(gram: np.ndarray) -> np.ndarray:
            return np.einsum("...i,ij,...j->...", w, gram, w, optimize=True) - (w * w - w) @ np.diagonal(gram)

        return _cosine(total(self.cross), total(self.denoising), total(self.alignment))

    @property
    def rho_corrected(self) -> float:
        """The cosine from products of different chunks only; NaN where a squared norm comes out negative.

        Not in the paper: noise in the gradients of finitely many images lengthens them and so shrinks every cosine
        towards 0. Noise of different chunks is independent, so their products are unbiased. May leave [-1, 1].
        """
        return float(_cosine(*(g.sum() - np.trace(g) for g in (self.cross, self.denoising, self.alignment))))

    @property
    def norm_ratio(self) -> float:
        """Length of the alignment gradient over that of the denoising gradient."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.sqrt(self.alignment.sum() / self.denoising.sum()))

    def interval(self, resamples: int, confidence: float, seed: int) -> tuple[float, float]:
        """The ends of a percentile interval of `rho`, from a bootstrap over chunks."""
        chunks = len(self.cross)
        weights = np.random.default_rng(seed).multinomial(chunks, np.full(chunks, 1 / chunks), size=resamples)
        low, high = np.quantile(self.rho(weights), [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)


def _cosine(cross: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    positive = (np.asarray(first) > 0) & (np.asarray(second) > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(positive, np.asarray(cross) / np.sqrt(np.where(positive, first, 1) * second), np.nan)


def noise(like: Tensor, seed: int) -> Tensor:
    """eps shaped like x (B, C, S, S), float32 on the CPU, from `seed` alone."""
    return torch.randn(like.shape, generator=Generator().manual_seed(seed))


def split(batch: Batch, eps: Tensor, chunks: int) -> Iterator[tuple[Batch, Tensor]]:
    """A batch and its noise in `chunks` parts of (nearly) equal size, at most one per image."""
    pieces = (part.tensor_split(min(chunks, len(eps))) for part in (batch.x, batch.y, batch.images, eps))
    for x, y, images, noise_part in zip(*pieces, strict=True):
        yield Batch(x, y, images), noise_part


def reaching(haste: HASTE, block: int) -> tuple[str, ...]:
    """Those of `LOSSES` that are on and read at or above `block` (from 0), so that they have a gradient there."""
    feature = haste.projector is not None and block < haste.depth
    attention = any(block <= student for student, _ in haste.pairs)
    found = zip(LOSSES, (feature, attention, feature and attention), strict=True)
    return tuple(loss for loss, reaches in found if reaches)


def losses_at(
    model: nn.Module, haste: HASTE, objective: Objective, batch: Batch, eps: Tensor, t: float, watch: bool = False
) -> dict[str, Tensor]:
    """Weighted losses of a phase I step at one noise level: "denoising", and of "feature", "attention" what is on."""
    device = next(model.parameters()).device
    batch, eps, u = batch.to(device), eps.to(device), torch.full((len(batch.x),), t, device=device)
    found = step_losses(model, objective, batch, u, eps, batch.y, haste, watch)
    assert found.alignment is not None
    weighted = {"feature": haste.lambda_feature, "attention": haste.lambda_attention}
    parts = {name: getattr(found.alignment, name) for name in weighted}
    return {"denoising": found.denoising} | {n: weighted[n] * part for n, part in parts.items() if part is not None}


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

    Eq. 2, arXiv 2505.16792: `gradient_cosine(...)["feature"].rho()`. Every loss has its weight of Eq. 4; "holistic" is
    lambda_R L_REPA + lambda_A L_ATTA. No `.grad`, mode or global random state changes.

    Args:
        batch: images with their true labels, on any device. t: the noise level in [0, 1].
        block: whose parameters, from 0. losses: of `LOSSES`; by default all that reach the block.
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
    names = ["denoising", *(part for part in LOSSES[:2] if part in losses or "holistic" in losses)]
    parameters = list(model.blocks[block].parameters())  # type: ignore[index, union-attr]
    size = sum(p.numel() for p in parameters)
    gradients = torch.empty(len(names), min(chunks, len(batch.x)), size, dtype=parameters[0].dtype)
    with torch.enable_grad():
        for i, (part, eps) in enumerate(split(batch, noise(batch.x, seed), chunks)):
            found = losses_at(model, haste, objective, part, eps, t)
            for row, name in zip(gradients[:, i], names, strict=True):
                row.copy_(_gradient(found[name] * (len(eps) / len(batch.x)), parameters))
    grams = _grams(gradients)
    products = {}
    for kind in losses:
        parts = [names.index(name) for name in (LOSSES[:2] if kind == "holistic" else [kind])]
        products[kind] = Products(grams[0, parts].sum(0), grams[0, 0], grams[np.ix_(parts, parts)].sum((0, 1)))
    return products


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    # What a loss does not use (an MLP above the last aligned attention) has the gradient zero.
    # Scaled, as gradients of a run in fp16 would underflow; a power of two leaves the digits as they are.
    scale = 2.0**14
    found = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.detach().flatten() for gradient in found]) / scale


def _grams(gradients: Tensor) -> np.ndarray:
    """All inner products of gradients (L, C, P), as (L, L, C, C) float64."""
    count, chunks, _ = gradients.shape
    total = torch.zeros(count * chunks, count * chunks, dtype=torch.float64)
    for columns in gradients.flatten(0, 1).split(COLUMNS, dim=1):
        wide = columns.double()
        total += wide @ wide.T
    return total.reshape(count, chunks, count, chunks).transpose(1, 2).numpy()


def exact(
    model: nn.Module, haste: HASTE, objective: Objective, batch: Batch, timesteps: Sequence[float], block: int
) -> float:
    """Mean cosine between denoising and alignment gradients over the losses that are on and over noise levels.

    Eq. 2, Tables 9 and 10, arXiv 2505.16792: on the parameters of one block (from 0), on fixed images with fixed noise.
    """
    losses = [loss for loss in reaching(haste, block) if loss != "holistic"]
    with torch.compiler.set_stance("force_eager"):  # compiled blocks give gradients of one loss per graph
        found = [gradient_cosine(model, haste, objective, batch, t, block, losses) for t in timesteps]
    return float(np.mean([products.rho() for by_loss in found for products in by_loss.values()]))


# -- the online estimate ----------------------------------------------------------------------------------------------


class OnlineAngle:
    """Sums, over training steps, of products between the gradients of alignment and of the rest of the loss.

    Not in the paper, whose check takes a backward pass per loss (Eq. 2). Here the angle is taken at activations: the
    gradient of the alignment loss read at a tensor ("feature": at the tokens of the aligned depth; "attention": at q
    and k of all aligned blocks together) is caught on an alias of the tensor, the whole gradient on the tensor itself.
    Their difference, the rest, is the denoising loss with whatever alignment losses are read further up: the denoising
    loss alone for features where no aligned block lies at or above the depth (the paper's sizes), and for attention
    where one block and no feature is aligned.

    The cosine is over all samples, tokens and widths of a bin at once, products of a sample with itself only. Samples
    whose gradient is not finite (a step that loss scaling skips) are not counted.

    Args:
        device: of the training step.
        edges: of the bins of noise levels, ascending; values outside fall into the outermost bins.
        processes: how many train together. Gradients of one process are so many times longer, for its loss is a mean
            over its own samples; the mean of the sums over processes is that of a single process.
    """

    def __init__(self, device: torch.device | str = "cpu", edges: Sequence[float] = EDGES, processes: int = 1) -> None:
        self.units = torch.tensor([1 / processes] * 3 + [processes], dtype=torch.float64, device=device)
        self.edges = torch.tensor(edges, dtype=torch.float32, device=device)
        # own * rest, own^2, rest^2, samples; a long run adds up more samples than float32 can count.
        self.sums = torch.zeros(2, len(edges) - 1, 4, dtype=torch.float64, device=device)

    def watch(self, seen: Seen, t: Tensor) -> Seen:
        """Aliases of the same values for the alignment losses, so that the backward pass is summed up.

        t: (B,) noise levels in [0, 1].
        """
        bins = torch.bucketize(t.to(self.edges), self.edges[1:-1], right=True)
        member = bins[:, None] == torch.arange(len(self.edges) - 1, device=bins.device)  # (B, bins)
        tokens = {d: self._alias(h, 0, member, counts=i == 0) for i, (d, h) in enumerate(seen.tokens.items())}
        qk: dict[int, QK] = {}
        for i, (block, (q, k)) in enumerate(seen.qk.items()):
            # A sample counts once, however many tensors it is watched at.
            qk[block] = self._alias(q, 1, member, counts=i == 0), self._alias(k, 1, member, counts=False)
        return Seen(tokens, qk)

    def _alias(self, tensor: Tensor, loss: int, member: Tensor, counts: bool) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        own: list[Tensor] = []

        def add(total: Tensor) -> None:
            if own:  # else no loss read the alias
                self._add(loss, member, own.pop(), total, counts)

        alias = tensor.view_as(tensor)
        alias.register_hook(lambda gradient: own.append(gradient))
        tensor.register_hook(add)
        return alias

    @torch.no_grad()
    def _add(self, loss: int, member: Tensor, own: Tensor, total: Tensor, counts: bool) -> None:
        own, total = own.float().flatten(1), total.float().flatten(1)
        rest = total - own
        count = torch.full((len(own),), float(counts), device=own.device)
        parts = torch.stack([(own * rest).sum(1), own.square().sum(1), rest.square().sum(1), count], dim=1)
        parts = torch.where(parts.isfinite().all(1, keepdim=True), parts, 0.0).double() * self.units
        # Not index_add_, whose order of additions a GPU does not fix.
        self.sums[loss] += (member[:, :, None] * parts[:, None, :]).sum(0)

    def read(self) -> list[dict[str, Any]]:
        """Sums since the last `reset` as cosines; waits for the device.

        Returns:
            A row per bin of every loss that was seen: loss; bin, from 0; t_low, t_high; cosine, in [-1, 1], NaN for an
            empty bin; norm_ratio, length of the own part over that of the rest; count, samples.
        """
        edges = [round(edge, 6) for edge in self.edges.tolist()]
        rows = []
        for loss, bins in zip(LOSSES[:2], self.sums.cpu().numpy(), strict=True):
            for i, (product, own, rest, count) in enumerate(bins if bins.any() else ()):
                with np.errstate(invalid="ignore", divide="ignore"):
                    cosine, ratio = float(product / np.sqrt(own * rest)), float(np.sqrt(own / rest))
                facts = {"loss": loss, "bin": i, "t_low": edges[i], "t_high": edges[i + 1], "cosine": cosine}
                rows.append(facts | {"norm_ratio": ratio, "count": round(float(count))})
        return rows

    def summary(self) -> dict[str, Any]:
        """`online`: cosines by loss and bin (None: empty bin); `online_angle`: their mean. Empty before any sample.

        Resets the sums.
        """
        rows = self.read()
        self.reset()
        cosines = np.array([row["cosine"] for row in rows])
        if np.isnan(cosines).all():
            return {}
        bins: dict[str, list[float | None]] = {}
        for row in rows:
            bins.setdefault(row["loss"], []).append(None if np.isnan(row["cosine"]) else row["cosine"])
        return {"online": bins, "online_angle": float(np.nanmean(cosines))}

    def reset(self) -> None:
        """Begin again from nothing."""
        self.sums.zero_()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the sums to where `fn` moves tensors; they stay float64."""
        device = fn(torch.zeros((), device=self.sums.device)).device
        self.sums, self.units, self.edges = (part.to(device) for part in (self.sums, self.units, self.edges))

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and edges of the bins."""
        return {"sums": self.sums.clone(), "edges": self.edges.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what was saved, in the same bins."""
        saved = state["edges"].tolist()
        if saved != self.edges.tolist():
            raise HasteError(f"online angles were saved in bins {saved}; expected {self.edges.tolist()}")
        self.sums.copy_(state["sums"])
