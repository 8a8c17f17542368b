"""Improved DDPM derived a second time: plain loops, Bayes' rule, torch.distributions, a case with an exact answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from haste_core import ddpm, sampling
from haste_core.paths import NoiseVarianceObjective, Schedule, Velocity, objective_of
from haste_core.study import config


def signals():
    """alpha bar of all 1000 timesteps by a plain loop in float64."""
    product, found = 1.0, []
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        product *= 1 - beta
        found.append(product)
    return found


def chosen_timesteps(kept):
    """The timesteps of a thinned chain: a position that moves on by an equal stride, rounded half to even."""
    stride, position, found = 999 / (kept - 1), 0.0, []
    for _ in range(kept):
        found.append(int(np.rint(position)))
        position += stride
    return found


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kept", [2, 3, 10, 21, 61, 250, 999, 1000])
def test_tables_of_whole_and_thinned_chains_equal_plain_loops(kept):
    schedule, whole = Schedule(kept), signals()
    steps = chosen_timesteps(kept)
    assert schedule.timesteps.tolist() == steps
    assert (steps[0], steps[-1], len(schedule)) == (0, 999, kept)
    assert len(set(steps)) == kept
    before, variances = 1.0, []
    for i, t in enumerate(steps):
        beta = 1 - whole[t] / before
        variances.append(beta * (1 - before) / (1 - whole[t]))
        assert_close(schedule.signal[i].item(), whole[t], rtol=1e-12, atol=0.0)
        assert_close(schedule.betas[i].item(), beta, rtol=1e-9, atol=0.0)
        assert_close(schedule.variance[i].item(), variances[i], rtol=1e-9, atol=0.0)
        assert_close(schedule.clean_weight[i].item(), math.sqrt(before) * beta / (1 - whole[t]), rtol=1e-9, atol=0.0)
        before = whole[t]
    expected = [math.log(variances[max(i, 1)]) for i in range(kept)]
    assert_close(schedule.log_variance.tolist(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kept", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(kept):
    with pytest.raises(ValueError, match="1 to 1000"):
        Schedule(kept)


def test_noise_at_the_ends():
    schedule, x, eps = Schedule(), draws(2, 1, 3), draws(2, 1, 3, seed=1)
    first, last = schedule.noised(x, eps, torch.tensor([0, 999]))
    assert_close(first, math.sqrt(1 - 1e-4) * x[0] + 1e-2 * eps[0], atol=1e-9, rtol=1e-9)
    assert (last - eps[1]).abs().max() < 0.02 * x.abs().max()


@pytest.mark.parametrize(("kept", "index"), [(1000, 1), (1000, 500), (1000, 999), (10, 1), (10, 5), (250, 249)])
def test_true_posterior_is_bayes_rule_on_a_grid(kept, index):
    """q(x_before | x_t, x) is proportional to q(x_t | x_before) q(x_before | x), here summed on a fine grid."""
    schedule, x = Schedule(kept), 0.3
    signal, before = schedule.signal[index].item(), schedule.signal[index - 1].item()
    x_t = math.sqrt(signal) * x - 0.7 * math.sqrt(1 - signal)
    beta, spread = 1 - signal / before, math.sqrt(1 - before)
    grid = np.linspace(math.sqrt(before) * x - 12 * spread, math.sqrt(before) * x + 12 * spread, 400_001)
    prior = -((grid - math.sqrt(before) * x) ** 2) / (2 * spread**2)
    log = prior - (x_t - math.sqrt(1 - beta) * grid) ** 2 / (2 * beta)
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    at, eps = torch.tensor([index]), (x_t - math.sqrt(signal) * x) / math.sqrt(1 - signal)
    output = torch.tensor([[[eps], [-1.0]]], dtype=torch.float64)  # the exact noise, the smaller of both variances
    found = schedule.posterior(output, torch.full((1, 1, 1), x_t, dtype=torch.float64), at)
    assert_close(found.clean.item(), x, atol=1e-8, rtol=1e-8)
    assert_close(found.mean.item(), mean, atol=1e-6, rtol=1e-6)
    assert_close(found.variance.item(), variance, atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize(("between", "share"), [(-1.0, 0.0), (0.0, 0.5), (1.0, 1.0), (3.0, 2.0)])
def test_variance_lies_between_its_bounds_on_a_logarithmic_scale(between, share):
    schedule, index = Schedule(), torch.tensor([300])
    output = torch.tensor([[[0.7], [between]]], dtype=torch.float64)
    found = schedule.posterior(output, draws(1, 1, 1), index)
    small, large = schedule.variance[300].item(), schedule.betas[300].item()
    assert small < large
    assert_close(found.variance.item(), small ** (1 - share) * large**share, rtol=1e-9, atol=0.0)
    assert_close(found.log_variance.item(), math.log(found.variance.item()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [1, 2, 300, 999])
def test_variational_part_is_the_divergence_in_bits(t):
    schedule, x, eps, output = Schedule(), draws(2, 3, 4), draws(2, 3, 4, seed=1), draws(2, 6, 4, seed=2)
    losses = schedule.losses(output, x, eps, torch.full((2,), t))
    signal, before = signals()[t], signals()[t - 1]
    beta = 1 - signal / before
    x_t = math.sqrt(signal) * x + math.sqrt(1 - signal) * eps
    variance = beta * (1 - before) / (1 - signal)

    def mean(clean):
        return (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - signal)

    clean = (x_t - math.sqrt(1 - signal) * output[:, :3]) / math.sqrt(signal)
    share = (output[:, 3:] + 1) / 2
    log_variance = share * math.log(beta) + (1 - share) * math.log(variance)
    true, guessed = Normal(mean(x), math.sqrt(variance)), Normal(mean(clean), (log_variance / 2).exp())
    assert_close(losses.variational, kl_divergence(true, guessed) / math.log(2), rtol=1e-6, atol=1e-9)
    assert_close(losses.mse, (output[:, :3] - eps) ** 2)
    assert_close(losses.total, losses.mse + losses.variational)


def test_variational_part_vanishes_for_the_exact_answer_and_nowhere_else():
    schedule, x, eps = Schedule(), draws(3, 2, 4), draws(3, 2, 4, seed=1)
    t = torch.tensor([1, 400, 999])
    exact = torch.cat([eps, -torch.ones_like(eps)], dim=1)
    assert schedule.losses(exact, x, eps, t).total.abs().max() < 1e-9
    other = torch.cat([eps + 0.5, -torch.ones_like(eps)], dim=1)
    assert schedule.losses(other, x, eps, t).variational.min() > 0


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -1.0), (0.5, -3.0), (-0.9, -2.0), (0.99, -0.5), (1.4, -4.0)])
def test_discretised_likelihood_sums_to_one_over_all_levels(mean, log_std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log = ddpm._discretised_log_likelihood(levels, torch.tensor(mean).double(), torch.tensor(log_std).double())
    assert_close(log.exp().sum().item(), 1.0, atol=1e-6, rtol=0.0)


def test_discretised_likelihood_is_the_mass_of_a_level_under_a_normal():
    levels, std = torch.arange(256, dtype=torch.float64) / 127.5 - 1, 0.2
    log = ddpm._discretised_log_likelihood(levels, torch.tensor(0.1).double(), torch.tensor(std).double().log())
    normal = Normal(torch.tensor(0.1).double(), std)
    mass = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    mass[0], mass[-1] = normal.cdf(levels[0] + 1 / 255), 1 - normal.cdf(levels[-1] - 1 / 255)
    assert mass.max() > 0.01
    assert_close(log.exp(), mass, atol=4e-5, rtol=0.02)  # the published bound takes a tanh for the normal CDF


def test_first_timestep_takes_the_likelihood_in_bits():
    schedule, eps = Schedule(), draws(2, 2, 5, seed=1)
    x = (draws(2, 2, 5).clamp(-2, 2) * 60).round() / 127.5
    output = draws(2, 4, 5, seed=2)
    t = torch.tensor([0, 7])
    losses = schedule.losses(output, x, eps, t)
    held = schedule.posterior(output, schedule.noised(x, eps, t), t)
    bits = -ddpm._discretised_log_likelihood(x, held.mean, held.log_variance / 2) / math.log(2)
    assert_close(losses.variational[0], bits[0])
    assert (losses.variational[1] - bits[1]).abs().min() > 1e-3


def test_variance_alone_is_driven_by_the_bound_and_the_noise_alone_by_the_error():
    schedule, x, eps = Schedule(), draws(2, 3, 4), draws(2, 3, 4, seed=1)
    output = draws(2, 6, 4, seed=2).requires_grad_()
    losses = schedule.losses(output, x, eps, torch.tensor([0, 500]))
    (bound,) = torch.autograd.grad(losses.variational.sum(), output, retain_graph=True)
    (error,) = torch.autograd.grad(losses.mse.sum(), output)
    assert torch.equal(bound[:, :3], torch.zeros_like(bound[:, :3]))
    assert torch.equal(error[:, 3:], torch.zeros_like(error[:, 3:]))
    assert bound[:, 3:].abs().min() > 0
    assert error[:, :3].abs().min() > 0


def test_losses_stay_in_the_precision_of_their_inputs_and_agree():
    x, eps, output = draws(3, 2, 4), draws(3, 2, 4, seed=1), draws(3, 4, 4, seed=2)
    t = torch.tensor([0, 1, 999])
    exact = Schedule().losses(output, x, eps, t).total
    single = Schedule().losses(output.float(), x.float(), eps.float(), t).total
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, atol=1e-4, rtol=1e-3)


def exact_noise(mean, std, between):
    """The best possible noise prediction for data that are normal with this mean and standard deviation."""
    whole = signals()

    def network(x, timestep):
        signal = whole[int(timestep)]
        variance = signal * std**2 + 1 - signal
        eps = math.sqrt(1 - signal) * (x - math.sqrt(signal) * mean) / variance
        return torch.cat([eps, torch.full_like(x, between)], dim=1)

    return network


@pytest.mark.parametrize(("kept", "between"), [(1000, 1.0), (1000, -1.0), (250, -1.0), (250, 1.0)])
def test_ancestral_sampling_of_a_gaussian_follows_the_exact_recursion(kept, between):
    """With the exact noise every step is affine, so mean and variance of the result are known without sampling."""
    mean, std, schedule = 0.6, 0.5, Schedule(kept)
    network = exact_noise(mean, std, between)
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

    def noise(_, like):
        return torch.randn(like.shape, generator=generator)

    drawn = ddpm.ancestral(network, x, kept, noise)
    assert drawn.dtype == torch.float64
    # Four standard errors of 5,000 draws.
    assert abs(drawn.mean().item() - m) < 4 * math.sqrt(v / 5000)
    assert abs(drawn.var().item() - v) < 4 * v * math.sqrt(2 / 5000)
    # The chain's own error at this number of steps is small: the data's mean and spread come back.
    assert abs(m - mean) < 0.01
    assert abs(math.sqrt(v) - std) < 0.03


def test_ancestral_sampling_gives_original_timesteps_from_noise_to_data_and_no_noise_last():
    seen, noised = [], []

    def network(x, timestep):
        seen.append(timestep)
        return torch.zeros(len(x), 2 * x.shape[1], x.shape[2], dtype=torch.float64)

    def noise(step, like):
        noised.append(step)
        return torch.zeros_like(like)

    ddpm.ancestral(network, draws(2, 1, 3), 5, noise)
    assert seen == [999.0, 749.0, 500.0, 250.0, 0.0]
    assert noised == [0, 1, 2, 3]


class TwoOutputs(torch.nn.Module):
    """A DiT-like network without weights worth mentioning, sample by sample."""

    kind, channels, image_size, null_label = "dit", 2, 4, 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, y):
        label = y[:, None, None, None].to(x)
        return torch.cat([self.scale * x.sin() + 0.1 * label, (t / 1000)[:, None, None, None] - x.cos()], dim=1)


def test_a_sample_depends_on_its_seed_and_label_and_not_on_its_batch():
    labels, seeds = torch.tensor([0, 1, 2, 0, 1]), [3, 4, 5, 6, 7]
    model = TwoOutputs()

    def drawn(batch, order):
        sample = config.Sample(sampler="ddpm", solver_steps=6, batch_size=batch)
        return sampling.draw(model, labels[order], [seeds[i] for i in order], sample)

    whole = drawn(5, [0, 1, 2, 3, 4])
    assert_close(drawn(2, [0, 1, 2, 3, 4]), whole)
    assert_close(drawn(3, [4, 2, 0, 1, 3])[[2, 3, 1, 4, 0]], whole)
    assert (whole[0] - whole[3]).abs().max() > 0.1  # one label, two seeds


def test_objective_maps_uniform_draws_to_integer_timesteps():
    objective = objective_of("dit")
    assert isinstance(objective, NoiseVarianceObjective)
    u = torch.tensor([0.0, 0.00099, 0.001, 0.5, 0.99999, 1.0])
    t = objective.timesteps(u)
    assert t.tolist() == [0, 0, 1, 500, 999, 999]
    assert t.dtype == torch.int64
    counts = torch.bincount(objective.timesteps((torch.arange(100_000) + 0.5) / 100_000), minlength=1000)
    assert counts.min() == 100
    assert counts.max() == 100


def test_objectives_of_the_other_kinds_are_the_velocity():
    u, x, eps = torch.tensor([0.0, 0.25]), torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    for kind in ("sit", "mmdit"):
        objective = objective_of(kind)
        assert isinstance(objective, Velocity)
        assert objective.timesteps(u) is u
        assert objective.noised(x, eps, u).flatten().tolist() == [1.0, 0.75]
        assert objective.loss(torch.full_like(x, 2.0), x, eps, u).flatten().tolist() == [9.0, 9.0]


def test_objective_computes_its_loss_in_float32_under_autocast():
    objective, x, eps = objective_of("dit"), draws(2, 1, 4).float(), draws(2, 1, 4, seed=1).float()
    output, t = draws(2, 2, 4, seed=2).float(), torch.tensor([0, 500])
    plain = objective.loss(output, x, eps, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = objective.loss(output.bfloat16(), x, eps, t)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, objective.loss(output.bfloat16().float(), x, eps, t))
    assert_close(cast, plain, atol=0.05, rtol=0.05)
