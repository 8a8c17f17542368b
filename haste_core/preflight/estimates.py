"""What a run costs by arithmetic: operations, memory, time and checkpoint space. Nothing is run or measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from haste_core import config
from haste_core.preflight.tracing import Cost, Example, Networks, cost, matrices, teacher_flops, without_contents
from haste_core.runs import Run

# Published dense matrix rates in FLOP/s: 16-bit inputs with float32 sums, and plain float32 (torch's default).
RATES = {
    "16 bits": {"A100": 312e12, "H100 SXM": 989e12, "RTX 4090": 165e12},
    "float32": {"A100": 19.5e12, "H100 SXM": 67e12, "RTX 4090": 82.6e12},
}
UTILISATION = 0.4


class Memory(NamedTuple):
    """Bytes by what they hold, for one phase: all that lies on the device at a step's peak."""

    weights: int
    average: int
    optimizer: int
    teacher: int
    copies: int
    activations: int
    gradients: int

    @property
    def peak(self) -> int:
        """Activations go as gradients come, so the larger of the two counts."""
        return sum(self[:5]) + max(self.activations, self.gradients)


@dataclass(frozen=True)
class Estimate:
    """A run's cost. Phases are 1 and 2; a phase that the run does not have has no entry.

    student, projector, teacher: number of parameters. forward: operations of the student's forward pass of one image;
    teacher_forward: the teacher's. step_flops: of one step, the whole batch. memory: at a step's peak. steps: how many
    the run has. checkpoint: bytes of one; kept: how many stay. processes: devices that share a step; memory is of each.
    """

    student: int
    projector: int
    teacher: int
    forward: int
    teacher_forward: int
    step_flops: Mapping[int, int]
    memory: Mapping[int, Memory]
    steps: Mapping[int, int]
    checkpoint: Mapping[int, int]
    kept: Mapping[int, int]
    processes: int = 1

    @property
    def flops(self) -> int:
        """Operations of the whole run."""
        return sum(self.step_flops[phase] * count for phase, count in self.steps.items())

    @property
    def disk(self) -> int:
        """Bytes of everything kept, and of two more: the temporary checkpoint and the one being written."""
        kept = sum(self.checkpoint[phase] * count for phase, count in self.kept.items())
        return kept + 2 * max(self.checkpoint.values())

    def hours(self, rate: float, utilisation: float) -> dict[int, float]:
        """Hours by phase at `rate` floating-point operations a second on each device, a share `utilisation` reached."""
        together = rate * utilisation * self.processes
        return {p: self.step_flops[p] * n / together / 3600 for p, n in self.steps.items()}


def estimate(run: config.RunConfig, example: Example, nets: Networks, processes: int = 1) -> Estimate:
    """What a run costs, from its networks; memory and time on so many devices that share each step's images."""
    steps = phases(run)
    precision, batch = run.train.precision, run.train.batch_size
    with without_contents(nets) as shapes:
        costs = {phase: cost(shapes, example, phase, precision) for phase in {*steps, 2}}  # phase 2 has the forward
        teacher_forward = teacher_flops(shapes, example)
    projector_size = parameters(nets.alignment.projector) if nets.alignment else 0
    student_size = parameters(nets.student)
    sizes = {1: student_size + projector_size, 2: student_size}
    return Estimate(
        student=student_size,
        projector=projector_size,
        teacher=parameters(nets.teacher),
        forward=costs[2].forward,
        teacher_forward=teacher_forward,
        step_flops={phase: costs[phase].flops * batch for phase in steps},
        memory={phase: memory(nets, costs[phase], phase, run.train, processes) for phase in steps},
        steps=steps,
        # Four float32 copies: weights, their average, and AdamW's two moments; the projector is not averaged.
        checkpoint={phase: 4 * (3 * sizes[phase] + student_size) for phase in steps},
        kept={phase: sum((s <= run.tau) == (phase == 1) for s in run.train.kept_steps) for phase in steps},
        processes=processes,
    )


def phases(run: config.RunConfig) -> dict[int, int]:
    """Number of steps by phase; phases without a step are left out."""
    first = int(min(run.tau, run.train.steps))
    return {phase: n for phase, n in ((1, first), (2, run.train.steps - first)) if n}


