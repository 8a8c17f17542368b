"""Estimates of what a run or a study takes: operations, memory, time and disk space (`haste plan`, `--dry-run`).

Operations are counted by torch on one training step of the real networks and losses, with fake tensors that have shapes
and no data: matrix products, convolutions and attention, forward and backward, a multiply-add as two. Memory is a
formula of parameters and of what autograd saves. Time is operations over the FLOP/s of about twenty real training steps
on this device (`cost.measured_speed`), or over a rate that the user gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm.auto import tqdm

from haste_core import sampling
from haste_core.haste import HASTE
from haste_core.models import DiffusionTransformer
from haste_core.paths import objective_of
from haste_core.study import config
from haste_core.study.pretrain import build_teacher
from haste_core.study.train import build_haste, student_of
from haste_core.training import Batch, step_losses

# Published dense matrix rates in FLOP/s: 16-bit inputs with float32 sums, and plain float32 (torch's default).
RATES = {
    "16 bits": {"A100": 312e12, "H100 SXM": 989e12, "RTX 4090": 165e12},
    "float32": {"A100": 19.5e12, "H100 SXM": 67e12, "RTX 4090": 82.6e12},
}
# Share of such a rate that training is assumed to reach.
UTILISATION = 0.4
PHASES = {1: "phase I", 2: "phase II"}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
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


def networks_of(run: config.RunSettings, example: Example) -> tuple[DiffusionTransformer, HASTE | None]:
    """Student and phase I of a run, with its teacher, on torch's meta device; None for the latter without alignment.

    Neither data nor the teacher's weights are needed.

    Raises:
        HasteError: the patch does not divide the example, timm does not know the teacher, or layers, heads or token
            grids do not fit.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # token grids that differ are reported by the dry run
        student = student_of(run.model, example.size, example.channels, example.classes, seed=0)
        if not run.alignment.active:
            return student, None
        teacher = build_teacher(run.teacher.model_copy(update={"weights": "random"}))
        return student, build_haste(run, student, teacher, seed=0)


class Speed(NamedTuple):
    """FLOP/s that a device reaches in training, by phase, and the source of these figures in words."""

    flops: dict[int, float]
    source: str


# -- one training step -------------------------------------------------------------------------------------------------


class StepCost(NamedTuple):
    """Cost of one image in a step: FLOPs of the forward pass, FLOPs in all, bytes that autograd saves."""

    forward: int
    flops: int
    activations: int


_STEP_COSTS: dict[tuple[str, Example, int], StepCost] = {}


def step_cost(run: config.RunSettings, example: Example, phase: int) -> StepCost:
    """Cost of one image in a training step of `phase`; equal steps of several arms are traced once."""
    key = (run.lineage if phase == 1 else run.unaligned, example, phase)
    if key not in _STEP_COSTS:
        _STEP_COSTS[key] = _trace(run, example, phase)
    return _STEP_COSTS[key]


def _trace(run: config.RunSettings, example: Example, phase: int) -> StepCost:
    """Cost of one image, from one step of batch 1 on fake tensors."""
    student, haste = networks_of(run, example)
    if phase == 2:
        haste = None
    saved: dict[int, int] = {}
    dtype = _DTYPES.get(run.train.precision)

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return x

    # Fake tensors count as the CPU's, where autocast works; the meta device has none.
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            student.to_empty(device="cpu")
            if haste is not None:
                haste.to_empty(device="cpu")  # its teacher too
            modules = [student, *([haste, haste.teacher] if haste is not None else [])]
            known = {x.untyped_storage()._cdata for m in modules for x in (*m.parameters(), *m.buffers())}
            with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
                with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = _loss(student, haste, example, run.data.text_tokens)
                forward = counter.get_total_flops()
                loss.backward()
                flops = counter.get_total_flops()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    return StepCost(forward, flops, sum(saved.values()) - _copies(student, haste, run.train.precision))


def _loss(student: Any, haste: HASTE | None, example: Example, tokens: int) -> Tensor:
    """The loss of a training step at batch 1; tokens: of a caption."""
    x = torch.zeros(1, example.channels, example.size, example.size)
    y = torch.zeros(1, dtype=torch.int64)
    if student.kind == "mmdit":
        y = torch.zeros(1, tokens, student.context_embedder.in_features)
    images = torch.zeros(1, example.image_channels, example.image_size, example.image_size)
    u, eps = torch.full((1,), 0.5), torch.zeros_like(x)
    return step_losses(student, objective_of(student.kind), Batch(x, y, images), u, eps, y, haste, watch=False).total()


