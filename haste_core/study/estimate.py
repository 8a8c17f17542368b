"""Estimates of what a run or a study takes: operations, memory, time and disk space (`haste plan`, `--dry-run`).

Operations are counted by torch on one training step of the real networks and losses, with fake tensors that have shapes
and no data: matrix products, convolutions and attention, forward and backward, a multiply-add as two. Memory is a
formula of parameters and of what autograd saves. Time is operations over the FLOP/s of about twenty real training steps
on this device, or over a rate that the user gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm.auto import tqdm

from haste_core import sampling
from haste_core.alignment import paired_heads
from haste_core.errors import HasteError
from haste_core.haste import HASTE
from haste_core.models import DiffusionTransformer
from haste_core.paths import objective_of
from haste_core.study import config, cost
from haste_core.study.data.base import Dataset
from haste_core.study.pretrain import build_teacher
from haste_core.study.runs import machine
from haste_core.study.train import build_haste, create, student_of
from haste_core.teacher import Teacher
from haste_core.training import Batch, step_losses

# Published dense matrix rates in FLOP/s: 16-bit inputs with float32 sums, and plain float32 (torch's default).
RATES = {
    "16 bits": {"A100": 312e12, "H100 SXM": 989e12, "RTX 4090": 165e12},
    "float32": {"A100": 19.5e12, "H100 SXM": 67e12, "RTX 4090": 82.6e12},
}
# Share of such a rate that training is assumed to reach.
UTILISATION = 0.4
# CLIP's text tokens per caption, which an MM-DiT is taken to have.
TEXT_TOKENS = 77
PHASES = {1: "phase I", 2: "phase II"}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Parameters of the student that is timed, and FLOPs of one of its steps.
_LARGEST, _STEP_FLOPS = {"cpu": 5e7, "cuda": 4e8}, {"cpu": 2e10, "cuda": 2e13}
# torch counts attention by the GPU's fused kernels and leaves the CPU's out.
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
    """The networks of a run on torch's meta device; teacher and haste are None for a run without alignment."""

    student: DiffusionTransformer
    teacher: Teacher | None
    haste: HASTE | None

    @property
    def projector(self) -> nn.Module | None:
        """The projector of the feature loss."""
        return self.haste.projector if self.haste else None

    @property
    def aligned_heads(self) -> int:
        """Number of heads whose attention is aligned."""
        if self.haste is None or self.teacher is None:
            return 0
        return len(paired_heads(self.haste.aligned_heads, self.student.heads, self.teacher.heads))


def networks_of(run: config.RunSettings, example: Example) -> Networks:
    """The networks of a run, without data and without looking for the teacher's weights.

    Raises:
        HasteError: the patch does not divide the example, timm does not know the teacher, or layers, heads or token
            grids do not fit.
    """
    if example.size % run.model.patch:
        fitting = ", ".join(str(n) for n in range(1, example.size + 1) if example.size % n == 0)
        raise HasteError(
            f"model.patch is {run.model.patch}, which does not divide the side {example.size} of what is modelled; "
            f"expected one of: {fitting}"
        )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # token grids that differ are reported by the dry run
        student = student_of(run.model, example.size, example.channels, example.classes, seed=0)
        if not run.alignment.active:
            return Networks(student, None, None)
        teacher = build_teacher(run.teacher.model_copy(update={"weights": "random"}))
        return Networks(student, teacher, build_haste(run, student, teacher, seed=0))


