"""Two processes for tests/test_distributed.py, which train several runs together on gloo, one after the other.

python distributed_worker.py FOLDER TASKS: a JSON list of [name, settings, what happens], each a run of the arm `haste`
under FOLDER/name; what came of them goes to FOLDER/outcome-INDEX.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

from haste_core import config
from haste_core.errors import HasteError, Interrupted
from haste_core.processes import Processes
from haste_core.runs import Run
from haste_core.training import fit


def stop(index):
    """The second process gets a signal after step 3."""

    def on_step(state):
        if state.step == 3 and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def work(index, folder, name, settings, happens, together):
    """What came of one run: "done", or the error's name and text."""
    os.environ["HASTE_OUTPUT"] = str(folder / name)
    # The teacher's weights are random; the second process draws others and has to get the first one's.
    torch.manual_seed(index)
    try:
        run = Run(config.load("digits", overrides=settings), "haste", 0)
        fit(run, on_step=stop(index) if happens == "stop" else None, progress=False, processes=together)
    except (HasteError, Interrupted) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def process(index, folder, tasks):
    os.environ |= {"ACCELERATE_USE_CPU": "true", "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    # They meet in a file: there is no port that could be taken.
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=index, world_size=2)
    together = Processes()
    outcomes = {task[0]: work(index, folder, *task, together) for task in tasks}
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
