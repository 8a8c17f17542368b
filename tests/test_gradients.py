"""Gradient conflict of checkpoints: exact, online, and its pictures."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from haste_core import figures
from haste_core.analysis import gradients
from haste_core.analysis.probe import noised
from haste_core.errors import HasteError
from haste_core.gradient_angle import LOSSES, gradient_cosine, noise
from haste_core.study.runs import Run

FEW = ["analysis.n=20", "analysis.resamples=50"]


def test_conflict_of_a_run_with_the_feature_loss_in_phase_one_alone(trained):
    run = trained("haste", *FEW, "analysis.timesteps=[0.1, 0.5]")  # switches at step 8
    table = gradients.conflict(run, chunks=4)
    assert list(table.columns) == gradients.COLUMNS
    found = table.groupby("step")["loss"].agg(lambda losses: sorted(set(losses))).to_dict()
    assert found == {4: sorted(LOSSES), 8: sorted(LOSSES), 12: ["attention"]}
    assert len(table) == 2 * (3 + 3 + 1)  # noise levels
    assert set(zip(table["block"], table["n"], table["chunks"], strict=True)) == {(1, 20, 4)}
    assert table["rho"].abs().between(1e-6, 1).all()
    assert (table["low"] < table["high"]).all()
    assert set(gradients.online_conflict(run)["step"]) == {4, 8}
    # The training weights, not their average; the true labels; the noise every analysis sees.
    now = gradients.moment(run, 8, gradients.find_teacher(run.study, run.config.teacher))
    weights = run.load(8)[0]
    assert all(v.equal(weights[f"model.{n}"]) for n, v in now.model.state_dict().items())
    batch = gradients.held_out(run)
    exact = gradient_cosine(*now, batch, 0.5, 1, chunks=4, seed=run.study.analysis.seed)
    row = table[(table["step"] == 8) & (table["t"] == 0.5)].set_index("loss")["rho"]
    assert {k: float(p.rho()) for k, p in exact.items()} == row.to_dict()
    x_t, _ = noised(now.model, batch.x, 0.5, 0)
    torch.testing.assert_close(2 * x_t - batch.x, noise(batch.x, 0))


def test_an_arm_without_alignment_is_asked_about_attention(trained):
    run = trained("vanilla", *FEW, "train.keep=[]", "train.steps=4", "analysis.timesteps=[0.5]")
    assert set(gradients.conflict(run, chunks=2)["loss"]) == {"attention"}
    assert gradients.online_conflict(run).empty


def test_a_block_above_all_that_is_aligned_is_refused(output, make_study):
    run = Run(make_study("analysis.block=3"), "repa", 0)
    with pytest.raises(HasteError, match=r"analysis.block .*'3'.*expected one of: 0, 1, 2"):
        gradients.conflict(run)


@pytest.fixture
def tables():
    keys = product(("repa", "holistic"), (0, 1), (4, 8, 12), (0.1, 0.5), ("feature", "attention"))
    exact = pd.DataFrame(keys, columns=["arm", "seed", "step", "t", "loss"]).assign(block=1, n=20)
    exact["rho"] = np.random.default_rng(0).uniform(-1, 1, len(exact))
    exact = exact.assign(low=exact["rho"] - 0.1, high=exact["rho"] + 0.1)
    return exact, exact.drop(columns=["block", "n", "rho"]).assign(online=2 * exact["rho"] - 1, n=20)


def test_pictures_of_conflict(tables):
    exact, online = tables
    figure = figures.conflict_over_training(exact, 8, "repa")
    assert [axis.get_title() for axis in figure.axes] == ["feature loss", "attention loss"]
    part = exact.query("arm == 'repa' and loss == 'feature' and t == 0.1").groupby("step")["rho"].mean()
    np.testing.assert_allclose(figure.axes[0].containers[0].lines[0].get_xydata(), part.reset_index())
    for figure, labels in (
        (figures.conflict_over_t(exact, "holistic", "attention"), ["step 4", "step 8", "step 12"]),
        (figures.conflict_by_arm(exact, None, "feature", 0.5), ["repa", "holistic"]),
    ):
        assert [container.get_label() for container in figure.axes[0].containers] == labels
    figure = figures.online_against_exact(exact, online.sample(frac=1, random_state=0))
    assert all("r = 1.00, ranks 1.00, 24 points" in axis.get_title() for axis in figure.axes)
    with pytest.raises(HasteError, match=r"unknown arm .*'haste'.*expected one of: repa, holistic"):
        figures.conflict_over_training(exact, None, "haste")
