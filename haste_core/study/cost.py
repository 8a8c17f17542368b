"""Measured time of training steps: of arms and phases interleaved in one process, and of this device in FLOP/s."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from torch import Generator, Tensor
from tqdm.auto import tqdm

from haste_core.errors import HasteError
from haste_core.files import write_json
from haste_core.study import config
from haste_core.study.data.base import Dataset
from haste_core.study.estimate import Example, Speed, networks_of, parameters, step_cost
from haste_core.study.pretrain import build_teacher, find_teacher
from haste_core.study.runs import machine, study_dir
from haste_core.study.train import create, switch_of
from haste_core.training import Batch, Trainer

COLUMNS = ("arm", "phase", "median_step_s", "ratio_to_vanilla", "ratio_low", "ratio_high", "rounds")
# Settings of `train` that leave the numbers of a run as they are (so its lineage) and change the time of a step.
_AFFECTS_TIME = ("watch_angle", "accumulate", "compile", "prefetch")
# Parameters of the student that is timed, and FLOPs of one of its steps, at most.
_LARGEST, _STEP_FLOPS = {"cpu": 5e7, "cuda": 4e8}, {"cpu": 2e10, "cuda": 2e13}


class Timing(NamedTuple):
    """Median seconds of an action, its median ratio to a base, the ratio's 95 % bootstrap interval, and the rounds."""

    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


# -- the arms of a study -----------------------------------------------------------------------------------------------


def states(study: config.StudySettings) -> dict[tuple[str, int], Trainer]:
    """A training state for each main arm and phase; a phase II state really went through its switch.

    Arms whose step is the same work in a phase share its state.
    """
    found: dict[tuple[str, int], Trainer] = {}
    made: dict[tuple[Any, ...], Trainer] = {}
    for arm in study.main:
        run = study.run(arm)
        phases = [2] if not run.alignment.active else [1] if run.tau == math.inf else [1, 2]
        for phase in phases:
            work = (run.lineage, phase, *(getattr(run.train, name) for name in _AFFECTS_TIME))
            if work not in made:
                made[work] = _state(study, run, phase)
            found[arm, phase] = made[work]
    return found


def _state(study: config.StudySettings, run: config.RunSettings, phase: int) -> Trainer:
    if not run.alignment.active:
        return create(run, 0, None)
    state = create(run, 0, find_teacher(study, run.teacher), switch_of(run))
    if phase == 2:
        state.train_step()
        state.step = int(run.tau)
        state.train_step()
    return state


def write(study: config.StudySettings, rounds: int = 12) -> list[dict[str, Any]]:
    """Median seconds of two training steps of every main arm and phase, kept in runs/<study>/step_time.json.

    Returns:
        Rows of `COLUMNS`: the ratio to a vanilla step with its 95 % bootstrap interval. A state that several arms share
        is timed once, and each of them has its row.
    """
    study.check_baseline()
    running = states(study)
    first = {id(state): key for key, state in reversed(running.items())}
    once = {first[id(state)]: state for state in running.values()}
    times = _step_times(once, first[id(running["vanilla", 2])], rounds, 2)
    rows = [dict(zip(COLUMNS, (*key, *times[first[id(state)]]), strict=True)) for key, state in running.items()]
    write_json(study_dir(study) / "step_time.json", rows)
    return rows


def watching(study: config.StudySettings, arm: str, rounds: int = 30, steps: int = 3) -> pd.DataFrame:
    """Time that the online estimate of the gradient angle (`train.watch_angle`) adds to a step of phase I.

    Returns:
        Two rows, without and with it: arm, watched, median_step_s, ratio (to the step without it), ratio_low,
        ratio_high (95 % bootstrap interval), rounds.

    Raises:
        HasteError: the arm has no phase I.
    """
    run = study.run(arm)
    if not run.alignment.active:
        raise HasteError(f"arm {arm!r} is never aligned, so it has no gradient angle; expected an aligned arm")
    teacher = find_teacher(study, run.teacher)
    running = {
        watched: create(_with_train(run, watch_angle=watched), 0, teacher, switch_of(run)) for watched in (False, True)
    }
    names = ("median_step_s", "ratio", "ratio_low", "ratio_high", "rounds")
    rows = _step_times(running, False, rounds, steps)
    return pd.DataFrame({"arm": arm, "watched": key} | dict(zip(names, row, strict=True)) for key, row in rows.items())


