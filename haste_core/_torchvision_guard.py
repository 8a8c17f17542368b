"""Placeholders with which torchvision can be imported where its compiled part does not load (torch's CPU build).

`haste_core` imports this before timm. The two operators whose absence stops the import get a schema and no
implementation, so calling them still fails.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch


def _missing_operators() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or spec is None or spec.origin is None:
        return None
    for compiled in sorted(Path(spec.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(str(compiled))
        except (OSError, ImportError):
            continue
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_library = _missing_operators()  # the definitions live as long as this object
