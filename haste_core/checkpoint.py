"""Checkpoints: one safetensors file each, written atomically and read without executing anything.

Tensors carry dotted prefixes (model., ema., optimizer., alignment., data., noise., random.); everything that is
not a tensor (step, phase, hashes) is JSON in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from haste_core import sharding
from haste_core.errors import HasteError
from haste_core.files import atomic

FORMAT = 1


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-like state to `path`, whole or not at all.

    Raises:
        HasteError: there is no room.
    """
    # safetensors refuses tensors that share memory; a checkpoint owns all of its own.
    owned = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    with atomic(path) as temporary:
        save_file(owned, temporary, metadata={"state": json.dumps({"format": FORMAT, **state}, sort_keys=True)})


def load(path: Path, prefixes: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of the checkpoint `path`.

    Args:
        path: the file.
        prefixes: read only tensors whose name starts with one of these; None reads all.

    Raises:
        HasteError: the file is missing, truncated, damaged or of another format.
    """
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
        raise HasteError(f"no checkpoint {path}; possible: {', '.join(others) or 'none, train first'}")
    try:
        with safe_open(path, framework="pt") as stream:
            state = json.loads((stream.metadata() or {})["state"])
            stored = list(stream.keys())
            names = [n for n in stored if prefixes is None or n.startswith(prefixes)]
            tensors = {name: stream.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise HasteError(
            f"checkpoint {path} is truncated or damaged ({' '.join(str(error).split())}); possible: delete it, and "
            f"training goes on from the one before"
        ) from error
    if state.get("format") != FORMAT:
        raise HasteError(f"checkpoint {path} has format {state.get('format')}; possible: {FORMAT}")
    return tensors, state


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over names, types, shapes and contents of tensors."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def optimizer_tensors(optimizer: Any, module: nn.Module) -> dict[str, Tensor]:
    """AdamW's state by parameter name: <name>.step, <name>.exp_avg, <name>.exp_avg_sq."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        f"{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in inner.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: Any, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give AdamW the state that `optimizer_tensors` took."""
    inner = getattr(optimizer, "optimizer", optimizer)
    fused = inner.defaults.get("fused")
    for name, parameter in module.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
        if keys:
            # Only the fused kernel counts its steps on the device.
            places = {key: parameter.device if key != "step" or fused else "cpu" for key in keys}
            found = {key: tensors[f"{name}.{key}"] for key in keys}
            parts = {key: value if key == "step" else sharding.part(value, parameter) for key, value in found.items()}
            inner.state[parameter] = {key: value.clone().to(places[key]) for key, value in parts.items()}
