"""HASTE: does representation alignment help a diffusion transformer, until when, and why does it stop helping?

Names are imported on first use, so that `import haste_core` costs nothing and prints nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "HasteError": "errors",
    "load": "study.config",
    "Study": "study.config",
    "RunConfig": "study.config",
    "Run": "study.runs",
    "SiT": "models",
    "DiT": "models",
    "MMDiT": "models",
    "Taps": "models",
    "load_reference": "interop",
    "save_reference": "interop",
    "Teacher": "teacher",
    "Alignment": "alignment",
    "fit": "training",
    "draw": "sampling",
    "evaluate_run": "study.evaluation",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
