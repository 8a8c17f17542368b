"""The rules by which a claim gets its verdict, from scores and analysis tables: docs/how_claims_are_judged.md.

A claim has one or more contrasts. A contrast is computed per seed: a difference of the logarithm of a score (arms of
one seed share data order, noise and initial weights, so differences are paired) or a number from an analysis table. It
is summarised by its mean and a Student-t interval over seeds. `verdict` compares intervals with the claim's region.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from haste_core.analysis.statistics import Curves, Interval, curves_of, interval, one_card

COLUMNS = (
    "id", "claim", "measure", "effect", "low", "high", "seeds", "verdict", "p", "p_holm", "p_bh", "unit", "rule",
    "region_low", "region_high", "paper_effect", "paper",
)  # fmt: skip
SENSITIVITY = ("id", "measure", "early", "effect", "low", "high", "seeds", "verdict")


class Measure(NamedTuple):
    """A score that claims are read on. margin: largest difference that counts as none; log: compare logarithms."""

    name: str
    margin: float
    log: bool = True


MEASURES = {
    "fid": Measure("log FID", 0.05),
    "fid_heldout": Measure("log FID, held-out", 0.05),
    "fid_unlabelled": Measure("log Frechet distance, features without labels", 0.05),
    "fd_pixel": Measure("log Frechet distance, pixels", 0.05),
    "near_data": Measure("log held-out denoising loss, t <= 0.1", 0.01),
    "structure": Measure("log held-out denoising loss, t >= 0.3", 0.01),
    "denoising": Measure("log held-out denoising loss, all t", 0.01),
    "excess": Measure("log excess loss, t <= 0.1", 0.02),
    "excess_structure": Measure("log excess loss, t >= 0.3", 0.02),
    "gap": Measure("log of the likelihood gap", 0.02),
    "precision": Measure("precision", 0.02, log=False),
    "recall": Measure("recall", 0.02, log=False),
    "caption_seen": Measure("caption accuracy, combinations seen in training", 0.02, log=False),
    "caption_unseen": Measure("caption accuracy, unseen combinations", 0.02, log=False),
}
# The sensitivity table reads claims on FID on these measures too.
ALTERNATIVES = ("fid_heldout", "fid_unlabelled", "fd_pixel")


@dataclass(frozen=True)
class Evidence:
    """The scores and analysis tables of a study.

    Args:
        scores: rows of fid.csv: arm, seed, step, card, and a column for each measure.
        early: steps that early gains are averaged over. last: last step of the study.
        roles: name of the study's arm (or trigger) by the name that a claim uses, if they differ.
        tables: analysis tables by name. measure: the score that `value` reads, a key of MEASURES.
    """

    scores: pd.DataFrame
    early: Sequence[int]
    last: int
    roles: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    measure: str = "fid"

    @cached_property
    def curves(self) -> Curves:
        """The measure by arm, seed and step."""
        return curves_of(self.scores, self.measure)

    def name(self, role: str) -> str:
        """The study's own name for a role."""
        return self.roles.get(role, role)

    def steps(self, role: str, seed: int) -> set[int]:
        """Steps at which an arm is scored."""
        return set(self.curves[self.name(role)][seed])

    def value(self, role: str, seed: int, step: int) -> float:
        """The measure of an arm at a step: its logarithm (a score of exactly zero counts as 1e-12) or itself."""
        score = self.curves[self.name(role)][seed][step]
        return math.log(max(score, 1e-12)) if MEASURES[self.measure].log else score

    def early_value(self, role: str, seed: int) -> float:
        """Mean of `value` over the early steps."""
        return float(np.mean([self.value(role, seed, step) for step in self.early]))

    def rows(self, table: str, seed: int, **chosen: Any) -> pd.DataFrame:
        """The rows of an analysis table for one seed, with these values in these columns; may be empty."""
        found = self.tables[table]
        for column, value in {"seed": seed, **chosen}.items():
            found = found[found[column] == value]
        return found


# Numbers per seed by the names of the compared arms.
Contrasts = Mapping[str, Callable[[Evidence, int], float]]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, which holds if every contrast lies inside `region`.

    Args:
        id: ends in "@" if the claim is read at every horizon.
        arms: roles (`Evidence.roles`) that it is read from.
        region: open interval. contrasts: fixed, or a function of the evidence.
        size: the paper's effect in the same unit, if known. measure: a key of MEASURES.
        table: the analysis table, for claims that are not on scores; it must have rows for all arms.
        when: "early" or "last" if all arms need scores at `Evidence.early`, or at `Evidence.last`.
        log_scale: average the logarithm and report its exponential.
        across: the arms by report, for a claim across reports: those of one report share a card, and the claim has a
            row only in studies whose roles name all of its arms.
        needs: requirements of arms that no study here has. untested: the reason why the evidence does not test the
            claim although all arms are there; empty if it does.
    """

    id: str
    text: str
    paper: str
    arms: tuple[str, ...]
    unit: str
    rule: str
    region: tuple[float, float]
    contrasts: Contrasts | Callable[[Evidence], Contrasts]
    size: float | None = None
    measure: str = "fid"
    table: str | None = None
    when: str = ""
    log_scale: bool = False
    across: tuple[tuple[str, ...], ...] = ()
    needs: str = ""
    untested: Callable[[Evidence], str] = lambda evidence: ""

    @property
    def margin(self) -> float | None:
        """Half-width around zero inside which an effect counts as none: the measure's if a bound is zero, else None."""
        if self.table is not None or set(self.region) - {0.0, math.inf, -math.inf}:
            return None
        return MEASURES[self.measure].margin


