"""Figures of the similarity of student and teacher: representations, linear probing, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from haste_core.figures.style import (
    Figure,
    heatmap,
    legend_below,
    mark_switch,
    panels,
    seed_line,
    style,
    without_ticks,
)

NAMES = {
    "cka": "CKA (unbiased)",
    "cka_biased": "CKA (biased)",
    "cknna": "CKNNA",
    "mutual_knn": "share of mutual neighbours",
    "cross_entropy": "cross-entropy (nats)",
    "jensen_shannon": "Jensen-Shannon divergence (nats)",
    "top_k_overlap": "overlap of the first keys",
    "r2": "$R^2$ of teacher tokens from student tokens",
    "entropy": "entropy (nats)",
    "distance": "distance (tokens)",
    "accuracy": "linear probing accuracy",
}
AXES = {"step": "training steps", "t": "noise level t (0: data, 1: noise)", "depth": "student depth (from 1)"}
# Baselines that do not depend on the step: label and line style.
_REFERENCES = {"uniform": ("uniform attention", "--"), "teacher": ("the teacher itself", "-")}
_RED = "#ff3030"


def similarity_maps(similarity: pd.DataFrame, measure: str = "cka", steps: Sequence[int] | None = None) -> Figure:
    """Student blocks (rows) against teacher blocks (columns), a map per arm and step (all by default), mean over seeds.

    The frame is the pair that feature alignment compares. Rows are of `analysis.similarity.block_similarity`.
    """
    chosen = _at_middle(similarity[similarity["measure"] == measure])
    arms, steps = list(chosen["arm"].unique()), list(steps or sorted(chosen["step"].unique()))
    scale = {"vmin": min(0.0, chosen["value"].min()), "vmax": max(1e-9, chosen["value"].max())}
    figure, axes = panels(
        len(steps), 1.3 * len(steps) + 1.4, 1.6 * len(arms) + 0.7, len(arms), sharex=True, sharey=True
    )
    for axis, (arm, step) in zip(axes, ((arm, step) for arm in arms for step in steps), strict=True):
        rows = chosen[(chosen["arm"] == arm) & (chosen["step"] == step)]
        cells = rows.pivot_table(index="depth", columns="teacher_block", values="value")
        picture = heatmap(axis, cells, cmap="viridis", origin="lower", **scale)
        axis.tick_params(labelsize=8)
        for depth, block in rows.loc[rows["aligned"], ["depth", "teacher_block"]].drop_duplicates().to_numpy():
            _frame(axis, cells.index.get_loc(depth), cells.columns.get_loc(block), inside=0.06)
        if arm == arms[0]:
            axis.set_title(f"step {step}", fontsize=9)
        if step == steps[0]:
            axis.set_ylabel(f"{arm}\nstudent depth", fontsize=9)
    figure.supxlabel("teacher block (from 0)", fontsize=9)
    figure.colorbar(picture, ax=list(axes), label=NAMES[measure], shrink=0.8)
    figure.suptitle(f"t = {chosen['t'].iloc[0]:g}, {_sizes(chosen)}", fontsize=9, x=0.01, ha="left")
    return figure


def _frame(axis: Any, row: int, column: int, inside: float = 0.0) -> None:
    """Draw a red frame around a cell."""
    corner, side = (column - 0.5 + inside, row - 0.5 + inside), 1 - 2 * inside
    axis.add_patch(mpl.patches.Rectangle(corner, side, side, fill=False, edgecolor=_RED, linewidth=1.5))


def aligned_similarity(similarity: pd.DataFrame, tau: int | None, measure: str = "cka") -> Figure:
    """Similarity of the aligned pair over training, a line per arm (mean over seeds); thin: its shuffled baseline.

    Bands span the seeds, or with one seed the bootstrap interval if there is one.
    """
    chosen = _at_middle(similarity[similarity["aligned"] & (similarity["measure"] == measure)])
    figure, axis = _lines(chosen, "step", measure, f"{_pair(chosen)}, t = {chosen['t'].iloc[0]:g}, {_sizes(chosen)}")
    mark_switch(axis, tau)
    return figure


def similarity_over_t(similarity: pd.DataFrame, step: int, measure: str = "cka") -> Figure:
    """Similarity of the aligned pair over the noise level at one step, drawn as in `aligned_similarity`."""
    chosen = similarity[similarity["aligned"] & (similarity["measure"] == measure) & (similarity["step"] == step)]
    figure, axis = _lines(chosen, "t", measure, f"{_pair(chosen)}, step {step}, {_sizes(chosen)}")
    axis.set_xlim(0, 1)
    return figure


def probing_over_depth(probing: pd.DataFrame, step: int) -> Figure:
    """Linear probing accuracy after every block at one step, a line per arm, beside the teacher's and chance."""
    figure, axis = _probing(probing, "depth", "step", step)
    axis.set_xticks(sorted(probing.loc[probing["network"] == "student", "depth"].unique()))
    return figure


