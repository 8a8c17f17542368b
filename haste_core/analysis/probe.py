"""The measuring protocol of all analyses: held-out images and noise, averaged weights, taps of student and teacher.

REPA's protocol (arXiv 2410.06940): averaged weights, the null label, one noise level at a time, the same images under
the same noise for every run and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from haste_core.alignment import Grid, attention_logits, paired_heads, resample_attention
from haste_core.devices import default_device
from haste_core.errors import HasteError
from haste_core.gradient_angle import noise
from haste_core.models import DiffusionTransformer
from haste_core.paths import objective_of
from haste_core.study import config
from haste_core.study.data import open_dataset
from haste_core.study.evaluation import generator_at
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.sections import TEMPERATURE
from haste_core.study.train import build_generator, seeds_of
from haste_core.taps import QK, Tapped, Taps, tapped
from haste_core.teacher import Similarity, Teacher, TeacherOutput
from haste_core.training import Batch

# Images per forward pass.
BATCH = 250
# Entries of attention maps (B, H, N, N) held in memory at a time.
MAP_NUMBERS = 2**22


def held_out(run: Run, n: int | None = None) -> Batch:
    """First `n` held-out images without augmentation (`analysis.n` of the study by default, or all there are)."""
    return open_dataset(run.config.data).examples("test", n or run.study.analysis.n)


def student_at(run: Run, step: int) -> DiffusionTransformer:
    """Averaged generator of a checkpoint, in eval mode; step 0 is the run's network before any training."""
    if step > 0:
        return generator_at(run, step)[0]
    initial = build_generator(run.config, open_dataset(run.config.data), seeds_of(run.seed).weights)
    return initial.requires_grad_(False).eval().to(default_device())


def checkpoints(run: Run, steps: Iterable[int]) -> Iterator[int]:
    """The steps under a bar, since some measures take many seconds at each."""
    return iter(tqdm(list(steps), desc=f"{run.arm} seed {run.seed}", unit="checkpoint", leave=False, mininterval=1.0))


def noised(model: DiffusionTransformer, x: Tensor, t: float, seed: int) -> tuple[Tensor, Tensor]:
    """x (B, C, S, S) at noise level t in [0, 1], and the timesteps (B,) that the model is given with it.

    Image i gets the same noise at every t, in every run and at every step: it depends on `seed` alone.
    """
    objective = objective_of(model.kind)
    at = objective.timesteps(torch.full((len(x),), t))
    return objective.noised(x, noise(x, seed), at), at


@torch.no_grad()
def student_output(
    model: DiffusionTransformer, x: Tensor, t: float, taps: Taps, seed: int, labels: Tensor | None = None
) -> Tapped:
    """Output and tapped tensors of a generator for clean x (B, C, S, S) at noise level t, float32 on the CPU.

    seed: of the noise, see `noised`. labels: (B,); the null label by default.
    """
    parts = list(_passes(model, noised(model, x, t, seed), labels, taps))
    return Tapped(
        _joined(part.output for part in parts),
        {depth: _joined(part.tokens[depth] for part in parts) for depth in taps.depths},
        _joined_qk(parts, taps.blocks),
    )


@torch.no_grad()
def patch_means(
    model: DiffusionTransformer, x: Tensor, t: float, depths: Iterable[int], seed: int
) -> dict[int, Tensor]:
    """Mean over patch tokens after the blocks at `depths` (from 1), (B, D) float32 on the CPU by depth.

    The inputs are those of `student_output` with the null label. Tokens are averaged batch by batch: those of all
    blocks of a large generator at once do not fit into memory.
    """
    taps = Taps(depths=tuple(depths))
    parts = _passes(model, noised(model, x, t, seed), None, taps)
    means = [{depth: tokens.float().mean(1) for depth, tokens in part.tokens.items()} for part in parts]
    return {depth: _joined(part[depth] for part in means) for depth in taps.depths}


def _passes(
    model: DiffusionTransformer, inputs: tuple[Tensor, Tensor], labels: Tensor | None, taps: Taps
) -> Iterator[Tapped]:
    device, count = next(model.parameters()).device, len(inputs[0])
    labels = torch.full((count,), model.null_label) if labels is None else labels
    for batch in zip(*(whole.split(BATCH) for whole in (*inputs, labels)), strict=True):
        x, t, y = (part.to(device) for part in batch)
        yield tapped(model, x, t, y, taps)


def teacher_of(run: Run) -> Teacher:
    """The run's teacher, where students are measured: on the GPU if there is one."""
    return find_teacher(run.study, run.config.teacher).to(default_device())


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.float().cpu() for part in parts])


def _joined_qk(parts: Sequence[Tapped | TeacherOutput], blocks: Iterable[int]) -> dict[int, QK]:
    return {b: (_joined(part.qk[b][0] for part in parts), _joined(part.qk[b][1] for part in parts)) for b in blocks}


def middle_level(timesteps: Sequence[float]) -> float:
    """Noise level nearest to t = 0.5, where the paper finds the alignment gradient most helpful (Fig. 4)."""
    return min(timesteps, key=lambda t: abs(t - 0.5))


