from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from haste_core import figures
from haste_core.alignment import Alignment
from haste_core.analysis import gradients
from haste_core.analysis.probe import noised
from haste_core.errors import HasteError
from haste_core.gradient_angle import CHUNKS, Products, gradient_cosine, losses_at, noise, reaching
from haste_core.models import SiT
from haste_core.paths import objective_of
from haste_core.study import config
from haste_core.study.pretrain import build_teacher
from haste_core.study.runs import Run
from haste_core.study.train import fit
from haste_core.training import Batch

TEACHER = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 4}


@pytest.fixture(scope="module")
def teacher():
    return build_teacher(
        config.Teacher(model="vit_tiny_patch16_224", kwargs=TEACHER, weights="random", mean=[0.5], std=[0.5])
    )


@pytest.fixture
def parts(teacher, randomise):
    """Model, alignment, objective of phase I, and images."""

    def make(**changes):
        settings = {"lambda_feature": 0.3, "lambda_attention": 0.7, "depth": 2, "layer_pairs": [(0, 1), (1, 2)]}
        model = randomise(SiT(image_size=8, channels=1, classes=5, depth=3, width=24, heads=4, patch=2), std=0.2)
        chosen = config.Alignment(**(settings | {"projector_width": 16} | changes))
        alignment = Alignment(chosen, model, teacher, seed=1)
        g = torch.Generator().manual_seed(3)
        x = torch.randn(10, 1, 8, 8, generator=g)
        batch = Batch(x, torch.randint(5, (10,), generator=g), x.clamp(-1, 1))
        return model, alignment, objective_of("sit"), batch

    return make


def plain_gradients(model, alignment, objective, batch, t, block, part):
    """By backward() on a copy, over all images at once."""
    model = copy.deepcopy(model)
    losses_at(model, alignment, objective, batch, noise(batch.x, 4), t)[part].backward()
    return {n: p.grad for n, p in model.blocks[block].named_parameters()}


def plain_cosine(first, second):
    inner = squares_a = squares_b = 0.0
    for name in first:
        for a, b in zip(first[name].flatten().tolist(), second[name].flatten().tolist(), strict=True):
            inner, squares_a, squares_b = inner + a * b, squares_a + a * a, squares_b + b * b
    return inner / (squares_a * squares_b) ** 0.5, (squares_b / squares_a) ** 0.5


@pytest.mark.parametrize("chunks", [1, 4, 10])
def test_the_cosine_is_that_of_a_plain_loop_over_parameters(parts, chunks):
    *modules, batch = parts()
    found = gradient_cosine(*modules, batch, 0.3, 0, chunks=chunks, seed=4)
    of = {p: plain_gradients(*modules, batch, 0.3, 0, p) for p in ("denoising", "feature", "attention")}
    of["holistic"] = {n: of["feature"][n] + of["attention"][n] for n in of["feature"]}
    assert list(found) == ["feature", "attention", "holistic"]
    for loss, products in found.items():
        assert len(products.cross) == chunks
        rho, ratio = plain_cosine(of["denoising"], of[loss])
        assert abs(rho) > 1e-3
        assert float(products.rho()) == pytest.approx(rho, abs=1e-6)
        assert products.norm_ratio == pytest.approx(ratio, rel=1e-5)


def test_parameters_a_loss_does_not_use_count_as_zero(parts):
    *modules, batch = parts(lambda_feature=0.0)
    model = copy.deepcopy(modules[0])
    losses_at(model, *modules[1:], batch, noise(batch.x, 4), 0.5)["attention"].backward()
    assert any(p.grad is None for p in model.blocks[1].parameters())
    mine = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.blocks[1].named_parameters()}
    rho, _ = plain_cosine(plain_gradients(*modules, batch, 0.5, 1, "denoising"), mine)
    assert float(gradient_cosine(*modules, batch, 0.5, 1, seed=4)["attention"].rho()) == pytest.approx(rho, abs=1e-6)


def test_the_weight_scales_the_norm_and_leaves_the_cosine(parts):
    one, two = (gradient_cosine(*parts(lambda_feature=w), 0.3, 1)["feature"] for w in (0.3, 0.9))
    assert float(two.rho()) == pytest.approx(float(one.rho()), abs=1e-6)
    assert two.norm_ratio == pytest.approx(3 * one.norm_ratio, rel=1e-5)


def test_nothing_is_left_behind(parts):
    model, alignment, objective, batch = parts()
    model.train()
    frozen = alignment.projector[0].weight.requires_grad_(False)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():  # as a trigger may be called
        first = gradient_cosine(model, alignment, objective, batch, 0.5, 1)
        assert not torch.is_grad_enabled()
    assert all(p.grad is None for p in [*model.parameters(), *alignment.projector.parameters()])
    assert model.training
    assert not frozen.requires_grad
    assert random.equal(torch.get_rng_state())
    assert all(v.equal(before[n]) for n, v in model.state_dict().items())
    again = gradient_cosine(model, alignment, objective, batch, 0.5, 1)
    assert all(np.array_equal(first[k].cross, again[k].cross) for k in first)


