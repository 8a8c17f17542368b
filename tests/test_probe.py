from __future__ import annotations

import pytest
import torch

from haste_core.analysis import probe
from haste_core.study.evaluation import generator_at
from haste_core.study.runs import Run
from haste_core.study.train import fit, open_trainer
from haste_core.taps import Taps


@pytest.fixture
def run(output, make_study):
    run = Run(make_study("train.keep=[]", "train.steps=8", "analysis.n=20"), "vanilla", 0)
    fit(run, progress=False)
    return run


def test_step_zero_is_the_network_before_training(output, make_study):
    fresh = Run(make_study(), "vanilla", 3)
    begun = open_trainer(fresh).ema.state_dict()
    assert all(value.equal(begun[name]) for name, value in probe.student_at(fresh, 0).state_dict().items())


def test_a_later_step_is_its_averaged_network(run):
    expected = generator_at(run, 8)[0].state_dict()
    assert all(value.equal(expected[name]) for name, value in probe.student_at(run, 8).state_dict().items())


def test_what_is_seen_is_what_the_network_hands_out(run, monkeypatch):
    model, x = probe.student_at(run, 8), probe.held_out(run).x
    assert len(x) == 20
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    t = torch.full((20,), 0.3)
    expected = model(0.7 * x + 0.3 * eps, t, torch.full((20,), 10), Taps((1, 3), (0,)))
    monkeypatch.setattr(probe, "BATCH", 7)
    found = probe.look(model, x, 0.3, Taps((1, 3), (0,)), seed=5)
    torch.testing.assert_close(found.output, expected.output)
    for depth in (1, 3):
        torch.testing.assert_close(found.tokens[depth], expected.tokens[depth])
    torch.testing.assert_close(found.qk[0], expected.qk[0])


def test_the_noise_is_the_same_at_every_level(run):
    model, x = probe.student_at(run, 8), probe.held_out(run).x
    (low, _), (high, _) = (probe.noised(model, x, t, seed=1) for t in (0.25, 0.75))
    torch.testing.assert_close((low - 0.75 * x) / 0.25, (high - 0.25 * x) / 0.75)


def test_everything_is_every_block(run):
    model = probe.student_at(run, 8)
    assert probe.everything(model) == Taps((1, 2, 3), (0, 1, 2))
