from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from haste_core import config
from haste_core.claims import (
    CLAIMS,
    COLUMNS,
    TABLES,
    Evidence,
    cards_of,
    curves_of,
    interval,
    judge,
    judge_all,
    speed_up,
    verdict,
)
from haste_core.errors import HasteError

EARLY, LAST = 1000, 3000
BY_ID = {claim.id: claim for claim in CLAIMS}
ON_FID = [claim.id for claim in CLAIMS if claim.table is None]
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
    "C2": {"repa": (10, 6), "repa_midway": (10, 5)},
    "C3": {"repa_too_early": (10, 6), "repa_midway": (10, 5)},
    "C6": {"repa_low_pass": (10.2, 5), "vanilla": (20, 5), "repa": (10, 5)},
    "C7": {"atta": (11, 5), "vanilla": (20, 5), "repa": (10, 5)},
    "C9": {"holistic": (8, 5), "repa": (10, 5), "atta": (12, 5)},
    "C10": {"holistic": (8, 6), "repa": (10, 5)},
    "C11": {"haste": (10, 3), "vanilla": (20, 9), "repa": (10, 8), "atta": (10, 8), "holistic": (10, 5)},
    "C12": {"haste": (9, 5), "haste_attention_1": (9, 6), "haste_attention_1.5": (9, 7), "haste_attention_3": (9, 8)},
    "C13": {"haste": (9, 5), "haste_layers_fewer": (9, 6), "haste_layers_shallow": (9, 7)},
    "C15": {"vanilla": (20, 7), "haste_other_teacher": (9, 5), "haste_other_grid": (9, 6)},
    "C16": {"text_vanilla": (9, 6), "text_haste": (9, 5)},
    "C17": {"dit_vanilla": (9, 6), "dit_haste": (9, 5)},
    "C18": {"haste": (4, 3), "vanilla": (20, 5)},
    "C19": {"haste_too_late": (9, 6), "haste": (9, 5)},
    "C20": {"high_resolution_vanilla": (9, 6), "high_resolution_haste": (9, 5)},
}
CONTRADICTED = {
    "C1": {"vanilla": (10, 5), "repa": (20, 5)},
    "C2": {"repa": (10, 5), "repa_midway": (10, 6)},
    "C3": {"repa_too_early": (10, 5), "repa_midway": (10, 6)},
    "C6": {"repa_low_pass": (19, 5), "vanilla": (20, 5), "repa": (10, 5)},
    "C7": {"atta": (19, 5), "vanilla": (20, 5), "repa": (10, 5)},
    "C9": {"holistic": (11, 5), "repa": (10, 5), "atta": (12, 5)},
    "C10": {"holistic": (8, 5), "repa": (10, 6)},
    "C11": {"haste": (10, 6), "vanilla": (20, 9), "repa": (10, 8), "atta": (10, 8), "holistic": (10, 5)},
    "C12": {"haste": (9, 6), "haste_attention_1": (9, 5), "haste_attention_1.5": (9, 7), "haste_attention_3": (9, 8)},
    "C13": {"haste": (9, 6), "haste_layers_fewer": (9, 7), "haste_layers_shallow": (9, 5)},
    "C15": {"vanilla": (20, 7), "haste_other_teacher": (9, 5), "haste_other_grid": (9, 8)},
    "C16": {"text_vanilla": (9, 5), "text_haste": (9, 6)},
    "C17": {"dit_vanilla": (9, 5), "dit_haste": (9, 6)},
    "C18": {"haste": (20, 4.9), "vanilla": (20, 5)},
    "C19": {"haste_too_late": (9, 5), "haste": (9, 6)},
    "C20": {"high_resolution_vanilla": (9, 5), "high_resolution_haste": (9, 6)},
}


def evidence(found, roles=None, cards=None, **tables):
    return Evidence(found, EARLY, LAST, roles or {}, cards or {}, tables)


def judged(claim, found, confidence=0.95):
    return judge(BY_ID[claim], evidence(found), confidence)


