"""Sweeps over tau and replayed triggers on logs and scores whose answer is known."""

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

# FID at the end by the step of the switch: 8 is best, never (12) is worst.
TAILS = {"haste_4": 6.0, "haste": 5.0, "holistic": 8.0}


@pytest.fixture
def study(make_study):
    return make_study(
        "arms.holistic.train={watch_angle: true}", "seeds=[0, 1]",
        triggers={
            "fixed": {"kind": "iteration", "at": 8},
            "exact": {"kind": "gradient_angle", "threshold": 0, "every": 2},
            "online": {"kind": "online_angle", "threshold": 0},
            "never": {"kind": "online_angle", "threshold": -0.9},
        },
        arms={"haste_4": {"termination": {"kind": "iteration", "at": 4}}},
    )  # fmt: skip


@pytest.fixture
def make_study(make_study):
    """Studies with arms and triggers added, since an override cannot name a new one."""
    base = make_study

    def make(*overrides, triggers=None, arms=None):
        made = base(*overrides)
        added = {name: {**made.arms["haste"], **arm} for name, arm in (arms or {}).items()}
        named = {name: config.Termination(**trigger) for name, trigger in (triggers or {}).items()}
        return made.model_copy(update={"arms": made.arms | added, "triggers": named})

    return make


def scores(card="a"):
    rows = []
    for arm, last in TAILS.items():
        tau = {"haste_4": 4, "haste": 8, "holistic": 12}[arm]
        for seed in (0, 1):
            rows += [
                {"arm": arm, "seed": seed, "step": step, "fid": (8.0 if step <= tau else last) * 2**seed, "n": 50,
                 "card": card}
                for step in (4, 8, 12)
            ]  # fmt: skip
    return pd.DataFrame(rows)


def log(run, angles):
    lines = [
        {"step": 2 * (i + 1), "attention": 1.0, "feature": -0.5, "online_angle": angle}
        for i, angle in enumerate(angles)
    ]
    write_text(run.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_is_measured_again_when_what_it_depends_on_changes(study):
    card = switching.card(study)
    quiet = study.model_copy(
        update={"arms": {**study.arms, "holistic": {"alignment": study.arms["holistic"]["alignment"]}}}
    )
    fewer = study.model_copy(update={"triggers": {}})
    assert card["watched"] == ["holistic"]
    assert len({json.dumps(switching.card(s)) for s in (study, quiet, fewer)}) == 3
    assert json.loads(json.dumps(card)) == card


def test_families_are_arms_that_differ_in_their_switch_alone(study):
    assert switching.families(study) == {"holistic": ["holistic", "haste_4", "haste"]}


def test_a_sweep_holds_what_comes_after_each_switch(study):
    swept = switching.sweep(study, scores())
    assert list(swept.columns) == switching.SWEEP
    haste = swept[(swept["arm"] == "haste") & (swept["seed"] == 1)]
    assert list(haste["step"]) == [8, 12]
    assert list(haste["log_ratio"]) == pytest.approx([0, math.log(5 / 8)])
    assert set(swept.loc[swept["arm"] == "holistic", "tau"]) == {12}
    assert swept.loc[swept["arm"] == "holistic", "log_ratio"].eq(0).all()


def test_a_sweep_over_two_cards_is_none(study):
    mixed = pd.concat([scores()[lambda t: t["arm"] != "haste"], scores("b")[lambda t: t["arm"] == "haste"]])
    with pytest.raises(ValueError, match="different cards"):
        switching.sweep(study, mixed)


def test_triggers_fire_where_the_log_says_and_say_when_they_cannot_read(study, output):
    runs = [Run(study, "holistic", seed) for seed in (0, 1)]
    log(runs[0], [0.5, 0.2, -0.1, -0.2])
    log(runs[1], [0.5, 0.4, 0.3, 0.2])
    found = switching.fired(study.triggers, runs).set_index(["trigger", "seed"])
    assert found.loc[("fixed", 0), "tau"] == 8
    assert found.loc[("online", 0), "tau"] == 6
    assert math.isnan(found.loc[("online", 1), "tau"])
    assert found.loc[("online", 1), "readings"] == 4
    assert math.isnan(found.loc[("never", 0), "tau"])
    assert found["readings"]["exact"].eq(0).all()


def test_a_log_that_begins_late_is_not_taken_for_a_trigger_that_fires_late(study, output):
    run = Run(study, "holistic", 0)
    log(run, [None, None, -0.1, -0.2])
    found = switching.fired(study.triggers, [run])
    row = found.set_index("trigger")
    assert list(row.loc[["online", "never", "fixed"], "gaps"]) == [2, 2, 0]
    near = switching.nearest(switching.sweep(study, scores()), found).set_index("trigger")
    assert near.loc[["online", "never", "exact"], "regret"].isna().all()
    assert near.loc["fixed", "regret"] == 0
    labels = figures.fid_over_tau(switching.sweep(study, scores()), found, "holistic").axes[0].get_yticklabels()
    assert labels[2].get_text() == "online (log with gaps)"


def test_readings_count_from_where_a_trigger_looks(study, output):
    run = Run(study, "holistic", 0)
    lines = [{"step": 2 * (i + 1), "gradient_angle": 0.1 if i % 2 else None} for i in range(4)]
    write_text(run.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))
    triggers = {
        "every 4": config.Termination(kind="gradient_angle", every=4),
        "every 2": config.Termination(kind="gradient_angle", every=2),
        "late": config.Termination(kind="gradient_angle", every=2, after=6),
    }
    found = switching.fired(triggers, [run]).set_index("trigger")
    assert list(found["gaps"]) == [0, 2, 0]


