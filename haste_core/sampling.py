"""Samplers: one pure function each, integrated in float64 from noise (t=1) to data (t=0).

The formulas and time grids are those of Table 16 and Sec. 4, arXiv 2505.16792. The model is called in its own dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from haste_core.devices import compile_blocks, in_precision
from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer
from haste_core.paths import DDPM_STEPS, DDPMSchedule, score_from_velocity


@dataclass(frozen=True)
class Sampler:
    """Sampler settings that affect the images (defaults: Table 16, arXiv 2505.16792).

    sampler: "euler", "heun", "sde" or "ddpm". grid: of the steps of euler and heun (`times_of`). guidance: scale, 1
    means none, between the noise levels guidance_low and guidance_high, of the leading guidance_channels (None: all).
    precision: of the network, "no", "bf16" or "fp16"; the integrator is float64. compile: torch.compile the blocks.
    """

    sampler: str = "sde"
    solver_steps: int = 250
    grid: str = "uniform"
    guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_channels: int | None = None
    batch_size: int = 256
    precision: str = "no"
    compile: bool = False


# velocity(x, t): x (B, ...) float64, t a number as the network takes it; returns (B, ...) float64.
Velocity = Callable[[Tensor, float], Tensor]
# noise(step, like): standard normal noise of a solver step, shaped like `like`; a recorded one replays a trajectory.
NoiseSource = Callable[[int, Tensor], Tensor]


class SeededNoise:
    """Noise with one seed per sample: sample i gets the same draws whatever the batch it is in."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [Generator().manual_seed(int(seed)) for seed in seeds]

    def start(self, shape: Sequence[int]) -> Tensor:
        """The initial noise (n, *shape), float32 on the CPU. Call it once, first."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self.generators])

    def __call__(self, step: int, like: Tensor) -> Tensor:
        """The next increment of every sample."""
        return self.start(like.shape[1:]).to(like)


# -- integration ------------------------------------------------------------------------------------------------------


def times_of(steps: int, grid: str) -> list[float]:
    """The `steps` + 1 noise levels from 1 to 0 of a grid: "uniform", (i / N), or "quadratic", (i / N)^2."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (times.square() if grid == "quadratic" else times).tolist()


def euler(velocity: Velocity, x: Tensor, steps: int, grid: str = "uniform") -> Tensor:
    """The probability-flow ODE dx = v dt by Euler's method on `steps` steps of a grid (`times_of`)."""
    times = times_of(steps, grid)
    x = x.double()
    for t, following in zip(times, times[1:], strict=False):
        x = x + (following - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, steps: int, grid: str = "uniform") -> Tensor:
    """The same ODE by Heun's method, without the correction on the last step."""
    times = times_of(steps, grid)
    x = x.double()
    for i, (t, following) in enumerate(zip(times, times[1:], strict=False)):
        v = velocity(x, t)
        predicted = x + (following - t) * v
        if i < steps - 1:
            v = (v + velocity(predicted, following)) / 2
            predicted = x + (following - t) * v
        x = predicted
    return x


def sde(velocity: Velocity, x: Tensor, steps: int, noise: NoiseSource, last: float = 0.04) -> Tensor:
    """dx = (v - sigma_t score) dt + sqrt(2 sigma_t) dW by Euler-Maruyama, then one step without noise.

    The grid is linspace(1, last, steps); the final step goes from `last` to 0 with the same drift.
    """
    times = torch.linspace(1, last, steps, dtype=torch.float64).tolist()
    x = x.double()

    def drift(x: Tensor, t: float) -> Tensor:
        v, at = velocity(x, t), x.new_full((len(x),), t)
        return v - t * score_from_velocity(v, x, at)

    for i, (t, following) in enumerate(zip(times, times[1:], strict=False)):
        dt = following - t
        x = x + dt * drift(x, t) + (2 * t) ** 0.5 * abs(dt) ** 0.5 * noise(i, x).double()
    return x - times[-1] * drift(x, times[-1])


def ancestral(network: Velocity, x: Tensor, steps: int, noise: NoiseSource) -> Tensor:
    """Ancestral sampling of improved DDPM on `steps` (at most 1000) evenly spread timesteps.

    network: from x (B, C, ...) and a timestep to noise and variance (B, 2C, ...), both float64.
    """
    schedule, x = DDPMSchedule(steps), x.double()
    for i, index in enumerate(reversed(range(steps))):
        at = torch.full((len(x),), index, device=x.device)
        found = schedule.posterior(network(x, float(schedule.timesteps[index])), x, at)
        x = found.mean if index == 0 else found.mean + (found.log_variance / 2).exp() * noise(i, x).double()
    return x


def integrate(output: Velocity, x: Tensor, sample: Sampler, noise: NoiseSource) -> Tensor:
    """x taken from t=1 to t=0 by the sampler that `sample` names; float64."""
    if sample.sampler == "ddpm":
        return ancestral(output, x, sample.solver_steps, noise)
    if sample.sampler == "euler":
        return euler(output, x, sample.solver_steps, sample.grid)
    if sample.sampler == "heun":
        return heun(output, x, sample.solver_steps, sample.grid)
    return sde(output, x, sample.solver_steps, noise)


# -- guidance ---------------------------------------------------------------------------------------------------------


