from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from haste_core import figures
from haste_core.analysis import gradients
from haste_core.analysis.probe import noised
from haste_core.errors import HasteError
from haste_core.gradient_angle import CHUNKS, gradient_cosine, noise
from haste_core.study.runs import Run
from haste_core.study.train import fit

# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(output, make_study):
    def make(arm, *more):
        run = Run(make_study("analysis.n=20", "analysis.timesteps=[0.1, 0.5]", "analysis.resamples=50", *more), arm, 0)
        fit(run, progress=False)
        return run

    return make


def test_conflict_of_a_holistic_run(trained):
    run = trained("holistic")
    table = gradients.conflict(run, chunks=5)
    assert list(table.columns) == gradients.COLUMNS
    assert len(table) == 3 * 2 * 3  # checkpoints, noise levels, losses
    assert set(table["block"]) == {1}
    assert set(table["n"]) == {20}
    assert set(table["chunks"]) == {5}
    assert table["rho"].abs().between(1e-6, 1).all()
    assert (table["low"] < table["high"]).all()
    pd.testing.assert_frame_equal(table, gradients.conflict(run, chunks=5))
    # The training weights, not their average; the true labels; the noise every analysis sees.
    now = gradients.moment(run, 8, gradients.find_teacher(run.study, run.config.teacher))
    weights = run.load(8)[0]
    assert all(v.equal(weights[f"model.{n}"]) for n, v in now.model.state_dict().items())
    batch = gradients.held_out(run)
    exact = gradient_cosine(*now, batch, 0.5, 1, chunks=5, seed=run.study.analysis.seed)
    row = table[(table["step"] == 8) & (table["t"] == 0.5)].set_index("loss")["rho"]
    assert {k: float(p.rho()) for k, p in exact.items()} == row.to_dict()
    x_t, _ = noised(now.model, batch.x, 0.5, 0)
    torch.testing.assert_close(2 * x_t - batch.x, noise(batch.x, 0))


def test_only_phase_one_checkpoints_tell_of_the_feature_loss(trained):
    run = trained("haste")  # switches at step 8
    table = gradients.conflict(run)
    assert set(table[table["loss"] != "attention"]["step"]) == {4, 8}
    assert set(table[table["loss"] == "attention"]["step"]) == {4, 8, 12}
    assert set(table["chunks"]) == {min(CHUNKS, 20)}
    assert set(gradients.online_conflict(run)["step"]) == {4, 8}


def test_an_arm_without_alignment_is_asked_about_attention(trained):
    run = trained("vanilla", "train.keep=[]")
    assert set(gradients.conflict(run)["loss"]) == {"attention"}
    assert gradients.online_conflict(run).empty


def test_a_block_above_all_that_is_aligned_is_refused(output, make_study):
    run = Run(make_study("analysis.block=3"), "repa", 0)
    with pytest.raises(HasteError, match=r"analysis.block .*'3'.*expected one of: 0, 1, 2"):
        gradients.conflict(run)


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tables():
    rng = np.random.default_rng(0)
    keys = [
        (arm, seed, step, t, loss)
        for arm in ("repa", "holistic")
        for seed in (0, 1)
        for step in (4, 8, 12)
        for t in (0.1, 0.5)
        for loss in ("feature", "attention")
    ]
    exact = pd.DataFrame(keys, columns=["arm", "seed", "step", "t", "loss"]).assign(block=1, n=20)
    exact["rho"] = rng.uniform(-1, 1, len(exact))
    exact = exact.assign(low=exact["rho"] - 0.1, high=exact["rho"] + 0.1)
    return exact, exact.drop(columns=["block", "n", "rho"]).assign(online=2 * exact["rho"] - 1, n=20)


def test_a_picture_has_a_panel_per_loss_and_a_line_per_level(tables):
    figure = figures.conflict_over_training(tables[0], 8, "repa")
    assert [axis.get_title() for axis in figure.axes] == ["feature loss", "attention loss"]
    part = tables[0].query("arm == 'repa' and loss == 'feature' and t == 0.1").groupby("step")["rho"].mean()
    drawn = figure.axes[0].containers[0].lines[0]
    np.testing.assert_allclose(drawn.get_xydata(), part.reset_index())
    over_t = figures.conflict_over_t(tables[0], "holistic", "attention")
    assert [c.get_label() for c in over_t.axes[0].containers] == ["step 4", "step 8", "step 12"]
    by_arm = figures.conflict_by_arm(tables[0], None, "feature", 0.5)
    assert [c.get_label() for c in by_arm.axes[0].containers] == ["repa", "holistic"]


def test_the_online_estimate_is_drawn_against_the_exact_one_of_the_same_rows(tables):
    exact, online = tables
    figure = figures.online_against_exact(exact, online.sample(frac=1, random_state=0))
    assert all("r = 1.00, ranks 1.00, 24 points" in axis.get_title() for axis in figure.axes)


def test_a_picture_of_nothing_is_refused(tables):
    with pytest.raises(HasteError, match=r"unknown arm .*'haste'.*expected one of: repa, holistic"):
        figures.conflict_over_training(tables[0], None, "haste")
