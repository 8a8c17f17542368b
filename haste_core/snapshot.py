"""What a checkpoint holds of a training run: everything that going on from it needs, taken and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from haste_core import checkpoint, sharding
from haste_core.state import TrainState


def capture(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything `restore` needs: tensors by dotted name, and a JSON-like rest.

    The same in all processes after `TrainState.gather`; nothing in it depends on their number. Where weights are
    divided all processes call this together, and the main one alone has all of it.
    """
    tensors: dict[str, Tensor] = {}
    model, main = state.accelerator.unwrap_model(state.model), state.processes.is_main
    _put(tensors, "model.", model.state_dict())
    _put(tensors, "ema.", state.ema.state_dict())
    _put(tensors, "optimizer.", checkpoint.optimizer_tensors(state.optimizer, model))
    if state.alignment is not None and state.alignment.projector is not None:
        projector = state.accelerator.unwrap_model(state.alignment.projector)
        _put(tensors, "alignment.projector.", projector.state_dict())
        assert state.alignment_optimizer is not None
        _put(tensors, "alignment.optimizer.", checkpoint.optimizer_tensors(state.alignment_optimizer, projector))
    tensors = sharding.whole(tensors, keep=main)
    if state.angle is not None:
        _put(tensors, "angle.", state.angle.state_dict())
    _put(tensors, "data.", state.batches.state_dict())
    _put(tensors, "window.", state.window)
    tensors["noise.generator"] = state.noise.get_state()
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    scaler = state.accelerator.scaler
    rest = {
        "step": state.step,
        "seed": state.seed,
        "lineage": state.config.lineage,
        "run": state.config.hash,
        "termination": state.termination.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "ema_fingerprint": checkpoint.fingerprint(checkpoint.under(tensors, "ema.")) if main else None,
    }
    return tensors, rest


def restore(state: TrainState, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Bring a freshly created run to exactly where `capture` saw it."""
    model = state.accelerator.unwrap_model(state.model)
    sharding.load(model, checkpoint.under(tensors, "model."))
    sharding.load(state.ema, checkpoint.under(tensors, "ema."))
    checkpoint.load_optimizer(state.optimizer, model, checkpoint.under(tensors, "optimizer."))
    state.termination.load_state_dict(dict(rest["termination"]))
    state.termination.update(rest["step"])
    if state.termination.phase == 2:
        state.enter_phase_two()
    elif state.alignment is not None and state.alignment.projector is not None:
        projector = state.accelerator.unwrap_model(state.alignment.projector)
        sharding.load(projector, checkpoint.under(tensors, "alignment.projector."))
        assert state.alignment_optimizer is not None
        checkpoint.load_optimizer(
            state.alignment_optimizer, projector, checkpoint.under(tensors, "alignment.optimizer.")
        )
    if state.angle is not None and "angle.sums" in tensors:
        state.angle.load_state_dict(checkpoint.under(tensors, "angle."))
    state.batches.load_state_dict(checkpoint.under(tensors, "data."))
    state.window = {k: v.to(state.accelerator.device) for k, v in checkpoint.under(tensors, "window.").items()}
    state.noise.set_state(tensors["noise.generator"])
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    if rest["scaler"] is not None and state.accelerator.scaler is not None:
        state.accelerator.scaler.load_state_dict(rest["scaler"])
    state.step = rest["step"]


def _put(into: dict[str, Tensor], prefix: str, tensors: Mapping[str, Tensor]) -> None:
    into |= {prefix + name: value for name, value in tensors.items()}
