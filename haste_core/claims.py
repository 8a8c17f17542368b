"""The paper's claims as data: what is measured, and the rule that decides, both fixed before any run.

Every statistic is computed per seed on the logarithm of FID (arms of one seed share data order, noise and initial
weights, so differences are paired), then summarised by its mean and a Student-t interval over seeds. A claim is

    supported      when the whole interval lies inside the claim's region,
    contradicted   when the whole interval lies outside of it,
    not decided    otherwise, and always with fewer than two seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from haste_core import config
from haste_core.errors import HasteError

# arm -> seed -> step -> FID
Curves = Mapping[str, Mapping[int, Mapping[int, float]]]
COLUMNS = (
    "id",
    "claim",
    "effect",
    "low",
    "high",
    "seeds",
    "verdict",
    "unit",
    "rule",
    "region_low",
    "region_high",
    "paper",
)


@dataclass(frozen=True)
class Claim:
    """One claim: `statistic(curves, seed, early, last)` must lie inside `region` for the claim to hold."""

    id: str
    text: str
    paper: str
    arms: tuple[str, ...]
    unit: str
    rule: str
    region: tuple[float, float]
    statistic: Callable[[Curves, int, int, int], float]
    log_scale: bool = False  # average the logarithm and report its exponential


def _log(curves: Curves, arm: str, seed: int, step: int) -> float:
    return math.log(max(curves[arm][seed][step], 1e-12))


def _early_gain(curves: Curves, arm: str, seed: int, early: int) -> float:
    return _log(curves, "vanilla", seed, early) - _log(curves, arm, seed, early)


def _gain_share(curves: Curves, seed: int, early: int, last: int) -> float:
    # A share of no gain means nothing; not a number leaves the claim undecided.
    repa = _early_gain(curves, "repa", seed, early)
    return _early_gain(curves, "atta", seed, early) / repa if repa > 0 else math.nan


def _both_over_either(curves: Curves, seed: int, early: int, last: int) -> float:
    best = min(_log(curves, arm, seed, early) for arm in ("repa", "atta"))
    return best - _log(curves, "holistic", seed, early)


def _best_at_end(curves: Curves, seed: int, early: int, last: int) -> float:
    others = min(_log(curves, arm, seed, last) for arm in ("vanilla", "repa", "atta", "holistic"))
    return others - _log(curves, "haste", seed, last)


def speed_up(curves: Curves, seed: int, early: int, last: int, arm: str = "haste") -> float:
    """How many times fewer steps `arm` needs to reach vanilla's final FID.

    Between kept steps log FID is interpolated linearly in log step. Where `arm` never gets there the value is 1, an
    upper bound of nothing gained; where its first kept step is already below, that step is taken (a lower bound).
    """
    goal = _log(curves, "vanilla", seed, last)
    steps = sorted(curves[arm][seed])
    values = [_log(curves, arm, seed, step) for step in steps]
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        if value <= goal:
            if i == 0:
                return last / step
            share = (values[i - 1] - goal) / (values[i - 1] - value)
            reached = math.log(steps[i - 1]) + share * (math.log(step) - math.log(steps[i - 1]))
            return last / math.exp(reached)
    return 1.0


CLAIMS = (
    Claim(
        "C1",
        "REPA beats vanilla early",
        "Fig 1; Table 3: 40 epochs 24.3 -> 10.7, that is 0.82 in log FID",
        ("vanilla", "repa"),
        "log FID, vanilla minus REPA, early",
        "supported if the interval is above 0, contradicted if below",
        (0.0, math.inf),
        lambda c, seed, early, last: _early_gain(c, "repa", seed, early),
    ),
    Claim(
        "C7",
        "attention alignment alone speeds up about as much as REPA",
        "Table 3: 40 epochs 13.6 against 10.7 (vanilla 24.3), that is 0.71 of REPA's gain in log FID",
        ("vanilla", "repa", "atta"),
        "gain of attention alignment over gain of REPA, both in log FID, early",
        "about as much is 0.5 to 1.5 times: supported if the interval is inside, contradicted if wholly outside; not "
        "decided where REPA itself gains nothing for some seed",
        (0.5, 1.5),
        _gain_share,
    ),
    Claim(
        "C9",
        "both together beat either, early",
        "Table 3: 40 epochs 9.9 against 10.7 and 13.6, that is 0.08 in log FID over the better",
        ("repa", "atta", "holistic"),
        "log FID, better of REPA and ATTA minus holistic, early",
        "supported if the interval is above 0, contradicted if below",
        (0.0, math.inf),
        _both_over_either,
    ),
    Claim(
        "C11",
        "both, then the switch, is best at the end",
        "Table 3: 100 epochs 5.3 against 7.5 (REPA), that is 0.35 in log FID over the next best; Table 4",
        ("vanilla", "repa", "atta", "holistic", "haste"),
        "log FID, best other arm minus HASTE, last step",
        "supported if the interval is above 0, contradicted if below",
        (0.0, math.inf),
        _best_at_end,
    ),
    Claim(
        "C18",
        "HASTE reaches vanilla's final FID in far fewer steps",
        "Table 1: 28 times fewer at XL/2",
        ("vanilla", "haste"),
        "vanilla's steps over HASTE's to the same FID",
        "far fewer is at least 2 times: supported if the interval is above 2, contradicted if below",
        (2.0, math.inf),
        speed_up,
        log_scale=True,
    ),
)


def interval(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean and Student-t interval (mean, low, high); with one value the interval is infinite."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def verdict(low: float, high: float, region: tuple[float, float]) -> str:
    """ "supported", "contradicted" or "not decided", by the rule in the module's first lines."""
    if not math.isfinite(low) or not math.isfinite(high):
        return "not decided"
    if region[0] < low and high < region[1]:
        return "supported"
    if high < region[0] or low > region[1]:
        return "contradicted"
    return "not decided"


