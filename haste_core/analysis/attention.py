"""Attention of student and teacher: how similar it is, per layer pair and head, and maps of single tokens.

Fig. 6, arXiv 2505.16792. Maps are probabilities (B, H, N, N) over patch tokens, rows summing to one; a measure is a
float64 mean over images and queries, one per head. Student and teacher are compared on the student's token grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from haste_core.alignment import Grid, attention_probabilities, paired_heads, resample_attention, resample_tokens
from haste_core.analysis import probe
from haste_core.analysis.probe import StudentTeacher, layer_pairs, maps_of, other_images, token_grid
from haste_core.study.data import Dataset, open_dataset
from haste_core.study.runs import Run
from haste_core.study.sections import TEMPERATURE
from haste_core.taps import Taps
from haste_core.teacher import Similarity, Teacher

# Attention maps (n, H, N, N) of images, given their indices (n,).
Maps = Callable[[Tensor], Tensor]
# One key in eight of a query counts as its first keys, so that chance is 1/8 on every grid that 8 divides.
TOP_SHARE = 8
# Entries of q and k of the student's blocks held in memory at a time.
QK_NUMBERS = 2**28
# Ridge strength per token fitted on, for features of unit variance: negligible for independent features, and enough
# for collinear ones.
RIDGE = 1e-4


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """H(teacher, student) in nats, (H,): the attention loss (Sec. 2.3, arXiv 2505.16792) of each head.

    At least the teacher's own entropy; infinite if the student gives no weight to a key that the teacher attends to.
    """
    return -torch.special.xlogy(teacher.double(), student.double()).sum(-1).mean((0, 2))


def jensen_shannon(teacher: Tensor, student: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, (H,), in [0, log 2]: 0 for equal maps, log 2 for disjoint ones.

    Not in the paper: symmetric and bounded, so that heads with sharp and with flat teachers can be compared.
    """
    p, q = teacher.double(), student.double()
    apart = _entropies((p + q) / 2) - (_entropies(p) + _entropies(q)) / 2
    return apart.clamp(0, math.log(2)).mean((0, 2))  # rounding alone can leave the range


def top_k_overlap(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    """Share of the teacher's k first keys that are among the student's k first, (H,), in [0, 1].

    Not in the paper. Chance level: k / N. Keys that tie for the last places count as if drawn among at random, on
    each side by itself, so a uniform map reaches k / N exactly, with itself too.
    """
    return (_among_top(teacher.double(), k) * _among_top(student.double(), k)).sum(-1).mean((0, 2)) / k


def _among_top(p: Tensor, k: int) -> Tensor:
    """Probability of each key to be among the k first: 1 above the last of them, 0 below, a share for ties."""
    last = p.topk(k).values[..., -1:]
    above, tied = (p > last).double(), (p == last).double()
    return above + tied * (k - above.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)


def entropy(p: Tensor) -> Tensor:
    """Entropy of attention in nats, (H,), in [0, log N]."""
    return _entropies(p.double()).mean((0, 2))


def _entropies(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def attention_distance(p: Tensor, grid: Grid) -> Tensor:
    """Expected Euclidean distance between a query and the keys it attends to, (H,), in tokens.

    Not in the paper; the mean attention distance of arXiv 2010.11929 with tokens as the unit. p is (B, H, N, N) among
    the tokens of `grid` (rows, columns).
    """
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))
    # From differences: the matrix product form leaves distances to oneself that are not 0.
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    return (p.double() * apart).sum(-1).mean((0, 2))


