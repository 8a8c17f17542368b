"""The look that all figures share, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as PlainFigure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

from haste_core.files import atomic

# Okabe-Ito: told apart by people who see colours differently, and in grey by the line style.
ARM_STYLE = {
    "vanilla": ("#555555", ":"),
    "repa": ("#0072B2", "--"),
    "atta": ("#E69F00", "-."),
    "holistic": ("#CC79A7", "--"),
    "haste": ("#009E73", "-"),
}
_SPARE = ("#D55E00", "#56B4E9", "#F0E442", "#000000")
# Okabe-Ito again, a dark wine, and greys; the verdict always stands beside its colour.
VERDICT_COLOUR = {
    "supported": "#009E73",
    "contradicted": "#D55E00",
    "equivalent": "#0072B2",
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


def style(arm: str, arms: Sequence[str]) -> dict[str, Any]:
    """Colour and line style of an arm, the same in every figure."""
    if arm in ARM_STYLE:
        colour, line = ARM_STYLE[arm]
    else:
        others = [a for a in arms if a not in ARM_STYLE]
        colour, line = _SPARE[others.index(arm) % len(_SPARE)], "-"
    return {"color": colour, "linestyle": line}


def arm_line(arm: str, arms: Sequence[str]) -> dict[str, Any]:
    """How an arm's line is drawn where haste lies on holistic until the switch: holistic wide and pale, haste above."""
    wide = {"linestyle": "-", "linewidth": 4.5, "alpha": 0.55, "zorder": 1.9, "solid_capstyle": "round"}
    own = wide if arm == "holistic" else {"linewidth": 1.6, "zorder": 2.2 if arm == "haste" else 2}
    return style(arm, arms) | own


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write folder/name.png and folder/name.svg atomically, the same bytes for the same figure."""
    # Automatic layouts move things a little with every drawing; one drawing settles them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    with atomic(folder / f"{name}.svg") as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight", metadata={"Software": None})
    # 256 colours: a third of the size, and reports are committed.
    picture = Image.open(stream).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    with atomic(folder / f"{name}.png") as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (n, C, S, S) as one array (rows * (S + 1), columns * (S + 1)[, 3]) with light gaps."""
    missing = -len(images) % columns
    padded = np.pad(images, ((0, missing), (0, 0), (0, 1), (0, 1)), constant_values=255)
    n, channels, height, width = padded.shape
    sheet = padded.reshape(n // columns, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    sheet = sheet.reshape(n // columns * height, columns * width, channels)
    return sheet[..., 0] if channels == 1 else sheet[..., :3]


def mark_switch(axis: Any, tau: int | None) -> None:
    """Mark the switch at step tau, if there is one, on an axis of training steps."""
    if tau is not None:
        axis.axvline(tau, color="#009E73", linewidth=0.9, linestyle=":")
        axis.annotate(r"switch $\tau$", (tau, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                      textcoords="offset points", fontsize=8, color="#007a5a")  # fmt: skip


def plain_numbers(axis: Any) -> None:
    """Write a logarithmic axis as 1, 2, 5, 10 instead of powers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
