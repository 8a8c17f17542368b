"""Which spatial frequencies of the image are still in the tokens: linear reconstruction, and its error per band.

Not in the paper, which says that the teacher throws fine detail away (Sec. 1 and Fig. 5, low-pass images): here every
token is asked for its own patch of the image by ridge regression, and what is missing is sorted by frequency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from haste_core.alignment import Grid, resample_tokens
from haste_core.analysis import probe
from haste_core.analysis.tokens import student_tokens, teacher_blocks, teacher_tokens
from haste_core.errors import HasteError
from haste_core.sampling import to_uint8
from haste_core.study.data import open_dataset
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.teacher import Teacher
from haste_core.training import Batch

# Radial frequency as a fraction of Nyquist; the last band holds the corners of the square, up to sqrt(2).
EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 2**0.5)
# Ridge strengths that are tried, as multiples of the mean variance of a feature times the number of tokens.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
VALIDATION = 0.2  # share of the training images the strength is chosen on
FIT_IMAGES = 500


class Readout(NamedTuple):
    """A linear map from tokens to image patches, float64.

    weights: (D, C p q). token_mean: (N, D), image_mean: (C, H, W), both of the images it was fitted on: each place has
    its own intercept, so that what is explained is always more than the mean image. grid: rows and columns of the
    tokens. strength: the ridge strength in the unit of `STRENGTHS`.
    """

    weights: Tensor
    token_mean: Tensor
    image_mean: Tensor
    grid: Grid
    strength: float

    def reconstruct(self, tokens: Tensor) -> Tensor:
        """Images (n, C, H, W) float64 from tokens (n, N, D)."""
        patches = (tokens.double() - self.token_mean) @ self.weights
        return from_patches(patches, self.grid, tuple(self.image_mean.shape)) + self.image_mean  # type: ignore[arg-type]


def to_patches(images: Tensor, grid: Grid) -> Tensor:
    """Images (n, C, H, W) as (n, N, C p q): for each token of `grid`, row by row, the area of the image it covers.

    Raises:
        HasteError: height and width are no multiples of rows and columns.
    """
    n, channels, height, width = images.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise HasteError(f"a {rows}x{columns} grid of tokens does not divide images of {height}x{width}")
    cut = images.reshape(n, channels, rows, height // rows, columns, width // columns)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)


def from_patches(patches: Tensor, grid: Grid, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `to_patches`: (n, N, C p q) to images (n, *shape), shape (C, H, W)."""
    channels, height, width = shape
    cut = patches.reshape(-1, *grid, channels, height // grid[0], width // grid[1])
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(-1, *shape)


def fit_readout(tokens: Tensor, images: Tensor, grid: Grid, strengths: Sequence[float] = STRENGTHS) -> Readout:
    """The ridge regression from each token to its own patch, one map for all places, in closed form.

    The strength is the one of `strengths` with the least squared error on the last fifth of the images, fitted on the
    others; then all images are fitted with it.

    Args:
        tokens: (n, N, D). images: (n, C, H, W). grid: of the tokens.

    Raises:
        HasteError: fewer than 5 images, or a grid that does not divide them.
    """
    if len(tokens) < 5:
        raise HasteError(f"a readout of {len(tokens)} images; possible: 5 or more, the last fifth to choose the ridge")
    kept = len(tokens) - max(1, int(len(tokens) * VALIDATION))
    tried = _solutions(tokens[:kept], images[:kept], grid, strengths)
    errors = [float((r.reconstruct(tokens[kept:]) - images[kept:].double()).square().sum()) for r in tried]
    return _solutions(tokens, images, grid, [strengths[int(np.argmin(errors))]])[0]


def _solutions(tokens: Tensor, images: Tensor, grid: Grid, strengths: Sequence[float]) -> list[Readout]:
    token_mean, image_mean = tokens.double().mean(0), images.double().mean(0)
    gram, cross = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    # In parts: all tokens of a large model in float64 would not fit into memory.
    for seen, shown in zip(tokens.split(probe.BATCH), images.split(probe.BATCH), strict=True):
        x = (seen.double() - token_mean).flatten(0, 1)
        y = to_patches(shown.double() - image_mean, grid).flatten(0, 1)
        gram, cross = gram + x.T @ x, cross + x.T @ y
    values, vectors = torch.linalg.eigh(gram)
    unit, turned = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny), vectors.T @ cross
    return [
        Readout(vectors @ (turned / (values.clamp_min(0) + s * unit)[:, None]), token_mean, image_mean, grid, s)
        for s in strengths
    ]


