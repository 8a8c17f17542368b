"""Measured time of training steps: arms and phases interleaved in one process, as ratios within each round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from haste_core.errors import HasteError
from haste_core.files import write_json
from haste_core.study import config
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import study_dir
from haste_core.study.train import create, switch_of
from haste_core.training import Trainer

COLUMNS = ("arm", "phase", "median_step_s", "ratio_to_vanilla", "ratio_low", "ratio_high", "rounds")
ROUNDS = 12
# Settings of `train` that leave the numbers of a run as they are (so its lineage) and change the time of a step.
_AFFECTS_TIME = ("watch_angle", "accumulate", "compile", "prefetch")


class Timing(NamedTuple):
    """Median seconds of an action, its median ratio to a base, the ratio's 95 % bootstrap interval, and the rounds."""

    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


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


def measure(study: config.StudySettings, rounds: int = ROUNDS, steps: int = 2) -> list[dict[str, Any]]:
    """Median seconds per training step of every main arm and phase, and the ratio to a vanilla step with its spread.

    A state that several arms share is timed once, and each of them has its row. `ratio_low` and `ratio_high` are a 95 %
    bootstrap interval of the median ratio (`compared`).
    """
    study.check_baseline()
    running = states(study)
    first = {id(state): key for key, state in reversed(running.items())}
    once = {first[id(state)]: state for state in running.values()}
    times = _steps(once, first[id(running["vanilla", 2])], rounds, steps)
    return [dict(zip(COLUMNS, (*key, *times[first[id(state)]]), strict=True)) for key, state in running.items()]


def write(study: config.StudySettings, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Measure, and write the rows to runs/<study>/step_time.json."""
    rows = measure(study, rounds)
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
    running = {}
    for watched in (False, True):
        own = run.model_copy(update={"train": run.train.model_copy(update={"watch_angle": watched})})
        running[watched] = create(own, 0, teacher, switch_of(own))
    names = ("median_step_s", "ratio", "ratio_low", "ratio_high", "rounds")
    rows = _steps(running, False, rounds, steps)
    return pd.DataFrame({"arm": arm, "watched": key} | dict(zip(names, row, strict=True)) for key, row in rows.items())


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


def step_of(state: Trainer) -> Callable[[], object]:
    """A training step of a state, as an action to time."""
    return state.train_step


def _steps(running: Mapping[Any, Trainer], base: Any, rounds: int, steps: int) -> dict[Any, Timing]:
    device = next(iter(running.values())).accelerator.device
    return interleaved({key: step_of(state) for key, state in running.items()}, base, rounds, steps, device)


def _now(device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
