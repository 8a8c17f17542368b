"""Attention of teacher and student: maps of single tokens, and how far apart the two are."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from haste_core.alignment import Grid, attention_probabilities, paired_heads, resample_attention
from haste_core.analysis import probe
from haste_core.study import config
from haste_core.study.data import Dataset, open_dataset
from haste_core.study.runs import Run
from haste_core.taps import Taps
from haste_core.teacher import Teacher


def middle_tokens(grid: tuple[int, int]) -> list[int]:
    """Three tokens around the middle of a grid of (rows, columns), where pictures have their subject."""
    row, column = grid[0] // 2, grid[1] // 2
    places = [(row - 1, column - 1), (row - 1, column), (row, column)]
    return [r * grid[1] + c for r, c in places]


def student_attention(run: Run, step: int, block: int, x: Tensor, labels: Tensor, t: float, seed: int = 0) -> Tensor:
    """Attention probabilities (B, H, N, N) float32 of one block of the EMA generator on noised inputs.

    Args:
        run, step: which checkpoint (0: before training). block: from 0.
        x: (B, C, S, S), clean, as the generator models it; labels: (B,). t: noise level in [0, 1]. seed: of the noise.
    """
    seen = probe.look(probe.student_at(run, step), x, t, Taps(blocks=(block,)), seed, labels)
    return attention_probabilities(*seen.qk[block])


def divergence(teacher: Tensor, student: Tensor) -> float:
    """The mean Kullback-Leibler divergence from student to teacher attention in nats, over all heads and queries.

    Both (B, H, N, N), rows summing to one. It is the attention loss minus the teacher's own entropy.
    """
    tiny = torch.finfo(torch.float32).tiny
    return float((teacher * (teacher.clamp_min(tiny).log() - student.clamp_min(tiny).log())).sum(-1).mean())


def teacher_maps(teacher: Teacher, dataset: Dataset, queries: list[int] | None = None, index: int = 0) -> pd.DataFrame:
    """Where chosen tokens of one held-out image look in every block of the teacher, averaged over heads.

    Args:
        teacher, dataset: who looks, and at what.
        queries: tokens; `middle_tokens` by default.
        index: of the image.

    Returns:
        Columns: source ("block 0", ...), query, key, probability, divergence (0: there is nothing to compare with).
    """
    queries = queries or middle_tokens(teacher.grid)
    images = dataset.images("test", index + 1)[0][index:].to(teacher.mean.device)
    found = teacher(images, tuple(range(teacher.blocks))).qk
    probabilities = {block: attention_probabilities(*qk)[0].mean(0).cpu() for block, qk in found.items()}
    return pd.DataFrame(
        {"source": f"block {block}", "query": query, "key": key, "probability": float(value), "divergence": 0.0}
        for block, rows in sorted(probabilities.items())
        for query in queries
        for key, value in enumerate(rows[query])
    )


def token_maps(
    runs: list[Run], teacher: Teacher, queries: list[int] | None = None, t: float = 0.5, count: int = 200
) -> list[dict[str, Any]]:
    """Where chosen tokens look, in the teacher and in each run's final generator, for the last aligned layer pair.

    The maps are those of the first held-out image, averaged over aligned heads, on the token grid of the study's
    generator; others, the teacher's too, are resampled to it. `divergence` is the mean KL to the teacher over `count`
    held-out images, all queries and aligned heads, on the run's own grid, in nats (0 for the teacher itself).

    Args:
        runs: of one study. teacher: whose attention is compared with.
        queries: tokens of the study's generator; `middle_tokens` by default. t: noise level. count: images.

    Returns:
        Rows: source ("teacher" or the arm), seed, step, block (from 0), t, query, key, probability, divergence, n.
    """
    study = runs[0].study
    x, labels, images, _ = open_dataset(study.data).examples("test", count)
    shown_grid = token_grid(study.model, x)
    queries = queries or middle_tokens(shown_grid)
    pairs = [layer_pairs(run, teacher)[-1] for run in runs]
    found = teacher(images.to(teacher.mean.device), tuple(sorted({t for _, t in pairs}))).qk
    targets = {block: attention_probabilities(*qk).cpu() for block, qk in found.items()}
    first, facts = pairs[0][1], {"t": t, "n": len(images)}
    shown = resample_attention(targets[first][:1, aligned_heads(runs[0], teacher)], teacher.grid, shown_grid)
    rows = _rows(
        shown, queries, {"source": "teacher", "seed": 0, "step": 0, "block": first, **facts, "divergence": 0.0}
    )
    for run, (student_block, teacher_block) in zip(runs, pairs, strict=True):
        step, heads, grid = run.config.train.steps, aligned_heads(run, teacher), token_grid(run.config.model, x)
        probabilities = student_attention(run, step, student_block, x, labels, t)[:, heads]
        target = resample_attention(targets[teacher_block][:, heads], teacher.grid, grid)
        whose = {"source": run.arm, "seed": run.seed, "step": step, "block": student_block}
        apart = divergence(target, probabilities)
        shown = resample_attention(probabilities[:1], grid, shown_grid)
        rows += _rows(shown, queries, whose | facts | {"divergence": apart})
    return rows


def layer_pairs(run: Run, teacher: Teacher) -> list[tuple[int, int]]:
    """Where a run is looked at: its aligned (student block, teacher block), both from 0.

    Those of the study for an arm without its own; the last block of each where the study names none either.
    """
    named = run.config.alignment.layer_pairs or run.study.alignment.layer_pairs
    return [(int(s), int(t)) for s, t in named] or [(run.config.model.depth - 1, teacher.blocks - 1)]


def token_grid(model: config.Model, x: Tensor) -> Grid:
    """Rows and columns of a generator's tokens for inputs x (B, C, S, S)."""
    return x.shape[-2] // model.patch, x.shape[-1] // model.patch


def aligned_heads(run: Run, teacher: Teacher) -> list[int]:
    """The heads a run aligns, or would: head m of the student with head m of the teacher."""
    return paired_heads(run.config.alignment.heads, run.config.model.heads, teacher.heads)


def _rows(probabilities: Tensor, queries: list[int], facts: dict[str, Any]) -> list[dict[str, Any]]:
    mean = probabilities[0].mean(0)
    return [
        facts | {"query": query, "key": key, "probability": float(value)}
        for query in queries
        for key, value in enumerate(mean[query])
    ]