def test_these_are_the_claims_of_the_paper():
    numbers = [int(re.fullmatch(r"C(\d+)[ab]?", claim.id)[1]) for claim in CLAIMS]
    assert sorted(set(numbers)) == list(range(1, 21))
    assert numbers == sorted(numbers)
    assert list(SUPPORTED) == list(CONTRADICTED) == ON_FID


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
        assert f"arms missing: {missing}" in row["rule"]
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
    effects = {row["id"]: row["effect"] for row in judge_all(CLAIMS, evidence(found), 0.95)}
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
    wide, narrow = (judged("C1", found, confidence) for confidence in (0.99, 0.5))
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
    return speed_up(Evidence({"vanilla": {0: {1: 99.0, 1600: vanilla_last}}, "haste": {0: haste}}, 1, 1600), 0)


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
    assert speed_up(Evidence({"vanilla": own, "haste": own}, 1, 1600), 0) == pytest.approx(1)


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


def test_an_arm_has_one_card():
    with pytest.raises(ValueError, match=r"repa.*different cards.*a, b"):
        curves_of(pd.concat([rows(), rows(("repa",), card="b")]))


def test_scores_with_different_cards_are_not_compared():
    # A DiT is drawn by a sampler of its own: it may stand in the table, and in no claim beside the others.
    fid = pd.concat([rows(), rows(("haste",), card="b")])
    mixed = Evidence(curves_of(fid), EARLY, LAST, cards=cards_of(fid))
    assert judge(BY_ID["C1"], mixed, 0.95)["seeds"] == 2
    with pytest.raises(ValueError, match=r"C18.*different cards"):
        judge(BY_ID["C18"], mixed, 0.95)


def test_every_row_has_the_tables_columns():
    for found in (curves(**{arm: (20 - i, 5) for i, arm in enumerate(ARMS)}, spread=0.1), {}):
        judgement = judge_all(CLAIMS, evidence(found), 0.95)
        assert [row["id"] for row in judgement] == list(BY_ID)
        assert all(set(row) == set(COLUMNS) for row in judgement)


def test_early_gains_at_a_step_without_checkpoint_are_an_error_the_user_can_mend(tiny_overrides):
    # `claims.early` has to be a kept step; without a check the study ends in a KeyError after all its training.
    def load_and_judge():
        study = config.load("digits", overrides=[*tiny_overrides, "claims.early=7"])
        found = {arm: {0: dict.fromkeys(study.run(arm).train.kept_steps, 1.0)} for arm in study.arms}
        judge_all(CLAIMS, Evidence(found, study.claims.early, study.train.steps), 0.95)

    with pytest.raises(HasteError, match="early"):
        load_and_judge()


def test_arms_may_have_other_names_in_a_study():
    found = curves(repa=(10, 6), repa_1600=(10, 5), spread=0.02)
    row = judge(BY_ID["C2"], evidence(found, {"repa_midway": "repa_1600"}), 0.95)
    assert row["verdict"] == "supported"
    named = judge(BY_ID["C2"], evidence(found, {"repa_midway": "repa_800"}), 0.95)
    assert "arms missing: repa_800" in named["rule"]


def test_what_no_study_here_has_is_said():
    assert "captions" in judged("C16", curves(vanilla=(2, 1)))["rule"]
    assert "resolution" in judged("C20", curves(vanilla=(2, 1)))["rule"]


def test_ablations_are_read_at_the_last_step_all_arms_have():
    found = curves(**SUPPORTED["C12"])
    for seed in range(3):
        del found["haste_attention_3"][seed][LAST]
        found["haste"][seed][EARLY] = 6.0
    assert judged("C12", found)["effect"] == pytest.approx(math.log(9 / 6))


def test_an_arm_that_ended_earlier_is_not_read_at_the_last_step():
    found = curves(**SUPPORTED["C10"])
    for seed in range(3):
        del found["repa"][seed][LAST]
    row = judged("C10", found)
    assert (row["verdict"], row["seeds"]) == ("not decided", 0)
    assert f"no score at step {LAST}: repa" in row["rule"]


def test_arms_without_a_common_step_are_an_error_that_names_them():
    found = {"dit_vanilla": {0: {1: 2.0}}, "dit_haste": {0: {2: 2.0}}}
    with pytest.raises(HasteError, match="dit_vanilla, dit_haste share no scored step"):
        judged("C17", found)


# Claims on tables of analyses


def angles(first, last, mid=0.0, seeds=3):
    """Rows of gradient_conflict: rho at the lowest t from `first` to `last`, `mid` higher at t = 0.5."""
    return pd.DataFrame(
        {"arm": "repa", "seed": seed, "loss": "feature", "step": step, "t": t, "rho": rho + 0.001 * seed + above}
        for seed in range(seeds)
        for step, rho in ((EARLY, first), (LAST, last))
        for t, above in ((0.02, 0.0), (0.1, 0.0), (0.5, mid))
    )