def band_energies(images: Tensor, edges: Sequence[float] = EDGES) -> np.ndarray:
    """Energy of images (n, C, H, W) per radial band, (n, bands) float64, summed over channels.

    Of the orthonormal 2-D Fourier transform, so that the bands of an image sum to its sum of squares. The radius is
    sqrt(fx^2 + fy^2) over the Nyquist frequency of half a cycle per pixel; a band holds its lower edge and not its
    upper; the first and the last take what lies outside of the edges.
    """
    power = torch.fft.fft2(images.double(), norm="ortho").abs().square().sum(1)
    fy, fx = (np.fft.fftfreq(size) * 2 for size in images.shape[-2:])
    band = torch.from_numpy(np.digitize(np.hypot(fy[:, None], fx[None]), edges[1:-1]))
    return torch.stack([power[:, band == b].sum(-1) for b in range(len(edges) - 1)], 1).numpy()


def relative_error(images: Tensor, reconstructed: Tensor, mean: Tensor, edges: Sequence[float] = EDGES) -> np.ndarray:
    """Energy of the error over energy of the images less `mean`, per band; 0: all is kept, 1: nothing is.

    Args:
        images, reconstructed: (n, C, H, W). mean: (C, H, W), the mean of the training images.

    Returns:
        (bands,) float64; NaN where the images have no energy in a band. It can exceed 1: a readout has the least error
        in all bands together, and one that finds little more than the mean of each patch draws edges between patches.
    """
    lost = band_energies(images.double() - reconstructed.double(), edges).sum(0)
    there = band_energies(images.double() - mean, edges).sum(0)
    return np.divide(lost, there, out=np.full_like(lost, np.nan), where=there > 0)


class Sides(NamedTuple):
    """Training and held-out images of a run, as the generator models them (x) and as the teacher sees them (images)."""

    fit: Batch
    held_out: Batch


def sides(run: Run, fit_images: int = FIT_IMAGES) -> Sides:
    """The first `fit_images` training images and the study's held-out ones (`analysis.n`), without augmentation."""
    return Sides(open_dataset(run.config.data).examples("train", fit_images), probe.held_out(run))


def read_teacher(teacher: Teacher, block: int, seen: Sides) -> tuple[Readout, Tensor]:
    """The readout of a teacher's block (`teacher_blocks`) and its reconstruction of the held-out x.

    Where the teacher's grid does not divide x (14x14 tokens beside latents of 32x32), the tokens are first carried to
    the next finer grid that does, bilinear, as alignment carries them (Tables 11 and 12, arXiv 2505.16792).
    """
    x = seen.fit.x
    grid = (_dividing(x.shape[-2], teacher.grid[0]), _dividing(x.shape[-1], teacher.grid[1]))
    parts = [resample_tokens(teacher_tokens(teacher, side.images, block), teacher.grid, grid) for side in seen]
    readout = fit_readout(parts[0], x, grid)
    return readout, readout.reconstruct(parts[1])


def read_student(model: Any, block: int, seen: Sides, t: float, seed: int) -> tuple[Readout, Tensor]:
    """The readout of a generator's block (from 0) at noise level t, and its reconstruction of the held-out x.

    The target is the clean x; training and held-out images get different noise.
    """
    fitted, fresh = (student_tokens(model, side.x, t, block, seed + i) for i, side in enumerate(seen))
    readout = fit_readout(fitted, seen.fit.x, model.grid)
    return readout, readout.reconstruct(fresh)


