"""Checkpoints in the layout that DiT, SiT, REPA and HASTE release, read and written; nothing in a file is executed.

Such a file is a state dict, or a dict with the state dicts `model` and `ema` beside optimizer state, arguments and
steps. A run's checkpoint of this package is read as well. What the names mean is in `haste_core.released_layout`.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.serialization import safe_globals

from haste_core import released_layout
from haste_core.checkpoint import under
from haste_core.errors import HasteError, unknown
from haste_core.files import atomic
from haste_core.models import DiffusionTransformer
from haste_core.released_layout import Convention, Family

Source = str | Path | Mapping[str, Any]
Weights = Literal["ema", "model"]
READABLE = (".pt", ".pth", ".safetensors")
WRITABLE = (".pt", ".safetensors")


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
        family: "sit", "dit" or "mmdit"; None asks the weights, which cannot tell DiT from SiT's own release.
        num_heads: needed where neither a q norm nor a published size gives the number of heads.
        weights: "ema" or "model"; by default "ema" where the file has it.
        convention: "auto", "haste" or "sit". image_size: needed where positions are not stored.

    Raises:
        HasteError: the file cannot be read, wants code to run, holds another family, or does not fit.
    """
    tensors, _ = read_weights(source, weights)
    layout = released_layout.infer(tensors, family, num_heads, convention, image_size)
    return Reference(
        released_layout.generator(tensors, layout), released_layout.projectors(tensors, layout.sizes["width"])
    )


def read_weights(source: Source, weights: Weights | None = None) -> tuple[dict[str, Tensor], str]:
    """A state dict without wrappers' prefixes, and which it is: "ema", "model", or "plain" where a file has just one.

    Tensors keep their type and may be mapped from the file. Raises HasteError as `load_reference` does.
    """
    if weights not in (None, "ema", "model"):
        raise unknown("weights", weights, ("ema", "model"))
    sets = _sets(source if isinstance(source, Mapping) else read(Path(source)))
    first: str = next(iter(sets))
    which = "plain" if first == "plain" else weights or first
    if which not in sets:
        raise HasteError(f"the checkpoint has no {which!r} weights; expected one of: {', '.join(sets)}")
    return _unwrapped(sets[which]), which


def save_reference(
    path: str | Path,
    generator: nn.Module,
    projectors: nn.Module | Iterable[nn.Module] | None = None,
    ema: nn.Module | None = None,
) -> None:
    """Write a generator in the released layout, whole or not at all.

    Args:
        path: .pt holds the state dicts `model` and `ema`; .safetensors one plain state dict, of `ema` where given.
        generator: its names are those of the released checkpoints already.
        projectors: one, or several in order; stored with both state dicts, as `projectors.N`.
        ema: the averaged generator. Without it `generator` is stored under both names, for readers of either.

    Raises:
        HasteError: another suffix, or no room.
    """
    if isinstance(projectors, nn.Module) and not isinstance(projectors, nn.ModuleList):
        projectors = [projectors]
    several = list(projectors) if projectors is not None else []
    extra = {f"projectors.{i}.{n}": v for i, one in enumerate(several) for n, v in one.state_dict().items()}
    model = _plain(generator.state_dict() | extra)
    _write(Path(path), model, model if ema is None else _plain(ema.state_dict() | extra))


def export(content: Mapping[str, Any], path: str | Path) -> None:
    """Write what a checkpoint with both `model` and `ema` holds in the released layout, each under its name."""
    sets = _sets(content)
    _write(Path(path), _plain(sets["model"]), _plain(sets["ema"]))


def is_run(content: Mapping[str, Any]) -> bool:
    """True for what a checkpoint of a run of this package holds: `model.` and `ema.` side by side in one flat dict."""
    prefixes = {name.partition(".")[0] for name in content if isinstance(name, str) and "." in name}
    return {"ema", "model"} <= prefixes


def check_suffix(path: Path, possible: tuple[str, ...]) -> None:
    """Raise HasteError where a file's name ends in none of `possible`."""
    if path.suffix.lower() not in possible:
        raise HasteError(f"{path}: unknown suffix {path.suffix!r}; expected one of: {', '.join(possible)}")


def read(path: Path) -> Mapping[str, Any]:
    """Contents of a file, its tensors mapped from it where the format allows, so that unused ones are never read.

    Raises:
        HasteError: the file is missing or damaged, or wants code to run.
    """
    check_suffix(path, READABLE)
    if not path.is_file():
        raise HasteError(f"no checkpoint {path}; expected a file ending in {', '.join(READABLE)}")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    try:
        # Released REPA and HASTE checkpoints keep their command line, a Namespace of plain values.
        with safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise HasteError(f"checkpoint {path} holds a {type(content).__name__}; expected a dict of weights")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in list(stream.keys())}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> HasteError:
    # torch wraps the reason in advice on how to load files that one trusts.
    reason = str(error).partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0] or str(error)
    wanted = re.search(r"GLOBAL (\S+)", reason)
    if wanted:
        return HasteError(
            f"checkpoint {path} wants {wanted[1]}, which could run code and is not loaded; expected tensors, numbers, "
            f"strings and argparse.Namespace"
        )
    first = " ".join(reason.split())[:200] or type(error).__name__
    return HasteError(f"checkpoint {path} is truncated or damaged ({first}); expected a whole one, written anew")


def _sets(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The state dicts in a checkpoint: "ema" and "model" or one of them, or else "plain"."""
    nested = {name: content[name] for name in ("ema", "model") if isinstance(content.get(name), Mapping)}
    if nested:
        return nested
    if any(isinstance(name, str) and name.startswith(("ema.", "model.")) for name in content):
        # A run of this package: one flat dict, the projector beside the generators.
        content = {name: value for name, value in content.items() if isinstance(name, str)}
        projector = {f"projectors.0.{n}": v for n, v in under(content, "alignment.projector.").items()}
        flat = {name: under(content, f"{name}.") for name in ("ema", "model")}
        return {name: {**found, **projector} for name, found in flat.items() if found}
    return {"plain": content}


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
