"""Generators: plain diffusion transformers that know nothing of teachers, from one function."""

from __future__ import annotations

import torch

from haste_core.models.base import DiffusionTransformer
from haste_core.models.layers import Tapped, Taps
from haste_core.models.mmdit import MMDiT
from haste_core.models.sit import DiT, SiT
from haste_core.study import config
from haste_core.study.data.contexts import Contexts

__all__ = ["DiT", "DiffusionTransformer", "MMDiT", "SiT", "Tapped", "Taps", "build"]

_SIZES = {"depth", "width", "heads", "patch"}


def build(
    model: config.Model, *, image_size: int, channels: int, classes: int, seed: int, contexts: Contexts | None = None
) -> DiffusionTransformer:
    """A freshly initialised generator in float32 on the CPU, its weights drawn from `seed` alone.

    Args:
        model: kind and sizes.
        image_size, channels, classes: of what is modelled: pixels or latents.
        seed: of the weights.
        contexts: text tokens by label, for an MM-DiT.
    """
    common = {"image_size": image_size, "channels": channels, "classes": classes, **model.model_dump(include=_SIZES)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model.kind == "mmdit":
            return MMDiT(**common, context_width=model.context_width, contexts=contexts)
        kind = DiT if model.kind == "dit" else SiT
        return kind(**common, mlp_ratio=model.mlp_ratio, qk_norm=model.qk_norm)
