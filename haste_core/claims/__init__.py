"""The paper's claims as data: what is measured, and the rule that decides, both fixed before any run.

Every statistic is computed per seed: on the logarithm of FID (arms of one seed share data order, noise and initial
weights, so differences are paired) or on the rows of an analysis' table. It is summarised by its mean and a Student-t
interval over seeds. A claim is

    supported      when the whole interval lies inside the claim's region,
    contradicted   when the whole interval lies outside of it,
    not decided    otherwise: with fewer than two seeds always, and where arms or tables it needs are missing.
"""

from haste_core.claims.judging import (
    COLUMNS,
    Claim,
    Curves,
    Evidence,
    cards_of,
    curves_of,
    interval,
    judge,
    judge_all,
    one_card,
    verdict,
)
from haste_core.claims.paper import CLAIMS, TABLES
from haste_core.claims.statistics import speed_up

__all__ = [
    "CLAIMS", "COLUMNS", "TABLES", "Claim", "Curves", "Evidence", "cards_of", "curves_of", "interval", "judge",
    "judge_all", "one_card", "speed_up", "verdict",
]  # fmt: skip