def effects(**arms):
    """Rows of cross_effects from {arm: (Jensen-Shannon, R2)} at the last step, worse ones before."""
    return pd.DataFrame(
        {"arm": arm, "seed": seed, "step": step, "t": t, "side": side, "measure": measure, "baseline": baseline,
         "value": value + 0.001 * seed * (arm == "repa") + (step < LAST) + (baseline != "none")}
        for arm, values in arms.items()
        for seed in range(3)
        for step in (EARLY, LAST)
        for t in (0.1, 0.5)
        for baseline in ("none", "shuffled")
        for side, measure, value in (("attention", "jensen_shannon", values[0]), ("features", "r2", values[1]))
    )  # fmt: skip


def switches(*regrets, trigger="gradient angle < -0.05"):
    return pd.DataFrame(
        {"family": "holistic", "trigger": trigger, "seed": seed, "regret": r} for seed, r in enumerate(regrets)
    )


VANILLA = (0.4, 0.1)
ON_TABLES = [
    ("C4a", "gradient_conflict", angles(0.1, -0.1), "supported", 0.2),
    ("C4a", "gradient_conflict", angles(0.0, 0.1), "contradicted", -0.1),
    ("C4b", "gradient_conflict", angles(0.1, -0.1), "supported", -0.099),
    ("C4b", "gradient_conflict", angles(0.2, 0.1), "contradicted", 0.101),
    ("C5", "gradient_conflict", angles(0.1, -0.1, mid=0.2), "supported", 0.2),
    ("C5", "gradient_conflict", angles(0.1, -0.1, mid=-0.2), "contradicted", -0.2),
    ("C8a", "cross_effects", effects(vanilla=VANILLA, repa=(0.35, 0.5), atta=(0.2, 0.3)), "supported", 0.245),
    ("C8a", "cross_effects", effects(vanilla=VANILLA, repa=(0.22, 0.5), atta=(0.2, 0.3)), "contradicted", 0.895),
    ("C8b", "cross_effects", effects(vanilla=VANILLA, atta=(0.2, 0.3)), "supported", 0.2),
    ("C8b", "cross_effects", effects(vanilla=VANILLA, atta=(0.2, 0.0)), "contradicted", -0.1),
    ("C14", "termination_nearest", switches(0.01, 0.02, 0.015), "supported", 0.015),
    ("C14", "termination_nearest", switches(0.10, 0.11, 0.12), "contradicted", 0.11),
    ("C14", "termination_nearest", switches(0.0, 0.2, 0.0), "not decided", 0.2 / 3),
]


@pytest.mark.parametrize(("claim", "name", "table", "expected", "effect"), ON_TABLES)
def test_a_claim_on_a_table(claim, name, table, expected, effect):
    row = judge(BY_ID[claim], evidence({}, **{name: table}), 0.95)
    assert row["verdict"] == expected
    assert row["effect"] == pytest.approx(effect, abs=1e-3)
    assert row["seeds"] == 3


@pytest.mark.parametrize("claim", [claim.id for claim in CLAIMS if claim.table])
def test_a_claim_without_its_table_decides_nothing(claim):
    assert BY_ID[claim].table in TABLES
    row = judge(BY_ID[claim], evidence(curves(**{arm: (2, 1) for arm in ARMS})), 0.95)
    assert (row["verdict"], row["seeds"]) == ("not decided", 0)
    assert f"table missing: {BY_ID[claim].table}" in row["rule"]


def test_a_table_without_the_arm_decides_nothing():
    table = angles(0.1, -0.1).assign(arm="holistic")
    assert "arms missing: repa" in judge(BY_ID["C5"], evidence({}, gradient_conflict=table), 0.95)["rule"]


def test_a_trigger_that_could_not_read_decides_nothing():
    row = judge(BY_ID["C14"], evidence({}, termination_nearest=switches(math.nan, math.nan)), 0.95)
    assert row["verdict"] == "not decided"
    other = judge(BY_ID["C14"], evidence({}, termination_nearest=switches(0.0, 0.0, trigger="plateau")), 0.95)
    assert other["verdict"] == "not decided"
