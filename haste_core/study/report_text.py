"""Sentences and cells of a study's report, as text, from its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from haste_core.analysis.statistics import NEAR_DATA, STRUCTURE, interval
from haste_core.figures import VERDICT_COLOUR, compared, loss_ratio, loss_shown
from haste_core.study.judging import MEASURES
from haste_core.study.sections import ClaimsSettings

NEAR, HIGH = f"t ≤ {NEAR_DATA}", f"t ≥ {STRUCTURE}"
VERDICTS = {
    "supported": "the interval lies inside the claim's region",
    "contradicted": "the interval lies outside of the region and not inside the margin of no difference",
    "equivalent": "the interval lies inside the margin: 5 % of FID, 1 % of denoising loss, 0.02 of precision or recall",
    "smaller than the paper's": "the interval excludes the size that the paper reports; the sign is open",
    "not decided": "the interval leaves the question open, or there are fewer than two seeds",
    "not tested": "an arm or a table is missing, or the event that the claim is about did not happen",
}
# Columns of fid.csv in score tables: label and number of decimals; the last one is shown in percent.
SCORES = {
    "fid": ("FID", 2), "fid_heldout": ("FID, held-out", 2), "sfid": ("sFID", 2), "is": ("IS", 1), "kid": ("KID", 3),
    "precision": ("precision", 2), "recall": ("recall", 2), "fid_unlabelled": ("FID, no labels", 2),
    "fd_pixel": ("FD, pixels", 2), "near_data": ("loss, t ≤ 0.1", 4), "structure": ("loss, t ≥ 0.3", 4),
    "denoising": ("loss, all t", 4), "nats": ("nats", 2), "excess": ("excess, t ≤ 0.1", 4),
    "excess_structure": ("excess, t ≥ 0.3", 4), "gap": ("gap, nats", 1), "informed": ("direction used", 2),
    "digit_accuracy": ("digits right, share", 2), "direction": ("direction told", 2),
    "texture_power": ("texture power", 2), "fd_dinov2": ("FD, DINOv2", 1), "nearest": ("nearest", 2),
    "copies": ("copies, %", 1),
}  # fmt: skip
# Sets of captions, columns of fid.csv.
CAPTIONS = {
    "caption_seen": "seen combinations, no guidance", "caption_seen_guided": "seen combinations, guidance 2",
    "caption_unseen": "unseen combinations, no guidance", "caption_unseen_guided": "unseen combinations, guidance 2",
}  # fmt: skip
# Summaries of the held-out denoising loss, columns of fid.csv; nats are compared as a difference, others in percent.
SUMMARIES = {"near_data": f"near the data ({NEAR})", "structure": HIGH, "denoising": "all t", "nats": "nats an image"}
# Questions of few studies, and the claims that answer them.
QUESTIONS = {
    "Does it help text to image?": ("C16", "C16c", "C16u"),
    "Is the gain as large at the higher resolution?": ("C20g", "C20gx", "C20gd"),
}
# Columns of fid.csv on which arms with a pretrained teacher are compared.
TEACHER_SCORES = {
    "fid": "FID", "fid_unlabelled": "FID, no labels,", "near_data": f"held-out denoising loss near the data ({NEAR})"
}  # fmt: skip


def answers(
    fid: pd.DataFrame, denoising: pd.DataFrame, settings: ClaimsSettings, tau: int | None, last: int
) -> list[tuple[str, str]]:
    """Question and answer in numbers: early gain, late cost, what the switch gives back, a pretrained teacher's effect.

    A question whose arms or steps are missing is left out. Percentages are exp(mean log ratio) - 1 over seeds.

    Args:
        fid, denoising: rows of fid.csv and denoising.csv. settings: early steps, confidence and roles.
        tau: step of the switch. last: the last step.
    """
    both, repa, atta, haste = (settings.roles.get(role, role) for role in ("holistic", "repa", "atta", "haste"))
    arm = next((arm for arm in (both, repa, atta) if arm in set(fid["arm"])), None)
    if arm is None or "vanilla" not in set(fid["arm"]):
        return []
    told = partial(change, confidence=settings.confidence)
    scores = fid.pivot_table(index=["seed", "step"], columns="arm", values="fid")
    near, high, loss = pd.DataFrame(), pd.DataFrame(), f"eld-out {loss_shown(denoising)[1]}"
    if compared(denoising):
        near, high = loss_ratio(denoising, 0.0, NEAR_DATA), loss_ratio(denoising, STRUCTURE, 1.0)
    found = []
    early = {
        "FID": log_ratios(scores, arm, settings.early),
        f"h{loss} at {HIGH}": log_ratios(high, arm, settings.early),
    }
    if any(map(len, early.values())):
        steps = [f"{step:,}" for step in sorted(settings.early)]
        when = f"step {steps[0]}" if len(steps) == 1 else f"mean over steps {', '.join(steps[:-1])} and {steps[-1]}"
        parts = "; ".join(f"{name} {told(logs)}" for name, logs in early.items() if len(logs))
        found.append(("Does it help early?", f"{arm} against vanilla, {when}: {parts}."))
    cost = log_ratios(near, arm, [last])
    if len(cost):
        text = (
            f"H{loss} of {arm} against vanilla at step {last:,}: near the data ({NEAR}) "
            f"{told(cost)}; at {HIGH} {told(log_ratios(high, arm, [last]))}."
        )
        found.append(("What does it cost late, and where?", text))
    back = log_ratios(near, arm, [last], base=haste) if arm == both and tau is not None else []
    if len(back):
        text = (
            f"H{loss} near the data ({NEAR}) at step {last:,}, {arm} (alignment stays on) against "
            f"{haste} (off from step {tau:,}): {told(back)}. {_share_of_cost(back, cost, settings.confidence)}."
        )
        found.append(("Does the switch give it back?", text))
    if text := " ".join(_other_teacher(fid, arm, last, told) for arm in ("repa", "similarity")).strip():
        found.append(("Does a teacher that has seen ImageNet help more?", text))
    return found


def _other_teacher(fid: pd.DataFrame, arm: str, last: int, told: Callable[[Sequence[float]], str]) -> str:
    """An arm with the pretrained teacher against the same arm with the study's own, as a sentence; "" without both."""
    other, parts = f"{arm}_imagenet", []
    for column, name in TEACHER_SCORES.items():
        values = fid.pivot_table(index=["seed", "step"], columns="arm", values=column)
        if logs := log_ratios(values, other, [last], base=arm):
            parts.append(f"{name} {told(logs)}")
    return f"{other} against {arm} at step {last:,}: {'; '.join(parts)}." if parts else ""


