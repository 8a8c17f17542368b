"""Gradient conflict as pictures: rho over training, over the noise level, and its online estimate beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from scipy import stats

from haste_core.errors import unknown
from haste_core.figures.style import Figure, mark_switch, style

CONFLICT = "cosine of the gradients\n(above 0: agree, below 0: conflict)"
# What rows of the two tables have in common.
KEYS = ["arm", "seed", "step", "t", "loss"]


def conflict_over_training(table: pd.DataFrame, tau: int | None, arm: str, loss: str | None = None) -> Figure:
    """rho_t over training steps, a panel per alignment loss and a line per noise level (Fig. 3, arXiv 2505.16792).

    Mean over seeds; bars reach from the lowest to the highest end of the seeds' intervals.

    Args:
        table: of `analysis.gradients.conflict`, with arm and seed. tau: the switch, if it is to be marked.
        arm: shown. loss: one panel alone; all by default.

    Raises:
        HasteError: the table has no such rows.
    """
    rows = _only(table, arm=arm, **({} if loss is None else {"loss": loss}))
    figure, axes = _panels(rows["loss"].unique())
    for axis, (name, part) in zip(axes, rows.groupby("loss", sort=False), strict=True):
        levels = sorted(part["t"].unique())
        for colour, t in zip(_colours(len(levels)), levels, strict=True):
            _line(axis, part[part["t"] == t], "step", f"t = {t:g}", color=colour)
        mark_switch(axis, tau)
        axis.set(xlabel="training steps", title=f"{name} loss")
    return _finish(figure, axes, f"{arm}, {_counts(rows)}")


def conflict_by_arm(table: pd.DataFrame, tau: int | None, loss: str, t: float) -> Figure:
    """rho_t of one loss at one noise level over training steps, a line per arm; arguments as for the other figures.

    Raises:
        HasteError: the table has no such rows.
    """
    rows = _only(table, loss=loss, t=t)
    figure, axes = _panels([loss])
    arms = list(table["arm"].unique())
    for arm, part in rows.groupby("arm", sort=False):
        _line(axes[0], part, "step", str(arm), **style(str(arm), arms))
    mark_switch(axes[0], tau)
    axes[0].set(xlabel="training steps", title=f"{loss} loss, t = {t:g}")
    return _finish(figure, axes, _counts(rows))


def conflict_over_t(table: pd.DataFrame, arm: str, loss: str | None = None) -> Figure:
    """rho_t over the noise level, a panel per alignment loss and a line per checkpoint (Fig. 4, arXiv 2505.16792).

    Arguments and bars as in `conflict_over_training`.

    Raises:
        HasteError: the table has no such rows.
    """
    rows = _only(table, arm=arm, **({} if loss is None else {"loss": loss}))
    figure, axes = _panels(rows["loss"].unique())
    for axis, (name, part) in zip(axes, rows.groupby("loss", sort=False), strict=True):
        steps = sorted(part["step"].unique())
        for colour, step in zip(_colours(len(steps)), steps, strict=True):
            _line(axis, part[part["step"] == step], "t", f"step {step}", color=colour)
        axis.set(xlabel="noise level t (0: data, 1: noise)", title=f"{name} loss")
    return _finish(figure, axes, f"{arm}, {_counts(rows)}")


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
    figure, axes = _panels(both["loss"].unique())
    for axis, (name, part) in zip(axes, both.groupby("loss", sort=False), strict=True):
        levels = sorted(part["t"].unique())
        for colour, t in zip(_colours(len(levels)), levels, strict=True):
            some = part[part["t"] == t]
            axis.errorbar(some["rho"], some["online"], xerr=_bars(some), fmt="o", markersize=3.5, linewidth=0.7,
                          color=colour, label=f"t = {t:g}")  # fmt: skip
        axis.axvline(0, color="#555555", linewidth=0.8)
        axis.set(xlabel="exact, at the block's parameters", title=f"{name} loss{_correlation(part)}")
    return _finish(figure, axes, _counts(both), "online, at activations")


def _only(table: pd.DataFrame, **chosen: Any) -> pd.DataFrame:
    for column, value in chosen.items():
        if not (table[column] == value).any():
            raise unknown(f"{column} in this table of gradients", value, table[column].unique())
        table = table[table[column] == value]
    return table


def _panels(names: Iterable[str]) -> tuple[Figure, list[Any]]:
    count = len(list(names))
    figure = Figure(figsize=(1.2 + 3.9 * count, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=True)[0])


def _colours(count: int) -> list[Any]:
    return [mpl.colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def _line(axis: Any, rows: pd.DataFrame, x: str, label: str, **look: Any) -> None:
    seeds = rows.groupby(x)
    whole = pd.DataFrame({"rho": seeds["rho"].mean(), "low": seeds["low"].min(), "high": seeds["high"].max()})
    axis.errorbar(whole.index, whole["rho"], yerr=_bars(whole), label=label, marker="o", markersize=3.5, elinewidth=0.8,
                  capsize=1.5, **look)  # fmt: skip


def _bars(rows: pd.DataFrame) -> list[pd.Series]:
    # A percentile interval need not hold its own estimate.
    return [(rows["rho"] - rows["low"]).clip(lower=0), (rows["high"] - rows["rho"]).clip(lower=0)]


def _correlation(rows: pd.DataFrame) -> str:
    if len(rows) < 3:
        return ""
    pearson, ranks = (f(rows["rho"], rows["online"]).statistic for f in (stats.pearsonr, stats.spearmanr))
    return f"\nr = {pearson:.2f}, ranks {ranks:.2f}, {len(rows)} points"


def _counts(rows: pd.DataFrame) -> str:
    seeds, blocks = rows["seed"].nunique(), ", ".join(map(str, sorted(rows["block"].unique())))
    return f"block {blocks} (from 0), {rows['n'].max()} held-out images, {seeds} seed{'s' * (seeds > 1)}"


def _finish(figure: Figure, axes: Sequence[Any], title: str, ylabel: str = CONFLICT) -> Figure:
    for axis in axes:
        axis.axhline(0, color="#555555", linewidth=0.8)
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=9)
    return figure
