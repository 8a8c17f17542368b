"""The linear path between data (t=0) and noise (t=1): x_t = alpha_t x + sigma_t eps. The only home of the path.

Shapes: x, eps, velocity (B, ...); t (B,) in [0, 1].
"""

from __future__ import annotations

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) as (B, 1, ...), to be multiplied with `like` (B, ...)."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def alpha(t: Tensor) -> Tensor:
    """The weight of the data, 1 - t."""
    return 1 - t


def sigma(t: Tensor) -> Tensor:
    """The weight of the noise, t."""
    return t


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t on the path, same shape as x."""
    t = expand(t, x)
    return alpha(t) * x + sigma(t) * eps


def velocity(x: Tensor, eps: Tensor) -> Tensor:
    """The regression target d_alpha x + d_sigma eps = eps - x, the same at every t."""
    return eps - x


def data_from_velocity(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The clean image that v and x_t imply: x_t - t v."""
    return x_t - sigma(expand(t, x_t)) * v


def noise_from_velocity(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise that v and x_t imply: x_t + (1 - t) v."""
    return x_t + alpha(expand(t, x_t)) * v


def score_from_velocity(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The score of the marginal at t: -((1 - t) v + x_t) / t. Needs t > 0."""
    return -noise_from_velocity(v, x_t, t) / sigma(expand(t, x_t))
