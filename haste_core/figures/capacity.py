"""Figures of the capacity of tokens: directions they use, and spatial frequencies they keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import pandas as pd

from haste_core.figures.style import Figure, mark_switch, panels, seed_line, style

MEASURES = {
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "two_nn": "intrinsic dimension (TwoNN)",
    "matrix_entropy": "matrix entropy (nats)",
    "local_rank": "local rank",
}
TEACHER: dict[str, Any] = {"color": "#000000", "linestyle": "-", "linewidth": 2}


def capacity_over_depth(capacity: pd.DataFrame, step: int, t: float, kind: str = "tokens") -> Figure:
    """Every measure over depth at one step and noise level: the teacher in black, a line per arm (mean over seeds).

    The band is the teacher's, and for a single seed each arm's, interval over images; for several it is the span from
    lowest to highest seed. Depth is the share of the network that is passed: blocks of different networks compare.

    Args:
        capacity: rows of `analysis.capacity.token_capacity` under arm and seed. kind: "tokens" or "patch mean".
    """
    figure, rows = _capacity(capacity, kind, "depth", None, step=step, t=t)
    figure.suptitle(f"{kind} of {rows['n'].iloc[0]} held-out images, step {step}, t = {t:g}", fontsize=10)
    return figure


def capacity_over_training(
    capacity: pd.DataFrame, block: int, t: float, tau: int | None, kind: str = "tokens"
) -> Figure:
    """Every measure of one student block (from 0) over steps, a line per arm; the teacher's final tokens in black.

    Args as in `capacity_over_depth`; tau: the switch, marked if there is one.
    """
    figure, _ = _capacity(capacity, kind, "step", tau, block=block, t=t)
    figure.suptitle(f"{kind} after student block {block}, t = {t:g}", fontsize=10)
    return figure


def _capacity(
    capacity: pd.DataFrame, kind: str, along: str, tau: int | None, **student: float
) -> tuple[Figure, pd.DataFrame]:
    rows = capacity[capacity["kind"] == kind]
    figure, axes = panels(3, 10.4, 6.0, 2)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=False):
        for label, own, look in _lines(rows[rows["measure"] == measure], **student):
            if label == "teacher" and along == "step":
                axis.axhline(own.loc[own["depth"] == 1, "value"].mean(), label="teacher, final", **look)
            else:
                seed_line(axis, own, along, label, look)
        mark_switch(axis, tau)
        axis.set(xlabel="training steps" if along == "step" else "depth (share of the blocks)", title=title)
    axes[-1].set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", fontsize=9)
    return figure, rows


def error_per_band(spectrum: pd.DataFrame, arm: str, step: int) -> Figure:
    """Error of a readout of the tokens per frequency band: teacher blocks left, an arm's student blocks right.

    One line per block, from early (bright) to late (dark), mean over seeds.

    Args:
        spectrum: rows of `analysis.capacity.band_errors` under arm and seed.
    """
    own = spectrum[spectrum["arm"] == arm]
    student = own[(own["who"] == "student") & (own["step"] == step)]
    sides = {"teacher": own[own["who"] == "teacher"], f"student ({arm}, step {step})": student}
    figure, axes = panels(2, 9.4, 4.0, sharey=True)
    for axis, (title, rows) in zip(axes, sides.items(), strict=True):
        bands = [f"{low:.2f}-{high:.2f}" for low, high in _bands(rows)]
        errors = rows.pivot_table(index="band_low", columns="block", values="relative_error")
        for place, block in enumerate(errors):
            last = title == "teacher" and place == errors.shape[1] - 1
            colour = mpl.colormaps["viridis_r"]((place + 1) / (errors.shape[1] + 1))
            axis.plot(bands, errors[block], marker="o", markersize=3.5, color=colour, linestyle="--" if last else "-",
                      label="final tokens" if last else f"block {block}")  # fmt: skip
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_xlabel("spatial frequency (fraction of Nyquist)")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("energy missed / energy there\n(0: all is kept, 1: nothing)")
    return figure


def error_by_arm(spectrum: pd.DataFrame, step: int) -> Figure:
    """Error of a readout over depth at a step, a panel per frequency band: a line per arm, the teacher in black."""
    bands = _bands(spectrum)
    rows = len(bands) // 3 + 1  # of three panels, the last of which holds the legend
    figure, axes = panels(3, 10.4, 2.9 * rows, rows, sharey=True)
    for axis, (low, high) in zip(axes, bands, strict=False):
        for label, own, look in _lines(spectrum[spectrum["band_low"] == low], step=step):
            seed_line(axis, own, "depth", label, look, "relative_error")
        axis.set(xlabel="depth (share of the blocks)", title=f"{low:.2f} to {high:.2f} of Nyquist", yscale="log")
    for axis in axes[::3]:
        axis.set_ylabel("energy missed / energy there")
    for axis in axes[len(bands) :]:
        axis.set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", fontsize=9)
    return figure


def _lines(rows: pd.DataFrame, **student: Any) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Label, rows and look of each line: the teacher, then each arm where its columns have the values of `student`."""
    arms = list(rows["arm"].unique())
    rows = rows.assign(depth=(rows["block"] + 1) / rows["blocks"])
    teacher, own = rows[rows["who"] == "teacher"], rows[rows["who"] == "student"]
    # Every run has measured the same frozen network.
    yield "teacher", teacher[(teacher["arm"] == arms[0]) & (teacher["seed"] == teacher["seed"].iloc[0])], TEACHER
    own = own[(own[list(student)] == pd.Series(student)).all(axis=1)]
    yield from ((arm, own[own["arm"] == arm], style(arm, arms)) for arm in arms)


def _bands(rows: pd.DataFrame) -> list[tuple[float, float]]:
    return sorted(set(zip(rows["band_low"], rows["band_high"], strict=True)))