def test_what_a_block_cannot_tell_is_refused_naming_what_it_can(parts):
    *modules, batch = parts()
    assert reaching(modules[1], 1) == ("feature", "attention", "holistic")
    assert reaching(modules[1], 2) == ()
    with pytest.raises(
        HasteError, match=r"block 2 .*possible there: none.*after block 1, attention in blocks \[0, 1\]"
    ):
        gradient_cosine(*modules, batch, 0.5, 2)
    with pytest.raises(HasteError, match=r"unknown block .*'7'.*possible: 0, 1, 2"):
        gradient_cosine(*modules, batch, 0.5, 7)
    *modules, batch = parts(lambda_feature=0.0)
    with pytest.raises(HasteError, match=r"losses feature: possible there: attention"):
        gradient_cosine(*modules, batch, 0.5, 1, losses=["feature"])


# -- the statistics ---------------------------------------------------------------------------------------------------


def products(first, second):
    return Products(first @ second.T, first @ first.T, second @ second.T)


def noisy(cosine, size, rng, chunks=16, width=300):
    """Gradients of `chunks` groups of images: two directions with this cosine, and noise of its own in each."""
    a, b = np.linalg.qr(rng.normal(size=(width, 2)))[0].T
    b = cosine * a + (1 - cosine**2) ** 0.5 * b
    return products(*(v + size * rng.normal(size=(chunks, width)) / width**0.5 for v in (a, b)))


def test_a_gradient_agrees_with_itself_and_opposes_its_negative():
    g = np.random.default_rng(0).normal(size=(6, 40))
    for sign in (1, -1):
        found = products(g, sign * g)
        assert float(found.rho()) == pytest.approx(sign)
        assert found.interval(50, 0.9, 0) == pytest.approx((sign, sign))
        assert found.norm_ratio == pytest.approx(1)


def test_weights_of_ones_give_rho_itself_and_a_bootstrap_is_repeatable():
    found = noisy(0.4, 1.0, np.random.default_rng(1))
    np.testing.assert_allclose(found.rho(np.ones((3, 16))), [float(found.rho())] * 3)
    assert found.interval(200, 0.95, 7) == found.interval(200, 0.95, 7)
    assert found.interval(200, 0.95, 7) != found.interval(200, 0.95, 8)
    low, high = found.interval(500, 0.95, 7)
    narrow = found.interval(500, 0.5, 7)
    assert low < narrow[0] < float(found.rho()) < narrow[1] < high


def test_leaving_out_a_chunk_by_weight_is_leaving_out_its_gradient():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(5, 30)), rng.normal(size=(5, 30))
    weights = np.array([1, 0, 1, 1, 0])
    kept = weights > 0
    assert float(products(a, b).rho(weights)) == pytest.approx(float(products(a[kept], b[kept]).rho()))


def test_noise_shrinks_rho_and_not_the_corrected_one():
    rng = np.random.default_rng(3)
    found = [noisy(-0.6, 3.0, rng) for _ in range(200)]
    assert np.mean([p.rho() for p in found]) > -0.45
    corrected = [p.rho_corrected for p in found]
    assert np.mean(corrected) == pytest.approx(-0.6, abs=3 * np.std(corrected) / 200**0.5 + 0.01)


def test_the_interval_surrounds_what_more_of_the_same_images_would_give():
    # With the square of the weights on the diagonal only a few of these intervals hold the mean.
    rng = np.random.default_rng(4)
    found = [noisy(-0.6, 3.0, rng, chunks=32) for _ in range(60)]
    mean = np.mean([p.rho() for p in found])
    holds = [low <= mean <= high for low, high in (p.interval(200, 0.95, 0) for p in found)]
    assert np.mean(holds) >= 0.85
    squares = [np.quantile(_doubled(p), [0.025, 0.975]) for p in found]
    assert np.mean([low <= mean <= high for low, high in squares]) < 0.5


def _doubled(p):
    w = np.random.default_rng(0).multinomial(32, np.full(32, 1 / 32), size=200).astype(float)
    cross, first, second = (np.einsum("bi,ij,bj->b", w, g, w) for g in (p.cross, p.denoising, p.alignment))
    return cross / np.sqrt(first * second)


def test_no_cosine_where_there_is_no_direction():
    zero = products(np.zeros((3, 4)), np.ones((3, 4)))
    assert np.isnan(zero.rho())
    opposed = np.array([[1.0, 0.0], [-1.0, 0.1]])  # products of different chunks sum to a negative square
    assert np.isnan(products(opposed, opposed).rho_corrected)
    alone = np.ones((1, 4))
    assert np.isnan(products(alone, alone).rho_corrected)


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
    with pytest.raises(HasteError, match=r"analysis.block .*'3'.*possible: 0, 1, 2"):
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
    with pytest.raises(HasteError, match=r"unknown arm .*'haste'.*possible: repa, holistic"):
        figures.conflict_over_training(tables[0], None, "haste")