def measure(
    run: Run, steps: Sequence[int] | None = None, t: float | None = None, fit_images: int = FIT_IMAGES
) -> pd.DataFrame:
    """The share of the image that a linear readout does not find in the tokens, per frequency band and block.

    The image is what the generator models (`Batch.x`): pixels, or the scaled latents, whose frequencies are those of
    the latent grid.

    Args:
        run: finished.
        steps: of the student, 0 for the untrained network; by default 0 and every kept one.
        t: noise level of the student's input in [0, 1], the study's lowest by default. The teacher sees clean images.
        fit_images: training images that readouts are fitted on, the first of the split, or all there are.

    Returns:
        step, t (0 and 0.0 for the teacher), who ("student" or "teacher"), block (from 0; a teacher's last is its final
        tokens after the norm), blocks (how many there are of it), band_low, band_high (fractions of Nyquist),
        relative_error (in [0, about 1]), strength (of the ridge, see `STRENGTHS`), n (held-out images).
    """
    level = min(run.study.analysis.timesteps) if t is None else t
    seen, teacher = sides(run, fit_images), find_teacher(run.study, run.config.teacher)
    rows: list[dict[str, Any]] = []
    blocks = teacher_blocks(teacher)
    for block in blocks:
        facts = {"step": 0, "t": 0.0, "who": "teacher", "block": block, "blocks": len(blocks)}
        rows += _rows(seen.held_out.x, *read_teacher(teacher, block, seen), facts)
    for step in [0, *run.config.train.kept_steps] if steps is None else steps:
        model = probe.student_at(run, step)
        for block in range(len(model.blocks)):
            facts = {"step": step, "t": level, "who": "student", "block": block, "blocks": len(model.blocks)}
            found = read_student(model, block, seen, level, run.study.analysis.seed)
            rows += _rows(seen.held_out.x, *found, facts)
    return pd.DataFrame(rows)


def reconstructions(
    run: Run, step: int | None = None, t: float | None = None, count: int = 10, fit_images: int = FIT_IMAGES
) -> dict[str, np.ndarray]:
    """The first held-out images and what each block's readout makes of them, uint8 (count, C, S, S) by label.

    Args as in `measure`; step: the last by default. Of latents the channels are shown as they are, not decoded.
    """
    level = min(run.study.analysis.timesteps) if t is None else t
    seen, teacher = sides(run, fit_images), find_teacher(run.study, run.config.teacher)
    model = probe.student_at(run, run.config.train.steps if step is None else step)
    shown = {"held-out image": seen.held_out.x}
    for block in teacher_blocks(teacher):
        name = "teacher, final" if block == teacher.blocks else f"teacher, block {block}"
        shown[name] = read_teacher(teacher, block, seen)[1]
    for block in range(len(model.blocks)):
        found = read_student(model, block, seen, level, run.study.analysis.seed)
        shown[f"student, block {block}"] = found[1]
    return {name: to_uint8(images[:count]).numpy() for name, images in shown.items()}


def _dividing(size: int, count: int) -> int:
    """The smallest divisor of `size` that is not below `count`, or `size` itself."""
    return next((n for n in range(count, size) if size % n == 0), size)


def _rows(x: Tensor, readout: Readout, reconstructed: Tensor, facts: dict[str, Any]) -> list[dict[str, Any]]:
    errors = relative_error(x, reconstructed, readout.image_mean)
    return [
        {**facts, "band_low": low, "band_high": high, "relative_error": float(error),
         "strength": readout.strength, "n": len(x)}
        for low, high, error in zip(EDGES[:-1], EDGES[1:], errors, strict=True)
    ]  # fmt: skip
