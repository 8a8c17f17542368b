"""Phases and their triggers: live, saved and replayed."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.runs import Run
from haste_core.study.train import open_trainer, switch_of, trigger_of
from haste_core.termination import Angle, FixedIteration, Never, Plateau, Switch, make_trigger, replay


def phases(switch, steps):
    return [(switch.update(step), switch.phase)[::-1] for step in range(steps)]


@pytest.mark.parametrize(
    ("trigger", "expected", "switched_at"),
    [(FixedIteration(8), [(1, False)] * 8 + [(2, True)] + [(2, False)] * 3, 8),
     (FixedIteration(0), [(2, True)] + [(2, False)] * 11, 0),
     (Never(), [(1, False)] * 12, None),
     (None, [(2, False)] * 12, None)],  # a run without alignment
)  # fmt: skip
def test_steps_before_the_switch_are_aligned_and_it_fires_exactly_once(trigger, expected, switched_at):
    switch = Switch(trigger)
    assert phases(switch, 12) == expected
    assert switch.switched_at == switched_at


@pytest.mark.parametrize("saved_after", [3, 8, 11])
def test_phase_survives_saving_and_never_goes_back(saved_after):
    first, second = Switch(FixedIteration(8)), Switch(FixedIteration(8))
    phases(first, saved_after + 1)
    first.observe({"step": 2, "feature": 5.0, "denoising": 1.0})
    second.load_state_dict(first.state_dict())
    assert (second.phase, second.switched_at) == (first.phase, first.switched_at)
    assert second.log == ([] if saved_after >= 8 else [{"step": 2, "feature": 5.0}])  # only what triggers read
    if second.phase == 2:
        assert phases(second, 8) == [(2, False)] * 8


# Triggers


def lines(key, values, every=10):
    return [{"step": every * (i + 1), key: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("settings", "readings", "step"),
    [({}, [0.3, 0.0, -0.04, -0.06, 0.2], 40),
     ({"after": 20}, [-0.5, -0.5, -0.5], 30),
     ({"after": 30}, [-0.5, -0.5, -0.5], None),
     ({"patience": 2}, [-0.1, 0.1, -0.1, -0.1, -0.1], 40),
     ({"patience": 4}, [-0.1, 0.1, -0.1, -0.1, -0.1], None),
     # Averages: 0.2, 0.5 * 0.2 - 0.5 * 0.2 = 0, then -0.1, so only the third is below.
     ({"smoothing": 0.5}, [0.2, -0.2, -0.2], 30)],
)  # fmt: skip
def test_an_angle_fires_when_so_many_averaged_readings_in_a_row_are_below_its_threshold(settings, readings, step):
    angle = Angle("gradient_angle", **{"after": 0, "threshold": -0.05, "smoothing": 0.0, "patience": 1} | settings)
    log = [{"step": 5, "feature": 0.1}, *lines("gradient_angle", readings)]  # the first line has no reading
    assert replay(angle, log) == step


FALLING = [10.0 - i for i in range(8)]


@pytest.mark.parametrize(
    ("log", "step"),
    [(lines("feature", FALLING), None),
     # At step 90 the last two (3, 3) are 1.5 below the two before (5, 4), at step 100 (3, 3) only 0.5 below (4, 3):
     # less than a tenth of the 6.5 lost since the first two (10, 9).
     (lines("feature", [*FALLING, 3.0, 3.0, 3.0, 3.0]), 100),
     # The sum of both losses is flat: as soon as there are two windows.
     ([{"step": i, "feature": -float(i), "attention": float(i)} for i in range(1, 8)], 4)],
)  # fmt: skip
def test_a_plateau_fires_when_the_sum_of_losses_stops_falling(log, step):
    assert replay(Plateau(0, window=2, gain=0.1), log) == step


def test_replaying_a_fixed_iteration_gives_it_back_and_never_never_fires():
    log = lines("feature", [1.0, 1.0, 1.0])
    assert [replay(FixedIteration(at), log) for at in (0, 7, 10, 25)] == [0, 7, 10, 25]
    assert replay(Never(), lines("gradient_angle", [-1.0] * 5)) is None


def test_settings_and_arguments_name_the_trigger(make_study):
    def trigger(*settings):
        study = make_study(*(f"arms.holistic.termination.{s}" for s in settings))
        return trigger_of(study.run("holistic").termination)

    made = trigger("kind=online_angle", "threshold=0.1", "patience=3", "smoothing=0.5", "after=40")
    assert vars(made) == {"key": "online_angle", "after": 40, "threshold": 0.1, "patience": 3, "smoothing": 0.5}
    assert trigger("kind=gradient_angle").key == "gradient_angle"
    assert trigger("kind=plateau", "window=6").window == 6
    assert make_trigger("iteration", at=5).fires(5, [])
    with pytest.raises(HasteError, match="fade"):  # of an arm that never ends
        trigger("fade=3")
    with pytest.raises(HasteError, match=r"unknown trigger 'platau' .did you mean 'plateau'"):
        make_trigger("platau")
    with pytest.raises(HasteError, match="'iteration' without a step; expected at=STEP"):
        make_trigger("iteration")


# Fading


def test_fading_multiplies_alignment_down_to_nothing(make_study, output):
    study = make_study("arms.haste.termination.fade=4")
    switch, trainer = switch_of(study.run("haste")), open_trainer(Run(study, "haste", 0))
    assert study.donor("haste") == "holistic"  # what comes before is shared with the run that never ends
    weights = []
    for step in range(14):
        switch.update(step)
        weights.append(switch.weight(step) if switch.phase == 1 else 0.0)
        found = trainer.train_step()
        aligned = 0.5 * weights[-1] * (found["feature"] + found["attention"]) if switch.phase == 1 else 0
        assert_close(found["loss"], found["denoising"] + aligned)
    assert weights == [1.0] * 9 + [0.75, 0.5, 0.25] + [0.0] * 2
    assert (switch.fired_at, switch.switched_at) == (8, 12)
    assert config.load("digits").run("haste").lineage == config.load("digits").run("holistic").lineage
