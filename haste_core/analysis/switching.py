"""Arms of a study against each other: when to switch alignment off, and the effect of other choices.

Fig. 7, Tables 4, 9, 10, arXiv 2505.16792. Everything is read from the rows of fid.csv (`Report.scores`) and from logs.
Differences of log FID are paired by seed, so that data order, noise and initial weights cancel. Arms that differ in
their switch alone branch from one always-on run (`Study.donor`), so a sweep costs only its tails, and every trigger can
be replayed over that run's log (`termination.replay`): up to its own switch any other run logs the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from haste_core.analysis.statistics import interval, one_card
from haste_core.errors import HasteError, unknown
from haste_core.sampling import passes, times_of
from haste_core.study import config
from haste_core.study.evaluation import Scorer, evaluation_samples
from haste_core.study.runs import Run
from haste_core.study.train import trigger_of
from haste_core.termination import Line, alignment_loss, replay

# Measurements of a logged line of which a kind of trigger needs one; `iteration` needs none.
READS = {"gradient_angle": ["gradient_angle"], "online_angle": ["online_angle"], "plateau": ["feature", "attention"]}
LOGGED = ["arm", "seed", "step", "alignment", "gradient_angle", "online_angle"]
SWEEP = ["family", "arm", "seed", "tau", "fade", "step", "fid", "log_ratio", "n"]
FIRED = ["family", "trigger", "kind", "seed", "tau", "readings", "gaps"]
NEAREST = ["family", "trigger", "seed", "tau", "fid", "best_tau", "best_fid", "regret", "regret_never", "steps_away"]
RANKING = ["family", "trigger", "tau", "fired", "regret", "low", "high", "steps_away", "seeds"]
PAIRED = ["group", "arm", "reference", "step", "seed", "gain", "fid", "n"]
LATE = ["arm", "baseline", "measure", "step", "gain", "low", "high", "seeds", "verdict"]
BOUNDARY = [*LATE[:3], "no_help_from", "hurts_from", "last", "gain", "low", "high", "verdict", "seeds"]
PLANE = ["arm", "weight", "tau", "measure", "against", "step", "ratio", "low", "high", "seeds"]
_GRID_SCORES = ["fid", "fid_unlabelled", "fd_pixel", "precision", "recall"]
GRID = ["step", "grid", "calls", "last_t", *_GRID_SCORES, "n"]
# Least number of switches in a sweep.
FEWEST = 3
# Scores on which harm is looked for: image quality, and detail near the data.
MEASURES = ("fid", "near_data")


def card(study: config.StudySettings) -> dict[str, Any]:
    """Settings of the tables on switching beside their runs: triggers, arms that log angles, and columns."""
    return {
        "triggers": {name: trigger.model_dump(mode="json") for name, trigger in study.triggers.items()},
        "watched": [arm for arm in study.arms if study.run(arm).train.watch_angle],
        # So that a table which an earlier version wrote with other columns is measured again.
        "columns": [LOGGED, SWEEP, FIRED, NEAREST],
    }


def families(study: config.StudySettings) -> dict[str, list[str]]:
    """Arms that differ in their switch alone, by the always-on arm they branch from, itself first."""
    found: dict[str, list[str]] = {}
    for arm in study.arms:
        own = study.run(arm)
        if own.tau != math.inf:
            continue
        switched = [a for a in study.arms if study.run(a).lineage == own.lineage and study.run(a).tau < math.inf]
        reach = [a for a in switched if study.run(a).train.steps == own.train.steps]
        if reach:
            found[arm] = [arm, *sorted(reach, key=lambda a: (study.run(a).termination.fade, study.run(a).tau))]
    return found


def always_on(study: config.StudySettings) -> list[Run]:
    """Always-on runs of a study over whose logs triggers are replayed: its main arms, and those others branch from.

    Raises:
        HasteError: the study has none.
    """
    swept = families(study)
    arms = [arm for arm in study.arms if study.run(arm).tau == math.inf and (arm in study.main or arm in swept)]
    if not arms:
        raise HasteError(f"study {study.name} has no arm that stays aligned; add an arm without `termination`")
    return [Run(study, arm, seed) for arm in arms for seed in study.seeds_of(arm)]


def sweep(study: config.StudySettings, scores: pd.DataFrame) -> pd.DataFrame:
    """Scores (rows of fid.csv) of every family over tau and training steps.

    Columns: family (the always-on arm), arm, seed, tau (steps; the last step of the run for the always-on arm), fade
    (steps), step (of the score, not before tau), fid, log_ratio (log FID of the arm minus that of the always-on one;
    below 0 the switch helped), n (images scored).

    Raises:
        ValueError: scores of a family were made under different cards.
    """
    parts = [pd.DataFrame(columns=SWEEP)]
    for family, arms in families(study).items():
        chosen = scores[scores["arm"].isin(arms)]
        if chosen.empty:
            continue
        one_card(chosen)
        on = chosen.loc[chosen["arm"] == family, ["seed", "step", "fid"]]
        rows = chosen.merge(on, on=["seed", "step"], suffixes=("", "_on"))
        settings = {arm: study.run(arm) for arm in arms}
        rows["family"], rows["log_ratio"] = family, np.log(rows["fid"] / rows["fid_on"])
        rows["tau"] = [int(min(settings[arm].tau, settings[arm].train.steps)) for arm in rows["arm"]]
        rows["fade"] = [settings[arm].termination.fade for arm in rows["arm"]]
        parts.append(rows.loc[(rows["step"] >= rows["tau"]) | (rows["arm"] == family), SWEEP])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def logs(runs: Sequence[Run]) -> pd.DataFrame:
    """Measurements in the logs of runs: arm, seed, step, alignment (loss), both angles (NaN: not logged)."""
    rows = [
        {"arm": run.arm, "seed": run.seed, "step": line["step"], "alignment": alignment_loss(line)}
        | {angle: line.get(angle, math.nan) for angle in ("gradient_angle", "online_angle")}
        for run in runs
        for line in run.metrics()
    ]
    return pd.DataFrame(rows, columns=LOGGED)


def fired(triggers: Mapping[str, config.TerminationSettings], runs: Iterable[Run]) -> pd.DataFrame:
    """Step at which each trigger would have switched each of these always-on runs off.

    Columns: family (the run's arm), trigger (its name), kind, seed, tau (step; NaN if it never fired), readings (logged
    lines it could read; 0 if the run did not log its measurement, which is not the same as never firing), gaps (lines
    up to tau that it should have read but that hold no reading, as if a run was continued with `train.watch_angle`
    after starting without; such a tau says nothing about the trigger).
    """
    rows = []
    for run in runs:
        log = run.metrics()
        for name, settings in triggers.items():
            readings = sum(_readable(settings.kind, line) for line in log)
            tau = replay(trigger_of(settings), log) if readings else None
            # The exact angle is measured every so many steps; everything else is in every line.
            every, last = settings.every if settings.kind == "gradient_angle" else 1, tau or math.inf
            looked = [line for line in log if settings.after < line["step"] <= last and line["step"] % every == 0]
            gaps = sum(not _readable(settings.kind, line) for line in looked)
            rows.append((run.arm, name, settings.kind, run.seed, math.nan if tau is None else tau, readings, gaps))
    return pd.DataFrame(rows, columns=FIRED)


def _readable(kind: str, line: Line) -> bool:
    return kind not in READS or any(line.get(name) is not None for name in READS[kind])


def nearest(swept: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """FID at the end of training with each trigger's tau, beside the best of the sweep.

    FID at the end is interpolated linearly, log FID in log tau, between the sweep's points; a tau beyond them counts
    as the nearest of them, and a trigger that never fired as the always-on run. Fading arms are no points. From rows
    of `sweep` and of `fired`.

    Columns: family, trigger, seed, tau (NaN: never), fid (there), best_tau, best_fid (of the sweep), regret (log FID
    there minus the best, at least 0; NaN if the log held nothing to read or had gaps), regret_never (of the always-on
    run), steps_away (tau minus best_tau). Families with fewer than three taus have no rows.
    """
    rows = []
    for (family, seed), part in swept[swept["fade"] == 0].groupby(["family", "seed"], sort=False):
        end = part[part["step"] == part["step"].max()].sort_values("tau")
        if end["tau"].nunique() < FEWEST:
            continue
        taus, values = end["tau"].to_numpy(float), np.log(end["fid"].to_numpy(float))
        best, never = int(np.argmin(values)), taus[-1]
        for trigger in found[(found["family"] == family) & (found["seed"] == seed)].to_dict("records"):
            used = trigger["tau"] if trigger["tau"] == trigger["tau"] else never
            judged = trigger["readings"] > 0 and trigger["gaps"] == 0
            there = float(np.interp(math.log(used), np.log(taus), values)) if judged else math.nan
            away = used - taus[best] if judged else math.nan
            rows.append((family, trigger["trigger"], seed, trigger["tau"], math.exp(there), taus[best],
                         math.exp(values[best]), there - values[best], values[-1] - values[best], away))  # fmt: skip
    return pd.DataFrame(rows, columns=NEAREST)


def ranking(table: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Triggers of each family in a table of `nearest` in order of mean regret, means over seeds.

    Columns: family, trigger, tau (mean of the seeds where it fired), fired (seeds), regret, low, high (Student-t
    interval), steps_away (mean distance, without sign), seeds.
    """
    rows = []
    for (family, trigger), part in table.dropna(subset=["regret"]).groupby(["family", "trigger"], sort=False):
        mean, low, high = interval(list(part["regret"]), confidence)
        rows.append((family, trigger, part["tau"].mean(), part["tau"].count(), mean, low, high,
                     part["steps_away"].abs().mean(), len(part)))  # fmt: skip
    return pd.DataFrame(rows, columns=RANKING).sort_values(["family", "regret"], ignore_index=True)


