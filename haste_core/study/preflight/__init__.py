"""What a run needs and takes, found without training, GPU or download: `haste train STUDY ARM --dry-run`.

Names are imported on first use: one of the modules alone does not cost the imports of all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haste_core.study.preflight.readiness import Preflight, check, show

__all__ = ["Preflight", "check", "show"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.readiness"), name)
