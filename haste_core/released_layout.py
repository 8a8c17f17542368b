"""The parameter layouts of released DiT, SiT, REPA, HASTE and MM-DiT weights: their sizes, and generators made of them.

State dicts here are plain: tensors of floats, their names without a wrapper's prefix. DiT and SiT's own release have
the same names and shapes, so only the caller can tell them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haste_core.errors import HasteError, unknown
from haste_core.models import KINDS, SIZES, DiffusionTransformer
from haste_core.models.layers import TimestepEmbedder, sincos_positions

Family = Literal["sit", "dit", "mmdit"]
Convention = Literal["auto", "haste", "sit"]
CONVENTIONS = ("auto", "haste", "sit")
_NORM = "blocks.0.attn.q_norm.weight"
_LAST = ("final_layer.linear.weight", "final_layer.linear.bias")
_PUBLISHED = {(depth, width): heads for depth, width, heads in SIZES.values()}


@dataclass(frozen=True)
class Layout:
    """Contents of a state dict.

    family: the kind of generator. sizes: the arguments that build it. convention: "haste" where t=0 is data, "sit"
    where t=1 is and the velocity points to it. doubled: half of the last layer's outputs are unused, as in SiT's own.
    """

    family: Family
    sizes: dict[str, Any]
    convention: Literal["haste", "sit"]
    doubled: bool


def infer(
    tensors: Mapping[str, Tensor],
    family: Family | None = None,
    num_heads: int | None = None,
    convention: Convention = "auto",
    image_size: int | None = None,
) -> Layout:
    """The layout of a plain state dict, from its names and shapes.

    Args:
        tensors: the state dict.
        family: what it should be; None asks the weights, which cannot tell DiT from SiT's own release.
        num_heads: needed where neither a q norm nor a published size gives the number of heads.
        convention: "auto" takes SiT's own for a SiT with twice as many outputs as channels.
        image_size: side of the input; needed where `pos_embed` is not stored.

    Raises:
        HasteError: the weights are of another family, or something above is missing or contradicts them.
    """
    if family is not None and family not in KINDS:
        raise unknown("family", family, KINDS)
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, CONVENTIONS)
    joint = any(name.startswith("joint_blocks.") for name in tensors)
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4)
    multiple = _outputs(tensors, channels, patch)
    found = _family("mmdit" if joint else "sit" if multiple == 1 else "dit", family, convention)
    if convention == "sit" and found != "sit":
        raise HasteError(f"convention 'sit' with family {found!r}; expected family 'sit', or convention 'auto'")
    depth = _count(tensors, "joint_blocks" if joint else "blocks")
    sizes = {"channels": channels, "depth": depth, "width": width, "patch": patch}
    sizes["image_size"] = _image_size(tensors, patch, image_size)
    sizes["heads"] = _heads(tensors, found, depth, width, num_heads)
    if joint:
        sizes |= {"classes": 1, "context_width": _shape(tensors, "context_embedder.weight", 2)[1]}
    else:
        sizes |= _class_sizes(tensors, width)
    doubled = found == "sit" and multiple == 2
    reversed_time = convention == "sit" or (convention == "auto" and doubled)
    return Layout(found, sizes, "sit" if reversed_time else "haste", doubled)


def generator(tensors: Mapping[str, Tensor], layout: Layout) -> DiffusionTransformer:
    """A generator in float32 and eval mode with copies of the weights in this package's convention.

    Raises:
        HasteError: names are missing or unknown, or shapes differ.
    """
    with torch.device("meta"):
        made = KINDS[layout.family](**layout.sizes)
    expected = made.state_dict()
    weights = {name: value for name, value in tensors.items() if not name.startswith("projectors.")}
    weights.setdefault("pos_embed", sincos_positions(layout.sizes["width"], made.grid[0])[None])
    for name in _LAST if layout.doubled else ():
        if name in weights and weights[name].shape[:1] == (2 * len(expected[name]),):
            # Rows unfold as (row, column, channel): the first half of each patch position stays.
            weights[name] = weights[name].unflatten(0, (layout.sizes["patch"] ** 2, 2, -1))[:, 0].flatten(0, 1)
    check_fit(f"these weights of family {layout.family!r}", expected, weights)
    weights = _copies(weights)
    frequencies = _frequencies()
    if layout.convention == "sit":
        _reverse_time(weights, frequencies)
    made.load_state_dict(weights, assign=True)
    made.t_embedder.frequencies = frequencies
    return made.eval()


def projectors(tensors: Mapping[str, Tensor], width: int) -> nn.ModuleList:
    """The projectors that were stored with a generator of this width, float32 and in eval mode; often none.

    Raises:
        HasteError: a projector is not three linear layers from this width.
    """
    own = {n.removeprefix("projectors."): v for n, v in tensors.items() if n.startswith("projectors.")}
    made = nn.ModuleList()
    if not own:
        return made.eval()
    # The teacher's libraries come with it, which a generator alone does not need.
    from haste_core.alignment import projector

    for i in range(_count(tensors, "projectors")):
        hidden, _ = _shape(tensors, f"projectors.{i}.0.weight", 2)
        teacher_width, _ = _shape(tensors, f"projectors.{i}.4.weight", 2)
        with torch.device("meta"):
            made.append(projector(width, hidden, teacher_width, seed=0))
    check_fit("its projectors", made.state_dict(), own)
    made.load_state_dict(_copies(own), assign=True)
    return made.eval()


def check_fit(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise HasteError where names or shapes of two state dicts differ, naming some of them."""
    both = {name: (tuple(found[name].shape), tuple(expected[name].shape)) for name in expected if name in found}
    wrong = [f"{name} {shape} instead of {right}" for name, (shape, right) in both.items() if shape != right]
    parts = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": wrong,
    }
    said = [f"{label}: {_some(names)}" for label, names in parts.items() if names]
    if said:
        raise HasteError(f"{what} do not fit: {'; '.join(said)}; expected the names of the released checkpoints")


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A copy even where nothing is converted: tensors of a file that is mapped into memory would change with it.
    return {name: value.to("cpu", torch.float32, copy=True).contiguous() for name, value in tensors.items()}


