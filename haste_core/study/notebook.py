"""Runs a notebook by papermill as a job: parameters checked first, one clear line on failure, SIGTERM passed on."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from jupyter_client.manager import AsyncKernelManager
from traitlets import default

from haste_core.errors import HasteError, Interrupted, unknown
from haste_core.files import project_root
from haste_core.study import explore, signals


def notebooks() -> list[str]:
    """Names of the project's notebooks."""
    return sorted(p.stem for p in (project_root() / "notebooks").glob("*.ipynb"))


def find(name: str) -> Path:
    """The path of a notebook given by name or path."""
    path = Path(name) if name.endswith(".ipynb") else project_root() / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise unknown("notebook", name, notebooks())
    return path


def _papermill() -> ModuleType:
    # jsonschema, with which notebooks are validated, would build a grammar of IRIs first, for two seconds of every job.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import papermill

    return papermill


def check_parameters(path: Path, parameters: Mapping[str, Any]) -> None:
    """Raise HasteError when the notebook has no such parameter; papermill itself only warns."""
    papermill = _papermill()
    try:
        known = papermill.inspect_notebook(str(path))
    except ValueError as error:
        raise HasteError(f"notebook {path}: {error}; possible: save it in JupyterLab with a Python kernel") from error
    for name in parameters:
        if name not in known:
            raise unknown(f"parameter of notebook {path.stem}", name, known)


def execute(name: str, output: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook with papermill and keep the executed copy, also when a cell fails.

    Args:
        name: the notebook's name, such as "01_train", or its path.
        output: where the executed notebook goes.
        parameters: values for its cell tagged `parameters`; relative paths are seen from the current folder.

    Raises:
        HasteError: a parameter does not exist, or a cell raised (its message is passed on).
        Interrupted: a signal arrived; the cell in progress saved what it had.
    """
    papermill = _papermill()
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    path = find(name)
    check_parameters(path, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ[explore.BATCH] = "1"  # kernels inherit it
    with signals.catch(_stop_kernel) as stopping, tempfile.TemporaryDirectory(prefix="haste-") as sockets:
        try:
            papermill.execute_notebook(
                str(path), str(output), parameters=dict(parameters), kernel_name="python3", progress_bar=False,
                cwd=str(Path.cwd()), kernel_manager_class=kernel_manager(sockets),
                # What kernels log about their own shutdown is noise beside a one-line error.
                extra_arguments=["--Application.log_level=50"],
            )  # fmt: skip
        except PapermillExecutionError as error:
            message = " ".join(error.evalue.split())
            if stopping.is_set() or error.ename == "Interrupted":
                raise Interrupted(message) from error
            kind = "" if error.ename == "HasteError" else f"{error.ename}: "
            raise HasteError(f"{path.stem}: {kind}{message}") from error
        except DeadKernelError as error:
            if stopping.is_set():
                raise Interrupted(f"{path.stem} was stopped") from error
            raise HasteError(f"{path.stem}: the kernel died, often for want of memory; see {output}") from error


def kernel_manager(sockets: str) -> type[AsyncKernelManager]:
    """A manager that talks to its kernel through files in the folder `sockets`.

    Kernels that start side by side cannot race for a port then. The folder has to be the notebook's own: by default
    jupyter_client names the files after the working directory, and kernels started there get each other's messages.
    """

    class IpcKernelManager(AsyncKernelManager):
        transport = "ipc"

        @default("ip")
        def _own_folder(self) -> str:
            return str(Path(sockets) / "kernel")

    return IpcKernelManager


def _stop_kernel() -> None:
    """A kernel takes SIGINT for itself; SIGTERM makes training in it save and leave."""
    signals.terminate(psutil.Process().children(recursive=True))