def paired(
    study: config.StudySettings,
    scores: pd.DataFrame,
    groups: Sequence[str],
    step: int | None = None,
    reference: str | None = None,
) -> pd.DataFrame:
    """Every arm of each group against a reference arm, a row per seed.

    Args:
        study: its `groups` name the arms, `main` its main arms. scores: rows of fid.csv.
        groups: names of groups; without step and reference each takes its own.
        step: training step; by default the last one that all arms of the group have.
        reference: an arm, of the group or not; by default `haste`, else `repa`, if the group has one, else its first.

    Returns:
        group, arm, reference, step, seed, gain (log FID of the reference minus that of the arm; above 0 the arm is
        better), fid, n (images scored).

    Raises:
        HasteError: there is no such group, or its arms share no scored step.
        ValueError: scores were made under different cards.
    """
    rows = []
    for group in groups:
        arms = study.main if group == "main" else study.groups.get(group)
        if arms is None:
            raise unknown("group", group, ["main", *study.groups])
        base = reference or next((arm for arm in ("haste", "repa") if arm in arms), arms[0])
        curves = _curves(scores, [*arms, base])
        at = _last_common_step(curves) if step is None else step
        for arm in arms:
            both = pd.DataFrame({"gain": _gains(curves, arm, base).loc[at], "fid": curves[arm].loc[at]}).dropna()
            for seed, row in both.iterrows():
                rows.append((group, arm, base, at, seed, row["gain"], row["fid"], scores["n"].iloc[0]))
    return pd.DataFrame(rows, columns=PAIRED)


