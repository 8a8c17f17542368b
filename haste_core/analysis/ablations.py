"""What a choice of alignment is worth: arms of a study against each other, and where alignment begins to hurt.

Everything is read from the rows of fid.csv (`Report.scores`): differences of log FID, paired by seed, so that data
order, noise and initial weights fall out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from haste_core import config
from haste_core.claims import Curves, curves_of, interval, one_card
from haste_core.errors import HasteError, unknown

PAIRED = ["group", "arm", "reference", "step", "seed", "gain", "fid", "n"]
LATE = ["arm", "baseline", "step", "gain", "low", "high", "seeds", "verdict"]


def paired(
    study: config.Study, scores: pd.DataFrame, group: str, step: int | None = None, reference: str | None = None
) -> pd.DataFrame:
    """Every arm of a group against a reference arm, a row per seed.

    Args:
        study: its `groups` name the arms. scores: rows of fid.csv.
        step: training step; by default the last one that all arms have.
        reference: an arm, of the group or not; by default `haste`, else `repa`, if the group has one, else its first.

    Returns:
        group, arm, reference, step, seed, gain (log FID of the reference minus that of the arm; above 0 the arm is
        better), fid, n (images scored).

    Raises:
        HasteError: there is no such group, or its arms share no scored step.
        ValueError: scores were made under different cards.
    """
    arms = study.main if group == "main" else study.groups.get(group)
    if arms is None:
        raise unknown("group", group, ["main", *study.groups])
    reference = reference or next((arm for arm in ("haste", "repa") if arm in arms), arms[0])
    curves = _comparable(scores, [*arms, reference])
    step = _common_step(curves, [*arms, reference]) if step is None else step
    images = int(scores["n"].iloc[0])
    rows: list[dict[str, Any]] = []
    for arm in arms:
        for seed in sorted(set(curves[arm]) & set(curves[reference])):
            fid, other = curves[arm][seed][step], curves[reference][seed][step]
            rows.append(
                {"group": group, "arm": arm, "reference": reference, "step": step, "seed": seed,
                 "gain": math.log(other / fid), "fid": fid, "n": images}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=PAIRED)


def effects(rows: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Means over seeds of `paired` rows of one or more groups, with Student-t intervals.

    Returns:
        group, arm, reference, step, gain, low, high, seeds, fid (geometric mean over seeds), n.
    """
    found = []
    keys = ["group", "arm", "reference", "step"]
    for key, part in rows.groupby(keys, sort=False):
        mean, low, high = interval(list(part["gain"]), confidence)
        fid = math.exp(sum(math.log(v) for v in part["fid"]) / len(part))
        facts = {"gain": mean, "low": low, "high": high, "seeds": len(part), "fid": fid, "n": int(part["n"].iloc[0])}
        found.append(dict(zip(keys, key, strict=True)) | facts)  # type: ignore[arg-type]
    return pd.DataFrame(found)


def all_paired(
    study: config.Study,
    scores: pd.DataFrame,
    groups: Sequence[str],
    step: int | None = None,
    reference: str | None = None,
) -> pd.DataFrame:
    """`paired` rows of several groups in one table; without step and reference each takes its own."""
    return pd.concat([paired(study, scores, group, step, reference) for group in groups], ignore_index=True)


def late(study: config.Study, scores: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Each aligned arm against the run without alignment that differs in nothing else (`Study.baseline`), over steps.

    Returns:
        arm, baseline, step, gain (log FID of the baseline minus that of the arm, mean over seeds), low, high, seeds,
        verdict: "helps" where the interval is above 0, "hurts" where it is below, else "open".
    """
    rows: list[dict[str, Any]] = []
    for arm in arms:
        baseline = study.baseline(arm)
        if baseline is None or baseline == arm:
            continue
        curves = _comparable(scores, [arm, baseline])
        seeds = sorted(set(curves[arm]) & set(curves[baseline]))
        for step in sorted(set.intersection(*(set(curves[a][s]) for a in (arm, baseline) for s in seeds))):
            gains = [math.log(curves[baseline][seed][step] / curves[arm][seed][step]) for seed in seeds]
            mean, low, high = interval(gains, study.claims.confidence)
            verdict = "helps" if low > 0 else "hurts" if high < 0 else "open"
            facts = {"gain": mean, "low": low, "high": high, "seeds": len(seeds), "verdict": verdict}
            rows.append({"arm": arm, "baseline": baseline, "step": step} | facts)
    return pd.DataFrame(rows, columns=LATE)


def boundary(table: pd.DataFrame) -> pd.DataFrame:
    """Where alignment begins to hurt, a row per arm of a table of `late`.

    Returns:
        arm, baseline, no_help_from (the first step from which on the mean gain stays at or below 0, NaN if it ends
        above), hurts_from (the first step whose interval is below 0, NaN if none), last (step), gain, low, high,
        verdict there, seeds.
    """
    rows = []
    for arm, part in table.groupby("arm", sort=False):
        part = part.sort_values("step")
        helping = part.loc[part["gain"] > 0, "step"]
        without = part.loc[part["step"] > (helping.max() if len(helping) else -1), "step"]
        hurting = part.loc[part["verdict"] == "hurts", "step"]
        end = part.iloc[-1]
        facts = {"no_help_from": without.min(), "hurts_from": hurting.min(), "last": end["step"]}
        facts |= {name: end[name] for name in ("gain", "low", "high", "verdict", "seeds")}
        rows.append({"arm": arm, "baseline": end["baseline"]} | facts)
    return pd.DataFrame(rows)


def _comparable(scores: pd.DataFrame, arms: Sequence[str]) -> Curves:
    """FID by arm, seed and step of these arms, which must be scored under one card."""
    wanted = list(dict.fromkeys(arms))
    rows = scores[scores["arm"].isin(wanted)]
    missing = [arm for arm in wanted if arm not in set(rows["arm"])]
    if missing:
        raise HasteError(f"no scores of arms {', '.join(missing)}; possible: {', '.join(scores['arm'].unique())}")
    one_card(rows)
    return curves_of(rows)


def _common_step(curves: Curves, arms: Sequence[str]) -> int:
    steps = set.intersection(*(set(by_step) for arm in arms for by_step in curves[arm].values()))
    if not steps:
        raise HasteError(f"arms {', '.join(arms)} share no scored step; possible: equal train.keep")
    return max(steps)
