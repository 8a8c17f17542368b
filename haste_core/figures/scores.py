"""Figures of scores, denoising loss, training losses, samples, cost and claims."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from haste_core.analysis.statistics import NEAR_DATA, STRUCTURE, one_card
from haste_core.figures.style import (
    DARK,
    GREEN,
    VERDICT_COLOUR,
    Figure,
    arm_line,
    legend_below,
    mark_switch,
    panels,
    plain_log,
    row_labels,
    seed_line,
    show_images,
    style,
    without_ticks,
)

# A floor further below the lowest score than this factor is written, not drawn: it would squeeze the curves together.
NEAR = 30
_SMALL: dict[str, Any] = {"fontsize": 8, "color": "#666666"}
_ROLES = ("early", "at the switch", "at the end")
_LOSSES = {
    "denoising": "denoising loss",
    "feature": "feature loss (minus cosine)",
    "attention": "attention loss (nats)",
}


def fid_against_steps(fid: pd.DataFrame, tau: int | None, floor: float | None = None) -> Figure:
    """FID over training steps, a line per arm (geometric mean over seeds) and a band from lowest to highest seed."""
    card = one_card(fid)
    figure, (axis,) = panels(1, 7.2, 4.4)
    _draw_fid(axis, fid, tau)
    if floor is not None and floor < fid["fid"].min() / NEAR:
        axis.annotate(f"real against real: {floor:.2g}, below", (0.02, 0.03), xycoords="axes fraction", **_SMALL)
    elif floor is not None:
        axis.axhline(floor, color="#999999", linewidth=0.8)
        axis.annotate("real against real", (fid["step"].min(), floor), va="bottom", **_SMALL)
    seeds = fid["seed"].nunique()
    axis.set_ylabel("FID (lower is better)")
    axis.set_title(f"{fid['n'].iloc[0]} samples, {seeds} seed{'s' * (seeds > 1)}, card {card}", fontsize=9, loc="left")
    axis.legend()
    return figure


def _draw_fid(axis: Any, fid: pd.DataFrame, tau: int | None) -> None:
    _arm_lines(axis, fid, "step", "fid")
    plain_log(axis, "y")
    mark_switch(axis, tau)
    axis.set_xlabel("training steps")


def _arm_lines(axis: Any, rows: pd.DataFrame, along: str, value: str) -> None:
    arms = list(rows["arm"].unique())
    for arm in arms:
        seed_line(axis, rows[rows["arm"] == arm], along, arm, arm_line(arm, arms), value, log=True)


def gain_over_vanilla(fid: pd.DataFrame, tau: int | None) -> Figure:
    """log FID of vanilla minus that of each arm at the same step and seed; above zero the arm's FID is lower."""
    one_card(fid)
    figure, (axis,) = panels(1, 7.2, 4.0)
    logs = np.log(fid.pivot(index=["step", "seed"], columns="arm", values="fid"))
    arms = list(fid["arm"].unique())
    for arm in (a for a in arms if a != "vanilla"):
        gain, look = (logs["vanilla"] - logs[arm]).unstack("seed").dropna(), arm_line(arm, arms)
        axis.plot(gain.index, gain.mean(axis=1), label=arm, marker="o", markersize=3.5, **look)
        axis.plot(gain.index, gain, color=look["color"], alpha=0.3, linewidth=0.8)
    axis.axhline(0, color=DARK, linewidth=1)
    mark_switch(axis, tau)
    axis.set(xlabel="training steps", ylabel="log FID, vanilla minus arm\n(above 0: lower FID than vanilla)")
    axis.legend()
    return figure


def loss_shown(denoising: pd.DataFrame) -> tuple[str, str]:
    """Column and name of the loss that arms are compared by: excess over the best velocity where that is known."""
    return ("excess", "excess loss") if "excess" in denoising else ("loss", "denoising loss")


def loss_ratio(denoising: pd.DataFrame, low: float = 0.0, high: float = 1.0, base: str = "vanilla") -> pd.DataFrame:
    """Held-out loss over that of `base`, mean over noise levels in [low, high]: rows (seed, step), a column an arm.

    It is the loss of `loss_shown`; NaN where `base` has no row for a seed and step.
    """
    one_card(denoising)
    chosen = denoising[(denoising["split"] == "held-out") & denoising["t"].between(low - 1e-9, high + 1e-9)]
    loss = chosen.pivot_table(index=["seed", "step"], columns="arm", values=loss_shown(denoising)[0], aggfunc="mean")
    return loss.reindex(columns=list(chosen["arm"].unique())).div(loss[base], axis=0)


