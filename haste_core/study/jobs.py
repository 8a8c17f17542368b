"""`haste study`: a study as a graph of Snakemake jobs, each one a notebook run by papermill (Snakefile).

Everything about where and how often jobs run is Snakemake's own: its options, and profiles such as workflow/slurm.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
            after = [length(other) for other, donor in donors.items() if donor == arm]
            lengths[arm] = _steps(study, arm, donors[arm]) + max(after, default=0)
        return lengths[arm]

    longest = max(map(length, study.arms))
    return {arm: 3 + round(96 * length(arm) / longest) for arm in study.arms}


def _steps(study: config.StudySettings, arm: str, donor: str | None) -> float:
    """Length of an arm's job in unaligned steps over all its seeds."""
    run = study.run(arm)
    aligned = min(run.tau, run.train.steps)
    return len(study.seeds_of(arm)) * (run.train.steps - aligned + (0 if donor else ALIGNED_STEP * aligned))


def run_study(
    study: config.StudySettings,
    name: str,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    processes: int = 1,
    options: Sequence[str] = (),
) -> Path | None:
    """Run every job of a study that is not done yet; returns the path of its report, nothing after a dry run.

    Args:
        study: as loaded from `name`, `profile` and `overrides`, which the jobs load again.
        name: a study's name or the path of its file.
        profile, overrides: as for `config.load`.
        processes: processes that train each run together.
        options: Snakemake's own options; without --workflow-profile jobs run on this machine, on all cores by default.

    Raises:
        HasteError: an arm's settings do not fit together, the processes or the data, or something is missing
            (`dry_run.check_study`); or a job failed: finished work is kept, and the next call goes on from there.
        Interrupted: a signal arrived; local runs in progress saved a checkpoint, jobs on a cluster were cancelled.
    """
    folder, report = study_dir(study), report_dir(study, profile)
    dry = bool({"--dry-run", "--dryrun", "-n"} & set(options))
    away = "--workflow-profile" in options
    check = partial(_check, study, processes, dry, away)
    own = ["--quiet", "rules"] if away else ["--retries", "1"]
    if "--cores" not in options and (dry or not away):
        # In a dry run no job shows more threads than there are cores, and a cluster has more than this machine.
        own += ["--cores", str(1000 if away else len(os.sched_getaffinity(0)))]
    command = [*graph(name, profile, overrides, processes), *own, *options]
    environment = os.environ | {"HASTE_OUTPUT": str(output_root())}
    if dry:
        _list_jobs(study, command, environment, check)
        return None
    check()
    resumed = any(folder.glob("*/seed*/checkpoints/*.safetensors"))
    with locked(folder / "study.lock", f"study {study.name}"), _watch(folder, resumed) as watched:
        # Ctrl-C reaches local jobs directly; Snakemake on a cluster gets its signal from here.
        process = subprocess.Popen(
            command, env=environment, start_new_session=away, text=True, errors="replace",
            stdout=None if away else subprocess.PIPE, stderr=None if away else subprocess.STDOUT,
        )  # fmt: skip
        progress = _Progress(study, folder / "study.log")
        with signals.catch(lambda: _stop(process.pid)) as stopping:
            try:
                if process.stdout is not None:
                    progress.follow(process.stdout)
            except BaseException:  # no room for the log, say: the jobs are not left to themselves
                _stop(process.pid)
                raise
            finally:
                status = process.wait()
    if stopping.is_set():
        how = "its jobs were cancelled" if away else "runs in progress are saved"
        raise Interrupted(f"study {study.name} stopped, {how}; run again to go on")
    if status:
        for stamp in stale(study):
            stamp.unlink()
        if not away and not progress.rules:  # it has not begun, because of an option, say
            print(progress.log.read_text(), file=sys.stderr)
        raise HasteError(
            f"study {study.name}: a job failed, see {'the lines above' if away else folder / 'study.log'} and the "
            f"executed notebooks in {report / 'notebooks'}; finished work is kept, run again to go on"
        )
    took = f"{watched['minutes']:.1f} minutes, at most {watched['peak_memory_gib']:.2f} GiB over all processes"
    print(took if away or progress.rules else "nothing was left to do")
    return report / "report.html"