def test_regret_is_what_a_trigger_loses_to_the_best_switch(study, output):
    runs = [Run(study, "holistic", seed) for seed in (0, 1)]
    log(runs[0], [0.5, 0.2, -0.1, -0.2])
    log(runs[1], [0.5, 0.4, 0.3, 0.2])
    near = switching.nearest(switching.sweep(study, scores()), switching.fired(study.triggers, runs))
    row = near.set_index(["trigger", "seed"])
    assert set(near["best_tau"]) == {8}
    assert near["regret_never"].to_numpy() == pytest.approx(math.log(8 / 5))
    assert row.loc[("fixed", 0), "regret"] == 0
    assert row.loc[("fixed", 1), "steps_away"] == 0
    # 6 lies between 4 and 8: linear in log tau.
    share = math.log(6 / 4) / math.log(2)
    assert row.loc[("online", 0), "regret"] == pytest.approx((1 - share) * math.log(6 / 5))
    # A trigger that never fires pays what never switching costs; one that cannot read is judged on nothing.
    assert row.loc[("online", 1), "regret"] == pytest.approx(math.log(8 / 5))
    assert math.isnan(row.loc[("exact", 0), "regret"])
    ranked = switching.ranking(near, 0.95)
    assert list(ranked["trigger"]) == ["fixed", "online", "never"]
    assert list(ranked["fired"]) == [2, 1, 0]


def test_two_switches_are_no_sweep(study, output):
    run = Run(study, "holistic", 0)
    log(run, [0.5, -0.1])
    swept = switching.sweep(study, scores()[lambda t: t["arm"] != "haste_4"])
    assert len(switching.nearest(swept, switching.fired(study.triggers, [run]))) == 0
    assert len(switching.ranking(switching.nearest(swept, switching.fired(study.triggers, [run])), 0.95)) == 0


def test_triggers_are_replayed_over_main_arms_and_over_those_that_others_branch_from():
    full = config.load("digits", "full")
    arms = {run.arm for run in switching.always_on(full)}
    assert {"holistic", "repa", "atta", "strong_holistic"} <= arms
    assert not arms & {"haste", "strong_800", "vanilla"}


def test_a_study_without_an_always_on_arm_is_told_so(study):
    alone = study.model_copy(update={"arms": {"vanilla": study.arms["vanilla"]}, "groups": {}})
    with pytest.raises(HasteError, match="no arm that stays aligned"):
        switching.always_on(alone)


def test_pictures_of_a_sweep(study, output):
    runs = [Run(study, "holistic", seed) for seed in (0, 1)]
    for run in runs:
        log(run, [0.5, 0.2, -0.1, -0.2])
    swept, found = switching.sweep(study, scores()), switching.fired(study.triggers, runs)
    near = switching.nearest(swept, found)
    labels = figures.fid_over_tau(swept, found, "holistic").axes[0].get_yticklabels()
    said = [label.get_text() for label in labels]
    assert said == ["fixed (2 of 2)", "exact (nothing to read)", "online (2 of 2)", "never (0 of 2)"]
    assert len(figures.sweep_over_steps(swept, "holistic").axes[0].get_legend().get_texts()) == 2
    panels = [axis.get_title() for axis in figures.trigger_logs(switching.logs(runs), study.triggers, "holistic").axes]
    assert panels == ["online estimate of the angle", "alignment loss"]
    ticks = figures.regret_by_trigger(near, switching.ranking(near, 0.95), "holistic").axes[0].get_yticklabels()
    assert [tick.get_text() for tick in ticks] == ["fixed", "online", "never", "never switching"]
    with pytest.raises(HasteError, match=r"'repa'.*holistic"):
        figures.fid_over_tau(swept, found, "repa")
