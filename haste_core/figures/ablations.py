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


NAMES = {"fid": "FID", "near_data": "held-out loss, t <= 0.1"}


def gain_by_setting(late: pd.DataFrame, measure: str = "fid") -> Figure:
    """Gain over the run without alignment against training steps, a line per arm with its interval.

    Args:
        late: rows of `analysis.ablations.late`. measure: one of theirs.
    """
    late = late[late["measure"] == measure]
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
    least = 20.0 if measure == "fid" else 5.0
    axes.flat[0].set_ylim(min(-least, 1.4 * float(finite.min())), max(least, 1.4 * float(finite.max())))
    figure.supxlabel("training steps", fontsize=9)
    figure.supylabel(f"{NAMES[measure]}: below the baseline's, %", fontsize=9)
    return figure


def weight_and_switch(plane: pd.DataFrame) -> Figure:
    """The plane of alignment weight and switch: how far each arm ends above or below another, in percent.

    Columns of panels: against plain training, against staying on with the same weight. Rows: FID, held-out loss near
    the data. Blue is lower, so better. A number in bold has an interval that excludes zero.

    Args:
        plane: rows of `analysis.ablations.plane`.
    """
    measures, others = list(plane["measure"].unique()), list(plane["against"].unique())
    weights, taus = sorted(plane["weight"].unique()), sorted(plane["tau"].unique())
    figure = Figure(
        figsize=(4.2 * len(others) + 0.6, (0.55 * len(weights) + 1.1) * len(measures)), layout="constrained"
    )
    axes = figure.subplots(len(measures), len(others), squeeze=False)
    for i, measure in enumerate(measures):
        widest = 100 * np.abs(np.log(plane.loc[plane["measure"] == measure, "ratio"])).max()
        for j, against in enumerate(others):
            part = plane[(plane["measure"] == measure) & (plane["against"] == against)]
            cells = np.full((len(weights), len(taus)), np.nan)
            for row in part.to_dict("records"):
                place = weights.index(row["weight"]), taus.index(row["tau"])
                cells[place] = 100 * np.log(row["ratio"])
                decided = row["low"] > 1 or row["high"] < 1
                axes[i][j].annotate(
                    f"{100 * (row['ratio'] - 1):+.1f} %", place[::-1], ha="center", va="center", fontsize=8.5,
                    fontweight="bold" if decided else "normal",
                )  # fmt: skip
            axes[i][j].imshow(cells, cmap="RdBu_r", vmin=-1.6 * widest, vmax=1.6 * widest, aspect="auto")
            axes[i][j].set_xticks(range(len(taus)), ["never" if np.isinf(t) else f"{t:g}" for t in taus])
            axes[i][j].set_yticks(range(len(weights)), [f"{w:g}" for w in weights])
            axes[i][j].grid(False)
            axes[i][j].set_title(f"{NAMES[measure]}, against {against}", fontsize=9, loc="left")
    figure.supxlabel("switch at step", fontsize=9)
    figure.supylabel("weight of both alignment losses", fontsize=9)
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