def parameters(module: nn.Module | None) -> int:
    """Number of parameters, 0 for None."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


# -- one training step -------------------------------------------------------------------------------------------------


class StepCost(NamedTuple):
    """Cost of one image in a step: FLOPs of the forward pass, FLOPs in all, bytes that autograd saves."""

    forward: int
    flops: int
    activations: int


_STEP_COSTS: dict[str, StepCost] = {}


def step_cost(run: config.RunSettings, example: Example, phase: int) -> StepCost:
    """Cost of one image in a training step of `phase`; arms with the same networks are traced once.

    Blocks without alignment all cost the same, so of a deep student only the first ones are traced.
    """
    used: list[Any] = [run.model.model_dump(), run.train.precision, example, phase]
    deepest = 1
    if phase == 1:
        aligned, losses = run.alignment, (run.alignment.lambda_feature > 0, run.alignment.lambda_attention > 0)
        used += [losses, aligned.model_dump(exclude={"lambda_feature", "lambda_attention"})]
        used += [run.teacher.model_dump(exclude={"weights", "fitting"})]
        taps = networks_of(run, example).haste.taps  # type: ignore[union-attr]
        deepest = max((*taps.depths, *(block + 1 for block in taps.blocks)))
    key = config.digest(used)
    if key not in _STEP_COSTS:
        left_out = run.model.depth - deepest - 2
        if left_out <= 0:
            _STEP_COSTS[key] = trace(run, example, phase)
        else:
            one, two = (trace(with_depth(run, deepest + n), example, phase) for n in (1, 2))
            _STEP_COSTS[key] = StepCost(*(b + left_out * (b - a) for a, b in zip(one, two, strict=True)))
    return _STEP_COSTS[key]


def trace(run: config.RunSettings, example: Example, phase: int) -> StepCost:
    """Cost of one image, from one step of batch 1 on fake tensors."""
    nets = networks_of(run, example)
    saved: dict[int, Tensor] = {}
    dtype = _DTYPES.get(run.train.precision)

    def pack(x: Tensor) -> Tensor:
        if _address(x) not in known:
            saved[_address(x)] = x
        return x

    with _fake(nets) as modules:
        known = {_address(x) for m in modules for x in (*m.parameters(), *m.buffers())}
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = _loss(nets.student, nets.haste if phase == 1 else None, example)
            forward = counter.get_total_flops()
            loss.backward()
            flops = counter.get_total_flops()
        activations = sum(x.untyped_storage().nbytes() for x in saved.values())
    return StepCost(forward, flops, activations - _copies(nets, phase, run.train.precision))


@contextmanager
def _fake(nets: Networks) -> Iterator[list[nn.Module]]:
    """While open, networks count as the CPU's; torch's meta device has no autocast, fake tensors have it."""
    modules = [m for m in (nets.student, nets.teacher, nets.projector) if m is not None]
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in modules:
                module.to_empty(device="cpu")
            yield modules
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def _loss(student: Any, haste: HASTE | None, example: Example) -> Tensor:
    """The loss of a training step at batch 1."""
    x = torch.zeros(1, example.channels, example.size, example.size)
    y = torch.zeros(1, dtype=torch.int64)
    if student.kind == "mmdit":
        y = torch.zeros(1, TEXT_TOKENS, student.context_embedder.in_features)
    images = torch.zeros(1, example.image_channels, example.image_size, example.image_size)
    u, eps = torch.full((1,), 0.5), torch.zeros_like(x)
    return step_losses(student, objective_of(student.kind), Batch(x, y, images), u, eps, y, haste, watch=False).total()


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _copies(nets: Networks, phase: int, precision: str) -> int:
    """Bytes of the 16-bit copies that autocast makes of the weights of linear and convolution layers."""
    trained = [nets.student, nets.projector if phase == 1 else None] if precision in _DTYPES else []
    layers = (m for module in trained if module is not None for m in module.modules())
    return 2 * sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear | nn.Conv2d))


# -- a run -------------------------------------------------------------------------------------------------------------


def memory(nets: Networks, found: StepCost, phase: int, train: config.TrainSettings, images: int) -> dict[str, int]:
    """Bytes on a device at the peak of a step, by what they hold.

    Everything is in float32 except autocast's copies of weights. The working memory of one block, the device's own
    context and fragmentation come on top.

    Args:
        nets, found: the run's networks and their cost in `phase`.
        train: decides on precision and on micro-batches, from one to the next of which gradients are kept.
        images: images of a micro-batch on the device.
    """
    student, projector = parameters(nets.student), parameters(nets.projector) if phase == 1 else 0
    held = {
        "weights": 4 * (student + projector),
        "average": 4 * student,
        "optimizer": 8 * (student + projector),
        "teacher": 4 * parameters(nets.teacher) if phase == 1 else 0,
        "16-bit copies": _copies(nets, phase, train.precision),
        "activations": _kept_activations(nets.student, found, train) * images,
        "gradients": 4 * (student + projector),
    }
    if train.accumulate == 1:  # activations are freed while the backward pass makes gradients: the larger one counts
        del held[min("activations", "gradients", key=held.__getitem__)]
    return {name: size for name, size in held.items() if size}


def _kept_activations(student: Any, found: StepCost, train: config.TrainSettings) -> int:
    """Bytes of activations per image at the peak: all, or the inputs of blocks and the activations of one block."""
    if not train.activation_checkpointing:
        return found.activations
    depth, tokens = len(student.blocks), student.grid[0] * student.grid[1]
    return depth * tokens * student.x_embedder.proj.out_channels * 4 + found.activations // depth


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    steps: steps that the run trains itself. flops: FLOPs of a step, the whole batch. device_flops: those of the device
    with the most images. memory: bytes on a device at the peak, by what they hold. checkpoint: bytes of a checkpoint.
    kept: number of the run's own checkpoints that stay.
    """

    steps: int
    flops: int
    device_flops: float
    memory: Mapping[str, int]
    checkpoint: int
    kept: int

    @property
    def peak(self) -> int:
        """Bytes on a device at the peak of a step."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """Sizes and costs of a run, the latter by phase (1, 2); a phase without steps is left out.

    student, projector, teacher: numbers of parameters. forward: FLOPs of the student's forward pass of one image.
    images: images of a micro-batch on one device. gpus: devices that share a step.
    """

    student: int
    projector: int
    teacher: int
    forward: int
    images: int
    gpus: int
    phases: Mapping[int, Phase]

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints that stay and of two more: the temporary one and the one being written."""
        return sum(p.checkpoint * p.kept for p in self.phases.values()) + self.writing

    @property
    def writing(self) -> int:
        """Bytes of checkpoints that are there for a time only."""
        return 2 * max(p.checkpoint for p in self.phases.values())

    def hours(self, speed: Mapping[int, float]) -> dict[int, float]:
        """Hours by phase, where a device reaches `speed` FLOP/s in each phase. GPUs are not taken to wait."""
        return {n: p.steps * p.device_flops / speed[n] / 3600 for n, p in self.phases.items()}


