"""Improved DDPM, the objective and sampler of DiT: noise and learned variance on the linear schedule of 1000 steps.

Not in the HASTE paper but in what it builds on: Nichol and Dhariwal, arXiv 2102.09672 (Eqs. 15, 16); Peebles and Xie,
arXiv 2212.09748. Schedules are float64, the variational bound is in bits per value.

Shapes: x, eps (B, C, ...); a network's output (B, 2C, ...), first the noise, then the values that interpolate the
log-variance; t (B,) int64 in 0 .. 999, 0 next to data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from haste_core.interpolant import expand

STEPS = 1000


class Posterior(NamedTuple):
    """The Gaussian over x_{t-1} given x_t: mean, variance, log-variance and the clean image behind it, all like x."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    clean: Tensor


class Losses(NamedTuple):
    """Per value, like x: the noise's square error, the variational part in bits, and their sum."""

    mse: Tensor
    variational: Tensor
    total: Tensor


class Schedule:
    """A linear noise schedule, whole or thinned out to `kept` evenly spread timesteps.

    `timesteps` (n,) int64 are the original timesteps, which the network is given; all other tables are (n,) float64
    for the thinned chain.
    """

    def __init__(self, kept: int = STEPS) -> None:
        if not 1 <= kept <= STEPS:
            raise ValueError(f"{kept} DDPM steps; possible: 1 to {STEPS}")
        betas = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
        whole = torch.cumprod(1 - betas, 0)
        stride = (STEPS - 1) / (kept - 1) if kept > 1 else 1.0
        # Repeated addition, then Python's rounding of halves to even, as in the published samplers: a product would
        # choose other timesteps for some values of `kept`.
        spread = itertools.accumulate(itertools.repeat(stride, kept - 1), initial=0.0)
        self.timesteps = torch.tensor([round(position) for position in spread])
        self.signal = whole[self.timesteps]  # alpha bar
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.signal[:-1]])
        self.betas = 1 - self.signal / before
        self.variance = self.betas * (1 - before) / (1 - self.signal)
        # The variance of the last step is zero; its logarithm is taken to be that of the step before it.
        self.log_variance = torch.cat([self.variance[1:2], self.variance[1:]]).log() if kept > 1 else self.betas.log()
        self.clean_weight = self.betas * before.sqrt() / (1 - self.signal)
        self.x_t_weight = (1 - before) * (1 - self.betas).sqrt() / (1 - self.signal)

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, table: Tensor, index: Tensor, like: Tensor) -> Tensor:
        """Entries of a table at `index` (B,), shaped to be multiplied with `like` and in its dtype."""
        return expand(table.to(like.device)[index].to(like.dtype), like)

    def noised(self, x: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        """x_t, like x."""
        return self.at(self.signal.sqrt(), index, x) * x + self.at((1 - self.signal).sqrt(), index, x) * eps

    def posterior(self, output: Tensor, x_t: Tensor, index: Tensor) -> Posterior:
        """What the network's output (B, 2C, ...) says about the step before `index` (B,), without clipping."""
        eps, between = output.chunk(2, dim=1)
        share = (between + 1) / 2
        smallest, largest = self.at(self.log_variance, index, x_t), self.at(self.betas.log(), index, x_t)
        log_variance = share * largest + (1 - share) * smallest
        x_t_share, eps_share = (1 / self.signal).sqrt(), (1 / self.signal - 1).sqrt()
        clean = self.at(x_t_share, index, x_t) * x_t - self.at(eps_share, index, x_t) * eps
        return Posterior(self._mean(clean, x_t, index), log_variance.exp(), log_variance, clean)

    def losses(self, output: Tensor, x: Tensor, eps: Tensor, index: Tensor) -> Losses:
        """The hybrid loss: the noise alone drives the mean, the variational bound the variance alone."""
        x_t, (predicted, between) = self.noised(x, eps, index), output.chunk(2, dim=1)
        mse = (predicted - eps).square()
        held = self.posterior(torch.cat([predicted.detach(), between], dim=1), x_t, index)
        true_mean, true_log = self._mean(x, x_t, index), self.at(self.log_variance, index, x).expand_as(x)
        kl = _gaussian_kl(true_mean, true_log, held.mean, held.log_variance)
        likelihood = -_discretised_log_likelihood(x, held.mean, held.log_variance / 2)
        variational = torch.where(expand(index, x) == 0, likelihood, kl) / math.log(2)
        return Losses(mse, variational, mse + variational)

    def _mean(self, clean: Tensor, x_t: Tensor, index: Tensor) -> Tensor:
        return self.at(self.clean_weight, index, x_t) * clean + self.at(self.x_t_weight, index, x_t) * x_t


def ancestral(
    network: Callable[[Tensor, float], Tensor], x: Tensor, steps: int, noise: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """x taken from noise to data by ancestral sampling on `steps` evenly spread timesteps; float64.

    Args:
        network: (x (B, C, ...) float64, timestep) to the output (B, 2C, ...) float64.
        x: standard normal noise. steps: at most 1000. noise: the increment of solver step i, shaped like x.
    """
    schedule, x = Schedule(steps), x.double()
    for i, index in enumerate(reversed(range(steps))):
        at = torch.full((len(x),), index, device=x.device)
        found = schedule.posterior(network(x, float(schedule.timesteps[index])), x, at)
        x = found.mean if index == 0 else found.mean + (found.log_variance / 2).exp() * noise(i, x).double()
    return x


def _gaussian_kl(mean_a: Tensor, log_a: Tensor, mean_b: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of diagonal Gaussians in nats, per value."""
    return 0.5 * (log_b - log_a - 1 + (log_a - log_b).exp() + (mean_a - mean_b).square() * (-log_b).exp())


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The log-probability of x, one of 256 levels in [-1, 1], under a Gaussian, in nats per value."""

    def cdf(values: Tensor) -> Tensor:
        # The tanh approximation of the normal CDF that the published bound is defined with.
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))

    centred, inverse = x - mean, (-log_std).exp()
    upper, lower = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp_min(1e-12).log()
