"""`haste study`: runs a study's graph with Snakemake, watches time and memory, and ends with the report's path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked, output_root, project_root, write_json
from haste_core.study import cluster, config, signals
from haste_core.study.runs import report_dir, study_dir

# Cost of an aligned step relative to an unaligned one, for the order of jobs alone.
ALIGNED_STEP = 1.5


def stamp_hash(run: config.RunConfig) -> str:
    """Part of the name of an arm's stamps: it changes when the run should go further or keep other steps."""
    return config.digest(run.train.kept_steps)


def priorities(study: config.Study, donors: Mapping[str, str | None]) -> dict[str, int]:
    """Priority of each arm's job, 3 to 99: proportional to the longest chain of jobs that begins with it.

    A chain is an arm, an arm that branches from it, and so on; its length is counted in unaligned steps over all seeds.

    Args:
        donors: the arm that each arm branches from (`Study.donor`).
    """
    lengths: dict[str, float] = {}

    def length(arm: str) -> float:
        if arm not in lengths:
            after = [length(other) for other, donor in donors.items() if donor == arm]
            lengths[arm] = _steps(study, arm, donors[arm] is not None) + max(after, default=0)
        return lengths[arm]

    longest = max(map(length, study.arms))
    return {arm: 3 + round(96 * length(arm) / longest) for arm in study.arms}


def _steps(study: config.Study, arm: str, branches: bool) -> float:
    """Training steps of an arm's job over all seeds, in unaligned steps, without those it takes over from its donor."""
    run = study.run(arm)
    aligned = min(run.tau, run.train.steps)
    own = run.train.steps - aligned + (0 if branches else ALIGNED_STEP * aligned)
    return len(study.seeds_of(arm)) * own


def run_study(
    study: config.Study,
    name: str,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    cores: int | None = None,
    dry_run: bool = False,
    processes: int = 1,
    on: str | None = None,
) -> Path:
    """Do everything of a study that is not done yet; returns the path of its report.

    Args:
        study: as loaded from `name`, `profile` and `overrides`, which the jobs load again.
        name: a study's name or the path of its file.
        profile, overrides: as for `config.load`.
        cores: jobs at a time; all cores of this process by default. A cluster's profile says itself how many.
        dry_run: print the jobs that would run, and run none.
        processes: how many train each run together, as for `launching.fit`.
        on: the cluster whose nodes run the jobs, as for `cluster.find`; this machine by default.

    Raises:
        HasteError: a number or the cluster cannot be used, or a job failed; what the others computed is kept, and the
            next call goes on from there.
        Interrupted: a signal arrived; runs in progress saved a checkpoint, on a cluster as far as it gave them time.
    """
    study.check_baseline()
    study.check_claims()
    folder = study_dir(study)
    _check(study, cores, processes, on)
    place = cluster.find(on) if on else None
    command = graph(name, profile, overrides, processes, place) + _where(place, cores, dry_run)
    away = place is not None and place.remote
    environment = os.environ | {"HASTE_OUTPUT": str(output_root())}
    if dry_run:
        if subprocess.run([*command, "--dry-run"], env=environment).returncode:
            raise HasteError(f"study {study.name}: the graph could not be built; the lines above say why")
        return report_dir(study, profile) / "report.html"
    with locked(folder / "study.lock", f"study {study.name}"), watch(folder, _done_before(study)) as watched:
        # A stop on the terminal reaches a graph of local jobs as a whole; one on a cluster is told by us alone.
        process = subprocess.Popen(command, env=environment, start_new_session=away)
        with signals.catch(lambda: _stop_graph(process.pid, away)) as stopping:
            status = process.wait()
    if stopping.is_set() and away:
        raise Interrupted(f"study {study.name} stopped and its jobs were cancelled; run again to go on")
    if stopping.is_set():
        raise Interrupted(f"study {study.name} stopped, runs in progress are saved; run again to go on")
    if status:
        raise HasteError(
            f"study {study.name}: a job failed (the lines above say which and why; executed notebooks lie in "
            f"{report_dir(study, profile) / 'notebooks'}); what was computed is kept, run again to go on"
        )
    print(f"{watched['minutes']:.1f} minutes, at most {watched['peak_memory_gib']:.2f} GiB over all processes")
    return report_dir(study, profile) / "report.html"


