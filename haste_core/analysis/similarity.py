"""Similarity of the generator's and the teacher's representations: CKA, CKNNA, mutual neighbours, linear probing.

Fig. 6, arXiv 2505.16792; the measures are those of their sources, computed in float64. Features are (n, d), tensors or
arrays, row i of both sides belonging to image i; the widths may differ. Every measure is invariant under rotations and
scalings of either side. None is clamped, and each is NaN if one side does not vary at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from torch import Generator, Tensor
from torch.nn import functional as F

from haste_core.analysis import probe
from haste_core.errors import HasteError
from haste_core.study.data import open_dataset
from haste_core.study.runs import Run
from haste_core.teacher import Teacher

SIMILARITY = ["step", "t", "depth", "teacher_block", "aligned", "measure", "value", "baseline", "low", "high", "n", "k"]
PROBING = ["network", "step", "t", "depth", "accuracy", "low", "high", "chance", "n", "n_train"]
# Share of the features' energy that varies between images, below which the rest is rounding.
RESOLVED = 1e-24


class Kernels:
    """Kernel matrices (n, n) of features (n, d), float64, each computed when first read.

    Raises:
        HasteError: not two dimensions, or fewer than four images, for which no unbiased estimate exists.
    """

    def __init__(self, features: Any) -> None:
        self.features = torch.as_tensor(features).detach().cpu().double()
        if self.features.ndim != 2 or len(self.features) < 4:
            raise HasteError(f"features of shape {tuple(self.features.shape)}; expected (n, d) of at least 4 images")
        self._own: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def told_apart(self) -> bool:
        """False where there is nothing to compare: features that are constant, zero for an image, or not finite."""
        if not bool(self.features.isfinite().all()):
            return False
        energy = self.features.square().sum(1)
        return bool(energy.min() > 0) and float(self.gram.trace()) > RESOLVED * float(energy.sum())

    @cached_property
    def directions_apart(self) -> bool:
        """As `told_apart`, of the directions of the features alone, which cosines compare."""
        return self.told_apart and Kernels(F.normalize(self.features, dim=1)).told_apart

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the centred features: no measure depends on the mean, and centring saves precision."""
        centred = self.features - self.features.mean(0)
        return centred @ centred.T

    @cached_property
    def double_centred(self) -> Tensor:
        """H K H with H = 1 - 11^T / n; inner products of such matrices are the biased HSIC times (n - 1)^2."""
        return self.gram - self.gram.mean(0) - self.gram.mean(1, keepdim=True) + self.gram.mean()

    @cached_property
    def u_centred(self) -> Tensor:
        """Kernel centred without its diagonal; inner products are HSIC_1 (Song et al. 2012) times n (n - 3)."""
        n, hollow = len(self), self.gram.clone().fill_diagonal_(0)
        rows, total = hollow.sum(1), hollow.sum()
        centred = hollow - (rows[:, None] + rows) / (n - 2) + total / ((n - 1) * (n - 2))
        return centred.fill_diagonal_(0)

    @cached_property
    def cosine(self) -> Tensor:
        """Cosines between the features, not centred; the diagonal is zero."""
        unit = F.normalize(self.features, dim=1)
        return (unit @ unit.T).fill_diagonal_(0)

    @cached_property
    def _ranks(self) -> Tensor:
        hidden = self.cosine.clone().fill_diagonal_(-torch.inf)
        return hidden.argsort(dim=1, descending=True, stable=True)

    def neighbours(self, k: int) -> Tensor:
        """(n, n) bool, True at [i, j] if j is among the k (1 to n - 1) nearest of i by cosine, i itself left out.

        Ties go to the first image in order.
        """
        if not 1 <= k < len(self):
            raise HasteError(
                f"k is {k} nearest neighbours, but there are {len(self)} images; expected 1 to {len(self) - 1}"
            )
        chosen = torch.zeros(len(self), len(self), dtype=torch.bool)
        return chosen.scatter_(1, self._ranks[:, :k], True)

    def local(self, other: Kernels, k: int) -> float:
        """n (n - 3) times HSIC_1 of both cosine kernels, restricted to the neighbours that both sides share."""
        if other is self and k in self._own:
            return self._own[k]
        n, common = len(self), self.neighbours(k) & other.neighbours(k)
        p, q = self.cosine * common, other.cosine * common
        means = p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (p.sum(0) @ q.sum(1))
        value = float((p * q.T).sum()) + float(means)
        if other is self:
            self._own[k] = value
        return value


