"""Data whose law is known: the best velocity by a second derivation, excess loss, teachers of chosen knowledge."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from haste_core import figures
from haste_core.analysis import capacity
from haste_core.analysis.law import Law, band_spectra, factors, gain_and_harm, upsampled
from haste_core.analysis.statistics import interval
from haste_core.errors import HasteError
from haste_core.study import claims, config, denoising, pretrain
from haste_core.study.data import Batches, open_dataset
from haste_core.study.data.textured import Textured, law_of
from haste_core.study.judging import Evidence, judge
from haste_core.study.train import build_generator

SIDE = 4


@pytest.fixture(scope="module")
def law():
    """Three classes of two templates and two directions on 4x4 pixels."""
    templates = torch.randn(3, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Law(templates, band_spectra(SIDE, 2, 0.8, 1.3, 0.5, 25, 0.2))


@pytest.fixture(scope="module")
def textured():
    return open_dataset(config.load("textured").data)


def drawn(law, n, t, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % len(law.templates)
    x, direction = law.draw(y, generator)
    eps = torch.randn(x.shape, generator=generator)
    return x, y, direction, eps, (1 - t) * x + t * eps


def dense(law):
    """The covariance matrix (S S, S S) of every direction: stationary, so each row is a shift of one covariance."""
    rows = torch.fft.ifft2(law.spectra).real
    shifts = [(i, j) for i in range(law.side) for j in range(law.side)]
    return torch.stack([torch.stack([torch.roll(row, s, (0, 1)).flatten() for s in shifts]) for row in rows])


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_the_best_velocity_is_that_of_dense_gaussian_algebra(law, t):
    _, y, _, _, x_t = drawn(law, 30, t)
    covariances, identity = dense(law), torch.eye(SIDE**2, dtype=torch.float64)
    for image, label, found in zip(x_t.double().flatten(1), y, law.velocity(x_t, t, y).flatten(1), strict=True):
        logs, velocities = [], []
        for mean in law.templates[label].flatten(1):
            for covariance in covariances:
                noisy = (1 - t) ** 2 * covariance + t**2 * identity
                logs.append(MultivariateNormal((1 - t) * mean, noisy).log_prob(image))
                solved = torch.linalg.solve(noisy, image - (1 - t) * mean)
                velocities.append(t * solved - (mean + (1 - t) * covariance @ solved))
        expected = torch.stack(logs).softmax(0) @ torch.stack(velocities)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_draws_have_the_covariance_of_the_law(law):
    x, _, direction, _, _ = drawn(law, 60_000, 0.5)
    rest = x[:, 0].double()
    for j, covariance in enumerate(dense(law)):
        own = rest[direction == j].flatten(1)
        mixed = law.templates.flatten(0, 1).flatten(1)
        expected = covariance + torch.cov(mixed.T, correction=0)
        assert (torch.cov(own.T) - expected).abs().max() < 0.06


@pytest.mark.parametrize("t", [0.1, 0.6])
def test_no_perturbed_predictor_has_a_lower_loss(law, t):
    x, y, _, eps, x_t = drawn(law, 20_000, t)
    best, target = law.velocity(x_t, t, y), (eps - x).double()
    loss = (best - target).square().mean()
    ways = (x_t.double(), torch.ones_like(best), best, x_t.double().flip(-1), torch.tanh(x_t.double()))
    for way in ways:
        for size in (-0.05, 0.05):
            assert (best + size * way - target).square().mean() > loss
    # The law's own blind viewer is one of them, and the excess is the surplus of its loss.
    blind = law.blind().velocity(x_t, t, y)
    surplus = float((blind - target).square().mean() - loss)
    assert law.excess(blind, best)["excess"] == pytest.approx(surplus, rel=0.1)


def test_bands_sum_to_the_whole_and_tell_texture_from_templates(textured):
    law = textured.law
    _, y, _, _, x_t = drawn(law, 20, 0.1)
    best = law.velocity(x_t, 0.1, y)
    whole = law.excess(torch.zeros_like(best), best)
    assert whole["excess"] == pytest.approx(float(best.square().mean()))
    assert whole["excess_texture"] + whole["excess_template"] == pytest.approx(whole["excess"])
    # A wave of 6 cycles belongs to textures, one of 1 cycle to templates.
    for cycles, band in ((6, "excess_texture"), (1, "excess_template")):
        wave = torch.cos(2 * math.pi * cycles * torch.arange(16) / 16).expand(1, 1, 16, 16).double()
        assert law.excess(wave, torch.zeros_like(wave))[band] == pytest.approx(0.5)
    assert law.textured.sum() > 50


def test_samples_are_read_by_the_law(textured):
    law = textured.law
    x, y, direction, _, _ = drawn(law, 60, 0.5)
    plain = law.templates[y, 0].float()[:, None]
    (found, classes), (without, _) = law.read(x), law.read(plain)
    assert (classes == y).float().mean() > 0.95
    likeliest = law.log_posterior(0.95 * x, 0.05).exp().sum((1, 2)).argmax(1)
    assert (likeliest == direction).float().mean() > 0.95
    assert found["direction"] > 0.95
    assert found["texture_power"] == pytest.approx(1, abs=0.15)
    assert without["texture_power"] < 0.2


def test_bad_laws_are_refused_in_one_line():
    with pytest.raises(HasteError, match=r"spectrum of the texture has a value of 0.*data.texture.floor"):
        load("data.texture.floor=0", "data.texture.width=0.01", "data.texture.spread=1")
    with pytest.raises(HasteError, match=r"templates of 8 pixels in images of data.image_size 4"):
        load("data.image_size=4")
    with pytest.raises(HasteError, match=r"teacher.knows 'orientation' with data of kind 'digits'"):
        config.load("digits", None, ["teacher.knows=orientation"])
    with pytest.raises(HasteError, match="texture belongs to kind 'textured'"):
        config.load("digits", None, ["data.texture.floor=0.1"])
    with pytest.raises(HasteError, match="noise level 1"):
        law_of(config.TextureSettings(), 16).velocity(torch.zeros(1, 1, 16, 16), 1, torch.zeros(1).long())
    with pytest.raises(HasteError, match=r"data.texture.amplitude.*given -1"):
        load("data.texture.amplitude=-1")


def load(*overrides):
    return open_dataset(config.load("textured", None, overrides).data)


def test_templates_keep_their_range():
    pixels = torch.rand(3, 8, 8)
    found = upsampled(pixels, 16)
    assert found.shape == (3, 16, 16)
    assert pixels.min() <= found.min() <= found.max() <= pixels.max()


# -- the data set ------------------------------------------------------------------------------------------------------


def test_batches_are_fresh_and_resume_to_the_bit(textured):
    stream = Batches(textured, 16, seed=3)
    first = stream.next()
    state = stream.state_dict()
    second = stream.next()
    assert not torch.equal(first.x, second.x)
    again = Batches(textured, 16, seed=0)
    again.load_state_dict(state)
    assert torch.equal(again.next().x, second.x)
    half = Batches(textured, 16, seed=3, part=slice(8, 16)).next()
    assert torch.equal(half.x, first.x[8:])
    assert torch.equal(half.y, first.y[8:])


def test_splits_are_fixed_and_differ(textured):
    again = open_dataset(config.load("textured").data)
    for split in ("train", "validation", "test"):
        assert torch.equal(textured.images(split)[0], again.images(split)[0])
    assert not torch.equal(textured.images("test", 50)[0], textured.images("validation", 50)[0])
    assert textured.images("test")[1].bincount().tolist() == [50] * 10


def test_a_teacher_is_shown_what_it_is_to_know():
    data = config.load("textured").data
    sets = {knows: Textured(data, knows) for knows in ("labels", "orientation", "both")}
    assert {knows: one.classes for knows, one in sets.items()} == {"labels": 10, "orientation": 8, "both": 80}
    x, y = zip(*(one.images("test") for one in sets.values()), strict=True)
    assert torch.equal(x[0], x[1])
    assert torch.equal(y[2], 8 * y[0] + y[1])
    parts = sets["both"].parts
    assert torch.equal(parts["label"](y[2]), y[0])
    assert torch.equal(parts["orientation"](y[2]), y[1])


def test_a_teacher_of_both_states_the_accuracy_of_each(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTE_OUTPUT", str(tmp_path))
    small = ["teacher.knows=both", "teacher.fitting.steps=3", "teacher.fitting.min_accuracy=0"]
    study = config.load("textured", "smoke", small)
    facts = pretrain.prepare_teacher(study)
    assert {"test_accuracy", "test_label_accuracy", "test_orientation_accuracy"} <= facts.keys()
    assert facts["test_accuracy"] <= min(facts["test_label_accuracy"], facts["test_orientation_accuracy"])
    labels = config.load("textured", "smoke", small[1:])
    assert study.teacher_hash(study.teacher) != labels.teacher_hash(labels.teacher)


# -- excess loss -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(textured):
    return denoising.Probe(textured, 40, seed=0)


def test_excess_is_zero_for_the_best_predictor_and_its_direction_is_used(textured, probe):
    class Best(torch.nn.Module):
        kind = "sit"

        def __init__(self, law):
            super().__init__()
            self.law = law

        def forward(self, x, t, y):
            return self.law.velocity(x, float(t[0]), y).float()

    for law, informed in ((textured.law, 1), (textured.law.blind(), 0)):
        rows = [row for row in probe.measure(Best(law)) if row["split"] == "held-out"]
        found = denoising.summaries(rows)
        assert found["informed"] == pytest.approx(informed, abs=1e-3)
        if informed:
            assert found["excess"] < 1e-9
            assert abs(found["gap"]) < 1e-3
        else:
            assert found["excess"] > 0.01
            assert found["gap"] > 1


def test_excess_is_the_loss_less_that_of_the_best_predictor(textured):
    study = config.load("textured")
    model = build_generator(study.run("vanilla"), textured, seed=0).eval()
    x, y = textured.images("test", 200)
    drawn_ = (x, y, 3, 5)
    best = list(denoising.best_velocities(textured.law, *drawn_))
    rows = denoising.losses(model, *drawn_, (textured.law, best))
    plain = denoising.losses(model, *drawn_)
    least = torch.zeros(len(denoising.LEVELS), dtype=torch.float64)
    for (i, images, _, eps), (velocity, _) in zip(denoising.noised(*drawn_), best, strict=True):
        least[i] += (velocity - (eps - images)).double().square().mean() / 3
    for row, other, floor in zip(rows, plain, least.tolist(), strict=True):
        assert row["loss"] == other["loss"]
        assert row["excess"] == pytest.approx(row["loss"] - floor, rel=0.1)


def test_data_without_a_known_law_have_no_excess():
    digits = open_dataset(config.load("digits").data)
    model = build_generator(config.load("digits").run("vanilla"), digits, seed=0).eval()
    rows = denoising.Probe(digits, 20, seed=0).measure(model)
    assert "excess" not in rows[0]
    assert tuple(denoising.summaries(rows)) == denoising.SUMMARIES


# -- predictions -------------------------------------------------------------------------------------------------------


def scores(harms, gains=None, texture=0.9):
    """Rows of fid.csv: vanilla's excess times exp(harm) at the end and over exp(gain) early."""
    rows = []
    for arm, harm in {"vanilla": 0.0, **harms}.items():
        for seed in range(5):
            noise = 0.002 * np.random.default_rng([seed, len(arm)]).normal()
            for step, gain, cost in ((300, (gains or {}).get(arm, 0.0), 0.0), (2400, 0.0, harm + noise)):
                excess = 0.1 * math.exp(cost)
                more = excess - 0.1
                rows.append({
                    "arm": arm, "seed": seed, "step": step, "card": "a", "excess": excess, "gap": excess,
                    "excess_texture": 0.06 + texture * more, "excess_template": 0.04 + (1 - texture) * more,
                    "excess_structure": 0.1 * math.exp(-gain),
                })  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(harms, gains=None, texture=0.9):
    evidence = Evidence(scores(harms, gains, texture), [300], 2400)
    return {claim.id: judge(claim, evidence, 0.95)["verdict"] for claim in claims.MECHANISM}


