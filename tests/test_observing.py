"""Angles a run logs: that they are those of the analyses, change nothing, and end phase I where their log says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from haste_core.analysis.cosine import gradient_cosine
from haste_core.errors import HasteError
from haste_core.observing import block_of, exact
from haste_core.state import create
from haste_core.study.data.base import Digits
from haste_core.study.runs import Run
from haste_core.termination import Termination, build_trigger, replay
from haste_core.training import find_teacher, fit, train_step


def trained(study, arm):
    run = Run(study, arm, 0)
    fit(run, progress=False)
    return run


def test_watching_changes_no_number_and_logs_a_cosine_per_loss_and_bin(output, make_study):
    plain, watched = make_study(), make_study("train.watch_angle=true", "name=watched")
    assert plain.run("holistic").hash == watched.run("holistic").hash
    one, other = trained(plain, "holistic"), trained(watched, "holistic")
    weights = [run.load(12, ("model.", "alignment."))[0] for run in (one, other)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    for line, same in zip(other.metrics(), one.metrics(), strict=True):
        assert line["loss"] == same["loss"]
        assert set(line["online"]) == {"feature", "attention"}
        cosines = [c for bins in line["online"].values() for c in bins if c is not None]
        assert all(-1 <= c <= 1 for c in cosines)
        assert line["online_angle"] == pytest.approx(np.mean(cosines))
        assert "online" not in same


def test_nothing_is_watched_in_phase_two(output, make_study):
    run = trained(make_study("train.watch_angle=true"), "haste")
    assert ["online" in line for line in run.metrics()] == [True] * 4 + [False] * 2


def test_an_estimate_goes_on_after_a_stop_as_if_there_was_none(output, make_study):
    settings = ["train.watch_angle=true", "train.log_every=4", "train.checkpoint_every=3"]
    whole = trained(make_study(*settings, "name=whole"), "holistic")
    trained(make_study(*settings, "name=cut", "train.steps=6", "train.keep=[]"), "holistic")
    cut = trained(make_study(*settings, "name=cut"), "holistic")
    assert [line["online"] for line in cut.metrics()][1:] == [line["online"] for line in whole.metrics()][1:]


def test_the_exact_angle_is_the_mean_over_losses_and_noise_levels(output, make_study):
    end = [f"arms.holistic.termination.{s}" for s in ("kind=gradient_angle", "timesteps=[0.2, 0.7]", "n=10", "every=2")]
    study = make_study(*end)
    run = study.run("holistic")
    state = create(run, 0, find_teacher(study, run.teacher), Termination(run))
    for _ in range(3):
        train_step(state)
    batch = state.batches.dataset.examples("validation", 10)
    found = [
        gradient_cosine(state.model, state.alignment, state.objective, batch, t, 1)[loss].rho()
        for t in (0.2, 0.7)
        for loss in ("feature", "attention")
    ]
    assert exact(state) == pytest.approx(np.mean(found))
    assert block_of(run) == 1  # aligned after block 2 counted from 1
    assert all(p.grad is None for p in state.model.parameters())


def test_no_trigger_reads_test_images(output, make_study, monkeypatch):
    read, images = set(), Digits.images

    def without_test(self, split, count=None):
        assert split != "test", "the test split was read"
        read.add(split)
        return images(self, split, count)

    monkeypatch.setattr(Digits, "images", without_test)
    settings = ["kind=gradient_angle", "at=null", "threshold=1", "after=2", "every=2", "n=10"]
    run = trained(make_study("train.watch_angle=true", *(f"arms.haste.termination.{s}" for s in settings)), "haste")
    assert [line["step"] for line in run.metrics() if "gradient_angle" in line] == [4]
    assert "validation" in read


@pytest.mark.parametrize("kind", ["gradient_angle", "online_angle"])
def test_an_angle_ends_phase_one_where_its_replay_says(kind, output, make_study):
    # Every cosine is below a threshold of 1, so the second reading after step 2 ends it.
    settings = [f"kind={kind}", "at=null", "threshold=1", "patience=2", "after=2", "every=2", "n=10"]
    run = trained(make_study(*(f"arms.haste.termination.{s}" for s in settings)), "haste")
    lines = run.metrics()
    assert [line["phase"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert [line["step"] for line in lines if kind in line] == ([2, 4, 6] if kind == "online_angle" else [4, 6])
    assert replay(build_trigger(run.config.termination), lines) == 6
    assert run.load(12, ("none",))[1]["termination"]["switched_at"] == 6


def test_checks_come_at_logged_steps(make_study):
    with pytest.raises(HasteError, match=r"termination\.every 3 is no multiple of train\.log_every 2"):
        make_study("arms.holistic.termination={kind: gradient_angle, every: 3}")
    with pytest.raises(HasteError, match=r"termination\.block 7; possible: 0 to 2"):
        make_study("arms.holistic.termination={kind: gradient_angle, every: 2, block: 7}")


def test_the_angle_does_not_need_the_global_random_state(output, make_study):
    run = trained(make_study("train.watch_angle=true"), "holistic")
    first = run.metrics()
    torch.manual_seed(999)
    other = trained(make_study("train.watch_angle=true", "name=again"), "holistic")
    assert [line["online"] for line in other.metrics()] == [line["online"] for line in first]
