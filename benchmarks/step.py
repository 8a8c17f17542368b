"""A training step of SiT-B/2 on 32x32x4 latents beside a ViT-B/14 teacher at 224 pixels, by phase (Table 16).

Weights are random: they do not change what a step costs. Latents and photographs are noise in a folder that is laid
out as prepared ones are, so reading them counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks import machine
from haste_core import config, cost, training
from haste_core.devices import default_device
from haste_core.preflight import estimates, stand_in, tracing
from haste_core.state import TrainState, create
from haste_core.teacher import build_teacher

ARMS = ["vanilla", "repa", "haste"]
PRECISION = {"cpu": "no", "cuda": "bf16"}
BATCH = {"cpu": 4, "cuda": 64}

# A latent and its image, of two classes.
EXAMPLE = tracing.Example(size=32, channels=4, classes=2, image_size=256, image_channels=3)


def study(folder: Path, model: str = "SiT-B/2", arms: list[str] = ARMS) -> config.Study:
    """Study `imagenet256` at the size of `model` on random pairs with a random teacher, sized for this device."""
    device = default_device().type
    loaded = config.load(
        "imagenet256", "sit-b",
        [f"data.path={folder}", "data.test_fraction=0.5", "teacher.weights=random", f"model.preset={model}",
         f"train.batch_size={BATCH[device]}", f"train.precision={PRECISION[device]}",
         f"train.threads={torch.get_num_threads()}"],
    )  # fmt: skip
    return loaded.model_copy(update={"groups": {"main": arms}})


def measure(rounds: int) -> pd.DataFrame:
    """Seconds, ratio to a vanilla step, images/s, memory and share of the matrix rate of every arm and phase.

    Returns:
        what ("vanilla", "repa phase 1", ..., and "teacher forward" alone, which phase I has on top of vanilla), seconds
        (median), ratio, low, high (to vanilla; 95 % interval), images_per_s, peak_gib, tflop (of the batch), share (of
        the device's measured matrix rate), rounds.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        stand_in.write_pairs(folder, EXAMPLE, 4 * BATCH[default_device().type])
        chosen = study(folder)
        running = cost.states(chosen)
        device = next(iter(running.values())).accelerator.device
        actions: dict[str, Callable[[], object]]
        actions = {_title(arm, phase): cost.step_of(s) for (arm, phase), s in running.items()}
        actions |= {"teacher forward": _teacher_forward(running["haste", 1])}
        timed = cost.interleaved(actions, "vanilla", rounds, device=device, label="SiT-B/2")
        flops = {_title(a, p): _flops(chosen, a, p) for a, p in running}
        memory = {_title(a, p): machine.peak_gib(_alone, folder, a, p) for a, p in running}
    rate = estimates.matrix_rate(chosen.train.precision, device.type)
    rows = [
        {"what": what, "seconds": t.seconds, "ratio": t.ratio, "low": t.low, "high": t.high,
         "images_per_s": chosen.train.batch_size / t.seconds, "peak_gib": memory.get(what),
         "tflop": flops[what] / 1e12 if what in flops else None,
         "share": flops[what] / t.seconds / rate if what in flops else None, "rounds": t.rounds}
        for what, t in timed.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _title(arm: str, phase: int) -> str:
    return arm if arm == "vanilla" else f"{arm} phase {phase}"


def _teacher_forward(state: TrainState) -> Callable[[], None]:
    assert state.alignment is not None
    state.batches.with_images = True
    images = state.batches.next().images.to(state.accelerator.device)
    return partial(_under_autocast, state, images)


def _under_autocast(state: TrainState, images: torch.Tensor) -> None:
    assert state.alignment is not None
    with state.accelerator.autocast():
        state.alignment.teacher(images, state.alignment.teacher_blocks)


def _flops(study: config.Study, arm: str, phase: int) -> int:
    run = study.run(arm)
    return estimates.estimate(run, EXAMPLE, tracing.networks_of(run, EXAMPLE)).step_flops[phase]


def _alone(folder: Path, arm: str, phase: int) -> None:
    """Two steps of one arm that begins in one phase, for a process of its own."""
    run = study(folder).run(arm)
    termination = training.Termination(run)
    termination.update(0 if phase == 1 else int(run.tau) if run.alignment.active else 0)
    teacher = build_teacher(run.teacher) if termination.phase == 1 else None
    state = create(run, 0, teacher, termination)
    state.step = 0 if phase == 1 else int(min(run.tau, run.train.steps - 2))
    for _ in range(2):
        training.train_step(state)