def judge(claim: Claim, curves: Curves, settings: config.Claims, last: int) -> dict[str, Any]:
    """One row of claims.csv for a claim; "not decided" where an arm it needs was not run."""
    row: dict[str, Any] = {
        "id": claim.id,
        "claim": claim.text,
        "unit": claim.unit,
        "rule": claim.rule,
        "paper": claim.paper,
    }
    row |= {"region_low": claim.region[0], "region_high": claim.region[1]}
    missing = [arm for arm in claim.arms if arm not in curves]
    if missing:
        nothing = {"effect": math.nan, "low": math.nan, "high": math.nan, "seeds": 0}
        return row | nothing | {"verdict": "not decided", "rule": f"{claim.rule}; arms missing: {', '.join(missing)}"}
    seeds = sorted(set.intersection(*(set(curves[arm]) for arm in claim.arms)))
    values = [claim.statistic(curves, seed, settings.early, last) for seed in seeds]
    if claim.log_scale:
        mean, low, high = (math.exp(v) for v in interval([math.log(v) for v in values], settings.confidence))
    else:
        mean, low, high = interval(values, settings.confidence)
    return row | {
        "effect": mean,
        "low": low,
        "high": high,
        "seeds": len(seeds),
        "verdict": verdict(low, high, claim.region),
    }


def judge_all(curves: Curves, settings: config.Claims, last: int) -> list[dict[str, Any]]:
    """A row for every claim, in order.

    Raises:
        HasteError: there are no scores at the step `settings.early`.
    """
    for arm, seeds in curves.items():
        for seed, by_step in seeds.items():
            if settings.early not in by_step:
                raise HasteError(
                    f"claims.early {settings.early} is no scored step of {arm} seed {seed}; possible: {sorted(by_step)}"
                )
    return [judge(claim, curves, settings, last) for claim in CLAIMS]


def curves_of(fid: pd.DataFrame) -> dict[str, dict[int, dict[int, float]]]:
    """FID by arm, seed and step from the rows of fid.csv.

    Raises:
        ValueError: the rows carry different cards; such scores cannot be compared.
    """
    cards = sorted(fid["card"].unique())
    if len(cards) > 1:
        raise ValueError(f"scores with different cards cannot be compared: {', '.join(cards)}")
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for arm, seed, step, value in zip(fid["arm"], fid["seed"], fid["step"], fid["fid"], strict=True):
        curves.setdefault(str(arm), {}).setdefault(int(seed), {})[int(step)] = float(value)
    return curves