def linear_cka(x: Any, y: Any) -> float:
    """Linear CKA from the unbiased HSIC_1 (Song et al. 2012), in [-1, 1]; about 0 for independent features.

    Only the three HSIC are unbiased, not their ratio; it may be slightly negative. NaN where features of a side are
    constant, zero for an image or not finite, here and in the measures below.
    """
    a, b = _sides(x, y)
    return _correlation(a.u_centred, b.u_centred) if a.told_apart and b.told_apart else math.nan


def linear_cka_biased(x: Any, y: Any) -> float:
    """Linear CKA from the biased HSIC, in [0, 1] (Kornblith et al. 2019).

    For comparison with older numbers only: it goes to 1 if features outnumber images, even for independent ones.
    """
    a, b = _sides(x, y)
    return _correlation(a.double_centred, b.double_centred) if a.told_apart and b.told_apart else math.nan


def cknna(x: Any, y: Any, k: int) -> float:
    """Centred kernel nearest-neighbour alignment, about 0 for independent features and 1 for equal ones.

    Huh et al. 2024 (arXiv 2405.07987), in the form whose numbers are in print: features L2-normalised, K and L their
    inner products, M_ij = 1 where j is among the k nearest of i on both sides (i itself left out), and

        CKNNA = A(K, L) / sqrt(A(K, K) A(L, L)),    A(K, L) = HSIC_1(M * K, M * L),
        HSIC_1(P, Q) = [tr(P Q) + 1^T P 1 1^T Q 1 / ((n-1)(n-2)) - 2 / (n-2) 1^T P Q 1] / (n (n-3)),

    M taken anew for each A. Being near is not mutual, so M is not symmetric: the trace counts pairs near in both
    directions, and swapping x and y changes the value a little. Nothing is added to the denominator. With k = n - 1
    it is the unbiased linear CKA of the normalised features. It depends on k and n: name both. k is 2 to n - 1, since
    no pair need be near in both directions at k = 1.
    """
    a, b = _sides(x, y)
    if k < 2:
        raise HasteError(f"k of CKNNA is {k}; expected 2 to {len(a) - 1}")
    if not (a.directions_apart and b.directions_apart):
        return math.nan
    norms = a.local(a, k) * b.local(b, k)
    return a.local(b, k) / norms**0.5 if norms > 0 else math.nan


def mutual_knn(x: Any, y: Any, k: int) -> float:
    """Share of an image's k nearest neighbours (by cosine) that both sides have in common, mean over images, in [0, 1].

    Huh et al. 2024, arXiv 2405.07987. For independent features about k / (n - 1); k is 1 to n - 1.
    """
    a, b = _sides(x, y)
    shared = float((a.neighbours(k) & b.neighbours(k)).sum()) / (k * len(a))
    return shared if a.directions_apart and b.directions_apart else math.nan


def _sides(x: Any, y: Any) -> tuple[Kernels, Kernels]:
    a, b = (side if isinstance(side, Kernels) else Kernels(side) for side in (x, y))
    if len(a) != len(b):
        raise HasteError(f"features of {len(a)} and of {len(b)} images; expected the same images on both sides")
    return a, b


