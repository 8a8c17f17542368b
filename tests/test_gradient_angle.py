"""The exact angle between denoising and alignment gradients against plain loops, and its statistics."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from haste_core.errors import HasteError
from haste_core.gradient_angle import Products, exact, gradient_cosine, losses_at, noise, reaching
from haste_core.haste import HASTE
from haste_core.models import SiT
from haste_core.paths import objective_of
from haste_core.teacher import Teacher
from haste_core.training import Batch


@pytest.fixture(scope="module")
def teacher():
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 4}
    return Teacher("vit_tiny_patch16_224", weights="random", mean=[0.5], std=[0.5], **sizes)


@pytest.fixture
def parts(teacher, randomise):
    """Model, HASTE, objective of phase I, and images."""

    def make(**changes):
        settings = {"lambda_feature": 0.3, "lambda_attention": 0.7, "depth": 2, "layer_pairs": [(0, 1), (1, 2)]}
        model = randomise(SiT(image_size=8, channels=1, classes=5, depth=3, width=24, heads=4, patch=2), std=0.2)
        haste = HASTE(teacher, width=24, projector_width=16, seed=1, **settings | changes)
        g = torch.Generator().manual_seed(3)
        x = torch.randn(10, 1, 8, 8, generator=g)
        return model, haste, objective_of("sit"), Batch(x, torch.randint(5, (10,), generator=g), x.clamp(-1, 1))

    return make


def plain_gradients(model, haste, objective, batch, t, block, part):
    """By backward() on a copy, over all images at once; what a loss does not use has the gradient zero."""
    model = copy.deepcopy(model)
    losses_at(model, haste, objective, batch, noise(batch.x, 4), t)[part].backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.blocks[block].named_parameters()}


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
    of = {p: plain_gradients(*modules, batch, 0.5, 1, p) for p in ("denoising", "attention")}
    assert not of["attention"]["mlp.fc2.weight"].any()
    rho, _ = plain_cosine(of["denoising"], of["attention"])
    assert float(gradient_cosine(*modules, batch, 0.5, 1, seed=4)["attention"].rho()) == pytest.approx(rho, abs=1e-6)


def test_what_a_trigger_reads_is_the_mean_over_losses_and_noise_levels(parts):
    *modules, batch = parts()
    found = [gradient_cosine(*modules, batch, t, 1) for t in (0.1, 0.5)]
    mean = np.mean([float(products[loss].rho()) for products in found for loss in ("feature", "attention")])
    assert exact(*modules, batch, (0.1, 0.5), 1) == pytest.approx(mean, abs=1e-7)


def test_nothing_is_left_behind(parts):
    model, haste, objective, batch = parts()
    model.train()
    frozen = haste.projector[0].weight.requires_grad_(False)
    before, random = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():  # as a trigger may be called
        first = gradient_cosine(model, haste, objective, batch, 0.5, 1)
        assert not torch.is_grad_enabled()
    assert all(p.grad is None for p in [*model.parameters(), *haste.parameters()])
    assert model.training
    assert not frozen.requires_grad
    assert random.equal(torch.get_rng_state())
    assert all(v.equal(before[n]) for n, v in model.state_dict().items())
    again = gradient_cosine(model, haste, objective, batch, 0.5, 1)
    assert all(np.array_equal(first[k].cross, again[k].cross) for k in first)


def test_what_a_block_cannot_tell_is_refused_naming_what_it_can(parts):
    *modules, batch = parts()
    assert reaching(modules[1], 1) == ("feature", "attention", "holistic")
    assert reaching(modules[1], 2) == ()
    words = r"block 2 .*expected there: none.*after block 1, attention in blocks \[0, 1\]"
    with pytest.raises(HasteError, match=words):
        gradient_cosine(*modules, batch, 0.5, 2)
    with pytest.raises(HasteError, match=r"unknown block .*'7'.*expected one of: 0, 1, 2"):
        gradient_cosine(*modules, batch, 0.5, 7)
    *modules, batch = parts(lambda_feature=0.0)
    with pytest.raises(HasteError, match=r"losses feature; expected there: attention"):
        gradient_cosine(*modules, batch, 0.5, 1, losses=["feature"])


# -- the statistics ---------------------------------------------------------------------------------------------------


def products(first, second):
    return Products(first @ second.T, first @ first.T, second @ second.T)


def noisy(cosine, size, rng, chunks=16, width=300):
    """Gradients of `chunks` groups of images: two directions with this cosine, and noise of its own in each."""
    a, b = np.linalg.qr(rng.normal(size=(width, 2)))[0].T
    b = cosine * a + (1 - cosine**2) ** 0.5 * b
    return products(*(v + size * rng.normal(size=(chunks, width)) / width**0.5 for v in (a, b)))


def test_a_gradient_agrees_with_itself_opposes_its_negative_and_has_no_angle_to_nothing():
    g = np.random.default_rng(0).normal(size=(6, 40))
    for sign in (1, -1):
        found = products(g, sign * g)
        assert float(found.rho()) == pytest.approx(sign)
        assert found.interval(50, 0.9, 0) == pytest.approx((sign, sign))
        assert found.norm_ratio == pytest.approx(1)
    assert np.isnan(products(np.zeros((3, 4)), np.ones((3, 4))).rho())
    opposed = np.array([[1.0, 0.0], [-1.0, 0.1]])  # products of different chunks sum to a negative square
    for gradients in (opposed, np.ones((1, 4))):
        assert np.isnan(products(gradients, gradients).rho_corrected)


def test_weights_count_chunks_and_a_bootstrap_is_repeatable():
    rng = np.random.default_rng(2)
    a, b, weights = rng.normal(size=(5, 30)), rng.normal(size=(5, 30)), np.array([1, 0, 1, 1, 0])
    kept = weights > 0
    assert float(products(a, b).rho(weights)) == pytest.approx(float(products(a[kept], b[kept]).rho()))
    found = noisy(0.4, 1.0, rng)
    np.testing.assert_allclose(found.rho(np.ones((3, 16))), [float(found.rho())] * 3)
    assert found.interval(200, 0.95, 7) == found.interval(200, 0.95, 7) != found.interval(200, 0.95, 8)
    (low, high), narrow = found.interval(500, 0.95, 7), found.interval(500, 0.5, 7)
    assert low < narrow[0] < float(found.rho()) < narrow[1] < high


def test_noise_shrinks_rho_and_not_the_corrected_one():
    rng = np.random.default_rng(3)
    found = [noisy(-0.6, 3.0, rng) for _ in range(200)]
    assert np.mean([p.rho() for p in found]) > -0.45
    corrected = [p.rho_corrected for p in found]
    assert np.mean(corrected) == pytest.approx(-0.6, abs=3 * np.std(corrected) / 200**0.5 + 0.01)


def test_the_interval_surrounds_what_more_of_the_same_images_would_give():
    rng = np.random.default_rng(4)
    found = [noisy(-0.6, 3.0, rng, chunks=32) for _ in range(60)]
    mean = np.mean([p.rho() for p in found])
    holds = [low <= mean <= high for low, high in (p.interval(200, 0.95, 0) for p in found)]
    assert np.mean(holds) >= 0.85
