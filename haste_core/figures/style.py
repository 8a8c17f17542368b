"""The style that all figures share, elements that several of them draw, and how they are written."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as PlainFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from haste_core.files import atomic, write_text

# Okabe-Ito: distinguishable with colour blindness, and in grey by the line style.
ARM_STYLE = {
    "vanilla": ("#555555", ":"),
    "repa": ("#0072B2", "--"),
    "atta": ("#E69F00", "-."),
    "holistic": ("#CC79A7", "--"),
    "haste": ("#009E73", "-"),
}
_SPARE = ("#D55E00", "#56B4E9", "#F0E442", "#000000")
GREEN, RED, BLUE, DARK = "#009E73", "#D55E00", "#0072B2", "#555555"
# Okabe-Ito again, a dark wine, and greys; the verdict always stands beside its colour.
VERDICT_COLOUR = {
    "supported": GREEN,
    "contradicted": RED,
    "equivalent": BLUE,
    "smaller than the paper's": "#882255",
    "not decided": "#777777",
    "not tested": "#AAAAAA",
}

mpl.rcParams.update(
    {
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
        "svg.hashsalt": "haste",
        "svg.fonttype": "none",
    }
)


class Figure(PlainFigure):
    """A matplotlib figure that notebooks show as a picture, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", bbox_inches="tight")
        return stream.getvalue()


def panels(columns: int, width: float, height: float, rows: int = 1, **more: Any) -> tuple[Figure, Any]:
    """A figure of width x height inches, and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more).ravel()


def style(arm: str, arms: Sequence[str]) -> dict[str, Any]:
    """Colour and line style of an arm, the same in every figure, and the name by which a report finds its lines."""
    if arm in ARM_STYLE:
        colour, line = ARM_STYLE[arm]
    else:
        others = [a for a in arms if a not in ARM_STYLE]
        colour, line = _SPARE[others.index(arm) % len(_SPARE)], "-"
    return {"color": colour, "linestyle": line, "gid": f"arm-{arm}"}


def arm_line(arm: str, arms: Sequence[str]) -> dict[str, Any]:
    """Line of an arm where haste equals holistic until the switch: holistic wide and pale, haste above it."""
    wide = {"linestyle": "-", "linewidth": 4.5, "alpha": 0.55, "zorder": 1.9, "solid_capstyle": "round"}
    own = wide if arm == "holistic" else {"linewidth": 1.6, "zorder": 2.2 if arm == "haste" else 2}
    return style(arm, arms) | own


def seed_line(
    axis: Any, rows: pd.DataFrame, along: str, label: Any, look: dict[str, Any], value: str = "value", log: bool = False
) -> None:
    """Draw the mean over seeds, geometric if `log`, against the column `along`, and a band from lowest to highest seed.

    With one seed the band is its interval, from `low` to `high`, if the rows have one.
    """
    seeds = rows.pivot_table(index=along, columns="seed", values=value)
    mean = np.exp(np.log(seeds).mean(axis=1)) if log else seeds.mean(axis=1)
    low, high = seeds.min(axis=1), seeds.max(axis=1)
    if seeds.shape[1] == 1 and "low" in rows:
        low, high = rows.groupby(along)["low"].min(), rows.groupby(along)["high"].max()
    axis.plot(mean.index, mean, label=label, marker="o", markersize=3.5, **look)
    axis.fill_between(mean.index, low, high, color=look["color"], alpha=0.13, linewidth=0, gid=look.get("gid"))


def heatmap(axis: Any, cells: pd.DataFrame, **more: Any) -> Any:
    """Draw a table as coloured cells with its index and columns as ticks; returns the image, for a colour bar."""
    axis.set_xticks(range(cells.shape[1]), cells.columns)
    axis.set_yticks(range(cells.shape[0]), cells.index)
    axis.grid(False)
    return axis.imshow(cells.to_numpy(float), aspect="auto", **more)


def dots(axis: Any, place: int, seeds: Any, mean: Any, colour: str) -> None:
    """Draw a row of a dot plot: seeds as small dots, their mean as a large one."""
    axis.plot(seeds, [place] * len(seeds), ".", color=DARK, markersize=4.5, alpha=0.7)
    axis.plot(mean, place, "o", color=colour, markersize=6.5)


def row_labels(axis: Any, labels: Sequence[str]) -> None:
    """Label the rows of an axis from top to bottom."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write folder/name.png and folder/name.svg atomically, the same bytes for the same figure.

    In the latter an arm's lines bear its name and their points, `data-arm` and `data-points`, which a page can use.
    """
    # Automatic layouts change a little with every drawing; a layout that was drawn once is kept.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    vector, stream = io.StringIO(), io.BytesIO()
    lines = [line for line in figure.findobj(Line2D) if str(line.get_gid()).startswith("arm-")]
    for line in lines:
        points = ";".join(f"{x:.5g},{y:.4g}" for x, y in np.asarray(line.get_xydata()))
        line.set_gid(f"{line.get_gid()}|{points}")
    figure.savefig(vector, format="svg", bbox_inches="tight", metadata={"Date": None})
    for line in lines:
        line.set_gid(str(line.get_gid()).partition("|")[0])
    # Clip paths are named by a hash of unrounded coordinates, whose last digits the layout's solver may change.
    text = re.sub(r'<g id="arm-([^"|]+)\|?([^"]*)"', r'<g data-arm="\1" data-points="\2"', vector.getvalue())
    for i, found in enumerate(dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', text))):
        text = text.replace(found, f"clip{i}")
    write_text(folder / f"{name}.svg", text)
    figure.savefig(stream, format="png", bbox_inches="tight", metadata={"Software": None})
    # 256 colours: a third of the size, and reports are committed.
    picture = Image.open(stream).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    with atomic(folder / f"{name}.png") as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def show_images(axis: Any, images: np.ndarray, columns: int) -> None:
    """Draw images (n, C, S, S) uint8 in rows of `columns` with light gaps."""
    missing = -len(images) % columns
    padded = np.pad(images, ((0, missing), (0, 0), (0, 1), (0, 1)), constant_values=255)
    n, channels, height, width = padded.shape
    sheet = padded.reshape(n // columns, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    sheet = sheet.reshape(n // columns * height, columns * width, channels)
    sheet = sheet[..., 0] if channels == 1 else sheet[..., :3]
    axis.imshow(sheet, interpolation="nearest", cmap="gray", vmin=0, vmax=255)


def without_ticks(axis: Any, spines: bool = True) -> None:
    """Remove ticks and grid of an axis that shows an image, and its frame if `spines` is False."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    if not spines:
        axis.spines[:].set_visible(False)


