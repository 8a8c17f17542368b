"""A report in words: the answers and verdicts in sentences, its tables, and the block that README shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from haste_core.figures import NEAR_DATA, STRUCTURE, VERDICT_COLOUR, compared, loss_ratio
from haste_core.study import judging
from haste_core.study.judging import MEASURES
from haste_core.study.sections import Claims

# Columns of fid.csv that are no scores.
DESCRIPTIONS = ("arm", "seed", "step", "images_seen", "n", "card")
VERDICTS = {
    "supported": "the interval lies inside the claim's region",
    "contradicted": "the interval lies outside of the region and not inside the margin of no difference",
    "equivalent": "the interval lies inside the margin: 5 % of FID, 1 % of denoising loss, 0.02 of precision or recall",
    "smaller than the paper's": "the interval excludes the size that the paper reports; the sign is open",
    "not decided": "the interval leaves the question open, or there are fewer than two seeds",
    "not tested": "an arm or a table is missing, or the event that the claim is about did not happen",
}
NEAR, HIGH = f"t ≤ {NEAR_DATA}", f"t ≥ {STRUCTURE}"
# Summaries of the held-out denoising loss, columns of fid.csv; nats are compared as a difference, others in percent.
SUMMARIES = {"near_data": f"near the data ({NEAR})", "structure": HIGH, "denoising": "all t", "nats": "nats an image"}


def answers(
    fid: pd.DataFrame, denoising: pd.DataFrame | None, settings: Claims, tau: int | None, last: int
) -> list[tuple[str, str]]:
    """The study's three questions, each with its numbers: help early, cost late, and what the switch gives back.

    A question whose arms or steps are missing is left out. Percentages are exp(mean log ratio) - 1 over seeds.

    Args:
        fid, denoising: rows of fid.csv and denoising.csv (or None). settings: early steps, confidence and roles.
        tau: the switch. last: the last step.
    """
    arms = [settings.roles.get(role, role) for role in ("holistic", "repa", "atta")]
    arm = next((arm for arm in arms if arm in set(fid["arm"])), None)
    if arm is None or "vanilla" not in set(fid["arm"]):
        return []
    haste = settings.roles.get("haste", "haste") if arm == arms[0] else None
    found = [("Does it help early?", _early(fid, denoising, settings, arm))]
    if denoising is not None and compared(denoising):
        near, high = (loss_ratio(denoising, *span) for span in ((0.0, NEAR_DATA), (STRUCTURE, 1.0)))
        found.append(("What does it cost late, and where?", _cost(near, high, settings.confidence, arm, last)))
        if haste in near and tau is not None:
            found.append(("Does the switch give it back?", _given_back(near, settings, (arm, str(haste)), tau, last)))
    return [(question, answer) for question, answer in found if answer]


def _early(fid: pd.DataFrame, denoising: pd.DataFrame | None, settings: Claims, arm: str) -> str:
    score = fid.pivot_table(index=["seed", "step"], columns="arm", values="fid")
    gains = {"FID": _log_ratios(score, arm, "vanilla", settings.early)}
    if denoising is not None and compared(denoising):
        name = f"held-out denoising loss at {HIGH}"
        gains[name] = _log_ratios(loss_ratio(denoising, STRUCTURE), arm, "vanilla", settings.early)
    parts = [f"{name} {change(logs, settings.confidence)}" for name, logs in gains.items() if len(logs)]
    steps = [f"{step:,}" for step in sorted(settings.early)]
    when = f"step {steps[0]}" if len(steps) == 1 else f"mean over steps {', '.join(steps[:-1])} and {steps[-1]}"
    return f"{arm} against vanilla, {when}: {'; '.join(parts)}." if parts else ""


def _cost(near: pd.DataFrame, high: pd.DataFrame, confidence: float, arm: str, last: int) -> str:
    if arm not in near or not len(logs := _log_ratios(near, arm, "vanilla", [last])):
        return ""
    there = change(_log_ratios(high, arm, "vanilla", [last]), confidence)
    return (
        f"Held-out denoising loss of {arm} against vanilla at step {last:,}: near the data ({NEAR}) "
        f"{change(logs, confidence)}; at {HIGH} {there}."
    )


def _given_back(near: pd.DataFrame, settings: Claims, arms: tuple[str, str], tau: int, last: int) -> str:
    """Staying on against the switch near the data, and its share of the cost of staying on."""
    stayed, switched = arms
    back = _log_ratios(near, stayed, switched, [last])
    if not len(back):
        return ""
    cost, low, high = judging.interval(_log_ratios(near, stayed, "vanilla", [last]).tolist(), settings.confidence)
    mean, least, most = judging.interval(back.tolist(), settings.confidence)
    if low <= 0 <= high:
        share = "The cost near the data is itself not decided, so no share of it is given"
    elif high < 0:
        share = "There is no cost near the data to give back"
    elif least <= 0 <= most:
        share = "So the share of the cost that the switch gives back is not decided"
    elif most < 0:
        share = "So the switch gives nothing back"
    else:
        share = f"That is {100 * mean / cost:.0f} % of the cost near the data"
    return (
        f"Held-out denoising loss near the data ({NEAR}) at step {last:,}, {stayed} (alignment stays on) against "
        f"{switched} (off from step {tau:,}): {change(back, settings.confidence)}. {share}."
    )


def _log_ratios(values: pd.DataFrame, arm: str, base: str, steps: Iterable[int]) -> np.ndarray:
    """log of arm over base, mean over steps, one value a seed; seeds without all of the steps are left out.

    values: rows (seed, step), a column an arm.
    """
    wanted = list(steps)
    if arm not in values or base not in values:
        return np.zeros(0)
    both = values[[arm, base]].clip(lower=1e-12)
    logs = (both[arm] / both[base]).unstack("step").apply(np.log)
    return logs.reindex(columns=wanted).dropna().mean(axis=1).to_numpy()


def change(logs: Sequence[float] | np.ndarray, confidence: float) -> str:
    """log ratios over seeds as a change in words: "6.4 % higher (95 % interval +4.7 to +8.1 %, 3 seeds)"."""
    mean, low, high = (100 * np.expm1(value) for value in judging.interval([float(v) for v in logs], confidence))
    size = f"{abs(mean):.1f} % {'higher' if mean > 0 else 'lower'}"
    if len(logs) < 2:
        return f"{size} (one seed)"
    span = f"{100 * confidence:.0f} % interval {low:+.1f} to {high:+.1f} %, {len(logs)} seeds"
    return f"not decided ({mean:+.1f} %, {span})" if low <= 0 <= high else f"{size} ({span})"


def score_table(fid: pd.DataFrame, step: int) -> list[dict[str, Any]]:
    """One row per arm at a step: mean, lowest and highest FID over seeds, and means of the other scores."""
    chosen = fid[fid["step"] == step]
    rows = []
    for arm, group in chosen.groupby("arm", sort=False):
        means = {name: float(group[name].mean()) for name in group.columns if name not in DESCRIPTIONS}
        rows.append({"arm": arm, "low": group["fid"].min(), "high": group["fid"].max(), "seeds": len(group), **means})
    return rows


def denoising_table(fid: pd.DataFrame, steps: Iterable[int], confidence: float) -> list[dict[str, str]]:
    """Difference of every held-out denoising summary to vanilla's, mean and interval in words, by step and arm.

    Percent of the loss, but nats for `nats`; empty where fid.csv has no such columns or no vanilla.
    """
    names = [name for name in SUMMARIES if name in fid and fid[name].notna().any()]
    arms = [arm for arm in fid["arm"].unique() if arm != "vanilla"]
    rows = []
    for step in steps if names and len(arms) < fid["arm"].nunique() else ():
        for arm in arms:
            row = {"arm": str(arm), "step": f"{step:,}"}
            for name in names:
                values = fid[fid["step"] == step].pivot_table(index="seed", columns="arm", values=name)
                row[SUMMARIES[name]] = _difference(values, arm, name, confidence)
            rows.append(row)
    return rows


def _difference(values: pd.DataFrame, arm: str, name: str, confidence: float) -> str:
    if arm not in values or "vanilla" not in values:
        return "-"
    pair = values[[arm, "vanilla"]].dropna()
    nats = name == "nats"
    found = pair[arm] - pair["vanilla"] if nats else np.log(pair[arm] / pair["vanilla"])
    if not len(found):
        return "-"
    numbers = judging.interval(found.tolist(), confidence)
    mean, low, high = numbers if nats else (100 * np.expm1(number) for number in numbers)
    span = f" ({low:+.2f} to {high:+.2f})" if len(found) > 1 else ""
    return f"{mean:+.2f}{' nats' if nats else ' %'}{span}"


def sentences(fid: pd.DataFrame, judged: pd.DataFrame, main: Sequence[str], confidence: float = 0.95) -> list[str]:
    """The study's outcome in plain sentences.

    Args:
        fid: rows of fid.csv. judged: of claims.csv. main: the arms that are compared with vanilla at the last step.
        confidence: of the intervals.
    """
    found = []
    for row in judged[measured(judged)].to_dict("records"):
        about = f"{row['id']}, “{row['claim']}” ({row['unit']}: {effect(row)})"
        found.append(f"{about}: {row['verdict']}, {VERDICTS[row['verdict']]}.")
    found += [f"Not measured or not tested: {missing}." for missing in [not_measured(judged)] if missing]
    scores = fid[fid["arm"].isin(main)].pivot_table(index=["seed", "step"], columns="arm", values="fid")
    for arm in (arm for arm in main if arm in scores and arm != "vanilla"):
        if "vanilla" in scores and len(both := scores[[arm, "vanilla"]].dropna()):
            step = int(both.index.get_level_values("step").max())
            ratios = _log_ratios(scores, arm, "vanilla", [step])
            found.append(f"{arm}: FID against vanilla's at step {step:,} {change(ratios, confidence)}.")
    return found


def number(value: float) -> str:
    """An effect with three significant digits, two decimals from 1 on."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def effect(row: Mapping[Any, Any], separator: str = ", interval ") -> str:
    """Effect and interval of a row of claims.csv."""
    if not np.isfinite(row["low"]):
        return f"{number(row['effect'])}{separator.replace('interval ', '')}one seed"
    return f"{number(row['effect'])}{separator}{number(row['low'])} to {number(row['high'])}"


