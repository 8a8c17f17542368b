from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from haste_core import interpolant
from haste_core.paths import shifted


@pytest.fixture(params=[(3,), (2, 5), (2, 1, 4, 4)], ids=str)
def case(request):
    """x, eps and t in (0, 1) for a batch of 6 in several shapes, float64."""
    generator = torch.Generator().manual_seed(len(request.param))
    x, eps = (torch.randn(6, *request.param, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, eps, torch.linspace(0.05, 0.95, 6, dtype=torch.float64)


def test_path_runs_from_data_to_noise(case):
    x, eps, t = case
    assert torch.equal(interpolant.interpolate(x, eps, torch.zeros(6)), x)
    assert torch.equal(interpolant.interpolate(x, eps, torch.ones(6)), eps)
    x_t = interpolant.interpolate(x, eps, t)
    for i in range(6):
        assert_close(x_t[i], (1 - float(t[i])) * x[i] + float(t[i]) * eps[i])


def test_velocity_is_the_time_derivative_of_the_path(case):
    x, eps, t = case
    later, earlier = (interpolant.interpolate(x, eps, t + h) for h in (0.01, -0.01))
    derivative = (later - earlier) / 0.02
    assert_close(interpolant.velocity(x, eps), derivative)


def test_data_and_noise_come_back_from_the_velocity(case):
    x, eps, t = case
    x_t, v = interpolant.interpolate(x, eps, t), interpolant.velocity(x, eps)
    assert_close(interpolant.data_from_velocity(v, x_t, t), x)
    assert_close(interpolant.noise_from_velocity(v, x_t, t), eps)


def test_recovered_data_and_noise_give_the_same_point_and_velocity_for_any_prediction(case):
    x_t, v, t = case
    x, eps = interpolant.data_from_velocity(v, x_t, t), interpolant.noise_from_velocity(v, x_t, t)
    assert_close(interpolant.interpolate(x, eps, t), x_t)
    assert_close(interpolant.velocity(x, eps), v)


def test_score_is_that_of_the_gaussian_around_the_scaled_data_point(case):
    """Given one data point the marginal at t is N((1 - t) x, t^2), whose score is (mean - x_t) / variance."""
    x, eps, t = case
    x_t = interpolant.interpolate(x, eps, t)
    score = interpolant.score_from_velocity(interpolant.velocity(x, eps), x_t, t)
    for i in range(6):
        assert_close(score[i], ((1 - t[i]) * x[i] - x_t[i]) / t[i] ** 2)


def test_score_of_a_gaussian_data_distribution_has_its_closed_form(case):
    """Data N(m, s^2): x_t is N((1 - t) m, (1 - t)^2 s^2 + t^2), by autograd of its log density."""
    x_t, _, t = case
    m, s = 0.7, 1.4
    shape = (-1, *[1] * (x_t.dim() - 1))
    mean, variance = (1 - t.reshape(shape)) * m, (1 - t.reshape(shape)) ** 2 * s**2 + t.reshape(shape) ** 2
    expected_noise = t.reshape(shape) / variance * (x_t - mean)
    expected_data = m + (1 - t.reshape(shape)) * s**2 / variance * (x_t - mean)
    point = x_t.clone().requires_grad_()
    torch.distributions.Normal(mean, variance.sqrt()).log_prob(point).sum().backward()
    assert_close(interpolant.score_from_velocity(expected_noise - expected_data, x_t, t), point.grad)


def test_a_shift_moves_draws_towards_noise_and_keeps_the_ends():
    u = torch.linspace(0, 1, 101)
    assert shifted(u, 1) is u
    assert shifted(u, 3)[[0, 100]].tolist() == [0, 1]
    # Half of the draws lie above s / (1 + s), and a shift is undone by its inverse.
    assert shifted(torch.tensor([0.5]), 3).item() == pytest.approx(0.75)
    assert_close(shifted(shifted(u, 3), 1 / 3), u)
