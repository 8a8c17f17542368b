"""Figures of the capacity mismatch: directions and frequencies of tokens, and excess loss where the law is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from haste_core.figures.scores import image_rows
from haste_core.figures.style import (
    DARK,
    GREEN,
    RED,
    Figure,
    dots,
    legend_beside,
    mark_switch,
    panels,
    plain_log,
    row_labels,
    seed_line,
    style,
)

if TYPE_CHECKING:
    from torch import Tensor

    from haste_core.analysis.law import Law

MEASURES = {
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "two_nn": "intrinsic dimension (TwoNN)",
    "matrix_entropy": "matrix entropy (nats)",
    "local_rank": "local rank",
}
TEACHER: dict[str, Any] = {"color": "#000000", "linestyle": "-", "linewidth": 2}


def capacity_over_depth(capacity: pd.DataFrame, step: int, t: float, kind: str = "tokens") -> Figure:
    """Every measure over depth at one step and noise level: the teacher in black, a line per arm (mean over seeds).

    The band is the teacher's, and for a single seed each arm's, interval over images; for several it is the span from
    lowest to highest seed. Depth is the share of the network that is passed: blocks of different networks compare. Rows
    are of `analysis.capacity.token_capacity` under arm and seed; kind is "tokens" or "patch mean".
    """
    figure, rows = _capacity(capacity, kind, "depth", None, step=step, t=t)
    figure.suptitle(f"{kind} of {rows['n'].iloc[0]} held-out images, step {step}, t = {t:g}", fontsize=10)
    return figure


def capacity_over_training(
    capacity: pd.DataFrame, block: int, t: float, tau: int | None, kind: str = "tokens"
) -> Figure:
    """Every measure of one student block (from 0) over steps, a line per arm; the teacher's final tokens in black."""
    figure, _ = _capacity(capacity, kind, "step", tau, block=block, t=t)
    figure.suptitle(f"{kind} after student block {block}, t = {t:g}", fontsize=10)
    return figure


def _capacity(
    capacity: pd.DataFrame, kind: str, along: str, tau: int | None, **student: float
) -> tuple[Figure, pd.DataFrame]:
    rows = capacity[capacity["kind"] == kind]
    figure, axes = panels(3, 10.4, 6.0, 2)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=False):
        for label, own, look in _lines(rows[rows["measure"] == measure], **student):
            if label == "teacher" and along == "step":
                axis.axhline(own.loc[own["depth"] == 1, "value"].mean(), label="teacher, final", **look)
            else:
                seed_line(axis, own, along, label, look)
        mark_switch(axis, tau)
        axis.set(xlabel="training steps" if along == "step" else "depth (share of the blocks)", title=title)
    axes[-1].set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", fontsize=9)
    return figure, rows


def error_per_band(spectrum: pd.DataFrame, arm: str, step: int) -> Figure:
    """Error of a readout of the tokens per frequency band: teacher blocks left, an arm's student blocks right.

    One line per block, from early (bright) to late (dark), mean over seeds. Rows are of `analysis.capacity.band_errors`
    under arm and seed.
    """
    own = spectrum[spectrum["arm"] == arm]
    student = own[(own["who"] == "student") & (own["step"] == step)]
    sides = {"teacher": own[own["who"] == "teacher"], f"student ({arm}, step {step})": student}
    figure, axes = panels(2, 9.4, 4.0, sharey=True)
    for axis, (title, rows) in zip(axes, sides.items(), strict=True):
        bands = [f"{low:.2f}-{high:.2f}" for low, high in _bands(rows)]
        errors = rows.pivot_table(index="band_low", columns="block", values="relative_error")
        for place, block in enumerate(errors):
            last = title == "teacher" and place == errors.shape[1] - 1
            colour = mpl.colormaps["viridis_r"]((place + 1) / (errors.shape[1] + 1))
            axis.plot(bands, errors[block], marker="o", markersize=3.5, color=colour, linestyle="--" if last else "-",
                      label="final tokens" if last else f"block {block}")  # fmt: skip
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_xlabel("spatial frequency (fraction of Nyquist)")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("energy missed / energy there\n(0: all is kept, 1: nothing)")
    return figure