def mark_switch(axis: Any, tau: int | None) -> None:
    """Mark the switch at step tau, if there is one, on an axis of training steps."""
    if tau is not None:
        axis.axvline(tau, color=GREEN, linewidth=0.9, linestyle=":")
        axis.annotate(r"switch $\tau$", (tau, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                      textcoords="offset points", fontsize=8, color="#007a5a")  # fmt: skip


def plain_log(axis: Any, *names: str) -> None:
    """Make the axes "x" or "y" logarithmic, with 1, 2, 5, 10 instead of powers."""
    for name in names:
        axis.set(**{f"{name}scale": "log"})
        ruler = getattr(axis, f"{name}axis")
        ruler.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ruler.set_major_formatter("{x:g}")
        ruler.set_minor_formatter(NullFormatter())


def legend_beside(axis: Any) -> None:
    """Put the legend to the right of an axis."""
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def legend_below(figure: Any, axis: Any, **renamed: str) -> None:
    """Put the legend of an axis below all panels, with labels replaced as in `renamed`."""
    handles, labels = axis.get_legend_handles_labels()
    shown = [renamed.get(label, label) for label in labels]
    columns = len(labels) if len(labels) <= 5 else (len(labels) + 1) // 2
    figure.legend(handles, shown, loc="outside lower center", ncol=columns, fontsize=9, columnspacing=1.4)
