"""HASTE (arXiv 2505.16792): when representation alignment helps a diffusion transformer, and when it stops helping.

The method is here: generators, frozen teacher, alignment losses, `HASTE` for any training loop, two-phase training,
samplers. `haste_core.study` is the study around it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from haste_core import _torchvision_guard  # noqa: F401  (it acts when torchvision is imported)

if TYPE_CHECKING:
    from haste_core.alignment import attention_loss, feature_loss
    from haste_core.errors import HasteError
    from haste_core.haste import HASTE
    from haste_core.models import DiT, MMDiT, SiT
    from haste_core.released import load_reference, save_reference
    from haste_core.sampling import Sampler, draw
    from haste_core.taps import Taps, tap, tapped
    from haste_core.teacher import Teacher
    from haste_core.termination import Angle, FixedIteration, Never, Plateau, Switch, make_trigger
    from haste_core.training import Optimization, Trainer

__version__ = "0.1.0"

__all__ = [
    "HASTE", "Angle", "DiT", "FixedIteration", "HasteError", "MMDiT", "Never", "Optimization", "Plateau", "Sampler",
    "SiT", "Switch", "Taps", "Teacher", "Trainer", "__version__", "attention_loss", "draw", "feature_loss",
    "load_reference", "make_trigger", "save_reference", "tap", "tapped",
]  # fmt: skip

# The modules that the names come from.
_HOMES = {
    "alignment": ("attention_loss", "feature_loss"), "errors": ("HasteError",), "haste": ("HASTE",),
    "models": ("DiT", "MMDiT", "SiT"), "released": ("load_reference", "save_reference"),
    "sampling": ("Sampler", "draw"), "taps": ("Taps", "tap", "tapped"), "teacher": ("Teacher",),
    "termination": ("Angle", "FixedIteration", "Never", "Plateau", "Switch", "make_trigger"),
    "training": ("Optimization", "Trainer"),
}  # fmt: skip


if not TYPE_CHECKING:  # editors and type checkers see the imports above, and that other names do not exist

    def __getattr__(name: str) -> Any:
        """The name's object, imported at its first use: timm takes seconds, and most commands do without."""
        for module, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"haste_core.{module}"), name)
        raise AttributeError(f"module 'haste_core' has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Public names, for completion in a notebook."""
        return __all__