def error_by_arm(spectrum: pd.DataFrame, step: int) -> Figure:
    """Error of a readout over depth at a step, a panel per frequency band: a line per arm, the teacher in black."""
    bands = _bands(spectrum)
    rows = len(bands) // 3 + 1  # of three panels, the last of which holds the legend
    figure, axes = panels(3, 10.4, 2.9 * rows, rows, sharey=True)
    for axis, (low, high) in zip(axes, bands, strict=False):
        for label, own, look in _lines(spectrum[spectrum["band_low"] == low], step=step):
            seed_line(axis, own, "depth", label, look, "relative_error")
        axis.set(xlabel="depth (share of the blocks)", title=f"{low:.2f} to {high:.2f} of Nyquist", yscale="log")
    for axis in axes[::3]:
        axis.set_ylabel("energy missed / energy there")
    for axis in axes[len(bands) :]:
        axis.set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", fontsize=9)
    return figure


def _lines(rows: pd.DataFrame, **student: Any) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Label, rows and look of each line: the teacher, then each arm where its columns have the values of `student`."""
    arms = list(rows["arm"].unique())
    rows = rows.assign(depth=(rows["block"] + 1) / rows["blocks"])
    teacher, own = rows[rows["who"] == "teacher"], rows[rows["who"] == "student"]
    # Every run has measured the same frozen network.
    yield "teacher", teacher[(teacher["arm"] == arms[0]) & (teacher["seed"] == teacher["seed"].iloc[0])], TEACHER
    own = own[(own[list(student)] == pd.Series(student)).all(axis=1)]
    yield from ((arm, own[own["arm"] == arm], style(arm, arms)) for arm in arms)


def _bands(rows: pd.DataFrame) -> list[tuple[float, float]]:
    return sorted(set(zip(rows["band_low"], rows["band_high"], strict=True)))


def draws(rows: dict[str, Tensor]) -> Figure:
    """Labelled rows of images (n, 1, S, S) in [-1, 1]."""
    from haste_core.sampling import to_uint8

    return image_rows({name: to_uint8(images).numpy() for name, images in rows.items()})


def best_predictions(law: Law, x: Tensor, y: Tensor, t: float) -> Figure:
    """Images (n, 1, S, S) with labels y, noised to t, and their best denoising E[x | x_t], with and without directions.

    Last row: best minus best without directions, the detail that knowing the direction adds.
    """
    import torch  # seconds, which figures of tables alone do without

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x_t = (1 - t) * x + t * noise
    best, blind = (x_t - t * side.velocity(x_t, t, y) for side in (law, law.blind()))
    rows = {"image": x, f"noised to t = {t:g}": x_t, "best": best, "best without directions": blind}
    return draws(rows | {"difference": best - blind})


EXCESS = {
    "excess": "all coefficients", "excess_texture": "coefficients of the texture", "excess_template": "all others",
}  # fmt: skip


def excess_by_level(denoising: pd.DataFrame, step: int, base: str = "") -> Figure:
    """Excess loss over the noise level at a step, in all and by band, a line per arm (geometric mean over seeds).

    Rows are of denoising.csv of a study whose law is known. base: the arm that others are divided by, "" for none.
    """
    rows = denoising[(denoising["split"] == "held-out") & (denoising["step"] == step)]
    arms = list(rows["arm"].unique())
    figure, axes = panels(3, 10.4, 3.8, sharey=not base)
    for axis, (column, title) in zip(axes, EXCESS.items(), strict=True):
        values = rows.pivot_table(index=["t", "seed"], columns="arm", values=column)
        values = values.div(values[base], axis=0) if base else values
        long = values.melt(ignore_index=False).dropna().reset_index()
        for arm in arms:
            seed_line(axis, long[long["arm"] == arm], "t", arm, style(arm, arms), log=True)
        plain_log(axis, "x") if base else plain_log(axis, "x", "y")
        axis.set(xlabel="noise level t (0: data)", title=title)
        axis.axhline(1, color=DARK, linewidth=0.8) if base else None
    axes[0].set_ylabel(f"excess loss over {base}'s" if base else "excess loss over the best velocity")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Held-out images, step {step:,}", fontsize=10)
    return figure


def direction_used(fid: pd.DataFrame, tau: int | None) -> Figure:
    """Share of the texture's direction that velocities make use of over training, a line per arm (mean over seeds)."""
    figure, (axis,) = panels(1, 7.2, 3.6)
    arms = list(fid["arm"].unique())
    for arm in arms:
        seed_line(axis, fid[fid["arm"] == arm], "step", arm, style(arm, arms), "informed")
    mark_switch(axis, tau)
    axis.set(xlabel="training steps", ylabel="share of the direction used\n(0: ignored, 1: known)")
    axis.legend(fontsize=8)
    return figure


