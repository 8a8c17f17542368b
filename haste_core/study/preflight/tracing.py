"""A training step followed operation by operation on tensors that have shapes and no contents.

The real networks and losses run, so what is counted is what trains; an XL/2 takes seconds and no memory. Operations
are those of matrix products, convolutions and attention, forward and backward, a multiply-add as two; normalisation,
activation functions, the optimizer and averaging are left out.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from haste_core.alignment import Alignment
from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer, build
from haste_core.paths import objective_of
from haste_core.study import config
from haste_core.study.pretrain import build_teacher
from haste_core.teacher import Teacher

# CLIP's text tokens per caption, which an MM-DiT is taken to have.
TEXT_TOKENS = 77
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Shapes of q, k and v decide; torch counts the GPU's fused kernels and leaves the CPU's out.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}


class Example(NamedTuple):
    """One training example: side and channels of what is modelled, classes, and side and channels of its image."""

    size: int
    channels: int
    classes: int
    image_size: int
    image_channels: int


class Networks(NamedTuple):
    """The networks of a run on torch's meta device; teacher and alignment are None for a run without alignment."""

    student: DiffusionTransformer
    teacher: Teacher | None
    alignment: Alignment | None


class Cost(NamedTuple):
    """One image's share of a step in one phase: operations forward and in all, bytes kept for the backward pass."""

    forward: int
    flops: int
    activations: int


def student_of(run: config.RunConfig, example: Example) -> DiffusionTransformer:
    """A run's generator on the meta device."""
    with torch.device("meta"):
        return build(run.model, image_size=example.size, channels=example.channels, classes=example.classes, seed=0)


def teacher_of(run: config.RunConfig) -> Teacher:
    """A run's teacher on the meta device, without looking for its weights.

    Raises:
        HasteError: timm does not know it, or it cannot be aligned with.
    """
    with torch.device("meta"):
        return build_teacher(run.teacher.model_copy(update={"weights": "random"}))


def networks(run: config.RunConfig, student: DiffusionTransformer, teacher: Teacher | None) -> Networks:
    """The networks of a run with what joins them.

    Raises:
        HasteError: layers, heads or token grids do not fit.
    """
    if teacher is None or not run.alignment.active:
        return Networks(student, None, None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of token grids that differ, which is said elsewhere
        return Networks(student, teacher, Alignment(run.alignment, student, teacher, seed=0))


def networks_of(run: config.RunConfig, example: Example) -> Networks:
    """The networks of a run from its settings alone.

    Raises:
        HasteError: the patch does not divide the example, or teacher and student do not fit together.
    """
    if example.size % run.model.patch:
        possible = ", ".join(str(n) for n in range(1, example.size + 1) if example.size % n == 0)
        raise HasteError(f"model.patch {run.model.patch} does not divide the size {example.size}; possible: {possible}")
    return networks(run, student_of(run, example), teacher_of(run) if run.alignment.active else None)


def matrices(module: nn.Module | None) -> int:
    """Number of weights of linear and convolution layers, which autocast copies to 16 bits."""
    layers = module.modules() if module is not None else ()
    return sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear | nn.Conv2d))


def teacher_flops(nets: Networks, example: Example) -> int:
    """Operations of the teacher's forward pass of one image, 0 without a teacher."""
    if nets.alignment is None:
        return 0
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        nets.alignment.teacher(_inputs(nets.student, example)[3], nets.alignment.teacher_blocks)
    return counter.get_total_flops()


def cost(nets: Networks, example: Example, phase: int, precision: str) -> Cost:
    """One image's share of a training step in `phase`, from networks without contents.

    Blocks that nothing is handed out of all cost the same: few are traced, the others are multiples of one.
    """
    depth, taps = len(nets.student.blocks), nets.alignment.taps if nets.alignment and phase == 1 else None
    tapped = max((*taps.depths, *(b + 1 for b in taps.blocks))) if taps else 1
    if tapped + 1 >= depth or depth < 3:
        return trace(nets, example, phase, precision)
    two, three = (trace(nets, example, 2, precision, blocks) for blocks in (2, 3))
    found = two if phase == 2 else trace(nets, example, 1, precision, tapped + 1)
    block, left_out = Cost(*(b - a for a, b in zip(two, three, strict=True))), depth - tapped - 1
    return Cost(*(part + left_out * one for part, one in zip(found, block, strict=True)))


