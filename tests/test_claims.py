"""Claims: rules, verdicts, statistics and corrections, on scores whose answer is known."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from haste_core.analysis.statistics import interval, one_card
from haste_core.errors import HasteError
from haste_core.study.claims import CLAIMS, TABLES, speed_up
from haste_core.study.judging import (
    COLUMNS,
    MEASURES,
    SENSITIVITY,
    Evidence,
    holm,
    judge,
    judge_all,
    p_value,
    sensitivity,
    verdict,
)

EARLY, LAST = 1000, 3000
BY_ID = {claim.id: claim for claim in CLAIMS}
ON_SCORES = [claim.id for claim in CLAIMS if claim.table is None]
ARMS = ("vanilla", "repa", "atta", "holistic", "haste")
SIDES = ("high", "low")


def scores(seeds=3, spread=0.0, **arms):
    """Rows of fid.csv from {arm: (early, last)}; `spread` moves the first arm's logarithm by seed.

    Precision and recall take the logarithm, so that differences are the same on every measure.
    """
    lines = []
    for i, (arm, values) in enumerate(arms.items()):
        for seed in range(seeds):
            for step, value in zip((EARLY, LAST), values, strict=True):
                moved = math.log(value) + spread * (seed - (seeds - 1) / 2) * (i == 0)
                found = {name: math.exp(moved) if of.log else moved for name, of in MEASURES.items()}
                lines.append({"arm": arm, "seed": seed, "step": step, "card": "a", **found})
    return pd.DataFrame(lines, columns=["arm", "seed", "step", "card", *MEASURES])


# Arms that make every contrast of a claim on differences lie far above zero, or one of them far below.
def supporting(claim):
    better = claim.arms[-1]
    return {better: (5, 5)} | {arm: (8, 8) for arm in claim.arms[:-1]}


def contradicting(claim):
    better = claim.arms[-1]
    return {better: (7, 7)} | {arm: (8, 8) for arm in claim.arms[:-1]} | {claim.arms[0]: (5, 5)}


GAIN_AT_LOW_RESOLUTION = {"low_resolution_vanilla": (9, 6), "low_resolution_haste": (9, 5)}
SPECIAL = {
    "C6": (
        {"repa_low_pass": (10.2, 5), "vanilla": (20, 5), "repa": (10, 5)},
        {"repa_low_pass": (19, 5), "vanilla": (20, 5), "repa": (10, 5)},
    ),
    "C7": (
        {"atta": (11, 5), "vanilla": (20, 5), "repa": (10, 5)},
        {"atta": (19, 5), "vanilla": (20, 5), "repa": (10, 5)},
    ),
    **dict.fromkeys(
        ("C20g", "C20gx", "C20gd"),
        (
            {"high_resolution_vanilla": (20, 8), "high_resolution_haste": (9, 5), **GAIN_AT_LOW_RESOLUTION},
            {"high_resolution_vanilla": (20, 5), "high_resolution_haste": (9, 5), **GAIN_AT_LOW_RESOLUTION},
        ),
    ),
    "C18@": ({"haste": (5.2, 3), "vanilla": (20, 5)}, {"haste": (20, 4.9), "vanilla": (20, 5)}),
}


def evidence(found, roles=None, early=(EARLY,), **tables):
    return Evidence(found, early, LAST, roles or {}, tables)


def judged(claim, found, confidence=0.95):
    return judge(BY_ID[claim], evidence(found), confidence)


def test_these_are_the_claims_of_the_paper():
    numbers = [int(m[1]) for claim in CLAIMS if (m := re.fullmatch(r"C(\d+)[abgn]?w?4?[dsx]?@?", claim.id))]
    assert sorted(set(numbers)) == list(range(1, 21))
    assert numbers == sorted(numbers)
    assert len(BY_ID) == len(CLAIMS)


@pytest.mark.parametrize("claim", ON_SCORES)
def test_a_claim_on_scores_can_have_every_verdict(claim):
    supported, contradicted = SPECIAL.get(claim) or (supporting(BY_ID[claim]), contradicting(BY_ID[claim]))
    assert judged(claim, scores(**supported, spread=0.02))["verdict"] == "supported"
    assert judged(claim, scores(**contradicted, spread=0.002))["verdict"] == "contradicted"
    if claim != "C18@":  # a factor that is never reached is 1 in every seed
        row = judged(claim, scores(**supported, spread=1.2))
        assert row["verdict"] in ("not decided", "smaller than the paper's")
        assert any(row["low"] < bound < row["high"] for bound in BY_ID[claim].region)
        assert row["p"] > 0.025
    # One seed decides nothing.
    for arms in (supported, contradicted):
        row = judged(claim, scores(seeds=1, **arms))
        assert (row["verdict"], row["seeds"]) == ("not decided", 1)
        assert np.isfinite(row["effect"])
        assert not np.isfinite(row["high"])
        assert math.isnan(row["p"])
    for missing in BY_ID[claim].arms:
        row = judged(claim, scores(**{arm: v for arm, v in supported.items() if arm != missing}))
        assert (row["verdict"], row["seeds"]) == ("not tested", 0)
        assert f"arms missing: {missing}" in row["rule"]
        assert math.isnan(row["effect"])


@pytest.mark.parametrize(
    ("claim", "arms", "expected"),
    [
        # 2 % of FID are inside its margin of 5 %, and outside of the denoising loss's of 1 %.
        ("C10", {"holistic": (5, 5.1), "repa": (5, 5)}, "equivalent"),
        ("C10d", {"holistic": (5, 5.1), "repa": (5, 5)}, "supported"),
        ("C10d", {"holistic": (5, 5.01), "repa": (5, 5)}, "equivalent"),
        ("C10d", {"holistic": (5, 4.9), "repa": (5, 5)}, "contradicted"),
        # Better than all but one, and equal to that one: a tie for the best.
        ("C11", {"haste": (5, 5), "holistic": (5, 5.01)} | dict.fromkeys(ARMS[:3], (9, 9)), "equivalent"),
        # Equal to one and worse than another is no tie.
        ("C11", {"haste": (5, 5)} | dict.fromkeys(ARMS[1:4], (5, 5)) | {"vanilla": (4, 4)}, "contradicted"),
        # A gain that is as large at the lower resolution.
        (
            "C20g",
            {f"{side}_resolution_{arm}": (9, fid) for arm, fid in (("vanilla", 8), ("haste", 5)) for side in SIDES},
            "equivalent",
        ),
    ],
)  # fmt: skip
def test_a_difference_inside_the_margin_is_none(claim, arms, expected):
    assert judged(claim, scores(**arms, spread=0.0005))["verdict"] == expected


def test_an_open_sign_without_the_papers_size_is_smaller_than_the_papers():
    # C1's paper size is 0.82 in log FID. The spread leaves the sign open and excludes 0.82, or does not.
    row = judged("C1", scores(repa=(10, 5), vanilla=(10.5, 5), spread=0.1))
    assert row["low"] < 0 < row["high"] < 0.82
    assert row["verdict"] == "smaller than the paper's"
    assert judged("C1", scores(repa=(10, 5), vanilla=(10.5, 5), spread=0.6))["verdict"] == "not decided"
    # The paper gives no size on the denoising loss, so there is none to be smaller than.
    assert judged("C1d", scores(repa=(10, 5), vanilla=(10.5, 5), spread=0.1))["verdict"] == "not decided"


def test_no_minimum_is_taken_over_noisy_rivals():
    # Three rivals that are equal to the arm on average: the best of them in each seed is ahead of it, none of them is.
    rng = np.random.default_rng(0)
    found = scores(seeds=40, **{arm: (5, 5) for arm in ("haste", *BY_ID["C12"].arms[:-1])})
    found["fid"] *= np.exp(0.05 * rng.standard_normal(len(found)))
    last = found[found["step"] == LAST].pivot(index="seed", columns="arm", values="fid")
    best = np.log(last.drop(columns="haste").min(axis=1)) - np.log(last["haste"])
    assert interval(list(best), 0.95).high < 0
    assert judged("C12", found)["verdict"] == "equivalent"


def test_several_contrasts_are_contradicted_at_a_divided_level():
    # One rival of four lies below zero at 95 %, not at 98.75 %.
    values = [[1.0, 1.1, 1.2]] * 3 + [[-0.15, -0.2, -0.25]]
    assert interval(values[-1], 0.95).high < 0
    assert interval(values[-1], 1 - 0.05 / 4).high > 0
    assert verdict(values, (0.0, math.inf), 0.95) == "not decided"
    assert verdict(values[-1:], (0.0, math.inf), 0.95) == "contradicted"


@pytest.mark.parametrize(("repa", "atta"), [(25, 26), (20, 10), (18, 8)])
def test_c7_does_not_hold_if_repa_does_not_help_or_helps_far_less(repa, atta):
    # Two equal losses are no gain: "speeds up about as much as REPA" needs a REPA that speeds up.
    row = judged("C7", scores(vanilla=(20, 5), repa=(repa, 5), atta=(atta, 5), spread=0.002))
    assert row["verdict"] == ("contradicted" if repa < 20 else "not decided")


def test_effects_are_what_they_say():
    found = scores(vanilla=(20, 8), repa=(10, 6), atta=(12, 7), holistic=(9, 5), haste=(9, 4))
    rows = {row["id"]: row for row in judge_all(CLAIMS, evidence(found), 0.95)}
    assert rows["C1"]["effect"] == pytest.approx(math.log(2))
    assert rows["C7"]["effect"] == pytest.approx(math.log(20 / 12) / math.log(2))
    assert rows["C9"]["effect"] == pytest.approx(math.log(10 / 9))
    assert rows["C11"]["effect"] == pytest.approx(math.log(5 / 4))
    assert "holistic minus haste" in rows["C11"]["unit"]
    assert rows["T14p"]["effect"] == pytest.approx(math.log(4 / 8))
    assert 1 < rows[f"C18@{LAST}"]["effect"] < 3
    early = judge(BY_ID["C1"], evidence(found, early=(EARLY, LAST)), 0.95)
    assert early["effect"] == pytest.approx((math.log(20 / 10) + math.log(8 / 6)) / 2)


def test_differences_are_paired_by_seed():
    # Seeds differ by a factor of a hundred, the arms of one seed by exactly two: no spread is left.
    found = scores(vanilla=(2, 1), repa=(1, 1))
    found["fid"] *= 10.0 ** found["seed"]
    row = judged("C1", found)
    assert (row["low"], row["high"]) == pytest.approx((math.log(2), math.log(2)))


@pytest.mark.parametrize("values", [[0.1, 0.5], [-3.0, 0.0, 0.2, 0.4]])
def test_interval_is_scipys_student_t_interval(values):
    mean, low, high = interval(values, 0.8)
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx(stats.t.interval(0.8, len(values) - 1, loc=mean, scale=stats.sem(values)))


def test_judging_uses_the_studys_confidence():
    found = scores(**supporting(BY_ID["C1"]), spread=0.3)
    # Only seeds that every arm has are counted.
    assert judged("C1", found[(found["arm"] != "repa") | (found["seed"] < 2)])["seeds"] == 2
    wide, narrow = (judged("C1", found, confidence) for confidence in (0.99, 0.5))
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]


@pytest.mark.parametrize(
    ("values", "region", "expected"),
    [
        ([0.1, 0.11], (0, math.inf), "supported"),
        ([-0.1, -0.11], (0, math.inf), "contradicted"),
        ([-0.1, 0.1], (0, math.inf), "not decided"),
        ([1.0, 1.01], (0.5, 1.5), "supported"),
        ([0.3, 0.31], (0.5, 1.5), "contradicted"),
        ([1.4, 1.5], (0.5, 1.5), "not decided"),
        ([math.nan, 0.1], (0, math.inf), "not decided"),
    ],
)
def test_verdict(values, region, expected):
    assert verdict([values], region, 0.95) == expected


# p values


@pytest.mark.parametrize("values", [[0.1, 0.5, 0.2], [-3.0, 0.0, 0.2]])
def test_p_is_scipys_one_sided_t_test(values):
    assert p_value(values, (0, math.inf)) == pytest.approx(stats.ttest_1samp(values, 0, alternative="greater").pvalue)
    assert p_value(values, (-math.inf, 0)) == pytest.approx(stats.ttest_1samp(values, 0, alternative="less").pvalue)
    two_sided = [stats.ttest_1samp(values, b, alternative=a).pvalue for b, a in ((-1, "greater"), (1, "less"))]
    assert p_value(values, (-1, 1)) == pytest.approx(max(two_sided))
    # Without spread the sign decides.
    assert (p_value([0.1, 0.1], (0, math.inf)), p_value([-0.1, -0.1], (0, math.inf))) == (0, 1)
    assert math.isnan(p_value([0.1], (0, math.inf)))


def test_holms_correction_by_hand():
    # 4 x 0.01, 3 x 0.02, then never less than before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []


def test_all_claims_of_a_table_are_corrected_together_and_have_its_columns():
    found = scores(**{arm: (20 - i, 9 - i) for i, arm in enumerate(ARMS)}, spread=0.1)
    rows = judge_all(CLAIMS, evidence(found), 0.95)
    known = [row for row in rows if math.isfinite(row["p"])]
    assert len(known) > 5
    p = [row["p"] for row in known]
    assert [row["p_holm"] for row in known] == pytest.approx(holm(p))
    assert [row["p_bh"] for row in known] == pytest.approx(stats.false_discovery_control(p))
    assert all(math.isnan(row["p_holm"]) for row in rows if row not in known)
    for judgement in (rows, judge_all(CLAIMS, evidence(scores()), 0.95)):
        # Claims across reports have a row where a study's roles name their arms.
        here = {i.rstrip("@") for i in BY_ID if not BY_ID[i].across}
        assert {row["id"].split("@")[0] for row in judgement} == here
        assert all(set(row) == set(COLUMNS) for row in judgement)


# Speed-up


def curve(vanilla, haste, last=1600):
    lines = [
        {"arm": arm, "seed": seed, "step": step, "fid": fid, "card": "a"}
        for arm, by_seed in (("vanilla", vanilla), ("haste", haste))
        for seed, by_step in by_seed.items()
        for step, fid in by_step.items()
    ]
    return Evidence(pd.DataFrame(lines), (1,), last)


@pytest.mark.parametrize(
    ("goal", "haste", "expected"),
    [
        # From 16 at step 100 to 1 at step 400: 4 is half way in log FID, so step sqrt(100 * 400) = 200.
        (4.0, {100: 16.0, 400: 1.0, 1600: 0.5}, 1600 / 200),
        # 8 is a quarter of the way: step 100 * 4^(1/4).
        (8.0, {100: 16.0, 400: 1.0, 1600: 0.5}, 16 / 4**0.25),
        # At a kept step; at the first of two crossings; never; vanilla itself; before the first kept step.
        (4.0, {100: 16.0, 400: 4.0, 1600: 3.0}, 4),
        (4.0, {100: 16.0, 400: 1.0, 800: 6.0, 1600: 2.0}, 8),
        (4.0, {100: 16.0, 400: 5.0, 1600: 4.1}, 1),
        (4.0, {1: 99.0, 1600: 4.0}, 1),
        (4.0, {100: 3.0, 400: 2.0, 1600: 1.0}, math.nan),
    ],
)
def test_speed_up_interpolates_log_fid_in_log_steps(goal, haste, expected):
    found = speed_up(curve({0: {1: 99.0, 1600: goal}}, {0: haste}), 0)
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_speed_up_that_is_not_known_decides_nothing():
    own, other = ({seed: {100: first, 400: 4.0} for seed in (0, 1)} for first in (16.0, 3.0))
    row = judge(BY_ID["C18@"], curve(own, other, 400), 0.95)
    assert (row["verdict"], row["seeds"]) == ("not decided", 2)
    assert math.isnan(row["p"])


def test_speed_ups_are_averaged_as_factors():
    vanilla = {seed: {EARLY: 20.0, LAST: 5.0} for seed in (0, 1)}
    found = curve(vanilla, {0: {375: 20.0, 750: 5.0, LAST: 4.0}, 1: {750: 9.0, LAST: 5.0}}, LAST)
    assert judge(BY_ID["C18@"], found, 0.95)["effect"] == pytest.approx(2)  # the geometric mean of 4 and 1


def test_the_speed_up_is_told_for_every_horizon():
    # At 400 haste has long been where vanilla gets to, at 1600 vanilla has caught up.
    own = {seed: {100: 16.0, 400: 8.0, 1600: 4.0} for seed in (0, 1)}
    other = {seed: {50: 16.0, 100: 8.0, 400: 4.1, 1600: 4.0} for seed in (0, 1)}
    rows = [r for r in judge_all(CLAIMS, replace(curve(own, other), early=(100,)), 0.95) if r["id"].startswith("C18")]
    assert {row["id"]: row["effect"] for row in rows} == pytest.approx({"C18@400": 4, "C18@1600": 1})


def test_scores_with_different_cards_are_not_compared():
    # A DiT is drawn by a sampler of its own: it may stand in the table, and in no claim beside the others.
    alone = scores(seeds=2, vanilla=(2, 1), repa=(1, 1))
    mixed = evidence(pd.concat([alone, scores(seeds=2, haste=(1, 1)).assign(card="b")]))
    assert judge(BY_ID["C1"], mixed, 0.95)["seeds"] == 2
    with pytest.raises(ValueError, match=r"different cards.*a, b"):
        judge(BY_ID["C18@"], mixed, 0.95)
    assert one_card(alone) == "a"


def test_sensitivity_reads_claims_on_fid_on_other_features_and_single_steps():
    found = scores(**{arm: (20 - i, 9 - i) for i, arm in enumerate(ARMS)}, spread=0.1)
    found["fd_pixel"] = 1.0
    table = pd.DataFrame(sensitivity(CLAIMS, evidence(found, early=(EARLY, LAST)), 0.95))
    assert set(table.columns) == set(SENSITIVITY)
    early = table[(table["id"] == "C1") & (table["measure"] == "fid")].set_index("early")["effect"]
    assert early[f"{EARLY}+{LAST}"] == pytest.approx((early[str(EARLY)] + early[str(LAST)]) / 2)
    assert set(table.loc[table["measure"] == "fd_pixel", "verdict"]) <= {"equivalent", "not decided"}
    assert set(table["id"]) >= {"C1", "C7", "C10", "C11"}


def test_gains_are_compared_across_reports_whose_scores_have_cards_of_their_own():
    places = {"high": "", "low": "other/"}
    roles = {f"{side}_resolution_{arm}": at + arm for side, at in places.items() for arm in ("vanilla", "haste")}
    here = scores(seeds=5, vanilla=(9, 8), haste=(8, 5), spread=0.02)
    there = scores(seeds=3, vanilla=(9, 6), haste=(8, 5)).assign(card="b")
    there["arm"] = "other/" + there["arm"]
    both = evidence(pd.concat([here, there]), roles)
    found = {row["id"]: row for row in judge_all(CLAIMS, both, 0.95)}
    for claim, measure in (("C20g", "fid"), ("C20gx", "fd_pixel"), ("C20gd", "near_data")):
        row = found[claim]
        assert (row["verdict"], row["seeds"], row["measure"]) == ("supported", 3, measure)
        assert row["effect"] == pytest.approx(math.log(8 / 5) - math.log(6 / 5) - 0.02)  # seeds 0 to 2 of 5
    assert found["C20"]["verdict"] == "supported"
    alone = {row["id"]: row for row in judge_all(CLAIMS, replace(both, scores=here), 0.95)}
    assert alone["C20g"]["verdict"] == "not tested"
    assert "other/vanilla" in alone["C20g"]["rule"]
    assert "run the study at the lower resolution first" in alone["C20g"]["rule"]
    assert not {"C20g", "C20gx", "C20gd"} & {row["id"] for row in judge_all(CLAIMS, evidence(here), 0.95)}
    mixed = replace(both, scores=pd.concat([here, there.assign(card=["b", "c"] * 6)]))
    with pytest.raises(ValueError, match=r"different cards.*b, c"):
        judge(BY_ID["C20g"], mixed, 0.95)


def test_arms_may_have_other_names_in_a_study():
    found = scores(repa=(10, 6), repa_1600=(10, 5), spread=0.02)
    row = judge(BY_ID["C2"], evidence(found, {"repa_midway": "repa_1600"}), 0.95)
    assert row["verdict"] == "supported"
    named = judge(BY_ID["C2"], evidence(found, {"repa_midway": "repa_800"}), 0.95)
    assert "arms missing: repa_800" in named["rule"]
    # The needs of arms that no study here has are named.
    assert "captions" in judged("C16", found)["rule"]


def test_arms_of_different_length_are_read_at_their_last_common_step_or_not_at_all():
    found = scores(**supporting(BY_ID["C13a"]))
    found = found[(found["arm"] != "haste_layers_fewer") | (found["step"] < LAST)]
    found.loc[(found["arm"] == "haste") & (found["step"] == EARLY), "fid"] = 4.0
    assert judged("C13a", found)["effect"] == pytest.approx(math.log(8 / 4))
    found = scores(**supporting(BY_ID["C10"]))
    row = judged("C10", found[(found["arm"] != "repa") | (found["step"] < LAST)])
    assert (row["verdict"], row["seeds"]) == ("not tested", 0)
    assert f"no score of repa at step {LAST}" in row["rule"]
    found = scores(**supporting(BY_ID["C17"]))
    with pytest.raises(HasteError, match="dit_vanilla, dit_haste share no scored step"):
        judged("C17", found[(found["arm"] == "dit_haste") == (found["step"] == LAST)])


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


def switches(fired, by_tau, trigger="gradient angle < -0.05"):
    """Tables of a sweep: the trigger's step by seed (NaN: never), and FID at the end by tau, the last being never."""
    taus, never = list(by_tau), max(by_tau)
    swept = pd.DataFrame(
        {"family": "holistic", "seed": s, "tau": tau, "fade": 0, "step": LAST, "fid": fid * math.exp(0.002 * s * i)}
        for s in range(len(fired))
        for i, (tau, fid) in enumerate(by_tau.items())
    )
    found = pd.DataFrame({"family": "holistic", "trigger": trigger, "seed": range(len(fired)), "tau": fired})
    at = [np.interp(never if math.isnan(t) else t, taus, list(by_tau.values())) for t in fired]
    nearest = found.assign(fid=at)
    return {"termination_sweep": swept, "termination_fired": found, "termination_nearest": nearest}