def further_answers(judged: pd.DataFrame) -> list[tuple[str, str]]:
    """Questions that few studies ask, each with the claims on it, from rows of claims.csv."""
    told = {
        row["id"]: f"{row['unit'][0].upper()}{row['unit'][1:]}: {effect(row)}, {row['verdict']}."
        for row in judged[measured(judged)].to_dict("records")
    }
    found = {question: " ".join(told[i] for i in ids if i in told) for question, ids in QUESTIONS.items()}
    return [(question, text) for question, text in found.items() if text]


def _share_of_cost(back: Sequence[float], cost: Sequence[float], confidence: float) -> str:
    """The part of the late cost that the switch gives back, as a sentence without its full stop."""
    whole, low, high = interval(cost, confidence)
    mean, least, most = interval(back, confidence)
    if low <= 0 <= high:
        return "The cost near the data is itself not decided, so no share of it is given"
    if high < 0:
        return "There is no cost near the data to give back"
    if least <= 0 <= most:
        return "So the share of the cost that the switch gives back is not decided"
    if most < 0:
        return "So the switch gives nothing back"
    return f"That is {100 * mean / whole:.0f} % of the cost near the data"


def log_ratios(values: pd.DataFrame, arm: str, steps: Iterable[int], base: str = "vanilla") -> list[float]:
    """log of an arm's values over those of `base`, mean over steps, one for each seed that has all of the steps.

    values: rows (seed, step), one column for each arm.
    """
    if arm not in values or base not in values:
        return []
    both = values[[arm, base]].clip(lower=1e-12)
    logs = (both[arm] / both[base]).unstack("step").apply(np.log)
    return logs.reindex(columns=list(steps)).dropna().mean(axis=1).tolist()