def estimate(run: config.RunSettings, example: Example, gpus: int = 1, shared: int = 0) -> Estimate:
    """Estimate of a run's operations, memory and disk space.

    Args:
        run, example: the run, and one example of its data.
        gpus: devices that share the images of a step, as evenly as possible.
        shared: steps that another arm takes for this one (`shared_steps`); they and their checkpoints do not count.

    Raises:
        HasteError: there are more devices than images, or the networks do not fit (`networks_of`).
    """
    batch, train = run.train.batch_size, run.train
    if not 1 <= gpus <= batch:
        raise HasteError(f"{gpus} GPUs share a batch of {batch} images (train.batch_size); expected 1 to {batch}")
    nets = networks_of(run, example)
    end = run.tau + run.termination.fade if run.alignment.active else 0
    first = int(min(end, train.steps))
    most = -(-batch // gpus)
    images = -(-most // train.accumulate)
    own = [step for step in train.kept_steps if step > shared]
    costs = {phase: step_cost(run, example, phase) for phase in ((1, 2) if run.alignment.active else (2,))}
    student, projector = parameters(nets.student), parameters(nets.projector)
    phases: dict[int, Phase] = {}
    for phase, steps in ((1, first), (2, train.steps - first)):
        if steps:
            found = costs[phase]
            # Recomputed activations take one more forward pass.
            flops = found.flops + found.forward * train.activation_checkpointing
            phases[phase] = Phase(
                steps=steps - (0 if phases else shared),
                flops=flops * batch,
                device_flops=flops * most,
                memory=memory(nets, found, phase, train, images),
                # Four float32 copies: weights, their average, AdamW's two moments; the projector is not averaged.
                checkpoint=4 * (4 * student + (3 * projector if phase == 1 else 0)),
                kept=sum((step <= end) == (phase == 1) for step in own),
            )
    return Estimate(student, projector, parameters(nets.teacher), costs[2].forward, images, gpus, phases)


def scoring_flops(run: config.RunSettings, sample: config.SampleSettings, images: int, forward: int) -> int:
    """FLOPs of sampling the images of one score; decoding and features are left out."""
    return images * sampling.passes(run.model.kind, sample.options) * forward


# -- a study -----------------------------------------------------------------------------------------------------------


def shared_steps(study: config.StudySettings, arm: str) -> tuple[str, int]:
    """The arm whose checkpoints this one begins with, and the steps that this saves; ("", 0) where it trains alone.

    The donor must keep every checkpoint that this arm keeps up to its switch (`haste_core.training`).
    """
    donor, run = study.donor(arm), study.run(arm)
    wanted = {step for step in run.train.kept_steps if step <= run.tau}
    if donor is None or not wanted <= set(study.run(donor).train.kept_steps):
        return "", 0
    return donor, int(min(run.tau, run.train.steps))


def plan(study: config.StudySettings, example: Example, speed: Mapping[int, float], gpus: int = 1) -> pd.DataFrame:
    """Estimates of every arm of a study in each phase.

    Not counted: GPUs that wait for each other, training a teacher or extractor, decoding and scoring, what triggers
    measure. Steps that an arm shares with another are counted there alone.

    Args:
        study, example: the study, and one example of its data.
        speed: FLOP/s that a device reaches, by phase.
        gpus: devices that share the batch of a run.

    Returns:
        A row for each arm and phase: arm, phase (1, 2), seeds (number), shared_with (arm or ""), shared_steps, steps,
        student, projector, teacher (parameters), forward (FLOPs for one image), step_flops (of the batch), run_flops,
        micro_batch (images), memory_bytes (peak on one device), images_per_s (all devices), days, days_all_seeds,
        checkpoint_bytes (those that stay), writing_bytes (two more while a run writes). Figures are of one run unless
        they are named otherwise.

    Raises:
        HasteError: as of `estimate`.
    """
    rows = []
    for arm in tqdm(study.arms, desc="estimating", unit="arm", mininterval=1.0):
        run, seeds = study.run(arm), len(study.seeds_of(arm))
        donor, shared = shared_steps(study, arm)
        found = estimate(run, example, gpus, shared)
        hours = found.hours(speed)
        for phase, part in found.phases.items():
            first, aligned = phase == min(found.phases), phase == 1
            rows.append({
                "arm": arm, "phase": phase, "seeds": seeds,
                "shared_with": donor if first else "", "shared_steps": shared if first else 0, "steps": part.steps,
                "student": found.student, "projector": found.projector if aligned else 0,
                "teacher": found.teacher if aligned else 0, "forward": found.forward,
                "step_flops": part.flops, "run_flops": part.flops * part.steps,
                "micro_batch": found.images, "memory_bytes": part.peak,
                "images_per_s": run.train.batch_size * speed[phase] / part.device_flops,
                "days": hours[phase] / 24, "days_all_seeds": seeds * hours[phase] / 24,
                "checkpoint_bytes": part.checkpoint * part.kept, "writing_bytes": found.writing,
            })  # fmt: skip
    return pd.DataFrame(rows)


def sums(study: config.StudySettings, table: pd.DataFrame) -> dict[str, Any]:
    """Sums of a plan over arms, phases and seeds.

    Returns:
        runs, flops, days, checkpoint_bytes (those that stay), writing_bytes and memory_bytes (the largest), images
        (scored of each checkpoint), checkpoints (scored), scoring_flops and scoring_days (of sampling those images, at
        the speed of each arm's last phase).
    """
    trained = table[table["steps"] > 0]
    checkpoints, flops, days = 0, 0, 0.0
    for arm, rows in table.groupby("arm", sort=False):
        run, row = study.run(str(arm)), rows.iloc[-1]
        kept = len(run.train.kept_steps) * int(row["seeds"])
        needed = kept * scoring_flops(run, study.sample_of(str(arm)), study.evaluate.n, int(row["forward"]))
        rate = row["images_per_s"] * row["step_flops"] / run.train.batch_size
        checkpoints, flops, days = checkpoints + kept, flops + needed, days + needed / rate / 86400
    return {
        "runs": int(table.groupby("arm")["seeds"].first().sum()),
        "flops": int((table["run_flops"].astype(float) * table["seeds"]).sum()),
        "days": float(table["days_all_seeds"].sum()),
        "checkpoint_bytes": int((table["checkpoint_bytes"] * table["seeds"]).sum()),
        "writing_bytes": int(table["writing_bytes"].max()),
        "memory_bytes": int(trained["memory_bytes"].max()),
        "images": study.evaluate.n, "checkpoints": checkpoints, "scoring_flops": flops, "scoring_days": float(days),
    }  # fmt: skip


# -- the speed of this device ------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """FLOP/s that a device reaches in training, by phase, and a sentence on where the figures are from."""

    flops: dict[int, float]
    source: str


def given_speed(rate: float, utilisation: float, origin: str) -> Speed:
    """The FLOP/s that a share of a device's matrix rate amounts to. origin: of the share, in words."""
    source = f"{utilisation:.0%} ({origin}) of a given rate of {si(rate, 'FLOP')}/s; nothing was measured"
    return Speed(dict.fromkeys(PHASES, rate * utilisation), source)


def measured_speed(
    study: config.StudySettings, example: Example, gpus: int = 1, steps: int = 20, seconds: float = 20.0
) -> Speed:
    """FLOP/s of real training steps on this device, on random images.

    Steps are those of the arm with the most losses, with fewer blocks where its student is large, fewer images where a
    step would be long, and a teacher with random weights; phase II is the same student without alignment.

    Args:
        study, example: the study, and one example of its data.
        gpus: devices that share the batch of a run: a step here has no more images than come to one of them.
        steps: steps that are timed in each phase, after two that warm up.
        seconds: no further steps are timed after so many, once there are three.

    Raises:
        HasteError: the device is neither a CPU nor a CUDA GPU, or its memory is too small.
    """
    device = PartialState().device.type
    if device not in _LARGEST:
        raise HasteError(f"training steps on {device!r} cannot be timed; expected cpu or cuda, or give --rate")
    aligned = {arm: study.run(arm).alignment for arm in study.arms}
    arm = max(aligned, key=lambda a: (aligned[a].lambda_feature > 0) + (aligned[a].lambda_attention > 0))
    full = run = study.run(arm)
    while run.model.depth > 1 and parameters(networks_of(_unaligned(run), example).student) > _LARGEST[device]:
        run = with_depth(run, run.model.depth // 2)
    precision = "no" if device == "cpu" and run.train.precision == "fp16" else run.train.precision
    if device == "cpu":
        torch.set_num_threads(run.train.threads)
    run = run.model_copy(update={"train": run.train.model_copy(update={"precision": precision, "accumulate": 1})})
    runs = {1: run, 2: _unaligned(run)} if run.alignment.active else {2: run}
    flops = {phase: step_cost(r, example, phase).flops for phase, r in runs.items()}
    most = -(-run.train.batch_size // gpus)
    batch = max(1, min(most, int(_STEP_FLOPS[device] / max(flops.values()))))
    dataset = _Noise(example, run.data.augment, batch)
    try:
        states = {
            phase: create(
                r.model_copy(update={"train": r.train.model_copy(update={"batch_size": batch})}), 0,
                build_teacher(r.teacher) if r.alignment.active else None, dataset=dataset,
            ) for phase, r in runs.items()
        }  # fmt: skip
        place = next(iter(states.values())).accelerator.device
        actions = {phase: cost.step_of(state) for phase, state in states.items()}
        times = cost.timed(actions, steps, device=place, seconds=seconds)
    except torch.OutOfMemoryError as error:
        raise HasteError(
            f"{device} has too little memory for a training step of {batch} images; expected more --gpus, or --rate of "
            f"the device that is meant"
        ) from error
    name = torch.cuda.get_device_name() if device == "cuda" else f"{run.train.threads} thread(s) of {machine()['cpu']}"
    number = {"no": "float32"}.get(precision, precision)
    if precision != full.train.precision:
        number += f" ({full.train.precision} needs a GPU)"
    return Speed(
        {phase: flops[phase] * batch / float(np.median(taken)) for phase, taken in times.items()},
        f"measured here on {name} in {number}, {len(times[2])} steps of "
        f"{run.model.depth} of the {full.model.depth} blocks of arm {arm} on {batch} of {most} images",
    )


def with_depth(run: config.RunSettings, depth: int) -> config.RunSettings:
    """A run with so many blocks, with a random teacher, and with alignment that never ends.

    Pairs of layers that are gone move to the last block.
    """
    pairs = {min(student, depth - 1): teacher for student, teacher in run.alignment.layer_pairs}
    fewer = {"depth": min(run.alignment.depth, depth), "layer_pairs": list(pairs.items())}
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"preset": None, "depth": depth}),
            "alignment": run.alignment.model_copy(update=fewer),
            "teacher": run.teacher.model_copy(update={"weights": "random"}),
            "termination": config.TerminationSettings(),
        }
    )