def probing_over_training(probing: pd.DataFrame, depth: int, tau: int | None) -> Figure:
    """Linear probing accuracy after one block (depth from 1) over training, drawn as in `probing_over_depth`."""
    figure, axis = _probing(probing, "step", "depth", depth)
    mark_switch(axis, tau)
    return figure


def _probing(probing: pd.DataFrame, along: str, fixed: str, value: int) -> tuple[Figure, Any]:
    student, teacher = (probing[probing["network"] == network] for network in ("student", "teacher"))
    rows, t, n = student[student[fixed] == value], student["t"].iloc[0], student["n"].iloc[0]
    figure, axis = _lines(rows, along, "accuracy", f"{fixed} {value}, t = {t:g}, {n} held-out images")
    axis.axhline(teacher["accuracy"].mean(), color="#222222", linewidth=0.9, label="teacher, clean images")
    axis.axhline(rows["chance"].mean(), color="#999999", linewidth=0.8, linestyle=":", label="chance")
    axis.legend()
    return figure, axis


def _lines(rows: pd.DataFrame, along: str, measure: str, title: str) -> tuple[Figure, Any]:
    """Figure with a line per arm, and thin its baseline if the rows have one."""
    figure, (axis,) = panels(1, 7.2, 4.2)
    arms = list(rows["arm"].unique())
    for arm, own in rows.groupby("arm", sort=False):
        look = style(str(arm), arms)
        seed_line(axis, own, along, arm, look, "value" if "value" in own else measure)
        if "baseline" in own:
            baseline = own.groupby(along)["baseline"].mean()
            axis.plot(baseline.index, baseline, linewidth=0.8, alpha=0.6, **look)
    title += "; thin: shuffled pairs of images" if "baseline" in rows else ""
    axis.set(xlabel=AXES[along], ylabel=NAMES[measure])
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend()
    return figure, axis


def _at_middle(rows: pd.DataFrame) -> pd.DataFrame:
    # All pairs of blocks are measured at one level only, the nearest to 0.5.
    return rows[rows["t"] == min(sorted(rows["t"].unique()), key=lambda t: abs(t - 0.5))]


def _pair(rows: pd.DataFrame) -> str:
    depths, blocks = ("/".join(map(str, sorted(rows[name].unique()))) for name in ("depth", "teacher_block"))
    return f"student depth {depths} and teacher block {blocks}"


def _sizes(rows: pd.DataFrame) -> str:
    return f"n = {rows['n'].iloc[0]}" + "".join(f", k = {k:g}" for k in rows["k"].dropna().unique()[:1])


def attention_similarity(table: pd.DataFrame, tau: int | None = None) -> Figure:
    """Each measure of attention over training steps, a line per arm, beside its baselines.

    A line is the mean over layer pairs, heads, noise levels and seeds, its band goes from lowest to highest seed; thin
    lines of the same colour are the arm against the teacher's map of another image. Step 0 is the untrained student.
    Rows are of `analysis.attention.attention_similarity`, under arm and seed.
    """
    measures = list(table["measure"].unique())
    return _over_steps([(table[table["measure"] == name], name, "") for name in measures], tau)


def cross_effects(table: pd.DataFrame, tau: int | None = None, measure: str = "jensen_shannon") -> Figure:
    """Effect of each arm on attention (left) and on features (right), over training steps, with baselines.

    Rows are of `analysis.attention.cross_effects`, under arm and seed; lines as in `attention_similarity`.
    """
    sides = {"attention": measure, "features": "r2"}
    parts = {side: table[(table["side"] == side) & (table["measure"] == name)] for side, name in sides.items()}
    return _over_steps([(rows, sides[side], f"{side} beside the teacher's") for side, rows in parts.items()], tau)


def _over_steps(parts: list[tuple[pd.DataFrame, str, str]], tau: int | None) -> Figure:
    """Figure with a panel for the rows, measure and title of each part."""
    figure, axes = panels(len(parts), 4.6 * len(parts), 4.2)
    for axis, (rows, measure, title) in zip(axes, parts, strict=True):
        arms = list(rows["arm"].unique())
        for arm, own in rows.groupby("arm", sort=False):
            look = style(str(arm), arms)
            seed_line(axis, own[own["baseline"] == "none"], "step", arm, look)
            shuffled = own[own["baseline"] == "shuffled"].groupby("step")["value"].mean()
            axis.plot(shuffled.index, shuffled, linewidth=0.8, alpha=0.7, **look)
        axis.plot([], [], color="#888888", linewidth=0.8, label="thin: teacher of another image")
        for baseline, (label, line) in _REFERENCES.items():
            value = rows.loc[rows["baseline"] == baseline, "value"]
            if len(value):
                axis.axhline(value.mean(), color="#999999", linestyle=line, linewidth=0.9, label=label)
        mark_switch(axis, tau)
        axis.set(title=title, xlabel="training steps", ylabel=NAMES[measure])
    legend_below(figure, axes[0])
    return figure


