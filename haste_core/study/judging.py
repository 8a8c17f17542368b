"""The rules by which a claim gets its verdict, from scores and analysis tables.

A claim has one or more contrasts. A contrast is computed per seed: a difference of the logarithm of a score (arms of
one seed share data order, noise and initial weights, so differences are paired) or a number from an analysis table. It
is summarised by its mean and a Student-t interval over seeds. A claim is

    equivalent                 if at least one contrast has its interval inside the margin around zero (5 % for FID,
                               1 % for the denoising loss), and every other holds;
    supported                  if every contrast's interval lies inside the claim's region (intersection-union);
    contradicted               if a contrast's interval, at a confidence divided among the contrasts (Bonferroni),
                               lies outside the region and not inside the margin;
    smaller than the paper's   if the sign is open and the paper's effect lies outside the interval;
    not decided                otherwise, and always with fewer than two seeds;
    not tested                 if an arm or table is missing, or the event that the claim is about did not happen.

Each claim also has a p value (one-sided, the largest of its contrasts) and its corrections over all claims of the
table: Holm (family-wise error) and Benjamini-Hochberg (false discovery rate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from haste_core.errors import HasteError

# arm -> seed -> step -> score
Curves = Mapping[str, Mapping[int, Mapping[int, float]]]
COLUMNS = (
    "id", "claim", "measure", "effect", "low", "high", "seeds", "verdict", "p", "p_holm", "p_bh", "unit", "rule",
    "region_low", "region_high", "paper",
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
    "precision": Measure("precision", 0.02, log=False),
    "recall": Measure("recall", 0.02, log=False),
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

    def common_step(self, roles: Iterable[str], seed: int) -> int:
        """The last step at which all these arms are scored.

        Raises:
            HasteError: there is none.
        """
        arms = [self.name(role) for role in roles]
        steps = set.intersection(*(self.steps(arm, seed) for arm in arms))
        if not steps:
            raise HasteError(
                f"arms {', '.join(arms)} share no scored step for seed {seed}; give them the same train.keep"
            )
        return max(steps)

    def rows(self, table: str, seed: int, **chosen: Any) -> pd.DataFrame:
        """The rows of an analysis table for one seed, with these values in these columns; may be empty."""
        found = self.tables[table]
        found = found[found["seed"] == seed]
        for column, value in chosen.items():
            found = found[found[column] == value]
        return found


class Contrast(NamedTuple):
    """A number per seed, named by the compared arms."""

    name: str
    statistic: Callable[[Evidence, int], float]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, which holds if every contrast lies inside `region`.

    Args:
        arms: roles (`Evidence.roles`) that it is read from.
        region: open interval. contrasts: fixed, or a function of the evidence.
        size: the paper's effect in the same unit, if known. measure: a key of MEASURES.
        table: the analysis table, for claims that are not on scores; it must have rows for all arms.
        early, last: whether all arms need scores at `Evidence.early`, or at `Evidence.last`.
        log_scale: average the logarithm and report its exponential.
        needs: requirements of arms that no study here has. happened: empty text, or the reason why the evidence does
            not test the claim although all arms are there.
    """

    id: str
    text: str
    paper: str
    arms: tuple[str, ...]
    unit: str
    rule: str
    region: tuple[float, float]
    contrasts: tuple[Contrast, ...] | Callable[[Evidence], tuple[Contrast, ...]]
    size: float | None = None
    measure: str = "fid"
    table: str | None = None
    early: bool = False
    last: bool = False
    log_scale: bool = False
    needs: str = ""
    happened: Callable[[Evidence], str] = lambda evidence: ""

    @property
    def margin(self) -> float | None:
        """Half-width around zero inside which an effect counts as none: the measure's if a bound is zero, else None."""
        if self.table is not None or set(self.region) - {0.0, math.inf, -math.inf}:
            return None
        return MEASURES[self.measure].margin