def parameters(module: nn.Module | None) -> int:
    """Number of parameters, 0 for None."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def memory(nets: Networks, found: Cost, phase: int, train: config.Train, processes: int = 1) -> Memory:
    """Bytes on each device at a step's peak, all in float32 but the 16-bit copies that autocast makes of matrices.

    The device's own context, workspaces and fragmentation come on top.
    """
    projector = nets.alignment.projector if nets.alignment and phase == 1 else None
    student, trained = parameters(nets.student), parameters(nets.student) + parameters(projector)
    copied = matrices(nets.student) + matrices(projector) if train.precision != "no" else 0
    return Memory(
        weights=4 * trained,
        average=4 * student,
        optimizer=8 * trained,
        teacher=4 * parameters(nets.teacher) if phase == 1 else 0,
        copies=2 * copied,
        activations=found.activations * (train.batch_size // (train.accumulate * processes)),
        gradients=4 * trained,
    )


def scoring_flops(run: Run, forward: int) -> int:
    """Operations of drawing the images that one checkpoint is scored on; decoding and features are left out."""
    sample = run.sample
    calls = sample.solver_steps * (2 if sample.sampler == "heun" else 1) - (sample.sampler == "heun")
    guided = max(0.0, sample.guidance_high - sample.guidance_low) if sample.guidance != 1 else 0.0
    return int(run.study.evaluate.n * calls * (1 + guided) * forward)


def rates(precision: str) -> dict[str, float]:
    """FLOP/s by device at which hours are given: the GPU that is here, measured, and published ones."""
    known = RATES["float32" if precision == "no" else "16 bits"]
    if not torch.cuda.is_available():
        return dict(known)
    return {f"this {torch.cuda.get_device_name(0)}, measured": matrix_rate(precision), **known}


def matrix_rate(precision: str, side: int = 4096, repeats: int = 20) -> float:
    """FLOP/s of square matrix products on the GPU, in the precision of a run."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    a = torch.ones(side, side, device="cuda", dtype=dtype)
    for _ in range(3):
        a @ a
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(repeats):
        a @ a
    ended.record()
    torch.cuda.synchronize()
    return 2 * side**3 * repeats / (begun.elapsed_time(ended) / 1000)


def lines(estimate: Estimate, precision: str, scoring: int) -> list[str]:
    """An estimate as indented lines. scoring: operations of drawing the images of one score."""
    work = ", ".join(f"{flops / 1e12:.3g} in {_phase(phase)}" for phase, flops in estimate.step_flops.items())
    sizes = [f"{name} {_count(getattr(estimate, name))}" for name in ("student", "projector", "teacher")]
    rows = [
        ("parameters", ", ".join(sizes)),
        ("forward", f"{_count(estimate.forward // 2)} multiply-adds per image, the teacher's "
                    f"{_count(estimate.teacher_forward // 2)}"),
        ("steps", ", ".join(f"{count:,} in {_phase(phase)}" for phase, count in estimate.steps.items())),
        ("TFLOP/step", f"{work} (forward and backward, a multiply-add as two; element-wise work left out)"),
        *(("memory", f"{_phase(phase)}: {_parts(found)}") for phase, found in estimate.memory.items()),
        ("", f"on {_devices(estimate)}, plus one block's working memory and CUDA's own"),
        ("checkpoints", f"{_bytes(estimate.disk)}: {sum(estimate.kept.values())} that stay, two more while writing"),
        *(("time", _hours(estimate, scoring, name, rate)) for name, rate in rates(precision).items()),
        ("", "small networks take longer: they wait for kernels to start, not for arithmetic"),
    ]  # fmt: skip
    return [f"  {name:<11}  {text}" for name, text in rows]


def _hours(estimate: Estimate, scoring: int, name: str, rate: float) -> str:
    by_phase = estimate.hours(rate, UTILISATION)
    each = ", ".join(f"{_phase(phase)} {_time(hours)}" for phase, hours in by_phase.items())
    drawing = _time(scoring / (rate * UTILISATION) / 3600)
    return (
        f"{_time(sum(by_phase.values()))} ({each}) and {drawing} of drawing per scored checkpoint, at "
        f"{UTILISATION:.0%} (an assumption) of {rate / 1e12:.4g} TFLOP/s ({name})"
    )


def _parts(found: Memory) -> str:
    smaller = "gradients" if found.activations >= found.gradients else "activations"
    parts = {name: size for name, size in found._asdict().items() if size and name != smaller}
    return f"{_bytes(found.peak)} = " + " + ".join(f"{_bytes(size)} {name}" for name, size in parts.items())


def _devices(estimate: Estimate) -> str:
    return "one GPU" if estimate.processes == 1 else f"each of {estimate.processes} GPUs"


def _phase(phase: int) -> str:
    return "phase I" if phase == 1 else "phase II"


def _count(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"


def _time(hours: float) -> str:
    for unit, size in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:.1f} {unit}"
    return f"{hours * 3600:.1f} s"
