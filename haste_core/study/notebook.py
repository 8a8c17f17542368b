"""Notebooks as jobs: executed by papermill with checked parameters; interactive figures in JupyterLab."""

from __future__ import annotations

import ast
import datetime
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from haste_core.errors import HasteError, Interrupted, unknown
from haste_core.files import notebooks_folder
from haste_core.study import signals

# Set for kernels that papermill starts: there `explore` draws a figure instead of widgets.
BATCH = "HASTE_BATCH"


def notebooks() -> list[str]:
    """Names of the project's notebooks."""
    return sorted(p.stem for p in notebooks_folder().glob("*.ipynb"))


def execute(name: str, output: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook with papermill and keep the executed copy, also if a cell fails.

    Args:
        name: the notebook's name, such as "01_train", or its path. output: path of the executed notebook.
        parameters: values for its cell tagged `parameters`; relative paths start at the current folder.

    Raises:
        HasteError: no such notebook or parameter, or a cell raised (its message is passed on).
        Interrupted: a signal arrived; the cell in progress saved its state.
    """
    import papermill
    import psutil
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    path = Path(name) if name.endswith(".ipynb") else notebooks_folder() / f"{name}.ipynb"
    if not path.is_file():
        raise unknown("notebook", name, notebooks())
    given = _checked(path, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ[BATCH] = "1"  # kernels inherit it
    arguments = ["--Application.log_level=50"]  # kernels log about their own shutdown
    if path.parent == notebooks_folder():  # files of the current folder are modules for a user's own notebook alone
        arguments.append("--InteractiveShellApp.ignore_cwd=True")

    def stop_kernel() -> None:
        # A kernel handles SIGINT itself; SIGTERM makes training in it save and end.
        signals.terminate(psutil.Process().children(recursive=True))

    with signals.catch(stop_kernel) as stopping, tempfile.TemporaryDirectory(prefix="haste-") as sockets:
        try:
            papermill.execute_notebook(
                str(path), str(output), parameters=given, kernel_name="python3", progress_bar=False,
                cwd=str(Path.cwd()), kernel_manager_class=_kernel_manager(sockets),
                extra_arguments=arguments,
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
            raise HasteError(f"{path.stem}: the kernel died, often because memory ran out; see {output}") from error


def _checked(path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as papermill takes them."""
    known = parameters_of(path)
    given = {}
    for parameter, value in parameters.items():
        if parameter not in known:  # papermill itself only warns
            raise unknown(f"parameter of notebook {path.stem}", parameter, known)
        given[parameter] = str(value) if isinstance(value, datetime.date) else value
        try:
            json.dumps(given[parameter], allow_nan=False)
        except (ValueError, TypeError) as error:
            raise HasteError(
                f"parameter {parameter}={value}; expected finite numbers, text, lists or mappings"
            ) from error
    return given


def parameters_of(path: Path) -> list[str]:
    """Names that the cell tagged `parameters` of a notebook assigns.

    Raises:
        HasteError: it is no notebook of Python code with such a cell.
    """
    import nbformat

    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT)
        written = int(notebook.nbformat)
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        cause = " ".join(str(error).split())[:200]
        raise HasteError(f"{path} is no notebook that can be read ({cause}); save it in JupyterLab") from error
    if written < 4:
        raise HasteError(f"{path} is a notebook of format {written}; expected 4: open and save it in JupyterLab")
    facts = notebook.metadata
    language = facts.get("kernelspec", {}).get("language") or facts.get("language_info", {}).get("name", "python")
    if language != "python":
        raise HasteError(f"{path} has a kernel of language {language!r}; expected Python")
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if not cells:
        raise HasteError(f"{path} has no cell tagged `parameters`; tag the cell of its settings so in JupyterLab")
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise HasteError(f"{path}: the cell tagged `parameters` is no Python ({error.msg})") from error
    targets = [t for s in statements for t in getattr(s, "targets", [getattr(s, "target", None)])]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _kernel_manager(sockets: str) -> type:
    """A kernel manager class with IPC sockets in the folder `sockets`, one folder for each notebook.

    Kernels that start at the same time then cannot race for a port, nor receive each other's messages.
    """
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class IpcKernelManager(AsyncKernelManager):
        transport = "ipc"

        @default("ip")
        def _own_folder(self) -> str:
            return str(Path(sockets) / "kernel")

    return IpcKernelManager


def explore(draw: Callable[..., Any], start: dict[str, Any] | None = None, **choices: Sequence[Any]) -> Any:
    """An interactive figure with one control for each argument in JupyterLab, a static one under papermill.

    Args:
        draw: function from one value per choice to a Figure. start: initial values, by default the first ones.
        choices: the values of each argument. Increasing numbers become a slider, everything else a menu.

    Raises:
        HasteError: an initial value is not among the values of its choice.
    """
    begin = {name: (start or {}).get(name, values[0]) for name, values in choices.items()}
    for name, value in begin.items():
        if value not in choices[name]:
            raise unknown(f"start value of {name}", value, choices[name])
    if os.environ.get(BATCH):
        return draw(**begin)
    import ipywidgets
    from IPython.display import display

    controls = {}
    for name, values in choices.items():
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        given = {"options": list(values), "value": begin[name], "description": name}
        if numbers and len(values) > 1 and list(values) == sorted(values):
            controls[name] = ipywidgets.SelectionSlider(**given, continuous_update=False)
        else:
            controls[name] = ipywidgets.Dropdown(**given)
    picture = ipywidgets.interactive_output(lambda **chosen: display(draw(**chosen)), controls)
    # In a row that does not wrap, five sliders shrink to the width of a thumb.
    row = ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
    return ipywidgets.VBox([row, picture])


def drawn_from(table: Callable[..., Any], figure: Callable[[Any], Any]) -> Callable[..., Any]:
    """A `draw` for `explore` that measures on demand: `figure` of the rows that `table` returns for a choice."""
    return lambda **chosen: figure(table(**chosen))