VANILLA = (0.4, 0.1)
ON_TABLES = [
    ("C4a", {"gradient_conflict": angles(0.1, -0.1)}, "supported", 0.2),
    ("C4a", {"gradient_conflict": angles(0.0, 0.1)}, "contradicted", -0.1),
    ("C4b", {"gradient_conflict": angles(0.1, -0.1)}, "supported", -0.099),
    ("C4b", {"gradient_conflict": angles(0.2, 0.1)}, "contradicted", 0.101),
    ("C5", {"gradient_conflict": angles(0.1, -0.1, mid=0.2)}, "supported", 0.2),
    ("C5", {"gradient_conflict": angles(0.1, -0.1, mid=-0.2)}, "contradicted", -0.2),
    ("C8a", {"cross_effects": effects(vanilla=VANILLA, repa=(0.35, 0.5), atta=(0.2, 0.3))}, "supported", 0.245),
    ("C8a", {"cross_effects": effects(vanilla=VANILLA, repa=(0.22, 0.5), atta=(0.2, 0.3))}, "contradicted", 0.895),
    ("C8b", {"cross_effects": effects(vanilla=VANILLA, atta=(0.2, 0.3))}, "supported", 0.2),
    ("C8b", {"cross_effects": effects(vanilla=VANILLA, atta=(0.2, 0.0))}, "contradicted", -0.1),
    # Better than staying on, and as good as the best switch.
    ("C14", switches([400, 400, 400], {200: 3.0, 400: 2.0, 800: 2.0, LAST: 3.0}), "supported", 0.05),
    # Near the best switch, since all are alike: no better than staying on.
    ("C14", switches([400, 400, 400], {200: 2.0, 400: 2.1, 800: 2.0, LAST: 2.0}), "contradicted", math.log(2 / 2.1)),
    # Better than staying on, far from the best.
    ("C14", switches([800, 800, 800], {200: 1.0, 400: 1.0, 800: 2.0, LAST: 3.0}), "contradicted", math.log(0.5) + 0.05),
]