def layer_pairs(run: Run, teacher: Teacher) -> list[tuple[int, int]]:
    """Aligned (student block, teacher block) of a run, both from 0.

    Those of the study for an arm without its own; the last block of each if the study names none either.
    """
    named = run.config.alignment.layer_pairs or run.study.alignment.layer_pairs
    return [(int(s), int(t)) for s, t in named] or [(run.config.model.depth - 1, teacher.blocks - 1)]


def similarity_of(run: Run, teacher: Teacher) -> Similarity | None:
    """The attention made of similarities that a run is compared with; None where the teacher's own q and k are meant.

    A teacher of feature maps has nothing else, also for arms that are not aligned with it.
    """
    temperature = run.config.alignment.similarity or run.study.alignment.similarity
    if temperature is None and not teacher.heads:
        temperature = TEMPERATURE
    return None if temperature is None else Similarity(temperature, run.config.model.heads)


def token_grid(model: config.ModelSettings, x: Tensor) -> Grid:
    """Rows and columns of a generator's tokens for inputs x (B, C, S, S)."""
    return x.shape[-2] // model.patch, x.shape[-1] // model.patch


def maps_of(qk: QK, images: Tensor) -> Tensor:
    """Attention maps (n, H, N, N) float64 of images (indices) from q and k of all images."""
    return attention_logits(qk[0][images], qk[1][images]).double().softmax(-1)


def other_images(count: int, seed: int) -> Tensor:
    """Index of another image for each image, (count,): a seeded cycle through all of them.

    Raises:
        HasteError: there are fewer than two images.
    """
    if count < 2:
        raise HasteError(f"analysis.n is {count}; expected at least 2, since a baseline compares with another image")
    cycle = torch.randperm(count, generator=Generator().manual_seed(seed))
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(-1)
    return other


class StudentTeacher:
    """Held-out images of a study with the teacher's output on them, and the student's at any step and noise level.

    Attention maps are float64 probabilities (B, H, N, N) over patch tokens on the student's token grid, where attention
    is aligned (Sec. 2.3, Tables 11, 12, arXiv 2505.16792).

    Args:
        run: its aligned layer pairs and heads are compared, or the study's if it has none.
        every_block: keep q and k of every block of the teacher, not of the aligned ones alone. n: as in `held_out`.
    """

    def __init__(self, run: Run, every_block: bool = False, n: int | None = None) -> None:
        teacher = teacher_of(run)
        self.run, self.batch = run, held_out(run, n)
        self.pairs = layer_pairs(run, teacher)
        self.grid, self.teacher_grid = token_grid(run.config.model, self.batch.x), teacher.grid
        blocks = tuple(range(teacher.blocks)) if every_block else tuple(sorted({t for _, t in self.pairs}))
        device = teacher.mean.device
        similarity = similarity_of(run, teacher)
        parts = [teacher(images.to(device), blocks, similarity) for images in self.batch.images.split(BATCH)]
        self.teacher = TeacherOutput(_joined(part.tokens for part in parts), _joined_qk(parts, blocks))
        heads = self.teacher.qk[blocks[0]][0].shape[1]
        self.heads = paired_heads(run.config.alignment.heads, run.config.model.heads, heads)
        self._loaded: tuple[int, DiffusionTransformer] | None = None

    @property
    def steps(self) -> list[int]:
        """0 for the untrained network, and every kept checkpoint."""
        return [0, *self.run.config.train.kept_steps]

    def student(self, step: int, t: float, taps: Taps) -> Tapped:
        """Tapped tensors of the averaged student of a step at noise level t, under the null label."""
        if self._loaded is None or self._loaded[0] != step:
            self._loaded = step, student_at(self.run, step)
        return student_output(self._loaded[1], self.batch.x, t, taps, self.run.study.analysis.seed)

    def teacher_maps(self, block: int, images: Tensor) -> Tensor:
        """Teacher's maps of images (indices), all its heads, on the student's grid."""
        return resample_attention(maps_of(self.teacher.qk[block], images), self.teacher_grid, self.grid).double()

    def rows(
        self,
        step: int,
        t: float,
        facts: dict[str, Any],
        heads: Iterable[int],
        measured: Callable[[Tensor], dict[str, Tensor]],
    ) -> list[dict[str, Any]]:
        """Rows step, t, n, facts, head, measure and value, means over all images.

        `measured` returns means (heads,) by measure, given indices of as many images as their maps fit into memory.
        """
        most = max(self.run.config.model.heads, *(q.shape[1] for q, _ in self.teacher.qk.values()))
        tokens = max(self.grid[0] * self.grid[1], self.teacher_grid[0] * self.teacher_grid[1])
        n = len(self.batch.x)
        parts = torch.arange(n).split(max(1, MAP_NUMBERS // (most * tokens**2)))
        found = [(len(part), measured(part)) for part in parts]
        means = {
            name: torch.stack([count * values[name] for count, values in found]).sum(0) / n for name in found[0][1]
        }
        return [
            {"step": step, "t": t, "n": n, **facts, "head": head, "measure": name, "value": float(value)}
            for name, mean in means.items()
            for head, value in zip(heads, mean, strict=True)
        ]