def graph(
    name: str,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    processes: int = 1,
    place: cluster.Cluster | None = None,
) -> list[str]:
    """The command that runs a study's graph, but for Snakemake's options on where; arguments as for `run_study`."""
    # Snakemake works in the output's root; jobs work here, where relative paths in the settings are seen from.
    given = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
    settings = {
        "study": given, "profile": profile or "", "overrides": json.dumps(list(overrides)), "here": Path.cwd(),
        "output": output_root(), **cluster.as_config(place, processes),
    }  # fmt: skip
    return [
        sys.executable, "-m", "snakemake", "--snakefile", str(project_root() / "Snakefile"),
        "--directory", str(output_root()), "--rerun-incomplete", "--keep-going", "--nolock",
        "--rerun-triggers", "input", "mtime", "params", "--quiet", "rules",
        "--config", *(f"{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


def _check(study: config.Study, cores: int | None, processes: int, on: str | None) -> None:
    """Raise HasteError for numbers that no job could work with."""
    if cores is not None and cores < 1:
        raise HasteError(f"--cores {cores}; possible: 1 and above")
    if cores is not None and on:
        raise HasteError(f"--cores {cores} with --on {on}; possible: one of them, a profile says `jobs`")
    if processes < 1:
        raise HasteError(f"--processes {processes}; possible: 1 and above")
    if processes > 1:
        from haste_core.processes import micro_batches

        for arm in study.arms:
            train = study.run(arm).train
            micro_batches(train.batch_size, train.accumulate, processes)


def _where(place: cluster.Cluster | None, cores: int | None, dry_run: bool) -> list[str]:
    """Snakemake's options for where jobs run, and how many at a time.

    A dry run of a cluster's graph works without the cluster's plugins, where only the profile's own words go unread.
    """
    if place is None or (dry_run and place.missing_plugins()):
        return ["--cores", str(cores or len(os.sched_getaffinity(0)))]
    return place.options(dry_run)


def _done_before(study: config.Study) -> bool:
    return any(study_dir(study).glob("*/seed*/checkpoints/*.safetensors"))


@contextmanager
def watch(folder: Path, resumed: bool, interval: float = 3.0) -> Iterator[dict[str, Any]]:
    """While open, folder/invocation.json holds the minutes so far and the peak memory of all processes below this one.

    Memory is the sum of proportional set sizes (shared pages counted once), in GiB, where the system tells them.
    """
    begun, ended = time.monotonic(), threading.Event()
    facts: dict[str, Any] = {"minutes": 0.0, "peak_memory_gib": 0.0, "resumed": resumed}
    install = Path(sys.prefix) / "install_minutes"
    if install.is_file():
        facts["install_minutes"] = float(install.read_text())

    def look() -> None:
        while not ended.is_set():
            facts["minutes"] = round((time.monotonic() - begun) / 60, 3)
            facts["peak_memory_gib"] = round(max(facts["peak_memory_gib"], memory_gib()), 3)
            write_json(folder / "invocation.json", facts)
            ended.wait(interval)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield facts
    finally:
        ended.set()
        watcher.join()


def memory_gib() -> float:
    """Memory in GiB of this process and all below it, shared pages counted once where the system tells."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            full = process.memory_full_info()
            total += getattr(full, "pss", 0) or full.rss
        except psutil.Error:
            continue  # it ended while we looked
    return total / 2**30


def _stop_graph(pid: int, away: bool = False) -> None:
    """Snakemake starts no more jobs and waits for those that run; these save and leave. On a cluster it cancels them.

    What is cancelled gets SIGTERM and saves, too, if the cluster waits long enough before it kills.
    """
    try:
        scheduler = psutil.Process(pid)
        if away:
            scheduler.send_signal(signal.SIGINT)
            return
        jobs = [child for child in scheduler.children(recursive=True) if _is_notebook_job(child)]
    except psutil.NoSuchProcess:
        return  # the graph had ended by itself
    signals.terminate([scheduler, *jobs])


def _is_notebook_job(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False  # it ended while we looked
    return "haste_core.study.cli" in words and "notebook" in words
