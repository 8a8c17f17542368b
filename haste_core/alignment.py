"""Feature and attention alignment with a frozen teacher as pure functions (Eqs. 1 and 4, Sec. 2.3, arXiv 2505.16792).

Losses are computed in float32 whatever the precision of their inputs. Where student and teacher have different token
grids, features are compared on the teacher's grid and attention on the student's (Tables 11, 12), by bilinear
interpolation. A grid is (rows, columns); its tokens are numbered row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from haste_core.errors import HasteError
from haste_core.taps import QK

Grid = tuple[int, int]
# Beyond this number of tokens chunks of queries are faster than whole maps on a CPU, and their size (`make bench`).
DENSE_UP_TO, QUERIES_AT_ONCE = 512, 128
# On a GPU whole maps were faster from 256 to 4,096 tokens (`benchmarks/results/nvidia-h200`); bytes of one map, of
# which a few are held.
MAP_BYTES = 2**30


class AlignmentLosses(NamedTuple):
    """The weighted sum lambda_R L_REPA + lambda_A L_ATTA with its two unweighted parts (None when not used)."""

    total: Tensor
    feature: Tensor | None
    attention: Tensor | None


def projector(width: int, hidden: int, teacher_width: int, seed: int) -> nn.Sequential:
    """g_phi of Eq. 1: a 3-layer MLP with SiLU from student to teacher width, drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_width)
        )


def feature_loss(projected: Tensor, teacher_tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    """Minus the mean cosine between projected student tokens and teacher tokens, in [-1, 1].

    Eq. 1, arXiv 2505.16792. Both (B, N, D); weights (B,) of the samples, all one by default.
    """
    # The gradient at a token of zeros is 1 / eps, which has to be finite in the precision of the tokens.
    eps = max(1e-8, torch.finfo(projected.dtype).smallest_normal)
    return -_mean(F.cosine_similarity(projected.float(), teacher_tokens.float(), dim=-1, eps=eps), weights)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of values (B, ...), each sample multiplied by its weight (B,)."""
    return values.mean() if weights is None else (values.flatten(1).mean(1) * weights).mean()


def attention_loss(
    student: QK,
    teacher: QK,
    weights: Tensor | None = None,
    chunk: int | None = None,
    whole: Callable[[QK, QK, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """The cross-entropy H(teacher attention, student attention) in nats, mean over batch, heads and queries.

    Sec. 2.3, arXiv 2505.16792. Each q and k is (B, H, N, d) on the same tokens, the widths d of student and teacher may
    differ. With many tokens, queries go `chunk` at a time and their maps are computed again in the backward pass: the
    same numbers, and memory that grows with N instead of N^2.

    weights: (B,) of the samples, all one by default. chunk: queries at once, by default those of `queries_at_once`.
    whole: `whole_maps`, or a compiled one.
    """
    tokens = student[0].shape[2]
    chunk = chunk or queries_at_once(student[0].shape, student[0].device.type)
    if chunk >= tokens:
        return (whole or whole_maps)(student, teacher, weights)
    (q_s, k_s), (q_t, k_t) = student, teacher

    def expected_log(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        return (attention_probabilities(q_t, k_t) * attention_logits(q_s, k_s).log_softmax(-1)).sum(-1)

    rows = [
        checkpoint(expected_log, s, k_s, t, k_t, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(q_s.split(chunk, dim=2), q_t.split(chunk, dim=2), strict=True)
    ]
    return -_mean(torch.cat(rows, dim=2), weights)


def queries_at_once(shape: Sequence[int], device: str) -> int:
    """The number of queries of q (B, H, N, d) that go at a time.

    On a CPU all of them up to `DENSE_UP_TO`, else `QUERIES_AT_ONCE`; on a GPU as many as `MAP_BYTES` hold.
    """
    batch, heads, tokens, _ = shape
    if device == "cuda":
        return max(1, min(tokens, MAP_BYTES // (4 * batch * heads * tokens)))
    return tokens if tokens <= DENSE_UP_TO else QUERIES_AT_ONCE


def whole_maps(student: QK, teacher: QK, weights: Tensor | None = None) -> Tensor:
    """`attention_loss` of all queries at once."""
    return attention_cross_entropy(student, attention_probabilities(*teacher), weights)


def attention_cross_entropy(student: QK, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same cross-entropy for given maps `target` (B, H, N, N), whose rows sum to one."""
    return -_mean((target * attention_logits(*student).log_softmax(-1)).sum(-1), weights)


def attention_logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(d) in float32, (B, H, N, N)."""
    with torch.autocast(q.device.type, enabled=False):
        return q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5


def attention_probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) over the keys in float32, (B, H, N, N)."""
    return attention_logits(q, k).softmax(-1)


def paired_heads(named: Sequence[int] | None, student: int, teacher: int) -> list[int]:
    """Heads to align, student head m with teacher head m: those named, by default all that both have.

    student, teacher: number of heads of each.
    """
    both = min(student, teacher)
    for head in named or []:
        if not 0 <= head < both:
            raise HasteError(
                f"alignment.heads names head {head}; expected 0 to {both - 1} "
                f"(student {student} heads, teacher {teacher})"
            )
    return list(named or range(both))


def resample_tokens(tokens: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Tokens (B, N, D) of `grid` on `new_grid`, (B, N', D) float32; the tokens themselves where the grids are equal.

    Bilinear between token centres (align_corners=False), constant beyond the outermost centres, without antialias.
    """
    if grid == new_grid:
        return tokens
    if tokens.shape[1] != grid[0] * grid[1]:
        raise HasteError(f"{tokens.shape[1]} tokens do not fill a {grid[0]}x{grid[1]} grid")
    maps = tokens.float().transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
    with torch.autocast(maps.device.type, enabled=False):
        maps = F.interpolate(maps, size=new_grid, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def resample_attention(probabilities: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Attention (B, H, N, N) among the tokens of `grid`, resampled to those of `new_grid`, (B, H, N', N') float32.

    First over keys, then over queries, each as in `resample_tokens`; then every row is divided by its sum.
    """
    if grid == new_grid:
        return probabilities
    rows = probabilities.flatten(0, 1)  # (B H, queries, keys)
    by_key = resample_tokens(rows.transpose(1, 2), grid, new_grid)  # (B H, new keys, queries)
    resampled = resample_tokens(by_key.transpose(1, 2), grid, new_grid)  # (B H, new queries, new keys)
    return (resampled / resampled.sum(-1, keepdim=True)).unflatten(0, probabilities.shape[:2])
