"""How much room features take, and which frequencies they keep, as pictures."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from haste_core.figures.style import Figure, mark_switch, style

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
        capacity: rows of `analysis.capacity.measure` under arm and seed. kind: "tokens" or "patch mean".
    """
    figure, panels = _panels()
    rows = capacity[capacity["kind"] == kind]
    student = rows[(rows["who"] == "student") & (rows["step"] == step) & (rows["t"] == t)]
    arms = list(rows["arm"].unique())
    for name, axis in panels.items():
        lines = [("teacher", _teacher(rows), TEACHER)]
        lines += [(arm, student[student["arm"] == arm], style(arm, arms)) for arm in arms]
        for label, whole, look in lines:
            chosen = whole[whole["measure"] == name]
            _line(axis, chosen.assign(at=(chosen["block"] + 1) / chosen["blocks"]), label, look)
        axis.set(xlabel="depth (share of the blocks)", title=MEASURES[name])
    figure.suptitle(f"{kind} of {int(rows['n'].iloc[0])} held-out images, step {step}, t = {t:g}", fontsize=10)
    _legend(figure, panels)
    return figure


def capacity_over_training(
    capacity: pd.DataFrame, block: int, t: float, tau: int | None, kind: str = "tokens"
) -> Figure:
    """Every measure of one student block (from 0) over steps, a line per arm; the teacher's final tokens in black.

    Args as in `capacity_over_depth`; tau: the switch, marked if there is one.
    """
    figure, panels = _panels()
    rows = capacity[capacity["kind"] == kind]
    student = rows[(rows["who"] == "student") & (rows["block"] == block) & (rows["t"] == t)]
    final = _teacher(rows)
    final = final[final["block"] == final["blocks"] - 1]
    arms = list(rows["arm"].unique())
    for name, axis in panels.items():
        value = final[final["measure"] == name]["value"].mean()
        axis.axhline(value, label="teacher, final", **TEACHER)
        for arm in arms:
            chosen = student[(student["arm"] == arm) & (student["measure"] == name)]
            _line(axis, chosen.assign(at=chosen["step"]), arm, style(arm, arms))
        mark_switch(axis, tau)
        axis.set(xlabel="training steps", title=MEASURES[name])
    figure.suptitle(f"{kind} after student block {block}, t = {t:g}", fontsize=10)
    _legend(figure, panels)
    return figure


def error_per_band(spectrum: pd.DataFrame, arm: str, step: int) -> Figure:
    """What a readout of the tokens misses per frequency band: teacher blocks left, an arm's student blocks right.

    One line per block, from early (bright) to late (dark), mean over seeds.

    Args:
        spectrum: rows of `analysis.spectrum.measure` under arm and seed.
    """
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    own = spectrum[spectrum["arm"] == arm]
    student = own[(own["who"] == "student") & (own["step"] == step)]
    sides = {"teacher": own[own["who"] == "teacher"], f"student ({arm}, step {step})": student}
    for axis, (title, rows) in zip(figure.subplots(1, 2, sharey=True), sides.items(), strict=True):
        blocks = sorted(rows["block"].unique())
        for block in blocks:
            bands = rows[rows["block"] == block].groupby("band_low")["relative_error"].mean()
            last = title == "teacher" and block == blocks[-1]
            colour = mpl.colormaps["viridis_r"]((block + 1) / (len(blocks) + 1))
            axis.plot(range(len(bands)), bands, marker="o", markersize=3.5, color=colour,
                      label="final tokens" if last else f"block {block}", linestyle="--" if last else "-")  # fmt: skip
        _bands(axis, rows)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    figure.axes[0].set_ylabel("energy missed / energy there\n(0: all is kept, 1: nothing)")
    return figure


def error_by_arm(spectrum: pd.DataFrame, step: int) -> Figure:
    """What a readout misses over depth at a step, a panel per frequency band: a line per arm, the teacher in black."""
    bands = sorted(set(zip(spectrum["band_low"], spectrum["band_high"], strict=True)))
    figure = Figure(figsize=(3.0 * len(bands), 3.2), layout="constrained")
    arms = list(spectrum["arm"].unique())
    student = spectrum[(spectrum["who"] == "student") & (spectrum["step"] == step)]
    axes = figure.subplots(1, len(bands), sharey=True, squeeze=False)[0]
    for axis, (low, high) in zip(axes, bands, strict=True):
        lines = [("teacher", _teacher(spectrum), TEACHER)]
        lines += [(arm, student[student["arm"] == arm], style(arm, arms)) for arm in arms]
        for label, whole, look in lines:
            rows = whole[whole["band_low"] == low]
            mean = rows.assign(at=(rows["block"] + 1) / rows["blocks"]).groupby("at")["relative_error"].mean()
            axis.plot(mean.index, mean, marker="o", markersize=3, label=label, **look)
        axis.set(xlabel="depth (share of the blocks)", title=f"{low:.2f} to {high:.2f} of Nyquist")
    axes[0].set_ylabel("energy missed / energy there")
    axes[-1].legend(fontsize=8)
    return figure


def _panels() -> tuple[Figure, dict[str, Any]]:
    figure = Figure(figsize=(10.4, 6.0), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    axes[-1].set_axis_off()
    return figure, dict(zip(MEASURES, axes, strict=False))


def _legend(figure: Figure, panels: dict[str, Any]) -> None:
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.axes[-1].legend(handles, labels, loc="center", fontsize=9)


def _teacher(rows: pd.DataFrame) -> pd.DataFrame:
    """The teacher's rows of the first arm: every run has measured the same frozen network."""
    found = rows[rows["who"] == "teacher"]
    return found[(found["arm"] == found["arm"].iloc[0]) & (found["seed"] == found["seed"].iloc[0])]


def _line(axis: Any, rows: pd.DataFrame, label: str, look: dict[str, Any]) -> None:
    grouped = rows.groupby("at")
    mean = grouped["value"].mean()
    axis.plot(mean.index, mean, label=label, marker="o", markersize=3, **look)
    names = ("value", "value") if rows["seed"].nunique() > 1 else ("low", "high")
    low, high = grouped[names[0]].min(), grouped[names[1]].max()
    axis.fill_between(mean.index, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _bands(axis: Any, rows: pd.DataFrame) -> None:
    bands = sorted(set(zip(rows["band_low"], rows["band_high"], strict=True)))
    axis.set_xticks(range(len(bands)), [f"{low:.2f}-{high:.2f}" for low, high in bands])
    axis.set_xlabel("spatial frequency (fraction of Nyquist)")
