"""Capacity of teacher and student tokens: the number of directions they use, and the spatial frequencies they keep.

Not in the paper, which argues from a capacity mismatch without measuring it (Sec. 1, Fig. 5). Ranks, intrinsic
dimension and entropy grow with the number of rows and depend on centring, so teacher and student are measured on the
same number of rows, one row per image. Frequencies: a linear readout reconstructs each token's own patch of the image,
and its error is split by frequency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from haste_core.alignment import Grid, resample_tokens
from haste_core.analysis import probe
from haste_core.analysis.similarity import linear_cka
from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer
from haste_core.sampling import to_uint8
from haste_core.study.config import StudySettings, digest
from haste_core.study.data import open_dataset
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.taps import Taps
from haste_core.teacher import Teacher
from haste_core.training import Batch

NEIGHBOURS = 20  # of `local_rank`
DISCARDED = 0.1  # of `two_nn`
GROUPS = 10  # of the jackknife
DISCARDED_MEASURES = ("missed", "unlike", "narrow")  # of `discarded`
# Radial frequency as a fraction of Nyquist; the last band holds the corners of the square, up to sqrt(2).
EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 2**0.5)
# Candidate ridge strengths, as multiples of the mean variance of a feature times the number of tokens.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
VALIDATION = 0.2  # share of the training images the strength is chosen on
FIT_IMAGES = 500

Measure = Callable[[np.ndarray], float]


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of centred features (n, d); between 1 and min(n - 1, d).

    Roy & Vetterli (EUSIPCO 2007), of the singular values themselves, not of their squares, the eigenvalues of the
    covariance. 0 if all rows are equal.
    """
    return float(_effective_rank(_singular_values(features)))


def participation_ratio(features: np.ndarray) -> float:
    """(sum l)^2 / sum l^2 over the eigenvalues l of the covariance of features (n, d); 0 if all rows are equal.

    Counts d equal directions as d, like `effective_rank`, and small directions for less.
    """
    power = _singular_values(features) ** 2
    return float(power.sum() ** 2 / (power**2).sum()) if power.any() else 0.0


def two_nn(features: np.ndarray) -> float:
    """Intrinsic dimension of features (n, d) from the distances to the two nearest neighbours.

    Facco et al. (Sci. Rep. 7, 2017): with mu = r2 / r1, -log(1 - F(mu)) = dimension * log mu; the slope through the
    origin over the points of smallest mu. F of the i-th smallest of n is i / n. Independent of centring.

    The fit leaves out the share `DISCARDED` of points with the largest mu, the noisiest. Equal rows count once, since
    a distance of 0 carries no information on the dimension. NaN with fewer than three distinct rows; infinite if all
    distances are equal.
    """
    distinct = np.unique(np.asarray(features, dtype=np.float64), axis=0)
    if len(distinct) < 3:
        return math.nan
    from scipy.spatial.distance import cdist

    near = np.partition(cdist(distinct, distinct), (1, 2), axis=1)[:, 1:3]
    log_mu = np.sort(np.log(near[:, 1] / near[:, 0]))
    kept = max(1, min(int(len(log_mu) * (1 - DISCARDED)), len(log_mu) - 1))  # at i = n the left side is infinite
    x, y = log_mu[:kept], -np.log1p(-np.arange(1, kept + 1) / len(log_mu))
    return float(x @ y / (x @ x)) if x.any() else math.inf


def matrix_entropy(features: np.ndarray) -> float:
    """Matrix-based Renyi entropy of order 1 in nats, between 0 (one direction) and log min(n, d).

    Giraldo et al. (IEEE Trans. Inf. Theory 61, 2015) with the linear kernel: von Neumann's entropy of the Gram matrix
    of the L2-normalised rows of features (n, d) divided by its trace. Not centred: a direction that all rows share
    lowers it. Rows of length zero have no direction and are left out; NaN if no other is left.
    """
    features = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=1)
    rows = features[lengths > 0] / lengths[lengths > 0, None]
    if not len(rows):
        return math.nan
    # The squared singular values are the Gram matrix's eigenvalues other than zero.
    from scipy.special import entr

    return float(entr(np.linalg.svd(rows, compute_uv=False) ** 2 / len(rows)).sum())