def effects(rows: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Means over seeds of `paired` rows of one or more groups, with Student-t intervals.

    Columns: group, arm, reference, step, gain, low, high, seeds, fid (geometric mean over seeds), n.
    """
    found = []
    keys = ["group", "arm", "reference", "step"]
    for key, part in rows.groupby(keys, sort=False):
        mean, low, high = interval(list(part["gain"]), confidence)
        found.append((*key, mean, low, high, len(part), np.exp(np.log(part["fid"]).mean()), part["n"].iloc[0]))
    return pd.DataFrame(found, columns=[*keys, "gain", "low", "high", "seeds", "fid", "n"])


def late(study: config.StudySettings, scores: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Each aligned arm against the run without alignment that differs in nothing else (`Study.baseline`), over steps.

    Columns: arm, baseline, measure (of MEASURES), step, gain (its logarithm for the baseline minus that for the arm,
    mean over seeds), low, high, seeds, verdict: "helps" if the interval is above 0, "hurts" if below, else "open".
    """
    rows = []
    for arm in arms:
        baseline = study.baseline(arm)
        if baseline is None or baseline == arm:
            continue
        for measure in MEASURES:
            gains = _gains(_curves(scores, [arm, baseline], measure), arm, baseline)
            for step, by_seed in gains.dropna(axis=1, how="all").dropna().iterrows():
                mean, low, high = interval(list(by_seed), study.claims.confidence)
                verdict = "helps" if low > 0 else "hurts" if high < 0 else "open"
                rows.append((arm, baseline, measure, step, mean, low, high, len(by_seed), verdict))
    return pd.DataFrame(rows, columns=LATE)


def boundary(table: pd.DataFrame) -> pd.DataFrame:
    """Step from which alignment hurts, a row per arm and measure of a table of `late`.

    Columns: arm, baseline, measure, no_help_from (the first step from which on the mean gain stays at or below 0, NaN
    if it ends above), hurts_from (the first step whose interval is below 0, NaN if none), last (step), gain, low, high,
    verdict there, seeds.
    """
    rows = []
    for _, part in table.sort_values("step", kind="stable").groupby(["arm", "measure"], sort=False):
        helping = part.loc[part["gain"] > 0, "step"]
        without = part.loc[part["step"] > (helping.max() if len(helping) else -1), "step"]
        hurting = part.loc[part["verdict"] == "hurts", "step"]
        end = part.iloc[-1].rename({"step": "last"})
        rows.append({"no_help_from": without.min(), "hurts_from": hurting.min(), **end})
    return pd.DataFrame(rows, columns=BOUNDARY)


def plane(study: config.StudySettings, scores: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Arms that differ in the weight of both alignment losses and in their switch, at the last step they share.

    Columns: arm, weight, tau (infinity: never), measure (of MEASURES), against ("plain training", or "staying on" with
    the same weight), step, ratio (geometric mean over seeds), low, high (of its interval), seeds.
    """
    rows = []
    staying = {study.run(arm).alignment.lambda_feature: arm for arm in arms if study.run(arm).tau == math.inf}
    for arm in arms:
        own = study.run(arm)
        weight = own.alignment.lambda_feature
        for against, other in (("plain training", study.baseline(arm)), ("staying on", staying.get(weight))):
            if other is None or other == arm:
                continue
            for measure in MEASURES:
                curves = _curves(scores, [arm, other], measure)
                step = _last_common_step(curves)
                logs = list(_gains(curves, other, arm).loc[step].dropna())
                ends = np.exp(interval(logs, study.claims.confidence))
                rows.append((arm, weight, own.tau, measure, against, step, *ends, len(logs)))
    return pd.DataFrame(rows, columns=PLANE)


def grids(run: Run, open_scorer: Callable[[], Scorer]) -> pd.DataFrame:
    """Scores of a run's last checkpoint by the grid of solver steps, all else as its study draws images.

    Columns: step, grid, calls (of the network per image), last_t (noise level of the last call), the scores, n.
    """
    step, rows, scorer = run.config.train.steps, [], open_scorer()
    for grid in ("uniform", "quadratic"):
        drawn = run.sample.model_copy(update={"grid": grid})
        images = evaluation_samples(run, step, sample=drawn)
        scores = scorer.score(images)
        last = times_of(drawn.solver_steps, grid)[-2]
        facts = {"step": step, "grid": grid, "calls": passes(run.config.model.kind, drawn.options), "last_t": last}
        rows.append(facts | {name: scores[name] for name in _GRID_SCORES} | {"n": len(images)})
    return pd.DataFrame(rows, columns=GRID)


def _curves(scores: pd.DataFrame, arms: Sequence[str], measure: str = "fid") -> pd.DataFrame:
    """A score of arms that are scored under one card, a row per step and a column per (arm, seed)."""
    rows = scores[scores["arm"].isin(arms)]
    missing = sorted(set(arms) - set(rows["arm"]))
    if missing:
        there = ", ".join(scores["arm"].unique())
        raise HasteError(f"no scores of arms {', '.join(missing)}; there are scores of {there}: score the others first")
    one_card(rows)
    return rows.pivot(index="step", columns=["arm", "seed"], values=measure)


def _last_common_step(curves: pd.DataFrame) -> int:
    steps = curves.dropna().index
    if steps.empty:
        arms = ", ".join(curves.columns.unique("arm"))
        raise HasteError(f"arms {arms} share no scored step; set an equal train.keep for all")
    return int(steps.max())


def _gains(curves: pd.DataFrame, arm: str, base: str) -> pd.DataFrame:
    """log(score of base / score of arm), a row per step and a column per seed that one of them has."""
    return (curves[base] / curves[arm]).map(math.log)  # type: ignore[return-value]
