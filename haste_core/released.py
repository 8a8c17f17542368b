"""Checkpoints in the layout that DiT, SiT, REPA and HASTE release, read and written; nothing in a file is executed.

Such a file is a state dict, or a dict with the state dicts `model` and `ema` beside optimizer state, arguments and
steps. A run's checkpoint of this package is read as well. DiT and SiT's own release have the same names and shapes, so
only the caller can tell them apart.
"""

from __future__ import annotations

import argparse
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.serialization import safe_globals

from haste_core.alignment import projector
from haste_core.checkpoint import fingerprint, under
from haste_core.errors import HasteError, unknown
from haste_core.files import atomic
from haste_core.models import KINDS, SIZES, DiffusionTransformer
from haste_core.models.layers import TimestepEmbedder, sincos_positions

Source = str | Path | Mapping[str, Any]
Weights = Literal["ema", "model"]
Family = Literal["sit", "dit", "mmdit"]
Convention = Literal["auto", "haste", "sit"]
CONVENTIONS = get_args(Convention)
READABLE = (".pt", ".pth", ".safetensors")
WRITABLE = (".pt", ".safetensors")
_scalar: Any = np.float64(0).__reduce__()[0]  # how numpy pickles a number
# What checkpoints keep beside weights: a command line, paths, numbers of numpy. Making them runs no code.
BESIDE_WEIGHTS: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath")),
    *((PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
]  # fmt: skip
_NORM = "blocks.0.attn.q_norm.weight"
_LABELS = "y_embedder.embedding_table.weight"
_LAST = ("final_layer.linear.weight", "final_layer.linear.bias")


class Reference(NamedTuple):
    """A plain generator, and apart from it the projectors it was aligned through (often none)."""

    generator: DiffusionTransformer
    projectors: nn.ModuleList


def load_reference(
    source: Source,
    family: Family | None = None,
    num_heads: int | None = None,
    *,
    weights: Weights | None = None,
    convention: Convention = "auto",
    image_size: int | None = None,
) -> Reference:
    """The generator of a released checkpoint in float32 and eval mode, and its projectors.

    Weights in SiT's own convention (t=1 is data; twice as many outputs as channels, half of them unused) become those
    of a plain `SiT` with v(x, t) = -v_sit(x, 1 - t), exactly.

    Args:
        source: a .pt, .pth or .safetensors file, or what it holds.
        weights: "ema" or "model"; by default "ema" where the file has it.
        family, num_heads, convention, image_size: as for `infer`.

    Raises:
        HasteError: the file cannot be read, would execute code, holds another family, or does not fit.
    """
    tensors, _ = read_weights(source, weights)
    layout = infer(tensors, family, num_heads, convention, image_size)
    return Reference(generator(tensors, layout), projectors(tensors, layout.sizes["width"]))


def begin_from(student: DiffusionTransformer, source: Source, weights: Weights | None = None) -> str:
    """Give a generator the weights of a checkpoint, released or of a run, to train it further.

    Kind and sizes have to agree, apart from classes and image size. The label table is taken over where the numbers of
    classes agree. Otherwise only the null label's row is, which holds what the weights know of images of any class.

    Returns:
        Which weights they are, with a hash of them, and what became of the label table, in words.

    Raises:
        HasteError: as `load_reference`, or the sizes differ.
    """
    tensors, layout, which, labels = _for_student(student, source, weights)
    found, own = generator(tensors, layout).state_dict(), student.state_dict()
    # Positions belong to the image size, not to what was learned.
    taken = own | {name: found[name] for name in own if name in found and name != "pos_embed"}
    if _LABELS in own and len(found[_LABELS]) != len(own[_LABELS]):
        taken[_LABELS] = torch.cat([own[_LABELS][:-1], found[_LABELS][-1:].to(own[_LABELS])])
    student.load_state_dict(taken)
    return f"{which} weights {fingerprint(tensors)}{labels}"


def check_start(student: DiffusionTransformer, source: Source, weights: Weights | None = None) -> str:
    """The words of `begin_from`, or its errors, without reading weights: `student` may be on torch's meta device."""
    _, _, which, labels = _for_student(student, source, weights)
    return f"{which} weights{labels}"


def _for_student(
    student: DiffusionTransformer, source: Source, weights: Weights | None
) -> tuple[dict[str, Tensor], Layout, str, str]:
    """Weights, their layout, which they are, and words on classes that differ; refuses other sizes."""
    tensors, which = read_weights(source, weights)
    family: Any = student.kind
    side = None if "pos_embed" in tensors else student.image_size
    own = infer(student.state_dict(), family, student.heads).sizes
    layout = infer(tensors, family, student.heads, image_size=side)
    names = [n for n in own if n not in ("image_size", "classes") and layout.sizes.get(n) != own[n]]
    if names:
        found, expected = (", ".join(f"{n} {sizes.get(n)}" for n in names) for sizes in (layout.sizes, own))
        raise HasteError(f"the weights have {found}; expected {expected}, as the generator that begins with them")
    labels, known, wanted = "", layout.sizes["classes"], own["classes"]
    if family != "mmdit" and known != wanted:
        labels = f"; they know {known} classes, the data have {wanted}: labels are drawn anew, the null label is kept"
    return tensors, layout, which, labels


def save_reference(
    path: str | Path,
    generator: nn.Module,
    projectors: nn.Module | Iterable[nn.Module] | None = None,
    ema: nn.Module | None = None,
) -> None:
    """Write a generator in the released layout, atomically.

    Args:
        path: .pt holds the state dicts `model` and `ema`; .safetensors one plain state dict, of `ema` where given.
        projectors: one, or several in order; stored with both state dicts, as `projectors.N`.
        ema: the averaged generator. Without it `generator` is stored under both names, for readers of either.

    Raises:
        HasteError: another suffix, or no room.
    """
    if isinstance(projectors, nn.Module) and not isinstance(projectors, nn.ModuleList):
        projectors = [projectors]
    several = enumerate(projectors or ())
    extra = {f"projectors.{i}.{n}": v for i, one in several for n, v in one.state_dict().items()}
    model = _plain(generator.state_dict() | extra)
    _write(Path(path), model, model if ema is None else _plain(ema.state_dict() | extra))


# -- files ------------------------------------------------------------------------------------------------------------


def read_weights(source: Source, weights: Weights | None = None) -> tuple[dict[str, Tensor], str]:
    """A state dict without wrappers' prefixes, and which it is: "ema", "model", or "plain" where there is one."""
    sets = _sets(source if isinstance(source, Mapping) else read(Path(source)))
    first: str = next(iter(sets))
    which = "plain" if first == "plain" else weights or first
    if which not in sets:
        raise HasteError(f"the checkpoint has no {which!r} weights; expected one of: {', '.join(sets)}")
    return _unwrapped(sets[which]), which


def export(content: Mapping[str, Any], path: str | Path) -> None:
    """Write what a checkpoint with both `model` and `ema` holds in the released layout, each under its name."""
    sets = _sets(content)
    _write(Path(path), _plain(sets["model"]), _plain(sets["ema"]))


def is_run(content: Mapping[str, Any]) -> bool:
    """True for what a checkpoint of a run of this package holds: `model.` and `ema.` side by side in one flat dict."""
    prefixes = {name.partition(".")[0] for name in content if isinstance(name, str) and "." in name}
    return {"ema", "model"} <= prefixes


def check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise HasteError where a file's name ends in none of `suffixes`."""
    if path.suffix.lower() not in suffixes:
        raise HasteError(f"{path}: unknown suffix {path.suffix!r}; expected one of: {', '.join(suffixes)}")


def read(path: Path) -> Mapping[str, Any]:
    """Contents of a file, its tensors mapped from it where the format allows, so that unused ones are never read."""
    check_suffix(path, READABLE)
    if not path.is_file():
        raise HasteError(f"no checkpoint {path}; expected a file ending in {', '.join(READABLE)}")
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as stream:
                return {name: stream.get_tensor(name) for name in list(stream.keys())}
        with safe_globals(BESIDE_WEIGHTS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise HasteError(f"checkpoint {path} holds a {type(content).__name__}; expected a dict of weights")
    return content


def _unreadable(path: Path, error: Exception) -> HasteError:
    what = _recognised(path)
    if what:
        return HasteError(f"{path} is {what}")
    # torch wraps the reason in advice on how to load files that one trusts.
    reason = str(error).partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0] or str(error)
    wanted = re.search(r"GLOBAL (\S+)", reason)
    if wanted:
        return HasteError(
            f"checkpoint {path} wants {wanted[1]}, which could run code and is not loaded; expected tensors, numbers, "
            f"strings, paths and argparse.Namespace; where it was written, save its weights alone, such as "
            f"torch.save({{'ema': checkpoint['ema']}}, FILE)"
        )
    first = " ".join(reason.split())[:200] or type(error).__name__
    return HasteError(f"checkpoint {path} is truncated or damaged ({first}); expected a whole one, written anew")


def _recognised(path: Path) -> str:
    """Name of the kind of a file that is no checkpoint of its suffix, and the way out; empty for other files."""
    with path.open("rb") as stream:
        head = stream.read(512)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
    if not head:
        return "empty; download it again"
    if head.startswith(b"\x1f\x8b"):
        return "compressed by gzip; unpack it first"
    by_torch = head.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"))
    length = int.from_bytes(head[:8], "little")
    if path.suffix.lower() == ".safetensors" and by_torch:
        return "a file of torch.save by its content; rename it to end in .pt"
    if path.suffix.lower() != ".safetensors" and head[8:9] == b"{" and length < path.stat().st_size:
        return "a safetensors file by its content; rename it to end in .safetensors"
    if head.lstrip()[:1] in (b"<", b"{") or (head.isascii() and head.decode().isprintable()):
        return "a web page or text, not the file itself: its download was refused or led elsewhere; download it again"
    return ""


def _sets(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The state dicts in a checkpoint: "ema" and "model" or one of them, or else "plain", also under "state_dict"."""
    names = {"ema": ("ema", "ema_state_dict"), "model": ("model", "model_state_dict", "module")}
    nested = {
        kind: content[name] for kind, known in names.items() for name in known if isinstance(content.get(name), Mapping)
    }
    if nested:
        return nested
    if any(isinstance(name, str) and name.startswith(("ema.", "model.")) for name in content):
        # A run of this package: one flat dict, the projector beside the generators.
        content = {name: value for name, value in content.items() if isinstance(name, str)}
        extra = {f"projectors.0.{n}": v for n, v in under(content, "alignment.projector.").items()}
        flat = {name: under(content, f"{name}.") for name in ("ema", "model")}
        return {name: {**found, **extra} for name, found in flat.items() if found}
    inner = content.get("state_dict")
    return _sets(inner) if isinstance(inner, Mapping) else {"plain": content}


def _unwrapped(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict without the prefixes of DistributedDataParallel (module.) and torch.compile (_orig_mod.)."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise HasteError(f"the weights hold {name!r}, a {what}; expected tensors of floats by name")
        short = re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))
        if short in found:
            raise HasteError(f"the weights hold {short!r} twice, under different prefixes; expected once")
        found[short] = value.detach()
    return found


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors on the CPU, each with memory of its own size, so that no file holds more than it shows."""
    own = {}
    for name, value in _unwrapped(tensors).items():
        value = value.cpu().contiguous()
        own[name] = value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
    return own


def _write(path: Path, model: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
    check_suffix(path, WRITABLE)
    with atomic(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            save_file(ema, temporary, metadata={"format": "pt"})
        else:
            # Through a stream, so that a full disk is an OSError.
            with temporary.open("wb") as stream:
                torch.save({"model": model, "ema": ema}, stream)


# -- layouts ----------------------------------------------------------------------------------------------------------


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
        family: what it should be; None asks the weights, which cannot tell DiT from SiT's own release.
        num_heads: needed where neither a q norm nor a published size gives the number of heads.
        convention: "auto" takes SiT's own for a SiT with twice as many outputs as channels.
        image_size: side of the input; needed where `pos_embed` is not stored.

    Raises:
        HasteError: the weights are of another family, or something above is missing or contradicts them.
    """
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, CONVENTIONS)
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4)
    doubled = _shape(tensors, _LAST[0], 2)[0] == 2 * channels * patch * patch
    joint = any(name.startswith("joint_blocks.") for name in tensors)
    found = _family("mmdit" if joint else "dit" if doubled else "sit", family, convention)
    depth = _count(tensors, "joint_blocks" if joint else "blocks")
    sizes: dict[str, Any] = {"channels": channels, "depth": depth, "width": width, "patch": patch}
    sizes["image_size"] = _image_size(tensors, patch, image_size)
    sizes["heads"] = _heads(tensors, found, depth, width, num_heads)
    if joint:
        sizes |= {"classes": 1, "context_width": _shape(tensors, "context_embedder.weight", 2)[1]}
    else:
        classes = _shape(tensors, _LABELS, 2)[0] - 1
        hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0]
        ratio = hidden / width
        if int(width * ratio) != hidden:  # the quotient was rounded down
            ratio = math.nextafter(ratio, math.inf)
        sizes |= {"classes": classes, "mlp_ratio": ratio, "qk_norm": _NORM in tensors}
    doubled = found == "sit" and doubled
    reversed_time = convention == "sit" or (convention == "auto" and doubled)
    return Layout(found, sizes, "sit" if reversed_time else "haste", doubled)


def _shape(tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        have = ", ".join(list(tensors)[:3]) or "nothing"
        raise HasteError(f"these weights have no {name} (they have {have}); expected DiT, SiT, REPA, HASTE or MM-DiT")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise HasteError(f"{name} has shape {shape}; expected {dims} dimensions, none of them 0")
    return shape


def _family(looks: Family, given: Family | None, convention: Convention) -> Family:
    if given is not None and given not in KINDS:
        raise unknown("family", given, KINDS)
    sit_like = looks == "dit" and (given == "sit" or convention == "sit")
    if given is None and looks == "dit" and not sit_like:
        raise HasteError("two outputs per channel: DiT's, or SiT's own release; expected family 'dit' or 'sit'")
    if given not in (None, looks) and not sit_like:
        raise HasteError(f"family {given!r} was asked for, the weights look like family {looks!r}; expected {looks!r}")
    found = given or ("sit" if sit_like else looks)
    if convention == "sit" and found != "sit":
        raise HasteError(f"convention 'sit' with family {found!r}; expected family 'sit', or convention 'auto'")
    return found


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    matches = (re.match(rf"{name}\.(\d{{1,3}})\.", key) for key in tensors)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _image_size(tensors: Mapping[str, Tensor], patch: int, given: int | None) -> int:
    if given is None and "pos_embed" in tensors:
        return math.isqrt(_shape(tensors, "pos_embed", 3)[1]) * patch
    if given is None or given < patch or given % patch:
        raise HasteError(f"image_size {given}; expected a multiple of {patch}, or weights with pos_embed")
    return given


def _heads(tensors: Mapping[str, Tensor], family: Family, depth: int, width: int, given: int | None) -> int:
    if _NORM in tensors:
        found = width // _shape(tensors, _NORM, 1)[0]
    elif family == "mmdit":
        found = depth if width == 32 * depth else 0
    else:
        found = {sizes[:2]: sizes[2] for sizes in SIZES.values()}.get((depth, width), 0)
    heads = found if given is None else given
    if heads < 1 or width % heads:
        raise HasteError(
            f"num_heads {given}, depth {depth} and width {width}; the number of heads is in the weights only with a "
            f"q norm, and known of published sizes; expected num_heads (--heads), a divisor of {width}"
        )
    return heads


# -- modules ----------------------------------------------------------------------------------------------------------


def generator(tensors: Mapping[str, Tensor], layout: Layout) -> DiffusionTransformer:
    """A generator in float32 and eval mode with copies of the weights in this package's convention."""
    with torch.device("meta"):
        made = KINDS[layout.family](**layout.sizes)
    weights = {name: value for name, value in tensors.items() if not name.startswith("projectors.")}
    weights.setdefault("pos_embed", sincos_positions(layout.sizes["width"], made.grid[0])[None])
    for name in _LAST if layout.doubled else ():
        if name in weights and weights[name].shape[:1] == (2 * len(made.get_parameter(name)),):
            # Rows unfold as (row, column, channel): the first half of each patch position stays.
            weights[name] = weights[name].unflatten(0, (layout.sizes["patch"] ** 2, 2, -1))[:, 0].flatten(0, 1)
    _load(made, weights, f"these weights of family {layout.family!r}")
    with torch.random.fork_rng(devices=[]):
        made.t_embedder.frequencies = TimestepEmbedder(1).frequencies  # no checkpoint stores them
    if layout.convention == "sit":
        _reverse_time(made)
    return made.eval()


def projectors(tensors: Mapping[str, Tensor], width: int) -> nn.ModuleList:
    """The projectors that were stored with a generator of this width, float32 and in eval mode; often none."""
    own, made = under(tensors, "projectors."), nn.ModuleList()
    for i in range(_count(tensors, "projectors") if own else 0):
        hidden, teacher_width = (_shape(tensors, f"projectors.{i}.{n}.weight", 2)[0] for n in (0, 4))
        with torch.device("meta"):
            made.append(projector(width, hidden, teacher_width, seed=0))
    _load(made, own, "its projectors")
    return made.eval()


def _load(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    odd = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if odd:
        raise HasteError(
            f"{what}: {odd[0]} and {len(odd) - 1} more hold values that are not finite; expected sound ones"
        )
    # Copies, for tensors of a file that is mapped into memory would change with it.
    own = {name: value.to("cpu", torch.float32, copy=True).contiguous() for name, value in weights.items()}
    try:
        module.load_state_dict(own, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())
        raise HasteError(f"{what} do not fit: {reason[:400]}; expected those of released checkpoints") from error


@torch.no_grad()
def _reverse_time(made: DiffusionTransformer) -> None:
    """Turn v(x, 1 - t) into -v: the last layer changes sign, the time embedding takes up t -> 1 - t.

    cos((1 - t) f) = cos f cos tf + sin f sin tf and sin((1 - t) f) = sin f cos tf - cos f sin tf.
    """
    for name in _LAST:
        made.get_parameter(name).neg_()
    weight, f = made.get_parameter("t_embedder.mlp.0.weight"), made.t_embedder.frequencies.double()
    cosines, sines = weight.double().chunk(2, dim=1)
    of_cosines, of_sines = cosines * f.cos() + sines * f.sin(), cosines * f.sin() - sines * f.cos()
    weight.copy_(torch.cat([of_cosines, of_sines], dim=1))
