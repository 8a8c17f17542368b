"""Phase I: feature and attention alignment with a frozen teacher (Eqs. 1 and 4, Sec. 2.3, arXiv 2505.16792).

`Alignment` owns the teacher and the projector and lives in phase I only; the generator knows neither. Both losses
are computed in float32 whatever the precision of the run.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from haste_core.errors import HasteError, unknown
from haste_core.models import DiffusionTransformer
from haste_core.models.layers import QK, Tapped, Taps
from haste_core.study import config
from haste_core.teacher import Teacher, TeacherOutput
from haste_core.token_grids import Grid, resample_attention, resample_tokens

# Where chunks begin to be faster than whole maps on a CPU, and their size (`make bench`: attention).
DENSE_UP_TO, QUERIES_AT_ONCE = 512, 128


def feature_loss(projected: Tensor, teacher_tokens: Tensor, weights: Tensor | None = None) -> Tensor:
    """Minus the mean cosine between projected student tokens and teacher tokens, in [-1, 1].

    Eq. 1, arXiv 2505.16792. Both (B, N, D); weights (B,) of the samples, all one by default.
    """
    return -_mean(F.cosine_similarity(projected.float(), teacher_tokens.float(), dim=-1), weights)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of values (B, ...), each sample multiplied by its weight (B,)."""
    return values.mean() if weights is None else (values.flatten(1).mean(1) * weights).mean()


def attention_loss(student: QK, teacher: QK, weights: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """The cross-entropy H(teacher attention, student attention) in nats, mean over batch, heads and queries.

    Sec. 2.3, arXiv 2505.16792. Each q and k is (B, H, N, d), the widths d of student and teacher may differ; logits
    are scaled by 1 / sqrt(d). Up to `DENSE_UP_TO` tokens one (B, H, N, N) map of each side is held. With more, queries
    go `chunk` at a time and their maps are made a second time in the backward pass: the same numbers, and memory that
    grows with N instead of N^2.

    Args:
        student, teacher: q and k on the same tokens.
        weights: (B,) of the samples, all one by default.
        chunk: queries held at once; by default all of them up to `DENSE_UP_TO` tokens, else `QUERIES_AT_ONCE`.
    """
    tokens = student[0].shape[2]
    chunk = chunk or (tokens if tokens <= DENSE_UP_TO else QUERIES_AT_ONCE)
    if chunk >= tokens:
        return attention_cross_entropy(student, attention_probabilities(*teacher), weights)
    (q_s, k_s), (q_t, k_t) = student, teacher
    queries = zip(q_s.split(chunk, dim=2), q_t.split(chunk, dim=2), strict=True)
    rows = [
        checkpoint(_expected_log, s, k_s, t, k_t, use_reentrant=False, preserve_rng_state=False) for s, t in queries
    ]
    return -_mean(torch.cat(rows, dim=2), weights)


def _expected_log(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Of each query (B, H, n), the student's log attention expected under the teacher's."""
    return (attention_probabilities(q_t, k_t) * attention_logits(q_s, k_s).log_softmax(-1)).sum(-1)


def attention_cross_entropy(student: QK, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """The cross-entropy H(target, student attention) in nats, mean over batch, heads and queries.

    q and k of the student are (B, H, N, d), the target (B, H, N, N) with rows that sum to one; weights (B,) of the
    samples, all one by default.
    """
    return -_mean((target * attention_logits(*student).log_softmax(-1)).sum(-1), weights)


def attention_logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(d) in float32, (B, H, N, N)."""
    with torch.autocast(q.device.type, enabled=False):
        return q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5


def attention_probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) over the keys in float32, (B, H, N, N)."""
    return attention_logits(q, k).softmax(-1)


class AlignmentLosses(NamedTuple):
    """The weighted sum lambda_R L_REPA + lambda_A L_ATTA with its two unweighted parts (None when not used)."""

    total: Tensor
    feature: Tensor | None
    attention: Tensor | None


def projector(width: int, hidden: int, teacher_width: int, seed: int) -> nn.Sequential:
    """g_phi: a 3-layer MLP with SiLU from student to teacher width, drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_width)
        )


