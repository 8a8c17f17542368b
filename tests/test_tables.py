"""Stored tables of analyses, and the protocol by which they look at a run."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from haste_core.analysis import probe, tables
from haste_core.errors import HasteError
from haste_core.study.evaluation import generator_at
from haste_core.study.runs import Run
from haste_core.study.train import fit, open_trainer
from haste_core.taps import Taps, tapped


@pytest.fixture(scope="module")
def run(trained):
    return trained("vanilla", "train.keep=[4]", "train.steps=8", "analysis.n=20")


def counting(calls):
    def measure(run):
        calls.append(run.arm)
        return pd.DataFrame({"step": [4, 8], "value": [0.5, 1 / 3]})

    return measure


def test_a_table_names_its_origin_and_is_measured_once_for_the_same_settings(run, tmp_path):
    calls = []
    for settings in ({"what": "halves"}, {"what": "thirds"}, {"what": "thirds"}):
        found = tables.obtain(tmp_path, "values", counting(calls), [run], settings)
    assert len(calls) == 2
    assert list(found.columns) == ["arm", "seed", "step", "value"]
    assert found["value"].tolist() == [0.5, 0.333333]
    facts = json.loads((tmp_path / "values.json").read_text())
    assert facts["runs"]["vanilla seed 0"] == {"hash": run.config.hash, "steps": [4, 8]}
    assert (facts["card"]["what"], facts["card"]["analysis"]["n"]) == ("thirds", 20)
    assert len(facts["commit"]) >= 7


def test_what_was_measured_of_a_run_outlives_an_interrupt_and_serves_further_tables(run, tmp_path):
    other, calls = Run(run.study, "vanilla", 2), []
    fit(other, progress=False)

    def interrupted(of):
        if of.seed == 2:
            raise KeyboardInterrupt
        return counting(calls)(of)

    with pytest.raises(KeyboardInterrupt):
        tables.obtain(tmp_path, "kept", interrupted, [run, other])
    assert len(calls) == 1
    both = tables.obtain(tmp_path, "kept", counting(calls), [run, other])
    assert len(calls) == 2
    alone = tables.obtain(tmp_path, "kept", counting(calls), [other])
    assert len(calls) == 2
    assert both["seed"].tolist() == [0, 0, 2, 2]
    assert alone.equals(both[both["seed"] == 2].reset_index(drop=True))


def test_without_runs_the_table_that_is_there_is_read(run, tmp_path, capsys):
    elsewhere = Run(run.study, "vanilla", 1)
    with pytest.raises(HasteError, match="vanilla seed 1; train them with: haste study digits"):
        tables.obtain(tmp_path, "values", counting([]), [elsewhere])
    before = tables.obtain(tmp_path, "values", counting([]), [run])
    after = tables.obtain(tmp_path, "values", counting([]), [elsewhere])
    assert after.equals(before)
    assert "not on this machine" in capsys.readouterr().out


def test_a_table_from_scores_is_made_again_when_the_scores_are_others(tiny):
    scores = pd.DataFrame({"arm": ["vanilla", "haste"], "seed": 0, "step": 8, "fid": [3.0, 2.0]})
    card = tables.scores_card(tiny, scores)
    assert card == tables.scores_card(tiny, scores.assign(fid=[3.0, 2.0000001]))  # as read back from a table
    assert card["evaluation"] == tiny.evaluation_hash
    for other in (scores.assign(fid=[3.0, 2.1]), scores.assign(step=4), scores.head(1)):
        assert tables.scores_card(tiny, other) != card


def test_students_are_averaged_networks_and_at_step_zero_the_one_before_training(run):
    fresh = Run(run.study, "vanilla", 3)
    for step, expected in ((0, open_trainer(fresh).ema), (8, generator_at(run, 8)[0])):
        found = probe.student_at(run if step else fresh, step).state_dict()
        assert all(value.equal(expected.state_dict()[name]) for name, value in found.items())


def test_outputs_are_those_of_the_network_on_noised_images(run, monkeypatch):
    model, x = probe.student_at(run, 8), probe.held_out(run).x
    assert len(x) == 20
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    t = torch.full((20,), 0.3)
    expected = tapped(model, 0.7 * x + 0.3 * eps, t, torch.full((20,), 10), Taps((1, 3), (0,)))
    monkeypatch.setattr(probe, "BATCH", 7)
    found = probe.student_output(model, x, 0.3, Taps((1, 3), (0,)), seed=5)
    torch.testing.assert_close((found.output, found.tokens, found.qk), (expected.output, expected.tokens, expected.qk))
    means = probe.patch_means(model, x, 0.3, (1, 3), seed=5)
    torch.testing.assert_close(means, {depth: tokens.mean(1) for depth, tokens in expected.tokens.items()})
    (low, _), (high, _) = (probe.noised(model, x, t, seed=1) for t in (0.25, 0.75))
    torch.testing.assert_close((low - 0.75 * x) / 0.25, (high - 0.25 * x) / 0.75)
