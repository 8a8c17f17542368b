"""What `haste train STUDY ARM --dry-run` prints: all a run needs, looked at without training, GPU or download."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from haste_core import sampling
from haste_core.errors import HasteError
from haste_core.files import output_root
from haste_core.processes import micro_batches
from haste_core.study import config, runs
from haste_core.study.preflight import checks, estimates
from haste_core.study.preflight.checks import Check
from haste_core.study.preflight.estimates import Estimate
from haste_core.study.preflight.tracing import Example, Networks, networks, student_of, teacher_of
from haste_core.study.runs import Run

GIB = 2**30


@dataclass(frozen=True)
class Preflight:
    """What a dry run found.

    estimate: None where too little is known of the data or the networks do not fit. scoring: operations of drawing the
    images of one score.
    """

    title: str
    checks: list[Check]
    estimate: Estimate | None
    scoring: int
    precision: str

    @property
    def ready(self) -> bool:
        """True when every check is ok."""
        return all(check.state == "ok" for check in self.checks)

    @property
    def status(self) -> int:
        """The exit status: 0 when nothing is missing, 2 otherwise."""
        return 0 if self.ready else 2


def check(study: config.Study, arm: str, seed: int = 0, processes: int = 1) -> Preflight:
    """Everything that one run and its scores need, as far as this machine can tell, and what the run will cost.

    processes: how many train it together, each on a GPU of its own; memory is that of one of them.

    Raises:
        HasteError: the arm does not exist, the seed is negative, or so many processes cannot share a step's images.
    """
    run = Run(study, arm, seed)
    micro_batches(run.config.train, processes)
    settings, sample = run.config, run.sample
    found = [_attempt("settings", lambda: _settings(run))]
    data, example = checks.data(settings.data, settings.train.batch_size)
    found.append(data)
    networks_found, nets = _networks(run, example)
    found += networks_found
    if nets is not None:
        found.append(_attempt("sampler", lambda: _sampler(nets, sample)))
    found += [c for c in (checks.vae(settings.data, sample), *_evaluator(study)) if c is not None]
    estimate = None
    if nets is not None and example is not None:
        try:
            estimate = estimates.estimate(settings, example, nets, processes=processes)
        except HasteError as error:
            found.append(Check("teacher", "problem", str(error)))
    found += [_attempt("run", lambda: _existing(run)), _device(settings.train.precision)]
    if estimate is not None:
        found += [c for c in (_attempt("disk", lambda: _disk(run, estimate)), _memory(estimate)) if c is not None]
    scoring = estimates.scoring_flops(run, estimate.forward) if estimate else 0
    return Preflight(f"{study.name} {arm}, seed {seed}", found, estimate, scoring, settings.train.precision)


def _attempt(name: str, look: Callable[[], str]) -> Check:
    """ok with what `look` returns, or a problem with the error it raises."""
    try:
        return Check(name, "ok", look())
    except HasteError as error:
        return Check(name, "problem", str(error))


def _settings(run: Run) -> str:
    run.study.check_claims()
    train, tau = run.config.train, run.config.tau
    phase = "no alignment" if tau == 0 else "aligned throughout" if tau == float("inf") else f"aligned until {tau:,}"
    return (
        f"{train.steps:,} steps of {train.batch_size} images, {phase}, precision {train.precision}, "
        f"{len(train.kept_steps)} checkpoints stay"
    )


def _networks(run: Run, example: Example | None) -> tuple[list[Check], Networks | None]:
    """Checks of the student, its teacher and what pairs them; the networks where they all fit."""
    if example is None:
        return [Check("model", "problem", "the size of the data is unknown; possible: data.image_size")], None
    settings, model = run.config, run.config.model
    if example.size % model.patch:
        text = f"model.patch {model.patch} does not divide the size {example.size} of what is modelled"
        return [Check("model", "problem", text)], None
    student = student_of(settings, example)
    rows, columns = student.grid
    kind = model.preset or model.kind
    found = [Check("model", "ok", f"{kind}, {model.depth} blocks of width {model.width}, {rows}x{columns} tokens")]
    if model.kind == "mmdit":
        found.append(_contexts(settings))
    if not settings.alignment.active:
        return [*found, Check("teacher", "ok", f"arm {run.arm} has none")], Networks(student, None, None)
    weights = _teacher_weights(run)
    try:
        teacher = teacher_of(settings)
        found += [Check("teacher", "ok", _describe(settings.teacher.model, teacher)), weights]
    except HasteError as error:
        return [*found, weights if weights.state == "problem" else Check("teacher", "problem", str(error))], None
    try:
        nets = networks(settings, student, teacher)
    except HasteError as error:
        return [*found, Check("alignment", "problem", str(error))], None
    return [*found, Check("alignment", "ok", _pairs(settings, nets))], nets


def _describe(name: str, teacher: Any) -> str:
    (rows, columns), (height, width) = teacher.grid, teacher.image_size
    return f"{name}, {teacher.blocks} blocks, {teacher.heads} heads, {rows}x{columns} tokens of {height}x{width} pixels"


def _pairs(settings: config.RunConfig, nets: Networks) -> str:
    assert nets.teacher is not None
    assert nets.alignment is not None
    aligned = settings.alignment
    parts = [f"features after block {aligned.depth}"] if aligned.lambda_feature > 0 else []
    if nets.alignment.pairs:
        pairs = ", ".join(f"{s}<-{t}" for s, t in nets.alignment.pairs)
        parts.append(f"attention of blocks {pairs} (from 0), {len(nets.alignment.heads)} heads")
    grids = "equal" if nets.student.grid == nets.teacher.grid else "different, resampled"
    return f"{'; '.join(parts)}; token grids {grids}"


def _teacher_weights(run: Run) -> Check:
    teacher, name = run.config.teacher, "teacher weights"
    if teacher.weights == "random":
        return Check(name, "ok", "random: for tests and timing only")
    if teacher.weights == "pretrain":
        path = runs.teacher_path(run.study, teacher)
        text = str(path) if path.is_file() else f"trained first, {teacher.fitting.steps:,} steps on the study's images"
        return Check(name, "ok", text)
    return checks.timm_weights(name, teacher, "teacher.weights")


def _contexts(settings: config.RunConfig) -> Check:
    from haste_core.study.data.contexts import Contexts

    path = settings.data.contexts
    if path is None or not Path(path).is_file():
        text = f"no file {path}; possible: data.contexts=FILE by haste_core.study.data.contexts.write"
        return Check("text tokens", "missing", text)

    def look() -> str:
        found = Contexts(path)
        if found.width != settings.model.context_width:
            raise HasteError(f"{path} has tokens of width {found.width}; possible: model.context_width={found.width}")
        return f"{path}: {found.captions:,} captions of {found.length} tokens"

    return _attempt("text tokens", look)


def _sampler(nets: Networks, sample: config.Sample) -> str:
    sampling.check_sampler(nets.student, sample.options)
    interval = f" for t in [{sample.guidance_low:g}, {sample.guidance_high:g}]"
    guidance = "no guidance" if sample.guidance == 1 else f"guidance {sample.guidance:g}{interval}"
    return f"{sample.sampler}, {sample.solver_steps} steps, {guidance}"


def _evaluator(study: config.Study) -> list[Check]:
    """Checks of what scores need."""
    evaluate = study.evaluate
    if evaluate.suite == "study":
        networks = {
            "extractor": (runs.extractor_path(study), evaluate.extractor.steps),
            "autoencoder": (runs.autoencoder_path(study), evaluate.autoencoder.steps),
        }
        return [
            Check(name, "ok", str(p) if p.is_file() else f"trained first, {steps:,} steps on the study's images")
            for name, (p, steps) in networks.items()
        ]
    found = [checks.inception(evaluate.inception)]
    if evaluate.dinov2 != "none":
        network = config.Teacher(model=evaluate.dinov2_model, weights=evaluate.dinov2)
        found.append(checks.timm_weights("dinov2", network, "evaluate.dinov2"))
    if evaluate.reference is not None:
        found.append(checks.reference(evaluate.reference))
    return found


def _existing(run: Run) -> str:
    """What lies in the run's directory already, and where it would begin."""
    done, missing, step = run.steps(), run.missing_steps(), run.resume_step()
    if not missing:
        return f"complete, nothing to train: {run.dir}"
    if step is not None:
        run.load(step, prefixes=("none",))  # refuses a damaged or foreign checkpoint
        return f"would go on from step {step:,} of {run.config.train.steps:,}: {run.dir}"
    donor = run.study.donor(run.arm)
    tau = run.config.tau
    if donor and Run(run.study, donor, run.seed).checkpoint_path(int(tau)).is_file():
        return f"would begin at step {int(tau):,}, shared with arm {donor}: {run.dir}"
    kept = f" ({len(done)} checkpoints there cannot be used)" if done else ""
    return f"would begin at step 0{kept}: {run.dir}"