def _list_jobs(
    study: config.StudySettings, command: Sequence[str], environment: Mapping[str, str], check: Callable[[], None]
) -> None:
    """Print the jobs that would run. Their graph is built while `check` runs, since both take seconds."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as building:
        try:
            check()
        except BaseException:
            building.kill()
            raise
        said = building.communicate()[0]
    if building.returncode:
        raise HasteError(f"study {study.name}: the graph of jobs cannot be built: {' '.join(said.split())[-500:]}")
    listed = counted(said)
    print(f"study {study.name}: {_count(listed)} to run", *map(_named, listed), sep="\n  ")


def _check(study: config.StudySettings, processes: int, dry: bool, away: bool) -> None:
    """Refuse a study that cannot be run, and print what its jobs will download. dry, away: as in `run_study`."""
    from haste_core.study import dry_run  # imports torch, which the Snakefile does not need

    study.check_baseline()
    allowed = [*([] if dry else [dry_run.DOWNLOAD]), *([dry_run.DEVICE] if away else [])]
    study.check_claims()
    for remark in dry_run.check_study(study, processes, allowed):
        print(f"note: {remark}", file=sys.stderr)


def stale(study: config.StudySettings) -> list[Path]:
    """Stamps of stages whose files are gone, such as scores, or checkpoints that were removed to free space.

    Without its stamp such a stage is made again by the next call.
    """
    runs = [Run(study, arm, seed) for arm in study.arms for seed in study.seeds_of(arm)]
    gone = [run for run in runs if run.missing_steps() or not run.evaluation_path.is_file()]
    found = [stamp for run in gone for stamp in run.dir.glob("trained-*.stamp")]
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
        "--rerun-triggers", "input", "mtime", "params",
        "--config", *(f"{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


def counted(printed: str) -> list[str]:
    """Rules of the jobs that Snakemake is about to run, from its first table of them."""
    table = printed.partition("Job stats:")[2].partition("\ntotal ")[0]
    return [rule for rule in re.findall(r"^([\w.]+) +\d+ *$", table, re.M) if rule != "all"]


def _count(rules: Sequence[str]) -> str:
    """The number of jobs, in words."""
    return f"{len(rules) or 'no'} job{'s' * (len(rules) != 1)}"


def _named(rule: str) -> str:
    """The name of a rule's job for people."""
    kind, _, name = rule.partition("_")
    known = {"prepare": "teacher and extractors", "step_time": "time of a step", "report": "report"}
    return known.get(rule) or {"arm": f"arm {name}", "analyse": f"notebook {name}"}.get(kind, rule)


class _Progress:
    """Snakemake's output as a line for each job that has ended, with a guess at the time left; all of it in a log."""

    def __init__(self, study: config.StudySettings, log: Path) -> None:
        self.study, self.log = study, log
        self.began: dict[str, float] = {}
        self.rules: list[str] = []
        self.ended: list[str] = []

    def follow(self, lines: Iterable[str]) -> None:
        """Read lines until there are no more."""
        begun, before = time.monotonic(), ""
        with self.log.open("w") as stream:
            for line in lines:
                stream.write(line)
                stream.flush()
                if not self.rules:
                    before += line
                    self.rules = counted(before) if line.startswith("total ") else []
                    if self.rules:
                        print(f"study {self.study.name}: {_count(self.rules)}, log {self.log}", flush=True)
                elif found := re.match(r"(?:local)?rule ([\w.]+):", line):
                    self.began[found[1]] = time.monotonic()
                elif (found := re.match(r"Finished jobid: \d+ \(Rule: ([\w.]+)\)", line)) and found[1] in self.rules:
                    self._say(found[1], time.monotonic() - begun)
                elif line.startswith("haste: error:"):
                    print(line.rstrip(), file=sys.stderr, flush=True)

    def _say(self, rule: str, elapsed: float) -> None:
        self.ended.append(rule)
        took = (time.monotonic() - self.began.get(rule, time.monotonic())) / 60
        done, whole = (sum(map(self._size, rules)) for rules in (self.ended, self.rules))
        left = elapsed / 60 * (whole / done - 1)
        more = f", about {left:.0f} min left" if left >= 1 else ""
        print(f"[{len(self.ended)}/{len(self.rules)}] {_named(rule)}: {took:.1f} min{more}", flush=True)

    def _size(self, rule: str) -> float:
        """Rough duration of a job in unaligned training steps."""
        kind, _, arm = rule.partition("_")
        return _steps(self.study, arm, self.study.donor(arm)) if kind == "arm" else self.study.train.steps


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
