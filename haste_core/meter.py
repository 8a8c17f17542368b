"""What a run measures on its way: summed up on the device, and written down a line at a time."""

from __future__ import annotations

import json
import time
from typing import Any, TextIO

import torch
from torch import Tensor

from haste_core.errors import HasteError, is_disk_full
from haste_core.observing import observe
from haste_core.state import TrainState


class Meter:
    """Sums measurements on the device, and writes their means when asked: one line of metrics.jsonl, one bar update.

    Reading a value waits for the device, so nothing is read between two logged steps.
    """

    def __init__(self, log: TextIO, bar: Any, state: TrainState) -> None:
        self.log, self.bar, self.state = log, bar, state
        self.time, self.step = time.perf_counter(), state.step

    def add(self, measured: dict[str, Tensor]) -> None:
        """Add one step's measurements."""
        window = self.state.window
        for name, value in measured.items():
            for key, amount in ((name, value), (f"count_{name}", torch.ones_like(value))):
                window[key] = window[key] + amount if key in window else amount

    def write(self) -> None:
        """Log the means since the last call, over all processes.

        Raises:
            HasteError: the loss is not finite, or there is no room for the line.
        """
        state = self.state
        state.gather()
        window = state.window
        means = {k: float(window[k] / window[f"count_{k}"]) for k in window if not k.startswith("count_")}
        check_finite(means["loss"], state)
        phase = state.termination.phase
        line = {"step": state.step, "images_seen": state.step * state.config.train.batch_size, "phase": phase, **means}
        line |= observe(state)
        # The trigger reads the main process's line, or rounding could part the processes at the switch.
        state.termination.observe(state.processes.from_main(lambda: self._log(line)))
        self.bar.set_postfix(phase=phase, **{k: f"{v:.3f}" for k, v in means.items()}, refresh=False)
        self.bar.update(state.step - self.step)
        window.clear()
        self.time, self.step = time.perf_counter(), state.step

    def _log(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a line with the rate since the last one; returns it as it came."""
        rate = (self.state.step - self.step) / max(time.perf_counter() - self.time, 1e-9)
        try:
            self.log.write(json.dumps(line | {"steps_per_s": round(rate, 3)}) + "\n")
            self.log.flush()
        except OSError as error:
            if is_disk_full(error):
                raise HasteError(
                    f"no room to write metrics ({error}); checkpoints are intact, free some space"
                ) from error
            raise
        return line


def check_finite(loss: float, state: TrainState) -> None:
    """Raise HasteError when a loss is NaN or infinite."""
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise HasteError(
            f"the loss is {loss} at or before step {state.step}; possible: a lower train.lr, precision 'no' or "
            f"'bf16'; the checkpoints before it are intact"
        )
