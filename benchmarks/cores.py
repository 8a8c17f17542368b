"""The best use of this machine's cores for small models: threads of a run, runs side by side, train.compile."""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import pandas as pd
import torch

from benchmarks import machine
from haste_core.study import config, cost
from haste_core.study.train import create
from haste_core.training import Trainer

STEPS = 20


def measure(rounds: int) -> pd.DataFrame:
    """Seconds per step of the digits study's vanilla arm, by how the cores are used.

    Returns:
        runs (side by side), threads (of each), compiled, seconds (of a step, divided by the runs: what a study of many
        runs pays), ratio, low, high (to one run with one thread), compile_s (seconds that compiling took first; the
        steps after which it has paid for itself are compile_s over what a step of one run saves), cached_s (what it
        takes a later process, which finds the kernels on disk), rounds.
    """
    cores = machine.use_all_cores()
    with workers(cores) as running:
        cold, cached = (max(_ask(part, "compile", 1), default=math.nan) for part in (running[:1], running[1:]))
        some = sorted({1, cores})
        ways = [(runs, threads, compiled) for runs in some for threads in some for compiled in (False, True)]
        actions: dict[Any, Callable[[], object]]
        actions = {w: partial(_ask, running[: w[0]], "compiled" if w[2] else "plain", w[1]) for w in ways}
        timed = cost.interleaved(actions, (1, 1, False), rounds, label="cores")
    rows = []
    for (runs, threads, compiled), t in timed.items():
        facts = {"runs": runs, "threads": threads, "compiled": compiled, "seconds": t.seconds / STEPS / runs}
        facts |= {"ratio": t.ratio / runs, "low": t.low / runs, "high": t.high / runs}
        facts |= {"compile_s": cold, "cached_s": cached} if compiled else {"compile_s": 0.0, "cached_s": 0.0}
        rows.append(facts | {"rounds": rounds})
    return pd.DataFrame(rows)


@contextmanager
def workers(count: int) -> Iterator[list[Connection]]:
    """Connections to `count` processes, each with a plain and a compiled training state of its own."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=_serve, args=(there,), daemon=True) for _, there in pairs]
    # Compiled kernels of earlier processes would be found.
    with tempfile.TemporaryDirectory() as kernels, mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": kernels}):
        for process, (_, there) in zip(processes, pairs, strict=True):
            process.start()
            there.close()  # the process has its own; so that its end is noticed here
        try:
            yield [here for here, _ in pairs]
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _ask(running: list[Connection], what: str, threads: int) -> list[float]:
    """Let these processes do the same at the same time; returns the seconds of each."""
    for connection in running:
        connection.send((what, threads))
    return [connection.recv() for connection in running]


def _serve(connection: Connection) -> None:
    plain, compiled = (_state(compiled) for compiled in (False, True))
    while True:
        what, threads = connection.recv()
        begun = time.perf_counter()
        if what == "compile":
            compiled.train_step()
        else:
            torch.set_num_threads(threads)
            for _ in range(STEPS):
                (plain if what == "plain" else compiled).train_step()
        connection.send(time.perf_counter() - begun)


def _state(compiled: bool) -> Trainer:
    return create(config.load("digits", None, [f"train.compile={compiled}"]).run("vanilla"), 0, None)
