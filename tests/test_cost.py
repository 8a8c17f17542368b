from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from haste_core import training
from haste_core.errors import HasteError
from haste_core.study import cost
from haste_core.study.runs import study_dir

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


def test_states_cover_every_arm_and_phase(states):
    assert set(states) == {("vanilla", 2), *((arm, 1) for arm in ARMS[1:]), ("haste", 2)}


def test_arms_that_are_one_run_until_the_switch_share_their_state_of_phase_one(states):
    assert states["haste", 1] is states["holistic", 1]
    assert len({id(state) for state in states.values()}) == len(states) - 1


def test_an_arm_that_watches_the_angle_has_a_state_of_its_own(output, make_study):
    found = cost.states(without(make_study("arms.holistic.train.watch_angle=true"), "repa", "atta"))
    assert found["haste", 1] is not found["holistic", 1]
    assert (found["haste", 1].angle is None, found["holistic", 1].angle is None) == (True, False)


@pytest.mark.parametrize("arm", ARMS[1:])
def test_phase_one_states_are_aligned(states, arm):
    state = states[arm, 1]
    assert state.termination.phase == 1
    assert state.alignment is not None
    assert (state.alignment_optimizer is None) == (arm == "atta")


def test_phase_two_state_went_through_the_switch(states, tiny):
    state = states["haste", 2]
    assert state.termination.phase == 2
    assert state.termination.switched_at == tiny.run("haste").tau
    assert state.alignment is None
    assert state.alignment_optimizer is None


def test_phase_two_state_trained_in_phase_one_before(states):
    state = states["haste", 2]
    inner = getattr(state.optimizer, "optimizer", state.optimizer)
    assert inner.state, "no optimizer step was taken, so this is no state after a switch"
    assert not states["vanilla", 2].optimizer.state


def test_a_phase_two_step_stays_in_phase_two(states):
    state = states["haste", 2]
    for _ in range(3):
        assert set(state.train_step()) == {"loss", "denoising", "grad_norm"}
    assert state.alignment is None


def test_a_phase_two_step_does_exactly_the_arithmetic_of_a_vanilla_step(states):
    # The guard that does not depend on a clock: floating point operations of a whole step, teacher and all.
    for state in (states["vanilla", 2], states["haste", 2]):
        state.train_step()
    vanilla = step_flops(states["vanilla", 2])
    assert vanilla > 1e6
    assert step_flops(states["haste", 2]) == vanilla


@pytest.mark.parametrize("arm", ARMS[1:])
def test_a_phase_one_step_does_more_than_a_vanilla_step(states, arm):
    assert step_flops(states[arm, 1]) > 1.05 * step_flops(states["vanilla", 2])


def test_measuring_gives_a_row_per_arm_and_phase(output, tiny):
    study = without(tiny, "repa", "atta", "holistic")
    rows = cost.measure(study, rounds=3, steps=1)
    assert [(row["arm"], row["phase"]) for row in rows] == [("vanilla", 2), ("haste", 1), ("haste", 2)]
    for row in rows:
        assert tuple(row) == cost.COLUMNS
        assert row["median_step_s"] > 0
        assert row["ratio_low"] <= row["ratio_to_vanilla"] <= row["ratio_high"]
        assert row["rounds"] == 3
    vanilla = rows[0]
    assert (vanilla["ratio_low"], vanilla["ratio_to_vanilla"], vanilla["ratio_high"]) == (1, 1, 1)


def test_what_arms_share_is_timed_once_and_every_arm_has_its_row(output, tiny, monkeypatch):
    stepped = []
    train_step = training.train_step
    study = without(tiny, "repa", "atta")
    states = cost.states(study)
    monkeypatch.setattr(cost, "states", lambda _: states)
    monkeypatch.setattr(training, "train_step", lambda state: stepped.append(id(state)) or state.train_step())
    rows = cost.measure(study, rounds=3, steps=1)
    assert [(row["arm"], row["phase"]) for row in rows] == [("vanilla", 2), ("holistic", 1), ("haste", 1), ("haste", 2)]
    assert rows[1] | {"arm": "haste"} == rows[2]
    # Two rounds warm up.
    assert {key: stepped.count(id(state)) for key, state in states.items()} == dict.fromkeys(states, 5)


def test_ratios_are_taken_within_a_round(output, tiny, monkeypatch):
    # A clock that runs ten times slower in each later round changes no ratio.
    study, now = without(tiny, "repa", "atta", "holistic"), [0.0]
    seconds = {("vanilla", 2): 1.0, ("haste", 1): 3.0, ("haste", 2): 1.0}
    states = cost.states(study)
    keys = {id(state): key for key, state in states.items()}
    count = dict.fromkeys(keys.values(), 0)

    def step(state):
        key = keys[id(state)]
        now[0] += seconds[key] * 10 ** count[key]
        count[key] += 1

    monkeypatch.setattr(cost, "states", lambda _: states)
    monkeypatch.setattr(cost, "_now", lambda _: now[0])
    monkeypatch.setattr(training, "train_step", step)
    rows = cost.measure(study, rounds=4, steps=1)
    assert [row["ratio_to_vanilla"] for row in rows] == pytest.approx([1, 3, 1])
    assert [row["ratio_low"] for row in rows] == pytest.approx([1, 3, 1])


def test_writing_keeps_the_rows_with_the_runs(output, tiny):
    study = without(tiny, "repa", "atta", "holistic", "haste")
    rows = cost.write(study, rounds=2)
    assert (study_dir(study) / "step_time.json").is_file()
    assert [row["arm"] for row in rows] == ["vanilla"]


def test_an_arm_with_a_teacher_of_its_own_is_aligned_with_that_teacher(output, make_study):
    wider = "{img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 48, depth: 4, num_heads: 4}"
    study = without(make_study(f"arms.repa.teacher.kwargs={wider}"), "atta", "holistic")
    found = cost.states(study)
    assert study.run("repa").teacher.kwargs["embed_dim"] == 48
    assert found["repa", 1].alignment.teacher.width == 48
    assert found["haste", 1].alignment.teacher.width == 24


def test_what_watching_the_angle_adds_is_a_ratio_to_the_same_step_without_it(tiny):
    without, watched = cost.watching(tiny, "holistic", rounds=3, steps=1).to_dict("records")
    assert (bool(without["watched"]), bool(watched["watched"])) == (False, True)
    assert without["ratio"] == without["ratio_low"] == without["ratio_high"] == 1
    assert 0.3 < watched["ratio"] < 5
    assert watched["ratio_low"] <= watched["ratio"] <= watched["ratio_high"]
    assert watched["rounds"] == 3


def test_a_run_without_alignment_has_no_angle_to_watch(tiny):
    with pytest.raises(HasteError, match="'vanilla' is never aligned"):
        cost.watching(tiny, "vanilla")