def local_rank(features: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Mean over all points of the effective rank of their k nearest neighbours; between 1 and min(k - 1, d).

    Local principal components (Fukunaga & Olsen, IEEE Trans. Comput. C-20, 1971), counted by `effective_rank` instead
    of by a threshold: for every row of features (n, d), its k nearest other rows (Euclidean), centred at their mean.

    Raises:
        HasteError: there are not k other rows.
    """
    features = np.asarray(features, dtype=np.float64)
    if not 2 <= k < len(features):
        raise HasteError(f"local rank of {len(features)} rows with k={k} neighbours; expected k from 2 to n - 1")
    from scipy.spatial.distance import cdist

    distances = cdist(features, features)
    np.fill_diagonal(distances, np.inf)
    near = np.argpartition(distances, k - 1, axis=1)[:, :k]
    return float(_effective_rank(np.stack([_singular_values(features[rows]) for rows in near])).mean())


def _singular_values(features: np.ndarray) -> np.ndarray:
    """Singular values of the centred features, those within rounding of zero set to zero."""
    features = np.asarray(features, dtype=np.float64)
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    # Rounding of the mean is relative to the features themselves, also if nothing is left after centring.
    noise = np.finfo(np.float64).eps * max(features.shape) * np.linalg.norm(features)
    return np.where(values > noise, values, 0.0)


def _effective_rank(values: np.ndarray) -> np.ndarray:
    total = values.sum(-1, keepdims=True)
    shares = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    from scipy.special import entr

    return np.where(total[..., 0] > 0, np.exp(entr(shares).sum(-1)), 0.0)


def measures(k: int = NEIGHBOURS) -> dict[str, Measure]:
    """Every measure of features (n, d) by name; k is that of `local_rank`."""
    return {
        "effective_rank": effective_rank,
        "participation_ratio": participation_ratio,
        "two_nn": two_nn,
        "matrix_entropy": matrix_entropy,
        "local_rank": partial(local_rank, k=k),
    }


def interval(features: np.ndarray, measure: Measure, confidence: float) -> tuple[float, float]:
    """Confidence interval of a measure over rows (n, d), by the jackknife that leaves out one group of rows at a time.

    Not a bootstrap: drawing with replacement repeats rows, which lowers every rank and puts nearest neighbours at
    distance zero. Row i belongs to group i modulo `GROUPS`; Student's t with one degree of freedom less than groups
    around the value of all rows. NaN if a value is not finite.
    """
    groups = min(GROUPS, len(features))
    group = np.arange(len(features)) % groups
    left = np.array([measure(features[group != g]) for g in range(groups)])
    from scipy.special import stdtrit

    error = math.sqrt((groups - 1) * left.var()) * stdtrit(groups - 1, (1 + confidence) / 2)
    value = measure(features)
    return (value - error, value + error) if math.isfinite(value + error) else (math.nan, math.nan)


def one_per_image(tokens: Tensor, grid: Grid, seed: int) -> np.ndarray:
    """One token of every image, (n, D) float64, drawn at random, since tokens of one image are not independent.

    The place is drawn as a share of height and width of the grid (rows, columns) from `seed` alone, so that teacher and
    student, every block and every step are measured at the same places.
    """
    share = torch.rand(len(tokens), 2, generator=Generator().manual_seed(seed), dtype=torch.float64)
    place = (share * torch.tensor(grid)).long()
    return tokens[torch.arange(len(tokens)), place[:, 0] * grid[1] + place[:, 1]].double().numpy()


def teacher_tokens(teacher: Teacher, block: int, batch: Batch, seed: int = 0) -> Tensor:
    """Patch tokens (n, N, D) float32 on the CPU after a block of the teacher, which sees clean images under any seed.

    Blocks count from 0; `teacher.blocks` is one more: the tokens after the final norm, with which students are aligned.
    """
    parts = (part.to(teacher.mean.device) for part in batch.images.split(probe.BATCH))
    if block == teacher.blocks:
        found = [teacher(part).tokens for part in parts]
    else:
        found = [teacher.block_tokens(part, [block])[block] for part in parts]
    return torch.cat([tokens.float().cpu() for tokens in found])


class Block(NamedTuple):
    """A block of teacher or student: columns that name it, its token grid, and its tokens of a batch under a seed."""

    facts: dict[str, Any]
    grid: Grid
    tokens: Callable[[Batch, int], Tensor]


def blocks(run: Run, steps: Sequence[int] | None, timesteps: Sequence[float]) -> Iterator[Block]:
    """Every block of a run's teacher, which sees clean images, then of its student by step and noise level in [0, 1].

    steps: of the student, 0 for the untrained network; by default 0 and every kept one.
    """
    teacher = probe.teacher_of(run)
    for block in range(teacher.blocks + 1):
        facts = {"step": 0, "t": 0.0, "who": "teacher", "block": block, "blocks": teacher.blocks + 1}
        yield Block(facts, teacher.grid, partial(teacher_tokens, teacher, block))
    for step in probe.checkpoints(run, [0, *run.config.train.kept_steps] if steps is None else steps):
        model = probe.student_at(run, step)
        for t, block in product(timesteps, range(len(model.blocks))):
            facts = {"step": step, "t": t, "who": "student", "block": block, "blocks": len(model.blocks)}
            yield Block(facts, model.grid, partial(student_tokens, model, t, block))


def student_tokens(model: DiffusionTransformer, t: float, block: int, batch: Batch, seed: int) -> Tensor:
    """Patch tokens (n, N, D) float32 on the CPU after a block (from 0) of a generator at noise level t."""
    return probe.student_output(model, batch.x, t, Taps(depths=(block + 1,)), seed).tokens[block + 1]


def token_capacity(
    run: Run, steps: Sequence[int] | None = None, timesteps: Sequence[float] | None = None, k: int = NEIGHBOURS
) -> pd.DataFrame:
    """Every measure of the tokens after each block of the student over training, and of its teacher.

    Args:
        run, steps, timesteps: as of `blocks`; noise levels are the study's by default. k: neighbours of `local_rank`.

    Returns:
        Columns of `blocks`: step, t (0 for the teacher), who ("student" or "teacher"), block (from 0; a teacher's last
        is its final tokens after the norm), blocks (how many there are of it). Then kind ("tokens": one random token
        per image; "patch mean": the mean over an image's tokens), measure, value (directions; matrix_entropy in nats),
        low, high (`interval`; NaN for local_rank, which is too slow to repeat), n (held-out images), width (d), k.
    """
    analysis, batch, rows = run.study.analysis, probe.held_out(run), []
    for facts, grid, tokens_of in blocks(run, steps, analysis.timesteps if timesteps is None else timesteps):
        tokens = tokens_of(batch, analysis.seed)
        kinds = {"tokens": one_per_image(tokens, grid, analysis.seed), "patch mean": tokens.double().mean(1).numpy()}
        for (kind, features), (name, of) in product(kinds.items(), measures(k).items()):
            ends = (math.nan, math.nan) if name == "local_rank" else interval(features, of, analysis.confidence)
            found = {"kind": kind, "measure": name, "value": of(features), "low": ends[0], "high": ends[1]}
            rows.append(facts | found | {"n": len(features), "width": features.shape[1], "k": k})
    return pd.DataFrame(rows)


def to_patches(images: Tensor, grid: Grid) -> Tensor:
    """Images (n, C, H, W) as (n, N, C p q): for each token of `grid`, row by row, the area of the image it covers."""
    size = (images.shape[-2] // grid[0], images.shape[-1] // grid[1])
    return F.unfold(images, size, stride=size).transpose(1, 2)


class Readout(NamedTuple):
    """A linear map from tokens to image patches, float64.

    weights: (D, C p q). token_mean: (N, D), image_mean: (C, H, W), both of the images it was fitted on: each place has
    its own intercept, so that the explained part excludes the mean image. grid: rows and columns of the tokens.
    strength: the ridge strength in the unit of `STRENGTHS`.
    """

    weights: Tensor
    token_mean: Tensor
    image_mean: Tensor
    grid: Grid
    strength: float

    def reconstruct(self, tokens: Tensor) -> Tensor:
        """Images (n, C, H, W) float64 from tokens (n, N, D)."""
        patches = (tokens.double() - self.token_mean) @ self.weights
        height, width = self.image_mean.shape[-2:]
        size = (height // self.grid[0], width // self.grid[1])
        return F.fold(patches.transpose(1, 2), (height, width), size, stride=size) + self.image_mean


def fit_readout(tokens: Tensor, images: Tensor, grid: Grid, strengths: Sequence[float] = STRENGTHS) -> Readout:
    """Ridge regression from each token (n, N, D) to its own patch of images (n, C, H, W), in closed form.

    One map for all places. The strength is the one of `strengths` with the least squared error on the last fifth of the
    images, fitted on the others; then all images are fitted with it.

    Raises:
        HasteError: fewer than 5 images.
    """
    if len(tokens) < 5:
        raise HasteError(f"a readout of {len(tokens)} images; expected 5 or more, the last fifth to choose the ridge")
    kept = len(tokens) - max(1, int(len(tokens) * VALIDATION))
    tried = _solutions(tokens[:kept], images[:kept], grid, strengths)
    errors = [float((r.reconstruct(tokens[kept:]) - images[kept:].double()).square().sum()) for r in tried]
    return _solutions(tokens, images, grid, [strengths[int(np.argmin(errors))]])[0]


def _solutions(tokens: Tensor, images: Tensor, grid: Grid, strengths: Sequence[float]) -> list[Readout]:
    token_mean, image_mean = tokens.double().mean(0), images.double().mean(0)
    gram, cross = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    # In parts: all tokens of a large model in float64 would not fit into memory.
    for part, shown in zip(tokens.split(probe.BATCH), images.split(probe.BATCH), strict=True):
        x = (part.double() - token_mean).flatten(0, 1)
        y = to_patches(shown.double() - image_mean, grid).flatten(0, 1)
        gram, cross = gram + x.T @ x, cross + x.T @ y
    values, vectors = torch.linalg.eigh(gram)
    unit, turned = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny), vectors.T @ cross
    return [
        Readout(vectors @ (turned / (values.clamp_min(0) + s * unit)[:, None]), token_mean, image_mean, grid, s)
        for s in strengths
    ]


def band_energies(images: Tensor) -> np.ndarray:
    """Energy of images (n, C, H, W) per radial band, (n, bands) float64, summed over channels.

    Of the orthonormal 2-D Fourier transform, so that the bands of an image sum to its sum of squares. The radius is
    sqrt(fx^2 + fy^2) over the Nyquist frequency of half a cycle per pixel; a band holds its lower edge and not its
    upper; the first and the last take frequencies outside of the edges.
    """
    power = torch.fft.fft2(images.double(), norm="ortho").abs().square().sum(1)
    fy, fx = (np.fft.fftfreq(size) * 2 for size in images.shape[-2:])
    band = torch.from_numpy(np.digitize(np.hypot(fy[:, None], fx[None]), EDGES[1:-1]))
    return torch.stack([power[:, band == b].sum(-1) for b in range(len(EDGES) - 1)], 1).numpy()


def relative_error(images: Tensor, reconstructed: Tensor, mean: Tensor) -> np.ndarray:
    """Energy of the error over energy of the images less `mean`, per band of `EDGES`, (bands,) float64.

    0: all is kept, 1: nothing is; NaN if the images have no energy in a band. It can exceed 1: a readout has the least
    error in all bands together, and one that finds little more than the mean of each patch draws edges between patches.
    Images are (n, C, H, W), the mean of the training images (C, H, W).
    """
    lost = band_energies(images.double() - reconstructed.double()).sum(0)
    there = band_energies(images.double() - mean).sum(0)
    return np.divide(lost, there, out=np.full_like(lost, np.nan), where=there > 0)


def fit_and_test_images(run: Run, fit_images: int = FIT_IMAGES) -> tuple[Batch, Batch]:
    """First `fit_images` training images of a run, or all there are, and its held-out ones, without augmentation."""
    return open_dataset(run.config.data).examples("train", fit_images), probe.held_out(run)


def read(block: Block, images: tuple[Batch, Batch], seed: int) -> tuple[Readout, Tensor]:
    """Readout of a block, fitted on the first batch, and its reconstruction of the clean x of the second.

    Both get different noise. If the grid does not divide x (14x14 tokens beside latents of 32x32), the tokens are first
    resampled to the next finer grid that does, bilinear, as in alignment (Tables 11 and 12, arXiv 2505.16792).
    """
    x = images[0].x
    grid = (_dividing(x.shape[-2], block.grid[0]), _dividing(x.shape[-1], block.grid[1]))
    fitted, fresh = (resample_tokens(block.tokens(batch, seed + i), block.grid, grid) for i, batch in enumerate(images))
    readout = fit_readout(fitted, x, grid)
    return readout, readout.reconstruct(fresh)


def _dividing(size: int, count: int) -> int:
    """Smallest divisor of `size` that is not below `count`, or `size` itself."""
    return next((n for n in range(count, size) if size % n == 0), size)


def band_errors(
    run: Run, steps: Sequence[int] | None = None, t: float | None = None, fit_images: int = FIT_IMAGES
) -> pd.DataFrame:
    """Share of the image that a linear readout does not find in the tokens, per frequency band and block.

    The image is `Batch.x`, as the generator models it: pixels, or the scaled latents, whose frequencies are those of
    the latent grid. t: noise level of the student's input, the study's lowest by default. fit_images: as of
    `fit_and_test_images`. Columns: those of `blocks` as in `token_capacity`, band_low, band_high (fractions of
    Nyquist), relative_error (in [0, about 1]), strength (of the ridge, see `STRENGTHS`), n (held-out images).
    """
    analysis, images, rows = run.study.analysis, fit_and_test_images(run, fit_images), []
    for block in blocks(run, steps, [min(analysis.timesteps) if t is None else t]):
        readout, reconstructed = read(block, images, analysis.seed)
        errors = relative_error(images[1].x, reconstructed, readout.image_mean)
        for low, high, error in zip(EDGES[:-1], EDGES[1:], errors, strict=True):
            found = {"band_low": low, "band_high": high, "relative_error": float(error)}
            rows.append(block.facts | found | {"strength": readout.strength, "n": len(reconstructed)})
    return pd.DataFrame(rows)


def reconstructions(
    run: Run, step: int, t: float, count: int = 10, fit_images: int = FIT_IMAGES
) -> dict[str, np.ndarray]:
    """First held-out images and their reconstruction by each block's readout, uint8 (count, C, S, S) by label.

    The channels of latents are shown as they are, not decoded.
    """
    images = fit_and_test_images(run, fit_images)
    shown = {"held-out image": images[1].x}
    for block in blocks(run, [step], [t]):
        who, place, count_of = (block.facts[name] for name in ("who", "block", "blocks"))
        final = who == "teacher" and place == count_of - 1
        shown[f"{who}, final" if final else f"{who}, block {place}"] = read(block, images, run.study.analysis.seed)[1]
    return {name: to_uint8(tensor[:count]).numpy() for name, tensor in shown.items()}


def discarded(teacher: Teacher, fitted: Batch, held_out: Batch, seed: int = 0) -> dict[str, float]:
    """Measures of the detail that a teacher's final tokens, with which students are aligned, have lost.

    `missed`: share of the energy of held-out images above a quarter of Nyquist that a linear readout does not find, as
    in `band_errors`. `unlike`: 1 minus the unbiased linear CKA of tokens with the patches they cover. `narrow`: 1 minus
    the effective rank of one token of every image over the largest that is possible. Where a token covers one grey
    pixel whose value is 0 in some image, there is no CKA and `unlike` is NaN.
    """
    block = Block({}, teacher.grid, partial(teacher_tokens, teacher, teacher.blocks))
    readout, reconstructed = read(block, (fitted, held_out), seed)
    lost = band_energies(held_out.x.double() - reconstructed).sum(0)[1:].sum()
    there = band_energies(held_out.x.double() - readout.image_mean).sum(0)[1:].sum()
    tokens = block.tokens(held_out, seed)
    grid = _dividing(held_out.images.shape[-2], teacher.grid[0]), _dividing(held_out.images.shape[-1], teacher.grid[1])
    pair = resample_tokens(tokens, teacher.grid, grid), to_patches(held_out.images, grid)
    alike = linear_cka(*(one_per_image(part, grid, seed) for part in pair))
    own = one_per_image(tokens, teacher.grid, seed)
    used = effective_rank(own) / min(len(own) - 1, own.shape[1])
    return {"missed": float(lost / there), "unlike": 1 - alike, "narrow": 1 - used}


def teachers(study: StudySettings, scores: pd.DataFrame, fit_images: int = FIT_IMAGES) -> pd.DataFrame:
    """Detail that each teacher of a study has lost (`discarded`), beside the harm near the data of the arms it taught.

    Teachers are trained. Columns: study, arm, seed, step (the last that the arm shares with its baseline), settings
    (hash of all but the teacher's), tau (of the switch, infinite without one), lambda_feature, lambda_attention,
    missed, unlike, narrow, harm (log held-out loss at t <= 0.1, arm minus baseline).
    """
    dataset, rows = open_dataset(study.data), []
    images = dataset.examples("train", fit_images), dataset.examples("test", study.analysis.n)
    known: dict[str, dict[str, float]] = {}
    logs = np.log(scores.pivot_table(index=["seed", "step"], columns="arm", values="near_data"))
    for arm in study.arms:
        run, plain = study.run(arm), study.baseline(arm)
        if not run.alignment.active or plain not in logs or arm not in logs:
            continue
        shown = run.teacher.model_dump_json()
        if shown not in known:
            known[shown] = discarded(find_teacher(study, run.teacher), *images, study.analysis.seed)
        weights = {name: getattr(run.alignment, name) for name in ("lambda_feature", "lambda_attention")}
        rest = digest(run.model_dump(mode="json", exclude={"teacher"}))
        both = (logs[arm] - logs[plain]).dropna().unstack("step")
        for seed, harm in both[max(both)].dropna().items():
            facts = {"study": study.name, "arm": arm, "seed": seed, "step": max(both), "settings": rest, "tau": run.tau}
            facts |= weights
            rows.append(facts | known[shown] | {"harm": float(harm)})
    return pd.DataFrame(rows)


def prediction(rows: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of each measure of lost detail with the harm near the data, over arms (means over seeds).

    Rows of `teachers` are those of one or more studies. Columns: measure; rho, low, high: Spearman's rank correlation
    with the harm and its 95 % percentile interval over 1000 resamples of arms; arms; agree and pairs: of the pairs of
    arms that differ in the teacher alone, those in which the measure and the harm have the same order.
    """
    from scipy.stats import spearmanr

    alike = ["study", "step", "settings"]
    arms = rows.groupby([*alike, "arm"])[[*DISCARDED_MEASURES, "harm"]].mean().reset_index()
    confidence, random, found = 0.95, np.random.default_rng(0), []
    for measure in DISCARDED_MEASURES:
        told = arms[arms[measure].notna()]
        values = told[[measure, "harm"]].to_numpy()
        draws = random.integers(len(told), size=(1000, len(told)))
        # A draw of one teacher's arms alone has no order.
        rhos = [spearmanr(part).statistic for part in values[draws] if len(set(part[:, 0])) > 1]
        low, high = np.quantile(rhos, [(1 - confidence) / 2, (1 + confidence) / 2]) if rhos else (math.nan, math.nan)
        signs = [
            np.sign(a[measure] - b[measure]) * np.sign(a["harm"] - b["harm"])
            for _, group in told.groupby(alike)
            for a, b in combinations(group.to_dict("records"), 2)
            if a[measure] != b[measure]
        ]
        rho = spearmanr(values).statistic if rhos else math.nan
        agree = sum(sign > 0 for sign in signs)
        found.append({"measure": measure, "rho": rho, "low": low, "high": high, "arms": len(told), "agree": agree,
                      "pairs": len(signs)})  # fmt: skip
    return pd.DataFrame(found)
