"""Placeholders with which torchvision can be imported where its compiled part does not load (torch's CPU build).

timm and torch-fidelity import torchvision. The two operators whose absence stops that import get a schema and no
implementation, so calling them still fails. They are made when something first looks for torchvision: importing
`haste_core` alone does not import torch.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_library: Any = None  # the definitions live as long as this object


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself; the first search for torchvision passes here."""

    def find_spec(self, name: str, *_: Any) -> None:
        global _library
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return
        import torch

        for compiled in sorted(Path(spec.origin).parent.glob("_C*")):
            with suppress(OSError, ImportError):
                torch.ops.load_library(str(compiled))
                return
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _BeforeTorchvision())
