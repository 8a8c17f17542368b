"""How many directions features use: ranks, intrinsic dimension and entropy of teacher and student tokens.

Not in the paper, which argues from a capacity mismatch without measuring it: these are the measures the field has for
how much room a representation takes. Every one of them grows with the number of rows and depends on centring, so that
teacher and student are measured on the same number of rows, one row per image, and both stand in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import cdist
from scipy.special import entr
from scipy.stats import t as student_t
from torch import Generator, Tensor

from haste_core.alignment import Grid
from haste_core.analysis import probe
from haste_core.analysis.tokens import student_tokens, teacher_blocks, teacher_tokens
from haste_core.errors import HasteError
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run

NEIGHBOURS = 20  # of `local_rank`
DISCARDED = 0.1  # of `two_nn`
GROUPS = 10  # of the jackknife

Measure = Callable[[np.ndarray], float]


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of the centred features; between 1 and min(n - 1, d).

    Roy & Vetterli (EUSIPCO 2007), of the singular values themselves, not of their squares, the eigenvalues of the
    covariance. 0 where all rows are equal.

    Args:
        features: (n, d).
    """
    return float(_effective_rank(_spectrum(features)))


def participation_ratio(features: np.ndarray) -> float:
    """(sum l)^2 / sum l^2 over the eigenvalues l of the covariance of features (n, d); 0 where all rows are equal.

    Counts d equal directions as d, like `effective_rank`, and small directions for less.
    """
    power = _spectrum(features) ** 2
    return float(power.sum() ** 2 / (power**2).sum()) if power.any() else 0.0


def two_nn(features: np.ndarray, discarded: float = DISCARDED) -> float:
    """The intrinsic dimension of features (n, d) from the distances to the two nearest neighbours.

    Facco et al. (Sci. Rep. 7, 2017): with mu = r2 / r1, -log(1 - F(mu)) = dimension * log mu; the slope through the
    origin over the points of smallest mu. F of the i-th smallest of n is i / n. Centring does not change it.

    Rule for equal rows: each distinct row counts once, since a distance of 0 says nothing of a dimension. NaN with
    fewer than three distinct rows; infinite where all distances are equal.

    Args:
        features: (n, d).
        discarded: the share of points with the largest mu that the fit leaves out, in [0, 1); those are the noisiest.
    """
    distinct = np.unique(np.asarray(features, dtype=np.float64), axis=0)
    if len(distinct) < 3:
        return math.nan
    near = np.partition(cdist(distinct, distinct), (1, 2), axis=1)[:, 1:3]
    log_mu = np.sort(np.log(near[:, 1] / near[:, 0]))
    kept = max(1, min(int(len(log_mu) * (1 - discarded)), len(log_mu) - 1))  # at i = n the left side is infinite
    x, y = log_mu[:kept], -np.log1p(-np.arange(1, kept + 1) / len(log_mu))
    return float(x @ y / (x @ x)) if x.any() else math.inf


def matrix_entropy(features: np.ndarray) -> float:
    """Matrix-based Renyi entropy of order 1 in nats, between 0 (one direction) and log min(n, d).

    Giraldo et al. (IEEE Trans. Inf. Theory 61, 2015) with the linear kernel: von Neumann's entropy of the Gram matrix
    of the L2-normalised rows divided by its trace. Not centred: a direction that all rows share lowers it. Rows of
    length zero have no direction and are left out; NaN where no other is left.

    Args:
        features: (n, d).
    """
    features = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=1)
    rows = features[lengths > 0] / lengths[lengths > 0, None]
    if not len(rows):
        return math.nan
    # The squared singular values are the Gram matrix's eigenvalues other than zero.
    return float(entr(np.linalg.svd(rows, compute_uv=False) ** 2 / len(rows)).sum())


def local_rank(features: np.ndarray, k: int = NEIGHBOURS) -> float:
    """The mean over all points of the effective rank of their k nearest neighbours; between 1 and min(k - 1, d).

    Local principal components (Fukunaga & Olsen, IEEE Trans. Comput. C-20, 1971), counted by `effective_rank` instead
    of by a threshold: for every row of features (n, d), its k nearest other rows (Euclidean), centred at their mean.

    Raises:
        HasteError: there are not k other rows.
    """
    features = np.asarray(features, dtype=np.float64)
    if not 2 <= k < len(features):
        raise HasteError(f"local rank of {len(features)} rows with k={k} neighbours; possible: k from 2 to n - 1")
    distances = cdist(features, features)
    np.fill_diagonal(distances, np.inf)
    near = np.argpartition(distances, k - 1, axis=1)[:, :k]
    return float(_effective_rank(np.stack([_spectrum(features[rows]) for rows in near])).mean())


def measures(k: int = NEIGHBOURS) -> dict[str, Measure]:
    """Every measure of this module by name, from features (n, d) to a number; k is that of `local_rank`."""
    return {
        "effective_rank": effective_rank,
        "participation_ratio": participation_ratio,
        "two_nn": two_nn,
        "matrix_entropy": matrix_entropy,
        "local_rank": lambda features: local_rank(features, k),
    }


