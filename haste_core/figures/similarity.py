"""Figures of the similarity of student and teacher: representations, linear probing, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from haste_core.figures.style import (
    Figure,
    line_with_band,
    mark_switch,
    mark_token,
    panels,
    single,
    style,
    without_ticks,
)

NAMES = {
    "cka": "CKA (unbiased)",
    "cka_biased": "CKA (biased)",
    "cknna": "CKNNA",
    "mutual_knn": "share of mutual neighbours",
}
_LABELS = {
    "cross_entropy": "cross-entropy (nats)",
    "jensen_shannon": "Jensen-Shannon divergence (nats)",
    "top_k_overlap": "overlap of the first keys",
    "r2": "$R^2$ of teacher tokens from student tokens",
    "entropy": "entropy (nats)",
    "distance": "distance (tokens)",
}
# Baselines that do not depend on the step: label and line style.
_REFERENCES = {"uniform": ("uniform attention", "--"), "teacher": ("the teacher itself", "-")}


def similarity_maps(similarity: pd.DataFrame, measure: str = "cka", steps: Sequence[int] | None = None) -> Figure:
    """Student blocks (rows) against teacher blocks (columns), a map per arm and step, mean over seeds.

    The frame is the pair that feature alignment compares.

    Args:
        similarity: rows of `analysis.similarity.block_similarity` of runs of one study.
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
    figure.suptitle(_sizes(chosen), fontsize=9, x=0.01, ha="left")
    return figure


def _map(axis: Any, rows: pd.DataFrame, low: float, high: float) -> Any:
    cells = rows.pivot_table(index="depth", columns="teacher_block", values="value")
    picture = axis.imshow(cells.to_numpy(), cmap="viridis", vmin=low, vmax=high, origin="lower", aspect="auto")
    axis.set_xticks(range(cells.shape[1]), cells.columns)
    axis.set_yticks(range(cells.shape[0]), cells.index)
    axis.tick_params(labelsize=8)
    axis.grid(False)
    for depth, block in rows.loc[rows["aligned"], ["depth", "teacher_block"]].drop_duplicates().to_numpy():
        corner = (list(cells.columns).index(block) - 0.5, list(cells.index).index(depth) - 0.5)
        # A closed line inside the cell's borders.
        x, y = np.array([0.06, 0.94, 0.94, 0.06, 0.06]), np.array([0.06, 0.06, 0.94, 0.94, 0.06])
        axis.plot(corner[0] + x, corner[1] + y, color="#ff3030", linewidth=1.2)
    return picture


def aligned_similarity(similarity: pd.DataFrame, tau: int | None, measure: str = "cka") -> Figure:
    """Similarity of the aligned pair over training, a line per arm (mean over seeds); thin: its shuffled baseline.

    Bands span the seeds, or with one seed the bootstrap interval if there is one.
    """
    chosen = _at_middle(_aligned(similarity, measure))
    figure, axis = single(7.2, 4.2)
    _lines(axis, chosen, "step", "value")
    mark_switch(axis, tau)
    axis.set(xlabel="training steps", ylabel=NAMES[measure])
    axis.set_title(f"{_pair_name(chosen)}, {_sizes(chosen)}; thin: shuffled pairs of images", fontsize=9, loc="left")
    axis.legend()
    return figure


def similarity_over_t(similarity: pd.DataFrame, step: int, measure: str = "cka") -> Figure:
    """Similarity of the aligned pair over the noise level at one step, drawn as in `aligned_similarity`."""
    chosen = _aligned(similarity, measure)
    chosen = chosen[chosen["step"] == step]
    figure, axis = single(6.4, 4.0)
    _lines(axis, chosen, "t", "value")
    axis.set(xlabel="t (0: data, 1: noise)", ylabel=NAMES[measure], xlim=(0, 1))
    title = f"{_pair_name(chosen)}, step {step}, n = {chosen['n'].iloc[0]}; thin: shuffled pairs of images"
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend()
    return figure


def probing_over_depth(probing: pd.DataFrame, step: int) -> Figure:
    """Linear probing accuracy after every block at one step, a line per arm, beside the teacher's and chance.

    Args:
        probing: rows of `analysis.similarity.linear_probing`; of several noise levels the first is shown.
        step: shown.
    """
    return _probing(probing, "depth", "student depth (from 1)", ("step", step))[0]


def probing_over_training(probing: pd.DataFrame, depth: int, tau: int | None) -> Figure:
    """Linear probing accuracy after one block (depth from 1) over training, drawn as in `probing_over_depth`."""
    figure, axis = _probing(probing, "step", "training steps", ("depth", depth))
    mark_switch(axis, tau)
    return figure


