"""Attention of student and teacher: how similar it is, per layer pair and head, and maps of single tokens.

Fig. 6, arXiv 2505.16792. Maps are probabilities (B, H, N, N) over patch tokens, rows summing to one; a measure is a
float64 mean over images and queries, one per head. Student and teacher are compared on the student's token grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from haste_core.alignment import Grid, attention_probabilities, resample_attention, resample_tokens
from haste_core.analysis import probe
from haste_core.analysis.probe import StudentTeacher, aligned_heads, layer_pairs, maps_of, other_images, token_grid
from haste_core.errors import HasteError, unknown
from haste_core.study.data import Dataset, open_dataset
from haste_core.study.runs import Run
from haste_core.taps import QK, Taps
from haste_core.teacher import Teacher

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

    Raises:
        HasteError: there are no k keys.
    """
    if not 1 <= k <= teacher.shape[-1]:
        raise HasteError(f"top {k} keys of {teacher.shape[-1]}; expected 1 to {teacher.shape[-1]}")
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

    Not in the paper; the mean attention distance of arXiv 2010.11929 with tokens as the unit.

    Args:
        p: (B, H, N, N). grid: (rows, columns), tokens numbered row by row.

    Raises:
        HasteError: `grid` does not have N places.
    """
    if grid[0] * grid[1] != p.shape[-1]:
        raise HasteError(f"{p.shape[-1]} tokens do not fill a {grid[0]}x{grid[1]} grid; expected rows x columns tokens")
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

    Averaged weights, the null label and the same noise at every step and t; the teacher sees the clean image.

    Returns:
        step (0: before training), t, n (images), student_block, teacher_block (both from 0), baseline, head (of
        both), measure, value. Measures: cross_entropy and jensen_shannon in nats, top_k_overlap in [0, 1] of one key
        in eight. Baselines, of which the paper has none:

        - none: the student. Its rows at step 0 are the untrained student, a baseline themselves.
        - shuffled: the student's map of an image against the teacher's map of another image.
        - uniform: equal attention to every key, in the student's place. Independent of step and t: both 0.
        - teacher: the teacher's own map in the student's place, the best value possible. Both 0 as well.
    """
    both = StudentTeacher(run)
    rows = []
    for pair in both.pairs:
        for baseline, values in _references(both, pair[1]).items():
            rows += _head_rows(values, both.heads, both.facts(0, 0.0) | _named(pair, baseline))
    for step, t in product(both.steps, run.study.analysis.timesteps):
        qk = both.student(step, t, Taps(blocks=both.student_blocks)).qk
        for pair in both.pairs:
            for baseline, values in _compared(both, qk[pair[0]], pair[1]).items():
                rows += _head_rows(values, both.heads, both.facts(step, t) | _named(pair, baseline))
    return pd.DataFrame(rows)


def _references(both: StudentTeacher, teacher_block: int) -> dict[str, dict[str, Tensor]]:
    """Measures (aligned heads,) of uniform attention and of the teacher's own, in the student's place."""

    def one(uniform: bool, images: Tensor) -> dict[str, Tensor]:
        teacher = both.teacher_maps(teacher_block, images)[:, both.heads]
        return similarities(teacher, torch.full_like(teacher, 1 / teacher.shape[-1]) if uniform else teacher)

    return {"uniform": both.averaged(partial(one, True)), "teacher": both.averaged(partial(one, False))}


def _compared(both: StudentTeacher, student: QK, teacher_block: int) -> dict[str, dict[str, Tensor]]:
    """Measures (aligned heads,) of a student block (all heads) against the teacher, on the same and other images."""
    q, k = (part[:, both.heads] for part in student)

    def one(of: Tensor, images: Tensor) -> dict[str, Tensor]:
        return similarities(both.teacher_maps(teacher_block, of[images])[:, both.heads], maps_of((q, k), images))

    other = other_images(len(q), both.run.study.analysis.seed)
    return {
        "none": both.averaged(partial(one, torch.arange(len(q)))),
        "shuffled": both.averaged(partial(one, other)),
    }


def _named(pair: tuple[int, int], baseline: str) -> dict[str, Any]:
    return {"student_block": pair[0], "teacher_block": pair[1], "baseline": baseline}


