"""HASTE for any training loop: phase I aligns a transformer with a frozen teacher, phase II has nothing of it left.

    haste = HASTE(teacher, width=1152, depth=8, layer_pairs=[(4, 8), (5, 9), (6, 10), (7, 11)], stop_at=250_000)
    optimizer = AdamW([*model.parameters(), *haste.parameters()])
    with haste.tap(model.blocks) as seen:
        v = model(x_t, t, y)
    loss = mse(v, eps - x) + haste(seen, images, step)

Eqs. 3 and 4, arXiv 2505.16792. `haste_core.training` uses the same object.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from haste_core.alignment import (
    AlignmentLosses,
    Grid,
    attention_cross_entropy,
    attention_loss,
    attention_probabilities,
    feature_loss,
    paired_heads,
    projector,
    resample_attention,
    resample_tokens,
    whole_maps,
)
from haste_core.errors import HasteError, unknown
from haste_core.gradient_angle import OnlineAngle
from haste_core.taps import QK, Reader, Seen, Taps, tap
from haste_core.teacher import Similarity, Teacher
from haste_core.termination import FixedIteration, Never, Switch, Trigger
from haste_core.training import add_up, means_of


class HASTE(nn.Module):
    """Teacher, projector, losses and trigger of phase I (Eqs. 1, 3, 4, arXiv 2505.16792), and the phase itself.

    Its parameters are the projector's; the teacher is moved with it (`.to`) and is in no state dict. After the switch
    teacher, projector and hooks are gone and the loss is exactly zero. Gradients of the projector are averaged over
    the processes of torch.distributed: DistributedDataParallel wraps the model alone.

    Args:
        teacher: the frozen encoder; None for a module that begins in phase II.
        width: of the student's tokens.
        heads: of the student's attention, and grid: (rows, columns) of its tokens; by default read off the first pass,
            where tokens are taken to fill a square.
        depth: block, counted from 1, whose output is aligned by the feature loss.
        layer_pairs: (student block, teacher block), from 0, whose attention is aligned.
        lambda_feature, lambda_attention: weights of the two losses; 0 leaves one out.
        projector_width: hidden width of the projector. seed: of its weights.
        aligned_heads: indices aligned, student head m with teacher head m; by default all that both have.
        temperature: align attention with the cosine similarities of the teacher's tokens at this temperature
            (`haste_core.teacher.Similarity`); by default with the teacher's own attention.
        t_low, t_high: noise levels between which samples are aligned (Fig. 5); losses stay means over the batch.
        stop_at: step from which phase II begins. trigger: in its place, an object of `haste_core.termination`.
        fade: number of steps over which the weight falls to zero once the trigger has fired.
        watch_angle: take the online estimate of the gradient angle.
        read: how to read q and k off unknown attention (`haste_core.taps.tap`).
        switch: in place of stop_at, trigger and fade, the phase to share.

    Raises:
        HasteError: a teacher block or head does not exist, or both `stop_at` and `trigger` are given.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        *,
        width: int,
        heads: int | None = None,
        grid: Grid | None = None,
        depth: int = 8,
        layer_pairs: Sequence[tuple[int, int]] = (),
        lambda_feature: float = 0.5,
        lambda_attention: float = 0.5,
        projector_width: int = 2048,
        seed: int = 0,
        aligned_heads: Sequence[int] | None = None,
        temperature: float | None = None,
        t_low: float = 0.0,
        t_high: float = 1.0,
        stop_at: int | None = None,
        trigger: Trigger | None = None,
        fade: int = 0,
        watch_angle: bool = False,
        read: Reader | None = None,
        switch: Switch | None = None,
    ) -> None:
        super().__init__()
        self.switch = switch or _switch(teacher is not None, stop_at, trigger, fade)
        self.depth, self.lambda_feature, self.lambda_attention = depth, lambda_feature, lambda_attention
        self.t_low, self.t_high, self.aligned_heads, self.read = t_low, t_high, aligned_heads, read
        self.grid, self.temperature = grid, temperature
        self.whole_maps = whole_maps  # or a compiled one
        self.pairs = [(int(s), int(t)) for s, t in layer_pairs] if lambda_attention > 0 else []
        self._teacher: list[Teacher] = []  # a list keeps it out of parameters and state dict
        self._gone: list[nn.Parameter] = []  # the projector's after the switch, until an optimizer lets them go
        self.projector: nn.Sequential | None = None
        self.angle: OnlineAngle | None = None
        self.step = 0
        self.window: dict[str, Tensor] = {}  # sums since the last call of `measure`
        if teacher is None:
            return
        self._teacher.append(teacher)
        self._check_attention(layer_pairs, heads)
        if grid is not None:
            self._warn_of_grids(grid)
        if lambda_feature > 0:
            self.projector = projector(width, projector_width, teacher.width, seed)
            for parameter in self.projector.parameters():
                parameter.register_hook(_mean_over_processes)
        if watch_angle:
            self.angle = OnlineAngle(teacher.mean.device, processes=_processes())

    def _check_attention(self, layer_pairs: Sequence[tuple[int, int]], heads: int | None) -> None:
        for _, block in layer_pairs:
            if block >= self.teacher.blocks:
                raise unknown("teacher block in alignment.layer_pairs", block, range(self.teacher.blocks))
        if self.lambda_attention > 0 and not self.pairs:
            raise HasteError("lambda_attention > 0 without layer_pairs; expected [(student block, teacher block), ...]")
        if self.pairs and self.temperature is None and not self.teacher.heads:
            raise HasteError(
                "lambda_attention > 0 with a teacher of feature maps, which has no attention; expected a temperature "
                "(alignment.attention_from=similarity), or lambda_attention 0"
            )
        if heads is not None and (self.pairs or self.teacher.heads):
            paired_heads(self.aligned_heads, heads, self.teacher.heads if self.temperature is None else heads)

    @property
    def phase(self) -> int:
        """1 while alignment is on, 2 from the switch on."""
        return self.switch.phase

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher of phase I."""
        if not self._teacher:
            raise HasteError("there is no teacher in phase II")
        return self._teacher[0]

    @property
    def teacher_blocks(self) -> tuple[int, ...]:
        """Teacher blocks, from 0, whose q and k are needed."""
        return tuple(sorted({block for _, block in self.pairs}))

    @property
    def taps(self) -> Taps:
        """Tokens, q and k to read off the student."""
        depths = (self.depth,) if self.lambda_feature > 0 else ()
        return Taps(depths, tuple(sorted({block for block, _ in self.pairs})))

    def tap(self, blocks: Sequence[nn.Module]) -> AbstractContextManager[Seen]:
        """Context in which a forward pass through the student leaves what the losses need; no effect in phase II.

        blocks: the transformer blocks of the student, in order; `haste_core.taps.tap` lists the known kinds.
        """
        return tap(blocks, self.taps if self.phase == 1 else Taps(), self.read)

    def update(self, step: int) -> bool:
        """Ask the trigger before step `step`; True when phase II begins right now."""
        switched = self.switch.update(step)
        if switched:
            self.finish()
        return switched

    def finish(self) -> None:
        """Drop teacher, projector and angle for good."""
        self._teacher.clear()
        self._gone.extend(self.parameters())
        self.projector = self.angle = None
        self.window = {}

    def release(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the projector's parameters and their moments out of an optimizer, once phase I is over."""
        gone = {id(parameter) for parameter in self._gone}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        for parameter in self._gone:
            optimizer.state.pop(parameter, None)
        self._gone.clear()

    def forward(self, seen: Seen, images: Tensor, step: int, t: Tensor | None = None) -> Tensor:
        """Weighted alignment loss of a step, a scalar: lambda_R L_REPA + lambda_A L_ATTA, exactly 0 in phase II.

        seen: from `tap`, after the student's forward pass. images: (B, C, S, S) in [-1, 1], clean: the teacher's input.
        step: from 0; the trigger is asked first. t: noise levels (B,) in [0, 1]; needed where t_low, t_high or the
        online angle are used.
        """
        self.step = step
        self.update(step)
        if self.phase == 2:
            return torch.zeros((), device=images.device)
        losses = self.losses(seen, images, t)
        add_up(self.window, {"feature": losses.feature, "attention": losses.attention})
        return self.switch.weight(step) * losses.total

    def losses(self, seen: Seen, images: Tensor, t: Tensor | None = None, watch: bool = True) -> AlignmentLosses:
        """Alignment losses of a phase I forward pass, as in `forward`; watch=False leaves the online angle as it is."""
        everywhere, watched = (self.t_low, self.t_high) == (0, 1), self.angle is not None and watch
        if t is None and (watched or not everywhere):
            raise HasteError("no noise levels were given; t_low, t_high, watch_angle need haste(seen, images, step, t)")
        weights = None if everywhere or t is None else ((t >= self.t_low) & (t <= self.t_high)).float()
        if self.angle is not None and watch and t is not None:
            seen = self.angle.watch(seen, t)
        similarity = None
        if self.pairs and self.temperature is not None:
            similarity = Similarity(self.temperature, heads=seen.qk[self.pairs[0][0]][0].shape[1])
        target = self.teacher(images, self.teacher_blocks, similarity)
        feature = attention = None
        total = torch.zeros((), device=images.device)
        if self.projector is not None:
            tokens = seen.tokens[self.depth]
            projected = resample_tokens(self.projector(tokens), self._grid(tokens.shape[1]), self.teacher.grid)
            feature = feature_loss(projected, target.tokens, weights)
            total = total + self.lambda_feature * feature
        if self.pairs:
            losses = [self._attention_loss(seen.qk[s], target.qk[b], weights) for s, b in self.pairs]
            attention = torch.stack(losses).mean()
            total = total + self.lambda_attention * attention
        return AlignmentLosses(total, feature, attention)

    def _attention_loss(self, student: QK, target: QK, weights: Tensor | None) -> Tensor:
        heads = paired_heads(self.aligned_heads, student[0].shape[1], target[0].shape[1])
        # A slice, not an index, where the heads are a prefix: no copy.
        chosen = slice(len(heads)) if heads == list(range(len(heads))) else heads
        student, target = ((q[:, chosen], k[:, chosen]) for q, k in (student, target))
        grid = self._grid(student[0].shape[2])
        if grid == self.teacher.grid:
            return attention_loss(student, target, weights, whole=self.whole_maps)
        resampled = resample_attention(attention_probabilities(*target), self.teacher.grid, grid)
        return attention_cross_entropy(student, resampled, weights)

    def _grid(self, tokens: int) -> Grid:
        """The student's token grid, by default a square one."""
        if self.grid is None:
            side = round(tokens**0.5)
            if side * side != tokens:
                raise HasteError(f"the student has {tokens} tokens, no square; expected grid=(rows, columns)")
            self._warn_of_grids((side, side))
            self.grid = (side, side)
        return self.grid

    def _warn_of_grids(self, grid: Grid) -> None:
        # Some encoders are published for large inputs (518 px for DINOv2), which costs time unnoticed.
        teacher = self.teacher
        if grid == teacher.grid:
            return
        same = [n * (pixels // own) for n, pixels, own in zip(grid, teacher.image_size, teacher.grid, strict=True)]
        warnings.warn(
            f"token grids differ: student {grid[0]}x{grid[1]}, teacher {teacher.grid[0]}x{teacher.grid[1]}; features "
            f"and attention are resampled. For equal grids: teacher.kwargs={{img_size: {same}}}",
            stacklevel=3,
        )

    def measure(self, **readings: float) -> dict[str, Any]:
        """Measurements since the last call, which the trigger reads: call it every so many steps, in all processes.

        Returns:
            "step", "phase", `readings`; in phase I "feature" and "attention", means of the unweighted losses; with
            `watch_angle` "online", cosines by loss and bin of noise levels (None: no sample), and "online_angle", their
            mean. Of several processes these are the first one's.
        """
        line: dict[str, Any] = {"step": self.step + 1, "phase": self.phase, **means_of(self.window), **readings}
        if self.angle is not None:
            line |= self.angle.summary()
        self.window = {}
        if _processes() > 1:
            # Triggers of all processes read the same line, or rounding could part them at the switch.
            sent = [line]
            distributed.broadcast_object_list(sent, src=0)
            (line,) = sent
        self.switch.observe(line)
        return line

    def get_extra_state(self) -> dict[str, Any]:
        """Phase, trigger log, and sums since the last measurement."""
        angle = {} if self.angle is None else self.angle.state_dict()
        return {"switch": self.switch.state_dict(), "step": self.step, "window": dict(self.window), "angle": angle}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue in the saved phase."""
        self.step, self.window = state["step"], dict(state["window"])
        if self.angle is not None and state["angle"]:
            self.angle.load_state_dict(state["angle"])

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Continue where `state_dict` was saved; one from phase II drops teacher and projector first."""
        self.switch.load_state_dict(state_dict["_extra_state"]["switch"])
        if self.phase == 2:
            self.finish()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HASTE:
        # The teacher follows, though it is no registered module.
        for teacher in self._teacher:
            teacher._apply(fn)
        if self.angle is not None:
            self.angle.apply(fn)
        return super()._apply(fn, recurse)


def _switch(aligned: bool, stop_at: int | None, trigger: Trigger | None, fade: int) -> Switch:
    if stop_at is not None and trigger is not None:
        raise HasteError(f"stop_at={stop_at} and a trigger were given; expected one of them")
    ends = trigger or (Never() if stop_at is None else FixedIteration(stop_at))
    return Switch(ends if aligned else None, fade)


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _mean_over_processes(gradient: Tensor) -> Tensor:
    if _processes() == 1:
        return gradient
    total = gradient.clone()
    distributed.all_reduce(total)
    return total / _processes()
