"""Training in half precision and compiled, against float32 on the same random numbers, across the switch."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from torch._dynamo.utils import counters

from benchmarks import machine
from haste_core.devices import default_device
from haste_core.study import config
from haste_core.study.pretrain import build_teacher
from haste_core.study.train import create

# Number of steps, how many of them are phase I, and how many a mean is taken over.
STEPS, SWITCH, WINDOW = 200, 100, 20
WAYS: dict[str, tuple[str, bool]] = {
    "float32": ("no", False),
    "bf16": ("bf16", False),
    "fp16": ("fp16", False),
    "bf16, compiled": ("bf16", True),
}


def run(precision: str, compiled: bool) -> config.RunSettings:
    """Arm `haste` of the digits with a student of SiT-S's size and a random teacher."""
    return config.load(
        "digits", None,
        ["model.depth=12", "model.width=384", "model.heads=6",
         "teacher.weights=random", "train.lr=3e-4", f"train.steps={STEPS}", "train.keep=[]",
         f"train.precision={precision}", f"train.compile={compiled}", f"arms.haste.termination.at={SWITCH}",
         f"train.threads={torch.get_num_threads()}"],
    ).run("haste")  # fmt: skip


def measure(rounds: int) -> pd.DataFrame:
    """Losses over 200 steps, half of them in phase I; the first seed alone, so `rounds` has no effect.

    Returns:
        way, phase_1, phase_2 (mean loss of the last 20 steps of each), off_1, off_2 (largest relative difference of a
        mean of 20 steps to float32 in each phase), skipped_1, skipped_2 (steps whose gradient norm was not finite),
        scale_1, scale_2 (of the loss, at the end of each phase; fp16), graphs_1, graphs_2 (compiled by the end of
        each).
    """
    rows: list[dict[str, Any]] = []
    whole: list[float] = []
    for way, (precision, compiled) in WAYS.items():
        if precision == "fp16" and default_device().type == "cpu":
            continue
        machine.forget()
        counters.clear()
        chosen = run(precision, compiled)
        trainer = create(chosen, 0, build_teacher(chosen.teacher))
        losses, norms = [], []
        row: dict[str, Any] = {"way": way}
        for step in range(1, STEPS + 1):
            measured = trainer.train_step()
            losses.append(measured["loss"])
            norms.append(measured["grad_norm"])
            if step in (SWITCH, STEPS):
                phase = trainer.switch.phase
                scaler = trainer.accelerator.scaler
                row |= {
                    f"skipped_{phase}": sum(not math.isfinite(float(norm)) for norm in norms),
                    f"scale_{phase}": None if scaler is None else scaler.get_scale(),
                    f"graphs_{phase}": counters["stats"]["unique_graphs"],
                }
                norms = []
        found = torch.stack(losses).double().reshape(-1, WINDOW).mean(1).tolist()
        whole = whole or found
        off = [abs(a / b - 1) for a, b in zip(found, whole, strict=True)]
        half = SWITCH // WINDOW
        row |= {"phase_1": found[half - 1], "phase_2": found[-1], "off_1": max(off[:half]), "off_2": max(off[half:])}
        rows.append(row)
    return pd.DataFrame(rows)