def _device(precision: str) -> Check:
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        return Check("device", "ok", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    if precision == "fp16":
        text = "no GPU, where fp16 would train in float32 unnoticed; possible: a GPU, or train.precision=bf16"
        return Check("device", "problem", text)
    return Check("device", "ok", "CPU, no GPU found")


def _disk(run: Run, estimate: Estimate) -> str:
    place = output_root()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    written = sum(run.checkpoint_path(step).is_file() for step in run.config.train.kept_steps)
    needed = estimate.disk - written * min(estimate.checkpoint.values())
    text = f"{needed / GIB:.2f} GiB of checkpoints to come, {free / GIB:.1f} GiB free at {place}"
    if needed > free:
        raise HasteError(f"{text}; possible: HASTE_OUTPUT on another disk, or fewer steps in train.keep")
    return text


def _memory(estimate: Estimate) -> Check | None:
    """Whether a step fits into the GPU that is here; None without one."""
    if not torch.cuda.is_available():
        return None
    total = torch.cuda.get_device_properties(0).total_memory
    peak = max(memory.peak for memory in estimate.memory.values())
    text = f"about {peak / GIB:.1f} of {total / GIB:.1f} GiB at the step's peak"
    if peak > total:
        larger = "a larger train.accumulate, train.sharded, or a larger GPU"
        return Check("memory", "problem", f"{text}; possible: {larger}")
    return Check("memory", "ok", text)


def show(preflight: Preflight, stream: TextIO | None = None) -> None:
    """Print checks and estimates."""
    lines = [f"{preflight.title}: dry run, nothing is trained, loaded or downloaded"]
    width = max(len(c.name) for c in preflight.checks)
    lines += [f"  {c.state:<7}  {c.name:<{width}}  {c.found}" for c in preflight.checks]
    if preflight.estimate is not None:
        title = "Arithmetic from the settings, not a measurement:"
        lines += ["", title, *estimates.lines(preflight.estimate, preflight.precision, preflight.scoring)]
    counts = {state: sum(c.state == state for c in preflight.checks) for state in ("missing", "problem")}
    verdict = "nothing is missing" if preflight.ready else ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    print("\n".join([*lines, "", verdict]), file=stream or sys.stdout)
