"""The denoising loss by noise level against numbers derived by hand, and the order of solvers on uneven grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from haste_core import paths, sampling
from haste_core.errors import HasteError
from haste_core.paths import objective_of
from haste_core.seeding import stream
from haste_core.study import config, denoising
from haste_core.study.data import open_dataset
from haste_core.study.train import student_of


class Constant(torch.nn.Module):
    """A generator with a constant output."""

    kind = "sit"

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, x, t, y):
        return torch.full_like(x, self.value)


class Exact(Constant):
    """A generator for a single image, whose velocity is exact: eps - x = (x_t - x) / t."""

    def forward(self, x, t, y):
        return (x - self.value) / t.reshape(-1, 1, 1, 1)


def images(n=40, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.zeros(n).long()


def test_the_loss_of_a_zero_output_is_the_mean_square_of_the_target():
    x, y = images(500)
    for row in denoising.losses(Constant(), x, y, draws=3, seed=1):
        assert row["loss"] == pytest.approx(1 + float(x.square().mean()), rel=0.02)
        assert row["nats"] == pytest.approx((1 - row["t"]) / row["t"] * 64 * row["loss"], rel=1e-5)


def test_an_exact_velocity_has_no_loss():
    x = torch.full((10, 1, 8, 8), 0.25)
    assert max(row["loss"] for row in denoising.losses(Exact(0.25), x, torch.zeros(10).long(), 2, 0)) < 1e-9


def test_noise_is_the_same_for_every_generator_and_level_and_another_for_another_seed():
    x, y = images()
    first, again, other = (denoising.losses(Constant(), x, y, 2, seed) for seed in (5, 5, 6))
    assert first == again != other
    # Levels share their draws, so without a network in between the loss is the same number at each.
    assert len({row["loss"] for row in first}) == 1


def test_summaries_are_means_over_their_levels_and_an_integral_in_log_t():
    rows = [{"split": "held-out", "t": t, "loss": 10 * t, "nats": 1 / t} for t in denoising.LEVELS]
    rows += [{"split": "training", "t": t, "loss": 99.0, "nats": 99.0} for t in denoising.LEVELS]
    found = denoising.summaries(reversed(rows))
    assert tuple(found) == denoising.SUMMARIES
    assert found["near_data"] == pytest.approx(10 * (0.02 + 0.05 + 0.1) / 3)
    assert found["structure"] == pytest.approx(10 * (0.3 + 0.5 + 0.7 + 0.9) / 4)
    assert found["denoising"] == pytest.approx(10 * np.mean(denoising.LEVELS))
    assert found["nats"] == pytest.approx(math.log(0.9 / 0.02))  # the integral of 1 / t


def test_outputs_that_are_not_finite_are_an_error():
    with pytest.raises(HasteError, match=r"t = 0.02 is nan"):
        denoising.losses(Constant(math.nan), *images(), 1, 0)


def test_the_probe_is_every_held_out_image_and_a_third_as_many_augmented_training_images(tiny):
    dataset = open_dataset(tiny.data)
    probe, again = (denoising.Probe(dataset, 10_000, 0) for _ in range(2))
    assert torch.equal(probe.splits["held-out"][0], dataset.images("test")[0])
    assert len(probe.splits["training"][0]) == 150
    assert torch.equal(probe.splits["training"][0], again.splits["training"][0])
    known = {tuple(x.flatten().tolist()) for x in dataset.images("train")[0]}
    assert sum(tuple(x.flatten().tolist()) in known for x in probe.splits["training"][0]) < 10
    assert [len(x) for x, _ in denoising.Probe(dataset, 30, 0).splits.values()] == [30, 10]


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_every_kind_of_generator_is_measured_by_its_own_loss(kind, tiny, randomise):
    dataset = open_dataset(tiny.data)
    settings = config.ModelSettings(kind=kind, depth=2, width=32, heads=4)
    model = randomise(student_of(settings, 8, 1, 10, seed=0)).eval()
    rows = denoising.Probe(dataset, 20, 0).measure(model)
    found = [(row["split"], row["n"], row["draws"]) for row in rows[:: len(denoising.LEVELS)]]
    assert found == [("held-out", 20, 3), ("training", 7, 1)]
    # The same by hand, for one level.
    x, y = dataset.images("test", 20)
    eps = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(stream("denoising held-out", 0)))
    objective = objective_of(kind)
    t = objective.timesteps(torch.full((20,), 0.3))
    with torch.no_grad():
        outputs = [model(objective.noised(x, e, t), t, y) for e in eps]
    expected = np.mean([float(objective.loss(o, x, e, t).mean()) for o, e in zip(outputs, eps, strict=True)])
    row = next(row for row in rows if row["t"] == 0.3)
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_bound_of_ddpm_is_its_variational_term_in_nats():
    # Over all timesteps the integral of the bound is the sum of the chain's terms: 1000 terms span one unit of t.
    objective, (x, _) = objective_of("dit"), images(2)
    t = torch.tensor([10, 500])
    output = torch.zeros(2, 2, 8, 8)
    bits = paths.DDPMSchedule().losses(output, x, x, t)[1].flatten(1).sum(1)
    assert objective.bound(output, x, x, t) == pytest.approx(1000 * math.log(2) * bits.double(), rel=1e-6)


def test_the_bound_of_velocity_is_half_the_rate_of_log_snr_times_the_noises_error():
    objective, (x, _), (eps, _) = objective_of("sit"), images(1), images(1, seed=1)
    t = torch.tensor([0.2], dtype=torch.float64)
    v = torch.full_like(x, 0.3)
    x_t = 0.8 * x + 0.2 * eps
    noise_error = ((x_t + 0.8 * v) - eps).double().square().sum()  # the noise that v implies, minus the noise
    rate = 2 / (0.2 * 0.8)  # -d/dt log((1 - t)^2 / t^2)
    assert float(objective.bound(v, x, eps, t)) == pytest.approx(float(0.5 * rate * noise_error), rel=1e-5)


@pytest.mark.parametrize(("sampler", "order"), [(sampling.euler, 1), (sampling.heun, 2)])
def test_solvers_keep_their_order_on_a_quadratic_grid(sampler, order):
    # dx/dt = x from 1 to 0: x(0) = x(1) / e.
    def error(steps):
        return abs(float(sampler(lambda x, t: x, torch.ones(1, 1), steps, "quadratic")) - math.exp(-1))

    assert error(40) / error(80) == pytest.approx(2**order, rel=0.15)