def change(logs: Sequence[float], confidence: float) -> str:
    """log ratios over seeds as a change in words: "6.4 % higher (95 % interval +4.7 to +8.1 %, 3 seeds)"."""
    mean, low, high = 100 * np.expm1(interval(logs, confidence))
    size = f"{abs(mean):.1f} % {'higher' if mean > 0 else 'lower'}"
    if len(logs) < 2:
        return f"{size} (one seed)"
    span = f"{100 * confidence:.0f} % interval {low:+.1f} to {high:+.1f} %, {len(logs)} seeds"
    return f"not decided ({mean:+.1f} %, {span})" if low <= 0 <= high else f"{size} ({span})"


# Cells of tables as text: lists of rows, each with its cells by column


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _p_value(p: float) -> str:
    return "-" if not np.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def effect(row: Mapping[Any, Any]) -> str:
    """Effect and interval of a row of claims.csv: "0.234 (0.043 to 0.426)"."""
    span = f"{_number(row['low'])} to {_number(row['high'])}" if np.isfinite(row["low"]) else "one seed"
    return f"{_number(row['effect'])} ({span})"


def measure_name(measure: str) -> str:
    """The measure or table that a claim is read on, as a reader calls it."""
    return MEASURES[measure].name.removeprefix("log ") if measure in MEASURES else measure.replace("_", " ")


def measured(judged: pd.DataFrame) -> pd.Series:
    """True for rows of claims.csv that have a number and were tested."""
    return np.isfinite(judged["effect"]) & (judged["verdict"] != "not tested")


def lacking(judged: pd.DataFrame) -> list[tuple[str, str]]:
    """The claims that were not measured or not tested, and the reason."""
    rows = judged[~measured(judged)].to_dict("records")
    undefined = "its number is undefined in a seed, such as a gain over no gain, or a step before the first kept one"
    return [(str(r["id"]), undefined if r["seeds"] else str(r["rule"]).rpartition("; ")[2]) for r in rows]


def verdicts(judged: pd.DataFrame) -> list[dict[str, Any]]:
    """Every verdict with its `meaning`, `colour`, and the `rows` of the measured claims that have it."""
    rows: dict[str, list[dict[str, str]]] = {verdict: [] for verdict in VERDICTS}
    for row in judged[measured(judged)].to_dict("records"):
        size, _, span = effect(row).removesuffix(")").partition(" (")
        cells = {name: str(row[name]) for name in ("id", "claim", "unit", "rule", "paper", "seeds")}
        cells |= {"effect": size, "interval": span}
        rows[row["verdict"]].append(cells | {name: _p_value(row[name]) for name in ("p", "p_holm", "p_bh")})
    return [
        {"verdict": verdict, "meaning": meaning, "colour": VERDICT_COLOUR[verdict], "rows": rows[verdict]}
        for verdict, meaning in VERDICTS.items()
    ]


