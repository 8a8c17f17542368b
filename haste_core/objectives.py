"""What a generator's output means: how training noises an image, and what the denoising loss is.

The draw u of a step is uniform in [0, 1) for every objective, so arms and kinds of model see the same randomness.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from haste_core import ddpm, interpolant


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise levels shift u / (1 + (shift - 1) u) of uniform draws u (B,) in [0, 1]; u itself for a shift of 1.

    Above 1 high noise becomes more frequent: half of the draws lie above shift / (1 + shift). Sec. 5.3.2,
    arXiv 2403.03206.
    """
    return u if shift == 1 else shift * u / (1 + (shift - 1) * u)


class Objective(Protocol):
    """A path from data to noise and the loss of a network on it."""

    def timesteps(self, u: Tensor) -> Tensor:
        """What the network is given for noise levels u (B,) in [0, 1]: 0 data, 1 noise."""
        ...

    def noised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x at timesteps t (B,) from `timesteps`."""
        ...

    def loss(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The denoising loss per value, float32 and shaped like x."""
        ...

    def bound(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The integrand over noise levels of the bound on the negative log-likelihood, (B,) float64.

        In nats per image and unit of t.
        """
        ...


class Velocity:
    """SiT and MM-DiT: the velocity of the linear path (Sec. 2.1, arXiv 2505.16792). t is the noise level itself."""

    def timesteps(self, u: Tensor) -> Tensor:
        """u itself, (B,) float in [0, 1]."""
        return u

    def noised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t on the linear path."""
        return interpolant.interpolate(x, eps, t)

    def loss(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The square error of the velocity."""
        return (output.float() - interpolant.velocity(x, eps)).square()

    def bound(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(1 - t) / t times the squared error summed over values: half the fall of log SNR times the noise's error.

        Eq. 17, arXiv 2107.00630, on the linear path, where the noise's error is 1 - t times the velocity's.
        """
        return self.loss(output, x, eps, t).double().flatten(1).sum(1) * (1 - t.double()) / t.double()


class NoiseAndVariance:
    """DiT: improved DDPM with 1000 linear steps (Table 16, arXiv 2505.16792). t is an integer in 0 .. 999."""

    def __init__(self) -> None:
        self.schedule = ddpm.Schedule()

    def timesteps(self, u: Tensor) -> Tensor:
        """floor(1000 u), at most 999, (B,) int64."""
        return (u * ddpm.STEPS).long().clamp_max(ddpm.STEPS - 1)

    def noised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of the DDPM chain."""
        return self.schedule.noised(x, eps, t)

    def loss(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The hybrid loss."""
        with torch.autocast(x.device.type, enabled=False):
            return self.schedule.losses(output.float(), x, eps, t).total

    def bound(self, output: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The variational term of the timestep, summed over values; its 1000 timesteps span one unit of t."""
        with torch.autocast(x.device.type, enabled=False):
            bits = self.schedule.losses(output.float(), x, eps, t).variational
        return ddpm.STEPS * math.log(2) * bits.double().flatten(1).sum(1)


def objective_of(kind: str) -> Objective:
    """The objective of a kind of model: "sit", "mmdit" or "dit"."""
    return NoiseAndVariance() if kind == "dit" else Velocity()