def _unaligned(run: config.RunSettings) -> config.RunSettings:
    off = {"lambda_feature": 0.0, "lambda_attention": 0.0}
    return run.model_copy(update={"alignment": run.alignment.model_copy(update=off)})


class _Noise(Dataset):
    """Random images in memory, with the shape and augmentation of a study's data."""

    name = "noise"

    def __init__(self, example: Example, augment: config.AugmentSettings, count: int) -> None:
        self.image_size, self.channels, self.classes = example.size, example.channels, example.classes
        self.augment, self.y = augment, torch.arange(count) % example.classes
        generator = Generator().manual_seed(0)
        shapes = ((count, example.channels, example.size), (count, example.image_channels, example.image_size))
        self.x, self.seen = (torch.rand(*s, s[-1], generator=generator) * 2 - 1 for s in shapes)

    def __len__(self) -> int:
        return len(self.x)

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        return self.x[chosen], self.y[chosen]

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """Examples; augmented where the generator models the images themselves."""
        if self.seen.shape == self.x.shape:
            return super().batch(indices, generator, with_images, part)
        wanted = indices[part]
        return Batch(self.x[wanted], self.y[wanted], self.seen[wanted] if with_images else self.seen[:0])


# -- text --------------------------------------------------------------------------------------------------------------


