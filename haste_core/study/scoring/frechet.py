"""Statistics of features and the numbers made of them: Frechet distance, Inception Score, precision and recall."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste_core.devices import default_device
from haste_core.errors import HasteError

from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # isort: skip
from torch_fidelity.metric_prc import (  # isort: skip
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

# ADM's evaluator takes the Inception Score of so many images at a time and averages.
IS_PART = 5000


class Gaussian(NamedTuple):
    """Mean (d,) and covariance (d, d) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of features that come in parts; sums and outer products in float64."""

    def __init__(self) -> None:
        self.n = 0
        self._sum = self._outer = torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Count features (B, d) in."""
        part = features.double()
        if self.n == 0:
            self._sum, self._outer = part.new_zeros(part.shape[1]), part.new_zeros(part.shape[1], part.shape[1])
        self.n += len(part)
        self._sum += part.sum(0)
        self._outer.addmm_(part.T, part)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (divided by n - 1) of what was added.

        Raises:
            HasteError: there were fewer than two images.
        """
        if self.n < 2:
            raise HasteError(f"a covariance of {self.n} images; possible: 2 and above")
        mean = self._sum / self.n
        covariance = (self._outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return Gaussian(mean.cpu().numpy(), covariance.cpu().numpy())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians: |m - n|^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2).

    Heusel et al., arXiv 1706.08500. Both roots come from symmetric eigendecompositions in float64; torch-fidelity's
    own takes eigenvalues of the unsymmetric product S T, which is the same number, slower and with complex dust.

    Raises:
        HasteError: the widths differ.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
        raise HasteError(f"features of width {a.mean.shape} and {b.mean.shape}; possible: statistics of one extractor")
    s, t = (np.asarray(x.covariance, dtype=np.float64) for x in (a, b))
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    inner = root @ t @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    difference = np.asarray(a.mean, dtype=np.float64) - np.asarray(b.mean, dtype=np.float64)
    return float(difference @ difference + np.trace(s) + np.trace(t) - 2 * cross)


# The side of the patches that images are compared by where they are larger.
PATCH = 8


def pixel_gaussian(images: Tensor) -> Gaussian:
    """Mean and covariance of pixels in [-1, 1], or of those of 8x8 patches where images are larger.

    Patches lie side by side from the upper left corner; a margin narrower than a patch is left out.

    Args:
        images: (n, C, S, S) uint8.
    """
    moments = Moments()
    for part in images.split(1000):
        pixels = part.float() / 127.5 - 1
        side = min(PATCH, pixels.shape[-1])
        tiles = pixels.unfold(2, side, side).unfold(3, side, side)  # (n, C, rows, columns, side, side)
        moments.add(tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1))
    return moments.gaussian()


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)), taken over parts of 5,000 images in their order and averaged (as ADM does).

    Salimans et al., arXiv 1606.03498. Args: logits (n, classes), without bias. Returns: 1 to the number of classes.
    """
    parts = [isc_features_to_metric(part, splits=1, shuffle=False) for part in logits.split(IS_PART)]
    return float(np.mean([part[KEY_METRIC_ISC_MEAN] for part in parts]))


def precision_recall(generated: Tensor, real: Tensor, neighborhood: int) -> tuple[float, float]:
    """Improved precision and recall in [0, 1] of features (n, d) and (m, d), in float64.

    Kynkaanniemi et al., arXiv 1904.06991: the share of generated features within the distance of a real one to its
    `neighborhood`-th neighbour, and the share of real ones within that of a generated one.

    Raises:
        HasteError: a set has no `neighborhood`-th neighbour.
    """
    if min(len(generated), len(real)) <= neighborhood:
        raise HasteError(
            f"precision and recall of {len(generated)} generated and {len(real)} real images need more than "
            f"evaluate.neighborhood {neighborhood} of each"
        )
    device = default_device()
    found = prc_features_to_metric(
        generated.to(device).double(),
        real.to(device).double(),
        prc_neighborhood=neighborhood,
        prc_batch_size=2500,  # a table of 2,500 by n distances at a time
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
