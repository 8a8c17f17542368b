"""Makes `import torchvision` succeed where its compiled part does not load (torch's CPU build).

Importing this module before the first import of timm, torchvision or torch_fidelity is enough. It does nothing
where torchvision is healthy, absent or already imported: the two operators whose absence stops the import get a
schema and no implementation, so calling them still fails loudly.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

# A Library's definitions vanish with the object, so it lives as long as the module.
_library: torch.library.Library | None = None
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def compiled_part_loads(package: Path) -> bool:
    """True when the compiled operators in the torchvision folder `package` load into this process."""
    for library in sorted([*package.glob("_C*.so"), *package.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(str(library))
        except (OSError, ImportError):
            continue
        return True
    return False


def guard() -> bool:
    """Define torchvision's missing schemas if its import would stop without them.

    Returns:
        True when schemas were defined by this call, False when nothing had to be done.
    """
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or compiled_part_loads(Path(spec.origin).parent):
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    return True


guard()