def similarities(teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
    """Every measure of similarity by name, each (H,)."""
    return {
        "cross_entropy": cross_entropy(teacher, student),
        "jensen_shannon": jensen_shannon(teacher, student),
        "top_k_overlap": top_k_overlap(teacher, student, max(1, teacher.shape[-1] // TOP_SHARE)),
    }


def attention_similarity(run: Run) -> pd.DataFrame:
    """Similarity of student and teacher attention over training, per aligned layer pair and head, with baselines.

    Columns: step (0: before training), t, n (images), student_block, teacher_block (both from 0), baseline, head (of
    both), measure, value. Measures: cross_entropy and jensen_shannon in nats, top_k_overlap in [0, 1] of one key in
    eight. The protocol is that of `probe`; the teacher sees the clean image. Baselines, of which the paper has none:

    - none: the student. Its rows at step 0 are the untrained student, a baseline themselves.
    - shuffled: the student's map of an image against the teacher's map of another image.
    - uniform: equal attention to every key, in the student's place; step and t are 0.
    - teacher: the teacher's own map in the student's place, the best value possible; step and t are 0.
    """
    both = StudentTeacher(run)
    same, tokens = torch.arange(len(both.batch.x)), both.grid[0] * both.grid[1]
    other = other_images(len(same), run.study.analysis.seed)
    rows: list[dict[str, Any]] = []

    def compare(
        step: int, t: float, baseline: str, pair: tuple[int, int], student: Maps | None, of: Tensor = same
    ) -> None:
        """Add rows of the student's maps (None: the teacher's own) against the teacher's of the images `of`."""

        def measured(images: Tensor) -> dict[str, Tensor]:
            teacher = both.teacher_maps(pair[1], of[images])[:, both.heads]
            return similarities(teacher, student(images) if student else teacher)

        facts = {"student_block": pair[0], "teacher_block": pair[1], "baseline": baseline}
        rows.extend(both.rows(step, t, facts, both.heads, measured))

    def uniform(images: Tensor) -> Tensor:
        return torch.full((len(images), len(both.heads), tokens, tokens), 1 / tokens, dtype=torch.float64)

    for pair in both.pairs:
        compare(0, 0.0, "uniform", pair, uniform)
        compare(0, 0.0, "teacher", pair, None)
    for step, t in product(both.steps, run.study.analysis.timesteps):
        qk = both.student(step, t, Taps(blocks=tuple(sorted({s for s, _ in both.pairs})))).qk
        for pair in both.pairs:
            q, k = (part[:, both.heads] for part in qk[pair[0]])
            student = partial(maps_of, (q, k))
            compare(step, t, "none", pair, student)
            compare(step, t, "shuffled", pair, student, other)
    return pd.DataFrame(rows)


def head_statistics(run: Run) -> pd.DataFrame:
    """Entropy and distance of the attention of every block and head, in the student and in the teacher.

    Columns: step (0: before training), t, n (images), source, block, head (both from 0), measure, value. Measures:
    entropy in nats, distance in tokens of the student's grid, to which the teacher's maps are resampled. The teacher
    has step and t 0. Source `uniform`, as block 0 and head 0, is equal attention to every key.
    """
    both = StudentTeacher(run, every_block=True)
    tokens, depth = both.grid[0] * both.grid[1], run.config.model.depth
    rows: list[dict[str, Any]] = []

    def add(step: int, t: float, source: str, block: int, heads: int, maps: Maps) -> None:
        def measured(images: Tensor) -> dict[str, Tensor]:
            p = maps(images)
            return {"entropy": entropy(p), "distance": attention_distance(p, both.grid)}

        rows.extend(both.rows(step, t, {"source": source, "block": block}, range(heads), measured))

    uniform = torch.full((1, 1, tokens, tokens), 1 / tokens, dtype=torch.float64)
    add(0, 0.0, "uniform", 0, 1, lambda _: uniform)
    for block, (q, _) in both.teacher.qk.items():
        add(0, 0.0, "teacher", block, q.shape[1], partial(both.teacher_maps, block))
    together = max(1, QK_NUMBERS // (2 * len(both.batch.x) * tokens * run.config.model.width))
    groups = [tuple(range(i, min(i + together, depth))) for i in range(0, depth, together)]
    for step, t, group in product(both.steps, run.study.analysis.timesteps, groups):
        for block, qk in both.student(step, t, Taps(blocks=group)).qk.items():
            add(step, t, "student", block, qk[0].shape[1], partial(maps_of, qk))
    return pd.DataFrame(rows)


def feature_fit(student_tokens: Tensor, teacher_tokens: Tensor) -> float:
    """Share of the teacher tokens' variance that a linear map of the student tokens explains, R^2, at most 1.

    Not in the paper. Ridge regression in float64 with an intercept, one map for all places, fitted on the images at
    even places of the batch and scored on the others; 0 is reached by the mean of the scored tokens, and a map that
    fits worse than that is negative. R^2 is over all features together: 1 - sum of squares left / sum of squares.
    Tokens are (B, N, D) and (B, N, D') on the same grid.
    """
    (x, y), (x_scored, y_scored) = (
        tuple(tokens[half::2].flatten(0, 1).double().numpy() for tokens in (student_tokens, teacher_tokens))
        for half in (0, 1)
    )
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fit = make_pipeline(StandardScaler(), Ridge(alpha=RIDGE * len(x), solver="cholesky")).fit(x, y)
    return float(r2_score(y_scored, fit.predict(x_scored), multioutput="variance_weighted"))


def cross_effects(run: Run) -> pd.DataFrame:
    """Similarity of a run's attention and of its features to the teacher's, over steps and noise levels, in one table.

    Shows if one alignment has the effect of the other (Fig. 6, arXiv 2505.16792). Columns: step (0: before training),
    t, n (images scored), side, measure, baseline, value. Side `attention`: the measures of `attention_similarity`, mean
    over aligned pairs and heads. Side `features`: `r2`, from `feature_fit` of the student's tokens after the aligned
    depth (the study's for arms without their own), on the teacher's grid, to the teacher's final tokens; baseline
    `shuffled` takes the teacher's tokens of another image: the share that the place of a token explains.
    """
    both, settings = StudentTeacher(run), run.study.analysis
    keys = ["step", "t", "n", "measure", "baseline"]
    attention = attention_similarity(run).groupby(keys, sort=False)["value"].mean().reset_index()
    depth = min(run.config.alignment.depth, run.config.model.depth)
    theirs, other = both.teacher.tokens, other_images(len(both.batch.x), settings.seed)
    rows = []
    for step, t in product(both.steps, settings.timesteps):
        mine = resample_tokens(both.student(step, t, Taps((depth,))).tokens[depth], both.grid, both.teacher_grid)
        for baseline, tokens in (("none", theirs), ("shuffled", theirs[other])):
            rows.append((step, t, len(theirs) // 2, "r2", baseline, feature_fit(mine, tokens)))
    features = pd.DataFrame(rows, columns=[*keys, "value"])
    both_sides = pd.concat([attention.assign(side="attention"), features.assign(side="features")])
    return both_sides.sort_values(["step", "t"], kind="stable", ignore_index=True)[
        ["step", "t", "n", "side", "measure", "baseline", "value"]
    ]


def middle_tokens(grid: Grid) -> list[int]:
    """Three tokens around the middle of a grid of (rows, columns), the usual place of an image's subject."""
    row, column = grid[0] // 2, grid[1] // 2
    places = [(row - 1, column - 1), (row - 1, column), (row, column)]
    return [r * grid[1] + c for r, c in places]


def teacher_maps(teacher: Teacher, dataset: Dataset) -> pd.DataFrame:
    """Attention of the middle tokens of the first held-out image in every block of the teacher, averaged over heads.

    Stages of feature maps, which have no attention, show the cosine similarities of their tokens in its place.
    Columns: source ("block 0", ...), divergence (0: there is nothing to compare with), query, key, probability.
    """
    images = dataset.images("test", 1)[0].to(teacher.mean.device)
    rows: list[dict[str, Any]] = []
    similarity = None if teacher.heads else Similarity(TEMPERATURE, heads=1)
    for block, qk in sorted(teacher(images, tuple(range(teacher.blocks)), similarity).qk.items()):
        facts = {"source": f"block {block}", "divergence": 0.0}
        rows += _map_rows(attention_probabilities(*qk).cpu(), middle_tokens(teacher.grid), facts)
    return pd.DataFrame(rows)


def token_maps(
    runs: list[Run], teacher: Teacher, queries: list[int] | None = None, t: float = 0.5, count: int = 200
) -> list[dict[str, Any]]:
    """Attention of chosen tokens in the teacher and in each run's final generator, for the last aligned layer pair.

    The maps are those of the first held-out image, averaged over aligned heads, on the token grid of the study's
    generator; others, the teacher's too, are resampled to it. `divergence` is the mean Kullback-Leibler divergence to
    the teacher in nats over `count` held-out images, all queries and aligned heads, on the run's own grid: the
    attention loss minus the teacher's own entropy (0 for the teacher itself).

    Args:
        runs: of one study. queries: tokens of the study's generator; `middle_tokens` by default. t: noise level.

    Returns:
        Rows: source ("teacher" or the arm), seed, step, block (from 0), t, n, divergence, query, key, probability.
    """
    study, tiny = runs[0].study, torch.finfo(torch.float32).tiny
    x, labels, images, _ = open_dataset(study.data).examples("test", count)
    shown_grid = token_grid(study.model, x)
    queries = queries or middle_tokens(shown_grid)
    pairs = [layer_pairs(run, teacher)[-1] for run in runs]
    blocks = tuple(sorted({t for _, t in pairs}))
    found = teacher(images.to(teacher.mean.device), blocks, probe.similarity_of(runs[0], teacher)).qk
    targets = {block: attention_probabilities(*qk).cpu() for block, qk in found.items()}
    rows: list[dict[str, Any]] = []

    def add(shown: Tensor, grid: Grid, source: str, seed: int, step: int, block: int, divergence: float) -> None:
        facts = {"source": source, "seed": seed, "step": step, "block": block, "t": t, "n": len(images)}
        maps = resample_attention(shown[:1], grid, shown_grid)
        rows.extend(_map_rows(maps, queries, facts | {"divergence": divergence}))

    def heads_of(run: Run, block: int) -> list[int]:
        return paired_heads(run.config.alignment.heads, run.config.model.heads, targets[block].shape[1])

    block = pairs[0][1]
    add(targets[block][:, heads_of(runs[0], block)], teacher.grid, "teacher", 0, 0, block, 0.0)
    for run, (student_block, teacher_block) in zip(runs, pairs, strict=True):
        step, heads, grid = run.config.train.steps, heads_of(run, teacher_block), token_grid(run.config.model, x)
        taps = Taps(blocks=(student_block,))
        tapped = probe.student_output(probe.student_at(run, step), x, t, taps, 0, labels)
        student = attention_probabilities(*tapped.qk[student_block])[:, heads]
        target = resample_attention(targets[teacher_block][:, heads], teacher.grid, grid)
        apart = float((target * (target.clamp_min(tiny).log() - student.clamp_min(tiny).log())).sum(-1).mean())
        add(student, grid, run.arm, run.seed, step, student_block, apart)
    return rows


def _map_rows(maps: Tensor, queries: list[int], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the first image's maps (B, H, N, N), averaged over heads."""
    mean = maps[0].mean(0)
    return [
        facts | {"query": query, "key": key, "probability": float(value)}
        for query in queries
        for key, value in enumerate(mean[query])
    ]


def head_maps(
    views: Mapping[str, StudentTeacher], arm: str, block: int, head: int, t: float, query: int
) -> pd.DataFrame:
    """Attention of the token `query` of the first held-out image, in one head of the student and in the teacher's.

    The teacher's block is the one `block` is aligned with; for other blocks the one at the same relative depth. `views`
    by arm have every block of the teacher. Columns: source (student or teacher with block and head), divergence (0),
    query, key (on the student's grid), probability.
    """
    both, image = views[arm], torch.tensor([0])
    last, depth = len(both.teacher.qk) - 1, both.run.config.model.depth
    partner = dict(both.pairs).get(block, round(block * last / max(1, depth - 1)))
    qk = both.student(both.run.config.train.steps, t, Taps(blocks=(block,))).qk[block]
    maps = (("student", block, maps_of(qk, image)), ("teacher", partner, both.teacher_maps(partner, image)))
    rows: list[dict[str, Any]] = []
    for source, at, found in maps:
        facts = {"source": f"{source}\nblock {at}, head {head}", "divergence": 0.0}
        rows += _map_rows(found[:, [head]], [query], facts)
    return pd.DataFrame(rows)
