"""Ranks, dimensions and entropy on data whose answer is known; frequency bands and linear readouts; their tables."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge

from haste_core import figures
from haste_core.analysis import capacity, probe
from haste_core.errors import HasteError
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run

ALL = capacity.measures()
RANKS = ("effective_rank", "participation_ratio", "local_rank")


def gaussian(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


# -- directions -------------------------------------------------------------------------------------------------------


def test_two_nn_sees_a_curved_surface_as_two_dimensional():
    u, v = np.random.default_rng(0).uniform(0, 3, (2, 1500))
    roll = np.stack([u * np.cos(u), u * np.sin(u), v], 1)
    assert capacity.two_nn(roll) == pytest.approx(2, rel=0.1)
    assert capacity.participation_ratio(roll) > 2.2


def test_two_nn_is_the_slope_of_the_fit_by_hand_and_counts_equal_rows_once():
    points = gaussian(40, 3)
    near = [sorted(math.dist(points[i], points[j]) for j in range(40) if j != i) for i in range(40)]
    mu = sorted(distances[1] / distances[0] for distances in near)
    pairs = np.array([(math.log(m), -math.log(1 - (i + 1) / 40)) for i, m in enumerate(mu[:36])])
    slope = np.linalg.lstsq(pairs[:, :1], pairs[:, 1], rcond=None)[0][0]
    assert capacity.two_nn(points) == pytest.approx(slope)
    assert capacity.two_nn(np.repeat(points, 3, axis=0)) == pytest.approx(slope)
    assert math.isnan(capacity.two_nn(np.repeat(points[:2], 9, axis=0)))
    assert capacity.two_nn(np.eye(5)) == math.inf


@pytest.mark.parametrize("row", [1 / 3, 1e5 / 7, 0.0])
def test_equal_rows_use_no_direction(row):
    same = np.full((50, 7), row)
    assert [ALL[name](same) for name in RANKS] == [0, 0, 0]
    assert math.isnan(capacity.two_nn(same))
    assert math.isnan(capacity.matrix_entropy(same)) if row == 0 else capacity.matrix_entropy(same) < 1e-12


def test_measures_by_their_formulas():
    # Two centred directions with singular values 3 : 1.
    points = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert capacity.effective_rank(points) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    points = gaussian(60, 6) * np.arange(1, 7) + 5
    values = np.linalg.eigvalsh(np.cov(points.T))
    assert capacity.participation_ratio(points) == pytest.approx(values.sum() ** 2 / (values**2).sum())
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 60)
    assert capacity.matrix_entropy(points) == pytest.approx(-sum(v * math.log(v) for v in values if v > 1e-12))
    rows = np.diag(np.arange(1.0, 9.0))
    assert capacity.matrix_entropy(np.vstack([rows, np.zeros((3, 8))])) == pytest.approx(math.log(8))


def test_local_rank_is_the_mean_over_neighbourhoods():
    points = gaussian(30, 5)
    ranks = []
    for i in range(30):
        near = sorted((j for j in range(30) if j != i), key=lambda j, i=i: math.dist(points[i], points[j]))[:6]
        ranks.append(capacity.effective_rank(points[near]))
    assert capacity.local_rank(points, 6) == pytest.approx(np.mean(ranks))
    for k in (1, 30):
        with pytest.raises(HasteError, match=f"30 rows with k={k}"):
            capacity.local_rank(points, k)


def test_intervals_cover_the_true_value_about_as_often_as_they_say():
    inside = 0
    for seed in range(200):
        low, high = capacity.interval(gaussian(60, 1, seed=seed), lambda points: float(points.std()), 0.9)
        inside += low < 1 < high
    assert 164 <= inside <= 194


def test_the_place_of_a_token_is_the_same_on_a_finer_grid():
    coarse = torch.arange(4.0).reshape(1, 4, 1).expand(50, 4, 1)
    fine = coarse[0].reshape(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(1, 16, 1).expand(50, 16, 1)
    one, other = (capacity.one_per_image(tokens, grid, 3) for tokens, grid in ((coarse, (2, 2)), (fine, (4, 4))))
    assert np.array_equal(one, other)
    assert set(one[:, 0]) == {0, 1, 2, 3}


# -- frequencies ------------------------------------------------------------------------------------------------------


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("along_x", "along_y"), [(0, 0), (1, 0), (0, 2), (3, 2), (4, 4)])
def test_a_wave_lies_in_the_band_of_its_frequency(along_x, along_y):
    size = 8
    at = torch.arange(size, dtype=torch.float64)
    wave = torch.cos(2 * np.pi * (along_x * at[None] + along_y * at[:, None]) / size)
    found = capacity.band_energies(wave.expand(1, 2, size, size))[0] / 2
    radius = np.hypot(along_x, along_y) / (size / 2)
    band = next((i for i, upper in enumerate(capacity.EDGES[1:-1]) if radius < upper), 4)
    assert found[band] == pytest.approx(float(wave.square().sum()))
    assert np.delete(found, band) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("shape", "grid"), [((3, 16, 16), (4, 4)), ((2, 6, 10), (3, 2))])
def test_patches_are_the_areas_of_tokens_and_a_readout_of_them_gives_the_images_back(shape, grid):
    images = noise(40, *shape)
    cut = capacity.to_patches(images, grid)
    height, width = shape[1] // grid[0], shape[2] // grid[1]
    assert cut[:, 1].equal(images[:, :, :height, width : 2 * width].reshape(40, -1))
    assert cut[:, grid[1]].equal(images[:, :, height : 2 * height, :width].reshape(40, -1))
    again = capacity.fit_readout(5 * cut + 2, images, grid).reconstruct(5 * cut + 2)
    assert again.numpy() == pytest.approx(images.numpy(), abs=1e-3)


def test_readouts_of_too_few_images_are_refused():
    with pytest.raises(HasteError, match="readout of 4 images"):
        capacity.fit_readout(noise(4, 4, 3), noise(4, 1, 8, 8), (2, 2))


@pytest.mark.parametrize("strength", [1e-4, 10.0])
def test_a_readout_is_sklearns_ridge_on_tokens_less_the_mean_of_their_place(strength, monkeypatch):
    monkeypatch.setattr(probe, "BATCH", 7)
    tokens, images = noise(30, 16, 5) * torch.arange(1, 6) + 3, noise(30, 2, 8, 8, seed=1) + 1
    found = capacity.fit_readout(tokens, images, (4, 4), [strength])
    x = (tokens - tokens.mean(0)).reshape(480, 5).numpy()
    y = capacity.to_patches(images - images.mean(0), (4, 4)).reshape(480, 8).numpy()
    expected = Ridge(alpha=strength * (x**2).sum() / 5, fit_intercept=False, solver="svd").fit(x, y)
    np.testing.assert_allclose(found.weights.T.numpy(), expected.coef_, atol=1e-10)
    shown = capacity.to_patches(found.reconstruct(tokens) - images.mean(0), (4, 4))
    np.testing.assert_allclose(shown.reshape(480, 8).numpy(), expected.predict(x), atol=1e-10)


def test_the_strength_is_chosen_on_images_that_were_not_fitted():
    # As many useless features as tokens: without a ridge the fit is perfect and worth nothing elsewhere.
    tokens, images = noise(50, 4, 150), noise(50, 1, 4, 4, seed=1)
    assert capacity.fit_readout(tokens, images, (2, 2)).strength == max(capacity.STRENGTHS)
    exact = capacity.to_patches(images, (2, 2))
    assert capacity.fit_readout(exact, images, (2, 2)).strength == min(capacity.STRENGTHS)


def errors_of(see, shape, grid=(4, 4)):
    """Relative error per band on fresh images, of tokens that `see` the patches, spectrum 1 / f."""
    fy, fx = (torch.fft.fftfreq(size, dtype=torch.float64) for size in shape[1:])
    falling = 1 / torch.hypot(fy[:, None], fx[None]).clamp_min(1 / shape[-1])
    images = torch.fft.ifft2(torch.fft.fft2(noise(400, *shape)) * falling).real
    tokens = see(capacity.to_patches(images, grid))
    readout = capacity.fit_readout(tokens[:300], images[:300], grid)
    return capacity.relative_error(images[300:], readout.reconstruct(tokens[300:]), readout.image_mean)


def test_bands_that_tokens_keep_and_lose():
    for shape in ((1, 8, 8), (3, 16, 16)):
        assert errors_of(lambda patches: 5 * patches + 2, shape) == pytest.approx(0, abs=1e-6)
    coarse = errors_of(lambda patches: patches.mean(-1, keepdim=True), (1, 16, 16))
    assert coarse[0] < 0.1
    assert (coarse[1:] > 0.8).all()
    blind = errors_of(lambda patches: noise(*patches.shape[:2], 3, seed=9), (1, 8, 8))
    assert blind == pytest.approx(1, abs=0.02)
    images, mean = noise(20, 1, 8, 8), noise(1, 8, 8, seed=2)
    assert capacity.relative_error(images, mean.expand_as(images), mean) == pytest.approx(1)
    assert np.isnan(capacity.relative_error(images[:, :, :1, :1], images[:, :, :1, :1], mean[:, :1, :1])[1:]).all()


# -- tables of a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(trained):
    return trained("vanilla", "train.keep=[]", "train.steps=6", "analysis.n=40", "analysis.timesteps=[0.1, 0.6]")


def test_capacity_of_a_run(run):
    table = capacity.token_capacity(run)
    assert set(table["n"]) == {40}
    # Teacher: 4 blocks and the final tokens; student: 2 steps, 2 noise levels, 3 blocks; 2 kinds, 5 measures.
    assert table["who"].value_counts().to_dict() == {"student": 120, "teacher": 50}
    assert set(table[table["who"] == "student"]["step"]) == {0, 6}
    assert set(table[table["who"] == "teacher"]["t"]) == {0.0}
    assert table["value"].notna().all()
    known = table[table["measure"] != "local_rank"]
    assert ((known["low"] < known["value"]) & (known["value"] < known["high"])).all()
    assert table[table["measure"] == "local_rank"]["low"].isna().all()

    batch, seed = probe.held_out(run), run.study.analysis.seed
    tokens = capacity.student_tokens(probe.student_at(run, 6), 0.6, 1, batch, seed)
    found = table.set_index(["who", "step", "t", "block", "kind", "measure"])["value"]
    expected = capacity.effective_rank(tokens.double().mean(1).numpy())
    assert found["student", 6, 0.6, 1, "patch mean", "effective_rank"] == pytest.approx(expected)
    teacher = find_teacher(run.study)
    final = teacher(batch.images).tokens
    expected = capacity.two_nn(capacity.one_per_image(final, teacher.grid, seed))
    assert found["teacher", 0, 0.0, 4, "tokens", "two_nn"] == pytest.approx(expected)
    assert capacity.teacher_tokens(teacher, 4, batch).equal(final)
    torch.testing.assert_close(teacher.encoder.norm(capacity.teacher_tokens(teacher, 3, batch)), final)

    table = table.assign(arm="vanilla", seed=0)
    assert len(figures.capacity_over_depth(table, 6, 0.6).axes) == 6
    drawn = figures.capacity_over_training(table, 1, 0.1, 4, "patch mean").axes[0]
    assert list(drawn.lines[1].get_xdata()) == [0, 6]


def test_band_errors_of_a_run(run):
    table = capacity.band_errors(run, t=0.05, fit_images=100)
    # Teacher: 4 blocks and the final tokens; student: 2 steps with 3 blocks; 5 bands.
    assert table["who"].value_counts().to_dict() == {"student": 30, "teacher": 25}
    assert set(table["n"]) == {40}
    assert set(table[table["who"] == "student"]["t"]) == {0.05}
    assert table["relative_error"].between(0, 1.2).all()
    # Untrained blocks pass the embedded patch on: only the noise is missing.
    fresh = table[(table["step"] == 0) & (table["who"] == "student")]
    assert (fresh.groupby("band_low")["relative_error"].max() < 0.2).all()

    (fitted, tested), teacher = capacity.fit_and_test_images(run, 100), find_teacher(run.study)
    readout = capacity.fit_readout(teacher(fitted.images).tokens, fitted.x, (4, 4))
    again = readout.reconstruct(teacher(tested.images).tokens)
    expected = capacity.relative_error(tested.x, again, readout.image_mean)
    found = table[(table["who"] == "teacher") & (table["block"] == 4)]["relative_error"]
    assert found.to_numpy() == pytest.approx(expected, abs=1e-6)

    table = table.assign(arm="vanilla", seed=0)
    drawn = figures.error_per_band(table, "vanilla", 6)
    assert [len(axis.get_legend().get_texts()) for axis in drawn.axes] == [5, 3]
    panels = figures.error_by_arm(table, 6).axes
    assert [axis.axison for axis in panels] == [True] * 5 + [False]
    assert len(panels[-1].get_legend().get_texts()) == 2


def test_a_students_readout_is_of_clean_images_from_noised_ones(run):
    found = pd.concat([capacity.band_errors(run, [0], t, 100) for t in (0.0, 0.5)])
    rows = found[(found["who"] == "student") & (found["block"] == 0)]
    low, high = (rows.loc[rows["t"] == t, "relative_error"].to_numpy() for t in (0.0, 0.5))
    assert low == pytest.approx(0, abs=1e-4)
    assert (high > low + 0.05).all()
    shown = capacity.reconstructions(run, step=0, t=0.0, count=4, fit_images=60)
    blocks = [*(f"teacher, block {b}" for b in range(4)), "teacher, final", *(f"student, block {b}" for b in range(3))]
    assert list(shown) == ["held-out image", *blocks]
    assert {(images.shape, str(images.dtype)) for images in shown.values()} == {((4, 1, 8, 8), "uint8")}
    assert np.abs(shown["student, block 2"].astype(int) - shown["held-out image"]).max() <= 2


@pytest.mark.filterwarnings("ignore:token grids differ")
def test_a_teacher_whose_grid_does_not_divide_the_image_is_resampled_to_one_that_does(output, make_study):
    study = make_study(
        "teacher.kwargs={img_size: 12, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 4, num_heads: 4}",
        "analysis.n=30",
    )
    run = Run(study, "vanilla", 0)
    block = next(capacity.blocks(run, [0], [0.1]))
    readout, again = capacity.read(block, capacity.fit_and_test_images(run, 50), 0)
    assert (block.grid, readout.grid) == ((3, 3), (4, 4))
    assert again.shape == (30, 1, 8, 8)
