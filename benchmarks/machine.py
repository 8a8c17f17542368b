"""The machine a benchmark runs on: its name, its matrix rate, its memory, and where its tables go."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch

from haste_core.files import write_json, write_text
from haste_core.study import runs

RESULTS = Path(__file__).parent / "results"


def name() -> str:
    """The folder name of this machine: its GPU, or its CPU and the number of cores."""
    facts = runs.machine()
    return re.sub(r"[^a-z0-9]+", "-", (facts["gpu"] or f"{facts['cpu']} {facts['cores']} cores").lower()).strip("-")


def keep(table: pd.DataFrame, called: str, **facts: Any) -> Path:
    """Write a table and beside it where its numbers come from; returns its path."""
    path = RESULTS / name() / f"{called}.csv"
    write_text(path, table.to_csv(index=False, float_format="%.5g"))
    origin = {
        "commit": runs.commit(),
        "written": runs.now(),
        "machine": runs.machine(),
        "environment": runs.environment(),
        "threads": torch.get_num_threads(),
        **facts,
    }
    write_json(path.with_suffix(".json"), origin)
    return path


def kept(folder: Path, called: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table that `keep` wrote, and where it comes from."""
    return pd.read_csv(folder / f"{called}.csv"), json.loads((folder / f"{called}.json").read_text())


def peak_gib(action: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None) -> float:
    """GiB at most of resident memory (CPU) or allocated memory (GPU) of a new process that does `action` alone.

    environment: variables of that process beside this one's.

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment or {}), context.Pool(1) as pool:
        return pool.apply(_measured, (action, torch.get_num_threads(), *arguments))


def _measured(action: Callable[..., None], threads: int, *arguments: Any) -> float:
    torch.set_num_threads(threads)
    action(*arguments)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return runs.peak_memory_gib()


def use_all_cores() -> int:
    """Let torch use every core of this machine; returns how many."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    return cores
