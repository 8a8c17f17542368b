from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from haste_core import figures
from haste_core.analysis import probe, spectrum
from haste_core.errors import HasteError
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.train import fit

SHAPES = [(1, 8, 8), (3, 32, 32), (2, 6, 10), (4, 5, 7)]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_bands_partition_the_energy(shape):
    images = noise(5, *shape)
    found = spectrum.band_energies(images)
    assert found.shape == (5, 5)
    np.testing.assert_allclose(found.sum(1), images.square().sum((1, 2, 3)).numpy())


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize(("along_x", "along_y"), [(0, 0), (1, 0), (0, 2), (1, 1), (3, 2), (4, 4), (2, 4)])
def test_a_wave_lies_in_the_band_of_its_frequency(size, along_x, along_y):
    at = torch.arange(size, dtype=torch.float64)
    wave = torch.cos(2 * np.pi * (along_x * at[None] + along_y * at[:, None]) / size)
    found = spectrum.band_energies(wave[None, None])[0]
    radius = np.hypot(along_x, along_y) / (size / 2)
    band = next((i for i, upper in enumerate(spectrum.EDGES[1:-1]) if radius < upper), 4)
    assert found[band] == pytest.approx(float(wave.square().sum()))
    assert np.delete(found, band) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("shape", "grid"), [((1, 8, 8), (4, 4)), ((3, 32, 32), (8, 8)), ((2, 6, 10), (3, 2))])
def test_patches_are_what_tokens_cover(shape, grid):
    images = noise(3, *shape)
    cut = spectrum.to_patches(images, grid)
    height, width = shape[1] // grid[0], shape[2] // grid[1]
    second = images[:, :, :height, width : 2 * width].reshape(3, -1)
    assert cut[:, 1].equal(second)
    below = images[:, :, height : 2 * height, :width].reshape(3, -1)
    assert cut[:, grid[1]].equal(below)
    assert spectrum.from_patches(cut, grid, shape).equal(images)


def test_a_grid_that_does_not_divide_the_image_is_an_error():
    with pytest.raises(HasteError, match="a 3x3 grid of tokens does not divide images of 8x8"):
        spectrum.to_patches(noise(2, 1, 8, 8), (3, 3))


def test_a_readout_of_too_few_images_is_an_error():
    with pytest.raises(HasteError, match="readout of 4 images"):
        spectrum.fit_readout(noise(4, 4, 3), noise(4, 1, 8, 8), (2, 2))


@pytest.mark.parametrize("strength", [1e-4, 1e-1, 10.0])
def test_a_readout_is_sklearns_ridge_on_tokens_less_the_mean_of_their_place(strength, monkeypatch):
    monkeypatch.setattr(spectrum.probe, "BATCH", 7)
    tokens, images = noise(30, 16, 5) * torch.arange(1, 6) + 3, noise(30, 2, 8, 8, seed=1) + 1
    found = spectrum.fit_readout(tokens, images, (4, 4), [strength])
    x = (tokens - tokens.mean(0)).reshape(480, 5).numpy()
    y = spectrum.to_patches(images - images.mean(0), (4, 4)).reshape(480, 8).numpy()
    alpha = strength * (x**2).sum() / 5
    expected = Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(x, y)
    np.testing.assert_allclose(found.weights.T.numpy(), expected.coef_, atol=1e-10)
    shown = found.reconstruct(tokens) - images.mean(0)
    np.testing.assert_allclose(
        spectrum.to_patches(shown, (4, 4)).reshape(480, 8).numpy(), expected.predict(x), atol=1e-10
    )


def test_the_strength_is_chosen_on_images_that_were_not_fitted():
    # As many useless features as tokens: without a ridge the fit is perfect and worth nothing elsewhere.
    tokens, images = noise(50, 4, 150), noise(50, 1, 4, 4, seed=1)
    assert spectrum.fit_readout(tokens, images, (2, 2)).strength == max(spectrum.STRENGTHS)
    exact = spectrum.to_patches(images, (2, 2))
    assert spectrum.fit_readout(exact, images, (2, 2)).strength == min(spectrum.STRENGTHS)


def errors_of(see, grid, shape):
    """Relative error per band on fresh images, of tokens that `see` the patches, spectrum 1 / f."""
    fy, fx = (torch.fft.fftfreq(size, dtype=torch.float64) for size in shape[1:])
    falling = 1 / torch.hypot(fy[:, None], fx[None]).clamp_min(1 / shape[-1])
    images = torch.fft.ifft2(torch.fft.fft2(noise(400, *shape)) * falling).real
    tokens = see(spectrum.to_patches(images, grid))
    readout = spectrum.fit_readout(tokens[:300], images[:300], grid)
    return spectrum.relative_error(images[300:], readout.reconstruct(tokens[300:]), readout.image_mean)