def si(number: float, unit: str = "") -> str:
    """A number with three digits and the prefix that fits, such as "130 M" or "1.5 TFLOP"."""
    for prefix, size in zip("ZEPTGMK", (1e21, 1e18, 1e15, 1e12, 1e9, 1e6, 1e3), strict=True):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def size_text(number: float) -> str:
    """Bytes in KiB, MiB or GiB."""
    unit, size = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20)) if number >= s), ("KiB", 2**10))
    return f"{number / size:.1f} {unit}" if number else "0"


def hours_text(hours: float) -> str:
    """Hours in days, hours, minutes or seconds."""
    unit, size = next(
        ((u, s) for u, s in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)) if hours >= 2 * s), ("s", 1 / 3600)
    )
    return f"{hours / size:.1f} {unit}"


def estimate_text(found: Estimate, precision: str, scoring: int) -> str:
    """An estimate as indented lines. scoring: FLOPs of sampling the images of one score."""

    def by_phase(text: Mapping[int, str]) -> str:
        return ", ".join(f"{text[n]} in {PHASES[n]}" for n in found.phases)

    kept = sum(p.kept for p in found.phases.values())
    lines = [
        ("parameters", f"student {si(found.student)}, projector {si(found.projector)}, teacher {si(found.teacher)}"),
        ("forward", f"{si(found.forward // 2)} multiply-adds for one image"),
        ("steps", by_phase({n: f"{p.steps:,}" for n, p in found.phases.items()})),
        ("a step", f"{by_phase({n: si(p.flops, 'FLOP') for n, p in found.phases.items()})}, without element-wise work"),
    ]
    for n, part in found.phases.items():
        held = " + ".join(f"{size_text(size)} {name}" for name, size in part.memory.items())
        lines.append(("memory", f"{PHASES[n]}: {size_text(part.peak)} = {held}"))
    devices = "one GPU" if found.gpus == 1 else f"each of {found.gpus} GPUs"
    lines.append(("", f"on {devices}, plus the working memory of one block and CUDA's own"))
    lines.append(("checkpoints", f"{size_text(found.disk)}: {kept} that stay, two more while writing"))
    for name, rate in RATES["16 bits" if precision in _DTYPES else "float32"].items():
        hours = found.hours(dict.fromkeys(PHASES, UTILISATION * rate))
        each = by_phase({n: hours_text(h) for n, h in hours.items()})
        sampling_time = hours_text(scoring / (UTILISATION * rate) / 3600)
        lines.append((
            "time", f"{hours_text(sum(hours.values()))} ({each}), {sampling_time} of sampling for each scored "
            f"checkpoint, at {UTILISATION:.0%} (an assumption) of {rate / 1e12:.4g} TFLOP/s ({name})",
        ))  # fmt: skip
    lines.append(("", "small networks take longer: they wait for kernels to start"))
    return "\n".join(f"  {name:<11}  {text}" for name, text in lines)