def _head_rows(values: dict[str, Tensor], heads: list[int] | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        facts | {"head": head, "measure": name, "value": float(value)}
        for name, per_head in values.items()
        for head, value in zip(heads or range(len(per_head)), per_head, strict=True)
    ]


def head_statistics(run: Run) -> pd.DataFrame:
    """Entropy and distance of the attention of every block and head, in the student and in the teacher.

    Returns:
        step (0: before training), t, n (images), source, block, head (both from 0), measure, value. Measures: entropy
        in nats, distance in tokens of the student's grid, to which the teacher's maps are resampled. The teacher sees
        clean images and is not trained: step and t are 0. Source `uniform`, as block 0 and head 0, is equal attention
        to every key.
    """
    both = StudentTeacher(run, every_block=True)
    tokens, depth = both.grid[0] * both.grid[1], run.config.model.depth

    def of(maps: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Tensor]:
        p = maps(images)
        return {"entropy": entropy(p), "distance": attention_distance(p, both.grid)}

    uniform = torch.full((1, 1, tokens, tokens), 1 / tokens, dtype=torch.float64)
    values = of(lambda _: uniform, torch.arange(1))
    rows = _head_rows(values, [0], both.facts(0, 0.0) | {"source": "uniform", "block": 0})
    for block in both.teacher.qk:
        values = both.averaged(partial(of, partial(both.teacher_maps, block)))
        rows += _head_rows(values, None, both.facts(0, 0.0) | {"source": "teacher", "block": block})
    together = max(1, QK_NUMBERS // (2 * len(both.batch.x) * tokens * run.config.model.width))
    groups = [tuple(range(i, min(i + together, depth))) for i in range(0, depth, together)]
    for step, t, group in product(both.steps, run.study.analysis.timesteps, groups):
        for block, qk in both.student(step, t, Taps(blocks=group)).qk.items():
            values = both.averaged(partial(of, partial(maps_of, qk)))
            rows += _head_rows(values, None, both.facts(step, t) | {"source": "student", "block": block})
    return pd.DataFrame(rows)


def feature_fit(student_tokens: Tensor, teacher_tokens: Tensor) -> float:
    """Share of the teacher tokens' variance that a linear map of the student tokens explains, R^2, at most 1.

    Not in the paper. Ridge regression in float64 with an intercept, one map for all places, fitted on the images at
    even places of the batch and scored on the others; 0 is reached by the mean of the scored tokens, and a map that
    fits worse than that is negative. R^2 is over all features together: 1 - sum of squares left / sum of squares.

    Args:
        student_tokens: (B, N, D) on the teacher's grid. teacher_tokens: (B, N, D').

    Raises:
        HasteError: images or tokens differ, or there are fewer than two images.
    """
    if student_tokens.shape[:2] != teacher_tokens.shape[:2] or len(student_tokens) < 2:
        raise HasteError(
            f"student tokens {tuple(student_tokens.shape)} and teacher tokens {tuple(teacher_tokens.shape)}; "
            "expected the same two or more images and the same token grid"
        )
    (x, y), (x_scored, y_scored) = (
        tuple(tokens[half::2].flatten(0, 1).double().numpy() for tokens in (student_tokens, teacher_tokens))
        for half in (0, 1)
    )
    fit = make_pipeline(StandardScaler(), Ridge(alpha=RIDGE * len(x), solver="cholesky")).fit(x, y)
    return float(r2_score(y_scored, fit.predict(x_scored), multioutput="variance_weighted"))


def cross_effects(run: Run) -> pd.DataFrame:
    """Similarity of a run's attention and of its features to the teacher's, over steps and noise levels, in one table.

    Shows if one alignment has the effect of the other (Fig. 6, arXiv 2505.16792).

    Returns:
        step (0: before training), t, n (images scored), side, measure, baseline, value. Side `attention`: the measures
        of `attention_similarity`, mean over aligned pairs and heads, with its baselines. Side `features`: `r2`, from
        `feature_fit` of the student's tokens after the aligned depth (the study's for arms without their own), on the
        teacher's grid, to the teacher's final tokens; baseline `shuffled` takes the teacher's tokens of another image,
        so it is the share that the place of a token explains. The untrained student is step 0: its tokens are a linear
        map of noised patches and places.
    """
    both, settings = StudentTeacher(run), run.study.analysis
    depth = min(run.config.alignment.depth, run.config.model.depth)
    theirs, other = both.teacher.tokens, other_images(len(both.batch.x), settings.seed)
    rows = _mean_rows([_references(both, block) for _, block in both.pairs], both.facts(0, 0.0))
    for step, t in product(both.steps, settings.timesteps):
        tapped, facts = both.student(step, t, Taps((depth,), both.student_blocks)), both.facts(step, t)
        rows += _mean_rows([_compared(both, tapped.qk[block], teacher) for block, teacher in both.pairs], facts)
        mine = resample_tokens(tapped.tokens[depth], both.grid, both.teacher_grid)
        facts |= {"n": len(theirs) // 2, "side": "features", "measure": "r2"}
        rows.append(facts | {"baseline": "none", "value": feature_fit(mine, theirs)})
        rows.append(facts | {"baseline": "shuffled", "value": feature_fit(mine, theirs[other])})
    return pd.DataFrame(rows)


def _mean_rows(pairs: list[dict[str, dict[str, Tensor]]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        facts
        | {"side": "attention", "measure": measure, "baseline": baseline}
        | {"value": float(torch.stack([pair[baseline][measure] for pair in pairs]).mean())}
        for baseline, measures in pairs[0].items()
        for measure in measures
    ]


def middle_tokens(grid: Grid) -> list[int]:
    """Three tokens around the middle of a grid of (rows, columns), the usual place of an image's subject."""
    row, column = grid[0] // 2, grid[1] // 2
    places = [(row - 1, column - 1), (row - 1, column), (row, column)]
    return [r * grid[1] + c for r, c in places]


def teacher_maps(teacher: Teacher, dataset: Dataset, queries: list[int] | None = None, index: int = 0) -> pd.DataFrame:
    """Attention of chosen tokens of one held-out image in every block of the teacher, averaged over heads.

    Args:
        teacher, dataset: the network and its images. queries: tokens; `middle_tokens` by default. index: of the image.

    Returns:
        Columns: source ("block 0", ...), query, key, probability, divergence (0: there is nothing to compare with).
    """
    images = dataset.images("test", index + 1)[0][index:].to(teacher.mean.device)
    found = teacher(images, tuple(range(teacher.blocks))).qk
    rows: list[dict[str, Any]] = []
    for block, qk in sorted(found.items()):
        facts = {"source": f"block {block}", "divergence": 0.0}
        rows += _map_rows(attention_probabilities(*qk).cpu(), queries or middle_tokens(teacher.grid), facts)
    return pd.DataFrame(rows)[["source", "query", "key", "probability", "divergence"]]


def token_maps(
    runs: list[Run], teacher: Teacher, queries: list[int] | None = None, t: float = 0.5, count: int = 200
) -> list[dict[str, Any]]:
    """Attention of chosen tokens in the teacher and in each run's final generator, for the last aligned layer pair.

    The maps are those of the first held-out image, averaged over aligned heads, on the token grid of the study's
    generator; others, the teacher's too, are resampled to it. `divergence` is the mean Kullback-Leibler divergence to
    the teacher in nats over `count` held-out images, all queries and aligned heads, on the run's own grid: the
    attention loss minus the teacher's own entropy (0 for the teacher itself).

    Args:
        runs: of one study. teacher: whose attention is compared with.
        queries: tokens of the study's generator; `middle_tokens` by default. t: noise level. count: images.

    Returns:
        Rows: source ("teacher" or the arm), seed, step, block (from 0), t, query, key, probability, divergence, n.
    """
    study, tiny = runs[0].study, torch.finfo(torch.float32).tiny
    x, labels, images, _ = open_dataset(study.data).examples("test", count)
    shown_grid = token_grid(study.model, x)
    queries = queries or middle_tokens(shown_grid)
    pairs = [layer_pairs(run, teacher)[-1] for run in runs]
    found = teacher(images.to(teacher.mean.device), tuple(sorted({t for _, t in pairs}))).qk
    targets = {block: attention_probabilities(*qk).cpu() for block, qk in found.items()}
    first, facts = pairs[0][1], {"t": t, "n": len(images)}
    shown = resample_attention(targets[first][:1, aligned_heads(runs[0], teacher)], teacher.grid, shown_grid)
    rows = _map_rows(
        shown, queries, {"source": "teacher", "seed": 0, "step": 0, "block": first, **facts, "divergence": 0.0}
    )
    for run, (student_block, teacher_block) in zip(runs, pairs, strict=True):
        step, heads, grid = run.config.train.steps, aligned_heads(run, teacher), token_grid(run.config.model, x)
        taps = Taps(blocks=(student_block,))
        tapped = probe.student_output(probe.student_at(run, step), x, t, taps, 0, labels)
        student = attention_probabilities(*tapped.qk[student_block])[:, heads]
        target = resample_attention(targets[teacher_block][:, heads], teacher.grid, grid)
        apart = float((target * (target.clamp_min(tiny).log() - student.clamp_min(tiny).log())).sum(-1).mean())
        whose = {"source": run.arm, "seed": run.seed, "step": step, "block": student_block}
        shown = resample_attention(student[:1], grid, shown_grid)
        rows += _map_rows(shown, queries, whose | facts | {"divergence": apart})
    return rows


def _map_rows(probabilities: Tensor, queries: list[int], facts: dict[str, Any]) -> list[dict[str, Any]]:
    mean = probabilities[0].mean(0)
    return [
        facts | {"query": query, "key": key, "probability": float(value)}
        for query in queries
        for key, value in enumerate(mean[query])
    ]


def head_maps(
    run: Run, block: int, head: int, t: float, query: int, step: int | None = None, image: int = 0
) -> pd.DataFrame:
    """Attention of one token of a held-out image, in one head of the student and in the same head of the teacher.

    The teacher's block is the one `block` is aligned with; for other blocks the one at the same relative depth. The
    student's q and k of a step and noise level are cached, so that another block, head or token takes no new pass.

    Args:
        run: whose student. block, head: from 0; head of both. t: noise level. query: token, row by row.
        step: the last one by default. image: index of the held-out image.

    Returns:
        source (student, teacher), step, t, image, block, head, query, row, column (of the key on the student's grid),
        probability.

    Raises:
        HasteError: there is no such block, head or token.
    """
    step = run.config.train.steps if step is None else step
    both, qk = _student_qk(_View(run.dir, step, t, image, run))
    rows, columns = both.grid
    heads = min(run.config.model.heads, both.teacher.qk[0][0].shape[1])
    for name, value, count in (("block", block, len(qk)), ("head", head, heads), ("query", query, rows * columns)):
        if value not in range(count):
            raise unknown(name, value, range(count))
    partner = dict(both.pairs).get(block, round(block * (len(both.teacher.qk) - 1) / max(1, len(qk) - 1)))
    chosen = torch.tensor([image])
    maps = {"student": (block, maps_of(qk[block], chosen)), "teacher": (partner, both.teacher_maps(partner, chosen))}
    facts = {"step": step, "t": t, "image": image, "head": head, "query": query}
    return pd.DataFrame(
        {
            "source": source,
            "block": at,
            **facts,
            "row": key // columns,
            "column": key % columns,
            "probability": float(p),
        }
        for source, (at, found) in maps.items()
        for key, p in enumerate(found[0, head, query])
    )


def head_maps_by_arm(runs: Sequence[Run]) -> Callable[..., pd.DataFrame]:
    """`head_maps` with the name of an arm in place of its run, for a menu; `runs` hold each arm once."""
    arms = {run.arm: run for run in runs}
    return lambda arm, **place: head_maps(arms[arm], **place)


@dataclass(frozen=True)
class _View:
    """Key of the cache of `_student_qk`; two runs of one folder are the same."""

    folder: Path
    step: int
    t: float
    image: int
    run: Run = field(compare=False)


@lru_cache(maxsize=16)
def _student_qk(view: _View) -> tuple[StudentTeacher, Mapping[int, QK]]:
    both = StudentTeacher(view.run, every_block=True, n=view.image + 1)
    blocks = tuple(range(view.run.config.model.depth))
    return both, both.student(view.step, view.t, Taps(blocks=blocks)).qk