def _step_times(running: Mapping[Any, Trainer], base: Any, rounds: int, steps: int) -> dict[Any, Timing]:
    device = next(iter(running.values())).accelerator.device
    return interleaved({key: state.train_step for key, state in running.items()}, base, rounds, steps, device)


# -- any actions -------------------------------------------------------------------------------------------------------


def interleaved(
    actions: Mapping[Any, Callable[[], object]],
    base: Any,
    rounds: int,
    steps: int = 1,
    device: torch.device | None = None,
    label: str = "step time",
) -> dict[Any, Timing]:
    """Timings of actions by key, with ratios to the action `base` of the same round; other arguments as in `timed`."""
    times = timed(actions, rounds, steps, device, label=label)
    return {key: compared(taken, times[base]) for key, taken in times.items()}


def compared(taken: Sequence[float] | np.ndarray, base: Sequence[float] | np.ndarray) -> Timing:
    """Timing of an action from its seconds in each round and those of a base in the same rounds."""
    ratios = np.asarray(taken) / np.asarray(base)
    medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Timing(float(np.median(taken)), float(np.median(ratios)), float(low), float(high), len(ratios))


def timed(
    actions: Mapping[Any, Callable[[], object]],
    rounds: int,
    steps: int = 1,
    device: torch.device | None = None,
    seconds: float = math.inf,
    label: str = "step time",
) -> dict[Any, list[float]]:
    """Seconds of each action in every round, after two rounds of warm-up.

    Args:
        actions: by any key; every round runs each of them once, in a new order.
        rounds: number of rounds at most. steps: number of calls that one time is the mean of.
        device: the device to wait for, the CPU by default.
        seconds: no further round begins after so many, once three are done.
        label: label of the progress bar.
    """
    times: dict[Any, list[float]] = {key: [] for key in actions}
    order, rng, first = list(actions), np.random.default_rng(0), _now(device)
    for warmup in tqdm(range(-2, rounds), desc=label, unit="round", mininterval=1.0):
        if warmup >= 3 and _now(device) - first > seconds:
            break
        rng.shuffle(order)
        for key in order:
            begun = _now(device)
            for _ in range(steps):
                actions[key]()
            if warmup >= 0:
                times[key].append((_now(device) - begun) / steps)
    return times


