"""Training one run by several processes of this machine: torch's launcher starts them, and this process watches.

The workers are `haste train` itself, on the resolved settings in a file; `haste_core.processes` is what they share.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import yaml
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from haste_core import training
from haste_core.errors import HasteError, Interrupted
from haste_core.processes import Processes, launched, micro_batches
from haste_core.study import pretrain, signals
from haste_core.study.runs import Run

# A stopped worker saves a checkpoint first, which may take longer than the launcher's own 30 s.
GRACE_SECONDS = 600


def fit(run: Run, processes: int = 1, progress: bool = True) -> None:
    """Train a run as `training.fit` does: in this process, or by several that a launcher starts on this machine.

    The teacher is prepared first where it is needed. The numbers are those of one process but for rounding, and any
    number of processes goes on from what any other number saved.

    Args:
        run: the arm, seed and directory.
        processes: how many train; on a machine with GPUs each takes one of them.
        progress: show a progress bar.

    Raises:
        HasteError: as of `training.fit`, the images of a step cannot be divided, there are too few GPUs, or a worker
            failed.
        Interrupted: a signal arrived; the run is saved.
    """
    _check(run, processes)
    if processes == 1:
        _fit_here(run, progress)
        return
    if not run.missing_steps():
        return
    _prepare(run)
    with _place(run) as place, signals.catch() as stopping:
        launcher = _start(run, processes, place)
        try:
            _watch(run, launcher, stopping, progress)
        finally:
            _stop(launcher)
        if launcher.returncode:
            raise _ending(
                place, f"{run.arm} seed {run.seed} stopped; run again to go on" if stopping.is_set() else None
            )


def _fit_here(run: Run, progress: bool) -> None:
    """Train in this process, alone or as one of those that a launcher started."""
    together = Processes()
    together.from_main(lambda: _prepare(run))
    training.fit(run, progress=progress, processes=together)
    together.close()


def _prepare(run: Run) -> None:
    if run.config.alignment.active and run.missing_steps():
        pretrain.prepare_teacher(run.study, run.config.teacher)


def _check(run: Run, processes: int) -> None:
    if processes != 1 and launched() > 1:
        raise HasteError(f"{processes} processes in one of {launched()} that were launched already; possible: 1")
    if processes > 1 and torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        gpus = torch.cuda.device_count()
        if processes > gpus:
            raise HasteError(f"{processes} processes on {gpus} GPU(s), of which each needs one; possible: 1 to {gpus}")
    micro_batches(run.config.train, launched() if launched() > 1 else processes)


@contextmanager
def _place(run: Run) -> Iterator[Path]:
    """A folder beside the run for its settings and the workers' output; it stays where they failed unforeseen."""
    run.dir.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="launch-", dir=run.dir))
    keep = False
    try:
        yield place
    except HasteError as error:
        keep = str(place) in str(error)
        raise
    finally:
        if not keep:
            shutil.rmtree(place)


def _start(run: Run, processes: int, place: Path) -> subprocess.Popen[bytes]:
    study = place / "study.yaml"
    study.write_text(yaml.safe_dump(run.study.model_dump(mode="json"), sort_keys=False))
    command = [
        # A rendezvous of its own on a port that the system picks: two launches cannot meet.
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--redirects", "3", "--log-dir", str(place / "workers"),
        "-m", "haste_core.study.cli", "train", str(study), run.arm, "--seed", str(run.seed),
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(run.config.train.threads), **os.environ}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(GRACE_SECONDS)
    with (place / "launcher.log").open("wb") as log:
        # A stop on the terminal reaches this process alone, which passes it on.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _watch(run: Run, launcher: subprocess.Popen[bytes], stopping: threading.Event, progress: bool) -> None:
    """Wait until the launcher ends or a signal arrives, while a bar follows the run's log."""
    with tqdm(
        total=run.config.train.steps, initial=_step(run), disable=not progress, unit="step", mininterval=1.0,
        desc=f"{run.arm} seed {run.seed}",
    ) as bar:  # fmt: skip
        while launcher.poll() is None and not stopping.wait(0.5):
            bar.update(max(0, _step(run) - bar.n))
        bar.update(max(0, _step(run) - bar.n))


def _step(run: Run) -> int:
    """The last step in the run's log, whose last line may be in the middle of being written."""
    if not run.metrics_path.is_file():
        return 0
    *whole, _ = run.metrics_path.read_text().split("\n")
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _stop(launcher: subprocess.Popen[bytes]) -> None:
    """Pass a stop on to the workers, or to the launcher before it has any, and wait; nothing when all have ended."""
    if launcher.poll() is None:
        try:
            process = psutil.Process(launcher.pid)
            signals.terminate(process.children() or [process])
        except psutil.NoSuchProcess:
            pass  # it ended before us, which is what we want of it
    launcher.wait()


def _ending(place: Path, stopped: str | None) -> HasteError | Interrupted:
    """Why the workers ended: the error they name, that they saved and left, or the last words of the first that fell.

    stopped: what to say where they were stopped and name nothing.
    """
    logs = sorted(place.glob("workers/**/stderr.log"), key=lambda log: log.stat().st_mtime)
    said = [log.read_text(errors="replace").splitlines() for log in [*logs, place / "launcher.log"]]
    named = [line for lines in said for line in lines if line.startswith("haste: ")]
    errors = [line.removeprefix("haste: error: ") for line in named if line.startswith("haste: error: ")]
    if errors:
        return HasteError(errors[0])
    if named or stopped:
        return Interrupted(named[0].removeprefix("haste: ") if named else stopped)
    last = next((line.strip() for lines in said for line in reversed(lines) if line.strip()), "it said nothing")
    return HasteError(f"a process of the training failed: {last}; all they said is in {place}")