def gain_and_harm(pairs: pd.DataFrame) -> Figure:
    """Late harm near the data against early gain in structure of `analysis.law.gain_and_harm`; small dots are seeds."""
    figure, (axis,) = panels(1, 7.6, 4.6)
    arms = list(pairs["arm"].unique())
    for arm, rows in pairs.groupby("arm", sort=False):
        colour = style(str(arm), arms)["color"]
        gain, harm = 100 * np.expm1(-rows["gain"]), 100 * np.expm1(rows["harm"])
        axis.plot(gain, harm, ".", color=colour, alpha=0.6)
        axis.plot(gain.mean(), harm.mean(), "o", color=colour, markersize=8, label=arm)
    axis.axhline(0, color=DARK, linewidth=0.8)
    axis.axvline(0, color=DARK, linewidth=0.8)
    axis.set(
        xlabel="early: excess loss at t ≥ 0.3 against plain training, %\n(left of 0: alignment helps)",
        ylabel="at the end: excess loss at t ≤ 0.1\nagainst plain training, %",
    )
    legend_beside(axis)
    return figure


def harm_by_factor(pairs: pd.DataFrame, means: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> Figure:
    """Early gain (left) and late harm (right) of each aligned arm, a panel per group of arms that differ in one choice.

    Small dots are seeds (`analysis.law.gain_and_harm`), the large one their mean with its interval (`factors`).
    """
    there = set(pairs["arm"])
    shown = {name: [arm for arm in arms if arm in there] for name, arms in groups.items()}
    heights = [len(arms) + 1.6 for arms in shown.values()]
    figure, axes = panels(2, 8.6, 0.34 * sum(heights) + 0.5, len(shown), sharex="col", height_ratios=heights)
    columns = (("gain", "early, t ≥ 0.3: excess below plain training's, %", GREEN, -1),
               ("harm", "at the end, t ≤ 0.1: excess above plain training's, %", RED, 1))  # fmt: skip
    for row, (group, arms) in enumerate(shown.items()):
        for axis, (measure, label, colour, sign) in zip(axes[2 * row :], columns, strict=False):
            for place, arm in enumerate(arms):
                mean = means[(means["arm"] == arm) & (means["measure"] == measure)].iloc[0]
                seeds, middle, *ends = (
                    sign * 100 * np.expm1(sign * part)
                    for part in (pairs.loc[pairs["arm"] == arm, measure], mean["mean"], mean["low"], mean["high"])
                )
                if np.isfinite(ends).all():
                    axis.plot(ends, [place, place], color=colour, linewidth=2)
                dots(axis, place, seeds, middle, colour)
            axis.axvline(0, color=DARK, linewidth=1)
            row_labels(axis, arms if measure == "gain" else [""] * len(arms))
            if row == len(shown) - 1:
                axis.set_xlabel(label, fontsize=9)
        axes[2 * row].set_title(group, fontsize=9, loc="left")
    return figure


DISCARDED = {
    "missed": "share missed above a quarter of Nyquist", "unlike": "1 - CKA with the pixels", "narrow": "1 - rank used",
}  # fmt: skip


def predicted_harm(teachers: pd.DataFrame, prediction: pd.DataFrame) -> Figure:
    """Harm near the data against each measure of the detail that teachers have lost: a dot per arm, a colour per study.

    Bars reach from the lowest to the highest seed; numbers of `analysis.capacity.prediction` stand above the panels.
    """
    figure, axes = panels(3, 10.4, 3.8, sharey=True)
    for axis, (measure, title) in zip(axes, DISCARDED.items(), strict=True):
        for place, (study, rows) in enumerate(teachers.groupby("study", sort=False)):
            harm = rows.groupby([measure, "arm"])["harm"].agg(["mean", "min", "max"]).apply(lambda x: 100 * np.expm1(x))
            bars = [harm["mean"] - harm["min"], harm["max"] - harm["mean"]]
            axis.errorbar(harm.index.get_level_values(0), harm["mean"], yerr=bars, fmt="o", markersize=5, linewidth=0.8,
                          color=mpl.colormaps["tab10"](place), label=study)  # fmt: skip
        axis.axhline(0, color=DARK, linewidth=0.8)
        axis.set(xlabel=title)
        told = prediction[prediction["measure"] == measure].iloc[0]
        bounds = f"[{told['low']:.2f}, {told['high']:.2f}]"
        pairs = f"teachers alone differ: {told['agree']} of {told['pairs']} pairs agree"
        axis.set_title(f"rank correlation {told['rho']:.2f} {bounds}, {told['arms']} arms\n{pairs}", fontsize=8)
    axes[0].set_ylabel("held-out loss at t ≤ 0.1 at the end\nagainst plain training, %")
    axes[0].legend(fontsize=8)
    return figure