def interval(features: np.ndarray, measure: Measure, confidence: float, groups: int = GROUPS) -> tuple[float, float]:
    """The measure's confidence interval over rows (n, d), by the jackknife that leaves out one group of rows at a time.

    Not a bootstrap: drawing with replacement repeats rows, which lowers every rank and puts nearest neighbours at
    distance zero. Rows are dealt out in turn (row i to group i modulo `groups`); Student's t with groups - 1 degrees
    of freedom around the value of all rows. NaN where a value is not finite.
    """
    groups = min(groups, len(features))
    group = np.arange(len(features)) % groups
    left = np.array([measure(features[group != g]) for g in range(groups)])
    error = math.sqrt((groups - 1) * left.var()) * student_t.ppf((1 + confidence) / 2, groups - 1)
    value = measure(features)
    return (value - error, value + error) if math.isfinite(value + error) else (math.nan, math.nan)


def one_per_image(tokens: Tensor, grid: Grid, seed: int) -> np.ndarray:
    """One token of every image, (n, D) float64, drawn at random.

    One, because tokens of the same image are no independent samples. The place is drawn as a share of height and
    width from `seed` alone, so that teacher and student, every block and every step are looked at in the same places.

    Args:
        tokens: (n, N, D). grid: their (rows, columns).
    """
    share = torch.rand(len(tokens), 2, generator=Generator().manual_seed(seed), dtype=torch.float64)
    place = (share * torch.tensor(grid)).long()
    return tokens[torch.arange(len(tokens)), place[:, 0] * grid[1] + place[:, 1]].double().numpy()


def measure(
    run: Run, steps: Sequence[int] | None = None, timesteps: Sequence[float] | None = None, k: int = NEIGHBOURS
) -> pd.DataFrame:
    """Every measure of the tokens after each block of the student over training, and of its teacher.

    Args:
        run: finished.
        steps: of the student, 0 for the untrained network; by default 0 and every kept one.
        timesteps: noise levels of the student's input in [0, 1], by default the study's. The teacher sees clean images.
        k: neighbours of `local_rank`.

    Returns:
        step, t (0 and 0.0 for the teacher, which is frozen and sees no noise), who ("student" or "teacher"), block
        (from 0; a teacher's last is its final tokens after the norm), blocks (how many there are of it), kind
        ("tokens": one random token per image; "patch mean": the mean over an image's tokens), measure, value (ranks and
        dimensions in directions, matrix_entropy in nats), low, high (`interval`; NaN for local_rank, which is too slow
        to repeat), n (rows: held-out images), width (d), k.
    """
    study, seed = run.study, run.study.analysis.seed
    batch, teacher = probe.held_out(run), find_teacher(run.study, run.config.teacher)
    rows: list[dict[str, Any]] = []

    def add(tokens: Tensor, grid: Grid, **facts: Any) -> None:
        kinds = {"tokens": one_per_image(tokens, grid, seed), "patch mean": tokens.double().mean(1).numpy()}
        for kind, features in kinds.items():
            rows.extend(_rows(features, facts | {"kind": kind}, study.analysis.confidence, k))

    blocks = teacher_blocks(teacher)
    for block in blocks:
        facts: dict[str, Any] = {"step": 0, "t": 0.0, "who": "teacher", "block": block, "blocks": len(blocks)}
        add(teacher_tokens(teacher, batch.images, block), teacher.grid, **facts)
    for facts, model in _students(run, steps, timesteps):
        tokens = student_tokens(model, batch.x, facts["t"], facts["block"], seed)
        add(tokens, model.grid, **facts)
    return pd.DataFrame(rows)


def _students(
    run: Run, steps: Sequence[int] | None, timesteps: Sequence[float] | None
) -> Iterator[tuple[dict[str, Any], Any]]:
    for step in [0, *run.config.train.kept_steps] if steps is None else steps:
        model = probe.student_at(run, step)
        for t in run.study.analysis.timesteps if timesteps is None else timesteps:
            for block in range(len(model.blocks)):
                yield {"step": step, "t": t, "who": "student", "block": block, "blocks": len(model.blocks)}, model


def _rows(features: np.ndarray, facts: Mapping[str, Any], confidence: float, k: int) -> list[dict[str, Any]]:
    rows = []
    for name, of in measures(k).items():
        low, high = (math.nan, math.nan) if name == "local_rank" else interval(features, of, confidence)
        found = {"measure": name, "value": of(features), "low": low, "high": high}
        rows.append({**facts, **found, "n": len(features), "width": features.shape[1], "k": k})
    return rows


def _spectrum(features: np.ndarray) -> np.ndarray:
    """Singular values of the centred features, those within rounding of zero set to zero."""
    features = np.asarray(features, dtype=np.float64)
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    # Rounding of the mean is as large as the features themselves say, also where nothing is left after centring.
    noise = np.finfo(np.float64).eps * max(features.shape) * np.linalg.norm(features)
    return np.where(values > noise, values, 0.0)


def _effective_rank(spectrum: np.ndarray) -> np.ndarray:
    total = spectrum.sum(-1, keepdims=True)
    shares = np.divide(spectrum, total, out=np.zeros_like(spectrum), where=total > 0)
    return np.where(total[..., 0] > 0, np.exp(entr(shares).sum(-1)), 0.0)