def _now(device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- the speed of this device ------------------------------------------------------------------------------------------


def measured_speed(
    study: config.StudySettings, example: Example, gpus: int = 1, steps: int = 20, seconds: float = 20.0
) -> Speed:
    """FLOP/s of real training steps on this device, on random images.

    Steps are those of the arm with the most losses, with fewer blocks where its student is large, fewer images where a
    step would be long, and a teacher with random weights; phase II is the same student without alignment.

    Args:
        study, example: the study, and one example of its data.
        gpus: devices that share the batch of a run: a step here has no more images than come to one of them.
        steps: steps that are timed in each phase, after two that warm up.
        seconds: no further steps are timed after so many, once there are three.

    Raises:
        HasteError: the device is neither a CPU nor a CUDA GPU, or its memory is too small.
    """
    device = PartialState().device.type
    if device not in _LARGEST:
        raise HasteError(f"training steps on {device!r} cannot be timed; expected cpu or cuda, or give --rate")
    aligned = {arm: study.run(arm).alignment for arm in study.arms}
    arm = max(aligned, key=lambda a: (aligned[a].lambda_feature > 0) + (aligned[a].lambda_attention > 0))
    full = study.run(arm)
    run = with_depth(full, full.model.depth)
    while run.model.depth > 1 and parameters(networks_of(_unaligned(run), example)[0]) > _LARGEST[device]:
        run = with_depth(run, run.model.depth // 2)
    precision, threads = run.train.precision, run.train.threads
    in_words = {"no": "float32"}.get(precision, precision)
    if device == "cpu":
        torch.set_num_threads(threads)
        if precision == "fp16":
            precision, in_words = "no", "float32 (fp16 needs a GPU)"
    run = _with_train(run, precision=precision, accumulate=1)
    runs = {1: run, 2: _unaligned(run)} if run.alignment.active else {2: run}
    flops = {phase: step_cost(r, example, phase).flops for phase, r in runs.items()}
    most = -(-run.train.batch_size // gpus)
    batch = max(1, min(most, int(_STEP_FLOPS[device] / max(flops.values()))))
    noise = _Noise(example, batch)
    try:
        states = {
            phase: create(
                _with_train(r, batch_size=batch), 0, build_teacher(r.teacher) if phase == 1 else None, dataset=noise
            )
            for phase, r in runs.items()
        }
        actions = {phase: state.train_step for phase, state in states.items()}
        times = timed(actions, steps, device=states[2].accelerator.device, seconds=seconds)
    except torch.OutOfMemoryError as error:
        raise HasteError(
            f"{device} has too little memory for a training step of {batch} images; expected more --gpus, or --rate of "
            f"the device that is meant"
        ) from error
    name = torch.cuda.get_device_name() if device == "cuda" else f"{threads} thread(s) of {machine()['cpu']}"
    return Speed(
        {phase: flops[phase] * batch / float(np.median(taken)) for phase, taken in times.items()},
        f"measured here on {name} in {in_words}, {len(times[2])} steps of {run.model.depth} of the {full.model.depth} "
        f"blocks of arm {arm} on {batch} of {most} images",
    )


def with_depth(run: config.RunSettings, depth: int) -> config.RunSettings:
    """A run with so many blocks, with a random teacher, and with alignment that never ends.

    Pairs of layers that are gone move to the last block.
    """
    pairs = {min(student, depth - 1): teacher for student, teacher in run.alignment.layer_pairs}
    fewer = {"depth": min(run.alignment.depth, depth), "layer_pairs": list(pairs.items())}
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"preset": None, "depth": depth}),
            "alignment": run.alignment.model_copy(update=fewer),
            "teacher": run.teacher.model_copy(update={"weights": "random"}),
            "termination": config.TerminationSettings(),
        }
    )


def _unaligned(run: config.RunSettings) -> config.RunSettings:
    off = {"lambda_feature": 0.0, "lambda_attention": 0.0}
    return run.model_copy(update={"alignment": run.alignment.model_copy(update=off)})


def _with_train(run: config.RunSettings, **changes: Any) -> config.RunSettings:
    return run.model_copy(update={"train": run.train.model_copy(update=changes)})


class _Noise(Dataset):
    """Random images in memory in the shape of a study's data."""

    name = "noise"

    def __init__(self, example: Example, count: int) -> None:
        self.image_size, self.channels, self.classes = example.size, example.channels, example.classes
        generator = Generator().manual_seed(0)
        x, images = (
            torch.rand(count, channels, size, size, generator=generator) * 2 - 1
            for channels, size in ((example.channels, example.size), (example.image_channels, example.image_size))
        )
        self.whole = Batch(x, torch.arange(count) % example.classes, images)

    def __len__(self) -> int:
        return len(self.whole.x)

    def examples(self, split: str, count: int | None = None, with_images: bool = True) -> Batch:
        """The first `count` of them."""
        return Batch(*(part[:count] for part in self.whole[:3]))

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """Examples without augmentation."""
        return Batch(*(values[indices[part]] for values in self.whole[:3]))
