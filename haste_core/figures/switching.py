"""Figures of gradient conflict, of switching alignment off, and of arms against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from scipy import stats

from haste_core.errors import unknown
from haste_core.figures.style import (
    BLUE,
    DARK,
    GREEN,
    RED,
    Figure,
    legend_beside,
    mark_switch,
    panels,
    plain_numbers,
    single,
    style,
)
from haste_core.study import config

CONFLICT = "cosine of the gradients\n(above 0: agree, below 0: conflict)"
# Common columns of the tables of the exact and of the online angle.
KEYS = ["arm", "seed", "step", "t", "loss"]
NAMES = {"fid": "FID", "near_data": "held-out loss, t <= 0.1"}
_READINGS = {
    "online_angle": "online estimate of the angle",
    "gradient_angle": "exact gradient angle",
    "alignment": "alignment loss",
}
_MARKERS = "ovs^DPX*"


def conflict_over_training(table: pd.DataFrame, tau: int | None, arm: str, loss: str | None = None) -> Figure:
    """rho_t over training steps, a panel per alignment loss and a line per noise level (Fig. 3, arXiv 2505.16792).

    Mean over seeds; bars reach from the lowest to the highest end of the seeds' intervals.

    Args:
        table: of `analysis.gradients.conflict`, with arm and seed. tau: the switch, if it is to be marked.
        arm: shown. loss: one panel alone; all by default.

    Raises:
        HasteError: the table has no such rows.
    """
    return _conflict(table, arm, loss, "step", tau)


def conflict_over_t(table: pd.DataFrame, arm: str, loss: str | None = None) -> Figure:
    """rho_t over the noise level, a panel per alignment loss and a line per checkpoint (Fig. 4, arXiv 2505.16792).

    Arguments and bars as in `conflict_over_training`.

    Raises:
        HasteError: the table has no such rows.
    """
    return _conflict(table, arm, loss, "t")


def _conflict(table: pd.DataFrame, arm: str, loss: str | None, along: str, tau: int | None = None) -> Figure:
    by, label, xlabel = ("t", "t = {:g}", "training steps")
    if along == "t":
        by, label, xlabel = ("step", "step {}", "noise level t (0: data, 1: noise)")
    rows = _only(table, arm=arm, loss=loss)
    figure, axes, parts = _loss_panels(rows)
    for axis, (name, part) in zip(axes, parts, strict=True):
        for colour, value, some in _coloured(part, by):
            _points(axis, some, along, label.format(value), color=colour)
        mark_switch(axis, tau)
        axis.set(xlabel=xlabel, title=f"{name} loss")
    return _finish(figure, axes, f"{arm}, {_counts(rows)}")


def conflict_by_arm(table: pd.DataFrame, tau: int | None, loss: str, t: float) -> Figure:
    """rho_t of one loss at one noise level over training steps, a line per arm; arguments as for the other figures.

    Raises:
        HasteError: the table has no such rows.
    """
    rows, arms = _only(table, loss=loss, t=t), list(table["arm"].unique())
    figure, (axis,), _ = _loss_panels(rows)
    for arm, part in rows.groupby("arm", sort=False):
        _points(axis, part, "step", str(arm), **style(str(arm), arms))
    mark_switch(axis, tau)
    axis.set(xlabel="training steps", title=f"{loss} loss, t = {t:g}")
    return _finish(figure, [axis], _counts(rows))


def online_against_exact(exact: pd.DataFrame, online: pd.DataFrame) -> Figure:
    """The online estimate against the exact cosine at the same checkpoints and noise levels, a panel per loss.

    Titles give Pearson's r and Spearman's rank correlation over all points.

    Args:
        exact: of `analysis.gradients.conflict`. online: of `analysis.gradients.online_conflict`. Both with arm, seed.

    Raises:
        HasteError: the tables have no rows in common.
    """
    both = exact.merge(online[[*KEYS, "online"]], on=KEYS).dropna(subset=["rho", "online"])
    if both.empty:
        raise unknown("loss read online", "none", online["loss"].unique())
    figure, axes, rows = _loss_panels(both)
    for axis, (name, part) in zip(axes, rows, strict=True):
        for colour, t, some in _coloured(part, "t"):
            axis.errorbar(some["rho"], some["online"], xerr=_bars(some), fmt="o", markersize=3.5, linewidth=0.7,
                          color=colour, label=f"t = {t:g}")  # fmt: skip
        axis.axvline(0, color=DARK, linewidth=0.8)
        title = f"{name} loss"
        if len(part) >= 3:
            pearson, ranks = (f(part["rho"], part["online"]).statistic for f in (stats.pearsonr, stats.spearmanr))
            title += f"\nr = {pearson:.2f}, ranks {ranks:.2f}, {len(part)} points"
        axis.set(xlabel="exact, at the block's parameters", title=title)
    return _finish(figure, axes, _counts(both), "online, at activations")


def _only(table: pd.DataFrame, **chosen: Any) -> pd.DataFrame:
    for column, value in chosen.items():
        if value is None:
            continue
        if not (table[column] == value).any():
            raise unknown(f"{column} in this table", value, table[column].unique())
        table = table[table[column] == value]
    return table


def _loss_panels(rows: pd.DataFrame) -> tuple[Figure, Any, Any]:
    """A figure, its axes, and the name and rows of each loss."""
    count = rows["loss"].nunique()
    return *panels(count, 1.2 + 3.9 * count, 3.6, sharey=True), rows.groupby("loss", sort=False)


def _coloured(rows: pd.DataFrame, column: str) -> Iterator[tuple[Any, Any, pd.DataFrame]]:
    values = sorted(rows[column].unique())
    for i, value in enumerate(values):
        yield mpl.colormaps["viridis"](0.9 * i / max(len(values) - 1, 1)), value, rows[rows[column] == value]


def _points(axis: Any, rows: pd.DataFrame, x: str, label: str, **look: Any) -> None:
    seeds = rows.groupby(x)
    whole = pd.DataFrame({"rho": seeds["rho"].mean(), "low": seeds["low"].min(), "high": seeds["high"].max()})
    axis.errorbar(whole.index, whole["rho"], yerr=_bars(whole), label=label, marker="o", markersize=3.5, elinewidth=0.8,
                  capsize=1.5, **look)  # fmt: skip


def _bars(rows: pd.DataFrame) -> list[pd.Series]:
    # A percentile interval need not hold its own estimate.
    return [(rows["rho"] - rows["low"]).clip(lower=0), (rows["high"] - rows["rho"]).clip(lower=0)]


def _counts(rows: pd.DataFrame) -> str:
    seeds, blocks = rows["seed"].nunique(), ", ".join(map(str, sorted(rows["block"].unique())))
    return f"block {blocks} (from 0), {rows['n'].max()} held-out images, {seeds} seed{'s' * (seeds > 1)}"


def _finish(figure: Figure, axes: Sequence[Any], title: str, ylabel: str = CONFLICT) -> Figure:
    for axis in axes:
        axis.axhline(0, color=DARK, linewidth=0.8)
    axes[0].set_ylabel(ylabel)
    legend_beside(axes[-1])
    figure.suptitle(title, fontsize=9)
    return figure


def fid_over_tau(swept: pd.DataFrame, fired: pd.DataFrame, family: str) -> Figure:
    """FID at the end of training over the step of the switch; the always-on run is the point furthest right.

    Thin lines are seeds, the thick one their geometric mean, diamonds arms that fade instead of switching. The upper
    panel has a row per trigger and a mark where it fired, one per seed.

    Args:
        swept: of `analysis.switching.sweep`. fired: of `analysis.switching.fired`. family: the always-on arm.

    Raises:
        HasteError: there is no such family.
    """
    end = _only(swept, family=family)
    end = end[end["step"] == end["step"].max()]
    found = fired[fired["family"] == family]
    rows = max(1, found["trigger"].nunique())
    figure = Figure(figsize=(7.4, 3.6 + 0.24 * rows), layout="constrained")
    above, axis = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [0.24 * rows + 0.2, 3.4]})
    switched = end[end["fade"] == 0]
    for _, part in switched.groupby("seed"):
        part = part.sort_values("tau")
        axis.plot(part["tau"], part["fid"], color=GREEN, linewidth=0.8, alpha=0.5)
    mean = np.exp(np.log(switched["fid"]).groupby(switched["tau"]).mean())
    axis.plot(mean.index, mean, "o-", color=GREEN, linewidth=2.2, label="switch at once, mean over seeds")
    for name, part in end[end["fade"] > 0].groupby("arm"):
        label = f"{name}: fades over {part['fade'].iloc[0]} steps"
        axis.plot(part["tau"], part["fid"], "D", color="#E69F00", markersize=5, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis)
    last = int(switched["tau"].max())
    axis.set(xlabel=f"step of the switch (furthest right, {last}: never)", ylabel=f"FID at step {end['step'].iloc[0]}")
    axis.legend(fontsize=8)
    _mark_fired(above, found)
    above.set_title(f"{family}, {end['seed'].nunique()} seeds, {end['n'].iloc[0]} samples", fontsize=9, loc="left")
    return figure


def _mark_fired(axis: Any, fired: pd.DataFrame) -> None:
    """Draw a row per trigger with a mark where it fired, one per seed."""
    labels = []
    for place, (name, part) in enumerate(fired.groupby("trigger", sort=False)):
        whole = part[(part["readings"] > 0) & (part["gaps"] == 0)]
        taus = whole["tau"].dropna()
        unread = "log with gaps" if part["readings"].any() else "nothing to read"
        labels.append(f"{name} ({f'{len(taus)} of {len(whole)}' if len(whole) else unread})")
        axis.plot(taus, [place] * len(taus), "|", color=BLUE, markersize=9, markeredgewidth=2)
    _row_labels(axis, labels)
    axis.tick_params(axis="x", labelbottom=False)


def _row_labels(axis: Any, labels: list[str]) -> None:
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)


def sweep_over_steps(swept: pd.DataFrame, family: str) -> Figure:
    """FID over that of the always-on run against training steps, a line per switch; below 1 switching helped.

    Raises:
        HasteError: there is no such family.
    """
    rows = _only(swept, family=family)
    rows = rows[rows["arm"] != family]
    figure, axis = single(7.2, 3.8, "constrained")
    taus = sorted(rows["tau"].unique())
    for i, ((tau, fade), part) in enumerate(rows.groupby(["tau", "fade"])):
        mean = np.exp(part.groupby("step")["log_ratio"].mean())
        colour = mpl.colormaps["viridis"](0.85 * taus.index(tau) / max(len(taus) - 1, 1))
        label = f"tau {tau}" + (f", faded over {fade}" if fade else "")
        axis.plot(mean.index, mean, color=colour, marker=_MARKERS[i % len(_MARKERS)], markersize=4, label=label,
                  linestyle="--" if fade else "-")  # fmt: skip
    axis.axhline(1, color=DARK, linewidth=1)
    axis.set(xlabel="training steps", ylabel=f"FID over {family}'s")
    legend_beside(axis)
    return figure


def trigger_logs(logs: pd.DataFrame, triggers: Mapping[str, config.TerminationSettings], arm: str) -> Figure:
    """Measurements of triggers in the always-on runs of an arm over training, a panel each, a line per seed.

    Dotted: thresholds of the triggers.

    Args:
        logs: of `analysis.switching.logs`. triggers: the study's. arm: whose logs.

    Raises:
        HasteError: there is no such arm in the table.
    """
    rows = _only(logs, arm=arm)
    present = [name for name in _READINGS if rows[name].notna().any()]
    figure, axes = panels(len(present), 4.0 * len(present), 3.0)
    for axis, name in zip(axes, present, strict=True):
        for seed, part in rows.dropna(subset=[name]).groupby("seed"):
            axis.plot(part["step"], part[name], linewidth=1, marker=".", markersize=3, label=f"seed {seed}")
        for level in sorted({s.threshold for s in triggers.values() if s.kind == name}):
            axis.axhline(level, color=DARK, linestyle=":", linewidth=1)
        axis.set(xlabel="training steps", title=_READINGS[name])
        axis.legend(fontsize=8)
    figure.suptitle(arm, fontsize=9, x=0.01, ha="left")
    return figure


def regret_by_trigger(nearest: pd.DataFrame, ranking: pd.DataFrame, family: str) -> Figure:
    """Percentage by which FID ends above the best switch of the sweep with each trigger's tau; small dots are seeds.

    The bottom row is the cost of never switching.

    Args:
        nearest, ranking: of `analysis.switching`. family: the always-on arm.

    Raises:
        HasteError: there is no such family.
    """
    rows, means = _only(nearest, family=family), ranking[ranking["family"] == family]
    never = rows.drop_duplicates("seed")["regret_never"]
    figure, axis = single(7.2, 0.42 * (len(means) + 1) + 1.0, "constrained")
    found = [(m["trigger"], rows.loc[rows["trigger"] == m["trigger"], "regret"], m["regret"], GREEN)
             for m in means.to_dict("records")]  # fmt: skip
    found.append(("never switching", never, never.mean(), RED))
    for place, (_, seeds, mean, colour) in enumerate(found):
        axis.plot(100 * (np.exp(seeds) - 1), [place] * len(seeds), ".", color=DARK, markersize=5)
        axis.plot(100 * (np.exp(mean) - 1), place, "o", color=colour, markersize=7)
    axis.set_yticks(range(len(found)), [label for label, *_ in found])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="FID at the end above that of the best switch, %", title=family)
    return figure


def group_effects(rows: pd.DataFrame, means: pd.DataFrame, group: str | None = None) -> Figure:
    """Percentage by which an arm's FID lies below the reference's, a panel per group, an arm per row.

    Small dots are seeds, the large one their mean with its interval (with two seeds or more), coloured by the interval:
    above zero, below zero, or neither.

    Args:
        rows: of `analysis.switching.paired`. means: of `analysis.switching.effects`. group: one alone; all by default.
    """
    groups = list(rows["group"].unique()) if group is None else [group]
    heights = [means["group"].eq(name).sum() + 1.6 for name in groups]
    figure = Figure(figsize=(7.6, 0.34 * sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, name in zip(axes, groups, strict=True):
        chosen = means[means["group"] == name].reset_index(drop=True)
        for place, mean in enumerate(chosen.to_dict("records")):
            seeds = rows[(rows["group"] == name) & (rows["arm"] == mean["arm"])]["gain"]
            axis.plot(_percent(seeds), [place] * len(seeds), ".", color=DARK, markersize=4, alpha=0.7)
            if mean["arm"] == mean["reference"]:
                continue
            if np.isfinite(mean["low"]):
                ends = [_percent(mean["low"]), _percent(mean["high"])]
                axis.plot(ends, [place, place], color=_colour(mean), linewidth=2)
            axis.plot(_percent(mean["gain"]), place, "o", color=_colour(mean), markersize=6)
        axis.axvline(0, color=DARK, linewidth=1)
        _row_labels(axis, [f"{arm}  {fid:.2f}" for arm, fid in zip(chosen["arm"], chosen["fid"], strict=True)])
        axis.grid(axis="y", visible=False)
        first = chosen.iloc[0]
        axis.set_title(f"{name}: against {first['reference']} at step {first['step']}", fontsize=9, loc="left")
    axes[-1].set_xlabel("FID below the reference's, % (right of 0: better); FID beside the arm's name")
    return figure


def gain_by_setting(late: pd.DataFrame, measure: str = "fid") -> Figure:
    """Gain over the run without alignment against training steps, a line per arm with its interval.

    Args:
        late: rows of `analysis.switching.late`. measure: one of theirs.
    """
    late = late[late["measure"] == measure]
    arms = list(late["arm"].unique())
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.5 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, arm in zip(axes.flat, arms, strict=False):
        part = late[late["arm"] == arm].sort_values("step")
        axis.fill_between(part["step"], _percent(part["low"]), _percent(part["high"]), color=BLUE, alpha=0.15, lw=0)
        axis.plot(part["step"], _percent(part["gain"]), color=BLUE, linewidth=1)
        for _, point in part.iterrows():
            axis.plot(point["step"], _percent(point["gain"]), "o", markersize=5, color=_colour(point))
        axis.axhline(0, color=DARK, linewidth=1)
        axis.set_title(f"{arm}, against {part['baseline'].iloc[0]}", fontsize=9, loc="left")
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    finite, least = _percent(late["gain"]), 20.0 if measure == "fid" else 5.0
    axes.flat[0].set_ylim(min(-least, 1.4 * float(finite.min())), max(least, 1.4 * float(finite.max())))
    figure.supxlabel("training steps", fontsize=9)
    figure.supylabel(f"{NAMES[measure]}: below the baseline's, %", fontsize=9)
    return figure


def weight_and_switch(plane: pd.DataFrame) -> Figure:
    """Percentage by which each arm ends above or below another, by alignment weight and step of the switch.

    Columns of panels: against plain training, against staying on with the same weight. Rows: FID, held-out loss near
    the data. Blue is lower, so better. A number in bold has an interval that excludes zero.

    Args:
        plane: rows of `analysis.switching.plane`.
    """
    measures, others = list(plane["measure"].unique()), list(plane["against"].unique())
    weights, taus = sorted(plane["weight"].unique()), sorted(plane["tau"].unique())
    height = (0.55 * len(weights) + 1.1) * len(measures)
    figure = Figure(figsize=(4.2 * len(others) + 0.6, height), layout="constrained")
    axes = figure.subplots(len(measures), len(others), squeeze=False)
    for i, measure in enumerate(measures):
        widest = 100 * np.abs(np.log(plane.loc[plane["measure"] == measure, "ratio"])).max()
        for axis, against in zip(axes[i], others, strict=True):
            part = plane[(plane["measure"] == measure) & (plane["against"] == against)]
            cells = np.full((len(weights), len(taus)), np.nan)
            for row in part.to_dict("records"):
                place = weights.index(row["weight"]), taus.index(row["tau"])
                cells[place] = 100 * np.log(row["ratio"])
                weight = "bold" if row["low"] > 1 or row["high"] < 1 else "normal"
                axis.annotate(f"{100 * (row['ratio'] - 1):+.1f} %", place[::-1], ha="center", va="center",
                              fontsize=8.5, fontweight=weight)  # fmt: skip
            axis.imshow(cells, cmap="RdBu_r", vmin=-1.6 * widest, vmax=1.6 * widest, aspect="auto")
            axis.set_xticks(range(len(taus)), ["never" if np.isinf(t) else f"{t:g}" for t in taus])
            axis.set_yticks(range(len(weights)), [f"{w:g}" for w in weights])
            axis.grid(False)
            axis.set_title(f"{NAMES[measure]}, against {against}", fontsize=9, loc="left")
    figure.supxlabel("switch at step", fontsize=9)
    figure.supylabel("weight of both alignment losses", fontsize=9)
    return figure


def _percent(gain: Any) -> Any:
    """Percentage by which FID lies below the reference's, from a difference of log FID."""
    return 100 * (1 - np.exp(-gain))


def _colour(row: Any) -> str:
    return GREEN if row["low"] > 0 else RED if row["high"] < 0 else "#888888"
