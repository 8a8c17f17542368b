"""When to switch, as pictures: FID over tau, what triggers read, and what their tau costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from haste_core.errors import unknown
from haste_core.figures.style import Figure, plain_numbers
from haste_core.study import config

_READINGS = {
    "online_angle": "online estimate of the angle",
    "gradient_angle": "exact gradient angle",
    "alignment": "alignment loss",
}
_MARKERS = "ovs^DPX*"


def fid_over_tau(swept: pd.DataFrame, fired: pd.DataFrame, family: str) -> Figure:
    """FID at the end of training over the step of the switch; the always-on run is the point furthest right.

    Thin lines are seeds, the thick one their geometric mean, diamonds arms that fade instead of switching. The upper
    panel has a row per trigger and a mark where it fired, one per seed.

    Args:
        swept: of `analysis.switching.sweep`. fired: of `analysis.switching.fired`. family: the always-on arm.

    Raises:
        HasteError: there is no such family.
    """
    end = _end(swept, family)
    found = fired[fired["family"] == family]
    rows = max(1, found["trigger"].nunique())
    figure = Figure(figsize=(7.4, 3.6 + 0.24 * rows), layout="constrained")
    above, axis = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [0.24 * rows + 0.2, 3.4]})
    switched = end[end["fade"] == 0]
    for _, part in switched.groupby("seed"):
        part = part.sort_values("tau")
        axis.plot(part["tau"], part["fid"], color="#009E73", linewidth=0.8, alpha=0.5)
    mean = np.exp(np.log(switched["fid"]).groupby(switched["tau"]).mean())
    axis.plot(mean.index, mean, "o-", color="#009E73", linewidth=2.2, label="switch at once, mean over seeds")
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


def sweep_over_steps(swept: pd.DataFrame, family: str) -> Figure:
    """FID over that of the always-on run against training steps, a line per switch; below 1 switching helped.

    Raises:
        HasteError: there is no such family.
    """
    rows = _family(swept, family)
    rows = rows[rows["arm"] != family]
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axis = figure.subplots()
    taus = sorted(rows["tau"].unique())
    for i, ((tau, fade), part) in enumerate(rows.groupby(["tau", "fade"])):
        mean = np.exp(part.groupby("step")["log_ratio"].mean())
        colour = mpl.colormaps["viridis"](0.85 * taus.index(tau) / max(len(taus) - 1, 1))
        label = f"tau {tau}" + (f", faded over {fade}" if fade else "")
        axis.plot(mean.index, mean, color=colour, marker=_MARKERS[i % len(_MARKERS)], markersize=4, label=label,
                  linestyle="--" if fade else "-")  # fmt: skip
    axis.axhline(1, color="#555555", linewidth=1)
    axis.set(xlabel="training steps", ylabel=f"FID over {family}'s")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def trigger_logs(logs: pd.DataFrame, triggers: Mapping[str, config.Termination], arm: str) -> Figure:
    """What triggers read in the always-on runs of an arm over training, a panel per measurement, a line per seed.

    Dotted: thresholds of the triggers.

    Args:
        logs: of `analysis.switching.logs`. triggers: the study's. arm: whose logs.

    Raises:
        HasteError: there is no such arm in the table.
    """
    if arm not in set(logs["arm"]):
        raise unknown("arm in the table of logs", arm, logs["arm"].unique())
    rows = logs[logs["arm"] == arm]
    present = [name for name in _READINGS if rows[name].notna().any()]
    figure = Figure(figsize=(4.0 * len(present), 3.0), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
        for seed, part in rows.dropna(subset=[name]).groupby("seed"):
            axis.plot(part["step"], part[name], linewidth=1, marker=".", markersize=3, label=f"seed {seed}")
        for level in sorted({s.threshold for s in triggers.values() if s.kind == name}):
            axis.axhline(level, color="#555555", linestyle=":", linewidth=1)
        axis.set(xlabel="training steps", title=_READINGS[name])
        axis.legend(fontsize=8)
    figure.suptitle(arm, fontsize=9, x=0.01, ha="left")
    return figure


def regret_by_trigger(nearest: pd.DataFrame, ranking: pd.DataFrame, family: str) -> Figure:
    """How far above the best switch of the sweep FID ends with each trigger's tau, in percent; small dots are seeds.

    The line at the bottom is what never switching costs.

    Args:
        nearest, ranking: of `analysis.switching`. family: the always-on arm.

    Raises:
        HasteError: there is no such family.
    """
    rows, means = _family(nearest, family), ranking[ranking["family"] == family]
    never = rows.drop_duplicates("seed")["regret_never"]
    figure = Figure(figsize=(7.2, 0.42 * (len(means) + 1) + 1.0), layout="constrained")
    axis = figure.subplots()
    labels = [*means["trigger"], "never switching"]
    for place, mean in enumerate(means.to_dict("records")):
        seeds = rows.loc[rows["trigger"] == mean["trigger"], "regret"]
        axis.plot(_percent(seeds), [place] * len(seeds), ".", color="#555555", markersize=5)
        axis.plot(_percent(mean["regret"]), place, "o", color="#009E73", markersize=7)
    axis.plot(_percent(never), [len(means)] * len(never), ".", color="#555555", markersize=5)
    axis.plot(_percent(never.mean()), len(means), "o", color="#D55E00", markersize=7)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="FID at the end above that of the best switch, %", title=family)
    return figure


def _percent(regret: Any) -> Any:
    return 100 * (np.exp(regret) - 1)


def _family(rows: pd.DataFrame, family: str) -> pd.DataFrame:
    if family not in set(rows["family"]):
        raise unknown("family of arms that differ in their switch", family, rows["family"].unique())
    return rows[rows["family"] == family]


def _end(swept: pd.DataFrame, family: str) -> pd.DataFrame:
    rows = _family(swept, family)
    return rows[rows["step"] == rows["step"].max()]


def _mark_fired(axis: Any, fired: pd.DataFrame) -> None:
    """A row per trigger with a mark where it fired, one per seed."""
    labels = []
    for place, (name, part) in enumerate(fired.groupby("trigger", sort=False)):
        whole = part[(part["readings"] > 0) & (part["gaps"] == 0)]
        taus = whole["tau"].dropna()
        unread = "log with gaps" if part["readings"].any() else "nothing to read"
        labels.append(f"{name} ({f'{len(taus)} of {len(whole)}' if len(whole) else unread})")
        axis.plot(taus, [place] * len(taus), "|", color="#0072B2", markersize=9, markeredgewidth=2)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="x", labelbottom=False)
