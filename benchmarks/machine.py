"""The machine a benchmark runs on: its name, its matrix rate, its memory, and where its tables go."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from haste_core.files import write_json, write_text
from haste_core.study import runs
from haste_core.study.estimate import Example

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


def forget() -> None:
    """Let what comes next in this process have a precision and compiled graphs of its own."""
    AcceleratorState._reset_state()
    torch.compiler.reset()


def use_all_cores() -> int:
    """Let torch use every core of this machine; returns how many."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    return cores


def matrix_rate(precision: str, device: str = "cuda", repeats: int = 7) -> float:
    """FLOP/s of large square matrix products on a device in the precision of a run, the median of `repeats` times."""
    side, products = (4096, 10) if device == "cuda" else (1024, 1)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(repeats + 2):  # the first two warm up
        begun = time.perf_counter()
        for _ in range(products):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return 2 * side**3 * products / statistics.median(taken[2:])


def write_pairs(folder: Path, example: Example, count: int) -> None:
    """Fill a folder with `count` pairs of a noise image and a noise latent in two classes, in REPA's layout."""
    rng = np.random.default_rng(0)
    for side, name in (("images", "img{:08d}.png"), ("vae-sd", "img-mean-std-{:08d}.npy")):
        (folder / side / "00000").mkdir(parents=True)
        names = [f"00000/{name.format(i)}" for i in range(count)]
        write_json(folder / side / "dataset.json", {"labels": [[name, i % 2] for i, name in enumerate(names)]})
        for path in (folder / side / name for name in names):
            if side == "images":
                pixels = rng.integers(0, 256, (example.image_size, example.image_size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path, compress_level=1)
            else:
                np.save(path, rng.random((2 * example.channels, example.size, example.size), dtype=np.float32))
