"""The statistics that claims are decided on: from what a study measured and a seed to one number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from haste_core.claims.judging import Evidence


def early_gain(evidence: Evidence, seed: int, arm: str) -> float:
    """log FID of vanilla minus that of the arm, at the early step."""
    return evidence.log_fid("vanilla", seed, evidence.early) - evidence.log_fid(arm, seed, evidence.early)


def share_of_gain(evidence: Evidence, seed: int, arm: str) -> float:
    """The arm's early gain over REPA's; NaN, which decides nothing, where REPA itself gains nothing."""
    repa = early_gain(evidence, seed, "repa")
    return early_gain(evidence, seed, arm) / repa if repa > 0 else math.nan


def difference(evidence: Evidence, seed: int, worse: str, better: str) -> float:
    """log FID of `worse` minus that of `better`, at the last step both are scored at."""
    step = evidence.common_step((worse, better), seed)
    return evidence.log_fid(worse, seed, step) - evidence.log_fid(better, seed, step)


def lead(evidence: Evidence, seed: int, arm: str, others: Sequence[str], step: int | None = None) -> float:
    """log FID of the best of `others` minus that of `arm`; above 0 the arm is best.

    step: the last one all are scored at, if not given.
    """
    step = evidence.common_step((arm, *others), seed) if step is None else step
    return min(evidence.log_fid(other, seed, step) for other in others) - evidence.log_fid(arm, seed, step)


def least_gain(evidence: Evidence, seed: int, arms: Sequence[str]) -> float:
    """The smallest gain over vanilla, in log FID, of several arms, each at the last step it shares with vanilla."""
    return min(difference(evidence, seed, "vanilla", arm) for arm in arms)


def speed_up(evidence: Evidence, seed: int, arm: str = "haste") -> float:
    """How many times fewer steps `arm` needs to reach vanilla's final FID.

    Between kept steps log FID is interpolated linearly in log step. Where `arm` never gets there the value is 1, an
    upper bound of nothing gained; where its first kept step is already below, that step is taken (a lower bound).
    """
    goal = evidence.log_fid("vanilla", seed, evidence.last)
    steps = sorted(evidence.curves[evidence.name(arm)][seed])
    values = [evidence.log_fid(arm, seed, step) for step in steps]
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        if value <= goal:
            if i == 0:
                return evidence.last / step
            share = (values[i - 1] - goal) / (values[i - 1] - value)
            reached = math.log(steps[i - 1]) + share * (math.log(step) - math.log(steps[i - 1]))
            return evidence.last / math.exp(reached)
    return 1.0


def fall_of_angle(evidence: Evidence, seed: int) -> float:
    """rho of REPA's loss nearest the data: at the first measured step minus at the last."""
    near = _nearest_data(_angles(evidence, seed))
    return float(near.iloc[0] - near.iloc[-1])


def last_angle(evidence: Evidence, seed: int) -> float:
    """rho of REPA's loss nearest the data at the last measured step."""
    return float(_nearest_data(_angles(evidence, seed)).iloc[-1])


def mid_over_low(evidence: Evidence, seed: int) -> float:
    """rho of REPA's loss at the noise level nearest 0.5 minus its mean at levels up to 0.1, mean over steps."""
    rows = _angles(evidence, seed)
    middle = rows["t"].iloc[(rows["t"] - 0.5).abs().argsort().iloc[0]]
    return float(rows.loc[rows["t"] == middle, "rho"].mean() - rows.loc[rows["t"] <= 0.1, "rho"].mean())


def share_of_attention(evidence: Evidence, seed: int) -> float:
    """How far REPA moves attention towards the teacher's, over how far attention alignment does, both from vanilla.

    By the Jensen-Shannon divergence at the last step, mean over layer pairs, heads and noise levels. NaN where
    attention alignment itself moves nothing.
    """
    apart = {arm: _effect(evidence, seed, arm, "attention", "jensen_shannon") for arm in ("vanilla", "repa", "atta")}
    whole = apart["vanilla"] - apart["atta"]
    return (apart["vanilla"] - apart["repa"]) / whole if whole > 0 else math.nan


def pull_on_features(evidence: Evidence, seed: int) -> float:
    """R^2 of the teacher's tokens from the student's at the last step: of attention alignment minus vanilla."""
    atta, vanilla = (_effect(evidence, seed, arm, "features", "r2") for arm in ("atta", "vanilla"))
    return atta - vanilla


def regret(evidence: Evidence, seed: int) -> float:
    """log FID at the end where the gradient-angle trigger switches, minus that of the best switch of the sweep."""
    rows = evidence.rows("termination_nearest", seed, family=evidence.name("holistic"))
    rows = rows[rows["trigger"] == evidence.name("gradient angle < -0.05")]
    return float(rows["regret"].iloc[0]) if len(rows) else math.nan


def _angles(evidence: Evidence, seed: int) -> pd.DataFrame:
    return evidence.rows("gradient_conflict", seed, arm=evidence.name("repa"), loss="feature")


def _nearest_data(rows: pd.DataFrame) -> pd.Series:
    """rho by step at the lowest noise level."""
    return rows[rows["t"] == rows["t"].min()].set_index("step")["rho"].sort_index()


def _effect(evidence: Evidence, seed: int, arm: str, side: str, measure: str) -> float:
    """A cross effect of an arm at its last step, mean over noise levels."""
    rows = evidence.rows("cross_effects", seed, arm=evidence.name(arm), side=side, measure=measure, baseline="none")
    return float(rows.loc[rows["step"] == rows["step"].max(), "value"].mean())