def panel_steps(steps: Iterable[int], tau: int | None, early: Sequence[int]) -> dict[int, str]:
    """Those of the kept steps that are shown in detail, and their names: early, at the switch, at the end.

    Of `early`, the steps of early gains, the last one before the switch is taken, else the first kept one; for the
    switch the kept step nearest to tau.
    """
    kept = sorted({int(step) for step in steps})
    before = [step for step in kept if step in early and (tau is None or step < tau)]
    switch = None if tau is None else min(kept, key=lambda step: abs(step - tau))
    found = [before[-1] if before else kept[0], switch, kept[-1]]
    return {step: name for step, name in zip(found, _ROLES, strict=True) if step is not None}


def compared(denoising: pd.DataFrame | None) -> bool:
    """True if the table has held-out losses of vanilla and of another arm."""
    arms = set() if denoising is None else set(denoising.loc[denoising["split"] == "held-out", "arm"])
    return "vanilla" in arms and len(arms) > 1


def denoising_levels(denoising: pd.DataFrame) -> Figure:
    """Denoising loss (denoising.csv) of one run over the noise level, a line per kept step; dashed: training images."""
    one_card(denoising)
    figure, (axis,) = panels(1, 7.2, 4.2)
    last = denoising["step"].nunique() - 1
    for place, (step, rows) in enumerate(denoising.sort_values("t").groupby("step")):
        for split, part in rows.groupby("split"):
            held = split == "held-out"
            axis.plot(part["t"], part["loss"], "-" if held else "--", color=str(0.75 - 0.75 * place / max(1, last)),
                      label=f"step {step:,}" if held else None, marker="o", markersize=3, linewidth=1.3)  # fmt: skip
    if "training" in set(denoising["split"]):
        axis.plot([], [], "--", color=DARK, label="training images")
    plain_log(axis, "y")
    _noise_axis(axis, denoising["t"])
    axis.set_ylabel("denoising loss (mean square error)")
    axis.legend(fontsize=8)
    return figure


def denoising_over_training(denoising: pd.DataFrame, tau: int | None) -> Figure:
    """Held-out loss over vanilla's, near the data and at high noise, drawn as in `fid_against_steps`."""
    figure, axes = panels(2, 8.6, 3.9)
    titles = (f"near the data (t ≤ {NEAR_DATA})", f"structure (t ≥ {STRUCTURE})")
    for axis, title, span in zip(axes, titles, ((0.0, NEAR_DATA), (STRUCTURE, 1.0)), strict=True):
        _arm_lines(axis, loss_ratio(denoising, *span).melt(ignore_index=False).reset_index(), "step", "value")
        mark_switch(axis, tau)
        axis.set(title=title, xlabel="training steps")
    axes[0].set_ylabel(f"held-out {loss_shown(denoising)[1]} over vanilla's\n(below 1: better than plain training)")
    _legend(figure, axes[0], tau)
    return figure


