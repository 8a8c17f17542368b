"""Arms against each other as pictures: choices of alignment, and where alignment begins to hurt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from haste_core.figures.style import Figure

_GREEN, _RED, _GREY = "#009E73", "#D55E00", "#888888"


def group_effects(rows: pd.DataFrame, means: pd.DataFrame, group: str | None = None) -> Figure:
    """A panel per group, an arm per row: how far its FID lies below the reference's, in percent.

    Small dots are seeds, the large one their mean with its interval (where there are two seeds or more), coloured by
    whether the interval lies above or below zero.

    Args:
        rows: of `analysis.ablations.paired`. means: of `analysis.ablations.effects`. group: one alone; all by default.
    """
    groups = list(rows["group"].unique()) if group is None else [group]
    heights = [means["group"].eq(name).sum() + 1.6 for name in groups]
    figure = Figure(figsize=(7.6, 0.34 * sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, name in zip(axes, groups, strict=True):
        chosen = means[means["group"] == name].reset_index(drop=True)
        for place, mean in enumerate(chosen.to_dict("records")):
            seeds = rows[(rows["group"] == name) & (rows["arm"] == mean["arm"])]
            _row(axis, place, mean, _percent(seeds["gain"]))
        _frame(axis, [f"{arm}  {fid:.2f}" for arm, fid in zip(chosen["arm"], chosen["fid"], strict=True)])
        first = chosen.iloc[0]
        axis.set_title(f"{name}: against {first['reference']} at step {first['step']}", fontsize=9, loc="left")
    axes[-1].set_xlabel("FID below the reference's, % (right of 0: better); FID beside the arm's name")
    return figure


def gain_by_setting(late: pd.DataFrame) -> Figure:
    """Gain over the run without alignment against training steps, a line per arm with its interval.

    Args:
        late: rows of `analysis.ablations.late`.
    """
    arms = list(late["arm"].unique())
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.5 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, arm in zip(axes.flat, arms, strict=False):
        part = late[late["arm"] == arm].sort_values("step")
        axis.fill_between(
            part["step"], _percent(part["low"]), _percent(part["high"]), color="#0072B2", alpha=0.15, lw=0
        )
        axis.plot(part["step"], _percent(part["gain"]), color="#0072B2", linewidth=1)
        for _, point in part.iterrows():
            axis.plot(point["step"], _percent(point["gain"]), "o", markersize=5, color=_colour(point))
        axis.axhline(0, color="#555555", linewidth=1)
        axis.set_title(f"{arm}, against {part['baseline'].iloc[0]}", fontsize=9, loc="left")
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    finite = _percent(late["gain"])
    axes.flat[0].set_ylim(min(-20.0, 1.4 * float(finite.min())), max(20.0, 1.4 * float(finite.max())))
    figure.supxlabel("training steps", fontsize=9)
    figure.supylabel("FID below the baseline's, %", fontsize=9)
    return figure


def _percent(gain: Any) -> Any:
    """How far FID lies below the reference's in percent, from a difference of log FID."""
    return 100 * (1 - np.exp(-gain))


def _colour(row: Any) -> str:
    return _GREEN if row["low"] > 0 else _RED if row["high"] < 0 else _GREY


def _row(axis: Any, place: int, mean: Mapping[Any, Any], seeds: pd.Series) -> None:
    axis.plot(seeds, [place] * len(seeds), ".", color="#555555", markersize=4, alpha=0.7)
    if mean["arm"] == mean["reference"]:
        return
    if np.isfinite(mean["low"]):
        axis.plot([_percent(mean["low"]), _percent(mean["high"])], [place, place], color=_colour(mean), linewidth=2)
    axis.plot(_percent(mean["gain"]), place, "o", color=_colour(mean), markersize=6)


def _frame(axis: Any, labels: list[str]) -> None:
    axis.axvline(0, color="#555555", linewidth=1)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
