from __future__ import annotations

import pytest
import torch

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.train import fit
from haste_core.termination import Angle, FixedIteration, Never, Plateau, Termination, build_trigger, replay
from haste_core.training import train_step


def phases(termination, steps):
    seen = []
    for step in range(steps):
        fired = termination.update(step)
        seen.append((termination.phase, fired))
    return seen


def test_steps_before_the_switch_are_aligned_and_it_fires_exactly_once(tiny):
    termination = Termination(tiny.run("haste"))
    assert phases(termination, 12) == [(1, False)] * 8 + [(2, True)] + [(2, False)] * 3
    assert termination.switched_at == 8


def test_without_a_trigger_alignment_stays_on(tiny):
    termination = Termination(tiny.run("holistic"))
    assert phases(termination, 12) == [(1, False)] * 12
    assert termination.switched_at is None


def test_a_run_without_alignment_is_in_phase_two_throughout(tiny):
    termination = Termination(tiny.run("vanilla"))
    assert phases(termination, 3) == [(2, False)] * 3
    assert termination.switched_at is None


def test_a_switch_at_zero_aligns_no_step(make_study):
    termination = Termination(make_study("arms.haste.termination.at=0").run("haste"))
    assert phases(termination, 2) == [(2, True), (2, False)]


@pytest.mark.parametrize("saved_after", [3, 8, 11])
def test_phase_survives_saving_and_never_goes_back(tiny, saved_after):
    first = Termination(tiny.run("haste"))
    phases(first, saved_after + 1)
    second = Termination(tiny.run("haste"))
    second.load_state_dict(first.state_dict())
    assert (second.phase, second.switched_at) == (first.phase, first.switched_at)
    if second.phase == 2:
        assert phases(second, 8) == [(2, False)] * 8


# Triggers


def lines(key, values, every=10):
    return [{"step": every * (i + 1), key: value} for i, value in enumerate(values)]


def angle(after=0, threshold=-0.05, smoothing=0.0, patience=1):
    return Angle("gradient_angle", after, threshold, smoothing, patience)


def test_the_angle_fires_at_the_first_reading_below_its_threshold():
    log = lines("gradient_angle", [0.3, 0.0, -0.04, -0.06, 0.2])
    assert replay(angle(), log) == 40


def test_the_angle_passes_over_early_readings_and_lines_without_one():
    log = [{"step": 5, "feature": 0.1}, *lines("gradient_angle", [-0.5, -0.5, -0.5])]
    assert replay(angle(after=20), log) == 30
    assert replay(angle(after=30), log) is None


def test_patience_asks_for_readings_in_a_row():
    log = lines("gradient_angle", [-0.1, 0.1, -0.1, -0.1, -0.1])
    assert replay(angle(patience=2), log) == 40
    assert replay(angle(patience=4), log) is None


def test_smoothing_is_an_exponential_average_from_the_first_reading():
    # Averages: 0.2, 0.5 * 0.2 - 0.5 * 0.2 = 0, then -0.1, so only the third is below.
    log = lines("gradient_angle", [0.2, -0.2, -0.2])
    assert replay(angle(smoothing=0.5), log) == 30


def test_a_plateau_fires_when_the_loss_stops_falling():
    falling = [10.0 - i for i in range(8)]
    assert replay(Plateau(0, window=2, gain=0.1), lines("feature", falling)) is None
    flat = [*falling, 3.0, 3.0, 3.0, 3.0]
    # At step 90 the last two (3, 3) are 1.5 below the two before (5, 4), at step 100 (3, 3) only 0.5 below (4, 3):
    # less than a tenth of the 6.5 lost since the first two (10, 9).
    assert replay(Plateau(0, window=2, gain=0.1), lines("feature", flat)) == 100


def test_a_plateau_counts_both_losses_together():
    log = [{"step": i, "feature": -float(i), "attention": float(i)} for i in range(1, 8)]
    assert replay(Plateau(0, window=2, gain=0.1), log) == 4  # their sum is flat: as soon as there are two windows


@pytest.mark.parametrize("at", [0, 7, 10, 25])
def test_replaying_a_fixed_iteration_gives_it_back(at):
    assert replay(FixedIteration(at), lines("feature", [1.0, 1.0, 1.0])) == at


def test_never_never_fires():
    assert replay(Never(), lines("gradient_angle", [-1.0] * 5)) is None


def test_settings_name_the_trigger(make_study):
    def trigger(*settings):
        return build_trigger(
            make_study(*(f"arms.holistic.termination.{s}" for s in settings)).run("holistic").termination
        )

    made = trigger("kind=online_angle", "threshold=0.1", "patience=3", "smoothing=0.5", "after=40")
    assert (made.key, made.after, made.threshold, made.smoothing, made.patience) == ("online_angle", 40, 0.1, 0.5, 3)
    assert trigger("kind=gradient_angle").key == "gradient_angle"
    assert trigger("kind=plateau", "window=6").window == 6
    with pytest.raises(HasteError, match="fade"):
        trigger("fade=3")


def test_a_plateau_ends_phase_one_of_a_run_where_its_replay_says(output, make_study):
    # Whatever the loss does, losing less than all of it is a plateau, so it fires as soon as there are lines enough.
    ending = ["kind=plateau", "window=1", "gain=1.0"]
    study = make_study(*(f"arms.haste.termination.{s}" for s in ["at=null", *ending]))
    switching, always_on = Run(study, "haste", 0), Run(study, "holistic", 0)
    for run in (switching, always_on):
        fit(run, progress=False)
    expected = replay(build_trigger(switching.config.termination), always_on.metrics())
    assert [line["step"] for line in switching.metrics() if line["phase"] == 1][-1] == expected
    assert switching.load(12, ("none",))[1]["termination"]["switched_at"] == expected


def test_a_trigger_goes_on_from_what_it_saw_before_a_stop(make_study):
    run = make_study("arms.haste.termination.at=null", "arms.haste.termination.kind=plateau").run("haste")
    first, second = Termination(run), Termination(run)
    for line in lines("feature", [5.0, 4.0, 3.0]):
        first.observe(line | {"denoising": 1.0})
    second.load_state_dict(first.state_dict())
    assert second.log == lines("feature", [5.0, 4.0, 3.0])


# Fading


def test_fading_multiplies_alignment_down_to_nothing(make_study):
    termination = Termination(make_study("arms.haste.termination.fade=4").run("haste"))
    weights = []
    for step in range(14):
        termination.update(step)
        weights.append(termination.weight(step) if termination.phase == 1 else 0.0)
    assert weights == [1.0] * 9 + [0.75, 0.5, 0.25] + [0.0] * 2
    assert (termination.fired_at, termination.switched_at) == (8, 12)


def test_a_faded_step_minimises_the_faded_sum(make_study, output):
    from haste_core.study.train import create

    study = make_study("arms.haste.termination.fade=4")
    run = study.run("haste")
    state = create(run, 0, find_teacher(study, run.teacher), Termination(run))
    state.step = 10
    state.termination.fired_at = 8
    measured = train_step(state)
    parts = 0.5 * measured["feature"] + 0.5 * measured["attention"]
    torch.testing.assert_close(measured["loss"], measured["denoising"] + 0.5 * parts)


def test_a_fading_run_shares_what_comes_before_with_the_one_that_never_ends(make_study):
    study = make_study("arms.haste.termination.fade=4")
    assert study.donor("haste") == "holistic"
    assert config.load("digits").run("haste").lineage == config.load("digits").run("holistic").lineage
