"""How similar the generator's and the teacher's representations are: CKA, CKNNA, shared nearest neighbours.

Fig. 6, arXiv 2505.16792; the measures are those of its sources, computed in float64. Features are (n, d), tensors or
arrays, row i of both sides belonging to image i; the widths may differ. Every measure is invariant under rotations and
scalings of either side. None is clamped, and each is NaN where one side does not vary at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Generator, Tensor

from haste_core.analysis import probe
from haste_core.analysis.kernels import Kernels, correlation, drawn_again, inner, resampled_hsic
from haste_core.errors import HasteError
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.teacher import Teacher

# Rows of a table whose value depends on k.
WITH_NEIGHBOURS = ("cknna", "mutual_knn")


def linear_cka_biased(x: Any, y: Any) -> float:
    """Linear CKA from the biased HSIC, in [0, 1] (Kornblith et al. 2019).

    It goes to 1 when features outnumber images, even for independent ones: here to compare with older numbers only.
    """
    return _cka_biased(*_sides(x, y), 0)


def linear_cka(x: Any, y: Any) -> float:
    """Linear CKA from the unbiased HSIC_1 (Song et al. 2012), in [-1, 1]; about 0 for independent features.

    Only the three HSIC are unbiased, not their ratio; it may be slightly negative.
    """
    return _cka(*_sides(x, y), 0)


def minibatch_cka(batches: Iterable[tuple[Any, Any]]) -> float:
    """Linear CKA over minibatches (Nguyen et al. 2021): each HSIC_1 averaged over them, then the ratio, once.

    Args:
        batches: pairs (x, y) of one size; a last batch that is shorter is dropped.

    Raises:
        HasteError: there is no batch, or one that is not the last has another size than the first.
    """
    sizes: list[int] = []
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in batches:
        sizes.append(len(x))
        if len(x) > sizes[0] or min(sizes[:-1], default=sizes[0]) < sizes[0]:
            raise HasteError(f"batches of {', '.join(map(str, sizes))} images; possible: one size, a shorter last one")
        if len(x) == sizes[0]:
            # The factor 1 / (n (n - 3)) is the same in every term and falls out of the ratio.
            a, b = (side.u_centred for side in _sides(x, y))
            sums += torch.tensor([inner(a, b), inner(a, a), inner(b, b)], dtype=torch.float64)
    if not sizes:
        raise HasteError("no batches; possible: at least one pair of features")
    return float(sums[0] / (sums[1] * sums[2]).sqrt())


def cknna(x: Any, y: Any, k: int) -> float:
    """Centred kernel nearest-neighbour alignment, about 0 for independent features and 1 for equal ones.

    Huh et al. 2024 (arXiv 2405.07987), in the form whose numbers are in print: features L2-normalised, K and L their
    inner products, M_ij = 1 where j is among the k nearest of i on both sides (i itself left out), and

        CKNNA = A(K, L) / sqrt(A(K, K) A(L, L)),    A(K, L) = HSIC_1(M * K, M * L),
        HSIC_1(P, Q) = [tr(P Q) + 1^T P 1 1^T Q 1 / ((n-1)(n-2)) - 2 / (n-2) 1^T P Q 1] / (n (n-3)),

    M taken anew for each A. Being near is not mutual, so M is not symmetric: the trace counts pairs near in both
    directions, and swapping x and y changes the value a little. Nothing is added to the denominator. With k = n - 1
    it is the unbiased linear CKA of the normalised features. It depends on k and n: name both.

    Raises:
        HasteError: k is not in 2 to n - 1 (no pair need be near in both directions at k = 1).
    """
    return _cknna(*_sides(x, y), k)


def mutual_knn(x: Any, y: Any, k: int) -> float:
    """The share of an image's k nearest neighbours (by cosine) that both sides agree on, mean over images, in [0, 1].

    Huh et al. 2024, arXiv 2405.07987. For independent features about k / (n - 1).

    Raises:
        HasteError: k is not in 1 to n - 1.
    """
    return _mutual_knn(*_sides(x, y), k)


def shuffled(measure: Callable[[Any, Any], float], x: Any, y: Any, seed: int = 0, permutations: int = 5) -> float:
    """A measure between x and the rows of y in random order: what it gives where nothing belongs together.

    Args:
        measure: of two sets of features, such as `linear_cka`.
        x, y: (n, d). seed: of the orders. permutations: how many the mean is over.
    """
    y = torch.as_tensor(y)
    values = [measure(x, y[order]) for order in orders(len(y), seed, permutations)]
    return sum(values) / len(values)


def orders(n: int, seed: int, count: int) -> list[Tensor]:
    """`count` random orders of n rows."""
    generator = Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator) for _ in range(count)]


def cka_interval(x: Any, y: Any, resamples: int, confidence: float, seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval over images of `linear_cka`; copies of one image are never a pair."""
    a, b = (side.gram for side in _sides(x, y))
    weights = drawn_again(len(a), resamples, seed)
    cross, own_a, own_b = (resampled_hsic(*pair, weights) for pair in ((a, b), (a, a), (b, b)))
    bounds = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(cross / (own_a * own_b).sqrt(), bounds).tolist()
    return low, high


def _sides(x: Any, y: Any) -> tuple[Kernels, Kernels]:
    a, b = (side if isinstance(side, Kernels) else Kernels(side) for side in (x, y))
    if len(a) != len(b):
        raise HasteError(f"features of {len(a)} and of {len(b)} images; possible: the same images on both sides")
    return a, b


def _cka_biased(x: Kernels, y: Kernels, _: int) -> float:
    return correlation(x.double_centred, y.double_centred)


