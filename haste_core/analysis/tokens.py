"""Patch tokens of teacher and student, one block at a time, so that a whole set of images fits into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_core.analysis import probe
from haste_core.models import DiffusionTransformer
from haste_core.taps import Taps
from haste_core.teacher import Teacher


def teacher_blocks(teacher: Teacher) -> range:
    """The blocks of a teacher from 0, and one more: its tokens after the final norm, which alignment hands over."""
    return range(teacher.blocks + 1)


def teacher_tokens(teacher: Teacher, images: Tensor, block: int) -> Tensor:
    """Patch tokens (n, N, D) float32 on the CPU after a block of the teacher; `teacher.blocks` are its final tokens.

    Args:
        teacher: frozen. images: (n, C, S, S) in [-1, 1]. block: one of `teacher_blocks`.
    """
    parts = (part.to(teacher.mean.device) for part in images.split(probe.BATCH))
    if block == teacher.blocks:
        found = [teacher(part).tokens for part in parts]
    else:
        found = [teacher.block_tokens(part, [block])[block] for part in parts]
    return torch.cat([tokens.float().cpu() for tokens in found])


def student_tokens(model: DiffusionTransformer, x: Tensor, t: float, block: int, seed: int) -> Tensor:
    """Patch tokens (n, N, D) float32 on the CPU after a block of the generator (from 0), under `probe.look`.

    Args:
        model: in eval mode. x: (n, C, S, S), clean, as it models them. t: noise level. seed: of the noise.
    """
    return probe.look(model, x, t, Taps(depths=(block + 1,)), seed).tokens[block + 1]