def guided(
    model: nn.Module,
    y: Tensor,
    null_label: int,
    scale: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
    channels: int | None = None,
    horizon: float = 1.0,
) -> Velocity:
    """The model's output under classifier-free guidance, uncond + scale (cond - uncond) for low <= t <= high.

    Outside the interval, and with scale 1, the model is called once and unguided.

    model: called with (x, t, y). y: (B,) labels. null_label: the label of "no class". low, high: noise levels, 0 data,
    1 noise. channels: how many leading output channels are guided, the others stay conditional; None guides all.
    horizon: the timestep of noise level 1.
    """
    dtype = next(model.parameters()).dtype
    null = torch.full_like(y, null_label)

    def output(x: Tensor, t: float) -> Tensor:
        x_in = x.to(dtype)
        if not is_guided(t / horizon, scale, low, high):
            return model(x_in, x_in.new_full((len(x),), t), y).double()
        both = model(torch.cat([x_in, x_in]), x_in.new_full((2 * len(x),), t), torch.cat([y, null])).double()
        conditional, unconditional = both.chunk(2)
        mixed = unconditional + scale * (conditional - unconditional)
        return mixed if channels is None else torch.cat([mixed[:, :channels], conditional[:, channels:]], dim=1)

    return output


def guided_by(model: DiffusionTransformer, y: Tensor, sample: Sampler) -> Velocity:
    """The model's output under the guidance of `sample`; of a DiT the noise is guided and the variance is not."""
    channels, horizon = sample.guidance_channels, 1.0
    if model.kind == "dit":
        channels, horizon = min(channels or model.channels, model.channels), float(DDPM_STEPS)
    bounds = sample.guidance, sample.guidance_low, sample.guidance_high
    return guided(model, y, model.null_label, *bounds, channels, horizon)


def is_guided(level: float, scale: float, low: float, high: float) -> bool:
    """True where guidance of this scale and interval calls the model twice at a noise level."""
    return scale != 1.0 and low <= level <= high


def passes(kind: str, sample: Sampler) -> int:
    """Number of network evaluations for one image by a generator of `kind`; guided evaluations count twice."""
    horizon, outputs = (DDPM_STEPS, 2) if kind == "dit" else (1, 1)
    guidance, counts = (sample.guidance, sample.guidance_low, sample.guidance_high), []

    def counted(x: Tensor, t: float) -> Tensor:
        counts.append(2 if is_guided(t / horizon, *guidance) else 1)
        return x.repeat(1, outputs, 1, 1)

    integrate(counted, torch.zeros(1, 1, 1, 1), sample, SeededNoise([0]))
    return sum(counts)


# -- drawing ----------------------------------------------------------------------------------------------------------


def check_sampler(model: DiffusionTransformer, sample: Sampler) -> None:
    """Raise HasteError where a sampler does not fit what a kind of model predicts, or its guidance guides nowhere."""
    noise = model.kind == "dit"
    if noise != (sample.sampler == "ddpm"):
        raise HasteError(
            f"sample.sampler {sample.sampler!r} does not go with a model of kind {model.kind!r}, which predicts "
            f"{'noise and variance' if noise else 'the velocity'}; expected one of: "
            f"{'ddpm' if noise else 'euler, heun, sde'}"
        )
    if noise and sample.solver_steps > DDPM_STEPS:
        raise HasteError(f"sample.solver_steps {sample.solver_steps}; expected for ddpm: 1 to {DDPM_STEPS}")
    if sample.guidance != 1 and passes(model.kind, sample) == passes(model.kind, replace(sample, guidance=1.0)):
        raise HasteError(
            f"sample.guidance {sample.guidance:g} for t in [{sample.guidance_low:g}, {sample.guidance_high:g}] meets "
            f"none of the {sample.solver_steps} solver steps; expected a wider interval, or guidance 1"
        )


@torch.no_grad()
def draw(
    model: DiffusionTransformer, labels: Tensor, seeds: Sequence[int], sample: Sampler, progress: str | None = None
) -> Tensor:
    """Samples (n, C, S, S) float32 on the CPU, in the range of the training data.

    model: in eval mode. labels: (n,) int64. seeds: n numbers; sample i depends on labels[i] and seeds[i] alone.
    progress: the progress bar's label; None shows none.

    Raises:
        HasteError: the sampler does not fit the model, or images are not finite.
    """
    if len(labels) != len(seeds):
        raise HasteError(f"{len(labels)} labels for {len(seeds)} seeds; expected one seed per sample")
    check_sampler(model, sample)
    if sample.compile:
        compile_blocks(model)
    device = next(model.parameters()).device
    drawn = []
    starts = range(0, len(labels), sample.batch_size)
    for start in tqdm(starts, desc=progress, unit="batch", disable=progress is None, mininterval=1.0):
        chosen = slice(start, start + sample.batch_size)
        noise = SeededNoise(seeds[chosen])
        output = guided_by(model, labels[chosen].to(device), sample)
        x = noise.start((model.channels, model.image_size, model.image_size)).to(device)
        with in_precision(sample.precision, device):  # leaves the integrator's float64 alone
            drawn.append(integrate(output, x, sample, noise).float().cpu())
        wrong = int((~drawn[-1].isfinite()).flatten(1).any(1).sum())
        if wrong:
            name = "" if progress is None else f"{progress}: "
            raise HasteError(
                f"{name}{wrong} of {len(drawn[-1])} drawn images have values that are not finite; look at the weights, "
                f"or draw with sample.precision=no"
            )
    return torch.cat(drawn)


def sample_labels(n: int, classes: int, how: str, seed: int) -> Tensor:
    """n labels (n,) int64: "balanced" repeats 0, 1, ..., classes - 1; "random" draws them from `seed`."""
    if how == "balanced":
        if n < classes:
            warnings.warn(
                f"{n} images with balanced labels show the first {n} of {classes} classes alone", stacklevel=2
            )
        return torch.arange(n) % classes
    return torch.randint(classes, (n,), generator=Generator().manual_seed(seed))


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 by the rule 127.5 x + 128, clipped and truncated (the rule is on the card)."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
