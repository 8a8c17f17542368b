from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from haste_core import config
from haste_core.claims import CLAIMS, COLUMNS, curves_of, interval, judge, judge_all, speed_up, verdict
from haste_core.errors import HasteError

EARLY, LAST = 1000, 3000
SETTINGS = config.Claims(early=EARLY, confidence=0.95)
BY_ID = {claim.id: claim for claim in CLAIMS}
ARMS = ("vanilla", "repa", "atta", "holistic", "haste")


def curves(seeds=3, spread=0.0, **arms):
    """FID by arm, seed and step from {arm: (early, last)}; `spread` moves the first arm's log FID by seed."""
    first = next(iter(arms))
    return {
        arm: {
            seed: {
                step: value * math.exp(spread * (seed - (seeds - 1) / 2) * (arm == first))
                for step, value in zip((EARLY, LAST), values, strict=True)
            }
            for seed in range(seeds)
        }
        for arm, values in arms.items()
    }


# For each claim: curves that support it, that contradict it, and that leave it open by their spread over seeds.
SUPPORTED = {
    "C1": {"vanilla": (20, 5), "repa": (10, 5)},
    "C7": {"atta": (11, 5), "vanilla": (20, 5), "repa": (10, 5)},
    "C9": {"holistic": (8, 5), "repa": (10, 5), "atta": (12, 5)},
    "C11": {"haste": (10, 3), "vanilla": (20, 9), "repa": (10, 8), "atta": (10, 8), "holistic": (10, 5)},
    "C18": {"haste": (4, 3), "vanilla": (20, 5)},
}
CONTRADICTED = {
    "C1": {"vanilla": (10, 5), "repa": (20, 5)},
    "C7": {"atta": (19, 5), "vanilla": (20, 5), "repa": (10, 5)},
    "C9": {"holistic": (11, 5), "repa": (10, 5), "atta": (12, 5)},
    "C11": {"haste": (10, 6), "vanilla": (20, 9), "repa": (10, 8), "atta": (10, 8), "holistic": (10, 5)},
    "C18": {"haste": (20, 4.9), "vanilla": (20, 5)},
}


def judged(claim, found, settings=SETTINGS):
    return judge(BY_ID[claim], found, settings, LAST)


def test_these_are_the_claims_of_the_study():
    assert [claim.id for claim in CLAIMS] == ["C1", "C7", "C9", "C11", "C18"] == list(SUPPORTED)


@pytest.mark.parametrize("claim", SUPPORTED)
def test_a_claim_can_be_supported(claim):
    assert judged(claim, curves(**SUPPORTED[claim], spread=0.02))["verdict"] == "supported"


@pytest.mark.parametrize("claim", CONTRADICTED)
def test_a_claim_can_be_contradicted(claim):
    assert judged(claim, curves(**CONTRADICTED[claim], spread=0.002))["verdict"] == "contradicted"


@pytest.mark.parametrize("claim", SUPPORTED)
def test_a_claim_whose_seeds_disagree_is_not_decided(claim):
    row = judged(claim, curves(**SUPPORTED[claim], spread=1.2))
    assert row["verdict"] == "not decided"
    low, high = BY_ID[claim].region
    assert row["low"] < low < row["high"] or row["low"] < high < row["high"]


@pytest.mark.parametrize("claim", SUPPORTED)
@pytest.mark.parametrize("case", [SUPPORTED, CONTRADICTED])
def test_one_seed_never_decides(claim, case):
    row = judged(claim, curves(seeds=1, **case[claim]))
    assert (row["verdict"], row["seeds"]) == ("not decided", 1)
    assert np.isfinite(row["effect"])
    assert not np.isfinite(row["high"])


@pytest.mark.parametrize("claim", SUPPORTED)
def test_a_missing_arm_is_named_and_decides_nothing(claim):
    for missing in BY_ID[claim].arms:
        found = curves(**{arm: v for arm, v in SUPPORTED[claim].items() if arm != missing})
        row = judged(claim, found)
        assert (row["verdict"], row["seeds"]) == ("not decided", 0)
        assert row["rule"].endswith(f"arms missing: {missing}")
        assert math.isnan(row["effect"])


