"""What every analysis looks at: the same held-out images under the same noise, through the weights of a checkpoint.

The field's protocol for looking inside a diffusion transformer (REPA, arXiv 2410.06940): averaged weights, the null
label, one noise level at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from haste_core.devices import default_device
from haste_core.gradient_angle import noise
from haste_core.models import DiffusionTransformer
from haste_core.paths import objective_of
from haste_core.study.data import open_dataset
from haste_core.study.evaluation import generator_at
from haste_core.study.runs import Run
from haste_core.study.train import build_generator, seeds_of
from haste_core.taps import Tapped, Taps, tapped
from haste_core.training import Batch

# Images that go through a network at a time.
BATCH = 250


def held_out(run: Run, n: int | None = None) -> Batch:
    """The first `n` held-out images without augmentation (`analysis.n` of the study by default, or all there are)."""
    return open_dataset(run.config.data).examples("test", n or run.study.analysis.n)


def student_at(run: Run, step: int) -> DiffusionTransformer:
    """The averaged generator of a checkpoint, in eval mode; step 0 is the run's network before any training."""
    if step > 0:
        return generator_at(run, step)[0]
    initial = build_generator(run.config, open_dataset(run.config.data), seeds_of(run.seed).weights)
    return initial.requires_grad_(False).eval().to(default_device())


def everything(model: DiffusionTransformer) -> Taps:
    """Taps for the tokens after every block (depths from 1) and q, k of every block (from 0)."""
    count = len(model.blocks)
    return Taps(depths=tuple(range(1, count + 1)), blocks=tuple(range(count)))


def noised(model: DiffusionTransformer, x: Tensor, t: float, seed: int) -> tuple[Tensor, Tensor]:
    """x (B, C, S, S) at noise level t in [0, 1], and the timesteps (B,) the model is given with it.

    Image i gets the same noise at every t, in every run and at every step: it comes from `seed` alone.
    """
    objective = objective_of(model.kind)
    eps = noise(x, seed)
    at = objective.timesteps(torch.full((len(x),), t))
    return objective.noised(x, eps, at), at


@torch.no_grad()
def look(
    model: DiffusionTransformer, x: Tensor, t: float, taps: Taps, seed: int, labels: Tensor | None = None
) -> Tapped:
    """What a generator hands out for clean images x (B, C, S, S) at noise level t in [0, 1], in float32 on the CPU.

    Args:
        model: in eval mode. x: clean, as the generator models it. t: the noise level. taps: what is handed out.
        seed: of the noise, see `noised`.
        labels: (B,); the null label by default.
    """
    seen = list(_passes(model, noised(model, x, t, seed), labels, taps))
    return Tapped(
        _joined(s.output for s in seen),
        {d: _joined(s.tokens[d] for s in seen) for d in taps.depths},
        {b: (_joined(s.qk[b][0] for s in seen), _joined(s.qk[b][1] for s in seen)) for b in taps.blocks},
    )


@torch.no_grad()
def patch_means(
    model: DiffusionTransformer, x: Tensor, t: float, depths: Iterable[int], seed: int
) -> dict[int, Tensor]:
    """The mean over patch tokens after the blocks at `depths` (from 1), (B, D) float32 on the CPU by depth.

    The inputs are those of `look` with the null label. Tokens are averaged batch by batch: those of all blocks of a
    large generator at once do not fit into memory.
    """
    taps = Taps(depths=tuple(depths))
    seen = _passes(model, noised(model, x, t, seed), None, taps)
    means = [{depth: tokens.float().mean(1) for depth, tokens in s.tokens.items()} for s in seen]
    return {depth: _joined(part[depth] for part in means) for depth in taps.depths}


def _passes(
    model: DiffusionTransformer, inputs: tuple[Tensor, Tensor], labels: Tensor | None, taps: Taps
) -> Iterator[Tapped]:
    device, count = next(model.parameters()).device, len(inputs[0])
    labels = torch.full((count,), model.null_label) if labels is None else labels
    for batch in zip(*(whole.split(BATCH) for whole in (*inputs, labels)), strict=True):
        x, t, y = (part.to(device) for part in batch)
        yield tapped(model, x, t, y, taps)


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.float().cpu() for part in parts])
