"""How similar the representations of student and teacher are, and what a linear probe reads from them, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from haste_core.figures.style import Figure, mark_switch, style

NAMES = {
    "cka": "CKA (unbiased)",
    "cka_biased": "CKA (biased)",
    "cknna": "CKNNA",
    "mutual_knn": "share of mutual neighbours",
}


def similarity_maps(similarity: pd.DataFrame, measure: str = "cka", steps: Sequence[int] | None = None) -> Figure:
    """Student blocks (rows) against teacher blocks (columns), a map per arm and step, mean over seeds.

    The frame is the pair that feature alignment brings together.

    Args:
        similarity: rows of `analysis.similarity.measure` of runs of one study.
        measure: "cka", "cka_biased", "cknna" or "mutual_knn".
        steps: shown; all there are by default.
    """
    chosen = _at_middle(similarity[similarity["measure"] == measure])
    arms, steps = list(chosen["arm"].unique()), list(steps or sorted(chosen["step"].unique()))
    low, high = min(0.0, float(chosen["value"].min())), max(1e-9, float(chosen["value"].max()))
    figure = Figure(figsize=(1.3 * len(steps) + 1.4, 1.6 * len(arms) + 0.7), layout="constrained")
    axes = figure.subplots(len(arms), len(steps), squeeze=False, sharex=True, sharey=True)
    for i, arm in enumerate(arms):
        for j, step in enumerate(steps):
            rows = chosen[(chosen["arm"] == arm) & (chosen["step"] == step)]
            picture = _map(axes[i][j], rows, low, high)
            if i == 0:
                axes[i][j].set_title(f"step {step}", fontsize=9)
        axes[i][0].set_ylabel(f"{arm}\nstudent depth", fontsize=9)
    figure.supxlabel("teacher block (from 0)", fontsize=9)
    figure.colorbar(picture, ax=axes, label=NAMES[measure], shrink=0.8)
    figure.suptitle(_what(chosen), fontsize=9, x=0.01, ha="left")
    return figure


def aligned_similarity(similarity: pd.DataFrame, tau: int | None, measure: str = "cka") -> Figure:
    """Similarity of the aligned pair over training, a line per arm (mean over seeds); thin: its shuffled baseline.

    Bands span the seeds, or with one seed the bootstrap interval where there is one.
    """
    chosen = _at_middle(_pair(similarity, measure))
    figure = Figure(figsize=(7.2, 4.2))
    axis = figure.subplots()
    _lines(axis, chosen, "step", "value")
    mark_switch(axis, tau)
    axis.set(xlabel="training steps", ylabel=NAMES[measure])
    axis.set_title(f"{_pair_name(chosen)}, {_what(chosen)}; thin: shuffled pairs of images", fontsize=9, loc="left")
    axis.legend()
    return figure


def similarity_over_t(similarity: pd.DataFrame, step: int, measure: str = "cka") -> Figure:
    """Similarity of the aligned pair over the noise level at one step, drawn as in `aligned_similarity`."""
    chosen = _pair(similarity, measure)
    chosen = chosen[chosen["step"] == step]
    figure = Figure(figsize=(6.4, 4.0))
    axis = figure.subplots()
    _lines(axis, chosen, "t", "value")
    axis.set(xlabel="t (0: data, 1: noise)", ylabel=NAMES[measure], xlim=(0, 1))
    title = f"{_pair_name(chosen)}, step {step}, n = {chosen['n'].iloc[0]}; thin: shuffled pairs of images"
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend()
    return figure


def probing_over_depth(probing: pd.DataFrame, step: int, t: float | None = None) -> Figure:
    """Linear probing accuracy after every block at one step, a line per arm, beside the teacher's and chance.

    Args:
        probing: rows of `analysis.probing.measure`. step: shown. t: noise level; the first there is by default.
    """
    return _probing(probing, "depth", "student depth (from 1)", {"step": step}, t)


def probing_over_training(probing: pd.DataFrame, depth: int, tau: int | None, t: float | None = None) -> Figure:
    """Linear probing accuracy after one block (depth from 1) over training, drawn as in `probing_over_depth`."""
    figure = _probing(probing, "step", "training steps", {"depth": depth}, t)
    mark_switch(figure.axes[0], tau)
    return figure


def _probing(probing: pd.DataFrame, along: str, label: str, fixed: dict[str, int], t: float | None) -> Figure:
    student, teacher = (probing[probing["network"] == network] for network in ("student", "teacher"))
    t = student["t"].iloc[0] if t is None else t
    student = student[student["t"] == t]
    for name, value in fixed.items():
        student = student[student[name] == value]
    figure = Figure(figsize=(6.4, 4.0))
    axis = figure.subplots()
    _lines(axis, student, along, "accuracy")
    axis.axhline(teacher["accuracy"].mean(), color="#222222", linewidth=0.9, label="teacher, clean images")
    axis.axhline(student["chance"].mean(), color="#999999", linewidth=0.8, linestyle=":", label="chance")
    axis.set(xlabel=label, ylabel="linear probing accuracy")
    where = ", ".join(f"{name} {value}" for name, value in fixed.items())
    axis.set_title(f"{where}, t = {t:g}, {student['n'].iloc[0]} held-out images", fontsize=9, loc="left")
    if along == "depth":
        axis.set_xticks(sorted(student["depth"].unique()))
    axis.legend()
    return figure


def _lines(axis: Any, rows: pd.DataFrame, along: str, value: str) -> None:
    arms = list(rows["arm"].unique())
    for arm in arms:
        own = rows[rows["arm"] == arm].groupby(along)
        mean, look = own[value].mean(), style(arm, arms)
        axis.plot(mean.index, mean, label=arm, marker="o", markersize=3.5, **look)
        if "baseline" in rows:
            axis.plot(mean.index, own["baseline"].mean(), linewidth=0.8, alpha=0.6, **look)
        seeds = rows["seed"].nunique()
        low, high = (own[value].min(), own[value].max()) if seeds > 1 else (own["low"].mean(), own["high"].mean())
        axis.fill_between(mean.index, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _map(axis: Any, rows: pd.DataFrame, low: float, high: float) -> Any:
    cells = rows.pivot_table(index="depth", columns="teacher_block", values="value")
    picture = axis.imshow(cells.to_numpy(), cmap="viridis", vmin=low, vmax=high, origin="lower", aspect="auto")
    axis.set_xticks(range(cells.shape[1]), cells.columns)
    axis.set_yticks(range(cells.shape[0]), cells.index)
    axis.tick_params(labelsize=8)
    axis.grid(False)
    for depth, block in rows.loc[rows["aligned"], ["depth", "teacher_block"]].drop_duplicates().to_numpy():
        corner = (list(cells.columns).index(block) - 0.5, list(cells.index).index(depth) - 0.5)
        # A frame as a closed line: inside the cell's borders on every side.
        x, y = np.array([0.06, 0.94, 0.94, 0.06, 0.06]), np.array([0.06, 0.06, 0.94, 0.94, 0.06])
        axis.plot(corner[0] + x, corner[1] + y, color="#ff3030", linewidth=1.2)
    return picture


def _pair(similarity: pd.DataFrame, measure: str) -> pd.DataFrame:
    return similarity[similarity["aligned"] & (similarity["measure"] == measure)]


def _at_middle(rows: pd.DataFrame) -> pd.DataFrame:
    # All pairs of blocks are measured at one level only, the nearest to 0.5.
    levels = sorted(rows["t"].unique(), key=lambda t: abs(t - 0.5))
    return rows[rows["t"] == levels[0]]


def _pair_name(rows: pd.DataFrame) -> str:
    depths = "/".join(str(d) for d in sorted(rows["depth"].unique()))
    return (
        f"student depth {depths} and teacher block {'/'.join(str(b) for b in sorted(rows['teacher_block'].unique()))}"
    )


def _what(rows: pd.DataFrame) -> str:
    neighbours = rows["k"].dropna().unique()
    return f"t = {rows['t'].iloc[0]:g}, n = {rows['n'].iloc[0]}" + (
        f", k = {neighbours[0]:g}" if len(neighbours) else ""
    )
