"""Digits under an oriented Gaussian texture: a distribution of images whose best velocity is known in closed form.

An image is a template mu_k plus a stationary Gaussian texture on the torus in one of several directions j, so images
follow a mixture of Gaussians N(mu_k, Sigma_j) with Sigma_j diagonal in the discrete Fourier basis. With
x_t = (1 - t) x + t eps and C_j = (1 - t)^2 Sigma_j + t^2 I, each component has
E[x | x_t] = mu_k + (1 - t) Sigma_j C_j^-1 (x_t - (1 - t) mu_k) and E[eps | x_t] = t C_j^-1 (x_t - (1 - t) mu_k), and
the best velocity is the mean of their difference under the posterior of the components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from haste_core.analysis.statistics import interval
from haste_core.errors import HasteError

# Noise added to a sample before its component is read off it, so that 256 grey levels do not decide.
READ_AT = 0.05


@dataclass(frozen=True)
class Law:
    """The mixture.

    Args:
        templates: (classes, templates of a class, S, S) float64, all equally likely.
        spectra: (directions, S, S) float64, variance of every coefficient of the orthonormal DFT, all equally likely.
    """

    templates: Tensor
    spectra: Tensor

    def __post_init__(self) -> None:
        if not bool((self.spectra > 0).all()):
            raise HasteError(
                f"the spectrum of the texture has a value of {float(self.spectra.min()):g}; expected all above 0, see "
                f"data.texture.floor and data.texture.amplitude"
            )

    @property
    def side(self) -> int:
        """Side of an image in pixels."""
        return self.templates.shape[-1]

    def draw(self, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images (B, 1, S, S) float32 with labels y (B,), and their directions (B,) int64."""
        kind = torch.randint(self.templates.shape[1], y.shape, generator=generator)
        direction = torch.randint(len(self.spectra), y.shape, generator=generator)
        white = torch.randn(len(y), self.side, self.side, generator=generator)
        scale = self.spectra.sqrt().float()[direction]
        texture = torch.fft.irfft2(torch.fft.rfft2(white) * scale[..., : self.side // 2 + 1], s=white.shape[-2:])
        return (self.templates.float()[y, kind] + texture)[:, None], direction

    def blind(self) -> Law:
        """The same templates under one spectrum, the mean over directions: a viewer that ignores direction."""
        return replace(self, spectra=self.spectra.mean(0, keepdim=True))

    @cached_property
    def textured(self) -> Tensor:
        """True for coefficients (S, S) of the DFT in which textures have more variance than templates."""
        means = self.templates.flatten(0, 1)
        return self.spectra.mean(0) > _spectrum(means - means.mean(0)).square().mean(0)

    def log_posterior(self, x_t: Tensor, t: float) -> Tensor:
        """Log probability (B, classes, templates, directions) of components given x_t (B, 1, S, S)."""
        logs = self._log_densities(x_t, t)[0]
        return logs.flatten(1).log_softmax(1).reshape(logs.shape)

    def velocity(self, x_t: Tensor, t: float, y: Tensor) -> Tensor:
        """The best velocity E[eps - x | x_t, y] (B, 1, S, S) float64 for x_t (B, 1, S, S), t in (0, 1) and y (B,)."""
        logs, x, means, total = self._log_densities(x_t, t)
        gain = ((t - (1 - t) * self.spectra) / total).flatten(1)
        own = logs[torch.arange(len(y)), y]
        weight, mean = own.flatten(1).softmax(1).reshape(own.shape), means[y]  # (B, templates, ...)
        # Each component's velocity is gain_j (x_t - (1 - t) mu_k) - mu_k, so sums over k and j are taken apart.
        by_direction, by_template = weight.sum(1) @ gain, weight.sum(2)
        pulled = (torch.einsum("bkj,jf->bkf", weight, gain) * mean).sum(1)
        found = by_direction * x - (1 - t) * pulled - (by_template[..., None] * mean).sum(1)
        return torch.fft.ifft2(found.reshape(-1, self.side, self.side), norm="ortho").real[:, None]

    def _log_densities(self, x_t: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log densities (B, classes, templates, directions) up to a constant, and what they are made of.

        That is the coefficients (B, S S) of x_t and (classes, templates, S S) of templates, and variances of x_t.
        """
        if not 0 < t < 1:
            raise HasteError(f"noise level {t}; expected 0 < t < 1")
        total = (1 - t) ** 2 * self.spectra + t**2
        inverse = 1 / total.flatten(1)
        x = torch.fft.fft2(x_t[:, 0].double(), norm="ortho").flatten(1)
        means = torch.fft.fft2(self.templates, norm="ortho").flatten(2)
        flat = (1 - t) * means.flatten(0, 1)
        # |x - m|^2 in three products of matrices, since an array over images, templates and coefficients is large.
        cross = torch.stack([(x * weight) @ flat.mH for weight in inverse], -1).real
        squares = (side.abs().square() @ inverse.T for side in (x, flat))
        logs = cross - 0.5 * (next(squares)[:, None] + next(squares) + total.flatten(1).log().sum(1))
        return logs.reshape(len(x), *self.templates.shape[:2], -1), x, means, total

    def excess(self, output: Tensor, best: Tensor) -> dict[str, float]:
        """Mean square distance of velocities (B, 1, S, S) to the best ones, a value: of all, and by band.

        `excess` is the sum of `excess_texture` (coefficients of `textured`) and `excess_template` (all others).
        """
        power = _spectrum((output.double() - best)[:, 0]).square().sum(0) / best[0].numel() / len(best)
        whole, texture = float(power.sum()), float(power[self.textured].sum())
        return {"excess": whole, "excess_texture": texture, "excess_template": whole - texture}

    def read(self, images: Tensor) -> tuple[dict[str, float], Tensor]:
        """Scores of images (n, 1, S, S) in [-1, 1], and the likeliest class (n,) of each.

        `texture_power`: power of images in the texture's coefficients over that of the law. `direction`: mean
        posterior probability of the likeliest direction, whatever the class; 1 / directions where there is none.
        """
        band = self.textured
        power = _spectrum(images[:, 0].double())[:, band].square().sum(1).mean()
        own = self.spectra.mean(0) + _spectrum(self.templates.flatten(0, 1)).square().mean(0)
        posterior = torch.cat([self.log_posterior((1 - READ_AT) * x, READ_AT).exp() for x in images.split(250)])
        found = {"texture_power": power / own[band].sum(), "direction": posterior.sum((1, 2)).amax(1).mean()}
        return {name: float(value) for name, value in found.items()}, posterior.sum((2, 3)).argmax(1)


def _spectrum(images: Tensor) -> Tensor:
    """Moduli of the orthonormal DFT of images (n, S, S)."""
    return torch.fft.fft2(images, norm="ortho").abs()


def band_spectra(
    side: int, directions: int, amplitude: float, radius: float, width: float, spread: float, floor: float
) -> Tensor:
    """Spectra (directions, side, side) float64 of textures: a Gaussian in radius and angle, plus a constant.

    Args:
        amplitude: standard deviation of the texture's pixels without the floor. radius, width: centre and standard
            deviation of the band in cycles an image. spread: standard deviation of the angle in degrees.
        floor: standard deviation of the white part.
    """
    frequency = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    fy, fx = torch.meshgrid(frequency, frequency, indexing="ij")
    ring = torch.exp(-0.5 * ((torch.hypot(fy, fx) - radius) / width) ** 2)
    spectra = []
    for j in range(directions):
        off = torch.atan2(fy, fx) - math.pi * j / directions
        off = torch.remainder(off + math.pi / 2, math.pi) - math.pi / 2  # a direction and its opposite are one
        wedge = torch.exp(-0.5 * (off / math.radians(spread)) ** 2)
        # A Nyquist coefficient is its own opposite, whose angle is another one: both have their mean.
        found = ring * wedge
        found = (found + torch.roll(found.flip(0, 1), (1, 1), (0, 1))) / 2
        spectra.append(found * amplitude**2 / found.mean() + floor**2)
    return torch.stack(spectra)


def upsampled(templates: Tensor, side: int) -> Tensor:
    """Templates (n, S, S) bicubically enlarged to `side`, float64, within the range of the given ones."""
    if templates.shape[-1] > side:
        raise HasteError(
            f"templates of {templates.shape[-1]} pixels in images of data.image_size {side}; expected images at least "
            f"as large as the templates"
        )
    found = F.interpolate(templates[:, None].double(), size=(side, side), mode="bicubic", align_corners=False)[:, 0]
    return found.clamp(float(templates.min()), float(templates.max()))


def gain_and_harm(scores: pd.DataFrame, baselines: Mapping[str, str], early: Sequence[int], last: int) -> pd.DataFrame:
    """Early gain in structure and late harm near the data of each aligned arm and seed, as logarithms of ratios.

    Args:
        scores: rows of fid.csv. baselines: the arm without alignment by the aligned arm that it is compared with.
        early: steps whose mean is the early gain. last: step of the harm.

    Returns:
        arm, baseline, seed, gain (above 0: less loss than the baseline), harm (above 0: more). Seeds and arms that lack
        a step are left out.
    """
    near, structure = (
        np.log(scores.pivot_table(index=["seed", "step"], columns="arm", values=name))
        for name in ("excess", "excess_structure")
    )
    rows = []
    for arm, plain in baselines.items():
        gain = (structure[plain] - structure[arm]).unstack("step").reindex(columns=list(early)).mean(axis=1)
        harm = (near[arm] - near[plain]).unstack("step").reindex(columns=[last])[last]
        pairs = pd.DataFrame({"gain": gain, "harm": harm}).dropna()
        rows += [{"arm": arm, "baseline": plain, "seed": seed, **row} for seed, row in pairs.to_dict("index").items()]
    return pd.DataFrame(rows, columns=["arm", "baseline", "seed", "gain", "harm"])


def factors(pairs: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Means over seeds of rows of `gain_and_harm`, with Student-t intervals.

    Columns: arm, baseline, measure ("gain", "harm", or "less harm": harm of `holistic` minus the arm's with the same
    seed), mean, low, high, seeds.
    """
    holistic = pairs.loc[pairs["arm"] == "holistic", ["seed", "harm"]]
    others = pairs[pairs["arm"] != "holistic"].merge(holistic, on="seed", suffixes=("", " of holistic"))
    others["less harm"] = others["harm of holistic"] - others["harm"]
    rows = []
    for measure, table in (("gain", pairs), ("harm", pairs), ("less harm", others)):
        for (arm, plain), part in table.groupby(["arm", "baseline"], sort=False):
            rows.append((arm, plain, measure, *interval(list(part[measure]), confidence), len(part)))
    return pd.DataFrame(rows, columns=["arm", "baseline", "measure", "mean", "low", "high", "seeds"])
