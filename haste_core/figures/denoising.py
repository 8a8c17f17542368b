"""Held-out denoising loss as pictures: by noise level, over training, and beside FID in the study's first picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from haste_core.figures.scores import draw_fid
from haste_core.figures.style import Figure, arm_line, mark_switch, plain_numbers, style, tile
from haste_core.study.judging import one_card

NEAR_DATA, STRUCTURE = 0.1, 0.3  # noise levels up to the first, and from the second on
_ROLES = ("early", "at the switch", "at the end")


def loss_ratio(denoising: pd.DataFrame, low: float = 0.0, high: float = 1.0, base: str = "vanilla") -> pd.DataFrame:
    """Held-out loss, mean over noise levels in [low, high], over that of `base`: rows (seed, step), a column an arm.

    Args:
        denoising: rows of denoising.csv. base: an arm; NaN where it has no row for a seed and step.
    """
    one_card(denoising)
    chosen = denoising[(denoising["split"] == "held-out") & denoising["t"].between(low - 1e-9, high + 1e-9)]
    loss = chosen.pivot_table(index=["seed", "step"], columns="arm", values="loss", aggfunc="mean")
    return loss.reindex(columns=list(chosen["arm"].unique())).div(loss[base], axis=0)


def panel_steps(steps: Iterable[int], tau: int | None, early: Sequence[int]) -> dict[int, str]:
    """The steps that are shown in detail, and their names: early (before the switch), at the switch, at the end.

    Args:
        steps: kept. tau: the switch; the kept step nearest to it is taken. early: the steps of early gains, of which
            the last one before the switch is taken, else the first kept one.
    """
    kept = sorted({int(step) for step in steps})
    before = [step for step in kept if step in early and (tau is None or step < tau)]
    switch = None if tau is None else min(kept, key=lambda step: abs(step - tau))
    found = [before[-1] if before else kept[0], switch, kept[-1]]
    return {step: name for step, name in zip(found, _ROLES, strict=True) if step is not None}


def compared(denoising: pd.DataFrame | None, base: str = "vanilla") -> bool:
    """True where the table has held-out losses of `base` and of another arm."""
    if denoising is None:
        return False
    arms = set(denoising.loc[denoising["split"] == "held-out", "arm"])
    return base in arms and len(arms) > 1


def denoising_levels(denoising: pd.DataFrame) -> Figure:
    """Denoising loss of one run over the noise level, a line a kept step; dashed: on training images.

    Args:
        denoising: rows of denoising.csv of one arm and seed.
    """
    one_card(denoising)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    steps = sorted(denoising["step"].unique())
    for place, step in enumerate(steps):
        shade = str(0.75 - 0.75 * place / max(1, len(steps) - 1))
        for split, line in (("training", "--"), ("held-out", "-")):
            rows = denoising[(denoising["step"] == step) & (denoising["split"] == split)].sort_values("t")
            label = f"step {step:,}" if split == "held-out" else None
            axis.plot(rows["t"], rows["loss"], line, color=shade, label=label, marker="o", markersize=3, linewidth=1.3)
    if "training" in set(denoising["split"]):
        axis.plot([], [], "--", color="#555555", label="training images")
    axis.set_yscale("log")
    plain_numbers(axis.yaxis)
    _noise_axis(axis, denoising["t"])
    axis.set_ylabel("denoising loss (mean square error)")
    axis.legend(fontsize=8)
    return figure


def denoising_over_training(denoising: pd.DataFrame, tau: int | None) -> Figure:
    """Held-out loss over vanilla's against training steps, near the data and at high noise, a line an arm.

    Lines are geometric means over seeds, bands go from the lowest to the highest seed.
    """
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = (f"near the data (t ≤ {NEAR_DATA})", f"structure (t ≥ {STRUCTURE})")
    for axis, title, span in zip(axes, titles, ((0.0, NEAR_DATA), (STRUCTURE, 1.0)), strict=True):
        ratio = loss_ratio(denoising, *span)
        for arm in ratio.columns:
            _ratio_line(axis, ratio[arm].dropna().unstack("seed"), arm, list(ratio.columns))
        mark_switch(axis, tau)
        axis.set(title=title, xlabel="training steps")
    axes[0].set_ylabel("held-out loss over vanilla's\n(below 1: better than plain training)")
    _legend(figure, axes[0], tau)
    return figure


def summary(
    fid: pd.DataFrame,
    denoising: pd.DataFrame | None,
    samples: dict[tuple[str, int], np.ndarray],
    tau: int | None,
    early: Sequence[int],
) -> Figure:
    """The study's first picture: held-out loss over vanilla's by noise level at three steps, FID, and samples.

    Where there is nothing to compare (one arm, or no vanilla), FID stands alone.

    Args:
        fid, denoising: rows of fid.csv and denoising.csv (or None) of the arms that are shown.
        samples: uint8 images (n, C, S, S) by (arm, step); the last step's are shown.
        tau, early: the switch and the steps of early gains (`panel_steps`).
    """
    one_card(fid)
    arms = list(fid["arm"].unique())
    shown = [arm for arm in arms if (arm, max((step for _, step in samples), default=0)) in samples]
    figure = Figure(figsize=(9.4, 4.1 + 1.15 * bool(shown)), layout="constrained")
    above: Any = figure
    below = None
    if shown:
        above, below = figure.subfigures(2, 1, height_ratios=[4.1, 1.15], squeeze=False)[:, 0]
    axis = None
    if denoising is not None and compared(denoising):
        left, right = above.subfigures(1, 2, width_ratios=[2.15, 1], squeeze=False)[0]
        axis = _level_panels(left, denoising, tau, early)
    else:
        right = above
    right.suptitle("FID over training (lower is better)", fontsize=10, weight="bold")
    scored = right.subplots()
    draw_fid(scored, fid)
    mark_switch(scored, tau)
    scored.set_xlabel("training steps")
    scored.set_title(" ", fontsize=9)
    _legend(above, axis or scored, tau)
    if below is not None:
        _sample_strip(below, samples, shown)
    return figure


def _level_panels(figure: Any, denoising: pd.DataFrame, tau: int | None, early: Sequence[int]) -> Any:
    """A panel each for an early step, the switch and the end; returns the last one, which has every arm."""
    held = denoising[denoising["split"] == "held-out"]
    steps = panel_steps(held.loc[held["arm"] == "vanilla", "step"], tau, early)
    arms = list(held["arm"].unique())
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axis, step in zip(axes, sorted(steps), strict=True):
        loss = held[held["step"] == step].pivot_table(index=["t", "seed"], columns="arm", values="loss")
        for arm in (arm for arm in arms if arm in loss):
            _ratio_line(axis, (loss[arm] / loss["vanilla"]).dropna().unstack("seed"), arm, arms)
        _noise_axis(axis, held["t"])
        axis.set_title(f"{steps[step]}: step {step:,}", fontsize=9)
    axes[0].set_ylabel("held-out loss over vanilla's")
    figure.suptitle("Held-out denoising loss, below 1: better than plain training", fontsize=10, weight="bold")
    return axes[-1]


def _sample_strip(figure: Any, samples: dict[tuple[str, int], np.ndarray], arms: Sequence[str]) -> None:
    step = max(step for _, step in samples)
    figure.suptitle(f"Samples from the same noise, step {step:,}", fontsize=10, weight="bold")
    for axis, arm in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms, strict=True):
        axis.imshow(tile(samples[arm, step][:10], 5), interpolation="nearest", cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.set_xlabel(arm, fontsize=9, labelpad=2)


def _ratio_line(axis: Any, ratio: pd.DataFrame, arm: str, arms: Sequence[str]) -> None:
    """One arm's ratio to vanilla: geometric mean over seeds (columns), with a band from lowest to highest."""
    look = arm_line(arm, arms)
    if arm != "vanilla":
        band = style(arm, arms)["color"]
        axis.fill_between(ratio.index, ratio.min(axis=1), ratio.max(axis=1), color=band, alpha=0.13, linewidth=0)
        look |= {"marker": "o", "markersize": 3}
    axis.plot(ratio.index, np.exp(np.log(ratio).mean(axis=1)), label=arm, **look)


def _noise_axis(axis: Any, levels: pd.Series) -> None:
    """A logarithmic axis of noise levels with the part near the data shaded."""
    first = 0.8 * float(levels[levels > 0].min())
    axis.set_xscale("log")
    axis.set_xlim(first, 1.08)
    axis.axvspan(first, NEAR_DATA, color="#000000", alpha=0.06, linewidth=0, zorder=0)
    axis.annotate("near the data", (0.03, 0.02), xycoords="axes fraction", fontsize=8, color="#444444")
    axis.set_xticks([0.02, 0.1, 0.3, 0.9], ["0.02", "0.1", "0.3", "0.9"])
    axis.minorticks_off()
    axis.set_xlabel("noise level t (0: data)")


def _legend(figure: Any, axis: Any, tau: int | None) -> None:
    """The legend below the panels; it says that haste's line is also holistic's before the switch."""
    handles, labels = axis.get_legend_handles_labels()
    labels = [
        "haste (equal to holistic before the switch)" if label == "haste" and "holistic" in labels and tau
        else label
        for label in labels
    ]  # fmt: skip
    figure.legend(handles, labels, loc="outside lower center", ncol=len(labels), fontsize=9, columnspacing=1.4)
