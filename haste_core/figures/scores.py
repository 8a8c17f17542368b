"""Scores, losses, samples, attention maps, cost and claims as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from haste_core.figures.style import VERDICT_COLOUR, Figure, arm_line, mark_switch, plain_numbers, style, tile
from haste_core.study.judging import one_card

# A floor further below the lowest score than this is written, not drawn: it would squeeze the curves together.
NEAR = 30


def fid_against_steps(fid: pd.DataFrame, tau: int | None, floor: float | None = None) -> Figure:
    """FID over training steps, a line per arm (geometric mean over seeds) and a band from lowest to highest seed."""
    card = one_card(fid)
    figure = Figure(figsize=(7.2, 4.4))
    axis = figure.subplots()
    draw_fid(axis, fid)
    mark_switch(axis, tau)
    if floor is not None and floor < fid["fid"].min() / NEAR:
        axis.annotate(f"real against real: {floor:.2g}, below", (0.02, 0.03), xycoords="axes fraction", fontsize=8,
                      color="#666666")  # fmt: skip
    elif floor is not None:
        axis.axhline(floor, color="#999999", linewidth=0.8)
        axis.annotate("real against real", (fid["step"].min(), floor), xytext=(0, 3), textcoords="offset points",
                      fontsize=8, color="#666666")  # fmt: skip
    seeds = fid["seed"].nunique()
    axis.set(xlabel="training steps", ylabel="FID (lower is better)")
    axis.set_title(f"{fid['n'].iloc[0]} samples, {seeds} seed{'s' * (seeds > 1)}, card {card}", fontsize=9, loc="left")
    axis.legend()
    return figure


def draw_fid(axis: Any, fid: pd.DataFrame) -> None:
    """Draw FID over training steps on a logarithmic axis, a line per arm and a band over its seeds."""
    arms = list(fid["arm"].unique())
    for arm in arms:
        per_step = np.log(fid[fid["arm"] == arm].pivot(index="step", columns="seed", values="fid"))
        look = arm_line(arm, arms)
        axis.plot(per_step.index, np.exp(per_step.mean(axis=1)), label=arm, marker="o", markersize=3.5, **look)
        low, high = np.exp(per_step.min(axis=1)), np.exp(per_step.max(axis=1))
        axis.fill_between(per_step.index, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    plain_numbers(axis.yaxis)


def gain_over_vanilla(fid: pd.DataFrame, tau: int | None, vanilla: str = "vanilla") -> Figure:
    """log FID of vanilla minus that of each arm at the same step and seed; above zero the arm's FID is lower."""
    one_card(fid)
    figure = Figure(figsize=(7.2, 4.0))
    axis = figure.subplots()
    base = fid[fid["arm"] == vanilla].set_index(["seed", "step"])["fid"]
    arms = list(fid["arm"].unique())
    for arm in (a for a in arms if a != vanilla):
        own = fid[fid["arm"] == arm].set_index(["seed", "step"])["fid"]
        gain = (np.log(base) - np.log(own)).unstack("seed").dropna()
        look = arm_line(arm, arms)
        axis.plot(gain.index, gain.mean(axis=1), label=arm, marker="o", markersize=3.5, **look)
        for seed in gain.columns:
            axis.plot(gain.index, gain[seed], color=look["color"], alpha=0.3, linewidth=0.8)
    axis.axhline(0, color="#555555", linewidth=1)
    mark_switch(axis, tau)
    axis.set(xlabel="training steps", ylabel="log FID, vanilla minus arm\n(above 0: lower FID than vanilla)")
    axis.legend()
    return figure


def training_curves(metrics: pd.DataFrame, tau: int | None) -> Figure:
    """Denoising, feature and attention loss over steps, a line per arm and seed."""
    names = {
        "denoising": "denoising loss",
        "feature": "feature loss (minus cosine)",
        "attention": "attention loss (nats)",
    }
    present = [name for name in names if name in metrics and metrics[name].notna().any()]
    figure = Figure(figsize=(4.0 * len(present), 3.2), layout="constrained")
    arms = list(metrics["arm"].unique())
    for axis, name in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
        for (arm, seed), rows in metrics.dropna(subset=[name]).groupby(["arm", "seed"], sort=False):
            label = str(arm) if seed == metrics["seed"].min() else None
            axis.plot(rows["step"], rows[name], linewidth=1, label=label, **style(str(arm), arms))
        mark_switch(axis, tau)
        axis.set(xlabel="training steps", title=names[name])
        axis.legend(fontsize=8)
    return figure


