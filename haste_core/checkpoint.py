"""Checkpoints: one safetensors file each, written atomically, read without executing anything, and complete.

`capture` takes everything that resuming to the bit needs off a `Trainer`, `restore` puts it back. Tensors carry dotted
prefixes (model., ema., optimizer., alignment., angle., data., window., noise., random.); step, phase and hashes are
JSON in the file's metadata.
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

from haste_core.errors import HasteError
from haste_core.files import atomic
from haste_core.training import Trainer

FORMAT = 1


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-like state to `path` atomically."""
    # safetensors refuses tensors that share memory.
    owned = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    with atomic(path) as temporary:
        save_file(owned, temporary, metadata={"state": json.dumps({"format": FORMAT, **state}, sort_keys=True)})


def load(path: Path, prefixes: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of the checkpoint `path`.

    prefixes: read only tensors whose name starts with one of these; None reads all.

    Raises:
        HasteError: the file is missing, truncated, damaged or of another format.
    """
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*.safetensors"))
        raise HasteError(f"no checkpoint {path}; expected one of: {', '.join(others) or 'none, train first'}")
    try:
        with safe_open(path, framework="pt") as stream:
            state = json.loads((stream.metadata() or {})["state"])
            names = [n for n in list(stream.keys()) if prefixes is None or n.startswith(prefixes)]
            tensors = {name: stream.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise HasteError(
            f"checkpoint {path} is truncated or damaged ({' '.join(str(error).split())}); delete it, and "
            f"training goes on from the one before"
        ) from error
    if state.get("format") != FORMAT:
        raise HasteError(f"checkpoint {path} has format {state.get('format')}; expected {FORMAT}")
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
    for name, parameter in module.named_parameters():
        state = under(tensors, f"{name}.")
        if state:
            # Only the fused kernel counts its steps on the device.
            places = {"step": parameter.device if inner.defaults.get("fused") else "cpu"}
            inner.state[parameter] = {k: v.clone().to(places.get(k, parameter.device)) for k, v in state.items()}


def capture(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything `restore` needs: tensors by dotted name, and a JSON-like rest.

    After `Trainer.gather` it is the same in all processes, and does not depend on their number.
    """
    model, haste, optimizer = trainer.generator, trainer.haste, trainer.optimizer
    parts: dict[str, Mapping[str, Tensor]] = {
        "model.": model.state_dict(),
        "ema.": trainer.ema.state_dict(),
        "optimizer.": optimizer_tensors(optimizer, model),
        "data.": trainer.batches.state_dict(),
        "window.": trainer.window,
        "noise.": {"generator": trainer.noise.get_state()},
        "random.": {"cpu": torch.get_rng_state()},
    }
    if haste is not None and haste.projector is not None:
        parts["alignment.projector."] = haste.projector.state_dict()
        parts["alignment.optimizer."] = optimizer_tensors(optimizer, haste.projector)
    if haste is not None and haste.angle is not None:
        parts["angle."] = haste.angle.state_dict()
    tensors = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    scaler = trainer.accelerator.scaler
    rest = {
        "step": trainer.step,
        "termination": trainer.switch.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "ema_fingerprint": fingerprint(parts["ema."]),
    }
    return tensors, rest


def restore(trainer: Trainer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Bring a new trainer to exactly the state that `capture` saved."""
    model = trainer.generator
    model.load_state_dict(under(tensors, "model."))
    trainer.ema.load_state_dict(under(tensors, "ema."))
    load_optimizer(trainer.optimizer, model, under(tensors, "optimizer."))
    trainer.switch.load_state_dict(dict(rest["termination"]))
    trainer.switch.update(rest["step"])
    haste = trainer.haste
    if trainer.switch.phase == 2:
        trainer.enter_phase_two()
    elif haste is not None and haste.projector is not None:
        haste.projector.load_state_dict(under(tensors, "alignment.projector."))
        load_optimizer(trainer.optimizer, haste.projector, under(tensors, "alignment.optimizer."))
    if trainer.haste is not None and trainer.haste.angle is not None and "angle.sums" in tensors:
        trainer.haste.angle.load_state_dict(under(tensors, "angle."))
    trainer.batches.load_state_dict(under(tensors, "data."))
    trainer.window = {k: v.to(trainer.accelerator.device) for k, v in under(tensors, "window.").items()}
    trainer.noise.set_state(tensors["noise.generator"])
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    if rest["scaler"] is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(rest["scaler"])
    trainer.step = rest["step"]