@pytest.mark.parametrize("claim", SUPPORTED)
def test_a_claim_names_every_arm_it_looks_at(claim):
    # With exactly those arms it can be computed, and the ones above show that each is needed.
    assert set(BY_ID[claim].arms) == set(SUPPORTED[claim])


def test_c7_is_contradicted_also_from_above():
    found = curves(vanilla=(20, 5), repa=(18, 5), atta=(8, 5), spread=0.001)
    row = judged("C7", found)
    assert row["low"] > 1.5
    assert row["verdict"] == "contradicted"


@pytest.mark.parametrize(("repa", "atta"), [(40, 40), (25, 26)])
def test_c7_does_not_hold_where_repa_does_not_help(repa, atta):
    # Two equal losses are no gain: "speeds up about as much as REPA" needs a REPA that speeds up.
    assert judged("C7", curves(vanilla=(20, 5), repa=(repa, 5), atta=(atta, 5), spread=0.002))["verdict"] != "supported"


def test_c7_survives_a_repa_without_any_gain():
    row = judged("C7", curves(vanilla=(20, 5), repa=(20, 5), atta=(10, 5)))
    assert row["verdict"] != "supported"


def test_effects_are_what_they_say():
    found = curves(vanilla=(20, 8), repa=(10, 6), atta=(12, 7), holistic=(9, 5), haste=(9, 4))
    effects = {row["id"]: row["effect"] for row in judge_all(found, SETTINGS, LAST)}
    assert effects["C1"] == pytest.approx(math.log(2))
    assert effects["C7"] == pytest.approx(math.log(20 / 12) / math.log(2))
    assert effects["C9"] == pytest.approx(math.log(10 / 9))
    assert effects["C11"] == pytest.approx(math.log(5 / 4))
    assert 1 < effects["C18"] < 3


def test_differences_are_paired_by_seed():
    # Seeds differ by a factor of a hundred, the arms of one seed by exactly two: no spread is left.
    found = {arm: {s: {EARLY: f * 10**s, LAST: 1} for s in range(3)} for arm, f in (("vanilla", 2), ("repa", 1))}
    row = judged("C1", found)
    assert (row["low"], row["high"]) == pytest.approx((math.log(2), math.log(2)))


def test_only_seeds_that_every_arm_has_are_counted():
    found = curves(**SUPPORTED["C1"], spread=0.02)
    del found["repa"][2]
    assert judged("C1", found)["seeds"] == 2


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("values", [[0.1, 0.5], [1.0, 2.0, 4.0, 4.5], [-3.0, 0.0, 0.2]])
def test_interval_is_scipys_student_t_interval(values, confidence):
    mean, low, high = interval(values, confidence)
    expected = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx(expected)


def test_interval_of_two_values_by_hand():
    # t(0.975, 1 degree of freedom) = 12.706; standard error of (1, 3) is 1.
    assert interval([1.0, 3.0], 0.95) == pytest.approx((2, 2 - 12.7062, 2 + 12.7062), rel=1e-5)


def test_judging_uses_the_studys_confidence():
    found = curves(**SUPPORTED["C1"], spread=0.3)
    wide, narrow = (judged("C1", found, config.Claims(early=EARLY, confidence=c)) for c in (0.99, 0.5))
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]


@pytest.mark.parametrize(
    ("low", "high", "region", "expected"),
    [
        (0.1, 0.2, (0, math.inf), "supported"),
        (-0.2, -0.1, (0, math.inf), "contradicted"),
        (-0.1, 0.1, (0, math.inf), "not decided"),
        (0.6, 1.4, (0.5, 1.5), "supported"),
        (1.6, 1.7, (0.5, 1.5), "contradicted"),
        (0.1, 0.4, (0.5, 1.5), "contradicted"),
        (0.4, 1.6, (0.5, 1.5), "not decided"),
        (1.4, 1.6, (0.5, 1.5), "not decided"),
        (0.1, math.inf, (0, math.inf), "not decided"),
        (math.nan, math.nan, (0, math.inf), "not decided"),
    ],
)
def test_verdict(low, high, region, expected):
    assert verdict(low, high, region) == expected