class Alignment:
    """Everything that exists in phase I and nowhere else: teacher, projector, and which layers and heads pair up.

    Where student and teacher have different token grids, features are compared on the teacher's grid and attention on
    the student's (Tables 11, 12, arXiv 2505.16792; `haste_core.token_grids`).

    Args:
        alignment: weights, depth, layer pairs and heads.
        student: the generator, asked for its width, heads and token grid only.
        teacher: the frozen encoder.
        seed: of the projector's initialisation.

    Raises:
        HasteError: a teacher layer or head does not exist.
    """

    def __init__(self, alignment: config.Alignment, student: DiffusionTransformer, teacher: Teacher, seed: int) -> None:
        self.config, self.teacher = alignment, teacher
        self.heads = paired_heads(alignment, student.heads, teacher.heads)
        self.grids: tuple[Grid, Grid] = student.grid, teacher.grid
        if student.grid != teacher.grid:
            _warn_of_grids(student.grid, teacher)
        _check_layers(alignment, student, teacher)
        pairs = alignment.layer_pairs if alignment.lambda_attention > 0 else []
        self.pairs = [(int(s), int(t)) for s, t in pairs]
        with_features = alignment.lambda_feature > 0
        self.taps = Taps(
            depths=(alignment.depth,) if with_features else (), blocks=tuple(sorted({s for s, _ in self.pairs}))
        )
        self.teacher_blocks = tuple(sorted({t for _, t in self.pairs}))
        width = student.x_embedder.proj.out_channels
        self.projector: nn.Module | None = (
            projector(width, alignment.projector_width, teacher.width, seed) if with_features else None
        )

    @property
    def everywhere(self) -> bool:
        """True when samples of every noise level are aligned."""
        return (self.config.t_low, self.config.t_high) == (0, 1)

    def inside(self, t: Tensor) -> Tensor:
        """1 for samples whose noise level t (B,) lies in the aligned interval, else 0, float32."""
        return ((t >= self.config.t_low) & (t <= self.config.t_high)).float()

    def losses(
        self, tapped: Tapped, images: Tensor, t: Tensor | None = None, seen: TeacherOutput | None = None
    ) -> AlignmentLosses:
        """Alignment of what the student handed out with the teacher's view of the clean images.

        Args:
            tapped: from a forward pass with `self.taps`.
            images: (B, C, S, S) in [-1, 1], the teacher's input.
            t: noise levels (B,) in [0, 1], for an alignment restricted to some of them; all are aligned without it.
            seen: what the teacher makes of the images, where that is known; they are not looked at then.
        """
        weights = None if t is None or self.everywhere else self.inside(t)
        seen = self.teacher(images, self.teacher_blocks) if seen is None else seen
        feature = attention = None
        total = torch.zeros((), device=images.device)
        if self.projector is not None:
            projected = resample_tokens(self.projector(tapped.tokens[self.config.depth]), *self.grids)
            feature = feature_loss(projected, seen.tokens, weights)
            total = total + self.config.lambda_feature * feature
        if self.pairs:
            losses = [self._attention_loss(tapped.qk[a], seen.qk[b], weights) for a, b in self.pairs]
            attention = torch.stack(losses).mean()
            total = total + self.config.lambda_attention * attention
        return AlignmentLosses(total, feature, attention)

    def _attention_loss(self, student: QK, teacher: QK, weights: Tensor | None) -> Tensor:
        student, teacher = self._pick_heads(student), self._pick_heads(teacher)
        student_grid, teacher_grid = self.grids
        if student_grid == teacher_grid:
            return attention_loss(student, teacher, weights)
        target = resample_attention(attention_probabilities(*teacher), teacher_grid, student_grid)
        return attention_cross_entropy(student, target, weights)

    def _pick_heads(self, qk: QK) -> QK:
        # A slice, not an index, where the heads are a prefix: no copy.
        if self.heads == list(range(len(self.heads))):
            return qk[0][:, : len(self.heads)], qk[1][:, : len(self.heads)]
        return qk[0][:, self.heads], qk[1][:, self.heads]


def paired_heads(alignment: config.Alignment, student: int, teacher: int) -> list[int]:
    """The heads aligned, of a student and a teacher with so many heads each: those named, or all both have.

    Raises:
        HasteError: a head is named that one of the two does not have.
    """
    possible = range(min(student, teacher))
    for head in alignment.heads or []:
        if head not in possible:
            raise HasteError(
                f"alignment.heads names head {head}; possible: 0 to {possible[-1]} "
                f"(student {student} heads, teacher {teacher})"
            )
    return list(alignment.heads or possible)


def _warn_of_grids(grid: Grid, teacher: Teacher) -> None:
    # Some encoders are published for large inputs (518 px for DINOv2), which costs time unnoticed.
    patches = [pixels // tokens for pixels, tokens in zip(teacher.image_size, teacher.grid, strict=True)]
    same = [tokens * patch for tokens, patch in zip(grid, patches, strict=True)]
    warnings.warn(
        f"token grids differ: student {grid[0]}x{grid[1]}, teacher {teacher.grid[0]}x{teacher.grid[1]}; features and "
        f"attention are resampled. For equal grids: teacher.kwargs={{img_size: {same}}}",
        stacklevel=3,
    )


def _check_layers(alignment: config.Alignment, student: DiffusionTransformer, teacher: Teacher) -> None:
    for student_block, teacher_block in alignment.layer_pairs:
        if student_block >= len(student.blocks):
            raise unknown("student block in alignment.layer_pairs", student_block, range(len(student.blocks)))
        if teacher_block >= teacher.blocks:
            raise unknown("teacher block in alignment.layer_pairs", teacher_block, range(teacher.blocks))
    if alignment.lambda_feature > 0 and not 1 <= alignment.depth <= len(student.blocks):
        raise unknown("alignment.depth (counted from 1)", alignment.depth, range(1, len(student.blocks) + 1))
