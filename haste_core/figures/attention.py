"""How alike student and teacher attention is, as pictures."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from haste_core.figures.style import Figure, mark_switch, style

_LABELS = {
    "cross_entropy": "cross-entropy (nats)",
    "jensen_shannon": "Jensen-Shannon divergence (nats)",
    "top_k_overlap": "overlap of the first keys",
    "r2": "$R^2$ of teacher tokens from student tokens",
    "entropy": "entropy (nats)",
    "distance": "distance (tokens)",
}
# Baselines that are one value whatever the step: how they are drawn.
_REFERENCES = {"uniform": ("uniform attention", "--"), "teacher": ("the teacher itself", "-")}


def attention_similarity(table: pd.DataFrame, tau: int | None = None) -> Figure:
    """Each measure over training steps, a line per arm, beside its baselines.

    A line is the mean over layer pairs, heads, noise levels and seeds, its band goes from lowest to highest seed; thin
    lines of the same colour are the arm against the teacher's map of another image. Step 0 is the untrained student.

    Args:
        table: rows of `analysis.attention_similarity.measure`, under arm and seed. tau: the switch, if there is one.
    """
    measures = list(table["measure"].unique())
    figure = Figure(figsize=(4.4 * len(measures), 4.2))
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        _lines_over_steps(axis, table[table["measure"] == measure])
        mark_switch(axis, tau)
        axis.set(xlabel="training step", ylabel=_LABELS[measure])
    _legend_below(figure, axes[0])
    return figure


def cross_effects(table: pd.DataFrame, tau: int | None = None, measure: str = "jensen_shannon") -> Figure:
    """What each arm does to attention (left) and to features (right), over training steps, with baselines.

    Args:
        table: rows of `analysis.cross_effects.cross_effects`, under arm and seed; lines as in `attention_similarity`.
        tau: the switch, if there is one. measure: of attention.
    """
    figure = Figure(figsize=(10.0, 4.2))
    axes = figure.subplots(1, 2)
    for axis, side, name in zip(axes, ("attention", "features"), (measure, "r2"), strict=True):
        _lines_over_steps(axis, table[(table["side"] == side) & (table["measure"] == name)])
        mark_switch(axis, tau)
        axis.set(title=f"{side} beside the teacher's", xlabel="training step", ylabel=_LABELS[name])
    _legend_below(figure, axes[0])
    return figure


def head_map(table: pd.DataFrame, measure: str, step: int, t: float) -> Figure:
    """Layer pairs (rows) by heads (columns) of every arm, coloured by a measure on one scale.

    Args:
        table: rows of `analysis.attention_similarity.measure`, under arm and seed; means over seeds are shown.
        measure, step, t: which rows.
    """
    chosen = table[(table["measure"] == measure) & (table["baseline"] == "none")]
    chosen = chosen[(chosen["step"] == step) & np.isclose(chosen["t"], t)]
    maps = {
        arm: rows.pivot_table(index=["student_block", "teacher_block"], columns="head", values="value")
        for arm, rows in chosen.groupby("arm", sort=False)
    }
    low, high = chosen["value"].min(), chosen["value"].max()
    figure = Figure(figsize=(2.5 * len(maps) + 1.0, 2.6), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (arm, values) in zip(axes, maps.items(), strict=True):
        picture = axis.imshow(values.to_numpy(), cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axis.set(title=arm, xlabel="head", xticks=range(values.shape[1]), xticklabels=list(values.columns))
        axis.set_yticks(range(len(values)), [f"{s} $\\leftarrow$ {t}" for s, t in values.index])
        axis.grid(False)
    axes[0].set_ylabel("student $\\leftarrow$ teacher block")
    figure.colorbar(picture, ax=list(axes), label=_LABELS[measure])
    figure.suptitle(f"step {step}, t = {t:g}", fontsize=10)
    return figure


def head_statistics(table: pd.DataFrame, step: int, t: float) -> Figure:
    """Entropy and distance of every head, by relative depth: small dots the students', diamonds the teacher's.

    Args:
        table: rows of `analysis.attention_similarity.own_statistics`, under arm and seed.
        step, t: of the student. Lines join the means over heads and seeds of an arm's blocks.
    """
    students = table[(table["source"] == "student") & (table["step"] == step) & np.isclose(table["t"], t)]
    measures, arms = list(table["measure"].unique()), list(table["arm"].unique())
    figure = Figure(figsize=(5.0 * len(measures), 4.2))
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        for arm in arms:
            look = style(arm, arms)
            _heads_by_depth(axis, students[(students["arm"] == arm) & (students["measure"] == measure)], arm, look)
        teacher = table[(table["source"] == "teacher") & (table["measure"] == measure)]
        teacher = teacher[teacher["arm"] == arms[0]]
        _heads_by_depth(axis, teacher, "teacher", {"color": "black", "linestyle": "-"}, "D")
        uniform = table[(table["source"] == "uniform") & (table["measure"] == measure)]["value"]
        axis.axhline(uniform.iloc[0], color="#999999", linestyle="--", linewidth=0.9, label="uniform attention")
        axis.set(xlabel="relative depth of the block", ylabel=_LABELS[measure], title=f"step {step}, t = {t:g}")
    _legend_below(figure, axes[0])
    return figure


def query_maps(maps: pd.DataFrame, image: np.ndarray) -> Figure:
    """An image, and where one of its tokens (red) looks in the student and in the teacher, on one colour scale.

    Args:
        maps: rows of `analysis.token_maps.token_map_table`. image: (S, S[, 3]), the one they belong to.
    """
    rows, columns = int(maps["row"].max()) + 1, int(maps["column"].max()) + 1
    row, column = divmod(int(maps["query"].iloc[0]), columns)
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(image, cmap="gray", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), interpolation="nearest")
    axes[0].set_title(f"image, t = {maps['t'].iloc[0]:g}", fontsize=9)
    for axis, (source, chosen) in zip(axes[1:], maps.groupby("source", sort=False), strict=True):
        values = chosen.pivot(index="row", columns="column", values="probability").to_numpy()
        picture = axis.imshow(values, cmap="viridis", vmin=0, vmax=maps["probability"].max())
        axis.set_title(f"{source}, block {chosen['block'].iloc[0]}, head {chosen['head'].iloc[0]}", fontsize=9)
    for axis in axes:
        box = mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#ff3030", lw=1.6)
        axis.add_patch(box)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    figure.colorbar(picture, ax=list(axes), label="probability")
    return figure


def _lines_over_steps(axis: Any, rows: pd.DataFrame) -> None:
    arms = list(rows["arm"].unique())
    for arm in arms:
        look, own = style(arm, arms), rows[rows["arm"] == arm]
        per_step = own[own["baseline"] == "none"].pivot_table(index="step", columns="seed", values="value")
        axis.plot(per_step.index, per_step.mean(axis=1), label=arm, marker="o", markersize=3.5, **look)
        axis.fill_between(
            per_step.index, per_step.min(axis=1), per_step.max(axis=1), color=look["color"], alpha=0.15, linewidth=0
        )
        shuffled = own[own["baseline"] == "shuffled"].groupby("step")["value"].mean()
        axis.plot(shuffled.index, shuffled, linewidth=0.8, alpha=0.7, **look)
    axis.plot([], [], color="#888888", linewidth=0.8, label="thin: teacher of another image")
    for baseline, (label, line) in _REFERENCES.items():
        value = rows[rows["baseline"] == baseline]["value"]
        if len(value):
            axis.axhline(value.mean(), color="#999999", linestyle=line, linewidth=0.9, label=label)


def _heads_by_depth(axis: Any, rows: pd.DataFrame, label: str, look: dict[str, Any], marker: str = ".") -> None:
    depth = rows["block"] / max(1, rows["block"].max())
    axis.scatter(depth, rows["value"], s=16, marker=marker, color=look["color"], alpha=0.45, linewidths=0)
    means = rows.groupby(depth)["value"].mean()
    axis.plot(means.index, means, label=label, **look)


def _legend_below(figure: Figure, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=(len(labels) + 1) // 2, fontsize=8.5)
