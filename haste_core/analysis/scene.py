"""What student and teacher of a run look at together: the held-out images, and their attention maps of them on demand.

Maps are float64 probabilities (B, H, N, N) over patch tokens on the student's token grid, where attention is aligned
(Sec. 2.3, Tables 11, 12, arXiv 2505.16792).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from haste_core.alignment import attention_logits, resample_attention
from haste_core.analysis import probe
from haste_core.analysis.attention import aligned_heads, layer_pairs, token_grid
from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.taps import QK, Tapped, Taps
from haste_core.teacher import TeacherOutput

# Numbers in the maps (B, H, N, N) held at a time.
MAP_NUMBERS = 2**22


class Scene:
    """The held-out images of a study, the teacher's view of them, and the student's at any step and noise level.

    Args:
        run: whose student and teacher look; its aligned layer pairs and heads, or the study's, are looked at.
        every_block: keep q and k of every block of the teacher, not of the aligned ones alone.
        n: images; `analysis.n` of the study by default.
    """

    def __init__(self, run: Run, every_block: bool = False, n: int | None = None) -> None:
        teacher = find_teacher(run.study, run.config.teacher)
        self.run, self.batch = run, probe.held_out(run, n)
        self.pairs, self.heads = layer_pairs(run, teacher), aligned_heads(run, teacher)
        self.grid, self.teacher_grid = token_grid(run.config.model, self.batch.x), teacher.grid
        blocks = tuple(range(teacher.blocks)) if every_block else tuple(sorted({t for _, t in self.pairs}))
        device = teacher.mean.device
        parts = [teacher(images.to(device), blocks) for images in self.batch.images.split(probe.BATCH)]
        self.teacher = TeacherOutput(
            torch.cat([part.tokens.float().cpu() for part in parts]),
            {b: (_joined([p.qk[b][0] for p in parts]), _joined([p.qk[b][1] for p in parts])) for b in blocks},
        )
        self._loaded: tuple[int, DiffusionTransformer] | None = None

    @property
    def student_blocks(self) -> tuple[int, ...]:
        """The student's blocks that are paired with one of the teacher's."""
        return tuple(sorted({s for s, _ in self.pairs}))

    @property
    def steps(self) -> list[int]:
        """The untrained network and every kept checkpoint."""
        return [0, *self.run.config.train.kept_steps]

    def student(self, step: int, t: float, taps: Taps) -> Tapped:
        """What the averaged student of a step hands out at noise level t, under the null label."""
        if self._loaded is None or self._loaded[0] != step:
            self._loaded = step, probe.student_at(self.run, step)
        return probe.look(self._loaded[1], self.batch.x, t, taps, self.run.study.analysis.seed)

    def teacher_maps(self, block: int, images: Tensor) -> Tensor:
        """The teacher's maps of images (indices), all its heads, on the student's grid."""
        return resample_attention(maps_of(self.teacher.qk[block], images), self.teacher_grid, self.grid).double()

    def facts(self, step: int, t: float) -> dict[str, Any]:
        """The columns that every row has."""
        return {"step": step, "t": t, "n": len(self.batch.x)}

    def averaged(self, measured: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Means over all images of what is `measured` on some of them (indices), few enough for their maps to fit."""
        heads = max(self.run.config.model.heads, *(q.shape[1] for q, _ in self.teacher.qk.values()))
        tokens = max(self.grid[0] * self.grid[1], self.teacher_grid[0] * self.teacher_grid[1])
        parts = torch.arange(len(self.batch.x)).split(max(1, MAP_NUMBERS // (heads * tokens**2)))
        found = [(len(part), measured(part)) for part in parts]
        total = sum(count for count, _ in found)
        return {
            name: torch.stack([count * values[name] for count, values in found]).sum(0) / total for name in found[0][1]
        }


def maps_of(qk: QK, images: Tensor) -> Tensor:
    """The attention maps of images (indices) from q and k of all images."""
    return attention_logits(qk[0][images], qk[1][images]).double().softmax(-1)


def other_images(count: int, seed: int) -> Tensor:
    """For each image the index of another one, (count,): a seeded cycle through all of them.

    Raises:
        HasteError: there are fewer than two images.
    """
    if count < 2:
        raise HasteError(f"analysis.n is {count}; possible: 2 and above, a baseline compares with another image")
    cycle = torch.randperm(count, generator=Generator().manual_seed(seed))
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(-1)
    return other


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.float().cpu() for part in parts])
