"""Pictures that a person moves in JupyterLab and that stand still in batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from haste_core.errors import unknown

# Set for kernels that papermill starts: a widget without a person is an empty place in the executed notebook.
BATCH = "HASTE_BATCH"


def explore(draw: Callable[..., Any], start: dict[str, Any] | None = None, **choices: Sequence[Any]) -> Any:
    """A picture with a control for each of its arguments in JupyterLab, the picture at the start values in batch.

    Args:
        draw: from one value per choice to something a notebook shows, such as a Figure.
        start: the values it begins with; the first of each choice where it names none.
        choices: the possible values by argument. Increasing numbers become a slider, everything else a menu.

    Raises:
        HasteError: a start value is not among the possible ones.
    """
    begin = {name: (start or {}).get(name, values[0]) for name, values in choices.items()}
    for name, value in begin.items():
        if value not in choices[name]:
            raise unknown(f"start value of {name}", value, choices[name])
    if os.environ.get(BATCH):
        return draw(**begin)
    import ipywidgets
    from IPython.display import display

    controls = {name: _control(ipywidgets, name, list(values), begin[name]) for name, values in choices.items()}
    picture = ipywidgets.interactive_output(lambda **chosen: display(draw(**chosen)), controls)
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), picture])


def drawn_from(table: Callable[..., Any], figure: Callable[[Any], Any]) -> Callable[..., Any]:
    """A `draw` for `explore` where rows are measured on demand: `figure` of the rows that `table` has for a choice."""
    return lambda **chosen: figure(table(**chosen))


def _control(ipywidgets: Any, name: str, values: list[Any], value: Any) -> Any:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numbers and len(values) > 1 and values == sorted(values):
        return ipywidgets.SelectionSlider(options=values, value=value, description=name, continuous_update=False)
    return ipywidgets.Dropdown(options=values, value=value, description=name)