def summary(
    fid: pd.DataFrame,
    denoising: pd.DataFrame | None,
    samples: dict[tuple[str, int], np.ndarray],
    tau: int | None,
    early: Sequence[int],
) -> Figure:
    """The study's first figure: held-out loss over vanilla's by noise level at three steps, FID, and samples.

    Without losses to compare (one arm, or no vanilla), FID stands alone. Of the samples, uint8 images (n, C, S, S) by
    (arm, step), the last step's are shown. tau, early: the switch and the steps of early gains (`panel_steps`).
    """
    one_card(fid)
    last = max((step for _, step in samples), default=0)
    shown = [arm for arm in fid["arm"].unique() if (arm, last) in samples]
    figure: Any = Figure(figsize=(9.4, 4.1 + 1.15 * bool(shown)), layout="constrained")
    parts = figure.subfigures(1 + bool(shown), 1, height_ratios=[4.1, 1.15][: 1 + bool(shown)], squeeze=False)[:, 0]
    right, named = parts[0], None
    if denoising is not None and compared(denoising):
        left, right = parts[0].subfigures(1, 2, width_ratios=[2.15, 1], squeeze=False)[0]
        named = _level_panels(left, denoising, tau, early)
    right.suptitle("FID over training (lower is better)", fontsize=10, weight="bold")
    scored = right.subplots()
    _draw_fid(scored, fid, tau)
    scored.set_title(" ", fontsize=9)
    _legend(parts[0], named or scored, tau)
    if shown:
        parts[1].suptitle(f"Samples from the same noise, step {last:,}", fontsize=10, weight="bold")
        for axis, arm in zip(parts[1].subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            show_images(axis, samples[arm, last][:10], 5)
            without_ticks(axis, spines=False)
            axis.set_xlabel(arm, fontsize=9, labelpad=2)
    return figure


def _level_panels(figure: Any, denoising: pd.DataFrame, tau: int | None, early: Sequence[int]) -> Any:
    """Draw a panel each for an early step, the switch and the end; returns the last one, which has every arm."""
    held = denoising[denoising["split"] == "held-out"]
    steps = panel_steps(held.loc[held["arm"] == "vanilla", "step"], tau, early)
    loss = held.pivot_table(index=["step", "t", "seed"], columns="arm", values=loss_shown(denoising)[0])
    ratio = loss[held["arm"].unique()].div(loss["vanilla"], axis=0).melt(ignore_index=False).dropna().reset_index()
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axis, step in zip(axes, sorted(steps), strict=True):
        _arm_lines(axis, ratio[ratio["step"] == step], "t", "value")
        _noise_axis(axis, held["t"])
        axis.set_title(f"{steps[step]}: step {step:,}", fontsize=9)
    axes[0].set_ylabel("held-out loss over vanilla's")
    name = loss_shown(denoising)[1]
    figure.suptitle(f"Held-out {name}, below 1: better than plain training", fontsize=10, weight="bold")
    return axes[-1]


def _noise_axis(axis: Any, levels: pd.Series) -> None:
    """Make a logarithmic axis of noise levels with the part near the data shaded."""
    first = 0.8 * float(levels[levels > 0].min())
    axis.set(xscale="log", xlim=(first, 1.08), xlabel="noise level t (0: data)")
    axis.axvspan(first, NEAR_DATA, color="#000000", alpha=0.06, linewidth=0, zorder=0)
    axis.annotate("near the data", (0.03, 0.02), xycoords="axes fraction", fontsize=8, color="#444444")
    axis.set_xticks([0.02, 0.1, 0.3, 0.9], ["0.02", "0.1", "0.3", "0.9"])
    axis.minorticks_off()


def _legend(figure: Any, axis: Any, tau: int | None) -> None:
    branched = tau and "holistic" in axis.get_legend_handles_labels()[1]
    legend_below(figure, axis, **({"haste": "haste (equal to holistic before the switch)"} if branched else {}))


def training_curves(metrics: pd.DataFrame, tau: int | None) -> Figure:
    """Denoising, feature and attention loss over steps, a line per arm and seed."""
    present = [name for name in _LOSSES if name in metrics and metrics[name].notna().any()]
    figure, axes = panels(len(present), 4.0 * len(present), 3.2)
    arms = list(metrics["arm"].unique())
    for axis, name in zip(axes, present, strict=True):
        for (arm, seed), rows in metrics.dropna(subset=[name]).groupby(["arm", "seed"], sort=False):
            label = str(arm) if seed == metrics["seed"].min() else None
            # A mean that was logged after the switch is of steps before it.
            late = tau is not None and name != "denoising"
            steps = rows["step"].where(rows["phase"] == 1, tau) if late else rows["step"]
            axis.plot(steps, rows[name], linewidth=1, label=label, **style(str(arm), arms))
        mark_switch(axis, tau)
        axis.set(xlabel="training steps", title=_LOSSES[name])
        axis.legend(fontsize=8)
    return figure


def image_rows(rows: dict[str, np.ndarray]) -> Figure:
    """Labelled rows of images: uint8 (n, C, S, S) by label, n the same for all."""
    count = len(next(iter(rows.values())))
    figure, axes = panels(1, 0.48 * count + 1, 0.55 * len(rows) + 0.1, len(rows))
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        _image_row(axis, label, np.asarray(images), count)
    return figure


def sample_sheet(samples: dict[tuple[str, int], np.ndarray], steps: Sequence[int]) -> Figure:
    """Images from the same noise, uint8 (n, C, S, S) by (arm, step): a block per step, a row of ten images per arm."""
    arms = list(dict.fromkeys(arm for arm, _ in samples))
    figure = Figure(figsize=(7.6, len(steps) * (0.58 * len(arms) + 0.3)), layout="constrained")
    for part, step in zip(figure.subfigures(len(steps), 1, squeeze=False)[:, 0], steps, strict=True):
        part.suptitle(f"step {step:,}", fontsize=10)
        for axis, arm in zip(part.subplots(len(arms), 1, squeeze=False)[:, 0], arms, strict=True):
            _image_row(axis, arm, samples.get((arm, step), np.empty(0))[:10], 10)
    return figure


def caption_sheet(images: Mapping[str, np.ndarray], texts: Mapping[str, Sequence[str]]) -> Figure:
    """Images, uint8 (sets, n, C, S, S) by arm, above the n captions of each set: a block per set, a row per arm."""
    columns = len(next(iter(texts.values())))
    figure = Figure(figsize=(7.6, len(texts) * (1.05 * len(images) + 0.95)), layout="constrained")
    parts = figure.subfigures(len(texts), 1, squeeze=False)[:, 0]
    for number, (part, (title, captions)) in enumerate(zip(parts, texts.items(), strict=True)):
        part.suptitle(title, fontsize=10)
        axes = part.subplots(len(images), columns, squeeze=False)
        for row, (arm, sets) in zip(axes, images.items(), strict=True):
            for axis, image in zip(row, sets[number], strict=True):
                without_ticks(axis, spines=False)
                show_images(axis, image[None], 1)
            row[0].set_ylabel(arm, rotation=0, ha="right", va="center")
        for axis, caption in zip(axes[-1], captions, strict=True):
            axis.set_xlabel(textwrap.fill(caption, 20), fontsize=7)
    return figure


def _image_row(axis: Any, label: str, images: np.ndarray, columns: int) -> None:
    without_ticks(axis, spines=False)
    axis.set_ylabel(label, rotation=0, ha="right", va="center")
    if len(images):
        show_images(axis, images, columns)


def step_cost(times: pd.DataFrame) -> Figure:
    """Time of a training step relative to a vanilla one, per arm and phase, with its interval."""
    figure, (axis,) = panels(1, 6.4, 0.42 * len(times) + 1.0)
    arms = list(times["arm"])
    labels = []
    for place, row in enumerate(times.to_dict("records")):
        arm, ratio, high = row["arm"], row["ratio_to_vanilla"], row["ratio_high"]
        errors = [[max(0, ratio - row["ratio_low"])], [max(0, high - ratio)]]
        colour = style(arm, arms)["color"]
        axis.barh(place, ratio, xerr=errors, height=0.6, color=colour, alpha=0.85, error_kw={"lw": 1})
        axis.annotate(f"{ratio:.2f}", (max(ratio, high), place), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
        labels.append(f"{arm}, {'phase I' if row['phase'] == 1 else 'plain' if arm == 'vanilla' else 'phase II'}")
    axis.axvline(1, color=DARK, linewidth=1)
    row_labels(axis, labels)
    axis.set(xlabel="step time over a vanilla step", xlim=(0, times["ratio_high"].max() * 1.15))
    return figure


def claims_forest(claims: pd.DataFrame) -> Figure:
    """Effect and interval of every claim that was tested (claims.csv), coloured by verdict, a panel for each unit.

    Shaded: where a claim holds by its rule. Triangle: the paper's effect, where it has the same unit.
    """
    scales = [_scale(row["unit"]) for row in claims.to_dict("records")]
    groups = [claims[[own == scale for own in scales]] for scale in dict.fromkeys(scales)]
    heights = [len(rows) + 1.9 for rows in groups]
    figure, axes = panels(1, 9.2, 0.34 * sum(heights), len(groups), height_ratios=heights)
    for axis, rows, scale in zip(axes, groups, dict.fromkeys(scales), strict=True):
        low, high = (float(rows[name].iloc[0]) for name in ("region_low", "region_high"))
        for place, row in enumerate(rows.to_dict("records")):
            colour = VERDICT_COLOUR[str(row["verdict"])]
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.5)
            axis.plot(row["effect"], place, "o", color=colour, markersize=6)
            axis.plot(row["paper_effect"], place, "v", color="none", markeredgecolor=DARK, markersize=6)
        row_labels(axis, [f"{row['claim']}: {row['verdict']}  {row['id']}" for row in rows.to_dict("records")])
        for label, verdict in zip(axis.get_yticklabels(), rows["verdict"], strict=True):
            label.set(color=VERDICT_COLOUR[str(verdict)], fontsize=8)
        bounds = [bound for bound in (low, high) if np.isfinite(bound)]
        left, right = axis.get_xlim()
        axis.set_xlim(min([left, *bounds]), max([right, *bounds]))
        left, right = axis.get_xlim()
        axis.axvspan(max(low, left), min(high, right), color=GREEN, alpha=0.07, linewidth=0)
        for bound in bounds:
            axis.axvline(bound, color=DARK, linewidth=1, linestyle=":")
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(textwrap.fill(scale, 70), fontsize=9, loc="left")
    return figure


def _scale(unit: str) -> str:
    """The unit of a claim up to the arms that it compares, which claims of one panel share."""
    parts = unit.split(", ")
    arms = re.compile(r"each of \w+|\w+ minus \w+")
    named = next((i for i, part in enumerate(parts) if arms.fullmatch(part)), 0)
    return ", ".join(parts[:named]) or unit