def _cka(x: Kernels, y: Kernels, _: int) -> float:
    return correlation(x.u_centred, y.u_centred)


def _cknna(x: Kernels, y: Kernels, k: int) -> float:
    if k < 2:
        raise HasteError(f"CKNNA with k {k}; possible: 2 to {len(x) - 1}")
    norms = x.local(x, k) * y.local(y, k)
    return x.local(y, k) / norms**0.5 if norms > 0 else float("nan")


def _mutual_knn(x: Kernels, y: Kernels, k: int) -> float:
    return float((x.neighbours(k) & y.neighbours(k)).sum()) / (k * len(x))


MEASURES: dict[str, Callable[[Kernels, Kernels, int], float]] = {
    "cka": _cka, "cka_biased": _cka_biased, "cknna": _cknna, "mutual_knn": _mutual_knn,
}  # fmt: skip


class Pair(NamedTuple):
    """A student block by its depth (from 1) and a teacher block (from 0)."""

    depth: int
    teacher_block: int


def aligned_pair(run: Run, teacher: Teacher) -> Pair:
    """What feature alignment brings together (Eq. 1): the run's aligned depth and the teacher's last block.

    Arms without alignment have the depth of the study's; a generator with fewer blocks is looked at in its last.
    """
    return Pair(min(run.config.alignment.depth, run.config.model.depth), teacher.blocks - 1)


def middle_level(timesteps: Sequence[float]) -> float:
    """The one nearest to t = 0.5, where the paper finds the alignment gradient most helpful (Fig. 4)."""
    return min(timesteps, key=lambda t: abs(t - 0.5))


def teacher_means(teacher: Teacher, images: Tensor) -> dict[int, Tensor]:
    """The teacher's patch tokens averaged over patches, (n, D) float32 on the CPU by block from 0.

    Those of the last block are taken after the final norm: the features that the student is aligned with.

    Args:
        teacher: frozen. images: (n, C, S, S) in [-1, 1].
    """
    last, parts = teacher.blocks - 1, []
    for batch in images.split(probe.BATCH):
        seen = teacher.block_tokens(batch.to(teacher.mean.device), range(last)) if last else {}
        seen[last] = teacher(batch.to(teacher.mean.device)).tokens
        parts.append({block: tokens.float().mean(1).cpu() for block, tokens in seen.items()})
    return {block: torch.cat([part[block] for part in parts]) for block in range(teacher.blocks)}


def measure(run: Run, k: int = 10, permutations: int = 5) -> pd.DataFrame:
    """Similarity of student and teacher blocks over the run's checkpoints, by REPA's protocol.

    Averaged weights, null label, mean over patch tokens, held-out images (`analysis.n`); step 0 is the untrained
    network. All pairs of blocks at the level nearest to t = 0.5, the aligned pair at every level of
    `analysis.timesteps`.

    Args:
        run: finished. k: nearest neighbours of `cknna` and `mutual_knn`. permutations: behind every baseline.

    Returns:
        Columns: step, t, depth (from 1), teacher_block (from 0), aligned (True for the pair of Eq. 1), measure ("cka",
        "cka_biased", "cknna", "mutual_knn"), value, baseline (mean over shuffled pairs of images), low, high
        (bootstrap interval over images, for "cka" of the aligned pair; else NaN), n (images), k (NaN where there is
        none).
    """
    settings = run.study.analysis
    examples, teacher = probe.held_out(run), find_teacher(run.study, run.config.teacher)
    targets = {b: Kernels(means) for b, means in teacher_means(teacher, examples.images).items()}
    pair, middle = aligned_pair(run, teacher), middle_level(settings.timesteps)
    order = orders(len(examples.x), settings.seed, permutations)
    rows: list[dict[str, Any]] = []
    for step in (0, *run.config.train.kept_steps):
        model = probe.student_at(run, step)
        for t in settings.timesteps:
            depths = range(1, len(model.blocks) + 1) if t == middle else [pair.depth]
            found = probe.patch_means(model, examples.x, t, depths, settings.seed)
            blocks = targets if t == middle else {pair.teacher_block: targets[pair.teacher_block]}
            for row in _compared({d: Kernels(means) for d, means in found.items()}, blocks, order, k):
                whole = {"step": step, "t": t, **row, "low": float("nan"), "high": float("nan")}
                whole["aligned"] = (row["depth"], row["teacher_block"]) == pair
                if whole["aligned"] and row["measure"] == "cka":
                    sides = found[pair.depth], targets[pair.teacher_block]
                    whole["low"], whole["high"] = cka_interval(
                        *sides, settings.resamples, settings.confidence, settings.seed
                    )
                rows.append(whole)
    columns = [
        "step",
        "t",
        "depth",
        "teacher_block",
        "aligned",
        "measure",
        "value",
        "baseline",
        "low",
        "high",
        "n",
        "k",
    ]
    return pd.DataFrame(rows, columns=columns)


def _compared(
    students: dict[int, Kernels], teachers: dict[int, Kernels], order: list[Tensor], k: int
) -> Iterator[dict[str, Any]]:
    for block, target in teachers.items():
        unrelated = [Kernels(target.features[chosen]) for chosen in order]
        for depth, student in students.items():
            for name, between in MEASURES.items():
                yield {
                    "depth": depth,
                    "teacher_block": block,
                    "measure": name,
                    "value": between(student, target, k),
                    "baseline": sum(between(student, other, k) for other in unrelated) / len(unrelated),
                    "n": len(student),
                    "k": k if name in WITH_NEIGHBOURS else float("nan"),
                }
