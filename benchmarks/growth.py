"""Growth of time and memory with the work: batch, depth and tokens of a step, arms and seeds of a study."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks import machine, step
from haste_core.devices import default_device
from haste_core.study import config, cost
from haste_core.study.train import create

BATCHES, DEPTHS, SEEDS = (8, 32, 128, 512), (3, 6, 12, 24), (1, 3, 9, 27)
PRESETS = {16: "SiT-S/8", 64: "SiT-S/4", 256: "SiT-S/2"}


def measure(rounds: int) -> pd.DataFrame:
    """Seconds and memory of vanilla steps and of planning a study, by what grows.

    Returns:
        grows ("batch" and "depth" of the digits student, "tokens" of SiT-S on latents, "jobs" of the digits study, of
        which the graph alone is made), amount, seconds, ratio, low, high (to the smallest amount), peak_gib, rounds.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        machine.write_pairs(folder, step.EXAMPLE, 64)
        digits = partial(config.load, "digits", None)
        rows = _grown("batch", {n: partial(digits, [f"train.batch_size={n}"]) for n in BATCHES}, rounds)
        rows += _grown("depth", {n: partial(digits, [f"model.depth={n}"]) for n in DEPTHS}, rounds)
        machine.forget()
        rows += _grown("tokens", {n: partial(step.study, folder, m, ["vanilla"]) for n, m in PRESETS.items()}, rounds)
    planning = {_jobs(n): partial(plan, n) for n in SEEDS}
    timed = cost.interleaved(planning, min(planning), max(2, rounds // 6), label="planning")
    return pd.DataFrame(rows + [_row("jobs", jobs, t, None) for jobs, t in timed.items()])


def plan(seeds: int) -> None:
    """Make the graph of the digits study with so many seeds, and run nothing."""
    words = ["study", "digits", "--dry-run", "--set", f"seeds={list(range(seeds))}"]
    subprocess.run([sys.executable, "-m", "haste_core.study.cli", *words], check=True, capture_output=True)


def _jobs(seeds: int) -> int:
    return 2 * seeds * len(config.load("digits").arms) + 4


def _grown(grows: str, studies: dict[int, Callable[[], config.StudySettings]], rounds: int) -> list[dict[str, object]]:
    running = {amount: create(study().run("vanilla"), 0, None) for amount, study in studies.items()}
    actions = {amount: state.train_step for amount, state in running.items()}
    timed = cost.interleaved(actions, min(actions), rounds, device=default_device(), label=grows)
    return [_row(grows, amount, t, machine.peak_gib(_alone, studies[amount])) for amount, t in timed.items()]


def _row(grows: str, amount: int, t: cost.Timing, peak: float | None) -> dict[str, object]:
    facts = {"seconds": t.seconds, "ratio": t.ratio, "low": t.low, "high": t.high}
    return {"grows": grows, "amount": amount, **facts, "peak_gib": peak, "rounds": t.rounds}


def _alone(study: Callable[[], config.StudySettings]) -> None:
    state = create(study().run("vanilla"), 0, None)
    for _ in range(2):
        state.train_step()
