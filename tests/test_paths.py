"""Linear path and improved DDPM derived a second time: plain loops, Bayes' rule, torch.distributions, exact cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

from haste_core import paths, sampling
from haste_core.paths import DDPMSchedule, objective_of, shifted


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the linear path --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(3,), (2, 1, 4, 4)], ids=str)
def case(request):
    """x, eps and t in (0, 1) for a batch of 6, float64."""
    return draws(6, *request.param), draws(6, *request.param, seed=1), torch.linspace(0.05, 0.95, 6).double()


def test_the_path_runs_from_data_to_noise_at_its_velocity(case):
    x, eps, t = case
    assert torch.equal(paths.interpolate(x, eps, torch.zeros(6)), x)
    assert torch.equal(paths.interpolate(x, eps, torch.ones(6)), eps)
    x_t, v = paths.interpolate(x, eps, t), paths.velocity(x, eps)
    for i in range(6):
        assert_close(x_t[i], (1 - float(t[i])) * x[i] + float(t[i]) * eps[i])
    later, earlier = (paths.interpolate(x, eps, t + h) for h in (0.01, -0.01))
    assert_close(v, (later - earlier) / 0.02)


def test_the_score_is_that_of_gaussians(case):
    """For one data point N((1 - t) x, t^2); for data N(m, s^2) by autograd of N((1 - t) m, (1 - t)^2 s^2 + t^2)."""
    x, eps, t = case
    x_t = paths.interpolate(x, eps, t)
    score = paths.score_from_velocity(paths.velocity(x, eps), x_t, t)
    for i in range(6):
        assert_close(score[i], ((1 - t[i]) * x[i] - x_t[i]) / t[i] ** 2)
    (m, s), at = (0.7, 1.4), t.reshape(-1, *[1] * (x.dim() - 1))
    mean, variance = (1 - at) * m, (1 - at) ** 2 * s**2 + at**2
    noise = at / variance * (x - mean)
    data = m + (1 - at) * s**2 / variance * (x - mean)
    point = x.clone().requires_grad_()
    Normal(mean, variance.sqrt()).log_prob(point).sum().backward()
    assert_close(paths.score_from_velocity(noise - data, x, t), point.grad)


def test_a_shift_moves_draws_towards_noise_and_keeps_the_ends():
    u = torch.linspace(0, 1, 101)
    assert shifted(u, 1) is u
    assert shifted(u, 3)[[0, 100]].tolist() == [0, 1]
    # Half of the draws lie above s / (1 + s), and a shift is undone by its inverse.
    assert shifted(torch.tensor([0.5]), 3).item() == pytest.approx(0.75)
    assert_close(shifted(shifted(u, 3), 1 / 3), u)


# -- improved DDPM ----------------------------------------------------------------------------------------------------


def signals():
    """alpha bar of all 1000 timesteps by a plain loop in float64."""
    product, found = 1.0, []
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        found.append(product)
    return found


def chosen_timesteps(kept):
    """The timesteps of a thinned chain: a position that moves on by an equal stride, rounded half to even."""
    stride, position, found = 999 / (kept - 1), 0.0, []
    for _ in range(kept):
        found.append(int(np.rint(position)))
        position += stride
    return found


@pytest.mark.parametrize("kept", [2, 21, 250, 1000])
def test_tables_of_whole_and_thinned_chains_equal_plain_loops(kept):
    schedule, whole = DDPMSchedule(kept), signals()
    steps = chosen_timesteps(kept)
    assert schedule.timesteps.tolist() == steps
    assert (steps[0], steps[-1], len(set(steps))) == (0, 999, kept)
    before, variances = 1.0, []
    for i, t in enumerate(steps):
        beta = 1 - whole[t] / before
        variances.append(beta * (1 - before) / (1 - whole[t]))
        expected = [whole[t], beta, variances[i], math.sqrt(before) * beta / (1 - whole[t])]
        tables = schedule.signal, schedule.betas, schedule.variance, schedule.clean_weight
        assert [table[i].item() for table in tables] == pytest.approx(expected, rel=1e-9, abs=0)
        before = whole[t]
    expected = [math.log(variances[max(i, 1)]) for i in range(kept)]
    assert_close(schedule.log_variance.tolist(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kept", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(kept):
    with pytest.raises(ValueError, match="1 to 1000"):
        DDPMSchedule(kept)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.05), (0.99, 0.6), (1.4, 0.02)])
def test_first_timestep_takes_the_mass_of_a_level_under_a_normal_in_bits(mean, std):
    """All 256 levels, each as a sample of one value whose prediction has this mean and standard deviation."""
    schedule, levels = DDPMSchedule(), torch.arange(256, dtype=torch.float64).reshape(256, 1, 1) / 127.5 - 1
    eps, at = torch.zeros_like(levels), torch.zeros(256, dtype=torch.int64)
    x_t = schedule.noised(levels, eps, at)
    noise = (x_t - math.sqrt(schedule.signal[0]) * mean) / math.sqrt(1 - schedule.signal[0])
    small, large = schedule.log_variance[0], schedule.betas[0].log()
    between = 2 * (2 * math.log(std) - small) / (large - small) - 1
    output = torch.cat([noise, torch.full_like(noise, between)], dim=1)
    assert_close(schedule.posterior(output, x_t, at).mean, torch.full_like(levels, mean), atol=1e-9, rtol=1e-9)
    mass = (-math.log(2) * schedule.losses(output, levels, eps, at)[1]).exp().flatten()
    assert_close(mass.sum().item(), 1.0, atol=1e-6, rtol=0.0)
    normal, levels = Normal(torch.tensor(mean).double(), std), levels.flatten()
    expected = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    expected[0], expected[-1] = normal.cdf(levels[0] + 1 / 255), 1 - normal.cdf(levels[-1] - 1 / 255)
    assert_close(mass, expected, atol=4e-4, rtol=0.02)  # the published bound takes a tanh for the normal CDF


def test_variance_alone_is_driven_by_the_bound_and_the_noise_alone_by_the_error():
    schedule, x, eps = DDPMSchedule(), draws(2, 3, 4), draws(2, 3, 4, seed=1)
    output = draws(2, 6, 4, seed=2).requires_grad_()
    squared_error, bits = schedule.losses(output, x, eps, torch.tensor([0, 500]))
    (bound,) = torch.autograd.grad(bits.sum(), output, retain_graph=True)
    (error,) = torch.autograd.grad(squared_error.sum(), output)
    assert torch.equal(bound[:, :3], torch.zeros_like(bound[:, :3]))
    assert torch.equal(error[:, 3:], torch.zeros_like(error[:, 3:]))
    assert bound[:, 3:].abs().min() > 0
    assert error[:, :3].abs().min() > 0


@pytest.mark.parametrize(("kept", "between"), [(1000, 1.0), (250, -1.0)])
def test_ancestral_sampling_of_a_gaussian_follows_the_exact_recursion(kept, between):
    """With the exact noise every step is affine, so mean and variance of the result are known without sampling."""
    mean, std, schedule, whole = 0.6, 0.5, DDPMSchedule(kept), signals()

    def network(x, timestep):
        signal = whole[int(timestep)]
        eps = math.sqrt(1 - signal) * (x - math.sqrt(signal) * mean) / (signal * std**2 + 1 - signal)
        return torch.cat([eps, torch.full_like(x, between)], dim=1)

    m, v = 0.0, 1.0
    for index in reversed(range(kept)):
        signal = schedule.signal[index].item()
        # E[x | x_t] for a normal prior, and from it the affine map x_t -> mean of the step before.
        gain = math.sqrt(signal) * std**2 / (signal * std**2 + 1 - signal)
        a = schedule.clean_weight[index].item() * gain + schedule.x_t_weight[index].item()
        b = schedule.clean_weight[index].item() * mean * (1 - gain * math.sqrt(signal))
        log = schedule.betas[index].log().item() if between > 0 else schedule.log_variance[index].item()
        m, v = a * m + b, a * a * v + (math.exp(log) if index else 0.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 1, 1, generator=generator)
    drawn = sampling.ancestral(network, x, kept, lambda _, like: torch.randn(like.shape, generator=generator))
    assert drawn.dtype == torch.float64
    # Four standard errors of 5,000 draws.
    assert abs(drawn.mean().item() - m) < 4 * math.sqrt(v / 5000)
    assert abs(drawn.var().item() - v) < 4 * v * math.sqrt(2 / 5000)
    # The chain's own error at this number of steps is small: the data's mean and spread come back.
    assert abs(m - mean) < 0.01
    assert abs(math.sqrt(v) - std) < 0.03


# -- objectives -------------------------------------------------------------------------------------------------------


def test_dits_objective_maps_uniform_draws_to_integer_timesteps():
    objective = objective_of("dit")
    t = objective.timesteps(torch.tensor([0.0, 0.00099, 0.001, 0.5, 0.99999, 1.0]))
    assert t.tolist() == [0, 0, 1, 500, 999, 999]
    assert t.dtype == torch.int64
    counts = torch.bincount(objective.timesteps((torch.arange(100_000) + 0.5) / 100_000), minlength=1000)
    assert (counts.min(), counts.max()) == (100, 100)


@pytest.mark.parametrize("kind", ["sit", "mmdit"])
def test_the_objective_of_the_other_kinds_is_the_velocity(kind):
    u, x, eps = torch.tensor([0.0, 0.25]), torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    objective = objective_of(kind)
    assert objective.timesteps(u) is u
    assert objective.noised(x, eps, u).flatten().tolist() == [1.0, 0.75]
    assert objective.loss(torch.full_like(x, 2.0), x, eps, u).flatten().tolist() == [9.0, 9.0]


def test_the_loss_stays_near_float64_in_float32_under_autocast():
    objective, x, eps, output = objective_of("dit"), draws(3, 2, 4), draws(3, 2, 4, seed=1), draws(3, 4, 4, seed=2)
    t = torch.tensor([0, 1, 999])
    exact = sum(DDPMSchedule().losses(output, x, eps, t))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = objective.loss(output.float(), x.float(), eps.float(), t)
        half = objective.loss(output.bfloat16(), x.float(), eps.float(), t)
    assert single.dtype == half.dtype == torch.float32
    assert_close(single.double(), exact, atol=1e-4, rtol=1e-3)
    assert torch.equal(half, objective.loss(output.bfloat16().float(), x.float(), eps.float(), t))