def test_predictions_are_judged_as_their_rules_say():
    harmed = {
        "holistic": 0.08, "haste": 0.0, "both": 0.01, "both_pull": 0.02, "narrow_vanilla": 0.0, "narrow_holistic": 0.2,
        "wide_vanilla": 0.0, "wide_holistic": 0.03,
    }  # fmt: skip
    found = verdicts(harmed, {"holistic": 0.2, "both": 0.2})
    assert found == dict.fromkeys(("M1", "M2", "M2g", "M3", "M4", "M5", "M6s", "M7l"), "supported")
    against = verdicts(
        harmed | {"holistic": -0.08, "haste": 0.1, "narrow_holistic": -0.3}, {"holistic": 0.2, "both": 0.2}
    )
    assert {against[name] for name in ("M1", "M2", "M2g", "M3", "M4")} == {"contradicted"}
    assert verdicts(harmed, {"holistic": 0.2, "both": 0.2}, texture=0.3)["M5"] == "contradicted"
    assert verdicts(harmed | {"holistic": 0.0})["M1"] == "equivalent"
    assert verdicts({"holistic": 0.08, "haste": 0.0})["M2"] == "not tested"


def test_only_data_with_a_known_law_have_predictions():
    assert claims.claims_of(config.load("digits")) == claims.CLAIMS
    assert claims.claims_of(config.load("textured")) == (*claims.CLAIMS, *claims.MECHANISM)