def _some(names: Collection[str], shown: int = 3) -> str:
    first = ", ".join(list(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def _shape(tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        have = _some(tensors.keys()) or "nothing"
        raise HasteError(f"these weights have no {name} (they have {have}); expected DiT, SiT, REPA, HASTE or MM-DiT")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise HasteError(f"{name} has shape {shape}; expected {dims} dimensions, none of them 0")
    return shape


def _outputs(tensors: Mapping[str, Tensor], channels: int, patch: int) -> int:
    """Number of outputs of the last layer per channel: 1 or 2."""
    rows, once = _shape(tensors, "final_layer.linear.weight", 2)[0], channels * patch * patch
    if rows not in (once, 2 * once):
        raise HasteError(
            f"final_layer.linear.weight has {rows} rows for {channels} channels and patch {patch}; expected {once} "
            f"(velocity) or {2 * once} (noise and variance, or SiT's own release)"
        )
    return rows // once


def _family(looks: Family, given: Family | None, convention: Convention) -> Family:
    sit_like = looks == "dit" and (given == "sit" or convention == "sit")
    if given is None and looks == "dit" and not sit_like:
        raise HasteError("two outputs per channel: DiT's, or SiT's own release; expected family 'dit' or 'sit'")
    if given not in (None, looks) and not sit_like:
        raise HasteError(f"family {given!r} was asked for, the weights look like family {looks!r}; expected {looks!r}")
    return given or ("sit" if sit_like else looks)


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    """Number of numbered modules in a list."""
    matches = (re.match(rf"{name}\.(\d{{1,6}})\.", key) for key in tensors)
    indices = {int(match[1]) for match in matches if match}
    if not indices or max(indices) != len(indices) - 1:
        raise HasteError(f"{name} has the numbers {_some([str(i) for i in sorted(indices)]) or 'none'}; expected 0 on")
    return len(indices)


def _image_size(tensors: Mapping[str, Tensor], patch: int, given: int | None) -> int:
    if "pos_embed" not in tensors:
        if given is None or given < patch or given % patch:
            raise HasteError(f"these weights have no pos_embed, image_size is {given}; expected multiples of {patch}")
        return given
    tokens = _shape(tensors, "pos_embed", 3)[1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise HasteError(f"pos_embed has {tokens} positions; expected a square number")
    side = math.isqrt(tokens) * patch
    if given not in (None, side):
        raise HasteError(f"image_size {given} contradicts pos_embed, which is for {side}; expected {side}")
    return side


def _heads(tensors: Mapping[str, Tensor], family: Family, depth: int, width: int, given: int | None) -> int:
    if given is not None and (given < 1 or width % given):
        raise HasteError(f"num_heads {given} does not divide width {width}; expected a divisor of {width}")
    if _NORM in tensors:
        head_width = _shape(tensors, _NORM, 1)[0]
        if width % head_width:
            raise HasteError(f"{_NORM} has {head_width} values; expected a divisor of width {width}")
        if given not in (None, width // head_width):
            raise HasteError(
                f"num_heads {given} contradicts {_NORM} with {head_width} values; expected {width // head_width}"
            )
        return width // head_width
    found = _PUBLISHED.get((depth, width)) if family != "mmdit" else depth if width == 32 * depth else None
    heads = given or found
    if heads is None:
        raise HasteError(
            f"the number of heads is not in the weights, and depth {depth} with width {width} is no published size; "
            f"expected num_heads (--heads), a divisor of {width}"
        )
    return heads


def _class_sizes(tensors: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    rows = _shape(tensors, "y_embedder.embedding_table.weight", 2)[0]
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0]
    ratio = hidden / width
    if int(width * ratio) != hidden:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return {"classes": rows - 1, "mlp_ratio": ratio, "qk_norm": _NORM in tensors}


def _frequencies() -> Tensor:
    """The time embedding's frequencies, which no checkpoint stores, (128,) float32."""
    with torch.random.fork_rng(devices=[]):
        return TimestepEmbedder(1).frequencies


def _reverse_time(weights: dict[str, Tensor], frequencies: Tensor) -> None:
    """Turn v(x, 1 - t) into -v: the last layer changes sign, the time embedding takes up t -> 1 - t.

    cos((1 - t) f) = cos f cos tf + sin f sin tf and sin((1 - t) f) = sin f cos tf - cos f sin tf.
    """
    for name in _LAST:
        weights[name] = -weights[name]
    name, f = "t_embedder.mlp.0.weight", frequencies.double()
    cosines, sines = weights[name].double().chunk(2, dim=1)
    of_cosines, of_sines = cosines * f.cos() + sines * f.sin(), cosines * f.sin() - sines * f.cos()
    weights[name] = torch.cat([of_cosines, of_sines], dim=1).float()
