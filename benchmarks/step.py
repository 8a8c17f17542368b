"""A training step of SiT-B/2 on 32x32x4 latents beside a ViT-B/14 teacher at 224 pixels, by phase (Table 16).

Weights are random: they do not change what a step costs. Latents and photographs are noise in a folder that is laid
out as prepared ones are, so reading them counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks import machine
from haste_core.devices import default_device
from haste_core.study import config, cost
from haste_core.study.estimate import Example, estimate
from haste_core.study.pretrain import build_teacher
from haste_core.study.train import create, switch_of
from haste_core.training import Trainer

ARMS = ["vanilla", "repa", "haste"]
PRECISION = {"cpu": "no", "cuda": "bf16"}
BATCH = {"cpu": 4, "cuda": 64}
COMPILED = ", compiled"
PHASES = {"vanilla": ("vanilla", 2), "repa phase 1": ("repa", 1), "haste phase 1": ("haste", 1),
          "haste phase 2": ("haste", 2)}  # fmt: skip

# A latent and its image, of two classes.
EXAMPLE = Example(size=32, channels=4, classes=2, image_size=256, image_channels=3)


def study(folder: Path, model: str = "SiT-B/2", arms: list[str] = ARMS, compiled: bool = False) -> config.StudySettings:
    """Study `imagenet256` at the size of `model` on random pairs with a random teacher, sized for this device."""
    device = default_device().type
    loaded = config.load(
        "imagenet256", "sit-b",
        [f"data.path={folder}", "data.test_fraction=0.5", "teacher.weights=random", f"model.preset={model}",
         f"train.batch_size={BATCH[device]}", f"train.precision={PRECISION[device]}",
         f"train.threads={torch.get_num_threads()}", f"train.compile={compiled}"],
    )  # fmt: skip
    return loaded.model_copy(update={"groups": {"main": arms}})


def measure(rounds: int) -> pd.DataFrame:
    """Seconds, ratio to a vanilla step, images/s, memory and share of the matrix rate of every arm and phase.

    Returns:
        what ("vanilla", "repa phase 1", ..., "teacher forward" alone; then what is compiled, in a turn of its own),
        seconds (median), ratio, low, high (to vanilla of the same turn, uncompiled; 95 % interval),
        over_least, over_low, over_high (ratio to a vanilla step and a teacher forward together, the least that phase I
        could take),
        images_per_s, peak_gib, tflop (of the batch), share (of the device's measured matrix rate), rounds.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        machine.write_pairs(folder, EXAMPLE, 4 * BATCH[default_device().type])
        chosen = study(folder)
        plain = _timed(cost.states(chosen), rounds, with_teacher=True)
        memory = {title: machine.peak_gib(_alone, folder, *which) for title, which in PHASES.items()}
        compiled = _timed(_compiled(folder), max(3, rounds // 2))
    rate = machine.matrix_rate(chosen.train.precision, default_device().type)
    least = np.add(plain["vanilla"], plain["teacher forward"])
    rows = []
    for what, taken in plain.items():
        over = cost.compared(taken, least)
        row = _row(chosen, rate, what, cost.compared(taken, plain["vanilla"])) | {"peak_gib": memory.get(what)}
        rows.append(row | {"over_least": over.ratio, "over_low": over.low, "over_high": over.high})
    rows += [
        _row(chosen, rate, what, cost.compared(taken, compiled["vanilla"])) for what, taken in compiled.items()
        if what not in PHASES
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _row(chosen: config.StudySettings, rate: float, what: str, t: cost.Timing) -> dict[str, Any]:
    row = {"what": what, "seconds": t.seconds, "ratio": t.ratio, "low": t.low, "high": t.high, "rounds": t.rounds}
    row |= {"images_per_s": chosen.train.batch_size / t.seconds}
    phase = PHASES.get(what.removesuffix(COMPILED))
    if phase is not None:
        flops = _flops(chosen, *phase)
        row |= {"tflop": flops / 1e12, "share": flops / t.seconds / rate}
    return row


def _timed(
    running: Mapping[tuple[str, int], Trainer], rounds: int, with_teacher: bool = False
) -> dict[str, list[float]]:
    """Seconds of a step of each state in every round, and of the teacher's forward pass."""
    actions: dict[str, Callable[[], object]]
    actions = {_title(arm, phase): s.train_step for (arm, phase), s in running.items()}
    if with_teacher:
        actions |= {"teacher forward": _teacher_forward(running["haste", 1])}
    device = next(iter(running.values())).accelerator.device
    return cost.timed(actions, rounds, device=device, label="SiT-B/2")


def _compiled(folder: Path) -> dict[tuple[str, int], Trainer]:
    """A vanilla state as it is, and compiled ones of vanilla and of phase I."""
    both = {compiled: study(folder, compiled=compiled) for compiled in (False, True)}
    run = both[True].run("haste")
    teacher = build_teacher(run.teacher)
    return {
        ("vanilla", 2): create(both[False].run("vanilla"), 0, None),
        ("vanilla" + COMPILED, 2): create(both[True].run("vanilla"), 0, None),
        ("haste" + COMPILED, 1): create(run, 0, teacher, switch_of(run)),
    }


def _title(arm: str, phase: int) -> str:
    arm, compiled = arm.removesuffix(COMPILED), COMPILED if arm.endswith(COMPILED) else ""
    return (arm if arm == "vanilla" else f"{arm} phase {phase}") + compiled


def _teacher_forward(state: Trainer) -> Callable[[], None]:
    assert state.haste is not None
    haste, state.batches.with_images = state.haste, True
    images = state.batches.next().images.to(state.accelerator.device)

    def forward() -> None:
        with state.accelerator.autocast():
            haste.teacher(images, haste.teacher_blocks)

    return forward


def _flops(study: config.StudySettings, arm: str, phase: int) -> int:
    found = estimate(study.run(arm), EXAMPLE).set_index("phase")
    return int(found["step_flops"][phase])


def _alone(folder: Path, arm: str, phase: int) -> None:
    """Two steps of one arm that begins in one phase, for a process of its own."""
    run = study(folder).run(arm)
    termination = switch_of(run)
    termination.update(0 if phase == 1 else int(run.tau) if run.alignment.active else 0)
    teacher = build_teacher(run.teacher) if termination.phase == 1 else None
    state = create(run, 0, teacher, termination)
    state.step = 0 if phase == 1 else int(min(run.tau, run.train.steps - 2))
    for _ in range(2):
        state.train_step()