def test_gain_and_harm_are_log_ratios_to_the_baseline():
    table = gain_and_harm(
        scores({"holistic": 0.1, "both": 0.0}, {"holistic": 0.3}), {"holistic": "vanilla"}, [300], 2400
    )
    assert table["gain"].tolist() == pytest.approx([0.3] * 5)
    assert table["harm"].to_numpy() == pytest.approx(0.1, abs=0.02)
    assert list(table) == ["arm", "baseline", "seed", "gain", "harm"]
    figures.gain_and_harm(table)


def test_factors_are_means_over_seeds_and_differences_to_holistic_of_the_same_seed():
    late = {"holistic": 0.1, "both": 0.04, "random": -0.02}
    pairs = gain_and_harm(scores(late, {"holistic": 0.3, "both": 0.2}), dict.fromkeys(late, "vanilla"), [300], 2400)
    table = factors(pairs, 0.95).set_index(["arm", "measure"])
    assert set(table.index) == {(arm, m) for arm in late for m in ("gain", "harm")} | {
        ("both", "less harm"), ("random", "less harm")
    }  # fmt: skip
    assert table["mean"][("both", "gain")] == pytest.approx(0.2)
    assert (table["seeds"] == 5).all()
    assert (table["low"] <= table["mean"]).all()
    harms = pairs.pivot_table(index="seed", columns="arm", values="harm")
    expected = interval(list(harms["holistic"] - harms["random"]), 0.95)
    assert tuple(table.loc[("random", "less harm"), ["mean", "low", "high"]]) == pytest.approx(tuple(expected))
    figure = figures.harm_by_factor(pairs, factors(pairs, 0.95), {"teacher": ["vanilla", *late], "one": ["both"]})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(late)
    assert len(figure.axes) == 4


