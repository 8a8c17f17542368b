"""The path between data and noise, and the meaning of a network's output on it. The only home of these formulas.

The linear path x_t = (1 - t) x + t eps with its velocity and score (Sec. 2.1, arXiv 2505.16792), for SiT and MM-DiT;
improved DDPM on the linear schedule of 1000 steps with noise and learned variance (Eqs. 15, 16, arXiv 2102.09672), for
DiT (arXiv 2212.09748). t = 0 is data, t = 1 noise; DDPM timesteps run from 0, next to data, to 999.

Shapes: x, eps, velocity (B, ...); a DDPM network's output (B, 2C, ...), first the noise, then the values that
interpolate the log-variance. DDPM tables are float64, its variational bound is in bits per value.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

DDPM_STEPS = 1000


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) as (B, 1, ...), to be multiplied with `like` (B, ...)."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


# -- the linear path --------------------------------------------------------------------------------------------------


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps."""
    t = expand(t, x)
    return (1 - t) * x + t * eps


def velocity(x: Tensor, eps: Tensor) -> Tensor:
    """The regression target dx_t/dt = eps - x, the same at every t."""
    return eps - x


def score_from_velocity(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The score of the marginal at t > 0: -((1 - t) v + x_t) / t, minus the implied noise over t."""
    t = expand(t, x_t)
    return -(x_t + (1 - t) * v) / t


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise levels shift u / (1 + (shift - 1) u) of uniform draws u (B,) in [0, 1]; u itself for a shift of 1.

    Above 1 high noise becomes more frequent: half of the draws lie above shift / (1 + shift). Sec. 5.3.2,
    arXiv 2403.03206.
    """
    return u if shift == 1 else shift * u / (1 + (shift - 1) * u)


# -- improved DDPM ----------------------------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """The Gaussian over x_{t-1} given x_t: mean, log-variance and the clean image behind it, all like x."""

    mean: Tensor
    log_variance: Tensor
    clean: Tensor


class DDPMSchedule:
    """A linear noise schedule, whole or thinned out to `kept` evenly spread timesteps.

    `timesteps` (n,) int64 are the original timesteps, which the network is given; all other tables are (n,) float64
    for the thinned chain.
    """

    def __init__(self, kept: int = DDPM_STEPS) -> None:
        if not 1 <= kept <= DDPM_STEPS:
            raise ValueError(f"{kept} DDPM steps; expected 1 to {DDPM_STEPS}")
        betas = torch.linspace(1e-4, 0.02, DDPM_STEPS, dtype=torch.float64)
        whole = torch.cumprod(1 - betas, 0)
        stride = (DDPM_STEPS - 1) / (kept - 1) if kept > 1 else 1.0
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

    def at(self, table: Tensor, index: Tensor, like: Tensor) -> Tensor:
        """Entries of a table at `index` (B,), shaped to be multiplied with `like` and in its dtype."""
        return expand(table.to(like.device)[index].to(like.dtype), like)

    def noised(self, x: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        """x_t, like x."""
        return self.at(self.signal.sqrt(), index, x) * x + self.at((1 - self.signal).sqrt(), index, x) * eps

    def posterior(self, output: Tensor, x_t: Tensor, index: Tensor) -> Posterior:
        """Posterior of the step before `index` (B,) from the network's output (B, 2C, ...), without clipping."""
        eps, between = output.chunk(2, dim=1)
        share = (between + 1) / 2
        smallest, largest = self.at(self.log_variance, index, x_t), self.at(self.betas.log(), index, x_t)
        log_variance = share * largest + (1 - share) * smallest
        x_t_share, eps_share = (1 / self.signal).sqrt(), (1 / self.signal - 1).sqrt()
        clean = self.at(x_t_share, index, x_t) * x_t - self.at(eps_share, index, x_t) * eps
        return Posterior(self._mean(clean, x_t, index), log_variance, clean)

    def losses(self, output: Tensor, x: Tensor, eps: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The noise's squared error and the variational bound in bits, per value and like x; the loss is their sum.

        The bound trains the variance alone: its mean is detached.
        """
        x_t, (predicted, between) = self.noised(x, eps, index), output.chunk(2, dim=1)
        held = self.posterior(torch.cat([predicted.detach(), between], dim=1), x_t, index)
        true_mean, true_log = self._mean(x, x_t, index), self.at(self.log_variance, index, x).expand_as(x)
        kl = _gaussian_kl(true_mean, true_log, held.mean, held.log_variance)
        likelihood = -_discretised_log_likelihood(x, held.mean, held.log_variance / 2)
        return (predicted - eps).square(), torch.where(expand(index, x) == 0, likelihood, kl) / math.log(2)

    def _mean(self, clean: Tensor, x_t: Tensor, index: Tensor) -> Tensor:
        return self.at(self.clean_weight, index, x_t) * clean + self.at(self.x_t_weight, index, x_t) * x_t


def _gaussian_kl(mean_a: Tensor, log_a: Tensor, mean_b: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of diagonal Gaussians with these log-variances in nats, per value."""
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


# -- the loss of a network --------------------------------------------------------------------------------------------


class Objective:
    """The path of SiT and MM-DiT and their loss: the velocity (Sec. 2.1, arXiv 2505.16792). t is the noise level."""

    def timesteps(self, u: Tensor) -> Tensor:
        """The network's timesteps (B,) for noise levels u (B,) in [0, 1]: 0 data, 1 noise."""
        return u

    def noised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x at timesteps t (B,) from `timesteps`."""
        return interpolate(x, eps, t)

    def loss(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The denoising loss per value, float32 and shaped like x."""
        return (output.float() - velocity(x, eps)).square()

    def bound(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The integrand over noise levels of the bound on the negative log-likelihood, (B,) float64.

        In nats per image and unit of t: (1 - t) / t times the squared error, half the fall of log SNR times the noise's
        error, which is 1 - t times the velocity's (Eq. 17, arXiv 2107.00630).
        """
        return self.loss(output, x, eps, t).double().flatten(1).sum(1) * (1 - t.double()) / t.double()


class NoiseVarianceObjective(Objective):
    """DiT: improved DDPM with 1000 linear steps (Table 16, arXiv 2505.16792). t is an integer in 0 .. 999."""

    def __init__(self) -> None:
        self.schedule = DDPMSchedule()

    def timesteps(self, u: Tensor) -> Tensor:
        """floor(1000 u), at most 999, (B,) int64."""
        return (u * DDPM_STEPS).long().clamp_max(DDPM_STEPS - 1)

    def noised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of the DDPM chain."""
        return self.schedule.noised(x, eps, t)

    def loss(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The hybrid loss (Eq. 16, arXiv 2102.09672)."""
        squared_error, bits = self._losses(output, x, eps, t)
        return squared_error + bits

    def bound(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The variational term of the timestep in nats; 1000 timesteps span one unit of t."""
        bits = self._losses(output, x, eps, t)[1]
        return DDPM_STEPS * math.log(2) * bits.double().flatten(1).sum(1)

    def _losses(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return self.schedule.losses(output.float(), x, eps, t)


def objective_of(kind: str) -> Objective:
    """The objective of a kind of model: "sit", "mmdit" or "dit"."""
    return NoiseVarianceObjective() if kind == "dit" else Objective()