@pytest.mark.parametrize(("shape", "grid"), [((1, 8, 8), (4, 4)), ((3, 16, 16), (4, 4))])
def test_tokens_that_are_the_patches_keep_every_band(shape, grid):
    assert errors_of(lambda patches: 5 * patches + 2, grid, shape) == pytest.approx(0, abs=1e-6)


def test_tokens_that_hold_the_mean_of_their_patch_keep_low_and_lose_high_frequencies():
    errors = errors_of(lambda patches: patches.mean(-1, keepdim=True), (4, 4), (1, 16, 16))
    assert errors[0] < 0.1
    assert (errors[1:] > 0.8).all()


def test_tokens_that_know_nothing_keep_no_band():
    errors = errors_of(lambda patches: noise(*patches.shape[:2], 3, seed=9), (4, 4), (1, 8, 8))
    assert errors == pytest.approx(1, abs=0.02)


def test_nothing_kept_is_one_and_everything_kept_is_zero():
    images, mean = noise(20, 1, 8, 8), noise(1, 8, 8, seed=2)
    assert spectrum.relative_error(images, mean.expand_as(images), mean) == pytest.approx(1)
    assert spectrum.relative_error(images, images, mean) == pytest.approx(0)
    assert np.isnan(spectrum.relative_error(images[:, :, :1, :1], images[:, :, :1, :1], mean[:, :1, :1])[1:]).all()


@pytest.fixture
def run(output, make_study):
    study = make_study("train.keep=[]", "train.steps=6", "analysis.n=40", "analysis.timesteps=[0.05, 0.6]")
    chosen = Run(study, "vanilla", 0)
    fit(chosen, progress=False)
    return chosen


def test_measure_of_a_run(run):
    table = spectrum.measure(run, fit_images=100)
    # Teacher: 4 blocks and the final tokens; student: 2 steps with 3 blocks; 5 bands.
    assert table["who"].value_counts().to_dict() == {"student": 30, "teacher": 25}
    assert set(table["n"]) == {40}
    assert set(table[table["who"] == "student"]["t"]) == {0.05}
    assert table["relative_error"].between(0, 1.2).all()
    assert spectrum.measure(run, fit_images=100).equals(table)

    # Untrained blocks pass the embedded patch on: only the noise is missing.
    fresh = table[(table["step"] == 0) & (table["who"] == "student")]
    assert (fresh.groupby("band_low")["relative_error"].max() < 0.2).all()

    seen = spectrum.sides(run, 100)
    teacher = find_teacher(run.study)
    readout = spectrum.fit_readout(teacher(seen.fit.images).tokens, seen.fit.x, (4, 4))
    again = readout.reconstruct(teacher(seen.held_out.images).tokens)
    expected = spectrum.relative_error(seen.held_out.x, again, readout.image_mean)
    found = table[(table["who"] == "teacher") & (table["block"] == 4)]["relative_error"]
    assert found.to_numpy() == pytest.approx(expected, abs=1e-6)

    table.insert(0, "seed", 0)
    table.insert(0, "arm", "vanilla")
    drawn = figures.error_per_band(table, "vanilla", 6)
    assert [len(axis.get_legend().get_texts()) for axis in drawn.axes] == [5, 3]
    assert len(figures.error_by_arm(table, 6).axes) == 5


def test_a_students_readout_is_of_clean_images_from_noised_ones(run):
    seen, model = spectrum.sides(run, 100), probe.student_at(run, 0)
    low, high = (
        spectrum.relative_error(seen.held_out.x, again, readout.image_mean)
        for readout, again in (spectrum.read_student(model, 0, seen, t, seed=0) for t in (0.0, 0.5))
    )
    assert low == pytest.approx(0, abs=1e-4)
    assert (high > low + 0.05).all()


def test_reconstructions_are_rows_of_images(run):
    rows = spectrum.reconstructions(run, step=0, t=0.0, count=4, fit_images=60)
    assert len(rows) == 1 + 5 + 3
    assert {(images.shape, str(images.dtype)) for images in rows.values()} == {((4, 1, 8, 8), "uint8")}
    close = np.abs(rows["student, block 2"].astype(int) - rows["held-out image"]).max()
    assert close <= 2
    assert figures.image_rows(rows).axes


@pytest.mark.filterwarnings("ignore:token grids differ")
def test_a_teacher_whose_grid_does_not_divide_the_image_is_carried_to_one_that_does(output, make_study):
    study = make_study(
        "teacher.kwargs={img_size: 12, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 4, num_heads: 4}",
        "analysis.n=30",
    )
    chosen = Run(study, "vanilla", 0)
    readout, again = spectrum.read_teacher(find_teacher(study), 4, spectrum.sides(chosen, 50))
    assert readout.grid == (4, 4)
    assert again.shape == (30, 1, 8, 8)