def _probing(probing: pd.DataFrame, along: str, label: str, fixed: tuple[str, int]) -> tuple[Figure, Any]:
    student, teacher = (probing[probing["network"] == network] for network in ("student", "teacher"))
    t, (name, value) = student["t"].iloc[0], fixed
    student = student[(student["t"] == t) & (student[name] == value)]
    figure, axis = single(6.4, 4.0)
    _lines(axis, student, along, "accuracy")
    axis.axhline(teacher["accuracy"].mean(), color="#222222", linewidth=0.9, label="teacher, clean images")
    axis.axhline(student["chance"].mean(), color="#999999", linewidth=0.8, linestyle=":", label="chance")
    axis.set(xlabel=label, ylabel="linear probing accuracy")
    title = f"{name} {value}, t = {t:g}, {student['n'].iloc[0]} held-out images"
    axis.set_title(title, fontsize=9, loc="left")
    if along == "depth":
        axis.set_xticks(sorted(student["depth"].unique()))
    axis.legend()
    return figure, axis


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


def _aligned(similarity: pd.DataFrame, measure: str) -> pd.DataFrame:
    return similarity[similarity["aligned"] & (similarity["measure"] == measure)]


def _at_middle(rows: pd.DataFrame) -> pd.DataFrame:
    # All pairs of blocks are measured at one level only, the nearest to 0.5.
    return rows[rows["t"] == min(sorted(rows["t"].unique()), key=lambda t: abs(t - 0.5))]


def _pair_name(rows: pd.DataFrame) -> str:
    depths, blocks = ("/".join(map(str, sorted(rows[name].unique()))) for name in ("depth", "teacher_block"))
    return f"student depth {depths} and teacher block {blocks}"


def _sizes(rows: pd.DataFrame) -> str:
    k = "".join(f", k = {k:g}" for k in rows["k"].dropna().unique()[:1])
    return f"t = {rows['t'].iloc[0]:g}, n = {rows['n'].iloc[0]}{k}"


def attention_similarity(table: pd.DataFrame, tau: int | None = None) -> Figure:
    """Each measure of attention over training steps, a line per arm, beside its baselines.

    A line is the mean over layer pairs, heads, noise levels and seeds, its band goes from lowest to highest seed; thin
    lines of the same colour are the arm against the teacher's map of another image. Step 0 is the untrained student.

    Args:
        table: rows of `analysis.attention.attention_similarity`, under arm and seed. tau: the switch, if there is one.
    """
    measures = list(table["measure"].unique())
    figure, axes = panels(len(measures), 4.4 * len(measures), 4.2, None)
    for axis, measure in zip(axes, measures, strict=True):
        _lines_over_steps(axis, table[table["measure"] == measure], tau)
        axis.set(xlabel="training step", ylabel=_LABELS[measure])
    _legend_below(figure, axes[0])
    return figure


def cross_effects(table: pd.DataFrame, tau: int | None = None, measure: str = "jensen_shannon") -> Figure:
    """Effect of each arm on attention (left) and on features (right), over training steps, with baselines.

    Args:
        table: rows of `analysis.attention.cross_effects`, under arm and seed; lines as in `attention_similarity`.
        tau: the switch, if there is one. measure: of attention.
    """
    figure, axes = panels(2, 10.0, 4.2, None)
    for axis, side, name in zip(axes, ("attention", "features"), (measure, "r2"), strict=True):
        _lines_over_steps(axis, table[(table["side"] == side) & (table["measure"] == name)], tau)
        axis.set(title=f"{side} beside the teacher's", xlabel="training step", ylabel=_LABELS[name])
    _legend_below(figure, axes[0])
    return figure


def _lines_over_steps(axis: Any, rows: pd.DataFrame, tau: int | None) -> None:
    arms = list(rows["arm"].unique())
    for arm in arms:
        look, own = style(arm, arms), rows[rows["arm"] == arm]
        seeds = own[own["baseline"] == "none"].pivot_table(index="step", columns="seed", values="value")
        line_with_band(axis, seeds.mean(axis=1), (seeds.min(axis=1), seeds.max(axis=1)), look, label=arm)
        shuffled = own[own["baseline"] == "shuffled"].groupby("step")["value"].mean()
        axis.plot(shuffled.index, shuffled, linewidth=0.8, alpha=0.7, **look)
    axis.plot([], [], color="#888888", linewidth=0.8, label="thin: teacher of another image")
    for baseline, (label, line) in _REFERENCES.items():
        value = rows[rows["baseline"] == baseline]["value"]
        if len(value):
            axis.axhline(value.mean(), color="#999999", linestyle=line, linewidth=0.9, label=label)
    mark_switch(axis, tau)


