"""Measured step times: which states are timed, that phase II does the arithmetic of a vanilla step, and the ratios."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from haste_core.errors import HasteError
from haste_core.study import cost
from haste_core.study.runs import study_dir
from haste_core.training import Trainer

ARMS = ("vanilla", "repa", "atta", "holistic", "haste")


def step_flops(state):
    with FlopCounterMode(display=False) as counter:
        state.train_step()
    return counter.get_total_flops()


def without(study, *arms):
    return study.model_copy(update={"arms": {arm: v for arm, v in study.arms.items() if arm not in arms}})


@pytest.fixture
def states(output, tiny):
    return cost.states(tiny)


def test_states_cover_every_arm_and_phase_and_equal_work_is_shared(states):
    assert set(states) == {("vanilla", 2), *((arm, 1) for arm in ARMS[1:]), ("haste", 2)}
    assert states["haste", 1] is states["holistic", 1]
    assert len({id(state) for state in states.values()}) == len(states) - 1


def test_an_arm_that_watches_the_angle_or_has_a_teacher_of_its_own_has_a_state_of_its_own(output, make_study):
    wider = "{img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 48, depth: 4, num_heads: 4}"
    study = make_study(f"arms.repa.teacher.kwargs={wider}", "arms.holistic.train.watch_angle=true")
    found = cost.states(without(study, "atta"))
    assert (found["haste", 1].haste.angle is None, found["holistic", 1].haste.angle is None) == (True, False)
    assert [found[arm, 1].haste.teacher.width for arm in ("repa", "haste")] == [48, 24]


def test_a_phase_two_step_went_through_the_switch_and_does_exactly_the_arithmetic_of_a_vanilla_step(states, tiny):
    state = states["haste", 2]
    assert (state.switch.phase, state.switch.switched_at) == (2, tiny.run("haste").tau)
    assert state.haste is None
    assert getattr(state.optimizer, "optimizer", state.optimizer).state, "no step was taken after the switch"
    # The guard that does not depend on a clock: floating point operations of a whole step, teacher and all.
    for each in (states["vanilla", 2], state):
        assert set(each.train_step()) == {"loss", "denoising", "grad_norm"}
    vanilla = step_flops(states["vanilla", 2])
    assert vanilla > 1e6
    assert step_flops(state) == vanilla
    for arm in ARMS[1:]:
        assert step_flops(states[arm, 1]) > 1.05 * vanilla


def test_measuring_gives_a_row_per_arm_and_phase_and_times_shared_states_once(output, tiny, monkeypatch):
    stepped, train_step = [], Trainer.train_step
    study = without(tiny, "repa", "atta")
    states = cost.states(study)
    monkeypatch.setattr(cost, "states", lambda _: states)
    monkeypatch.setattr(Trainer, "train_step", lambda state: stepped.append(id(state)) or train_step(state))
    rows = cost.write(study, rounds=3)
    assert (study_dir(study) / "step_time.json").is_file()
    assert [(row["arm"], row["phase"]) for row in rows] == [("vanilla", 2), ("holistic", 1), ("haste", 1), ("haste", 2)]
    assert rows[1] | {"arm": "haste"} == rows[2]
    for row in rows:
        assert tuple(row) == cost.COLUMNS
        assert row["median_step_s"] > 0
        assert row["ratio_low"] <= row["ratio_to_vanilla"] <= row["ratio_high"]
        assert row["rounds"] == 3
    assert (rows[0]["ratio_low"], rows[0]["ratio_to_vanilla"], rows[0]["ratio_high"]) == (1, 1, 1)
    # Two steps a round, and two rounds warm up.
    assert {key: stepped.count(id(state)) for key, state in states.items()} == dict.fromkeys(states, 2 * 5)


def test_ratios_are_taken_within_a_round_and_timing_stops_when_its_time_is_up(monkeypatch):
    # A clock that runs ten times slower in each later round changes no ratio.
    now, count, seconds = [0.0], {"vanilla": 0, "aligned": 0}, {"vanilla": 1.0, "aligned": 3.0}

    def step(key):
        now[0] += seconds[key] * 10 ** count[key]
        count[key] += 1

    monkeypatch.setattr(cost, "_now", lambda _: now[0])
    actions = {key: lambda key=key: step(key) for key in seconds}
    found = cost.interleaved(actions, "vanilla", rounds=4)
    assert found["aligned"][1:] == pytest.approx((3, 3, 3, 4))
    assert len(cost.timed(actions, 20, seconds=0)["vanilla"]) == 3


def test_watching_the_angle_is_a_ratio_to_the_same_step_without_it(tiny):
    without, watched = cost.watching(tiny, "holistic", rounds=3, steps=1).to_dict("records")
    assert (bool(without["watched"]), bool(watched["watched"])) == (False, True)
    assert without["ratio"] == without["ratio_low"] == without["ratio_high"] == 1
    assert 0.3 < watched["ratio"] < 5
    assert watched["ratio_low"] <= watched["ratio"] <= watched["ratio_high"]
    with pytest.raises(HasteError, match="'vanilla' is never aligned"):
        cost.watching(tiny, "vanilla")