class Interval(NamedTuple):
    """Mean and Student-t interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], confidence: float) -> Interval:
    """Mean and Student-t interval (mean, low, high); infinite with a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def p_value(values: Sequence[float], region: tuple[float, float]) -> float:
    """One-sided p value of the mean lying inside a region, the larger of both sides (Student's t).

    NaN with fewer than two values or with one that is not finite.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    found = [0.0]
    for inside in (mean - region[0], region[1] - mean):
        if math.isfinite(inside):
            # Without any spread the sign alone decides.
            found.append(float(stats.t.sf(inside / error, len(values) - 1)) if error > 0 else float(inside <= 0))
    return max(found)


def verdict(
    values: Sequence[Sequence[float]],
    region: tuple[float, float],
    confidence: float,
    margin: float | None = None,
    size: float | None = None,
) -> str:
    """The verdict by the rules in the module's docstring.

    Args:
        values: one per seed, for each contrast. region: open interval. margin: of equivalence, None for none.
        size: the paper's effect, if known.
    """
    found = [interval(v, confidence) for v in values]
    if not all(math.isfinite(bound) for i in found for bound in i):
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
    }  # fmt: skip
    missing = _missing(claim, evidence) or claim.happened(evidence)
    if missing:
        nothing = {"effect": math.nan, "low": math.nan, "high": math.nan, "seeds": 0, "p": math.nan}
        return row | nothing | {"verdict": "not tested", "rule": f"{claim.rule}; {missing}"}
    if claim.table is None:
        names = [evidence.name(role) for role in claim.arms]
        one_card(evidence.scores[evidence.scores["arm"].isin(names)])
    contrasts = claim.contrasts if isinstance(claim.contrasts, tuple) else claim.contrasts(evidence)
    seeds = _seeds(claim, evidence)
    values = [[contrast.statistic(evidence, seed) for seed in seeds] for contrast in contrasts]
    region = claim.region
    if claim.log_scale:
        values = [[math.log(v) for v in of_one] for of_one in values]
        region = (math.log(region[0]), math.log(region[1]) if math.isfinite(region[1]) else math.inf)
    weakest = max(range(len(values)), key=lambda i: _short_of(float(np.mean(values[i])), region))
    shown = interval(values[weakest], confidence)
    if claim.log_scale:
        shown = Interval(*(math.exp(v) for v in shown))
    if len(contrasts) > 1:
        row["unit"] = f"{claim.unit} (shown: {contrasts[weakest].name})"
    return row | {
        "effect": shown.mean, "low": shown.low, "high": shown.high, "seeds": len(seeds),
        "verdict": verdict(values, region, confidence, claim.margin, claim.size),
        "p": max(p_value(of_one, region) for of_one in values),
    }  # fmt: skip


def _short_of(mean: float, region: tuple[float, float]) -> float:
    """Distance by which a mean falls short of a region, below 0 inside it; NaN falls short most."""
    return math.inf if math.isnan(mean) else -min(mean - region[0], region[1] - mean)


def _arms(claim: Claim, evidence: Evidence) -> dict[str, set[int]]:
    """Seeds by arm (or family of arms) in the scores or the table that a claim is read from."""
    if claim.table is None:
        return {arm: set(seeds) for arm, seeds in evidence.curves.items()}
    table = evidence.tables[claim.table]
    column = "family" if "family" in table else "arm"
    return {str(name): {int(seed) for seed in rows["seed"]} for name, rows in table.groupby(column)}


def _missing(claim: Claim, evidence: Evidence) -> str:
    """Names of the arms, tables or scores that the claim needs and the study does not have; empty if complete."""
    if claim.table is None and claim.measure not in evidence.scores:
        return f"score missing: {claim.measure}"
    if claim.table is not None and claim.table not in evidence.tables:
        return f"table missing: {claim.table}"
    there = _arms(claim, evidence)
    arms = [evidence.name(role) for role in claim.arms if evidence.name(role) not in there]
    if arms:
        return f"arms missing: {', '.join(arms)}" + (f" ({claim.needs})" if claim.needs else "")
    seeds = _seeds(claim, evidence)
    if not seeds:
        return "no seed has all of it"
    wanted = [*(evidence.early if claim.early else ()), *([evidence.last] if claim.last else ())]
    for role in claim.arms:
        lacking = [step for step in wanted if any(step not in evidence.steps(role, seed) for seed in seeds)]
        if lacking:
            return f"no score of {evidence.name(role)} at step {', '.join(map(str, lacking))}"
    return ""


def _seeds(claim: Claim, evidence: Evidence) -> list[int]:
    """Seeds that all arms of a claim have."""
    there = _arms(claim, evidence)
    return sorted(set.intersection(*(there[evidence.name(role)] for role in claim.arms)))


def judge_all(claims: Iterable[Claim], evidence: Evidence, confidence: float) -> list[dict[str, Any]]:
    """Rows of COLUMNS for all claims, in order, with p values corrected over all claims that have one.

    A claim for each horizon (`Claim.id` ending in "@") becomes a row for each step that its arms share after the
    first early one.
    """
    judged = [judge(one, evidence, confidence) for claim in claims for one in _at_horizons(claim, evidence)]
    known = [row for row in judged if math.isfinite(row["p"])]
    values = [row["p"] for row in known]
    discovery = stats.false_discovery_control(values).tolist() if values else []
    for row in judged:
        row |= {"p_holm": math.nan, "p_bh": math.nan}
    for row, p_holm, p_bh in zip(known, holm(values), discovery, strict=True):
        row |= {"p_holm": p_holm, "p_bh": p_bh}
    return judged


def _at_horizons(claim: Claim, evidence: Evidence) -> list[Claim]:
    """The claim at each horizon, whose contrasts read the evidence as if the study ended there."""
    if not claim.id.endswith("@"):
        return [claim]
    assert isinstance(claim.contrasts, tuple)
    seeds = _seeds(claim, evidence) if not _missing(claim, evidence) else []
    steps = set.intersection(*(evidence.steps(role, seed) for role in claim.arms for seed in seeds)) if seeds else set()

    def until(contrast: Contrast, horizon: int) -> Contrast:
        return Contrast(contrast.name, lambda e, seed: contrast.statistic(replace(e, last=horizon), seed))

    return [
        replace(claim, id=f"{claim.id}{horizon}", contrasts=tuple(until(c, horizon) for c in claim.contrasts))
        for horizon in sorted(step for step in steps if step > min(evidence.early)) or [evidence.last]
    ]


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected by Holm's step-down method, in the order given."""
    order, corrected, largest = np.argsort(values), [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


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
        if claim.early and len(evidence.early) > 1:
            variants += [(claim, replace(evidence, early=(step,))) for step in evidence.early]
        for variant, seen in variants:
            if variant.measure in seen.scores:
                row = judge(variant, seen, confidence)
                early = "+".join(map(str, seen.early)) if claim.early else ""
                rows.append({name: row.get(name) for name in SENSITIVITY} | {"early": early})
    return [row for row in rows if row["verdict"] != "not tested"]


def curves_of(scores: pd.DataFrame, measure: str = "fid") -> dict[str, dict[int, dict[int, float]]]:
    """A score by arm, seed and step, from rows of fid.csv."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    columns = (scores[name] for name in ("arm", "seed", "step", measure))
    for arm, seed, step, value in zip(*columns, strict=True):
        curves.setdefault(str(arm), {}).setdefault(int(seed), {})[int(step)] = float(value)
    return curves


def one_card(fid: pd.DataFrame) -> str:
    """The id of the evaluation card that all rows share.

    Raises:
        ValueError: rows carry different cards; such scores are neither compared nor drawn on one axis.
    """
    cards = sorted(fid["card"].unique())
    if len(cards) != 1:
        raise ValueError(f"scores with different cards cannot share an axis: {', '.join(cards)}")
    return cards[0]