def _correlation(a: Tensor, b: Tensor) -> float:
    """Inner product of two matrices over their norms, in [-1, 1]; NaN if one is zero."""
    return float((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt())


MEASURES: dict[str, Callable[[Any, Any, int], float]] = {
    "cka": lambda x, y, k: linear_cka(x, y),
    "cka_biased": lambda x, y, k: linear_cka_biased(x, y),
    "cknna": cknna,
    "mutual_knn": mutual_knn,
}


def cka_interval(x: Any, y: Any, resamples: int, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of `linear_cka` over images; copies of one image are never a pair."""
    a, b = (side.gram for side in _sides(x, y))
    weights = bootstrap_counts(len(a), resamples, seed)
    cross, own_a, own_b = (resampled_hsic(*pair, weights) for pair in ((a, b), (a, a), (b, b)))
    bounds = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(cross / (own_a * own_b).sqrt(), bounds).tolist()
    return low, high


def bootstrap_counts(n: int, resamples: int, seed: int) -> Tensor:
    """Number of times each of n images is drawn when n are drawn with replacement, (resamples, n) float64."""
    chosen = torch.randint(n, (resamples, n), generator=Generator().manual_seed(seed))
    return torch.zeros(resamples, n).double().scatter_add_(1, chosen, torch.ones(1).double().expand_as(chosen))


def resampled_hsic(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """HSIC_1 of two kernels over images drawn `weights` (resamples, n) times each, (resamples,).

    HSIC_1 is a sum of three means over distinct images: of K_ij L_ij, of K_ij L_iq, and of K_ij L_qr (Song et al.
    2012). Every tuple of distinct images counts as often as it is drawn. Two copies of one image are not a pair: as a
    pair they would bring back the diagonal whose absence makes the estimate unbiased, and the resampled values would
    lie above it. Not in the paper. With weights of one it is HSIC_1 itself.
    """
    hollow = (a.clone().fill_diagonal_(0), b.clone().fill_diagonal_(0))
    sums = zip(_distinct_sums(*hollow, weights), _distinct_counts(weights), strict=True)
    pairs, triples, quads = (value / count for value, count in sums)
    return pairs + quads - 2 * triples


def _distinct_sums(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of w_i w_j.. a_ij b_.. over distinct indices: over all tuples, less those with two equal indices."""
    rows, both = (w @ a) * (w @ b), a * b
    same = (w**2) @ both
    pairs = (w * (w @ both)).sum(1)
    triples = (w * (rows - same)).sum(1)
    one_shared = (w**2 * (rows - same)).sum(1)
    two_shared = (w**2 * same).sum(1)
    everything = (w * (w @ a)).sum(1) * (w * (w @ b)).sum(1)
    return pairs, triples, everything - 4 * one_shared - 2 * two_shared


def _distinct_counts(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of pairs, triples and quads of distinct images, from the sums of powers of w."""
    s1, s2, s3, s4 = ((w**power).sum(1) for power in (1, 2, 3, 4))
    quads = s1**4 - 6 * s1**2 * s2 + 8 * s1 * s3 + 3 * s2**2 - 6 * s4
    return s1**2 - s2, s1**3 - 3 * s1 * s2 + 2 * s3, quads


def aligned_pair(run: Run, teacher: Teacher) -> tuple[int, int]:
    """Student depth (from 1) and teacher block (from 0) that feature alignment compares (Eq. 1).

    An arm without alignment has the study's depth; a generator with fewer blocks is measured in its last.
    """
    return min(run.config.alignment.depth, run.config.model.depth), teacher.blocks - 1


def teacher_means(teacher: Teacher, images: Tensor) -> dict[int, Tensor]:
    """Mean over the teacher's patch tokens, (n, D) float32 on the CPU by block from 0.

    Tokens of the last block are taken after the final norm: the features that the student is aligned with. Images are
    (n, C, S, S) in [-1, 1].
    """
    last, parts = teacher.blocks - 1, []
    for batch in images.split(probe.BATCH):
        tokens = teacher.block_tokens(batch.to(teacher.mean.device), range(last)) if last else {}
        tokens[last] = teacher(batch.to(teacher.mean.device)).tokens
        parts.append({block: value.float().mean(1).cpu() for block, value in tokens.items()})
    return {block: torch.cat([part[block] for part in parts]) for block in range(teacher.blocks)}


def block_similarity(run: Run, k: int = 10, permutations: int = 5) -> pd.DataFrame:
    """Similarity of student and teacher blocks over the run's checkpoints, by REPA's protocol.

    Averaged weights, null label, mean over patch tokens, held-out images (`analysis.n`); step 0 is the untrained
    network. All pairs of blocks at the level nearest to t = 0.5, the aligned pair at every level of
    `analysis.timesteps`. Columns: step, t, depth (from 1), teacher_block (from 0), aligned (True for the pair of Eq.
    1), measure (of MEASURES), value, baseline (mean over `permutations` of the images), low, high (bootstrap interval
    over images, for "cka" of the aligned pair; else NaN), n (images), k (nearest neighbours; NaN for both CKA).
    """
    settings, rows = run.study.analysis, []
    examples, teacher = probe.held_out(run), probe.teacher_of(run)
    targets = {b: Kernels(means) for b, means in teacher_means(teacher, examples.images).items()}
    pair, middle = aligned_pair(run, teacher), probe.middle_level(settings.timesteps)
    generator = Generator().manual_seed(settings.seed)
    orders = [torch.randperm(len(examples.x), generator=generator) for _ in range(permutations)]
    for step in probe.checkpoints(run, (0, *run.config.train.kept_steps)):
        model = probe.student_at(run, step)
        for t in settings.timesteps:
            depths = range(1, len(model.blocks) + 1) if t == middle else [pair[0]]
            means = probe.patch_means(model, examples.x, t, depths, settings.seed)
            students = {depth: Kernels(features) for depth, features in means.items()}
            for block in targets if t == middle else [pair[1]]:
                target = targets[block]
                unrelated = [Kernels(target.features[order]) for order in orders]
                for (depth, student), (name, between) in product(students.items(), MEASURES.items()):
                    aligned, low, high = (depth, block) == pair, math.nan, math.nan
                    if aligned and name == "cka":
                        ends = settings.resamples, settings.confidence, settings.seed
                        low, high = cka_interval(student, target, *ends)
                    baseline = sum(between(student, other, k) for other in unrelated) / len(unrelated)
                    rows.append((step, t, depth, block, aligned, name, between(student, target, k), baseline, low, high,
                                 len(student), math.nan if name.startswith("cka") else k))  # fmt: skip
    return pd.DataFrame(rows, columns=SIMILARITY)


def linear_probe(features_train: Any, labels_train: Any, features_test: Any, labels_test: Any) -> float:
    """Test accuracy, in [0, 1], of a linear classifier on standardised features (n, d) with labels (n,).

    REPA's probe is BatchNorm1d under a linear softmax layer trained by SGD. Here features are standardised by the
    training features' mean and deviation, and the layer is scikit-learn's `LogisticRegression` (C = 1, a weak L2
    penalty, without which separable classes have no solution). The problem is convex and solved to convergence, so
    there is neither a learning rate to tune nor a seed: the same features give the same accuracy.

    Raises:
        HasteError: fewer than two classes to train on, or a test label that no training image has.
    """
    known, tested = np.unique(np.asarray(labels_train)), np.unique(np.asarray(labels_test))
    if len(known) < 2 or not np.isin(tested, known).all():
        raise HasteError(
            f"a probe trained on {len(known)} classes and tested on {len(tested)}, of which "
            f"{int((~np.isin(tested, known)).sum())} are new; expected at least two classes, and every tested one "
            "among the training images: use more of them"
        )
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-6))
    # Waking threads for each product of so small a problem makes it ten times slower.
    with threadpool_limits(1):
        classifier.fit(np.asarray(features_train, dtype=np.float64), np.asarray(labels_train))
        return float(classifier.score(np.asarray(features_test, dtype=np.float64), np.asarray(labels_test)))


def linear_probing(run: Run, train: int = 2000) -> pd.DataFrame:
    """Accuracy of `linear_probe` after every block over the run's checkpoints, and on the teacher's final tokens.

    Inputs as in `block_similarity`, at the noise level of `analysis.timesteps` nearest to 0.5. Trained on `train`
    training images (or as many as there are) without augmentation, tested on held-out ones (`analysis.n`). Columns:
    network ("student" or "teacher"), step, t, depth (from 1), accuracy, low, high (Wilson interval over the tested
    images), chance (accuracy of always naming the most frequent class), n (tested), n_train. The teacher's one row has
    step 0 and t 0: it sees clean images and is not trained.
    """
    settings, rows = run.study.analysis, []
    fitted, tested = open_dataset(run.config.data).examples("train", train), probe.held_out(run)
    n, chance = len(tested.y), float((tested.y == fitted.y.mode().values).float().mean())

    def add(network: str, step: int, t: float, depth: int, fit: Tensor, test: Tensor) -> None:
        accuracy = linear_probe(fit, fitted.y, test, tested.y)
        from scipy.stats import binomtest

        low, high = binomtest(round(accuracy * n), n).proportion_ci(settings.confidence, method="wilson")
        rows.append((network, step, t, depth, accuracy, float(low), float(high), chance, n, len(fitted.y)))

    teacher = probe.teacher_of(run)
    last = [teacher_means(teacher, part.images)[teacher.blocks - 1] for part in (fitted, tested)]
    add("teacher", 0, 0.0, teacher.blocks, *last)
    t, depths = probe.middle_level(settings.timesteps), range(1, run.config.model.depth + 1)
    for step in probe.checkpoints(run, (0, *run.config.train.kept_steps)):
        model = probe.student_at(run, step)
        # Different seeds, so that image i of both sets does not share its noise.
        test = probe.patch_means(model, tested.x, t, depths, settings.seed)
        fit = probe.patch_means(model, fitted.x, t, depths, settings.seed + 1)
        for depth in depths:
            add("student", step, t, depth, fit[depth], test[depth])
    return pd.DataFrame(rows, columns=PROBING)
