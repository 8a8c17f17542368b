"""One `haste` command by several processes of this machine: torch's launcher starts them, and this process watches.

A process finds its number and how many there are in the launcher's environment variables RANK and WORLD_SIZE, so that
`torchrun -m haste_core.study.cli ...`, which may span several machines, does the same work.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
import yaml
from tqdm.auto import tqdm

from haste_core.errors import HasteError, Interrupted
from haste_core.processes import Processes, flag, launched, micro_batches
from haste_core.study import signals, train
from haste_core.study.runs import Run

# A stopped training process saves a checkpoint first, which may take longer than the launcher's own 30 s.
GRACE_SECONDS = 600


def launch(
    words: Sequence[str],
    processes: int,
    place: Path,
    done: Callable[[], tuple[int, int]],
    bar: tqdm,
    threads: int = 1,
) -> None:
    """Run `haste WORDS` in several processes of this machine until all of them have ended.

    Args:
        words: of the command line. processes: their number. place: a folder for their output, which is removed unless
            a process crashes. done: how much is done and of how much, shown by `bar`. threads: of each process on CPUs.

    Raises:
        HasteError: a process failed; the message is that of the first failure.
        Interrupted: SIGTERM or SIGINT arrived and was passed on to the processes.
    """
    if launched() > 1:
        raise HasteError(f"{processes} processes in one of {launched()} that were launched already; expected 1")
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".launch-", dir=place))
    failure = folder / "error.json"
    command = [
        # A rendezvous on a port that the system picks: two launches cannot meet.
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--redirects", "3", "--log-dir", str(folder / "workers"), "-m", "--", "haste_core.study.cli", *words,
    ]  # fmt: skip
    # Files of the current folder are no modules, whatever their names.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", "PYTHONSAFEPATH": "1"}
    environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_SECONDS), "TORCHELASTIC_ERROR_FILE": str(failure)}

    def show() -> None:
        count, total = done()
        bar.total = total or bar.total
        bar.update(max(0, count - bar.n))

    with signals.catch() as stopping, bar:
        with (folder / "launcher.log").open("wb") as log:
            # Ctrl-C reaches this process alone, which passes it on.
            launcher = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=signals.end_with_parent,
            )
        try:
            while launcher.poll() is None and not stopping.wait(0.2):
                show()
        finally:
            _stop(launcher)
        show()
    error = _error(folder, failure, stopping.is_set()) if launcher.returncode else None
    if str(folder) not in str(error):
        shutil.rmtree(folder)
    if error is not None:
        raise error


def _stop(launcher: subprocess.Popen[bytes]) -> None:
    """Pass a stop on to the processes, or to the launcher before it has any, and wait; no effect when all have ended.

    The launcher itself would kill them after a while, depending on torch's version.
    """
    if launcher.poll() is None:
        try:
            process = psutil.Process(launcher.pid)
            signals.terminate(process.children() or [process])
        except psutil.NoSuchProcess:
            pass  # it has ended in between
    launcher.wait()


def _error(folder: Path, failure: Path, stopped: bool) -> HasteError | Interrupted:
    """The first failure as the launcher reports it, by an exception of ours or with the place of all output."""
    text = json.loads(failure.read_text())["message"]["message"] if failure.is_file() else ""
    name, _, message = text.partition(": ")
    if name == Interrupted.__name__ or (stopped and not text):
        return Interrupted(message or "stopped; run again to go on")
    if name in ("HasteError", "InUse"):
        return HasteError(message)
    return HasteError(f"a process failed: {' '.join(text.split()) or 'it was killed'}; all output is in {folder}")


def fit(run: Run, processes: int = 1, progress: bool = True) -> None:
    """Train a run as `train.fit` does: in this process, or by several that a launcher starts on this machine.

    The teacher is prepared first where it is needed. The numbers are those of one process but for rounding, and any
    number of processes goes on from what any other number saved.

    Args:
        run: the arm, seed and directory.
        processes: how many train; on a machine with GPUs each takes one of them.
        progress: show a progress bar.

    Raises:
        HasteError: as of `train.fit`, the images of a step cannot be divided, there are too few GPUs, or a process
            failed.
        Interrupted: a signal arrived; the run is saved.
    """
    if processes > 1 and torch.cuda.is_available() and not flag("ACCELERATE_USE_CPU"):
        gpus = torch.cuda.device_count()
        if processes > gpus:
            raise HasteError(f"{processes} processes on {gpus} GPU(s), of which each needs one; expected 1 to {gpus}")
    settings = run.config.train
    micro_batches(settings.batch_size, settings.accumulate, launched() if launched() > 1 else processes)
    if processes == 1:
        together = Processes()
        train.fit(run, progress=progress, processes=together)
        together.close()
    elif run.missing_steps():
        train.prepare(run)
        run.dir.mkdir(parents=True, exist_ok=True)
        name = f"{run.arm} seed {run.seed}"
        bar = tqdm(initial=_step(run), disable=not progress, unit="step", mininterval=1.0, desc=name)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=run.dir) as study:
            yaml.safe_dump(run.study.model_dump(mode="json"), study, sort_keys=False)
            study.flush()
            words = ["train", study.name, run.arm, "--seed", str(run.seed)]
            launch(words, processes, run.dir, lambda: (_step(run), settings.steps), bar, settings.threads)


def _step(run: Run) -> int:
    """The last step in the run's log, whose last line may be in the middle of being written."""
    if not run.metrics_path.is_file():
        return 0
    *whole, _ = run.metrics_path.read_text().split("\n")
    return int(json.loads(whole[-1])["step"]) if whole else 0