def measured(judged: pd.DataFrame) -> pd.Series:
    """Which rows of claims.csv have a number and were tested, bool."""
    return np.isfinite(judged["effect"]) & (judged["verdict"] != "not tested")


def not_measured(judged: pd.DataFrame) -> str:
    """The other claims and what they lack, in one line; empty where there are none."""
    return "; ".join(f"{identity} ({reason})" for identity, reason in lacking(judged))


def lacking(judged: pd.DataFrame) -> list[tuple[str, str]]:
    """The claims that were not measured or not tested, and the reason."""
    rows = judged[~measured(judged)].to_dict("records")
    undefined = "its number is undefined in a seed, such as a gain over no gain, or a step before the first kept one"
    return [(str(r["id"]), undefined if r["seeds"] else str(r["rule"]).rpartition("; ")[2]) for r in rows]


def chips(judged: pd.DataFrame) -> list[dict[str, str]]:
    """Id, claim, verdict and colour of every claim, by verdict, untested last; "not measured" without a number."""
    found = []
    for row, there in zip(judged.to_dict("records"), measured(judged), strict=True):
        verdict = row["verdict"] if there or row["verdict"] == "not tested" else "not measured"
        colour = VERDICT_COLOUR.get(verdict, VERDICT_COLOUR["not tested"])
        found.append({"id": str(row["id"]), "claim": str(row["claim"]), "verdict": verdict, "colour": colour})
    order = list(VERDICTS)
    return sorted(found, key=lambda c: order.index(c["verdict"]) if c["verdict"] in order else len(order))