# -- what teachers have discarded --------------------------------------------------------------------------------------


def lost(textured, tokens_of, grid=(4, 4)):
    """The measures of a teacher whose tokens are a function of the images."""

    class Stand:
        blocks, mean = 3, torch.zeros(1)

        def __call__(self, images):
            return SimpleNamespace(tokens=tokens_of(images))

    Stand.grid = grid
    return capacity.discarded(Stand(), textured.examples("train", 300), textured.examples("test", 200))


def test_a_teacher_that_is_the_image_has_discarded_nothing_and_one_of_noise_everything(textured):
    def of(change):
        return lost(textured, lambda images: change(capacity.to_patches(images, (4, 4))))

    noise = torch.Generator().manual_seed(0)
    keeps = of(lambda patches: patches)
    means = of(lambda patches: patches.mean(-1, keepdim=True).expand(-1, -1, 4))
    blind = of(lambda patches: torch.randn(patches.shape, generator=noise))
    assert keeps["missed"] < 1e-3
    assert keeps["unlike"] < 1e-6
    assert keeps["missed"] < means["missed"] <= 1.05
    assert blind["missed"] == pytest.approx(1, abs=0.15)
    assert blind["unlike"] == pytest.approx(1, abs=0.1)
    assert keeps["narrow"] < means["narrow"]


def test_tokens_whose_grid_does_not_divide_the_image_are_compared_with_patches_of_one_that_does(textured):
    found = lost(textured, lambda images: F.interpolate(images, (6, 6), mode="area").flatten(2).mT, (6, 6))
    assert 0 < found["unlike"] < 0.9
    assert all(math.isfinite(value) for value in found.values())


def test_the_order_of_teachers_is_counted_where_the_teacher_alone_differs():
    rows = pd.DataFrame([
        {"study": "a", "arm": f"arm{i}", "seed": seed, "step": 10, "settings": weight,
         "missed": missed, "unlike": 0.5, "narrow": -missed, "harm": missed + 0.01 * seed}
        for i, (missed, weight) in enumerate([(0.1, 0.5), (0.2, 0.5), (0.3, 0.5), (0.05, 2.0)])
        for seed in (0, 1)
    ])  # fmt: skip
    found = capacity.prediction(rows).set_index("measure")
    assert found.loc["missed", ["rho", "agree", "pairs", "arms"]].tolist() == [1, 3, 3, 4]
    assert found.loc["narrow", ["rho", "agree", "pairs"]].tolist() == [-1, 0, 3]
    assert math.isnan(found.loc["unlike", "rho"])
    assert found.loc["unlike", "pairs"] == 0
    rows.loc[rows["arm"] == "arm2", "missed"] = math.nan  # not measured
    found = capacity.prediction(rows).set_index("measure")
    assert found.loc["missed", ["rho", "agree", "pairs", "arms"]].tolist() == [1, 1, 1, 3]
    figures.predicted_harm(rows, found.reset_index())
