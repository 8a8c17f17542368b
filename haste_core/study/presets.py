"""Published models and samplers by name: the fields of a study file that a name fills."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from haste_core.errors import unknown

# Samplers by name: what the paper reports its numbers with (Tables 1, 13, 15, 16, arXiv 2505.16792).
SAMPLERS: dict[str, dict[str, Any]] = {
    "sde-250": {"sampler": "sde", "solver_steps": 250},
    "ode-heun-50": {"sampler": "heun", "solver_steps": 50},
    "ddpm-250": {"sampler": "ddpm", "solver_steps": 250},
    "haste-xl-100ep": {"sampler": "sde", "solver_steps": 250, "guidance": 1.825, "guidance_high": 0.6},
    "haste-xl-400ep": {"sampler": "sde", "solver_steps": 250, "guidance": 1.675, "guidance_high": 0.7},
    "haste-xl-500ep": {"sampler": "sde", "solver_steps": 250, "guidance": 1.65, "guidance_high": 0.72},
    "haste-xl-600ep": {"sampler": "sde", "solver_steps": 250, "guidance": 1.67, "guidance_high": 0.7},
    "haste-xl-512": {"sampler": "sde", "solver_steps": 250, "guidance": 1.25},
}


def models() -> dict[str, dict[str, Any]]:
    """Generators by name: the fields that each name fills."""
    from haste_core.models import SIZES  # reading a study file should not wait for torch

    released = {
        f"{name}-{size}/{patch}": {"kind": kind, "depth": depth, "width": width, "heads": heads, "patch": patch}
        for name, kind in (("SiT", "sit"), ("DiT", "dit"))
        for size, (depth, width, heads) in SIZES.items()
        for patch in (2, 4, 8)
    }
    # Width 32 x depth, one head per block of depth (text to image, Sec. 3.2); 24 is the paper's.
    text = {
        f"MMDiT-{depth}/2": {"kind": "mmdit", "depth": depth, "width": 32 * depth, "heads": depth, "patch": 2}
        for depth in (12, 18, 24)
    }
    return released | text


def fill(values: Any, presets: Callable[[], Mapping[str, Mapping[str, Any]]]) -> Any:
    """`values` over the fields of the preset they name, if they name one; `presets` is asked only then.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(values, Mapping) or not values.get("preset"):
        return values
    known = presets()
    if values["preset"] not in known:
        raise ValueError(str(unknown("preset", values["preset"], known)))
    return {**known[values["preset"]], **values}
