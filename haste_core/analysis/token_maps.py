"""Where a token looks, in any block and head of a student and in the teacher: for a person who moves a slider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch

from haste_core.analysis.scene import Scene, maps_of
from haste_core.errors import unknown
from haste_core.study.runs import Run
from haste_core.taps import QK, Taps


@dataclass(frozen=True)
class _View:
    """What a map belongs to; two runs of one folder are the same."""

    folder: Path
    step: int
    t: float
    image: int
    run: Run = field(compare=False)


def token_map_table(
    run: Run, block: int, head: int, t: float, query: int, step: int | None = None, image: int = 0
) -> pd.DataFrame:
    """Where one token of a held-out image looks, in one head of the student and in the same head of the teacher.

    The teacher's block is the one `block` is aligned with; for other blocks the one at the same relative depth. What
    a step's student sees at one noise level is kept, so that moving on to another block, head or token is quick.

    Args:
        run: whose student. block, head: from 0; head of both. t: noise level. query: token, row by row.
        step: the last one by default. image: which held-out image.

    Returns:
        source (student, teacher), step, t, image, block, head, query, row, column (of the key on the student's grid),
        probability.

    Raises:
        HasteError: there is no such block, head or token.
    """
    step = run.config.train.steps if step is None else step
    scene, seen = _seen(_View(run.dir, step, t, image, run))
    rows, columns = scene.grid
    heads = min(run.config.model.heads, scene.teacher.qk[0][0].shape[1])
    for name, value, count in (("block", block, len(seen)), ("head", head, heads), ("query", query, rows * columns)):
        if value not in range(count):
            raise unknown(name, value, range(count))
    partner = dict(scene.pairs).get(block, round(block * (len(scene.teacher.qk) - 1) / max(1, len(seen) - 1)))
    chosen = torch.tensor([image])
    maps = {"student": (block, maps_of(seen[block], chosen)), "teacher": (partner, scene.teacher_maps(partner, chosen))}
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


def by_arm(runs: Sequence[Run]) -> Callable[..., pd.DataFrame]:
    """`token_map_table` with the name of an arm in place of its run, for a menu; `runs` hold each arm once."""
    arms = {run.arm: run for run in runs}
    return lambda arm, **place: token_map_table(arms[arm], **place)


@lru_cache(maxsize=16)
def _seen(view: _View) -> tuple[Scene, Mapping[int, QK]]:
    scene = Scene(view.run, every_block=True, n=view.image + 1)
    blocks = tuple(range(view.run.config.model.depth))
    return scene, scene.student(view.step, view.t, Taps(blocks=blocks)).qk
