"""Figures of gradient conflict, of switching alignment off, and of arms against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from haste_core.errors import unknown
from haste_core.figures.style import (
    BLUE,
    DARK,
    GREEN,
    RED,
    Figure,
    dots,
    heatmap,
    legend_beside,
    mark_switch,
    panels,
    plain_log,
    row_labels,
    style,
)
from haste_core.study import config

# Common columns of the tables of the exact and of the online angle.
KEYS = ["arm", "seed", "step", "t", "loss"]
NAMES = {"fid": "FID", "near_data": "held-out loss, t <= 0.1"}
_AXES = {"step": "training steps", "t": "noise level t (0: data, 1: noise)"}
_READINGS = {
    "online_angle": "online estimate of the angle",
    "gradient_angle": "exact gradient angle",
    "alignment": "alignment loss",
}
_MARKERS = "ovs^DPX*"


def conflict_over_training(table: pd.DataFrame, tau: int | None, arm: str, loss: str | None = None) -> Figure:
    """rho_t of an arm over training steps, a panel per loss, a line per noise level (Fig. 3, arXiv 2505.16792).

    Mean over seeds; bars reach from the lowest to the highest end of the seeds' intervals. The table is of
    `analysis.gradients.conflict`, with arm and seed.

    Raises:
        HasteError: the table has no such rows, here and in the figures below.
    """
    return _conflict(_only(table, arm=arm, loss=loss), "step", "t", arm, tau)


def conflict_over_t(table: pd.DataFrame, arm: str, loss: str | None = None) -> Figure:
    """rho_t over the noise level, a line per checkpoint (Fig. 4, arXiv 2505.16792); see `conflict_over_training`."""
    return _conflict(_only(table, arm=arm, loss=loss), "t", "step", arm)


def conflict_by_arm(table: pd.DataFrame, tau: int | None, loss: str, t: float) -> Figure:
    """rho_t of one loss at one noise level over training steps, a line per arm; see `conflict_over_training`."""
    return _conflict(_only(table, loss=loss, t=t), "step", "arm", f"t = {t:g}", tau)


def _conflict(rows: pd.DataFrame, along: str, by: str, title: str, tau: int | None = None) -> Figure:
    figure, axes, parts = _loss_panels(rows)
    for axis, (_, part) in zip(axes, parts, strict=True):
        for own, look in _lines(part, by):
            seeds = own.groupby(along).agg({"rho": "mean", "low": "min", "high": "max"})
            axis.errorbar(seeds.index, seeds["rho"], yerr=_bars(seeds), marker="o", markersize=3.5, elinewidth=0.8,
                          capsize=1.5, **look)  # fmt: skip
        mark_switch(axis, tau)
        axis.set_xlabel(_AXES[along])
    return _finish(figure, axes, rows, "cosine of the gradients\n(above 0: agree, below 0: conflict)", f"{title}, ")


def online_against_exact(exact: pd.DataFrame, online: pd.DataFrame) -> Figure:
    """The online estimate (`analysis.gradients.online_conflict`) against the exact cosine (`conflict`), by loss.

    Rows are of the same checkpoints and noise levels, with arm and seed. Titles give Pearson's r and Spearman's rank
    correlation over all points.
    """
    both = exact.merge(online[[*KEYS, "online"]], on=KEYS).dropna(subset=["rho", "online"])
    if both.empty:
        raise unknown("loss read online", "none", online["loss"].unique())
    figure, axes, parts = _loss_panels(both)
    for axis, (name, part) in zip(axes, parts, strict=True):
        for own, look in _lines(part, "t"):
            axis.errorbar(own["rho"], own["online"], xerr=_bars(own), fmt="o", markersize=3.5, linewidth=0.7, **look)
        axis.axvline(0, color=DARK, linewidth=0.8)
        axis.set_xlabel("exact, at the block's parameters")
        if len(part) >= 3:
            from scipy import stats  # a second, which a page without this figure does not wait for

            pearson, ranks = (f(part["rho"], part["online"]).statistic for f in (stats.pearsonr, stats.spearmanr))
            axis.set_title(f"{name} loss\nr = {pearson:.2f}, ranks {ranks:.2f}, {len(part)} points")
    return _finish(figure, axes, both, "online, at activations")


def _only(table: pd.DataFrame, **chosen: Any) -> pd.DataFrame:
    """Rows with these values in these columns; None stands for all values."""
    for column, value in chosen.items():
        if value is None:
            continue
        if not (table[column] == value).any():
            raise unknown(f"{column} in this table", value, table[column].unique())
        table = table[table[column] == value]
    return table


def _loss_panels(rows: pd.DataFrame) -> tuple[Figure, Any, Any]:
    """A figure, its axes, and the name and rows of each loss."""
    parts = rows.groupby("loss", sort=False)
    figure, axes = panels(len(parts), 1.2 + 3.9 * len(parts), 3.6, sharey=True)
    for axis, (name, _) in zip(axes, parts, strict=True):
        axis.set_title(f"{name} loss")
    return figure, axes, parts


def _lines(rows: pd.DataFrame, by: str) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """Rows and look of each line: arms in their own colours, numbers from dark to light."""
    values = list(rows[by].unique()) if by == "arm" else sorted(rows[by].unique())
    for i, value in enumerate(values):
        look: dict[str, Any] = {"color": mpl.colormaps["viridis"](0.9 * i / max(len(values) - 1, 1))}
        label = {"arm": "{}", "t": "t = {:g}", "step": "step {}"}[by].format(value)
        yield rows[rows[by] == value], (style(value, values) if by == "arm" else look) | {"label": label}


def _bars(rows: pd.DataFrame) -> list[pd.Series]:
    # A percentile interval need not hold its own estimate.
    return [(rows["rho"] - rows["low"]).clip(lower=0), (rows["high"] - rows["rho"]).clip(lower=0)]


def _finish(figure: Figure, axes: Sequence[Any], rows: pd.DataFrame, ylabel: str, title: str = "") -> Figure:
    for axis in axes:
        axis.axhline(0, color=DARK, linewidth=0.8)
    axes[0].set_ylabel(ylabel)
    legend_beside(axes[-1])
    seeds, blocks = rows["seed"].nunique(), ", ".join(map(str, sorted(rows["block"].unique())))
    counts = f"block {blocks} (from 0), {rows['n'].max()} held-out images, {seeds} seed{'s' * (seeds > 1)}"
    figure.suptitle(title + counts, fontsize=9)
    return figure


def fid_over_tau(swept: pd.DataFrame, fired: pd.DataFrame, family: str) -> Figure:
    """FID at the end of training over the step of the switch; the always-on run is the point furthest right.

    Thin lines are seeds, the thick one their geometric mean, diamonds arms that fade instead of switching. The upper
    panel has a row per trigger and a mark where it fired, one per seed. Tables are those of `analysis.switching`;
    family is the always-on arm.
    """
    end = _only(swept, family=family)
    end = end[end["step"] == end["step"].max()]
    found = fired[fired["family"] == family]
    height = 0.24 * max(1, found["trigger"].nunique())
    figure, (above, axis) = panels(1, 7.4, 3.6 + height, 2, sharex=True, height_ratios=[height + 0.2, 3.4])
    fids = end[end["fade"] == 0].pivot_table(index="tau", columns="seed", values="fid")
    axis.plot(fids.index, fids, color=GREEN, linewidth=0.8, alpha=0.5)
    mean = np.exp(np.log(fids).mean(axis=1))
    axis.plot(mean.index, mean, "o-", color=GREEN, linewidth=2.2, label="switch at once, mean over seeds")
    for (name, fade), part in end[end["fade"] > 0].groupby(["arm", "fade"]):
        axis.plot(
            part["tau"], part["fid"], "D", color="#E69F00", markersize=5, label=f"{name}: fades over {fade} steps"
        )
    plain_log(axis, "x", "y")
    axis.set(xlabel=f"step of the switch (furthest right, {fids.index.max()}: never)",
             ylabel=f"FID at step {end['step'].iloc[0]}")  # fmt: skip
    axis.legend(fontsize=8)
    labels = []
    for place, (name, part) in enumerate(found.groupby("trigger", sort=False)):
        whole = part[(part["readings"] > 0) & (part["gaps"] == 0)]
        taus = whole["tau"].dropna()
        unread = "log with gaps" if part["readings"].any() else "nothing to read"
        labels.append(f"{name!s} ({f'{len(taus)} of {len(whole)}' if len(whole) else unread})")
        above.plot(taus, [place] * len(taus), "|", color=BLUE, markersize=9, markeredgewidth=2)
    row_labels(above, labels)
    above.tick_params(axis="x", labelbottom=False)
    above.set_title(f"{family}, {end['seed'].nunique()} seeds, {end['n'].iloc[0]} samples", fontsize=9, loc="left")
    return figure


def sweep_over_steps(swept: pd.DataFrame, family: str) -> Figure:
    """FID over that of the always-on run against training steps, a line per switch; below 1 switching helped."""
    rows = _only(swept, family=family)
    rows = rows[rows["arm"] != family]
    figure, (axis,) = panels(1, 7.2, 3.8)
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
    """Measurements in the logs (`analysis.switching.logs`) of an always-on arm, a panel each, a line per seed.

    Dotted: thresholds of the triggers.
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
    """
    rows, means = _only(nearest, family=family), ranking[ranking["family"] == family]
    never = rows.drop_duplicates("seed")["regret_never"]
    figure, (axis,) = panels(1, 7.2, 0.42 * (len(means) + 1) + 1.0)
    for place, row in enumerate(means.to_dict("records")):
        seeds = rows.loc[rows["trigger"] == row["trigger"], "regret"]
        dots(axis, place, 100 * (np.exp(seeds) - 1), 100 * (np.exp(row["regret"]) - 1), GREEN)
    dots(axis, len(means), 100 * (np.exp(never) - 1), 100 * (np.exp(never.mean()) - 1), RED)
    row_labels(axis, [*means["trigger"], "never switching"])
    axis.set(xlabel="FID at the end above that of the best switch, %", title=family)
    return figure


def group_effects(rows: pd.DataFrame, means: pd.DataFrame, group: str | None = None) -> Figure:
    """Percentage by which an arm's FID lies below the reference's, a panel per group, an arm per row.

    Small dots are seeds (`analysis.switching.paired`), the large one their mean with its interval (`effects`, with two
    seeds or more), coloured by the interval: above zero, below zero, or neither. group: one alone; all by default.
    """
    means = _only(means, group=group)
    groups = list(means["group"].unique())
    heights = [means["group"].eq(name).sum() + 1.6 for name in groups]
    figure, axes = panels(1, 7.6, 0.34 * sum(heights) + 0.3, len(groups), height_ratios=heights)
    for axis, name in zip(axes, groups, strict=True):
        chosen = means[means["group"] == name]
        for place, mean in enumerate(chosen.to_dict("records")):
            itself = mean["arm"] == mean["reference"]
            if np.isfinite(mean["low"]) and not itself:
                ends = [_percent(mean["low"]), _percent(mean["high"])]
                axis.plot(ends, [place, place], color=_colour(mean), linewidth=2)
            seeds = rows.loc[(rows["group"] == name) & (rows["arm"] == mean["arm"]), "gain"]
            dots(axis, place, _percent(seeds), np.nan if itself else _percent(mean["gain"]), _colour(mean))
        axis.axvline(0, color=DARK, linewidth=1)
        row_labels(axis, [f"{arm}  {fid:.2f}" for arm, fid in zip(chosen["arm"], chosen["fid"], strict=True)])
        first = chosen.iloc[0]
        axis.set_title(f"{name}: against {first['reference']} at step {first['step']}", fontsize=9, loc="left")
    axes[-1].set_xlabel("FID below the reference's, % (right of 0: better); FID beside the arm's name")
    return figure


def gain_by_setting(late: pd.DataFrame, measure: str = "fid") -> Figure:
    """Gain (`analysis.switching.late`) over the run without alignment against training steps, a panel per arm."""
    late = late[late["measure"] == measure].sort_values("step", kind="stable")
    arms = list(late["arm"].unique())
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure, axes = panels(columns, 3.1 * columns + 0.6, 2.5 * rows + 0.2, rows, sharex=True, sharey=True)
    for axis, (arm, part) in zip(axes, late.groupby("arm", sort=False), strict=False):
        gain = _percent(part["gain"])
        axis.fill_between(part["step"], _percent(part["low"]), _percent(part["high"]), color=BLUE, alpha=0.15, lw=0)
        axis.plot(part["step"], gain, color=BLUE, linewidth=1)
        axis.scatter(part["step"], gain, s=25, color=[_colour(point) for point in part.to_dict("records")], zorder=2.1)
        axis.axhline(0, color=DARK, linewidth=1)
        axis.set_title(f"{arm}, against {part['baseline'].iloc[0]}", fontsize=9, loc="left")
    for axis in axes[len(arms) :]:
        axis.set_visible(False)
    finite, least = _percent(late["gain"]), 20.0 if measure == "fid" else 5.0
    axes[0].set_ylim(min(-least, 1.4 * finite.min()), max(least, 1.4 * finite.max()))
    figure.supxlabel("training steps", fontsize=9)
    figure.supylabel(f"{NAMES[measure]}: below the baseline's, %", fontsize=9)
    return figure


def weight_and_switch(plane: pd.DataFrame) -> Figure:
    """Percentage by which arms of `analysis.switching.plane` end above or below others, by weight and switch.

    Columns of panels: against plain training, against staying on with the same weight. Rows: FID, held-out loss near
    the data. Blue is lower, so better. A number in bold has an interval that excludes zero.
    """
    plane = plane.assign(log=100 * np.log(plane["ratio"]), clear=(plane["low"] > 1) | (plane["high"] < 1))
    measures, others = list(plane["measure"].unique()), list(plane["against"].unique())
    weights, taus = sorted(plane["weight"].unique()), sorted(plane["tau"].unique())
    height = (0.55 * len(weights) + 1.1) * len(measures)
    figure, axes = panels(len(others), 4.2 * len(others) + 0.6, height, len(measures))
    for axis, (measure, against) in zip(axes, ((m, a) for m in measures for a in others), strict=True):
        rows = plane[plane["measure"] == measure]
        part, widest = rows[rows["against"] == against], 1.6 * rows["log"].abs().max()
        cells = part.pivot_table(index="weight", columns="tau", values="log").reindex(index=weights, columns=taus)
        heatmap(axis, cells, cmap="RdBu_r", vmin=-widest, vmax=widest)
        for row in part.to_dict("records"):
            place = taus.index(row["tau"]), weights.index(row["weight"])
            axis.annotate(f"{100 * (row['ratio'] - 1):+.1f} %", place, ha="center", va="center", fontsize=8.5,
                          fontweight="bold" if row["clear"] else "normal")  # fmt: skip
        axis.set_xticks(range(len(taus)), ["never" if np.isinf(tau) else f"{tau:g}" for tau in taus])
        axis.set_title(f"{NAMES[measure]}, against {against}", fontsize=9, loc="left")
    figure.supxlabel("switch at step", fontsize=9)
    figure.supylabel("weight of both alignment losses", fontsize=9)
    return figure


def _percent(gain: Any) -> Any:
    """Percentage by which FID lies below the reference's, from a difference of log FID."""
    return 100 * (1 - np.exp(-gain))


def _colour(row: Mapping[Any, Any]) -> str:
    return GREEN if row["low"] > 0 else RED if row["high"] < 0 else "#888888"
