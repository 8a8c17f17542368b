"""When to switch: scores over tau, and which trigger would have found the best one.

Fig 7, Tables 4, 9, 10, arXiv 2505.16792. Arms that differ in nothing but their switch branch from one always-on run
(`Study.donor`), so a sweep costs only its tails, and every trigger can be replayed over that run's log
(`termination.replay`): up to its own switch any other run logs the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.judging import interval, one_card
from haste_core.study.runs import Run
from haste_core.termination import Line, alignment_loss, build_trigger, replay

# The measurement a kind of trigger reads from a log; `iteration` reads none.
READS = {"gradient_angle": "gradient_angle", "online_angle": "online_angle", "plateau": "alignment"}
LOGGED = ["arm", "seed", "step", "alignment", "gradient_angle", "online_angle"]
SWEEP = ["family", "arm", "seed", "tau", "fade", "step", "fid", "log_ratio", "n"]
FIRED = ["family", "trigger", "kind", "seed", "tau", "readings", "gaps"]
NEAREST = ["family", "trigger", "seed", "tau", "fid", "best_tau", "best_fid", "regret", "regret_never", "steps_away"]
# So many switches make a sweep.
FEWEST = 3


def card(study: config.Study) -> dict[str, Any]:
    """What this module's tables depend on beside their runs: triggers, what runs log, and their columns."""
    return {
        "triggers": {name: trigger.model_dump(mode="json") for name, trigger in study.triggers.items()},
        "watched": [arm for arm in study.arms if study.run(arm).train.watch_angle],
        # A table that an earlier version wrote with others is measured again.
        "columns": [LOGGED, SWEEP, FIRED, NEAREST],
    }


def families(study: config.Study) -> dict[str, list[str]]:
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


def sweep(study: config.Study, scores: pd.DataFrame) -> pd.DataFrame:
    """Scores of every family over tau and training steps.

    Args:
        study: whose arms. scores: rows of fid.csv.

    Returns:
        family (the always-on arm), arm, seed, tau (steps; the last step of the run for the always-on arm), fade
        (steps), step (of the score, not before tau), fid, log_ratio (log FID of the arm minus that of the always-on
        one; below 0 the switch helped), n (images scored).

    Raises:
        ValueError: scores of a family were made under different cards.
    """
    rows: list[dict[str, Any]] = []
    for family, arms in families(study).items():
        chosen = scores[scores["arm"].isin(arms)]
        if not len(chosen):
            continue
        one_card(chosen)
        on = chosen[chosen["arm"] == family].set_index(["seed", "step"])["fid"]
        for score in chosen.to_dict("records"):
            settings, place = study.run(score["arm"]), (score["seed"], score["step"])
            tau = min(settings.tau, settings.train.steps)
            if place in on.index and (score["step"] >= tau or score["arm"] == family):
                facts = {"family": family, "arm": score["arm"], "seed": score["seed"], "tau": int(tau)}
                facts |= {"fade": settings.termination.fade, "step": score["step"], "fid": score["fid"]}
                rows.append(facts | {"log_ratio": math.log(score["fid"] / on[place]), "n": score["n"]})
    return pd.DataFrame(rows, columns=SWEEP)


def logs(runs: Sequence[Run]) -> pd.DataFrame:
    """What triggers read in the logs of runs: arm, seed, step, alignment (loss), both angles (NaN: not logged)."""
    rows = [
        {"arm": run.arm, "seed": run.seed, "step": line["step"], "alignment": alignment_loss(line)}
        | {angle: line.get(angle, math.nan) for angle in ("gradient_angle", "online_angle")}
        for run in runs
        for line in run.metrics()
    ]
    return pd.DataFrame(rows, columns=LOGGED)


