"""What a run writes down beside its losses so that a trigger can decide: the angle of its gradients.

Exact (the paper's, passes of its own) or online (none): what the trigger or `train.watch_angle` asks for.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from haste_core import sharding
from haste_core.analysis.cosine import gradient_cosine, reaching
from haste_core.analysis.online import OnlineAngle
from haste_core.compiling import uncompiled
from haste_core.state import TrainState
from haste_core.study import config


def observe(state: TrainState) -> dict[str, Any]:
    """Angles for the line that is about to be logged; empty in phase II and where nobody asked.

    Returns:
        `online`: cosines by loss ("feature", "attention") and bin of the noise level since the last line, NaN as None;
        `online_angle`: their mean; `gradient_angle`: the exact cosine of Eq. 2 (arXiv 2505.16792), mean over losses
        and noise levels, at the steps the settings name.
    """
    if state.alignment is None:
        return {}
    found: dict[str, Any] = {}
    if state.angle is not None:
        found |= online(state.angle)
        state.angle.reset()
    settings = state.config.termination
    if settings.kind == "gradient_angle" and state.step > settings.after and state.step % settings.every == 0:
        found["gradient_angle"] = exact(state)
    return found


def online(angle: OnlineAngle) -> dict[str, Any]:
    """The cosines of an online estimate by loss and bin, and their mean; empty before anything was seen."""
    table = angle.read()
    if table["cosine"].notna().sum() == 0:
        return {}
    bins = {str(loss): [_number(c) for c in rows["cosine"]] for loss, rows in table.groupby("loss", sort=False)}
    return {"online": bins, "online_angle": float(table["cosine"].mean())}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)  # JSON knows no NaN


def exact(state: TrainState) -> float:
    """The mean cosine between denoising and alignment gradients over the losses that are on and the noise levels.

    Eq. 2, Tables 9 and 10, arXiv 2505.16792: on one block's parameters, on validation images with fixed noise.
    """
    assert state.alignment is not None
    settings, block = state.config.termination, block_of(state.config)
    unwrap, main = state.accelerator.unwrap_model, state.processes.is_main
    model, alignment = sharding.in_one_piece(unwrap(state.model), main), copy.copy(state.alignment)
    if alignment.projector is not None:
        alignment.projector = sharding.in_one_piece(unwrap(alignment.projector), main)
    batch = state.batches.dataset.examples("validation", settings.n)
    which = [loss for loss in reaching(alignment, block) if loss != "holistic"]

    def mean() -> float:
        with uncompiled():  # one graph gives gradients of several losses
            found = [
                gradient_cosine(model, alignment, state.objective, batch, t, block, which) for t in settings.timesteps
            ]
        return float(np.mean([products.rho() for by_loss in found for products in by_loss.values()]))

    # All would find the same: the images are not divided.
    return state.processes.from_main(mean)


def block_of(run: config.RunConfig) -> int:
    """The block, from 0, that the exact angle is taken on: the settings' own, or the last below the aligned depth."""
    chosen = run.termination.block
    return run.alignment.depth - 1 if chosen is None else chosen
