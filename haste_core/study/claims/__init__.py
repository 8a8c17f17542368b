"""The paper's claims as data: what is measured, and the rule that decides, both fixed before the runs they judge.

A claim is one or more contrasts. Each is computed per seed: a difference of the logarithm of a score (arms of one seed
share data order, noise and initial weights, so differences are paired) or a number from an analysis' table. It is
summarised by its mean and a Student-t interval over seeds. A claim is

    equivalent                 where at least one contrast has its interval inside the margin around zero (5 % for FID,
                               1 % for the denoising loss), and every other holds;
    supported                  where every contrast's interval lies inside the claim's region (intersection-union);
    contradicted               where a contrast's interval, at a confidence divided among the contrasts (Bonferroni),
                               lies outside the region and not inside the margin;
    smaller than the paper's   where the sign is open and the paper's effect lies outside the interval;
    not decided                otherwise, with fewer than two seeds always;
    not tested                 where an arm or table it needs is missing, or what it is about did not happen.

Beside the verdict stands the claim's p value (one-sided, the largest of its contrasts') and its corrections over all
claims of the table: Holm's (family-wise error) and Benjamini and Hochberg's (false discovery rate).

Rules and random streams were changed together after what was seen on earlier runs; those runs are called exploration
(reports/exploration). `RULES` names the commit that fixed both before the first run under them.
"""

from haste_core.study.claims.judging import (
    COLUMNS,
    SENSITIVITY,
    Claim,
    Contrast,
    Curves,
    Evidence,
    cards_of,
    curves_of,
    interval,
    judge,
    judge_all,
    one_card,
    sensitivity,
    verdict,
)
from haste_core.study.claims.paper import CLAIMS, TABLES
from haste_core.study.claims.statistics import speed_up

# Set by the commit that follows the one it names.
RULES = "d23e73d88298"

__all__ = [
    "CLAIMS", "COLUMNS", "RULES", "SENSITIVITY", "TABLES", "Claim", "Contrast", "Curves", "Evidence", "cards_of",
    "curves_of", "interval", "judge", "judge_all", "one_card", "sensitivity", "speed_up", "verdict",
]  # fmt: skip
