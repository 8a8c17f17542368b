"""A report in words: the outcome in sentences, the score table, and the block that README shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from haste_core import claims

# Columns of fid.csv that are no scores.
DESCRIPTIONS = ("arm", "seed", "step", "images_seen", "n", "card")


def score_table(fid: pd.DataFrame, step: int) -> list[dict[str, Any]]:
    """One row per arm at a step: mean, lowest and highest FID over seeds, and means of the other scores."""
    chosen = fid[fid["step"] == step]
    rows = []
    for arm, group in chosen.groupby("arm", sort=False):
        means = {name: float(group[name].mean()) for name in group.columns if name not in DESCRIPTIONS}
        rows.append({"arm": arm, "low": group["fid"].min(), "high": group["fid"].max(), "seeds": len(group), **means})
    return rows


def sentences(fid: pd.DataFrame, judged: pd.DataFrame, main: Sequence[str]) -> list[str]:
    """The study's outcome in plain sentences.

    Args:
        fid: rows of fid.csv. judged: of claims.csv. main: the arms whose course over training is told.
    """
    curves = claims.curves_of(fid[fid["arm"].isin(main)])
    found = []
    for row in judged[measured(judged)].to_dict("records"):
        span = f", interval {row['low']:.2f} to {row['high']:.2f}" if np.isfinite(row["low"]) else ""
        found.append(f"{row['id']}, “{row['claim']}”: {row['verdict']} ({row['unit']}: {row['effect']:.2f}{span}).")
    found += [f"Not measured in this study: {missing}." for missing in [not_measured(judged)] if missing]
    for arm in curves if "vanilla" in curves else ():
        if arm != "vanilla":
            found.append(f"{arm}: {_course(curves, arm)}.")
    return found


def measured(judged: pd.DataFrame) -> pd.Series:
    """Which rows of claims.csv have a number, bool."""
    return np.isfinite(judged["effect"])


def not_measured(judged: pd.DataFrame) -> str:
    """The claims without a number and what they lack, in one line; empty where all have one."""
    rows = judged[~measured(judged)].to_dict("records")
    return "; ".join(f"{row['id']} ({str(row['rule']).rpartition('; ')[2]})" for row in rows)


def _course(curves: claims.Curves, arm: str) -> str:
    """One arm against vanilla over training, in words: its best step and its end."""
    steps = sorted(set.intersection(*(set(by_step) for by_step in curves[arm].values())))
    gains = {s: [np.log(curves["vanilla"][k][s] / curves[arm][k][s]) for k in curves[arm]] for s in steps}
    mean = {s: float(np.mean(v)) for s, v in gains.items()}
    best, last = max(mean, key=lambda s: mean[s]), steps[-1]
    if mean[best] <= 0:
        return f"FID is above vanilla's at every step ({np.exp(-mean[last]) - 1:.0%} at the end)"
    seeds = f"{sum(g > 0 for g in gains[last])} of {len(gains[last])} seeds better than vanilla"
    end = f"{abs(1 - np.exp(-mean[last])):.0%} {'lower' if mean[last] > 0 else 'higher'} at step {last} ({seeds})"
    if best == last:
        return f"FID is lowest against vanilla's at the end, {end}"
    return f"FID is {1 - np.exp(-mean[best]):.0%} lower than vanilla's at step {best}, its best, and {end}"


def readme_block(folder: Path) -> str:
    """The results as README shows them, from the tables in `folder` alone (markdown)."""
    fid, judged = pd.read_csv(folder / "fid.csv"), pd.read_csv(folder / "claims.csv")
    facts, times = json.loads((folder / "provenance.json").read_text()), pd.read_csv(folder / "step_time.csv")
    fid = fid[fid["arm"].isin(facts.get("main", list(fid["arm"].unique())))]
    steps = sorted(fid["step"].unique())
    lines = ["| FID, mean over seeds | " + " | ".join(f"step {s}" for s in steps) + " |"]
    lines.append("|---|" + "---:|" * len(steps))
    for arm, group in fid.groupby("arm", sort=False):
        means = group.groupby("step")["fid"].mean()
        lines.append(f"| {arm} | " + " | ".join(f"{means[s]:.2f}" for s in steps) + " |")
    lines += ["", "| claim | effect (interval) | seeds | verdict |", "|---|---|---:|---|"]
    for row in judged[measured(judged)].to_dict("records"):
        effect = f"{row['effect']:.2f} ({row['low']:.2f} to {row['high']:.2f}) {row['unit']}"
        lines.append(f"| {row['id']}: {row['claim']} | {effect} | {row['seeds']} | **{row['verdict']}** |")
    missing = ", ".join(judged.loc[~measured(judged), "id"])
    lines += ["", f"Not measured in this study: {missing} (the report says what each lacks)."] if missing else []
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