def p_value(values: Sequence[float], region: tuple[float, float]) -> float:
    """One-sided p value of the mean lying inside a region, the larger of both sides (Student's t).

    NaN with fewer than two values or with one that is not finite.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    from scipy.special import stdtr

    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    found = [0.0]
    for inside in (mean - region[0], region[1] - mean):
        if math.isfinite(inside):
            # Without any spread the sign alone decides.
            found.append(float(stdtr(len(values) - 1, -inside / error)) if error > 0 else float(inside <= 0))
    return max(found)


def verdict(
    values: Sequence[Sequence[float]],
    region: tuple[float, float],
    confidence: float,
    margin: float | None = None,
    size: float | None = None,
) -> str:
    """The first of these that is true; with fewer than two seeds always "not decided".

    equivalent: a contrast has its interval inside the margin around zero, and every other inside margin or region.
    supported: every contrast's interval lies inside the region (intersection-union).
    contradicted: a contrast's interval, at a confidence divided among the contrasts (Bonferroni), lies outside the
        region and not inside the margin.
    smaller than the paper's: the sign is open, and the paper's effect lies outside the interval.

    Args:
        values: one per seed, for each contrast. region: open interval. margin: of equivalence, None for none.
        size: the paper's effect, if known.
    """
    found = [interval(v, confidence) for v in values]
    if not np.isfinite(found).all():
        return "not decided"
    same = [margin is not None and -margin < i.low and i.high < margin for i in found]
    holds = [region[0] < i.low and i.high < region[1] for i in found]
    if all(s or h for s, h in zip(same, holds, strict=True)):
        return "equivalent" if any(same) else "supported"
    divided = [interval(v, 1 - (1 - confidence) / len(values)) for v in values]
    if any((i.high < region[0] or i.low > region[1]) and not s for i, s in zip(divided, same, strict=True)):
        return "contradicted"
    undecided = [i for i, h in zip(found, holds, strict=True) if not h]
    if size is not None and all(i.low <= 0 <= i.high < size for i in undecided):
        return "smaller than the paper's"
    return "not decided"


def judge(claim: Claim, evidence: Evidence, confidence: float) -> dict[str, Any]:
    """One row of claims.csv, without the corrections of its p value.

    `effect`, `low` and `high` belong to the weakest contrast, whose mean reaches least into the region.

    Raises:
        ValueError: the arms were scored under different cards.
    """
    evidence = replace(evidence, measure=claim.measure)
    row: dict[str, Any] = {
        "id": claim.id, "claim": claim.text, "unit": claim.unit, "rule": claim.rule, "paper": claim.paper,
        "measure": claim.table or claim.measure, "region_low": claim.region[0], "region_high": claim.region[1],
        "paper_effect": math.nan if claim.size is None else claim.size,
    }  # fmt: skip
    missing = _missing(claim, evidence)
    if missing:
        nothing = {"effect": math.nan, "low": math.nan, "high": math.nan, "seeds": 0, "p": math.nan}
        return row | nothing | {"verdict": "not tested", "rule": f"{claim.rule}; {missing}"}
    if claim.table is None:
        for compared in claim.across or (claim.arms,):
            one_card(evidence.scores[evidence.scores["arm"].isin([evidence.name(role) for role in compared])])
    contrasts = claim.contrasts(evidence) if callable(claim.contrasts) else claim.contrasts
    seeds = _seeds(claim, evidence)
    values = {name: [statistic(evidence, seed) for seed in seeds] for name, statistic in contrasts.items()}
    region = claim.region
    if claim.log_scale:
        values = {name: [math.log(value) for value in of_one] for name, of_one in values.items()}
        region = (math.log(region[0]), math.log(region[1]))
    # The mean that falls short of the region by most; NaN falls short by most of all.
    distance = {n: max(region[0] - np.mean(v), np.mean(v) - region[1]) for n, v in values.items()}
    weakest = max(distance, key=lambda name: math.inf if math.isnan(distance[name]) else distance[name])
    shown = interval(values[weakest], confidence)
    if claim.log_scale:
        shown = Interval(*map(math.exp, shown))
    if len(contrasts) > 1:
        row["unit"] = f"{claim.unit} (shown: {weakest})"
    return row | {
        "effect": shown.mean, "low": shown.low, "high": shown.high, "seeds": len(seeds),
        "verdict": verdict(list(values.values()), region, confidence, claim.margin, claim.size),
        "p": max(p_value(of_one, region) for of_one in values.values()),
    }  # fmt: skip


def _seeds_by_arm(claim: Claim, evidence: Evidence) -> dict[str, set[int]]:
    """Seeds by arm (or family of arms) in the scores or the table that a claim is read from."""
    if claim.table is None:
        return {arm: set(seeds) for arm, seeds in evidence.curves.items()}
    table = evidence.tables[claim.table]
    return {str(name): set(rows["seed"]) for name, rows in table.groupby("family" if "family" in table else "arm")}


def _seeds(claim: Claim, evidence: Evidence) -> list[int]:
    """Seeds that all arms of a claim have."""
    there = _seeds_by_arm(claim, evidence)
    return sorted(set.intersection(*(there[evidence.name(role)] for role in claim.arms)))


def _missing(claim: Claim, evidence: Evidence) -> str:
    """The reason why a claim cannot be tested, such as the arms, tables or scores that are missing; empty if it can."""
    if claim.table is None and claim.measure not in evidence.scores:
        return f"score missing: {claim.measure}"
    if claim.table is not None and claim.table not in evidence.tables:
        return f"table missing: {claim.table}"
    there = _seeds_by_arm(claim, evidence)
    arms = [arm for arm in map(evidence.name, claim.arms) if arm not in there]
    if arms:
        where = f" in the table {claim.table}" if claim.table else ""
        return f"arms missing{where}: {', '.join(arms)}" + (f" ({claim.needs})" if claim.needs else "")
    seeds = _seeds(claim, evidence)
    if not seeds:
        return "no seed has all of it"
    wanted = {"early": evidence.early, "last": [evidence.last]}.get(claim.when, ())
    for role in claim.arms:
        lacking = [str(step) for step in wanted if any(step not in evidence.steps(role, seed) for seed in seeds)]
        if lacking:
            return f"no score of {evidence.name(role)} at step {', '.join(lacking)}"
    return claim.untested(evidence)


def judge_all(claims: Iterable[Claim], evidence: Evidence, confidence: float) -> list[dict[str, Any]]:
    """Rows of COLUMNS for all claims, in order, with p values corrected over all claims that have one.

    A claim for each horizon becomes a row for each step that its arms share after the first early one.
    """
    judged = [
        judge(one, seen, confidence) | {"p_holm": math.nan, "p_bh": math.nan}
        for claim in claims
        if not claim.across or set(claim.arms) <= set(evidence.roles)
        for one, seen in _at_horizons(claim, evidence)
    ]
    known = [row for row in judged if math.isfinite(row["p"])]
    values = [row["p"] for row in known]
    from scipy import stats  # a second, which notebooks that read tables do not wait for

    for row, p_holm, p_bh in zip(known, holm(values), stats.false_discovery_control(values), strict=True):
        row |= {"p_holm": p_holm, "p_bh": p_bh}
    return judged


def _at_horizons(claim: Claim, evidence: Evidence) -> list[tuple[Claim, Evidence]]:
    """The claim at each horizon, with the evidence as if the study ended there."""
    if not claim.id.endswith("@"):
        return [(claim, evidence)]
    shared: set[int] = set()
    if not _missing(claim, evidence):
        every = [evidence.steps(role, seed) for role in claim.arms for seed in _seeds(claim, evidence)]
        shared = {step for step in set.intersection(*every) if step > min(evidence.early)}
    return [
        (replace(claim, id=f"{claim.id}{last}"), replace(evidence, last=last))
        for last in sorted(shared) or [evidence.last]
    ]


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected by Holm's step-down method, in the order given."""
    order = np.argsort(values)
    corrected = np.empty(len(values))
    factors = np.arange(len(values), 0, -1)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, factors * np.asarray(values)[order]))
    return corrected.tolist()


def sensitivity(claims: Iterable[Claim], evidence: Evidence, confidence: float) -> list[dict[str, Any]]:
    """Verdicts on FID under other features and single early steps, rows of SENSITIVITY.

    Each claim on FID is judged again on held-out FID, on features without labels and on pixels; each early claim also
    at each of the early steps alone. Claims that are not tested have no rows.
    """
    rows = []
    for claim in claims:
        if claim.measure != "fid" or claim.table is not None or claim.id.endswith("@"):
            continue
        variants = [(claim, evidence), *((replace(claim, measure=m, size=None), evidence) for m in ALTERNATIVES)]
        if claim.when == "early" and len(evidence.early) > 1:
            variants += [(claim, replace(evidence, early=(step,))) for step in evidence.early]
        for variant, seen in variants:
            row = judge(variant, seen, confidence)
            row["early"] = "+".join(map(str, seen.early)) if claim.when == "early" else ""
            rows.append({name: row[name] for name in SENSITIVITY})
    return [row for row in rows if row["verdict"] != "not tested"]