@pytest.mark.parametrize(("claim", "tables", "expected", "effect"), ON_TABLES)
def test_a_claim_on_a_table(claim, tables, expected, effect):
    row = judge(BY_ID[claim], evidence(scores(), **tables), 0.95)
    assert row["verdict"] == expected
    assert row["effect"] == pytest.approx(effect, abs=1e-2)
    assert row["seeds"] == 3


@pytest.mark.parametrize("claim", [claim.id for claim in CLAIMS if claim.table])
def test_a_claim_without_its_table_or_its_arms_is_not_tested(claim):
    table = BY_ID[claim].table
    assert table in TABLES
    row = judge(BY_ID[claim], evidence(scores(**{arm: (2, 1) for arm in ARMS})), 0.95)
    assert (row["verdict"], row["seeds"]) == ("not tested", 0)
    assert f"table missing: {table}" in row["rule"]
    others = {table: pd.DataFrame({"arm": ["other"], "seed": [0]})}
    judged = judge(BY_ID[claim], evidence(scores(), **others), 0.95)
    assert f"arms missing in the table {table}: {BY_ID[claim].arms[0]}" in judged["rule"]


def test_a_trigger_that_never_fired_is_not_tested():
    # Near the best switch is what never switching is too where all end alike.
    tables = switches([math.nan] * 3, {200: 2.0, 400: 2.0, 800: 2.0, LAST: 2.0})
    row = judge(BY_ID["C14"], evidence(scores(), **tables), 0.95)
    assert row["verdict"] == "not tested"
    assert "fired for no seed" in row["rule"]
    other = switches([400] * 3, {200: 3.0, 400: 2.0, LAST: 3.0}, trigger="plateau")
    assert judge(BY_ID["C14"], evidence(scores(), **other), 0.95)["verdict"] == "not tested"