def trace(nets: Networks, example: Example, phase: int, precision: str, blocks: int | None = None) -> Cost:
    """The step of `haste_core.training` at batch 1, followed operation by operation.

    blocks: how many of the student's blocks take part, the first ones and the last; all by default.
    """
    alignment = nets.alignment if phase == 1 else None
    projector = alignment.projector if alignment else None
    counting = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    with _shortened(nets.student, blocks):
        saved = SavedBytes(nets.student, nets.teacher, projector)
        with counting as counter, saved_tensors_hooks(saved, lambda x: x):
            with torch.autocast("cpu", dtype=_DTYPES[precision], enabled=precision != "no"):
                loss = _loss(nets.student, alignment, example)
            forward = counter.get_total_flops()
            loss.backward()
        copied = matrices(nets.student) + matrices(projector) if precision != "no" else 0
    for module in (nets.student, projector):
        if module is not None:
            module.zero_grad(set_to_none=True)
    return Cost(forward, counter.get_total_flops(), saved.total - 2 * copied)


@contextmanager
def _shortened(student: DiffusionTransformer, blocks: int | None) -> Iterator[None]:
    """While open, the student has its first blocks - 1 blocks and its last; all for None."""
    name = "joint_blocks" if student.kind == "mmdit" else "blocks"
    whole = getattr(student, name)
    if blocks is not None:
        setattr(student, name, nn.ModuleList([*whole[: blocks - 1], whole[-1]]))
    try:
        yield
    finally:
        setattr(student, name, whole)


def _loss(student: Any, alignment: Alignment | None, example: Example) -> Tensor:
    x_t, t, y, images = _inputs(student, example)
    objective = objective_of(student.kind)
    eps = torch.zeros_like(x_t)
    if alignment is None:
        return objective.loss(student(x_t, t, y), x_t, eps, t).mean()
    tapped = student(x_t, t, y, alignment.taps)
    aligned = alignment.losses(tapped, images)
    return objective.loss(tapped.output, x_t, eps, t).mean() + aligned.total


def _inputs(student: Any, example: Example) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised example, timestep, label (or text tokens) and image, each of batch 1."""
    x = torch.zeros(1, example.channels, example.size, example.size)
    t = objective_of(student.kind).timesteps(torch.full((1,), 0.5))
    y = torch.zeros(1, dtype=torch.int64)
    if student.kind == "mmdit":
        y = torch.zeros(1, TEXT_TOKENS, student.context_embedder.in_features)
    return x, t, y, torch.zeros(1, example.image_channels, example.image_size, example.image_size)


class SavedBytes:
    """A hook that adds up what autograd keeps for the backward pass, each piece of memory once.

    Parameters and buffers of `modules` are there anyway and do not count.
    """

    def __init__(self, *modules: nn.Module | None) -> None:
        self.sizes: dict[int, int] = {}
        self.held: list[Tensor] = []  # an address is free again, and taken again, once its tensor is gone
        there = [x for m in modules if m is not None for x in (*m.parameters(), *m.buffers())]
        self.known = {_address(x) for x in there}

    def __call__(self, x: Tensor) -> Tensor:
        """Note x, and keep it as it is."""
        if _address(x) not in self.known:
            self.sizes[_address(x)] = x.untyped_storage().nbytes()
            self.held.append(x)
        return x

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.sizes.values())


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@contextmanager
def without_contents(nets: Networks) -> Iterator[Networks]:
    """While open, copies of meta networks count as the CPU's and tensors made meanwhile have shapes and no contents.

    torch's meta device knows no autocast; its fake tensors do.
    """
    student, teacher, alignment = copy.deepcopy(nets)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in (student, teacher, alignment.projector if alignment else None):
                if module is not None:
                    module.to_empty(device="cpu")
            yield Networks(student, teacher, alignment)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
