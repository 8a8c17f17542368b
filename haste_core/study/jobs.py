"""`haste study`: a study as a graph of Snakemake jobs, each one a notebook run by papermill (Snakefile).

Everything about where and how often jobs run is Snakemake's own: its options, and profiles such as workflow/slurm.
"""

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
from haste_core.files import locked, output_root, write_json
from haste_core.study import config, signals
from haste_core.study.runs import Run, autoencoder_path, extractor_path, report_dir, study_dir, teacher_path

# Cost of an aligned step relative to an unaligned one, for the order of jobs alone.
ALIGNED_STEP = 1.5


def stamp_hash(run: config.RunSettings) -> str:
    """Part of the name of an arm's stamps, which changes with the steps that the run keeps."""
    return config.digest(run.train.kept_steps)


def priorities(study: config.StudySettings, donors: Mapping[str, str | None]) -> dict[str, int]:
    """Priority of each arm's job, 3 to 99: proportional to the longest chain of jobs that begins with it.

    A chain is an arm, an arm that branches from it, and so on; its length is counted in unaligned steps over all seeds.
    donors: the arm that each arm branches from (`StudySettings.donor`).
    """
    lengths: dict[str, float] = {}

    def length(arm: str) -> float:
        if arm not in lengths:
            run = study.run(arm)
            aligned = min(run.tau, run.train.steps)
            own = run.train.steps - aligned + (0 if donors[arm] else ALIGNED_STEP * aligned)
            after = [length(other) for other, donor in donors.items() if donor == arm]
            lengths[arm] = len(study.seeds_of(arm)) * own + max(after, default=0)
        return lengths[arm]

    longest = max(map(length, study.arms))
    return {arm: 3 + round(96 * length(arm) / longest) for arm in study.arms}


def run_study(
    study: config.StudySettings,
    name: str,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    processes: int = 1,
    options: Sequence[str] = (),
) -> Path:
    """Run every job of a study that is not done yet; returns the path of its report.

    Args:
        study: as loaded from `name`, `profile` and `overrides`, which the jobs load again.
        name: a study's name or the path of its file.
        profile, overrides: as for `config.load`.
        processes: processes that train each run together.
        options: Snakemake's own options; without --workflow-profile jobs run on this machine, on all cores by default.

    Raises:
        HasteError: an arm's settings do not fit together, the processes or the data; or a job failed: finished work is
            kept, and the next call goes on from there.
        Interrupted: a signal arrived; local runs in progress saved a checkpoint, jobs on a cluster were cancelled.
    """
    from haste_core.study.dry_run import check_study  # imports torch, which the Snakefile does not need

    study.check_baseline()
    study.check_claims()
    check_study(study, processes)
    folder, report = study_dir(study), report_dir(study, profile)
    dry = bool({"--dry-run", "--dryrun", "-n"} & set(options))
    away = "--workflow-profile" in options
    own = [] if away else ["--retries", "1"]
    if "--cores" not in options and (dry or not away):
        # In a dry run no job shows more threads than there are cores, and a cluster has more than this machine.
        own += ["--cores", str(1000 if away else len(os.sched_getaffinity(0)))]
    command = [*graph(name, profile, overrides, processes), *own, *options]
    environment = os.environ | {"HASTE_OUTPUT": str(output_root())}
    if dry:
        if subprocess.run(command, env=environment).returncode:
            raise HasteError(f"study {study.name}: the graph of jobs cannot be built; see the lines above")
        return report / "report.html"
    resumed = any(folder.glob("*/seed*/checkpoints/*.safetensors"))
    with locked(folder / "study.lock", f"study {study.name}"), _watch(folder, resumed) as watched:
        # Ctrl-C reaches local jobs directly; Snakemake on a cluster gets its signal from here.
        process = subprocess.Popen(command, env=environment, start_new_session=away)
        with signals.catch(lambda: _stop(process.pid)) as stopping:
            status = process.wait()
    if stopping.is_set():
        how = "its jobs were cancelled" if away else "runs in progress are saved"
        raise Interrupted(f"study {study.name} stopped, {how}; run again to go on")
    if status:
        for stamp in stale(study):
            stamp.unlink()
        raise HasteError(
            f"study {study.name}: a job failed, see the lines above and the executed notebooks in "
            f"{report / 'notebooks'}; finished work is kept, run again to go on"
        )
    print(f"{watched['minutes']:.1f} minutes, at most {watched['peak_memory_gib']:.2f} GiB over all processes")
    return report / "report.html"


def stale(study: config.StudySettings) -> list[Path]:
    """Stamps of stages whose files are gone, such as checkpoints that were removed to free space.

    Without its stamp such a stage is made again by the next call.
    """
    runs = [Run(study, arm, seed) for arm in study.arms for seed in study.seeds_of(arm)]
    found = [stamp for run in runs if run.missing_steps() for stamp in run.dir.glob("trained-*.stamp")]
    trained = [teacher_path(study, teacher) for teacher in study.teachers() if teacher.weights == "pretrain"]
    if study.evaluate.suite == "study":
        trained += [extractor_path(study), autoencoder_path(study)]
    if not all(path.is_file() for path in trained):
        found += study_dir(study).glob("prepared-*.json")
    return found


def graph(name: str, profile: str | None = None, overrides: Sequence[str] = (), processes: int = 1) -> list[str]:
    """Snakemake's command for the graph of a study, without options on where jobs run; arguments as in `run_study`."""
    # Snakemake works in the output's root; jobs work here, where relative paths in the settings start.
    given = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
    settings = {
        "study": given, "profile": profile or "", "overrides": json.dumps(list(overrides)), "here": Path.cwd(),
        "output": output_root(), "processes": processes,
    }  # fmt: skip
    return [
        # -P: files of the current folder are no modules, whatever their names.
        sys.executable, "-P", "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile")),
        "--directory", str(output_root()), "--rerun-incomplete", "--keep-going", "--nolock",
        "--rerun-triggers", "input", "mtime", "params", "--quiet", "rules",
        "--config", *(f"{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


@contextmanager
def _watch(folder: Path, resumed: bool) -> Iterator[dict[str, Any]]:
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
            facts["peak_memory_gib"] = round(max(facts["peak_memory_gib"], _memory_gib()), 3)
            write_json(folder / "invocation.json", facts)
            ended.wait(3.0)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield facts
    finally:
        ended.set()
        watcher.join()


def _memory_gib() -> float:
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            full = process.memory_full_info()
            total += getattr(full, "pss", 0) or full.rss
        except psutil.Error:
            continue  # it has ended
    return total / 2**30


def _stop(pid: int) -> None:
    """Stop local notebook jobs, which save first, and Snakemake; without local jobs it cancels those on the cluster.

    A cluster sends SIGTERM to cancelled jobs, which save too if it waits long enough before it kills.
    """
    try:
        scheduler = psutil.Process(pid)
        jobs = [child for child in scheduler.children(recursive=True) if _is_notebook_job(child)]
        if jobs:
            signals.terminate([scheduler, *jobs])
        else:
            scheduler.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        return  # the graph has ended by itself


def _is_notebook_job(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False  # it has ended
    return "haste_core.study.cli" in words and "notebook" in words
