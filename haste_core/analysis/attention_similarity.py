"""How alike the attention of student and teacher is, and what there is to hold it against (Fig. 6, arXiv 2505.16792).

Maps are probabilities (B, H, N, N) over patch tokens, rows summing to one; every number is a float64 mean over images
and queries, one per head. Student and teacher are compared on the student's token grid, where attention is aligned.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from haste_core.alignment import Grid
from haste_core.analysis.scene import Scene, maps_of, other_images
from haste_core.errors import HasteError
from haste_core.study.runs import Run
from haste_core.taps import QK, Taps

# The first keys of a query that are compared: one in eight, so that chance is 1/8 on every grid that 8 divides.
TOP_SHARE = 8
# Numbers in q and k of the student's blocks that are held at a time.
QK_NUMBERS = 2**28


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """H(teacher, student) in nats, (H,): the attention loss (Sec. 2.3, arXiv 2505.16792) of each head.

    At least the teacher's own entropy; infinite where a student gives nothing to a key the teacher looks at.
    """
    return -torch.special.xlogy(teacher.double(), student.double()).sum(-1).mean((0, 2))


def jensen_shannon(teacher: Tensor, student: Tensor) -> Tensor:
    """The Jensen-Shannon divergence in nats, (H,), in [0, log 2]: 0 for equal maps, log 2 for disjoint ones.

    Not in the paper: symmetric and bounded, so that heads with sharp and with flat teachers can be compared.
    """
    p, q = teacher.double(), student.double()
    apart = _entropies((p + q) / 2) - (_entropies(p) + _entropies(q)) / 2
    return apart.clamp(0, math.log(2)).mean((0, 2))  # rounding alone can leave the range


def top_k_overlap(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    """The share of the teacher's k first keys that are among the student's k first, (H,), in [0, 1].

    Not in the paper. Chance level: k / N. Keys that tie for the last places count as if drawn among at random, on
    each side by itself, so a uniform map reaches k / N exactly, with itself too.

    Raises:
        HasteError: there are no k keys.
    """
    return (_among_top(teacher.double(), k) * _among_top(student.double(), k)).sum(-1).mean((0, 2)) / k


def entropy(p: Tensor) -> Tensor:
    """The entropy of attention in nats, (H,), in [0, log N]."""
    return _entropies(p.double()).mean((0, 2))


def attention_distance(p: Tensor, grid: Grid) -> Tensor:
    """The expected distance between a query and the keys it looks at, (H,), Euclidean, in tokens.

    Not in the paper; the mean attention distance of arXiv 2010.11929 with tokens as the unit.

    Args:
        p: (B, H, N, N). grid: (rows, columns), tokens numbered row by row.

    Raises:
        HasteError: `grid` does not have N places.
    """
    if grid[0] * grid[1] != p.shape[-1]:
        raise HasteError(f"{p.shape[-1]} tokens do not fill a {grid[0]}x{grid[1]} grid")
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))
    # By differences: the way over a matrix product leaves distances to oneself that are not 0.
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    return (p.double() * apart).sum(-1).mean((0, 2))


def alike(teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
    """Every measure of likeness by name, each (H,)."""
    return {
        "cross_entropy": cross_entropy(teacher, student),
        "jensen_shannon": jensen_shannon(teacher, student),
        "top_k_overlap": top_k_overlap(teacher, student, max(1, teacher.shape[-1] // TOP_SHARE)),
    }


def measure(run: Run) -> pd.DataFrame:
    """How alike student and teacher attention is over training, per aligned layer pair and head, with baselines.

    Averaged weights, the null label and the same noise at every step and t; the teacher sees the clean image.

    Returns:
        step (0: before training), t, n (images), student_block, teacher_block (both from 0), baseline, head (of
        both), measure, value. Measures: cross_entropy and jensen_shannon in nats, top_k_overlap in [0, 1] of one key
        in eight. Baselines, of which the paper has none:

        - none: the student. Its rows at step 0 are the untrained student, a baseline themselves.
        - shuffled: the student's map of an image against the teacher's map of another: what is alike on any image.
        - uniform: attention to every key alike, in the student's place. Depends on neither step nor t: both 0.
        - teacher: the teacher's own map in the student's place, the best there is. Both 0 as well.
    """
    scene = Scene(run)
    rows = []
    for pair in scene.pairs:
        for baseline, values in references(scene, pair[1]).items():
            rows += _rows(values, scene.heads, scene.facts(0, 0.0) | _named(pair, baseline))
    for step, t in product(scene.steps, run.study.analysis.timesteps):
        qk = scene.student(step, t, Taps(blocks=scene.student_blocks)).qk
        for pair in scene.pairs:
            for baseline, values in compared(scene, qk[pair[0]], pair[1]).items():
                rows += _rows(values, scene.heads, scene.facts(step, t) | _named(pair, baseline))
    return pd.DataFrame(rows)


def references(scene: Scene, teacher_block: int) -> dict[str, dict[str, Tensor]]:
    """The measures (aligned heads,) of uniform attention and of the teacher's own, in the student's place."""

    def one(images: Tensor, uniform: bool) -> dict[str, Tensor]:
        teacher = scene.teacher_maps(teacher_block, images)[:, scene.heads]
        return alike(teacher, torch.full_like(teacher, 1 / teacher.shape[-1]) if uniform else teacher)

    return {
        "uniform": scene.averaged(lambda images: one(images, True)),
        "teacher": scene.averaged(lambda images: one(images, False)),
    }


def compared(scene: Scene, student: QK, teacher_block: int) -> dict[str, dict[str, Tensor]]:
    """The measures (aligned heads,) of a student block (all heads) against the teacher, same and other images."""
    q, k = (part[:, scene.heads] for part in student)
    same = torch.arange(len(q))
    other = other_images(len(q), scene.run.study.analysis.seed)

    def one(images: Tensor, seen: Tensor) -> dict[str, Tensor]:
        return alike(scene.teacher_maps(teacher_block, seen[images])[:, scene.heads], maps_of((q, k), images))

    return {
        "none": scene.averaged(lambda images: one(images, same)),
        "shuffled": scene.averaged(lambda images: one(images, other)),
    }


def own_statistics(run: Run) -> pd.DataFrame:
    """How sharp and how far-reaching the attention of every block and head is, in the student and in the teacher.

    Returns:
        step (0: before training), t, n (images), source, block, head (both from 0), measure, value. Measures: entropy
        in nats, distance in tokens of the student's grid, to which the teacher's maps are resampled. The teacher sees
        clean images and does not train: step and t are 0. Source `uniform`, as block 0 and head 0, is attention to
        every key alike.
    """
    scene = Scene(run, every_block=True)
    tokens, depth = scene.grid[0] * scene.grid[1], run.config.model.depth
    uniform = torch.full((1, 1, tokens, tokens), 1 / tokens, dtype=torch.float64)
    rows = _rows(_own(uniform, scene.grid), [0], scene.facts(0, 0.0) | {"source": "uniform", "block": 0})
    for block in scene.teacher.qk:
        values = scene.averaged(partial(_teachers_own, scene, block))
        rows += _rows(values, None, scene.facts(0, 0.0) | {"source": "teacher", "block": block})
    together = max(1, QK_NUMBERS // (2 * len(scene.batch.x) * tokens * run.config.model.width))
    groups = [tuple(range(i, min(i + together, depth))) for i in range(0, depth, together)]
    for step, t, group in product(scene.steps, run.study.analysis.timesteps, groups):
        for block, qk in scene.student(step, t, Taps(blocks=group)).qk.items():
            values = scene.averaged(partial(_students_own, scene, qk))
            rows += _rows(values, None, scene.facts(step, t) | {"source": "student", "block": block})
    return pd.DataFrame(rows)


def _own(p: Tensor, grid: Grid) -> dict[str, Tensor]:
    return {"entropy": entropy(p), "distance": attention_distance(p, grid)}


def _teachers_own(scene: Scene, block: int, images: Tensor) -> dict[str, Tensor]:
    return _own(scene.teacher_maps(block, images), scene.grid)


def _students_own(scene: Scene, qk: QK, images: Tensor) -> dict[str, Tensor]:
    return _own(maps_of(qk, images), scene.grid)


def _named(pair: tuple[int, int], baseline: str) -> dict[str, Any]:
    return {"student_block": pair[0], "teacher_block": pair[1], "baseline": baseline}


def _rows(values: dict[str, Tensor], heads: list[int] | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        facts | {"head": head, "measure": name, "value": float(value)}
        for name, per_head in values.items()
        for head, value in zip(heads or range(len(per_head)), per_head, strict=True)
    ]


def _entropies(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def _among_top(p: Tensor, k: int) -> Tensor:
    """1 for keys surely among the k first, 0 for those surely not, the chance of it for those that tie between."""
    if not 1 <= k <= p.shape[-1]:
        raise HasteError(f"top {k} of {p.shape[-1]} keys; possible: 1 to {p.shape[-1]}")
    last = p.topk(k).values[..., -1:]
    above, tied = (p > last).double(), (p == last).double()
    return above + tied * (k - above.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)
