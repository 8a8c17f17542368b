"""The statistics that claims are decided on: from what a study measured and a seed to one number."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd

from haste_core.study.claims.judging import Contrast, Evidence


def early_difference(evidence: Evidence, seed: int, worse: str, better: str) -> float:
    """The measure of `worse` minus that of `better`, mean over the early steps."""
    return evidence.early_value(worse, seed) - evidence.early_value(better, seed)


def share_of_gain(evidence: Evidence, seed: int, arm: str) -> float:
    """The arm's early gain over REPA's; NaN, which decides nothing, where REPA itself gains nothing."""
    repa = early_difference(evidence, seed, "vanilla", "repa")
    return early_difference(evidence, seed, "vanilla", arm) / repa if repa > 0 else math.nan


def difference(evidence: Evidence, seed: int, worse: str, better: str) -> float:
    """The measure of `worse` minus that of `better`, at the last step both are scored at."""
    step = evidence.common_step((worse, better), seed)
    return evidence.value(worse, seed, step) - evidence.value(better, seed, step)


def last_difference(evidence: Evidence, seed: int, worse: str, better: str) -> float:
    """The measure of `worse` minus that of `better`, at the study's last step."""
    return evidence.value(worse, seed, evidence.last) - evidence.value(better, seed, evidence.last)


def speed_up(evidence: Evidence, seed: int, arm: str = "haste") -> float:
    """Factor by which `arm` needs fewer steps to reach the FID that vanilla has at step `evidence.last`.

    Between kept steps log FID is interpolated linearly in log step. Where `arm` does not get there by then the value is
    1, an upper bound on the factor. NaN, which decides nothing, where its first kept step is already there: the
    factor is then at least `evidence.last` over that step, and no more is known.
    """
    goal = evidence.value("vanilla", seed, evidence.last)
    steps = sorted(step for step in evidence.steps(arm, seed) if step <= evidence.last)
    values = [evidence.value(arm, seed, step) for step in steps]
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        if value <= goal:
            if i == 0:
                return math.nan
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


TRIGGER = "gradient angle < -0.05"


def never_fired(evidence: Evidence, family: str) -> str:
    """Reason why the trigger of a family of arms is not tested; empty where it fired for some seed."""
    rows = evidence.tables["termination_fired"]
    name = evidence.name(TRIGGER)
    rows = rows[(rows["family"] == evidence.name(family)) & (rows["trigger"] == name)]
    return "" if rows["tau"].notna().any() else f"the trigger {name!r} fired for no seed"


def against_switches(evidence: Evidence, family: str, allowed: float) -> tuple[Contrast, ...]:
    """The trigger's switch against every other of the family's sweep: contrasts that lie above 0 where it is good.

    Against staying on: log FID at the end of staying on minus that at the trigger's switch. Against each switch of the
    sweep: `allowed` plus log FID of that switch minus that at the trigger's.
    """
    swept = _ends(evidence, family)
    never = int(swept["tau"].max())

    def against(tau: int, seed: int, more: float) -> float:
        return _log_fid(swept, seed, tau) + more - at_trigger(evidence, seed, family)

    near = [
        Contrast(f"against switching at {tau}", partial(lambda e, seed, tau: against(tau, seed, allowed), tau=tau))
        for tau in sorted(set(swept["tau"]) - {never})
    ]
    return (Contrast("against staying on", lambda e, seed: against(never, seed, 0.0)), *near)


def at_trigger(evidence: Evidence, seed: int, family: str) -> float:
    """log FID at the end where the trigger of a family switches, interpolated in log tau; of staying on if it did not.

    NaN where the log held nothing to read, or had gaps.
    """
    rows = evidence.rows("termination_nearest", seed, family=evidence.name(family), trigger=evidence.name(TRIGGER))
    return math.log(rows["fid"].iloc[0]) if len(rows) else math.nan


def _ends(evidence: Evidence, family: str) -> pd.DataFrame:
    """The rows of a family's sweep at the last step, without fading arms."""
    swept = evidence.tables["termination_sweep"]
    swept = swept[(swept["family"] == evidence.name(family)) & (swept["fade"] == 0)]
    return swept[swept["step"] == swept["step"].max()]


def _log_fid(swept: pd.DataFrame, seed: int, tau: int) -> float:
    rows = swept[(swept["seed"] == seed) & (swept["tau"] == tau)]
    return math.log(rows["fid"].iloc[0]) if len(rows) else math.nan


def _angles(evidence: Evidence, seed: int) -> pd.DataFrame:
    return evidence.rows("gradient_conflict", seed, arm=evidence.name("repa"), loss="feature")


def _nearest_data(rows: pd.DataFrame) -> pd.Series:
    """rho by step at the lowest noise level."""
    return rows[rows["t"] == rows["t"].min()].set_index("step")["rho"].sort_index()


def _effect(evidence: Evidence, seed: int, arm: str, side: str, measure: str) -> float:
    """A cross effect of an arm at its last step, mean over noise levels."""
    rows = evidence.rows("cross_effects", seed, arm=evidence.name(arm), side=side, measure=measure, baseline="none")
    return float(rows.loc[rows["step"] == rows["step"].max(), "value"].mean())