def fired(triggers: Mapping[str, config.Termination], runs: Iterable[Run]) -> pd.DataFrame:
    """Where each trigger would have switched each of these always-on runs off.

    Returns:
        family (the run's arm), trigger (its name), kind, seed, tau (step; NaN where it never fired), readings (logged
        lines it could read; 0 where the run did not log what it reads, which is not the same as never firing), gaps
        (lines up to tau at which it would have looked and found no reading, as where a run went on with
        `train.watch_angle` that it had not begun with; such a tau says nothing about the trigger).
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        log = run.metrics()
        for name, settings in triggers.items():
            readings = sum(_readable(settings.kind, line) for line in log)
            tau = replay(build_trigger(settings), log) if readings else None
            looked = [line for line in log if _looks(settings, line["step"]) and line["step"] <= (tau or math.inf)]
            gaps = sum(not _readable(settings.kind, line) for line in looked)
            rows.append(
                {"family": run.arm, "trigger": name, "kind": settings.kind, "seed": run.seed,
                 "tau": math.nan if tau is None else tau, "readings": readings, "gaps": gaps}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=FIRED)


def _looks(settings: config.Termination, step: int) -> bool:
    # The exact angle is measured every so many steps; everything else is in every line.
    return step > settings.after and (settings.kind != "gradient_angle" or step % settings.every == 0)


def _readable(kind: str, line: Line) -> bool:
    if kind == "plateau":
        return line.get("feature") is not None or line.get("attention") is not None
    return kind not in READS or line.get(READS[kind]) is not None


def nearest(swept: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """How good each trigger's tau is at the end of training, beside the best of the sweep.

    FID at the end is interpolated linearly, log FID in log tau, between the sweep's points; a tau beyond them counts
    as the nearest of them, and a trigger that never fired as the always-on run. Fading arms are no points.

    Args:
        swept: of `sweep`. found: of `fired`.

    Returns:
        family, trigger, seed, tau (NaN: never), fid (there), best_tau, best_fid (of the sweep), regret (log FID there
        minus the best, at least 0; NaN where the log held nothing to read or had gaps), regret_never (of the
        always-on run), steps_away (tau minus best_tau). Families with fewer than three taus have no rows.
    """
    rows: list[dict[str, Any]] = []
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
            rows.append(
                {"family": family, "trigger": trigger["trigger"], "seed": seed, "tau": trigger["tau"],
                 "fid": math.exp(there), "best_tau": taus[best], "best_fid": math.exp(values[best]),
                 "regret": there - values[best], "regret_never": values[-1] - values[best],
                 "steps_away": used - taus[best] if judged else math.nan}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=NEAREST)


def ranking(table: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Triggers of each family from the smallest mean regret on, means over seeds.

    Args:
        table: of `nearest`. confidence: of the Student-t interval.

    Returns:
        family, trigger, tau (mean of the seeds where it fired), fired (seeds), regret, low, high, steps_away (mean
        distance, without sign), seeds.
    """
    rows = []
    for (family, trigger), part in table.dropna(subset=["regret"]).groupby(["family", "trigger"], sort=False):
        mean, low, high = interval(list(part["regret"]), confidence)
        rows.append(
            {"family": family, "trigger": trigger, "tau": part["tau"].mean(), "fired": int(part["tau"].notna().sum()),
             "regret": mean, "low": low, "high": high, "steps_away": part["steps_away"].abs().mean(),
             "seeds": len(part)}
        )  # fmt: skip
    columns = ["family", "trigger", "tau", "fired", "regret", "low", "high", "steps_away", "seeds"]
    return pd.DataFrame(rows, columns=columns).sort_values(["family", "regret"], ignore_index=True)


def always_on(study: config.Study, seeds: Sequence[int] | None = None) -> list[Run]:
    """The always-on runs of a study over whose logs triggers are replayed: its main arms, and those others branch from.

    Raises:
        HasteError: the study has none.
    """
    swept = families(study)
    arms = [arm for arm in study.arms if study.run(arm).tau == math.inf and (arm in study.main or arm in swept)]
    if not arms:
        raise HasteError(f"study {study.name} has no arm that stays aligned; possible: an arm without `termination`")
    return [Run(study, arm, seed) for arm in arms for seed in (study.seeds_of(arm) if seeds is None else seeds)]
