"""How fast the device at hand is: its rate of matrix products, and the share of it that a training step reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState

from haste_core.errors import HasteError
from haste_core.study import config, cost, provenance
from haste_core.study.preflight import estimates, stand_in
from haste_core.study.preflight.tracing import Example, networks_of
from haste_core.study.pretrain import build_teacher
from haste_core.study.train import create
from haste_core.training import Trainer

# Parameters of the student that is timed: steps of a few seconds on a slow core, a few GiB on a GPU.
_LIMIT = {"cpu": 5e7, "cuda": 4e8}
_ROUNDS = 30
_BY_HAND = "--rate and --utilisation of the device that is meant"


class Share(NamedTuple):
    """The share of the matrix rate that a training step reaches, the median of `steps` steps and their 10 % and 90 %.

    It can exceed 1 where other work slowed the products down more than the steps.
    """

    median: float
    low: float
    high: float
    steps: int


@dataclass(frozen=True)
class Calibration:
    """What was measured, and on what.

    device: in words. device_type: cpu or cuda. precision: of products and steps, as `train.precision`. rate: FLOP/s.
    shares: by phase, empty where none was asked for. timed: which steps, in words.
    """

    device: str
    device_type: str
    precision: str
    rate: float
    shares: Mapping[int, Share]
    timed: str

    @property
    def utilisation(self) -> dict[int, float]:
        """The shares' medians by phase."""
        return {phase: share.median for phase, share in self.shares.items()}


def calibrate(
    study: config.Study, example: Example, gpus: int = 1, seconds: float = 20.0, with_shares: bool = True
) -> Calibration:
    """Measure the device at hand for a study: its rate and, with the steps of a stand-in, the share reached.

    The stand-in is the arm with the most losses, with fewer blocks where it is large (`stand_in.smaller`) and
    fewer images where a step would be long; its phase II is the same student without alignment.

    Args:
        study, example: the study and what its data look like.
        gpus: devices that a run's batch is spread over: no more images go into a step than come to one of them.
        seconds: what the steps take, roughly; three of each phase at least.
        with_shares: False to measure the rate alone.

    Raises:
        HasteError: the device is neither a CPU nor a CUDA GPU, its memory is too small, or the run cannot be built.
    """
    device = PartialState().device.type
    if device not in _LIMIT:
        raise HasteError(f"device {device!r} cannot be calibrated; possible: cpu, cuda, or {_BY_HAND}")
    run = study.run(model_arm(study))
    # Without a GPU nothing trains in fp16 (`haste_core.state`); float32 is what the CPU is fast in.
    precision = "no" if device == "cpu" and run.train.precision == "fp16" else run.train.precision
    if device == "cpu":
        torch.set_num_threads(run.train.threads)
    rate = estimates.matrix_rate(precision, device)
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu(run.train.threads)
    if not with_shares:
        return Calibration(name, device, precision, rate, {}, "")
    small = stand_in.smaller(run, example, _LIMIT[device])
    small = small.model_copy(update={"train": run.train.model_copy(update={"precision": precision})})
    most = -(-run.train.batch_size // gpus)
    try:
        rate, shares, batch = _shares(small, example, rate, most, seconds)
    except torch.OutOfMemoryError as error:
        raise HasteError(f"{name} has no memory for the steps to time; possible: more --gpus, or {_BY_HAND}") from error
    words = f"{small.model.depth} of the {run.model.depth} blocks of arm {model_arm(study)}, {batch} of {most} images"
    if batch < most:
        words += " (the optimizer then weighs more, so the share is on the low side)"
    return Calibration(name, device, precision, rate, shares, words)


def model_arm(study: config.Study) -> str:
    """The arm whose steps stand for all: the first of those with the most losses."""
    found = {arm: study.run(arm).alignment for arm in study.arms}
    return max(found, key=lambda arm: (found[arm].lambda_feature > 0) + (found[arm].lambda_attention > 0))


def _shares(
    run: config.RunConfig, example: Example, rate: float, most: int, seconds: float
) -> tuple[float, dict[int, Share], int]:
    """The rate in between the steps, shares by phase, and how many images were in a step.

    A machine that others use, too, is not equally fast in one moment and the next: what is divided by each other has
    to be measured over the same time.
    """
    found = estimates.follow(run, example, networks_of(run, example)).costs
    runs = {1: run, 2: stand_in.unaligned(run)} if run.alignment.active else {2: run}
    # Two rounds warm up and five count; a half of the rate is a guess at the time only.
    batch = int(0.5 * rate * seconds / 7 / sum(found[phase].flops for phase in runs))
    batch = max(1, min(most, batch))
    train, rates = run.train.model_copy(update={"batch_size": batch, "accumulate": 1}), list[float]()
    with stand_in.images(run.data, example, batch) as dataset:
        states = {p: _state(r.model_copy(update={"train": train}), dataset) for p, r in runs.items()}
        device = next(iter(states.values())).accelerator.device

        def again() -> None:
            rates.append(estimates.matrix_rate(run.train.precision, device.type, repeats=1))

        steps = {phase: cost.step_of(state) for phase, state in states.items()}
        times = cost.timed(steps, _ROUNDS, device=device, seconds=seconds, each_round=again)
    rate = float(np.median(rates))
    return rate, {p: _share(found[p].flops * batch / rate / np.array(taken)) for p, taken in times.items()}, batch


def _state(run: config.RunConfig, dataset: Any) -> Trainer:
    return create(run, 0, build_teacher(run.teacher) if run.alignment.active else None, dataset=dataset)


def _share(shares: np.ndarray) -> Share:
    low, median, high = (float(value) for value in np.quantile(shares, [0.1, 0.5, 0.9]))
    return Share(median, low, high, len(shares))


def _cpu(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)} of a CPU ({provenance.machine()['cpu']})"