def plan_text(table: pd.DataFrame, total: Mapping[str, Any]) -> str:
    """A plan as a table, with its sums below.

    Args:
        table: of `plan`. total: of `sums`.
    """
    rows = []
    for row in table.to_dict("records"):
        shared = f" ({row['shared_steps']:,} of {row['shared_with']})" if row["shared_steps"] else ""
        rows.append({
            "arm": row["arm"], "phase": "I" if row["phase"] == 1 else "II", "steps": f"{row['steps']:,}{shared}",
            "parameters": " + ".join(si(row[name]) for name in ("student", "projector", "teacher") if row[name]),
            "FLOP/step": si(row["step_flops"], "FLOP"), "FLOP": si(row["run_flops"], "FLOP"),
            "memory": size_text(row["memory_bytes"]), "images/s": f"{row['images_per_s']:,.4g}",
            "time": hours_text(24 * row["days"]), "all seeds": hours_text(24 * row["days_all_seeds"]),
            "checkpoints": size_text(row["checkpoint_bytes"]),
        })  # fmt: skip
    return "\n".join([
        pd.DataFrame(rows).to_string(index=False), "",
        f"in all: {total['runs']} runs, {si(total['flops'], 'FLOP')}, {hours_text(24 * total['days'])} one after the "
        f"other, {size_text(total['checkpoint_bytes'])} of checkpoints and {size_text(total['writing_bytes'])} more "
        f"while a run writes, at most {size_text(total['memory_bytes'])} of memory on a device",
        "memory is the peak of a step; the working memory of one block and CUDA's own come on top",
        f"sampling what is scored: {total['images']:,} images of each of {total['checkpoints']} checkpoints, "
        f"{si(total['scoring_flops'], 'FLOP')}, {hours_text(24 * total['scoring_days'])}",
        "not counted: GPUs that wait for each other, training a teacher or extractor, decoding and scoring, what "
        "triggers measure",
    ])  # fmt: skip