def head_map(table: pd.DataFrame, measure: str, step: int, t: float) -> Figure:
    """Layer pairs (rows) by heads (columns) of every arm, coloured by a measure on one scale, mean over seeds.

    Rows are of `analysis.attention.attention_similarity`, under arm and seed.
    """
    chosen = table[(table["measure"] == measure) & (table["baseline"] == "none") & (table["step"] == step)]
    chosen = chosen[np.isclose(chosen["t"], t)]
    arms = list(chosen["arm"].unique())
    figure, axes = panels(len(arms), 2.5 * len(arms) + 1.0, 2.6)
    for axis, arm in zip(axes, arms, strict=True):
        pairs = ["student_block", "teacher_block"]
        cells = chosen[chosen["arm"] == arm].pivot_table(index=pairs, columns="head", values="value")
        cells.index = [f"{student} $\\leftarrow$ {teacher}" for student, teacher in cells.index]
        picture = heatmap(axis, cells, cmap="viridis", vmin=chosen["value"].min(), vmax=chosen["value"].max())
        axis.set(title=arm, xlabel="head")
    axes[0].set_ylabel("student $\\leftarrow$ teacher block")
    figure.colorbar(picture, ax=list(axes), label=NAMES[measure])
    figure.suptitle(f"step {step}, t = {t:g}", fontsize=10)
    return figure


def head_statistics(table: pd.DataFrame, step: int, t: float) -> Figure:
    """Entropy and distance of every head, by relative depth: a dot per head, a line through the means of blocks.

    Rows are of `analysis.attention.head_statistics`, under arm and seed. step, t: of the student.
    """
    arms = list(table["arm"].unique())
    student = table[(table["source"] == "student") & (table["step"] == step) & np.isclose(table["t"], t)]
    # Every run has measured the same frozen network.
    teacher = table[(table["source"] == "teacher") & (table["arm"] == arms[0])].assign(arm="teacher")
    figure, axes = panels(table["measure"].nunique(), 10.0, 4.2)
    for axis, measure in zip(axes, table["measure"].unique(), strict=True):
        rows = pd.concat([student, teacher])
        for arm, own in rows[rows["measure"] == measure].groupby("arm", sort=False):
            look = {"color": "black"} if arm == "teacher" else style(str(arm), arms)
            depth = own["block"] / max(1, own["block"].max())
            axis.scatter(depth, own["value"], s=16, color=look["color"], alpha=0.45, linewidths=0)
            means = own.groupby(depth)["value"].mean()
            axis.plot(means.index, means, label=arm, **look)
        uniform = table.loc[(table["source"] == "uniform") & (table["measure"] == measure), "value"]
        axis.axhline(uniform.iloc[0], color="#999999", linestyle="--", linewidth=0.9, label="uniform attention")
        axis.set(xlabel="relative depth of the block", ylabel=NAMES[measure], title=f"step {step}, t = {t:g}")
    legend_below(figure, axes[0])
    return figure


def attention_maps(maps: pd.DataFrame, image: np.ndarray) -> Figure:
    """Attention of chosen tokens (rows): the image (S, S[, 3]), then each source; red marks the query token.

    Rows are of `analysis.attention.token_maps` for one seed, `teacher_maps` or `head_maps`.
    """
    queries, sources = sorted(maps["query"].unique()), list(maps["source"].unique())
    side = int(np.sqrt(maps["key"].max() + 1))
    figure, axes = panels(len(sources) + 1, 1.55 * (len(sources) + 1), 1.6 * len(queries) + 0.5, len(queries))
    for (shown, *others), query in zip(axes.reshape(len(queries), -1), queries, strict=True):
        shown.imshow(image, cmap="gray", extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="nearest")
        for axis, source in zip(others, sources, strict=True):
            chosen = maps[(maps["source"] == source) & (maps["query"] == query)].sort_values("key")
            values = chosen["probability"].to_numpy().reshape(side, side)
            axis.imshow(values, cmap="viridis", vmin=0, vmax=maps["probability"].max())
            if query == queries[0]:
                apart = chosen["divergence"].iloc[0]
                axis.set_title(f"{source}\nKL {apart:.2f}" if apart > 0 else source, fontsize=9)
        for axis in (shown, *others):
            _frame(axis, *divmod(int(query), side))
            without_ticks(axis)
    axes[0].set_title("image", fontsize=9)
    return figure
