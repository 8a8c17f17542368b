"""The end of phase I: triggers, and the phase of a run (Eq. 3, arXiv 2505.16792).

A trigger is a pure function of the step and of what was logged so far, so it decides the same live, after a resume, and
when it is replayed over the log of a run that never switched (`replay`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from haste_core.errors import HasteError, unknown

# One logged line: "step" and the means of what was measured since the line before.
Line = Mapping[str, float]
# Kinds of trigger that read an angle; it is logged under the same name.
ANGLES = ("gradient_angle", "online_angle")
# Entries of a line that triggers read; the others are not kept.
_READ = {"step", "feature", "attention", *ANGLES}


class Trigger(Protocol):
    """Decides the switch."""

    def fires(self, step: int, log: Sequence[Line]) -> bool:
        """True when step `step` (from 0, the next one) should no longer be fully aligned. log: oldest line first."""


class Never:
    """Alignment stays on."""

    def fires(self, step: int, log: Sequence[Line]) -> bool:
        """False."""
        return False


@dataclass
class FixedIteration:
    """Alignment ends before step `at`: steps 0 to at - 1 are aligned."""

    at: int

    def fires(self, step: int, log: Sequence[Line]) -> bool:
        """True from step `at` on."""
        return step >= self.at


@dataclass
class Angle:
    """The cosine between alignment and denoising gradients has fallen below a threshold.

    With `smoothing` 0 and `patience` 1 this is the paper's trigger (Tables 9, 10, arXiv 2505.16792). Not in the paper:
    an exponential average over the readings, and a patience, since an online reading is noisy.

    key: name of the logged cosine. after: no reading at or before this step counts. smoothing: weight of the past in
    the average, in [0, 1). patience: how many readings in a row have to be below the threshold.
    """

    key: str
    after: int
    threshold: float
    smoothing: float
    patience: int

    def fires(self, step: int, log: Sequence[Line]) -> bool:
        """True when the last `patience` averages are below the threshold."""
        average, below = 0.0, 0
        readings = [line[self.key] for line in log if line["step"] > self.after and line.get(self.key) is not None]
        for i, reading in enumerate(readings):
            average = reading if i == 0 else self.smoothing * average + (1 - self.smoothing) * reading
            below = below + 1 if average < self.threshold else 0
        return below >= self.patience


@dataclass
class Plateau:
    """The alignment loss has stopped falling. Not in the paper: the cheapest trigger there could be.

    after: no line at or before this step counts. window: lines on each side of the comparison. gain: the loss must have
    fallen by this share of all it fell since the first window, or the trigger fires.
    """

    after: int
    window: int
    gain: float

    def fires(self, step: int, log: Sequence[Line]) -> bool:
        """True when the last window's mean loss is hardly below the mean of the window before it."""
        losses = [alignment_loss(line) for line in log if line["step"] > self.after]
        means = [sum(losses[i : i + self.window]) / self.window for i in range(len(losses) - self.window + 1)]
        if len(means) <= self.window:
            return False
        last, before, first = means[-1], means[-1 - self.window], means[0]
        return before - last < self.gain * max(first - last, 0.0) or last >= first


def alignment_loss(line: Line) -> float:
    """The sum of the alignment losses on a logged line, 0.0 where there are none."""
    return sum(line[name] for name in ("feature", "attention") if line.get(name) is not None)


def make_trigger(
    kind: str,
    at: int | None = None,
    after: int = 0,
    threshold: float = -0.05,
    smoothing: float = 0.0,
    patience: int = 1,
    window: int = 4,
    gain: float = 0.02,
) -> Trigger:
    """Trigger by name: "never", "iteration", "gradient_angle", "online_angle" or "plateau".

    at: step of "iteration". The others are arguments of `Angle` and `Plateau`.
    """
    if kind == "iteration":
        if at is None:
            raise HasteError("trigger 'iteration' without a step; expected at=STEP")
        return FixedIteration(at)
    if kind in ANGLES:
        return Angle(kind, after, threshold, smoothing, patience)
    if kind == "plateau":
        return Plateau(after, window, gain)
    if kind != "never":
        raise unknown("trigger", kind, ("never", "iteration", *ANGLES, "plateau"))
    return Never()


def replay(trigger: Trigger, log: Iterable[Line]) -> int | None:
    """The step at which `trigger` would have fired in the run that logged these lines, or None if never.

    Exact for a run that was aligned throughout: up to its switch any other run logs the same.
    """
    lines: list[Line] = [{"step": 0}, *log]
    for i, (line, following) in enumerate(pairwise([*lines, {"step": lines[-1]["step"] + 1}])):
        for step in range(int(line["step"]), int(following["step"])):
            if trigger.fires(step, lines[1 : i + 1]):
                return step
    return None


class Switch:
    """Phase of a run: 1 while alignment is on, 2 from the switch to the end. It never goes back.

    A run without alignment is in phase 2 throughout: a vanilla step and a phase II step are the same thing.

    trigger: decides when phase I ends; None means a run without alignment. fade: number of steps over which the weight
    of alignment falls linearly to zero after the trigger has fired; phase II begins when it is zero.
    """

    def __init__(self, trigger: Trigger | None = None, fade: int = 0) -> None:
        self.trigger, self.fade = trigger or Never(), fade
        self.phase = 2 if trigger is None else 1
        self.fired_at: int | None = None
        self.switched_at: int | None = None
        self.log: list[Line] = []

    def observe(self, line: Line) -> None:
        """Add a logged line to what the trigger reads."""
        if self.phase == 1 and self.fired_at is None:
            self.log.append({key: value for key, value in line.items() if key in _READ})

    def update(self, step: int) -> bool:
        """Ask the trigger before step `step`; True when the run switches to phase II right now."""
        if self.phase == 2:
            return False
        if self.fired_at is None and self.trigger.fires(step, self.log):
            self.fired_at = step
        if self.fired_at is None or step < self.fired_at + self.fade:
            return False
        self.phase, self.switched_at = 2, step
        return True

    def weight(self, step: int) -> float:
        """Factor of the alignment losses of step `step` in phase I, in (0, 1]."""
        return 1.0 if self.fired_at is None or not self.fade else 1 - (step - self.fired_at) / self.fade

    def state_dict(self) -> dict[str, Any]:
        """JSON-like phase and trigger state."""
        return {"phase": self.phase, "fired_at": self.fired_at, "switched_at": self.switched_at, "log": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the saved phase."""
        self.phase, self.switched_at = state["phase"], state["switched_at"]
        self.fired_at, self.log = state["fired_at"], list(state["log"])