# Speed-up


def speed(vanilla_last, haste):
    return speed_up({"vanilla": {0: {1: 99.0, 1600: vanilla_last}}, "haste": {0: haste}}, 0, 1, 1600)


def test_speed_up_interpolates_log_fid_in_log_steps():
    # From 16 at step 100 to 1 at step 400; the goal 4 is half way in log FID, so step sqrt(100 * 400) = 200.
    assert speed(4.0, {100: 16.0, 400: 1.0, 1600: 0.5}) == pytest.approx(1600 / 200)
    # The goal 8 is a quarter of the way: step 100 * 4^(1/4).
    assert speed(8.0, {100: 16.0, 400: 1.0, 1600: 0.5}) == pytest.approx(16 / 4**0.25)


def test_speed_up_at_a_kept_step_is_that_step():
    assert speed(4.0, {100: 16.0, 400: 4.0, 1600: 3.0}) == pytest.approx(4)


def test_speed_up_that_is_never_reached_is_one():
    assert speed(4.0, {100: 16.0, 400: 5.0, 1600: 4.1}) == 1


def test_speed_up_reached_at_the_first_kept_step_is_that_step():
    assert speed(4.0, {100: 3.0, 400: 2.0, 1600: 1.0}) == 16


def test_speed_up_of_vanilla_itself_is_one():
    own = {0: {100: 16.0, 400: 8.0, 1600: 4.0}}
    assert speed_up({"vanilla": own, "haste": own}, 0, 1, 1600) == pytest.approx(1)


def test_speed_up_takes_the_first_crossing():
    assert speed(4.0, {100: 16.0, 400: 1.0, 800: 6.0, 1600: 2.0}) == pytest.approx(8)


def test_speed_ups_are_averaged_as_factors():
    found = {
        "vanilla": {seed: {EARLY: 20.0, LAST: 5.0} for seed in (0, 1)},
        "haste": {0: {750: 5.0, LAST: 4.0}, 1: {LAST: 5.0}},
    }
    assert judged("C18", found)["effect"] == pytest.approx(2)  # the geometric mean of 4 and 1


# Tables


def rows(arms=("vanilla", "repa"), card="a"):
    lines = [
        {"arm": arm, "seed": seed, "step": step, "fid": 1.0 + step, "card": card}
        for arm in arms
        for seed in (0, 1)
        for step in (EARLY, LAST)
    ]
    return pd.DataFrame(lines)


def test_curves_of_rows():
    assert curves_of(rows())["repa"][1] == {EARLY: 1001.0, LAST: 3001.0}


def test_scores_with_different_cards_are_not_compared():
    with pytest.raises(ValueError, match=r"different cards.*a, b"):
        curves_of(pd.concat([rows(), rows(("haste",), card="b")]))


def test_every_row_has_the_tables_columns():
    for found in (curves(**{arm: (20 - i, 5) for i, arm in enumerate(ARMS)}, spread=0.1), {}):
        judgement = judge_all(found, SETTINGS, LAST)
        assert [row["id"] for row in judgement] == list(BY_ID)
        assert all(set(row) == set(COLUMNS) for row in judgement)


def test_early_gains_at_a_step_without_checkpoint_are_an_error_the_user_can_mend(tiny_overrides):
    # `claims.early` has to be a kept step; without a check the study ends in a KeyError after all its training.
    def load_and_judge():
        study = config.load("digits", overrides=[*tiny_overrides, "claims.early=7"])
        found = {arm: {0: dict.fromkeys(study.run(arm).train.kept_steps, 1.0)} for arm in study.arms}
        judge_all(found, study.claims, study.train.steps)

    with pytest.raises(HasteError, match="early"):
        load_and_judge()
