"""Statistics over seeds, and scores by arm, seed and step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

NEAR_DATA, STRUCTURE = 0.1, 0.3  # noise levels up to the first, and from the second on
# arm -> seed -> step -> score
Curves = Mapping[str, Mapping[int, Mapping[int, float]]]


class Interval(NamedTuple):
    """Mean and Student-t interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], confidence: float) -> Interval:
    """Mean and Student-t interval; infinite with a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    from scipy.special import stdtrit  # half a second, which notebooks that read tables do not wait for

    half = float(stdtrit(len(values) - 1, 0.5 + confidence / 2) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def curves_of(scores: pd.DataFrame, measure: str = "fid") -> Curves:
    """A score by arm, seed and step, from rows of fid.csv."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    columns = (scores[name] for name in ("arm", "seed", "step", measure))
    for arm, seed, step, value in zip(*columns, strict=True):
        curves.setdefault(str(arm), {}).setdefault(int(seed), {})[int(step)] = float(value)
    return curves


def one_card(scores: pd.DataFrame) -> str:
    """The id of the evaluation card that all rows share.

    Raises:
        ValueError: rows carry different cards; such scores are neither compared nor drawn on one axis.
    """
    cards = sorted(scores["card"].unique())
    if len(cards) != 1:
        raise ValueError(f"scores with different cards cannot share an axis: {', '.join(cards)}")
    return cards[0]