def image_rows(rows: dict[str, np.ndarray]) -> Figure:
    """Labelled rows of images: uint8 (n, C, S, S) by label, n the same for all."""
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(0.48 * count + 1, 0.55 * len(rows) + 0.1))
    for axis, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        axis.imshow(tile(np.asarray(images), count), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def sample_sheet(samples: dict[tuple[str, int], np.ndarray], steps: Sequence[int] | None = None) -> Figure:
    """Images from the same noise: a block per step, a row per arm, ten images in a row (40 px and more each).

    Args:
        samples: uint8 images (n, C, S, S) by (arm, step).
        steps: the blocks, top to bottom; by default the first and the last step.
    """
    there = sorted({step for _, step in samples})
    steps = list(dict.fromkeys((there[0], there[-1]) if steps is None else steps))
    arms = list(dict.fromkeys(arm for arm, _ in samples))
    figure = Figure(figsize=(7.6, len(steps) * (0.58 * len(arms) + 0.3)), layout="constrained")
    for part, step in zip(figure.subfigures(len(steps), 1, squeeze=False)[:, 0], steps, strict=True):
        part.suptitle(f"step {step:,}", fontsize=10)
        for axis, arm in zip(part.subplots(len(arms), 1, squeeze=False)[:, 0], arms, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
            axis.set_ylabel(arm, rotation=0, ha="right", va="center")
            if (arm, step) in samples:
                sheet = tile(samples[arm, step][:10], 10)
                axis.imshow(sheet, interpolation="nearest", cmap="gray", vmin=0, vmax=255)
    return figure


def attention_maps(maps: pd.DataFrame, image: np.ndarray) -> Figure:
    """Where chosen tokens (rows) look: the image, the teacher, then each arm; red marks the query token.

    Args:
        maps: rows of `analysis.attention.token_maps` for one seed.
        image: (S, S), the image the maps belong to.
    """
    queries, sources = sorted(maps["query"].unique()), list(maps["source"].unique())
    side = int(np.sqrt(maps["key"].max() + 1))
    figure = Figure(figsize=(1.55 * (len(sources) + 1), 1.6 * len(queries) + 0.5))
    axes = figure.subplots(len(queries), len(sources) + 1, squeeze=False)
    for i, query in enumerate(queries):
        row, column = divmod(int(query), side)
        axes[i][0].imshow(image, cmap="gray", extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="nearest")
        for j, source in enumerate(sources):
            chosen = maps[(maps["source"] == source) & (maps["query"] == query)].sort_values("key")
            values = chosen["probability"].to_numpy().reshape(side, side)
            axes[i][j + 1].imshow(values, cmap="viridis", vmin=0, vmax=maps["probability"].max())
            if i == 0:
                apart = chosen["divergence"].iloc[0]
                title = f"{source}\nKL {apart:.2f}" if apart > 0 else source
                axes[i][j + 1].set_title(title, fontsize=9)
        for axis in axes[i]:
            axis.add_patch(
                mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#ff3030", lw=1.6)
            )
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
    axes[0][0].set_title("image", fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def step_cost(times: pd.DataFrame) -> Figure:
    """The time of a training step relative to a vanilla one, per arm and phase, with its interval."""
    figure = Figure(figsize=(6.4, 0.42 * len(times) + 1.0))
    axis = figure.subplots()
    arms = list(times["arm"])
    labels = [
        f"{r.arm}, {'phase I' if r.phase == 1 else 'phase II' if r.arm != 'vanilla' else 'plain'}"
        for r in times.itertuples()
    ]
    errors = [times["ratio_to_vanilla"] - times["ratio_low"], times["ratio_high"] - times["ratio_to_vanilla"]]
    positions = np.arange(len(times))
    axis.barh(positions, times["ratio_to_vanilla"], xerr=np.clip(errors, 0, None), height=0.6,
              color=[style(arm, arms)["color"] for arm in arms], alpha=0.85, error_kw={"lw": 1})  # fmt: skip
    for y, ratio, high in zip(positions, times["ratio_to_vanilla"], times["ratio_high"], strict=True):
        axis.annotate(
            f"{ratio:.2f}", (max(ratio, high), y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.axvline(1, color="#555555", linewidth=1)
    axis.set_yticks(positions, labels)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="step time over a vanilla step", xlim=(0, times["ratio_high"].max() * 1.15))
    return figure


def claims_forest(claims: pd.DataFrame) -> Figure:
    """Effect and interval of every claim on its own axis, coloured by verdict; dotted: the bounds of its rule."""
    figure = Figure(figsize=(8.2, 0.95 * len(claims) + 0.2))
    axes = figure.subplots(len(claims), 1, squeeze=False)[:, 0]
    for axis, row in zip(axes, claims.to_dict("records"), strict=True):
        colour = VERDICT_COLOUR[str(row["verdict"])]
        for bound in (row["region_low"], row["region_high"]):
            if np.isfinite(bound):
                axis.axvline(bound, color="#555555", linewidth=1, linestyle=":")
        if np.isfinite(row["low"]) and np.isfinite(row["high"]):
            axis.plot([row["low"], row["high"]], [0, 0], color=colour, linewidth=2.5)
        axis.plot(row["effect"], 0, "o", color=colour, markersize=7)
        axis.set(yticks=[], ylim=(-1, 1))
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
        title = f"{row['id']}  {row['claim']}: {row['verdict']}   [{row['unit']}]"
        axis.set_title(title, fontsize=8.5, loc="left", color=colour)
    figure.tight_layout(pad=0.3)
    return figure
