from __future__ import annotations

import pytest

from haste_core.termination import Termination


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
