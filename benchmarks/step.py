"""A training step on 32x32x4 latents beside a ViT-B/14 teacher at 224 pixels, by phase (Table 16).

SiT-B/2 on a CPU, SiT-XL/2 on a GPU.

Weights are random: they do not change what a step costs. Latents and photographs are noise in a folder that is laid
out as prepared ones are, so reading them counts.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks import machine
from haste_core.devices import default_device
from haste_core.processes import micro_batches
from haste_core.study import config, cost
from haste_core.study.data import Batches
from haste_core.study.estimate import Example, estimate
from haste_core.study.pretrain import build_teacher
from haste_core.study.train import create, switch_of
from haste_core.training import Trainer

ARMS = ["vanilla", "repa", "haste"]
# What this device trains: size of the student, profile of `imagenet256`, precision, images in a batch.
SIZES: dict[str, tuple[str, str | None, str, int]] = {
    "cpu": ("SiT-B/2", "sit-b", "no", 4),
    "cuda": ("SiT-XL/2", None, "bf16", 32),
}
# The paper's batch, which a GPU is given as much of as fits beside three states.
LARGEST = 256
COMPILED = ", compiled"
PHASES = {"vanilla": ("vanilla", 2), "repa phase 1": ("repa", 1), "haste phase 1": ("haste", 1),
          "haste phase 2": ("haste", 2)}  # fmt: skip

# A latent and its image, of two classes.
EXAMPLE = Example(size=32, channels=4, classes=2, image_size=256, image_channels=3)


def sizes() -> tuple[str, str | None, str, int]:
    """The entry of `SIZES` for this device."""
    return SIZES[default_device().type]


def study(
    folder: Path,
    model: str | None = None,
    arms: list[str] = ARMS,
    compiled: bool = False,
    batch: int | None = None,
) -> config.StudySettings:
    """Study `imagenet256` on random pairs with a random teacher, by default sized for this device."""
    usual, profile, precision, images = sizes()
    loaded = config.load(
        "imagenet256", profile,
        [f"data.path={folder}", "data.test_fraction=0.5", "teacher.weights=random", f"model.preset={model or usual}",
         f"train.batch_size={batch or images}", f"train.precision={precision}",
         f"train.threads={torch.get_num_threads()}", f"train.compile={compiled}"],
    )  # fmt: skip
    return loaded.model_copy(update={"groups": {"main": arms}})


def measure(rounds: int) -> pd.DataFrame:
    """Seconds, ratio to a vanilla step, images/s, memory and share of the matrix rate of every arm and phase.

    Returns:
        what ("vanilla", "repa phase 1", ..., "teacher forward" alone; on a GPU then the same of the largest batch),
        batch (images), seconds (median), ratio, low, high (to vanilla of the same batch; 95 % interval), over_least,
        over_low, over_high (ratio to a vanilla step and a teacher forward together, the least that phase I could
        take), images_per_s, peak_gib (of the run alone), tflop (of the batch), share (of the device's measured matrix
        rate), rounds.
    """
    rate = machine.matrix_rate(sizes()[2], default_device().type)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if default_device().type == "cuda":
            machine.write_pairs(folder, EXAMPLE, 2 * LARGEST + 64)
            rows = _on_gpu(study(folder), rounds, rate)
        else:
            machine.write_pairs(folder, EXAMPLE, 4 * sizes()[3])
            rows = _rows(study(folder), cost.states(study(folder)), rounds, rate)
            for row in rows:
                if row["what"] in PHASES:
                    row["peak_gib"] = machine.peak_gib(_alone, folder, *PHASES[row["what"]])
    return pd.DataFrame(rows)


def compiled(rounds: int) -> pd.DataFrame:
    """A compiled vanilla step and a compiled phase I step.

    Returns:
        what, batch, seconds, ratio, low, high (to an uncompiled vanilla step of the same turn), images_per_s, tflop,
        share, rounds; columns as of `measure`.
    """
    rate = machine.matrix_rate(sizes()[2], default_device().type)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        machine.write_pairs(folder, EXAMPLE, 4 * sizes()[3])
        timed = _timed(_compiled(folder), max(3, rounds // 2))
        rows = [
            _row(study(folder), rate, what, cost.compared(taken, timed["vanilla"]))
            for what, taken in timed.items() if what not in PHASES
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _rows(
    chosen: config.StudySettings, running: Mapping[tuple[str, int], Trainer], rounds: int, rate: float
) -> list[dict[str, Any]]:
    taken = _timed(running, rounds, with_teacher=True)
    least = np.add(taken["vanilla"], taken["teacher forward"])
    rows = []
    for what, seconds in taken.items():
        over = cost.compared(seconds, least)
        row = _row(chosen, rate, what, cost.compared(seconds, taken["vanilla"]))
        rows.append(row | {"over_least": over.ratio, "over_low": over.low, "over_high": over.high})
    return rows


def _on_gpu(chosen: config.StudySettings, rounds: int, rate: float) -> list[dict[str, Any]]:
    """Rows of all arms, then of vanilla and phase I with the largest batch that fits beside each other."""
    running = cost.states(chosen)
    rows = _rows(chosen, running, rounds, rate)
    needed = {key: _step_gib(state) for key, state in running.items()}
    both = {key: running.pop(key) for key in (("vanilla", 2), ("haste", 1))}
    held = {key: _held_gib(running, key) for key in list(running)}
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    fits = int((0.92 * total - torch.cuda.memory_allocated() / 2**30) / needed["haste", 1] * chosen.train.batch_size)
    larger = study(Path(str(chosen.data.path)), arms=["vanilla", "haste"], batch=min(LARGEST, fits // 32 * 32))
    for key in both:
        _resize(both[key], larger.train.batch_size)
    more = _rows(larger, both, max(3, rounds // 3), rate)
    more_needed = {key: _step_gib(state) for key, state in both.items()}
    held |= {key: _held_gib(both, key) for key in list(both)}
    for found, steps in ((rows, needed), (more, more_needed)):
        peaks = {_title(*key): held[key] + gib for key, gib in steps.items()}
        for row in found:
            row["peak_gib"] = peaks.get(row["what"])
    return rows + more


def _resize(state: Trainer, images: int) -> None:
    """Give a trainer another batch size."""
    old = state.batches
    state.options = replace(state.options, batch_size=images)
    state.share = state.processes.share(images)
    state.micro_batches = micro_batches(images, state.options.accumulate, state.processes.count)
    state.batches = Batches(old.dataset, images, 0, state.haste is not None, state.share, ahead=True)  # type: ignore[attr-defined]


def _step_gib(state: Trainer) -> float:
    """GiB on the GPU that a step takes beside what is there between steps."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    state.train_step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _held_gib(running: dict[tuple[str, int], Trainer], key: tuple[str, int]) -> float:
    """GiB on the GPU that a run has between steps; lets the run go."""
    before = torch.cuda.memory_allocated()
    del running[key]
    gc.collect()
    torch.cuda.empty_cache()
    return (before - torch.cuda.memory_allocated()) / 2**30


def _row(chosen: config.StudySettings, rate: float, what: str, t: cost.Timing) -> dict[str, Any]:
    row = {
        "what": what,
        "batch": chosen.train.batch_size,
        "seconds": t.seconds,
        "ratio": t.ratio,
        "low": t.low,
        "high": t.high,
        "rounds": t.rounds,
    }
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
    return cost.timed(actions, rounds, device=device, label=sizes()[0])


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
