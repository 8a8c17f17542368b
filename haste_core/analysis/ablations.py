"""What a choice of alignment is worth: arms of a study against each other, and where alignment begins to hurt.

Everything is read from the rows of fid.csv (`Report.scores`): differences of log FID, paired by seed, so that data
order, noise and initial weights fall out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from haste_core.errors import HasteError, unknown
from haste_core.sampling import passes, times_of
from haste_core.study import config
from haste_core.study.evaluation import evaluation_samples
from haste_core.study.judging import Curves, curves_of, interval, one_card
from haste_core.study.runs import Run
from haste_core.study.scoring.scorers import Scoring

PAIRED = ["group", "arm", "reference", "step", "seed", "gain", "fid", "n"]
LATE = ["arm", "baseline", "measure", "step", "gain", "low", "high", "seeds", "verdict"]
PLANE = ["arm", "weight", "tau", "measure", "against", "step", "ratio", "low", "high", "seeds"]
_GRID_SCORES = ["fid", "fid_unlabelled", "fd_pixel", "precision", "recall"]
GRID = ["step", "grid", "calls", "last_t", *_GRID_SCORES, "n"]
# What harm is looked for in: image quality, and detail near the data.
MEASURES = ("fid", "near_data")


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
        arm, baseline, measure (of MEASURES), step, gain (its logarithm for the baseline minus that for the arm, mean
        over seeds), low, high, seeds, verdict: "helps" where the interval is above 0, "hurts" where it is below, else
        "open".
    """
    rows: list[dict[str, Any]] = []
    pairs = [(arm, study.baseline(arm)) for arm in arms]
    for arm, baseline in pairs:
        if baseline is None or baseline == arm:
            continue
        for measure in MEASURES:
            curves = _comparable(scores, [arm, baseline], measure)
            seeds = sorted(set(curves[arm]) & set(curves[baseline]))
            for step in sorted(set.intersection(*(set(curves[a][s]) for a in (arm, baseline) for s in seeds))):
                gains = [math.log(curves[baseline][seed][step] / curves[arm][seed][step]) for seed in seeds]
                mean, low, high = interval(gains, study.claims.confidence)
                verdict = "helps" if low > 0 else "hurts" if high < 0 else "open"
                facts = {"gain": mean, "low": low, "high": high, "seeds": len(seeds), "verdict": verdict}
                rows.append({"arm": arm, "baseline": baseline, "measure": measure, "step": step} | facts)
    return pd.DataFrame(rows, columns=LATE)


def boundary(table: pd.DataFrame) -> pd.DataFrame:
    """Step from which alignment hurts, a row per arm and measure of a table of `late`.

    Returns:
        arm, baseline, measure, no_help_from (the first step from which on the mean gain stays at or below 0, NaN if it
        ends above), hurts_from (the first step whose interval is below 0, NaN if none), last (step), gain, low, high,
        verdict there, seeds.
    """
    rows = []
    for (arm, measure), part in table.groupby(["arm", "measure"], sort=False):
        part = part.sort_values("step")
        helping = part.loc[part["gain"] > 0, "step"]
        without = part.loc[part["step"] > (helping.max() if len(helping) else -1), "step"]
        hurting = part.loc[part["verdict"] == "hurts", "step"]
        end = part.iloc[-1]
        facts = {"no_help_from": without.min(), "hurts_from": hurting.min(), "last": end["step"]}
        facts |= {name: end[name] for name in ("gain", "low", "high", "verdict", "seeds")}
        rows.append({"arm": arm, "baseline": end["baseline"], "measure": measure} | facts)
    return pd.DataFrame(rows)


def plane(study: config.Study, scores: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Arms that differ in the weight of alignment and in its switch, at the last step they share.

    Args:
        study, scores: as for `paired`. arms: with one weight for both losses each.

    Returns:
        A row per arm, measure (of MEASURES) and what it is held against ("plain training", or "staying on" with the
        same weight): arm, weight, tau (infinity: never), measure, against, step, ratio (geometric mean over seeds),
        low, high (of its interval), seeds.
    """
    rows: list[dict[str, Any]] = []
    staying = {study.run(arm).alignment.lambda_feature: arm for arm in arms if study.run(arm).tau == math.inf}
    for arm in arms:
        own = study.run(arm)
        weight = own.alignment.lambda_feature
        for against, other in (("plain training", study.baseline(arm)), ("staying on", staying.get(weight))):
            if other is None or other == arm:
                continue
            for measure in MEASURES:
                curves = _comparable(scores, [arm, other], measure)
                seeds = sorted(set(curves[arm]) & set(curves[other]))
                step = _common_step(curves, [arm, other])
                ratios = [math.log(curves[arm][seed][step] / curves[other][seed][step]) for seed in seeds]
                found = interval(ratios, study.claims.confidence)
                ratio, low, high = (math.exp(value) for value in found)
                row = (arm, weight, own.tau, measure, against, step, ratio, low, high, len(seeds))
                rows.append(dict(zip(PLANE, row, strict=True)))
    return pd.DataFrame(rows, columns=PLANE)


def grids(run: Run, open_scorer: Callable[[], Scoring]) -> pd.DataFrame:
    """Scores of a run's last checkpoint by the grid of solver steps, all else as its study draws images.

    Args:
        run: finished. open_scorer: gives the scorer of its study.

    Returns:
        step, grid, calls (of the network per image), last_t (noise level of the last call), the scores, n.
    """
    step, rows, scorer = run.config.train.steps, [], open_scorer()
    for grid in ("uniform", "quadratic"):
        drawn = run.sample.model_copy(update={"grid": grid})
        images, _ = evaluation_samples(run, step, scorer.classes, sample=drawn)
        scores = scorer.score(images)
        last = times_of(drawn.solver_steps, grid)[-2]
        facts = {"step": step, "grid": grid, "calls": passes(run.config.model.kind, drawn), "last_t": last}
        rows.append(facts | {name: scores[name] for name in _GRID_SCORES} | {"n": len(images)})
    return pd.DataFrame(rows, columns=GRID)


def _comparable(scores: pd.DataFrame, arms: Sequence[str], measure: str = "fid") -> Curves:
    """A score by arm, seed and step of these arms, which must be scored under one card."""
    wanted = list(dict.fromkeys(arms))
    rows = scores[scores["arm"].isin(wanted)]
    missing = [arm for arm in wanted if arm not in set(rows["arm"])]
    if missing:
        raise HasteError(
            f"no scores of arms {', '.join(missing)}; expected some of {', '.join(scores['arm'].unique())}"
        )
    one_card(rows)
    return curves_of(rows, measure)


def _common_step(curves: Curves, arms: Sequence[str]) -> int:
    steps = set.intersection(*(set(by_step) for arm in arms for by_step in curves[arm].values()))
    if not steps:
        raise HasteError(f"arms {', '.join(arms)} share no scored step; keep equal train.keep")
    return max(steps)
