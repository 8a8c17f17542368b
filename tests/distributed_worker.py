"""Two processes for tests/test_distributed.py, which train several runs together on gloo, one after the other.

python distributed_worker.py FOLDER TASKS: a JSON list of [name, settings], each a run of the arm `haste` under
FOLDER/name; the outcomes go to FOLDER/outcome-INDEX.json. In the run "stopped" a signal reaches the second process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from haste_core.errors import HasteError, Interrupted
from haste_core.processes import Processes
from haste_core.study import config
from haste_core.study.runs import Run
from haste_core.study.train import fit


def work(index, folder, name, settings, together):
    """Outcome of one run: "done", or the error's name and text."""

    def on_step(trainer):
        if (name, index, trainer.step) == ("stopped", 1, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    os.environ["HASTE_OUTPUT"] = str(folder / name)
    AcceleratorState._reset_state()  # each run has a precision of its own
    torch.manual_seed(index)
    try:
        fit(Run(config.load("digits", overrides=settings), "haste", 0), on_step, progress=False, processes=together)
    except (HasteError, Interrupted) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def process(index, folder, tasks):
    os.environ |= {"ACCELERATE_USE_CPU": "true", "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    # They meet in a file: there is no port that could be taken.
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=index, world_size=2)
    together = Processes()
    # Graphs as ever, without kernels of their own, which take long to make.
    torch.compile = partial(torch.compile, backend="aot_eager")
    outcomes = {name: work(index, folder, name, settings, together) for name, settings in tasks}
    (folder / f"outcome-{index}.json").write_text(json.dumps(outcomes))
    together.close()


if __name__ == "__main__":
    folder, tasks = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Importing takes far longer than the tasks: it is done once, before there is a thread or a gradient.
    forking = multiprocessing.get_context("fork")
    processes = [forking.Process(target=process, args=(index, folder, tasks), daemon=True) for index in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    sys.exit(any(one.exitcode for one in processes))
