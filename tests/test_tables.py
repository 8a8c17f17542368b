from __future__ import annotations

import pandas as pd
import pytest

from haste_core.analysis import tables
from haste_core.errors import HasteError
from haste_core.study.runs import Run
from haste_core.study.train import fit


@pytest.fixture
def run(output, make_study):
    return Run(make_study("train.keep=[4]", "train.steps=8"), "vanilla", 0)


def counting(calls):
    def measure(run):
        calls.append(run.arm)
        return pd.DataFrame({"step": [4, 8], "value": [0.5, 1 / 3]})

    return measure


def test_a_table_says_whose_rows_it_holds_and_where_they_come_from(run, output):
    fit(run, progress=False)
    found = tables.obtain(output, "values", counting([]), [run], {"what": "thirds"}, progress=False)
    assert list(found.columns) == ["arm", "seed", "step", "value"]
    assert found["value"].tolist() == [0.5, 0.333333]
    facts = tables.read_facts(output, "values")
    assert facts["runs"]["vanilla seed 0"] == {"hash": run.config.hash, "steps": [4, 8]}
    assert facts["card"]["what"] == "thirds"
    assert facts["card"]["analysis"]["n"] == run.study.analysis.n
    assert len(facts["commit"]) >= 7


def test_a_table_is_measured_once_for_the_same_settings(run, output):
    fit(run, progress=False)
    calls = []
    for settings in ({"n": 1}, {"n": 1}, {"n": 2}):
        tables.obtain(output, "values", counting(calls), [run], settings, progress=False)
    assert len(calls) == 2


def test_without_runs_the_table_that_is_there_is_read(run, output, make_study, capsys):
    fit(run, progress=False)
    before = tables.obtain(output, "values", counting([]), [run], progress=False)
    elsewhere = Run(make_study("train.keep=[4]", "train.steps=8"), "vanilla", 1)
    after = tables.obtain(output, "values", counting([]), [elsewhere], progress=False)
    assert after.equals(before)
    assert "not on this machine" in capsys.readouterr().out


def test_without_runs_and_table_the_error_names_the_command(run, output):
    with pytest.raises(HasteError, match="vanilla seed 0; possible: haste study digits"):
        tables.obtain(output, "values", counting([]), [run], progress=False)


def test_a_table_from_scores_is_made_again_when_the_scores_are_others(make_study):
    study = make_study()
    scores = pd.DataFrame({"arm": ["vanilla", "haste"], "seed": 0, "step": 8, "fid": [3.0, 2.0]})
    card = tables.scores_card(study, scores)
    assert card == tables.scores_card(study, scores.assign(fid=[3.0, 2.0000001]))  # as read back from a table
    assert card["evaluation"] == study.evaluation_hash
    for other in (scores.assign(fid=[3.0, 2.1]), scores.assign(step=4), scores.head(1)):
        assert tables.scores_card(study, other) != card