def verdict_groups(judged: pd.DataFrame) -> list[dict[str, Any]]:
    """The measured claims by verdict: `verdict`, its `meaning`, `colour`, and `rows` with their numbers in words."""
    rows = judged[measured(judged)].to_dict("records")
    groups = []
    for verdict, meaning in VERDICTS.items():
        chosen = [
            {
                **{name: str(row[name]) for name in ("id", "claim", "unit", "rule", "paper", "seeds")},
                "measure": measure_name(row.get("measure")),
                "effect": number(row["effect"]),
                "interval": f"{number(row['low'])} to {number(row['high'])}" if np.isfinite(row["low"]) else "one seed",
                **{name: p_value(row.get(name, np.nan)) for name in ("p", "p_holm", "p_bh")},
            }
            for row in rows
            if row["verdict"] == verdict
        ]
        if chosen:
            groups.append({"verdict": verdict, "meaning": meaning, "colour": VERDICT_COLOUR[verdict], "rows": chosen})
    return groups


def measure_name(measure: Any) -> str:
    """The measure or table of a claim for a reader; FID for tables from before other measures."""
    if not isinstance(measure, str):
        return "FID"
    return MEASURES[measure].name.removeprefix("log ") if measure in MEASURES else measure.replace("_", " ")


def sensitivity_table(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of sensitivity.csv in words: claim, measure, early steps, effect with interval, verdict."""
    return [
        {
            "claim": str(row["id"]),
            "measure": measure_name(row["measure"]),
            "early steps": "" if row["early"] != row["early"] else str(row["early"]).removesuffix(".0"),
            "effect (interval)": f"{effect(row, ' (')})" if np.isfinite(row["effect"]) else "-",
            "verdict": str(row["verdict"]),
        }
        for row in table.to_dict("records")
    ]


def grid_table(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of grid.csv in words: a row for each grid and arm, means over seeds."""
    names = {"fid": "FID", "fid_unlabelled": "FID, no labels", "fd_pixel": "FD, pixels"}
    scores = [*names, "precision", "recall"]
    return [
        {
            "grid": str(grid),
            "arm": str(arm),
            "calls": str(rows["calls"].iloc[0]),
            "last t": f"{rows['last_t'].iloc[0]:.3f}",
        }
        | {names.get(name, name): f"{rows[name].mean():.3f}" for name in scores}
        | {"seeds": str(len(rows))}
        for (grid, arm), rows in table.groupby(["grid", "arm"], sort=False)
    ]


def p_value(p: float) -> str:
    """A p value with three decimals; "-" where there is none."""
    return "-" if not np.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _means(table: pd.DataFrame, column: str, title: str, digits: int) -> list[str]:
    """Means over seeds of a score as a markdown table, a row an arm and a column a step."""
    steps = sorted(table["step"].unique())
    lines = [f"| {title}, mean over seeds | " + " | ".join(f"step {s}" for s in steps) + " |"]
    lines.append("|---|" + "---:|" * len(steps))
    for arm, group in table.groupby("arm", sort=False):
        means = group.groupby("step")[column].mean()
        lines.append(f"| {arm} | " + " | ".join(f"{means[s]:.{digits}f}" if s in means else "" for s in steps) + " |")
    return [*lines, ""]


def readme_block(folder: Path) -> str:
    """The results as README shows them, from the tables in `folder` alone (markdown)."""
    fid, judged = pd.read_csv(folder / "fid.csv"), pd.read_csv(folder / "claims.csv")
    facts, times = json.loads((folder / "provenance.json").read_text()), pd.read_csv(folder / "step_time.csv")
    main, denoising = facts.get("main", list(fid["arm"].unique())), None
    if (folder / "denoising.csv").is_file():
        denoising = pd.read_csv(folder / "denoising.csv", dtype={"card": str})
        denoising = denoising[denoising["arm"].isin(main)]
    fid = fid[fid["arm"].isin(main)]
    lines = []
    if "claims" in facts:  # tables of earlier versions do not have it
        found = answers(fid, denoising, Claims(**facts["claims"]), facts["tau"], facts["steps"])
        lines = [f"- **{question}** {text}" for question, text in found]
        lines += [""] if found else []
    lines += _means(fid, "fid", "FID", 2)
    if "near_data" in fid:
        lines += _means(fid, "near_data", f"Held-out denoising loss, {NEAR}", 4)
    lines += ["| claim | measure | effect (interval) | seeds | verdict |", "|---|---|---|---:|---|"]
    for row in judged[measured(judged)].to_dict("records"):
        size = f"{effect(row, ' (')}) {row['unit']}"
        cells = (f"{row['id']}: {row['claim']}", measure_name(row.get("measure")), size, row["seeds"])
        lines.append(f"| {' | '.join(map(str, cells))} | **{row['verdict']}** |")
    missing = ", ".join(identity for identity, _ in lacking(judged))
    lines += ["", f"Not measured or not tested in this study: {missing} (the report says why)."] if missing else []
    ratios = [
        f"{row['arm']} phase {'I' if row['phase'] == 1 else 'II'} {row['ratio_to_vanilla']:.2f}"
        for row in times.to_dict("records")
        if row["arm"] != "vanilla"
    ]
    lines += ["", f"Step time over a vanilla step: {', '.join(ratios)}."]
    run, machine = facts["invocation"], facts["machine"]
    if run and not run["resumed"]:
        installing = f" after {run['install_minutes']:.1f} minutes of installing" if "install_minutes" in run else ""
        lines.append(
            f"From nothing to this report: {run['minutes']:.1f} minutes{installing}, {run['peak_memory_gib']:.1f} GiB "
            f"of memory at most, on {machine['cores']} cores ({machine['cpu']})."
        )
    accuracies = [
        f"{name} {facts[name]['test_accuracy']:.1%}"
        for name in ("teacher", "extractor")
        if (facts[name] or {}).get("test_accuracy") is not None
    ]
    if accuracies:
        lines.append(f"Of held-out images classified correctly: {', '.join(accuracies)}.")
    lines.append(f"Commit {', '.join(facts['commits'])}, study {facts['study_hash']}.")
    return "\n".join(lines) + "\n"
