"""What a run costs by arithmetic: operations, memory, time and checkpoint space. Nothing is run or measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from haste_core.study import config
from haste_core.study.preflight.tracing import Cost, Example, Networks, cost, matrices, teacher_flops, without_contents
from haste_core.study.preflight.units import bytes_text, count_text, hours_text, phase_name
from haste_core.study.runs import Run

# Published dense matrix rates in FLOP/s: 16-bit inputs with float32 sums, and plain float32 (torch's default).
RATES = {
    "16 bits": {"A100": 312e12, "H100 SXM": 989e12, "RTX 4090": 165e12},
    "float32": {"A100": 19.5e12, "H100 SXM": 67e12, "RTX 4090": 82.6e12},
}
UTILISATION = 0.4

# A product this wide keeps a device busy for long enough to be timed; a GPU does several of them between two looks at
# the clock.
_SIDE = {"cuda": 4096, "cpu": 1024}
_PRODUCTS = {"cuda": 10, "cpu": 1}
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Traced(NamedTuple):
    """What following a step found: one image's share by phase, and operations of the teacher's forward pass."""

    costs: Mapping[int, Cost]
    teacher_forward: int


class Memory(NamedTuple):
    """Bytes by what they hold, for one phase: all that lies on the device at a step's peak.

    parts: micro-batches that a device takes its images in; gradients stay from one to the next.
    """

    weights: int
    average: int
    optimizer: int
    teacher: int
    copies: int
    activations: int
    gradients: int
    parts: int = 1

    @property
    def at_the_peak(self) -> dict[str, int]:
        """Bytes of what lies there at once: activations go as the first gradients come, the larger of them counts."""
        held = {name: size for name, size in self._asdict().items() if name != "parts"}
        if self.parts == 1:
            del held["activations" if self.activations < self.gradients else "gradients"]
        return held

    @property
    def peak(self) -> int:
        """The sum of `at_the_peak`."""
        return sum(self.at_the_peak.values())


@dataclass(frozen=True)
class Estimate:
    """A run's cost. Phases are 1 and 2; a phase that the run does not have has no entry.

    student, projector, teacher: number of parameters. forward: operations of the student's forward pass of one image;
    teacher_forward: the teacher's. step_flops: of one step, the whole batch. memory: at a step's peak. steps: how many
    the run takes itself. checkpoint: bytes of one; kept: how many of its own stay. processes: devices that share a
    step; memory is of each. shards: parts that weights and what belongs to them are divided in, 1 where they are not.
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
    shards: int = 1

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


