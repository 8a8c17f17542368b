"""Sweeps over tau, replayed triggers, and arms against each other, on logs and scores whose answer is known."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from haste_core import figures
from haste_core.analysis import switching
from haste_core.errors import HasteError
from haste_core.files import write_text
from haste_core.study import config
from haste_core.study.runs import Run

TRIGGERS = {
    "fixed": config.TerminationSettings(kind="iteration", at=8),
    "exact": config.TerminationSettings(kind="gradient_angle", threshold=0, every=2),
    "online": config.TerminationSettings(kind="online_angle", threshold=0),
    "never": config.TerminationSettings(kind="online_angle", threshold=-0.9),
}
# FID at the end by the step of the switch: 8 is best, never (12) is worst.
TAILS = {"haste_4": (4, 6.0), "haste": (8, 5.0), "holistic": (12, 8.0)}


@pytest.fixture
def study(make_study):
    """A study with triggers and one more arm, since an override cannot name a new one."""
    made = make_study("arms.holistic.train={watch_angle: true}", "seeds=[0, 1]")
    early = {**made.arms["haste"], "termination": {"kind": "iteration", "at": 4}}
    return made.model_copy(update={"arms": {**made.arms, "haste_4": early}, "triggers": TRIGGERS})


def scores(card="a"):
    return pd.DataFrame(
        {"arm": arm, "seed": seed, "step": step, "fid": (8.0 if step <= tau else last) * 2**seed, "n": 50, "card": card}
        for arm, (tau, last) in TAILS.items()
        for seed in (0, 1)
        for step in (4, 8, 12)
    )


def log(run, angles, name="online_angle"):
    lines = [{"step": 2 * (i + 1), "attention": 1.0, "feature": -0.5, name: angle} for i, angle in enumerate(angles)]
    write_text(run.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(study, output):
    """Two always-on runs; the angle of the first becomes negative at step 6, that of the second never."""
    runs = [Run(study, "holistic", seed) for seed in (0, 1)]
    log(runs[0], [0.5, 0.2, -0.1, -0.2])
    log(runs[1], [0.5, 0.4, 0.3, 0.2])
    return runs


# -- the switch -------------------------------------------------------------------------------------------------------


def test_a_table_is_measured_again_when_what_it_depends_on_changes(study):
    card = switching.card(study)
    quiet = {**study.arms, "holistic": {"alignment": study.arms["holistic"]["alignment"]}}
    others = [study.model_copy(update=change) for change in ({"arms": quiet}, {"triggers": {}})]
    assert card["watched"] == ["holistic"]
    assert len({json.dumps(switching.card(s)) for s in (study, *others)}) == 3
    assert json.loads(json.dumps(card)) == card


def test_a_sweep_holds_the_scores_after_each_switch_of_arms_that_differ_in_nothing_else(study):
    assert switching.families(study) == {"holistic": ["holistic", "haste_4", "haste"]}
    swept = switching.sweep(study, scores())
    assert list(swept.columns) == switching.SWEEP
    haste = swept[(swept["arm"] == "haste") & (swept["seed"] == 1)]
    assert list(haste["step"]) == [8, 12]
    assert list(haste["log_ratio"]) == pytest.approx([0, math.log(5 / 8)])
    assert set(swept.loc[swept["arm"] == "holistic", "tau"]) == {12}
    assert swept.loc[swept["arm"] == "holistic", "log_ratio"].eq(0).all()
    mixed = pd.concat([scores()[lambda t: t["arm"] != "haste"], scores("b")[lambda t: t["arm"] == "haste"]])
    with pytest.raises(ValueError, match="different cards"):
        switching.sweep(study, mixed)


def test_triggers_fire_where_the_log_says_and_say_when_they_cannot_read(runs):
    found = switching.fired(TRIGGERS, runs).set_index(["trigger", "seed"])
    taus = found["tau"]
    assert (taus["fixed", 0], taus["online", 0]) == (8, 6)
    assert taus[[("online", 1), ("never", 0), ("exact", 0)]].isna().all()
    assert found.loc[("online", 1), "readings"] == 4
    assert found["readings"]["exact"].eq(0).all()


def test_a_log_that_begins_late_is_not_taken_for_a_trigger_that_fires_late(study, runs):
    log(runs[0], [None, None, -0.1, -0.2])
    found, swept = switching.fired(TRIGGERS, runs[:1]), switching.sweep(study, scores())
    assert list(found.set_index("trigger").loc[["online", "never", "fixed"], "gaps"]) == [2, 2, 0]
    regret = switching.nearest(swept, found).set_index("trigger")["regret"]
    assert regret[["online", "never", "exact"]].isna().all()
    assert regret["fixed"] == 0
    labels = figures.fid_over_tau(swept, found, "holistic").axes[0].get_yticklabels()
    assert labels[2].get_text() == "online (log with gaps)"


def test_readings_count_from_where_a_trigger_looks(runs):
    log(runs[0], [None, 0.1, None, 0.1], "gradient_angle")
    settings = ({"every": 4}, {"every": 2}, {"every": 2, "after": 6})
    triggers = {str(i): config.TerminationSettings(kind="gradient_angle", **given) for i, given in enumerate(settings)}
    assert list(switching.fired(triggers, runs[:1])["gaps"]) == [0, 2, 0]


def test_regret_is_the_distance_of_a_trigger_from_the_best_switch(study, runs):
    near = switching.nearest(switching.sweep(study, scores()), switching.fired(TRIGGERS, runs))
    assert set(near["best_tau"]) == {8}
    assert near["regret_never"].to_numpy() == pytest.approx(math.log(8 / 5))
    row = near.set_index(["trigger", "seed"])
    assert (row.loc[("fixed", 0), "regret"], row.loc[("fixed", 1), "steps_away"]) == (0, 0)
    # 6 lies between 4 and 8: linear in log tau.
    share = math.log(6 / 4) / math.log(2)
    assert row.loc[("online", 0), "regret"] == pytest.approx((1 - share) * math.log(6 / 5))
    # A trigger that never fired counts as never switching; one without readings is not judged.
    assert row.loc[("online", 1), "regret"] == pytest.approx(math.log(8 / 5))
    assert math.isnan(row.loc[("exact", 0), "regret"])
    ranked = switching.ranking(near, 0.95)
    assert list(ranked["trigger"]) == ["fixed", "online", "never"]
    assert list(ranked["fired"]) == [2, 1, 0]
    two = switching.sweep(study, scores()[lambda t: t["arm"] != "haste_4"])
    near = switching.nearest(two, switching.fired(TRIGGERS, runs))
    assert (len(near), len(switching.ranking(near, 0.95))) == (0, 0)


def test_triggers_are_replayed_over_main_arms_and_over_those_that_others_branch_from(study):
    arms = {run.arm for run in switching.always_on(config.load("digits", "full"))}
    assert {"holistic", "repa", "atta", "strong_holistic"} <= arms
    assert not arms & {"haste", "strong_800", "vanilla"}
    alone = study.model_copy(update={"arms": {"vanilla": study.arms["vanilla"]}, "groups": {}})
    with pytest.raises(HasteError, match="no arm that stays aligned"):
        switching.always_on(alone)


def test_pictures_of_a_sweep(study, runs):
    swept, found = switching.sweep(study, scores()), switching.fired(TRIGGERS, runs)
    near = switching.nearest(swept, found)
    labels = figures.fid_over_tau(swept, found, "holistic").axes[0].get_yticklabels()
    said = [label.get_text() for label in labels]
    assert said == ["fixed (2 of 2)", "exact (nothing to read)", "online (1 of 2)", "never (0 of 2)"]
    assert len(figures.sweep_over_steps(swept, "holistic").axes[0].get_legend().get_texts()) == 2
    panels = [axis.get_title() for axis in figures.trigger_logs(switching.logs(runs), TRIGGERS, "holistic").axes]
    assert panels == ["online estimate of the angle", "alignment loss"]
    ticks = figures.regret_by_trigger(near, switching.ranking(near, 0.95), "holistic").axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == ["fixed", "online", "never", "never switching"]


# -- arms against each other ------------------------------------------------------------------------------------------

FLAT = {"vanilla": (8, 6, 4), "repa": (4, 4, 4), "atta": (4, 3, 2), "holistic": (2, 3, 8), "haste": (2, 2, 2)}


@pytest.fixture
def grouped(make_study):
    return make_study("groups={weights: [haste, holistic], early: [repa, atta], main: [vanilla, repa, haste]}")


def curves(values, seeds=(0, 1, 2), spread=0.0, card="a"):
    """Rows of fid.csv from {arm: FID at each step}; seeds differ by a factor that all arms share, and by `spread`."""
    return pd.DataFrame(
        {"arm": arm, "seed": seed, "step": step, "fid": fid * 10.0**seed * math.exp(spread * seed * i), "n": 50,
         "near_data": 1 + fid / 100, "card": card}
        for i, (arm, fids) in enumerate(values.items())
        for seed in seeds
        for step, fid in zip((4, 8, 12), fids, strict=False)
    )  # fmt: skip


def test_gains_are_paired_by_seed_and_read_at_the_last_common_step(grouped, make_study):
    table = curves(FLAT)
    shorter = table[(table["arm"] != "holistic") | (table["step"] < 12)]
    for given, step, gain in ((table, 12, math.log(2 / 8)), (shorter, 8, math.log(2 / 3))):
        rows = switching.paired(grouped, given, ["weights"])
        assert set(zip(rows["step"], rows["reference"], strict=True)) == {(step, "haste")}
        assert list(rows.loc[rows["arm"] == "holistic", "gain"]) == pytest.approx([gain] * 3)
        assert list(rows.loc[rows["arm"] == "haste", "gain"]) == [0, 0, 0]
    rows = switching.paired(grouped, table, ["early"], 4, "vanilla")  # a reference outside of the group
    assert dict(rows.groupby("arm")["gain"].mean()) == pytest.approx({"repa": math.log(2), "atta": math.log(2)})
    plain = make_study()
    assert list(dict.fromkeys(switching.paired(plain, table, ["main"])["arm"])) == list(plain.arms)


def test_effects_are_means_with_intervals_and_a_geometric_mean(grouped):
    means = switching.effects(switching.paired(grouped, curves(FLAT, spread=0.1), ["weights"]), 0.95).set_index("arm")
    assert means.loc["holistic", "low"] < means.loc["holistic", "gain"] < means.loc["holistic", "high"] < 0
    assert means.loc["holistic", "fid"] == pytest.approx(8 * 10 * math.exp(0.1 * 3))
    assert means.loc["haste", "seeds"] == 3
    alone = curves(FLAT, seeds=(0,))
    assert switching.effects(switching.paired(grouped, alone, ["weights"]), 0.95)["low"].eq(-math.inf).all()
    assert set(switching.late(grouped, alone, ["repa"])["verdict"]) == {"open"}


def test_scores_that_cannot_be_compared_are_refused(grouped):
    mixed = pd.concat([curves({"haste": FLAT["haste"]}), curves({"holistic": FLAT["holistic"]}, card="b")])
    with pytest.raises(ValueError, match="different cards"):
        switching.paired(grouped, mixed, ["weights"])
    apart = pd.concat([curves({"haste": (1, 1, 1)}).query("step == 12"), curves({"holistic": (1, 1)})])
    for table, group, message in (
        (curves(FLAT), "weight", r"unknown group 'weight'.*weights"),
        (curves({"haste": (1, 1, 1)}), "weights", "no scores of arms holistic"),
        (apart, "weights", "share no scored step"),
    ):
        with pytest.raises(HasteError, match=message):
            switching.paired(grouped, table, [group])


def test_late_harm_begins_where_it_was_put(grouped):
    late = switching.late(grouped, curves(FLAT, spread=0.01), ["vanilla", "repa", "atta", "holistic"])
    assert set(late["arm"]) == {"repa", "atta", "holistic"}  # vanilla has no baseline but itself
    gains = late.set_index(["measure", "arm", "step"])["gain"]
    assert gains["near_data", "repa", 4] == pytest.approx(math.log(1.08 / 1.04))
    late = late[late["measure"] == "fid"]
    verdicts = late.set_index(["arm", "step"])["verdict"]
    assert list(verdicts["holistic"]) == ["helps", "helps", "hurts"]
    assert list(verdicts["atta"]) == ["helps"] * 3
    found = switching.boundary(late).set_index("arm")
    assert found.loc["holistic", ["no_help_from", "hurts_from", "last"]].tolist() == [12, 12, 12]
    assert found.loc["atta", ["no_help_from", "hurts_from"]].isna().all()
    assert found.loc["repa", "verdict"] == "open"


def test_pictures_have_a_row_for_every_arm_and_a_panel_for_every_group(grouped):
    rows = switching.paired(grouped, curves(FLAT, spread=0.1), ["weights", "early"])
    means = switching.effects(rows, 0.95)
    labels = [[tick.get_text() for tick in a.get_yticklabels()] for a in figures.group_effects(rows, means).axes]
    assert [[text.split()[0] for text in panel] for panel in labels] == [["haste", "holistic"], ["repa", "atta"]]
    alone = figures.group_effects(rows, means, "early")
    assert [axis.get_title(loc="left").split(":")[0] for axis in alone.axes] == ["early"]
    late = switching.late(grouped, curves(FLAT), ["repa", "holistic"])
    titles = [axis.get_title(loc="left") for axis in figures.gain_by_setting(late).axes]
    assert titles == ["repa, against vanilla", "holistic, against vanilla"]


def test_the_plane_holds_each_arm_against_plain_training_and_staying_on(make_study):
    both = "alignment: {lambda_feature: 2, lambda_attention: 2}"
    study = make_study(
        f"arms={{vanilla: {{}}, strong: {{{both}}}, early: {{{both}, termination: {{kind: iteration, at: 8}}}}}}"
    )
    table = curves({"vanilla": (9, 9, 4), "strong": (9, 9, 5), "early": (9, 9, 2)}, spread=0.001)
    plane = switching.plane(study, table, ["strong", "early"]).set_index(["arm", "measure", "against"])
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
