"""Figures of the capacity of tokens: directions they use, and spatial frequencies they keep."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from haste_core.figures.style import Figure, line_with_band, mark_switch, panels, style

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
    figure, axes = _measure_panels()
    rows = capacity[capacity["kind"] == kind]
    student = rows[(rows["who"] == "student") & (rows["step"] == step) & (rows["t"] == t)]
    for name, axis in axes.items():
        for label, whole, look in _lines(rows, student):
            chosen = whole[whole["measure"] == name]
            _line(axis, chosen.assign(at=(chosen["block"] + 1) / chosen["blocks"]), label, look)
        axis.set(xlabel="depth (share of the blocks)", title=MEASURES[name])
    figure.suptitle(f"{kind} of {int(rows['n'].iloc[0])} held-out images, step {step}, t = {t:g}", fontsize=10)
    _legend(figure)
    return figure


def capacity_over_training(
    capacity: pd.DataFrame, block: int, t: float, tau: int | None, kind: str = "tokens"
) -> Figure:
    """Every measure of one student block (from 0) over steps, a line per arm; the teacher's final tokens in black.

    Args as in `capacity_over_depth`; tau: the switch, marked if there is one.
    """
    figure, axes = _measure_panels()
    rows = capacity[capacity["kind"] == kind]
    student = rows[(rows["who"] == "student") & (rows["block"] == block) & (rows["t"] == t)]
    (_, final, _), *arms = _lines(rows, student)
    final = final[final["block"] == final["blocks"] - 1]
    for name, axis in axes.items():
        axis.axhline(final[final["measure"] == name]["value"].mean(), label="teacher, final", **TEACHER)
        for arm, whole, look in arms:
            chosen = whole[whole["measure"] == name]
            _line(axis, chosen.assign(at=chosen["step"]), arm, look)
        mark_switch(axis, tau)
        axis.set(xlabel="training steps", title=MEASURES[name])
    figure.suptitle(f"{kind} after student block {block}, t = {t:g}", fontsize=10)
    _legend(figure)
    return figure


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
        blocks = sorted(rows["block"].unique())
        for block in blocks:
            errors = rows[rows["block"] == block].groupby("band_low")["relative_error"].mean()
            last = title == "teacher" and block == blocks[-1]
            colour = mpl.colormaps["viridis_r"]((block + 1) / (len(blocks) + 1))
            axis.plot(range(len(errors)), errors, marker="o", markersize=3.5, color=colour,
                      label="final tokens" if last else f"block {block}", linestyle="--" if last else "-")  # fmt: skip
        bands = _bands(rows)
        axis.set_xticks(range(len(bands)), [f"{low:.2f}-{high:.2f}" for low, high in bands])
        axis.set_xlabel("spatial frequency (fraction of Nyquist)")
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("energy missed / energy there\n(0: all is kept, 1: nothing)")
    return figure


def error_by_arm(spectrum: pd.DataFrame, step: int) -> Figure:
    """Error of a readout over depth at a step, a panel per frequency band: a line per arm, the teacher in black."""
    bands = _bands(spectrum)
    student = spectrum[(spectrum["who"] == "student") & (spectrum["step"] == step)]
    figure, axes = panels(len(bands), 3.0 * len(bands), 3.2, sharey=True)
    for axis, (low, high) in zip(axes, bands, strict=True):
        for label, whole, look in _lines(spectrum, student):
            rows = whole[whole["band_low"] == low]
            mean = rows.assign(at=(rows["block"] + 1) / rows["blocks"]).groupby("at")["relative_error"].mean()
            axis.plot(mean.index, mean, marker="o", markersize=3, label=label, **look)
        axis.set(xlabel="depth (share of the blocks)", title=f"{low:.2f} to {high:.2f} of Nyquist")
    axes[0].set_ylabel("energy missed / energy there")
    axes[-1].legend(fontsize=8)
    return figure


def _lines(rows: pd.DataFrame, student: pd.DataFrame) -> list[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Label, rows and look of each line: the teacher, then the arms of `student`."""
    arms, teacher = list(rows["arm"].unique()), rows[rows["who"] == "teacher"]
    # Every run has measured the same frozen network.
    teacher = teacher[(teacher["arm"] == teacher["arm"].iloc[0]) & (teacher["seed"] == teacher["seed"].iloc[0])]
    return [("teacher", teacher, TEACHER), *((arm, student[student["arm"] == arm], style(arm, arms)) for arm in arms)]


def _line(axis: Any, rows: pd.DataFrame, label: str, look: dict[str, Any]) -> None:
    grouped = rows.groupby("at")
    low, high = ("value", "value") if rows["seed"].nunique() > 1 else ("low", "high")
    band = grouped[low].min(), grouped[high].max()
    line_with_band(axis, grouped["value"].mean(), band, look, 0.12, label=label, markersize=3)


def _bands(rows: pd.DataFrame) -> list[tuple[float, float]]:
    return sorted(set(zip(rows["band_low"], rows["band_high"], strict=True)))


def _measure_panels() -> tuple[Figure, dict[str, Any]]:
    figure = Figure(figsize=(10.4, 6.0), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    axes[-1].set_axis_off()
    return figure, dict(zip(MEASURES, axes, strict=False))


def _legend(figure: Figure) -> None:
    """Put the legend of the first panel into the last, which is empty."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.axes[-1].legend(handles, labels, loc="center", fontsize=9)