def sensitivity_cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of sensitivity.csv."""
    return [
        {
            "claim": row["id"], "measure": measure_name(row["measure"]),
            "early steps": "" if pd.isna(row["early"]) else str(row["early"]).removesuffix(".0"),
            "effect (interval)": effect(row) if np.isfinite(row["effect"]) else "-", "verdict": row["verdict"],
        }
        for row in table.to_dict("records")
    ]  # fmt: skip


def scores_of(row: Mapping[Any, float]) -> dict[str, str]:
    """The scores of a row of fid.csv or floor.csv by their label."""
    return {
        label: f"{row[name] * (100 if name == 'copies' else 1):.{digits}f}"
        for name, (label, digits) in SCORES.items()
        if name in row
    }


def score_cells(fid: pd.DataFrame, step: int) -> list[dict[str, str]]:
    """A row for each arm at a step: range of FID over seeds, and means of all scores over seeds.

    Means are geometric, as in figures and answers, for scores that are compared by their ratio.
    """

    def mean(name: str, values: pd.Series) -> float:
        ratios = name in MEASURES and MEASURES[name].log
        return float(np.exp(np.log(values).mean()) if ratios else values.mean())

    return [
        {"arm": str(arm), "FID, lowest to highest seed": f"{group['fid'].min():.2f} to {group['fid'].max():.2f}"}
        | scores_of({name: mean(name, group[name]) for name in SCORES if name in group})
        for arm, group in fid[fid["step"] == step].groupby("arm", sort=False)
    ]


def caption_cells(fid: pd.DataFrame, step: int) -> list[dict[str, str]]:
    """A row for each arm and set of captions at a step: caption accuracy in percent, means over seeds."""
    parts = {"": "all of it", "_digits": "both digits", "_colours": "both colours", "_relation": "the relation"}
    return [
        {"arm": str(arm), "captions": told}
        | {label: f"{100 * group[name + part].mean():.1f}" for part, label in parts.items()}
        | {"lowest to highest seed": f"{100 * group[name].min():.1f} to {100 * group[name].max():.1f}"}
        for name, told in CAPTIONS.items()
        for arm, group in fid[fid["step"] == step].groupby("arm", sort=False)
    ]


def denoising_cells(fid: pd.DataFrame, steps: Iterable[int], confidence: float) -> list[dict[str, str]]:
    """Difference of every held-out denoising summary to vanilla's, mean and interval, by step and arm."""
    names = [name for name in SUMMARIES if fid[name].notna().any()]
    return [
        {"arm": arm, "step": f"{step:,}"}
        | {SUMMARIES[name]: _difference(fid[fid["step"] == step], arm, name, confidence) for name in names}
        for step in steps
        for arm in fid["arm"].unique()
        if arm != "vanilla"
    ]


def _difference(scores: pd.DataFrame, arm: str, name: str, confidence: float) -> str:
    """Difference of a score to vanilla's over seeds: in nats for `nats`, else in percent."""
    pair = scores.pivot_table(index="seed", columns="arm", values=name).reindex(columns=[arm, "vanilla"]).dropna()
    if not len(pair):
        return "-"
    if name == "nats":
        unit, (mean, low, high) = "nats", interval((pair[arm] - pair["vanilla"]).tolist(), confidence)
    else:
        logs = np.log(pair[arm] / pair["vanilla"]).tolist()
        unit, (mean, low, high) = "%", 100 * np.expm1(interval(logs, confidence))
    return f"{mean:+.2f} {unit}" + (f" ({low:+.2f} to {high:+.2f})" if len(pair) > 1 else "")


def grid_cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of grid.csv: a row for each grid of noise levels and arm, means over seeds."""
    names = ("fid", "fid_unlabelled", "fd_pixel", "precision", "recall")
    return [
        {
            "grid": str(grid),
            "arm": str(arm),
            "calls": str(rows["calls"].iloc[0]),
            "last t": f"{rows['last_t'].iloc[0]:.3f}",
        }
        | {SCORES[name][0]: f"{rows[name].mean():.3f}" for name in names}
        | {"seeds": str(len(rows))}
        for (grid, arm), rows in table.groupby(["grid", "arm"], sort=False)
    ]


def phase(row: Mapping[Any, Any]) -> str:
    """The phase of a row of step_time.csv as a Roman numeral."""
    return "I" if row["phase"] == 1 else "II"


def time_cells(times: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of step_time.csv: median step time, and its ratio to vanilla's with its interval."""
    return [
        {
            "arm": row["arm"], "phase": phase(row), "median step": f"{1000 * row['median_step_s']:.1f} ms",
            "over vanilla": f"{row['ratio_to_vanilla']:.3f}",
            "interval": f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
        }
        for row in times.to_dict("records")
    ]  # fmt: skip
