"""What a claim is, what it is judged on, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

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
class Evidence:
    """What a study has measured.

    Args:
        curves: FID by arm, seed and step. early: the step at which early gains are read. last: of the study.
        roles: the study's arm (or trigger) by the name a claim uses, where they differ.
        cards: the evaluation card by arm. tables: of analyses, by name.
    """

    curves: Curves
    early: int
    last: int
    roles: Mapping[str, str] = field(default_factory=dict)
    cards: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    def name(self, role: str) -> str:
        """The study's own name for a role."""
        return self.roles.get(role, role)

    def log_fid(self, role: str, seed: int, step: int) -> float:
        """log FID of an arm; an FID of exactly zero counts as 1e-12."""
        return math.log(max(self.curves[self.name(role)][seed][step], 1e-12))

    def common_step(self, roles: Iterable[str], seed: int) -> int:
        """The last step at which all these arms are scored.

        Raises:
            HasteError: there is none.
        """
        arms = [self.name(role) for role in roles]
        steps = set.intersection(*(set(self.curves[arm][seed]) for arm in arms))
        if not steps:
            raise HasteError(f"arms {', '.join(arms)} share no scored step for seed {seed}; possible: equal train.keep")
        return max(steps)

    def rows(self, table: str, seed: int, **chosen: Any) -> pd.DataFrame:
        """The rows of an analysis' table for one seed that hold these values; there may be none."""
        found = self.tables[table]
        found = found[found["seed"] == seed]
        for column, value in chosen.items():
            found = found[found[column] == value]
        return found


@dataclass(frozen=True)
class Claim:
    """One claim: `statistic(evidence, seed)` must lie inside `region` for the claim to hold.

    arms: roles (`Evidence.roles`) it is read from. table: of an analysis, for claims that are not on FID; its rows must
    have all the arms. early, last: it reads the step `Evidence.early` or `Evidence.last` of all of them. log_scale: the
    logarithm is averaged and its exponential reported. needs: what is missing where no study here can have the arms.
    """

    id: str
    text: str
    paper: str
    arms: tuple[str, ...]
    unit: str
    rule: str
    region: tuple[float, float]
    statistic: Callable[[Evidence, int], float]
    table: str | None = None
    early: bool = False
    last: bool = False
    log_scale: bool = False
    needs: str = ""


def interval(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean and Student-t interval (mean, low, high); with one value the interval is infinite."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def verdict(low: float, high: float, region: tuple[float, float]) -> str:
    """ "supported", "contradicted" or "not decided", by the rule in the package's first lines."""
    if not math.isfinite(low) or not math.isfinite(high):
        return "not decided"
    if region[0] < low and high < region[1]:
        return "supported"
    if high < region[0] or low > region[1]:
        return "contradicted"
    return "not decided"


def judge(claim: Claim, evidence: Evidence, confidence: float) -> dict[str, Any]:
    """One row of claims.csv for a claim; "not decided" where an arm or a table it needs is missing.

    Raises:
        ValueError: the arms were scored under different cards.
    """
    row: dict[str, Any] = {
        "id": claim.id,
        "claim": claim.text,
        "unit": claim.unit,
        "rule": claim.rule,
        "paper": claim.paper,
    }
    row |= {"region_low": claim.region[0], "region_high": claim.region[1]}
    missing = _missing(claim, evidence)
    if missing:
        nothing = {"effect": math.nan, "low": math.nan, "high": math.nan, "seeds": 0}
        return row | nothing | {"verdict": "not decided", "rule": f"{claim.rule}; {missing}"}
    cards = {evidence.cards.get(evidence.name(role)) for role in claim.arms} if claim.table is None else set()
    if len(cards) > 1:
        raise ValueError(
            f"claim {claim.id}: scores with different cards cannot be compared: {', '.join(map(str, cards))}"
        )
    seeds = _seeds(claim, evidence)
    values = [claim.statistic(evidence, seed) for seed in seeds]
    if claim.log_scale:
        mean, low, high = (math.exp(v) for v in interval([math.log(v) for v in values], confidence))
    else:
        mean, low, high = interval(values, confidence)
    found = {"effect": mean, "low": low, "high": high, "seeds": len(seeds), "verdict": verdict(low, high, claim.region)}
    return row | found


def _missing(claim: Claim, evidence: Evidence) -> str:
    """What the claim needs and the study does not have, in words; empty where it has all."""
    there: set[str] = set(evidence.curves)
    if claim.table is not None:
        if claim.table not in evidence.tables:
            return f"table missing: {claim.table}"
        column = "family" if "family" in evidence.tables[claim.table] else "arm"
        there = set(evidence.tables[claim.table][column].astype(str))
    arms = [evidence.name(role) for role in claim.arms if evidence.name(role) not in there]
    if not arms:
        seeds = _seeds(claim, evidence)
        names = [evidence.name(role) for role in claim.arms] if claim.last else []
        short = [name for name in names if any(evidence.last not in evidence.curves[name][s] for s in seeds)]
        if short:
            return f"no score at step {evidence.last}: {', '.join(short)}"
        return "" if seeds else "no seed has all of it"
    return f"arms missing: {', '.join(arms)}" + (f" ({claim.needs})" if claim.needs else "")


def _seeds(claim: Claim, evidence: Evidence) -> list[int]:
    names = [evidence.name(role) for role in claim.arms]
    if claim.table is None:
        return sorted(set.intersection(*(set(evidence.curves[name]) for name in names)))
    table = evidence.tables[claim.table]
    column = "family" if "family" in table else "arm"
    return sorted(set.intersection(*({int(s) for s in table.loc[table[column] == name, "seed"]} for name in names)))


def judge_all(claims: Iterable[Claim], evidence: Evidence, confidence: float) -> list[dict[str, Any]]:
    """A row for every claim, in order.

    Raises:
        HasteError: an arm that is read early has no score at that step.
    """
    claims = list(claims)
    for arm in {evidence.name(role) for claim in claims if claim.early for role in claim.arms}:
        for seed, by_step in evidence.curves.get(arm, {}).items():
            if evidence.early not in by_step:
                raise HasteError(
                    f"claims.early {evidence.early} is no scored step of {arm} seed {seed}; possible: {sorted(by_step)}"
                )
    return [judge(claim, evidence, confidence) for claim in claims]


def curves_of(fid: pd.DataFrame) -> dict[str, dict[int, dict[int, float]]]:
    """FID by arm, seed and step from the rows of fid.csv.

    Raises:
        ValueError: an arm's rows carry different cards; such scores cannot be compared.
    """
    cards_of(fid)
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for arm, seed, step, value in zip(fid["arm"], fid["seed"], fid["step"], fid["fid"], strict=True):
        curves.setdefault(str(arm), {}).setdefault(int(seed), {})[int(step)] = float(value)
    return curves


def one_card(fid: pd.DataFrame) -> str:
    """The card all rows share.

    Raises:
        ValueError: rows carry different cards; such scores are not compared, nor drawn on one axis.
    """
    cards = sorted(fid["card"].unique())
    if len(cards) != 1:
        raise ValueError(f"scores with different cards cannot share an axis: {', '.join(cards)}")
    return cards[0]


def cards_of(fid: pd.DataFrame) -> dict[str, str]:
    """The evaluation card of every arm.

    Raises:
        ValueError: an arm's rows carry different cards.
    """
    found = {}
    for arm, rows in fid.groupby("arm", sort=False):
        cards = sorted(rows["card"].unique())
        if len(cards) > 1:
            raise ValueError(f"{arm}: scores with different cards cannot be compared: {', '.join(cards)}")
        found[str(arm)] = str(cards[0])
    return found
