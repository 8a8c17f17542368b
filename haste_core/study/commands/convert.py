"""haste convert: take a checkpoint of DiT, SiT, REPA, HASTE or of a run to the released layout, or to safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from haste_core.errors import HasteError

if TYPE_CHECKING:
    from haste_core.released import Reference
    from haste_core.released_layout import Layout

_DESCRIPTION = """Convert a checkpoint, executing nothing from it, and say what it holds.

SOURCE is a checkpoint of DiT, SiT, REPA or HASTE (.pt, .pth, .safetensors), or one of a run of this package
(runs/<study>/<arm>-<hash>/seed<k>/checkpoints/step_<n>.safetensors). OUT holds plain tensors in float32 and this
package's convention (t=0 is data): a .pt in the released layout, {"model": ..., "ema": ...}, or a .safetensors with
one state dict. Projectors are kept."""
_EXAMPLES = """examples:
  haste convert SiT-XL-2-256x256.pt sit.safetensors --family sit     SiT's own release
  haste convert DiT-XL-2-256x256.pt dit.safetensors --family dit
  haste convert 0400000.pt haste.safetensors                         REPA or HASTE, its averaged weights
  haste convert runs/digits/haste-<hash>/seed0/checkpoints/step_00002000.safetensors haste.pt
"""


def add(commands: Any) -> None:
    """Add the sub-parser."""
    sub = commands.add_parser(
        "convert", help="convert a checkpoint of DiT, SiT, REPA, HASTE or of a run, and say what it holds",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sub.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint to read")
    sub.add_argument("out", type=Path, metavar="OUT", help="the file to write, ending in .pt or .safetensors")
    sub.add_argument("--family", choices=("sit", "dit", "mmdit"),
                     help="what SOURCE is; needed where DiT and SiT's own release look the same")  # fmt: skip
    sub.add_argument("--heads", type=int, metavar="N", help="attention heads, where SOURCE does not give them away")
    sub.add_argument("--weights", choices=("ema", "model"),
                     help="which weights (default: ema where there are any; both, from a run to a .pt)")  # fmt: skip
    sub.add_argument("--convention", choices=("auto", "haste", "sit"), default="auto",
                     help="where SOURCE has data: haste t=0, sit t=1 (default: %(default)s)")  # fmt: skip
    sub.add_argument("--image-size", type=int, metavar="N",
                     help="side of what is modelled, where SOURCE does not hold positions")  # fmt: skip
    sub.set_defaults(action=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert, and print one line."""
    from haste_core import released, released_layout

    source, out = arguments.source, arguments.out
    released.check_suffix(out, released.WRITABLE)
    if out.exists() and source.exists() and out.samefile(source):
        raise HasteError(f"{out} is the source itself; possible: another name")
    if out.is_dir():
        raise HasteError(f"{out} is a folder; possible: a name ending in {' or '.join(released.WRITABLE)}")
    content = released.read(source)
    tensors, which = released.read_weights(content, arguments.weights)
    family, heads = _known(source, arguments)
    layout = released_layout.infer(tensors, family, heads, arguments.convention, arguments.image_size)
    reference = released.Reference(
        released_layout.generator(tensors, layout), released_layout.projectors(tensors, layout.sizes["width"])
    )
    plain = layout.convention == "haste" and not layout.doubled
    if plain and released.is_run(content) and arguments.weights is None and out.suffix.lower() == ".pt":
        which = "ema and model"
        released.export(content, out)
    else:
        released.save_reference(out, *reference)
    print(f"{out}: {describe(reference, layout)}, weights {which}")


def describe(reference: Reference, layout: Layout) -> str:
    """One line on a generator: family, sizes, parameters in millions, projectors and the source's convention."""
    sizes, millions = layout.sizes, sum(p.numel() for p in reference.generator.parameters()) / 1e6
    side, text = sizes["image_size"], f"{sizes['classes']} classes"
    if layout.family == "mmdit":
        text = f"text width {sizes['context_width']}"
    norm = ", q/k norm" if sizes.get("qk_norm") else ""
    shapes = ["-".join(str(n) for n in _widths(one)) for one in reference.projectors]
    return (
        f"{layout.family}, depth {sizes['depth']}, width {sizes['width']}, heads {sizes['heads']}, patch "
        f"{sizes['patch']}{norm}, {sizes['channels']}x{side}x{side}, {text}, {millions:.2f} M parameters, projectors "
        f"{', '.join(shapes) or 'none'}, convention {layout.convention}"
    )


def _widths(projector: Any) -> list[int]:
    linear = [m for m in projector if hasattr(m, "out_features")]
    return [linear[0].in_features, *(m.out_features for m in linear)]


def _known(source: Path, arguments: argparse.Namespace) -> tuple[Any, int | None]:
    """Family and heads: those given, or for a run's checkpoint those in the configuration beside it."""
    described = source.resolve().parent.parent / "config.yaml"
    if source.parent.name != "checkpoints" or not described.is_file():
        return arguments.family, arguments.heads
    try:
        model = yaml.safe_load(described.read_text())["model"]
        kind, heads = str(model["kind"]), int(model["heads"])
    except (yaml.YAMLError, OSError, KeyError, TypeError, ValueError) as error:
        raise HasteError(f"{described} is no run's configuration ({type(error).__name__})") from error
    for name, given, found in (("--family", arguments.family, kind), ("--heads", arguments.heads, heads)):
        if given not in (None, found):
            raise HasteError(f"{name} {given} contradicts {described}; possible: {found}")
    return kind, heads
