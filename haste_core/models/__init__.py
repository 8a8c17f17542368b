"""Generators: plain diffusion transformers that know nothing of teachers."""

from __future__ import annotations

from typing import Any

import torch

from haste_core.errors import unknown
from haste_core.models.layers import DiffusionTransformer
from haste_core.models.mmdit import MMDiT
from haste_core.models.sit import DiT, SiT

__all__ = ["KINDS", "SIZES", "DiT", "DiffusionTransformer", "MMDiT", "SiT", "build"]

KINDS: dict[str, type[DiffusionTransformer]] = {"sit": SiT, "dit": DiT, "mmdit": MMDiT}
# depth, width, heads of the published sizes (Table 16, arXiv 2505.16792; S from the DiT paper).
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def build(kind: str, seed: int, **sizes: Any) -> DiffusionTransformer:
    """Generator of a kind ("sit", "dit", "mmdit") in float32 on the CPU, its weights drawn from `seed` alone.

    sizes: arguments of its class.
    """
    if kind not in KINDS:
        raise unknown("kind of generator", kind, KINDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind](**sizes)
