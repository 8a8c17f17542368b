"""Kernels of features, and the two things that are done with them: centring, and drawing images again.

All in float64. n images, features (n, d); a kernel is (n, n) of inner products between images.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from haste_core.errors import HasteError


class Kernels:
    """What the similarity measures need of one set of features, each computed once, when it is first asked for.

    Args:
        features: (n, d), a tensor or an array.

    Raises:
        HasteError: not two dimensions, or fewer than four images, for which no unbiased estimate exists.
    """

    def __init__(self, features: Any) -> None:
        self.features = torch.as_tensor(features).detach().cpu().double()
        if self.features.ndim != 2 or len(self.features) < 4:
            raise HasteError(f"features of shape {tuple(self.features.shape)}; possible: (n, d) with n of at least 4")
        self._own: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the features after their mean is taken off: no measure sees it, and digits are saved."""
        centred = self.features - self.features.mean(0)
        return centred @ centred.T

    @cached_property
    def double_centred(self) -> Tensor:
        """H K H with H = 1 - 11^T / n; inner products of such matrices are the biased HSIC times (n - 1)^2."""
        return self.gram - self.gram.mean(0) - self.gram.mean(1, keepdim=True) + self.gram.mean()

    @cached_property
    def u_centred(self) -> Tensor:
        """The kernel centred without its diagonal; inner products are HSIC_1 (Song et al. 2012) times n (n - 3)."""
        n, hollow = len(self), self.gram.clone().fill_diagonal_(0)
        rows, total = hollow.sum(1), hollow.sum()
        centred = hollow - (rows[:, None] + rows) / (n - 2) + total / ((n - 1) * (n - 2))
        return centred.fill_diagonal_(0)

    @cached_property
    def cosine(self) -> Tensor:
        """Cosines between the features as they are, not centred; the diagonal is zero."""
        unit = F.normalize(self.features, dim=1)
        return (unit @ unit.T).fill_diagonal_(0)

    @cached_property
    def _ranks(self) -> Tensor:
        hidden = self.cosine.clone().fill_diagonal_(-torch.inf)
        return hidden.argsort(dim=1, descending=True, stable=True)

    def neighbours(self, k: int) -> Tensor:
        """(n, n) bool, True at [i, j] where j is among the k nearest of i by cosine, i itself left out.

        Of equally near images the first in order counts.

        Raises:
            HasteError: k is not in 1 to n - 1.
        """
        if not 1 <= k < len(self):
            raise HasteError(f"k {k} nearest neighbours among {len(self)} images; possible: 1 to {len(self) - 1}")
        chosen = torch.zeros(len(self), len(self), dtype=torch.bool)
        return chosen.scatter_(1, self._ranks[:, :k], True)

    def local(self, other: Kernels, k: int) -> float:
        """n (n - 3) times the HSIC_1 of both cosine kernels, cut down to the neighbours that both sides agree on."""
        if other is self and k in self._own:
            return self._own[k]
        n, common = len(self), self.neighbours(k) & other.neighbours(k)
        p, q = self.cosine * common, other.cosine * common
        means = p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (p.sum(0) @ q.sum(1))
        value = inner(p, q.T) + float(means)
        if other is self:
            self._own[k] = value
        return value


def inner(a: Tensor, b: Tensor) -> float:
    """The sum of the products of all entries."""
    return float((a * b).sum())


def correlation(a: Tensor, b: Tensor) -> float:
    """The inner product of two matrices over their norms, in [-1, 1]; NaN where one is zero."""
    return float((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt())


def drawn_again(n: int, resamples: int, seed: int) -> Tensor:
    """How often each of n images is drawn when n are drawn with replacement, (resamples, n) float64."""
    chosen = torch.randint(n, (resamples, n), generator=Generator().manual_seed(seed))
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones(1).double().expand_as(chosen)
    )


def resampled_hsic(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """HSIC_1 of two kernels over images that are drawn as often as `weights` (resamples, n) says, (resamples,).

    HSIC_1 is a sum of three means over distinct images: of K_ij L_ij, of K_ij L_iq, and of K_ij L_qr (Song et al.
    2012). Here every tuple of distinct images counts as often as it is drawn. Two copies of one image are not a pair:
    as a pair they would bring back the diagonal whose absence makes the estimate unbiased, and the resampled values
    would lie above it. Not in the paper. With weights of one it is HSIC_1 itself.
    """
    hollow = (a.clone().fill_diagonal_(0), b.clone().fill_diagonal_(0))
    sums = zip(_distinct(*hollow, weights), _tuples(weights), strict=True)
    pairs, triples, quads = (value / count for value, count in sums)
    return pairs + quads - 2 * triples


def _distinct(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Sums of w_i w_j.. a_ij b_.. over distinct indices: all tuples, less those in which two indices agree.
    rows = (w @ a) * (w @ b)
    both = a * b
    same = (w**2) @ both
    pairs = (w * (w @ both)).sum(1)
    triples = (w * (rows - same)).sum(1)
    one_shared = (w**2 * (rows - same)).sum(1)
    two_shared = (w**2 * same).sum(1)
    everything = (w * (w @ a)).sum(1) * (w * (w @ b)).sum(1)
    return pairs, triples, everything - 4 * one_shared - 2 * two_shared


def _tuples(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # How many pairs, triples and quads of distinct images there are, from the sums of powers of w.
    s1, s2, s3, s4 = ((w**power).sum(1) for power in (1, 2, 3, 4))
    quads = s1**4 - 6 * s1**2 * s2 + 8 * s1 * s3 + 3 * s2**2 - 6 * s4
    return s1**2 - s2, s1**3 - 3 * s1 * s2 + 2 * s3, quads