def estimate(
    run: config.RunConfig,
    example: Example,
    nets: Networks,
    micro_batch: int | None = None,
    shared: int = 0,
    found: Traced | None = None,
    processes: int = 1,
    shards: int | None = None,
) -> Estimate:
    """What a run costs, from its networks.

    Args:
        run, example, nets: the run, what it learns from, and its networks.
        micro_batch: images on a device at a time, which memory goes by; by default what `train.accumulate` and
            `processes` leave of the batch.
        shared: steps that another arm takes for this one (`Study.donor`); they and their checkpoints do not count.
        found: what `follow` found for the same networks; followed now by default.
        processes: devices that share each step's images.
        shards: devices that weights are divided among where `train.sharded` says so; by default all of them.
    """
    found = found or follow(run, example, nets)
    steps = phases(run)
    shards = (shards or processes) if run.train.sharded else 1
    micro_batch = micro_batch or -(-run.train.batch_size // (run.train.accumulate * processes))
    projector_size = parameters(nets.alignment.projector) if nets.alignment else 0
    student_size = parameters(nets.student)
    sizes = {1: student_size + projector_size, 2: student_size}
    own = [step for step in run.train.kept_steps if step > shared]
    return Estimate(
        student=student_size,
        projector=projector_size,
        teacher=parameters(nets.teacher),
        forward=found.costs[2].forward,
        teacher_forward=found.teacher_forward,
        step_flops={phase: found.costs[phase].flops * run.train.batch_size for phase in steps},
        memory={phase: memory(nets, found.costs[phase], phase, run.train, micro_batch, shards) for phase in steps},
        steps={phase: count - shared * (phase == min(steps)) for phase, count in steps.items()},
        # Four float32 copies: weights, their average, and AdamW's two moments; the projector is not averaged.
        checkpoint={phase: 4 * (3 * sizes[phase] + student_size) for phase in steps},
        kept={phase: sum((step <= phase_one(run)) == (phase == 1) for step in own) for phase in steps},
        processes=processes,
        shards=shards,
    )


def follow(run: config.RunConfig, example: Example, nets: Networks) -> Traced:
    """A step of a run followed in every phase that its networks allow, and its teacher's forward pass."""
    with without_contents(nets) as shapes:
        costs = {
            phase: cost(shapes, example, phase, run.train.precision) for phase in ((1, 2) if nets.alignment else (2,))
        }
        return Traced(costs, teacher_flops(shapes, example))


def phase_one(run: config.RunConfig) -> float:
    """The step at which phase I ends, after fading; infinity where it never ends or a trigger decides."""
    return run.tau + run.termination.fade if run.alignment.active else 0


def phases(run: config.RunConfig) -> dict[int, int]:
    """Number of steps by phase; phases without a step are left out."""
    first = int(min(phase_one(run), run.train.steps))
    return {phase: n for phase, n in ((1, first), (2, run.train.steps - first)) if n}


def parameters(module: nn.Module | None) -> int:
    """Number of parameters, 0 for None."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def memory(nets: Networks, found: Cost, phase: int, train: config.Train, micro_batch: int, shards: int = 1) -> Memory:
    """Bytes on a device at a step's peak, all in float32 but the 16-bit copies that autocast makes of matrices.

    Sixteen-bit copies are kept whole from the forward to the backward pass however weights are divided, and so are
    gradients on the way from one micro-batch to the next. The device's own context, workspaces and fragmentation come
    on top, and of divided weights the few blocks that are whole at a time.

    micro_batch: images on the device at a time. shards: parts that weights are divided in.
    """
    projector = nets.alignment.projector if nets.alignment and phase == 1 else None
    student, trained = parameters(nets.student), parameters(nets.student) + parameters(projector)
    copied = matrices(nets.student) + matrices(projector) if train.precision != "no" else 0
    return Memory(
        weights=-(-4 * trained // shards),
        average=-(-4 * student // shards),
        optimizer=-(-8 * trained // shards),
        teacher=4 * parameters(nets.teacher) if phase == 1 else 0,
        copies=2 * copied,
        activations=found.activations * micro_batch,
        gradients=-(-4 * trained // (shards if train.accumulate == 1 else 1)),
        parts=train.accumulate,
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


def matrix_rate(precision: str, device: str = "cuda", repeats: int = 7) -> float:
    """FLOP/s of large square matrix products on a device in the precision of a run, the median of `repeats` times."""
    side, products = _SIDE[device], _PRODUCTS[device]
    a, b = (torch.randn(side, side, device=device).to(_DTYPES[precision]) for _ in range(2))
    taken = []
    for _ in range(repeats + 2):  # the first two warm up
        begun = time.perf_counter()
        for _ in range(products):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return 2 * side**3 * products / statistics.median(taken[2:])


def lines(estimate: Estimate, precision: str, scoring: int) -> list[str]:
    """An estimate as indented lines. scoring: operations of drawing the images of one score."""
    work = ", ".join(f"{flops / 1e12:.3g} in {phase_name(phase)}" for phase, flops in estimate.step_flops.items())
    kept = sum(estimate.kept.values())
    sizes = [f"{name} {count_text(getattr(estimate, name))}" for name in ("student", "projector", "teacher")]
    rows = [
        ("parameters", ", ".join(sizes)),
        ("forward", f"{count_text(estimate.forward // 2)} multiply-adds per image, the teacher's "
                    f"{count_text(estimate.teacher_forward // 2)}"),
        ("steps", ", ".join(f"{count:,} in {phase_name(phase)}" for phase, count in estimate.steps.items())),
        ("TFLOP/step", f"{work} (forward and backward, a multiply-add as two; element-wise work left out)"),
        *(("memory", f"{phase_name(phase)}: {_parts(found)}") for phase, found in estimate.memory.items()),
        ("", f"on {_devices(estimate)}, plus one block's working memory and CUDA's own"),
        ("checkpoints", f"{bytes_text(estimate.disk)}: {kept} that stay, two more while writing"),
        *(("time", _hours(estimate, scoring, name, rate)) for name, rate in rates(precision).items()),
        ("", "small networks take longer: they wait for kernels to start, not for arithmetic"),
    ]  # fmt: skip
    return [f"  {name:<11}  {text}" for name, text in rows]


def _hours(estimate: Estimate, scoring: int, name: str, rate: float) -> str:
    by_phase = estimate.hours(rate, UTILISATION)
    each = ", ".join(f"{phase_name(phase)} {hours_text(hours)}" for phase, hours in by_phase.items())
    drawing = hours_text(scoring / (rate * UTILISATION) / 3600)
    return (
        f"{hours_text(sum(by_phase.values()))} ({each}) and {drawing} of drawing per scored checkpoint, at "
        f"{UTILISATION:.0%} (an assumption) of {rate / 1e12:.4g} TFLOP/s ({name})"
    )


def _parts(found: Memory) -> str:
    parts = {name: size for name, size in found.at_the_peak.items() if size}
    return f"{bytes_text(found.peak)} = " + " + ".join(f"{bytes_text(size)} {name}" for name, size in parts.items())


def _devices(estimate: Estimate) -> str:
    divided = "" if estimate.shards == 1 else ", weights divided, plus a few whole blocks"
    return "one GPU" if estimate.processes == 1 else f"each of {estimate.processes} GPUs{divided}"
