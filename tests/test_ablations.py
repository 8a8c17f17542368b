"""Arms against each other on scores whose answer is known."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from haste_core import figures
from haste_core.analysis import ablations
from haste_core.errors import HasteError

STEPS = (4, 8, 12)


@pytest.fixture
def study(make_study):
    return make_study("groups={weights: [haste, holistic], early: [repa, atta], main: [vanilla, repa, haste]}")


def scores(curves, seeds=(0, 1, 2), spread=0.0, card="a"):
    """Rows of fid.csv from {arm: FID at each step}; seeds differ by a factor that all arms share, and by `spread`."""
    return pd.DataFrame(
        {"arm": arm, "seed": seed, "step": step, "fid": fid * 10.0**seed * math.exp(spread * seed * i), "n": 50,
         "near_data": 1 + fid / 100, "card": card}
        for i, (arm, values) in enumerate(curves.items())
        for seed in seeds
        for step, fid in zip(STEPS, values, strict=False)
    )  # fmt: skip


FLAT = {"vanilla": (8, 6, 4), "repa": (4, 4, 4), "atta": (4, 3, 2), "holistic": (2, 3, 8), "haste": (2, 2, 2)}


def test_gains_are_paired_by_seed_and_read_at_the_last_common_step(study):
    rows = ablations.paired(study, scores(FLAT), "weights")
    assert set(rows["step"]) == {12}
    assert set(rows["reference"]) == {"haste"}
    assert list(rows.loc[rows["arm"] == "holistic", "gain"]) == pytest.approx([math.log(2 / 8)] * 3)
    assert list(rows.loc[rows["arm"] == "haste", "gain"]) == [0, 0, 0]


def test_a_shorter_arm_moves_the_step_it_is_read_at(study):
    table = scores(FLAT)
    table = table[(table["arm"] != "holistic") | (table["step"] < 12)]
    rows = ablations.paired(study, table, "weights")
    assert set(rows["step"]) == {8}
    assert rows.loc[rows["arm"] == "holistic", "gain"].mean() == pytest.approx(math.log(2 / 3))


def test_step_and_reference_can_be_chosen_and_the_reference_lie_outside_of_the_group(study):
    rows = ablations.paired(study, scores(FLAT), "early", 4, "vanilla")
    assert dict(rows.groupby("arm")["gain"].mean()) == pytest.approx({"repa": math.log(2), "atta": math.log(2)})


def test_main_is_a_group_of_every_study(make_study):
    rows = ablations.paired(make_study(), scores(FLAT), "main")
    assert list(dict.fromkeys(rows["arm"])) == list(make_study().arms)


def test_effects_are_means_with_intervals_and_a_geometric_mean(study):
    rows = ablations.paired(study, scores(FLAT, spread=0.1), "weights")
    means = ablations.effects(rows, 0.95).set_index("arm")
    assert means.loc["holistic", "low"] < means.loc["holistic", "gain"] < means.loc["holistic", "high"] < 0
    assert means.loc["holistic", "fid"] == pytest.approx(8 * 10 * math.exp(0.1 * 3))
    assert means.loc["haste", "seeds"] == 3


def test_one_seed_leaves_everything_open(study):
    means = ablations.effects(ablations.paired(study, scores(FLAT, seeds=(0,)), "weights"), 0.95)
    assert means["low"].eq(-math.inf).all()
    late = ablations.late(study, scores(FLAT, seeds=(0,)), ["repa"])
    assert set(late["verdict"]) == {"open"}


def test_scores_under_different_cards_are_not_compared(study):
    mixed = pd.concat([scores({"haste": FLAT["haste"]}), scores({"holistic": FLAT["holistic"]}, card="b")])
    with pytest.raises(ValueError, match="different cards"):
        ablations.paired(study, mixed, "weights")


def test_what_is_missing_is_named(study):
    with pytest.raises(HasteError, match=r"unknown group 'weight'.*weights"):
        ablations.paired(study, scores(FLAT), "weight")
    with pytest.raises(HasteError, match="no scores of arms holistic"):
        ablations.paired(study, scores({"haste": (1, 1, 1)}), "weights")
    table = pd.concat([scores({"haste": (1, 1, 1)}).query("step == 12"), scores({"holistic": (1, 1)})])
    with pytest.raises(HasteError, match="share no scored step"):
        ablations.paired(study, table, "weights")


def test_late_harm_begins_where_it_was_put(study):
    late = ablations.late(study, scores(FLAT, spread=0.01), ["vanilla", "repa", "atta", "holistic"])
    assert set(late["arm"]) == {"repa", "atta", "holistic"}  # vanilla has no baseline but itself
    near = late[late["measure"] == "near_data"]
    assert near.loc[(near["arm"] == "repa") & (near["step"] == 4), "gain"].iloc[0] == pytest.approx(
        math.log(1.08 / 1.04)
    )
    late = late[late["measure"] == "fid"]
    verdicts = late.set_index(["arm", "step"])["verdict"]
    assert list(verdicts["holistic"]) == ["helps", "helps", "hurts"]
    assert list(verdicts["atta"]) == ["helps"] * 3
    found = ablations.boundary(late).set_index("arm")
    assert found.loc["holistic", ["no_help_from", "hurts_from", "last"]].tolist() == [12, 12, 12]
    assert math.isnan(found.loc["atta", "no_help_from"])
    assert math.isnan(found.loc["atta", "hurts_from"])
    assert found.loc["repa", "verdict"] == "open"


def test_pictures_have_a_row_for_every_arm_and_a_panel_for_every_group(study):
    rows = ablations.all_paired(study, scores(FLAT, spread=0.1), ["weights", "early"])
    figure = figures.group_effects(rows, ablations.effects(rows, 0.95))
    labels = [[tick.get_text() for tick in axis.get_yticklabels()] for axis in figure.axes]
    assert [[text.split()[0] for text in panel] for panel in labels] == [["haste", "holistic"], ["repa", "atta"]]
    alone = figures.group_effects(rows, ablations.effects(rows, 0.95), "early")
    assert [axis.get_title(loc="left").split(":")[0] for axis in alone.axes] == ["early"]
    late = ablations.late(study, scores(FLAT), ["repa", "holistic"])
    titles = [axis.get_title(loc="left") for axis in figures.gain_by_setting(late).axes]
    assert titles == ["repa, against vanilla", "holistic, against vanilla"]


def test_the_plane_holds_each_arm_against_plain_training_and_staying_on(make_study):
    both = "alignment: {lambda_feature: 2, lambda_attention: 2}"
    study = make_study(
        f"arms={{vanilla: {{}}, strong: {{{both}}}, early: {{{both}, termination: {{kind: iteration, at: 8}}}}}}"
    )
    table = scores({"vanilla": (9, 9, 4), "strong": (9, 9, 5), "early": (9, 9, 2)}, spread=0.001)
    plane = ablations.plane(study, table, ["strong", "early"]).set_index(["arm", "measure", "against"])
    assert plane.loc[("strong", "fid", "plain training"), "ratio"] == pytest.approx(5 / 4, rel=0.01)
    assert plane.loc[("early", "fid", "staying on"), "ratio"] == pytest.approx(2 / 5, rel=0.01)
    assert plane.loc[("early", "near_data", "plain training"), "ratio"] == pytest.approx(1.02 / 1.04)
    assert ("strong", "fid", "staying on") not in plane.index
    assert plane.loc[("early", "fid", "staying on"), ["weight", "tau"]].tolist() == [2, 8]
    assert plane["tau"].eq(math.inf).sum() == 2
    figure = figures.weight_and_switch(plane.reset_index())
    texts = {text.get_text(): text.get_fontweight() for axis in figure.axes for text in axis.texts}
    ratio = plane.loc[("early", "fid", "staying on"), "ratio"]
    assert texts[f"{100 * (ratio - 1):+.1f} %"] == "bold"
    assert figure.axes[0].get_xticklabels()[-1].get_text() == "never"
