"""Notebooks as jobs: executed by papermill with checked parameters; interactive figures in JupyterLab."""

from __future__ import annotations

import ast
import datetime
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from haste_core.errors import HasteError, Interrupted, unknown
from haste_core.files import make_parent, notebooks_folder, unwritable
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
        HasteError: no such notebook or parameter, `output` is the notebook or cannot be written, or a cell raised (its
            message is passed on).
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
    if output.exists() and output.samefile(path):
        raise HasteError(f"{output} is the notebook itself; expected another name")
    make_parent(output)
    try:
        output.open("ab").close()
    except OSError as error:
        raise unwritable(output, error) from error
    # It warns of parameters that it does not find, which it looks for line by line; `_checked` has found them.
    logging.getLogger("papermill").setLevel(logging.ERROR)
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
                str(path), str(output), parameters=given, kernel_name="python3", language="python", progress_bar=False,
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
            raise HasteError(f"notebook {path.stem}: {unknown('parameter', parameter, known)}")
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
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT)
        written = int(notebook.nbformat)
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        cause = " ".join(str(error).split())[:200]
        raise HasteError(
            f"{path} cannot be read as a notebook ({cause}); expected one that JupyterLab saved"
        ) from error
    if written < 4:
        raise HasteError(f"{path} is a notebook of format {written}; expected 4: open and save it in JupyterLab")
    facts = notebook.metadata
    language = facts.get("kernelspec", {}).get("language") or facts.get("language_info", {}).get("name", "python")
    if language != "python":
        raise HasteError(f"{path} has a kernel of language {language!r}; expected Python")
    cell = next((cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), None)
    if cell is None or cell.cell_type != "code":
        found = "no cell tagged `parameters`" if cell is None else f"the tag `parameters` on a {cell.cell_type} cell"
        raise HasteError(f"{path} has {found}; expected that tag on the code cell with its settings (in JupyterLab)")
    try:
        statements = ast.parse(TransformerManager().transform_cell(cell.source)).body  # %magic is a call of a function
    except SyntaxError as error:
        raise HasteError(
            f"{path}: the cell tagged `parameters` is not valid Python ({error.msg}); expected assignments"
        ) from error
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
