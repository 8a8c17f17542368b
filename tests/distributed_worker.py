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
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from haste_core.errors import HasteError, Interrupted
from haste_core.processes import Processes
from haste_core.study import config
from haste_core.study.runs import Run
from haste_core.study.train import fit


def stop(index, _folder=None):
    """The second process gets a signal after step 3."""

    def on_step(state):
        if state.step == 3 and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def measure(index, folder):
    """How many values lie in this process and how many there are, after steps 1 and 5: FOLDER/parts-INDEX.json."""
    found = {}

    def on_step(state):
        projector = state.alignment.projector if state.alignment else None
        kinds = {
            "weights": state.model.parameters(),
            "average": state.ema.parameters(),
            "projector": projector.parameters() if projector else (),
            "moments": (s[k] for o in state.optimizers for s in o.state.values() for k in ("exp_avg", "exp_avg_sq")),
        }
        if state.step in (1, 5):
            parts = {kind: [(local(t).numel(), t.numel()) for t in tensors] for kind, tensors in kinds.items()}
            found[state.step] = {kind: [sum(n) for n in zip(*sizes, strict=True)] for kind, sizes in parts.items()}
            (folder / f"parts-{index}.json").write_text(json.dumps(found))

    return on_step


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def work(index, folder, name, settings, happens, together):
    """What came of one run: "done", or the error's name and text."""
    os.environ["HASTE_OUTPUT"] = str(folder / name)
    AcceleratorState._reset_state()  # each run has a precision of its own
    # The teacher's weights are random; the second process draws others and has to get the first one's.
    torch.manual_seed(index)
    try:
        run = Run(config.load("digits", overrides=settings), "haste", 0)
        if happens == "stop and go on":
            with suppress(Interrupted):
                fit(run, on_step=stop(index), progress=False, processes=together)
        on_step = {"stop": stop, "measure": measure}.get(happens, lambda *_: None)(index, folder / name)
        fit(run, on_step=on_step, progress=False, processes=together)
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