def _legend_below(figure: Figure, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=(len(labels) + 1) // 2, fontsize=8.5)


def head_map(table: pd.DataFrame, measure: str, step: int, t: float) -> Figure:
    """Layer pairs (rows) by heads (columns) of every arm, coloured by a measure on one scale.

    Args:
        table: rows of `analysis.attention.attention_similarity`, under arm and seed; means over seeds are shown.
        measure, step, t: which rows.
    """
    chosen = table[(table["measure"] == measure) & (table["baseline"] == "none")]
    chosen = chosen[(chosen["step"] == step) & np.isclose(chosen["t"], t)]
    maps = {
        arm: rows.pivot_table(index=["student_block", "teacher_block"], columns="head", values="value")
        for arm, rows in chosen.groupby("arm", sort=False)
    }
    low, high = chosen["value"].min(), chosen["value"].max()
    figure, axes = panels(len(maps), 2.5 * len(maps) + 1.0, 2.6)
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
        table: rows of `analysis.attention.head_statistics`, under arm and seed.
        step, t: of the student. Lines join the means over heads and seeds of an arm's blocks.
    """
    students = table[(table["source"] == "student") & (table["step"] == step) & np.isclose(table["t"], t)]
    measures, arms = list(table["measure"].unique()), list(table["arm"].unique())
    figure, axes = panels(len(measures), 5.0 * len(measures), 4.2, None)
    for axis, measure in zip(axes, measures, strict=True):
        rows = table[table["measure"] == measure]
        for arm in arms:
            own = students[(students["arm"] == arm) & (students["measure"] == measure)]
            _heads_by_depth(axis, own, arm, style(arm, arms), ".")
        teacher = rows[(rows["source"] == "teacher") & (rows["arm"] == arms[0])]
        _heads_by_depth(axis, teacher, "teacher", {"color": "black", "linestyle": "-"}, "D")
        uniform = rows[rows["source"] == "uniform"]["value"]
        axis.axhline(uniform.iloc[0], color="#999999", linestyle="--", linewidth=0.9, label="uniform attention")
        axis.set(xlabel="relative depth of the block", ylabel=_LABELS[measure], title=f"step {step}, t = {t:g}")
    _legend_below(figure, axes[0])
    return figure


def _heads_by_depth(axis: Any, rows: pd.DataFrame, label: str, look: dict[str, Any], marker: str) -> None:
    depth = rows["block"] / max(1, rows["block"].max())
    axis.scatter(depth, rows["value"], s=16, marker=marker, color=look["color"], alpha=0.45, linewidths=0)
    means = rows.groupby(depth)["value"].mean()
    axis.plot(means.index, means, label=label, **look)


def attention_maps(maps: pd.DataFrame, image: np.ndarray) -> Figure:
    """Attention of chosen tokens (rows): the image, the teacher, then each arm; red marks the query token.

    Args:
        maps: rows of `analysis.attention.token_maps` for one seed.
        image: (S, S), the image the maps belong to.
    """
    queries, sources = sorted(maps["query"].unique()), list(maps["source"].unique())
    side = int(np.sqrt(maps["key"].max() + 1))
    figure = Figure(figsize=(1.55 * (len(sources) + 1), 1.6 * len(queries) + 0.5))
    axes = figure.subplots(len(queries), len(sources) + 1, squeeze=False)
    for i, query in enumerate(queries):
        axes[i][0].imshow(image, cmap="gray", extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="nearest")
        for j, source in enumerate(sources):
            chosen = maps[(maps["source"] == source) & (maps["query"] == query)].sort_values("key")
            values = chosen["probability"].to_numpy().reshape(side, side)
            axes[i][j + 1].imshow(values, cmap="viridis", vmin=0, vmax=maps["probability"].max())
            if i == 0:
                apart = chosen["divergence"].iloc[0]
                axes[i][j + 1].set_title(f"{source}\nKL {apart:.2f}" if apart > 0 else source, fontsize=9)
        for axis in axes[i]:
            mark_token(axis, *divmod(int(query), side))
            without_ticks(axis)
    axes[0][0].set_title("image", fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def query_maps(maps: pd.DataFrame, image: np.ndarray) -> Figure:
    """An image, and the attention of one of its tokens (red) in the student and in the teacher, on one colour scale.

    Args:
        maps: rows of `analysis.attention.head_maps`. image: (S, S[, 3]), the one they belong to.
    """
    rows, columns = int(maps["row"].max()) + 1, int(maps["column"].max()) + 1
    figure, axes = panels(3, 7.4, 2.9)
    axes[0].imshow(image, cmap="gray", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), interpolation="nearest")
    axes[0].set_title(f"image, t = {maps['t'].iloc[0]:g}", fontsize=9)
    for axis, (source, chosen) in zip(axes[1:], maps.groupby("source", sort=False), strict=True):
        values = chosen.pivot(index="row", columns="column", values="probability").to_numpy()
        picture = axis.imshow(values, cmap="viridis", vmin=0, vmax=maps["probability"].max())
        axis.set_title(f"{source}, block {chosen['block'].iloc[0]}, head {chosen['head'].iloc[0]}", fontsize=9)
    for axis in axes:
        mark_token(axis, *divmod(int(maps["query"].iloc[0]), columns))
        without_ticks(axis)
    figure.colorbar(picture, ax=list(axes), label="probability")
    return figure