def _copies(student: nn.Module, haste: HASTE | None, precision: str) -> int:
    """Bytes of the 16-bit copies that autocast makes of the weights of linear and convolution layers."""
    trained = [student, haste] if precision in _DTYPES else []
    layers = (m for module in trained if module is not None for m in module.modules())
    return 2 * sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear | nn.Conv2d))


# -- a run -------------------------------------------------------------------------------------------------------------


def estimate(run: config.RunSettings, example: Example, gpus: int = 1, shared: int = 0) -> pd.DataFrame:
    """Operations, memory and disk space of a run.

    Args:
        run, example: the run, and one example of its data.
        gpus: devices that share the images of a step, as evenly as possible.
        shared: steps that another arm takes for this one (`shared_steps`); they and their checkpoints do not count.

    Returns:
        A row for each phase that has steps: phase (1, 2), steps, student, projector, teacher (parameters), forward
        (FLOPs of the student for one image), step_flops (of the batch), run_flops, device_flops (of a step, on the
        device with the most images), micro_batch (images), memory (bytes on one device at the peak of a step, by what
        they hold), memory_bytes, kept (number of checkpoints that stay), checkpoint_bytes (of those), writing_bytes
        (of two more, while a run writes).

    Raises:
        HasteError: the networks do not fit (`networks_of`).
    """
    batch, train = run.train.batch_size, run.train
    student, haste = networks_of(run, example)
    most = -(-batch // gpus)
    micro_batch = -(-most // train.accumulate)
    end = aligned_until(run)
    aligned = int(min(end, train.steps))
    rows: list[dict[str, Any]] = []
    for phase, steps in ((1, aligned), (2, train.steps - aligned)):
        if not steps:
            continue
        own_haste = haste if phase == 1 else None
        found = step_cost(run, example, phase)
        # Recomputed activations take one more forward pass.
        flops = found.flops + found.forward * train.activation_checkpointing
        held = _memory(student, own_haste, found, train, micro_batch)
        checkpoint = checkpoint_bytes(student, own_haste)
        kept = sum(step > shared and (step <= end) == (phase == 1) for step in train.kept_steps)
        steps -= 0 if rows else shared
        rows.append({
            "phase": phase, "steps": steps, "student": parameters(student), "projector": parameters(own_haste),
            "teacher": parameters(own_haste and own_haste.teacher), "forward": step_cost(run, example, 2).forward,
            "step_flops": flops * batch, "run_flops": flops * batch * steps, "device_flops": flops * most,
            "micro_batch": micro_batch, "memory": held, "memory_bytes": sum(held.values()), "kept": kept,
            "checkpoint_bytes": checkpoint * kept, "writing_bytes": 2 * checkpoint,
        })  # fmt: skip
    return pd.DataFrame(rows)


def parameters(module: nn.Module | None) -> int:
    """Number of parameters, 0 for None; of HASTE those of the projector."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def aligned_until(run: config.RunSettings) -> float:
    """The last step whose checkpoint holds phase I, as far as the settings say; 0 without alignment."""
    return run.tau + run.termination.fade if run.alignment.active else 0


def checkpoint_bytes(student: nn.Module, haste: HASTE | None) -> int:
    """Bytes of a checkpoint: weights, their average and AdamW's two moments in float32; projectors have no average."""
    return 4 * (4 * parameters(student) + 3 * parameters(haste))


def _memory(
    student: Any,
    haste: HASTE | None,
    found: StepCost,
    train: config.TrainSettings,
    images: int,
) -> dict[str, int]:
    """Bytes on a device at the peak of a step with so many images, by what they hold.

    Everything is in float32 except autocast's copies of weights. The working memory of one block, the device's own
    context and fragmentation come on top.
    """
    trained = parameters(student) + parameters(haste)
    activations = found.activations
    if train.activation_checkpointing:  # the inputs of all blocks, and everything of one block
        depth, tokens = len(student.blocks), student.grid[0] * student.grid[1]
        activations = depth * tokens * student.x_embedder.proj.out_channels * 4 + activations // depth
    held = {
        "weights": 4 * trained,
        "average": 4 * parameters(student),
        "optimizer": 8 * trained,
        "teacher": 4 * parameters(haste and haste.teacher),
        "16-bit copies": _copies(student, haste, train.precision),
        "activations": activations * images,
        "gradients": 4 * trained,
    }
    if train.accumulate == 1:  # activations are freed while the backward pass makes gradients: the larger one counts
        del held[min("activations", "gradients", key=held.__getitem__)]
    return {name: size for name, size in held.items() if size}


def sampling_flops(run: config.RunSettings, sample: config.SampleSettings, images: int, forward: int) -> int:
    """FLOPs of sampling the images of one score; decoding and features are left out."""
    return images * sampling.passes(run.model.kind, sample.options) * forward


# -- a study -----------------------------------------------------------------------------------------------------------


def shared_steps(study: config.StudySettings, arm: str) -> tuple[str, int]:
    """The arm whose checkpoints this one begins with, and the steps that this saves; ("", 0) where it trains alone.

    The donor must keep every checkpoint that this arm keeps up to its switch (`train.adopt_shared_part`).
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
        arm, seeds (number), shared_with (arm or ""), shared_steps, the columns of `estimate`, images_per_s (all
        devices), days, days_all_seeds, and in the last phase of an arm scored (number of checkpoints), scoring_flops
        and scoring_days (of sampling their images). Figures are of one run unless they are named otherwise.

    Raises:
        HasteError: as of `estimate`.
    """
    rows = []
    for arm in tqdm(study.arms, desc="estimating", unit="arm", mininterval=1.0):
        run, seeds = study.run(arm), len(study.seeds_of(arm))
        donor, shared = shared_steps(study, arm)
        found = estimate(run, example, gpus, shared).to_dict("records")
        for row in found:
            rate, first, last = speed[row["phase"]], row is found[0], row is found[-1]
            days = row["steps"] * row["device_flops"] / rate / 86400
            scored = len(run.train.kept_steps) if last else 0
            flops = scored * sampling_flops(run, study.sample_of(arm), study.evaluate.n, row["forward"])
            rows.append({
                "arm": arm, "seeds": seeds, "shared_with": donor if first else "",
                "shared_steps": shared if first else 0, **row,
                "images_per_s": run.train.batch_size * rate / row["device_flops"], "days": days,
                "days_all_seeds": seeds * days, "scored": scored, "scoring_flops": flops,
                "scoring_days": flops / rate / 86400,
            })  # fmt: skip
    return pd.DataFrame(rows)


def sums(table: pd.DataFrame) -> dict[str, Any]:
    """Sums of a plan over arms, phases and seeds; of writing_bytes and memory_bytes the largest."""
    of_runs = {"flops": "run_flops", "checkpoint_bytes": "checkpoint_bytes", "checkpoints": "scored",
               "scoring_flops": "scoring_flops"}  # fmt: skip
    return {
        "runs": int(table.groupby("arm")["seeds"].first().sum()),
        **{name: int((table[column].astype(float) * table["seeds"]).sum()) for name, column in of_runs.items()},
        "days": float(table["days_all_seeds"].sum()),
        "scoring_days": float((table["scoring_days"] * table["seeds"]).sum()),
        "writing_bytes": int(table["writing_bytes"].max()),
        "memory_bytes": int(table.loc[table["steps"] > 0, "memory_bytes"].max()),
    }


# -- text --------------------------------------------------------------------------------------------------------------


def si(number: float, unit: str = "", base: int = 1000) -> str:
    """A number with three digits and the prefix that fits, such as "130 M" or "1.5 TFLOP"."""
    power = 0
    while number >= 999.5:
        number, power = number / base, power + 1
    return f"{number:.3g} {' KMGTPEZY'[power].strip()}{unit}".rstrip()


def size_text(number: float) -> str:
    """Bytes in KiB, MiB, GiB, ..."""
    return si(number, "iB", 1024) if number >= 1024 else f"{number:.0f} B"


def hours_text(hours: float) -> str:
    """Hours in days, hours, minutes or seconds."""
    for unit, size in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:.1f} {unit}"
    return f"{3600 * hours:.1f} s"


# Title and format of the columns of an estimate that are printed.
_PRINTED: dict[str, tuple[str, Any]] = {
    "arm": ("arm", str), "phase": ("phase", {1: "I", 2: "II"}.get), "steps": ("steps", "{:,}".format),
    "shared_steps": ("shared", "{:,}".format), "shared_with": ("with", str),
    "student": ("student", si), "projector": ("projector", si), "teacher": ("teacher", si),
    "step_flops": ("FLOP/step", si), "run_flops": ("FLOP", si), "memory_bytes": ("memory", size_text),
    "checkpoint_bytes": ("checkpoints", size_text), "images_per_s": ("images/s", "{:,.4g}".format),
    "days": ("time", lambda days: hours_text(24 * days)), "days_all_seeds": ("all seeds", lambda d: hours_text(24 * d)),
}  # fmt: skip


def table_text(table: pd.DataFrame) -> str:
    """An estimate or plan as a table, a line for each row."""
    shown = {name: _PRINTED[name] for name in _PRINTED if name in table}
    titles, formats = [title for title, _ in shown.values()], {name: how for name, (_, how) in shown.items()}
    return table.to_string(index=False, columns=list(shown), header=titles, formatters=formats)


def run_text(table: pd.DataFrame, precision: str, scoring: int) -> str:
    """The estimate of a run, with its memory by what holds it and its time on some GPUs.

    scoring: FLOPs of sampling the images of one score.
    """
    lines = [table_text(table), ""]
    for row in table.to_dict("records"):
        held = " + ".join(f"{size_text(size)} {name}" for name, size in row["memory"].items())
        lines.append(f"memory in {PHASES[row['phase']]}: {size_text(row['memory_bytes'])} on each device = {held}")
    lines.append("the working memory of one block and CUDA's own come on top")
    rates = RATES["16 bits" if precision in _DTYPES else "float32"]
    work = float((table["steps"].astype(float) * table["device_flops"]).sum())
    # Of a run of seconds, times on GPUs say nothing.
    for name, rate in rates.items() if work / (UTILISATION * min(rates.values())) > 60 else ():
        taken, drawing = (hours_text(flops / (UTILISATION * rate) / 3600) for flops in (work, scoring))
        lines.append(
            f"time on {name}: {taken}, and {drawing} of sampling for each scored checkpoint, at {UTILISATION:.0%} (an "
            f"assumption) of {rate / 1e12:.4g} TFLOP/s; small networks take longer"
        )
    return "\n".join(lines)


def plan_text(table: pd.DataFrame, side_by_side: int = 0, process_gib: float = 0) -> str:
    """A plan as a table, with its sums below.

    side_by_side: runs that share the cores of this machine, and process_gib: memory of such a process beside that of a
    step; 0 where runs take a GPU each.
    """
    total = sums(table)
    here = []
    if side_by_side:
        most = process_gib + total["memory_bytes"] / 2**30
        days = (total["days"] + total["scoring_days"]) / side_by_side
        here = [
            f"on this machine: {side_by_side} run{'s' * (side_by_side > 1)} at a time, about {hours_text(24 * days)} "
            f"for training and sampling; a run takes {most:.1f} GiB of memory, scores and analyses more"
        ]
    return "\n".join([
        table_text(table), "",
        f"in all: {total['runs']} runs, {si(total['flops'], 'FLOP')}, {hours_text(24 * total['days'])} one after the "
        f"other, {size_text(total['checkpoint_bytes'])} of checkpoints and {size_text(total['writing_bytes'])} more "
        f"while a run writes, at most {size_text(total['memory_bytes'])} of memory on a device",
        *here,
        "memory is the peak of a step; the working memory of one block and CUDA's own come on top",
        f"sampling the images that score {total['checkpoints']} checkpoints: {si(total['scoring_flops'], 'FLOP')}, "
        f"{hours_text(24 * total['scoring_days'])}",
        "not counted: GPUs that wait for each other, training a teacher or extractor, decoding and scoring, what "
        "triggers measure",
    ])  # fmt: skip


def notes(study: config.StudySettings, gpus: int, speed: Speed) -> list[str]:
    """Assumptions and sources of a plan, a line each."""
    each = ", ".join(f"{si(flops, 'FLOP')}/s in {PHASES[phase]}" for phase, flops in speed.flops.items())
    devices = f"{gpus} devices share the batch of a run" if gpus > 1 else "one device"
    runs = {arm: study.run(arm) for arm in study.arms}
    open_ended = [a for a, r in runs.items() if r.alignment.active and r.termination.kind not in ("never", "iteration")]
    lines = [
        f"{study.name}: {len(study.arms)} arms, {len(study.seeds)} seed(s), {devices}",
        f"speed of one device: {each}, {speed.source}",
    ]
    if open_ended:
        lines.append(f"note: a trigger ends phase I of {', '.join(open_ended)}; counted as if it never fired")
    return lines
