"""Two-phase training: the step, and the loop around it that saves, logs and resumes.

Phase I minimises L_diff + lambda_R L_REPA + lambda_A L_ATTA, phase II L_diff alone (Eqs. 3, 4, arXiv 2505.16792).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from haste_core import checkpoint, sampling, sharding, teacher_cache
from haste_core.errors import Interrupted
from haste_core.files import write_bytes, write_text
from haste_core.meter import Meter, check_finite
from haste_core.models import DiffusionTransformer
from haste_core.objectives import shifted
from haste_core.processes import Processes
from haste_core.snapshot import capture, restore
from haste_core.state import TrainState, create
from haste_core.study import config, images, runs, signals
from haste_core.study import runs as provenance
from haste_core.study.data import Batch
from haste_core.study.runs import Run
from haste_core.teacher import Teacher, build_teacher, load_pretrained
from haste_core.termination import Termination


class Draws(NamedTuple):
    """The random part of a step: t (B,) uniform in [0, 1), eps like x, and y with labels dropped to the null label."""

    t: Tensor
    eps: Tensor
    y: Tensor


def draw_noise(
    batch: Batch,
    null_label: int,
    dropout: float,
    generator: Generator,
    drawn: int | None = None,
    part: slice = slice(None),
) -> Draws:
    """Draws for one step, taken on the CPU so that they are the same on every device.

    drawn, part: draws are taken for so many images (by default as many as there are), of which `batch` is this part.
    """
    drawn = drawn or len(batch.x)
    t = torch.rand(drawn, generator=generator)[part]
    eps = torch.randn(drawn, *batch.x.shape[1:], generator=generator)[part]
    dropped = torch.rand(drawn, generator=generator)[part] < dropout
    return Draws(t, eps, batch.y.masked_fill(dropped, null_label))


def train_step(s: TrainState) -> dict[str, Tensor]:
    """One optimizer step of the phase `s` is in; returns its losses and gradient norm as scalars on the device.

    In phase I the student hands out what alignment asks for. In phase II nothing of that exists, and the work is
    that of a vanilla step. What is random is drawn for the whole batch, through however many processes and
    micro-batches it goes; the losses returned are means over this process's share.
    """
    if s.termination.update(s.step):
        s.enter_phase_two()
    batch = s.batches.next()
    whole, dropout = (s.batches.batch_size, s.batches.part), s.config.train.label_dropout
    draws = draw_noise(batch, s.ema.null_label, dropout, s.noise, *whole)
    found = []
    for i, part in enumerate(s.micro_batches, 1):
        # Gradients are averaged over processes once a step, on the way back from the last micro-batch.
        with nullcontext() if i == len(s.micro_batches) else s.unsynchronised():
            found.append(accumulate_gradients(s, Batch(*(b[part] for b in batch)), Draws(*(d[part] for d in draws))))
    measured = {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}
    grad_norm = sharding.together(s.accelerator.clip_grad_norm_(s.parameters(), s.config.train.clip_norm))
    for optimizer in s.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    update_ema(s)
    s.step += 1
    return measured | {"grad_norm": grad_norm.detach()}


def accumulate_gradients(s: TrainState, batch: Batch, draws: Draws) -> dict[str, Tensor]:
    """Add one micro-batch's part to the gradients of the step; returns its losses as scalars on the device."""
    device, indices = s.accelerator.device, batch.indices
    batch, (u, eps, y) = batch.to(device), (d.to(device, non_blocking=True) for d in draws)
    u = shifted(u, s.config.train.timestep_shift)
    t = s.objective.timesteps(u)
    x_t = s.objective.noised(batch.x, eps, t)

    measured: dict[str, Tensor] = {}
    with s.accelerator.autocast():
        if s.alignment is None:
            predicted = s.model(x_t, t, y)
        else:
            tapped = s.model(x_t, t, y, s.alignment.taps)
            watched = tapped if s.angle is None else s.angle.watch(tapped, u)
            seen = None if s.cache is None else s.cache.seen(indices, device)
            predicted, aligned = tapped.output, s.alignment.losses(watched, batch.images, u, seen)
            measured = {k: v for k, v in aligned._asdict().items() if k != "total" and v is not None}
    denoising = s.objective.loss(predicted, batch.x, eps, t).mean()
    loss = denoising if s.alignment is None else denoising + s.termination.weight(s.step) * aligned.total

    # Every loss is a mean over its images and micro-batches are equally large: their mean is the batch's.
    s.accelerator.backward(loss / len(s.micro_batches))
    measured = {"loss": loss, "denoising": denoising, **measured}
    return {name: value.detach() for name, value in measured.items()}


@torch.no_grad()
def update_ema(s: TrainState) -> None:
    """ema <- decay ema + (1 - decay) model, for all parameters at once."""
    torch._foreach_lerp_(list(s.ema.parameters()), list(s.model.parameters()), 1 - s.config.train.ema_decay)


def fit(
    run: Run,
    on_step: Callable[[TrainState], None] | None = None,
    progress: bool = True,
    processes: Processes | None = None,
) -> None:
    """Train a run until every checkpoint its configuration asks for exists; does nothing when they all do.

    It resumes from the latest usable checkpoint of its own, else from a donor's at the switch (`Study.donor`), else
    starts from scratch; all three end in the same bits on the CPU. SIGTERM and SIGINT save a checkpoint and leave.
    Under a launcher every process calls this: all train, the main one writes, and a signal to any stops all.

    Args:
        run: the arm, seed and directory.
        on_step: called after every step; for tests and notebooks.
        progress: show a progress bar.
        processes: those that train together; by default those that a launcher started.

    Raises:
        HasteError: bad configuration, another process on the run, no room, or a loss that is not finite.
        Interrupted: a signal arrived; the run is saved.
    """
    processes = processes or Processes()
    with processes.locked(run.dir / "run.lock", f"run {run.arm} seed {run.seed}"):
        if not processes.from_main(lambda: _begin(run)):
            return
        state = open_state(run, processes)
        processes.from_main(lambda: run.keep_metrics_until(state.step))
        stopped = _train(run, state, on_step, progress)
        missing = processes.from_main(run.missing_steps)  # and the others stay until the main process is done
    if stopped and missing:
        raise Interrupted(f"{run.arm} seed {run.seed} stopped at step {state.step}, saved; run again to go on")


def _begin(run: Run) -> bool:
    """Prepare a run's directory; False when there is nothing left to train."""
    if not run.missing_steps():
        return False
    run.describe()
    if run.resume_step() is None:
        adopt_shared_part(run)
    return True


def _train(run: Run, state: TrainState, on_step: Callable[[TrainState], None] | None, progress: bool) -> bool:
    """The loop, with its bar, log and record, which the main process keeps; True when a signal ended it."""
    main = state.processes.is_main
    facts = {"first_step": state.step, "processes": state.processes.count}
    session: AbstractContextManager[dict[str, Any]] = provenance.session(run.dir, **facts) if main else nullcontext({})
    with session as record, signals.catch() as stopping:
        bar = tqdm(
            total=run.config.train.steps, initial=state.step, disable=not (progress and main), unit="step",
            mininterval=1.0, desc=f"{run.arm} seed {run.seed}",
        )  # fmt: skip
        with bar, (run.metrics_path if main else Path(os.devnull)).open("a") as log:
            stopped = _loop(run, state, Meter(log, bar, state), stopping, on_step)
            record["last_step"] = state.step
    return stopped


def _loop(
    run: Run,
    state: TrainState,
    meter: Meter,
    stopping: threading.Event,
    on_step: Callable[[TrainState], None] | None,
) -> bool:
    train, processes = run.config.train, state.processes
    kept = set(train.kept_steps)
    stopped = processes.any(stopping.is_set())
    while state.step < train.steps and not stopped:
        meter.add(train_step(state))
        due = state.step in kept or state.step % train.checkpoint_every == 0
        if state.step % train.log_every == 0 or state.step == train.steps:
            meter.write()
        if due:
            save_checkpoint(run, state)
        if state.step % train.sample_every == 0 or state.step == train.steps:
            preview(run, state)
        if on_step is not None:
            on_step(state)
        # All leave after the same step, whichever of them the signal reached.
        stopped = processes.any(stopping.is_set())
    if stopped:
        save_checkpoint(run, state)
    return stopped


def save_checkpoint(run: Run, state: TrainState) -> None:
    """Write the checkpoint of the present step and remove the temporary ones before it.

    Raises:
        HasteError: a weight is not finite (nothing is written), or there is no room.
    """
    state.gather()
    tensors, rest = capture(state)
    state.processes.from_main(lambda: _write_checkpoint(run, state, tensors, rest))


def _write_checkpoint(run: Run, state: TrainState, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    broken = [name for name, value in tensors.items() if name.startswith("model.") and not value.isfinite().all()]
    if broken:
        check_finite(float("nan"), state)
    kept = run.config.train.kept_steps
    checkpoint.save(run.checkpoint_path(state.step), tensors, rest | {"temporary": state.step not in kept})
    for step in run.steps():
        # Checkpoints say themselves whether they are temporary: `keep` may have been another one before.
        if step < state.step and step not in kept and run.load(step, prefixes=("none",))[1]["temporary"]:
            run.checkpoint_path(step).unlink(missing_ok=True)


def adopt_shared_part(run: Run) -> bool:
    """Take over a donor's checkpoints and metrics up to the switch, if it has them; True when it did.

    Files are hard-linked where possible: they are never changed in place, so two runs can share them.
    """
    donor_arm = run.study.donor(run.arm)
    if donor_arm is None:
        return False
    donor, tau = Run(run.study, donor_arm, run.seed), int(run.config.tau)
    wanted = [s for s in {*run.config.train.kept_steps, tau} if s <= tau]
    if not donor.checkpoint_path(tau).is_file() or not set(wanted) <= set(donor.steps()):
        return False
    donor.load(tau, prefixes=("noise.",))  # refuses a damaged or foreign checkpoint before anything is linked
    lines = [line for line in donor.metrics() if line["step"] <= tau]
    write_text(run.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))
    for step in sorted(wanted):
        target = run.checkpoint_path(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(donor.checkpoint_path(step), target)
        except OSError:  # a file system without hard links
            write_bytes(target, donor.checkpoint_path(step).read_bytes())
    provenance.note(run.dir, shared_with=f"{donor_arm} seed {run.seed}", shared_until_step=tau)
    return True


def open_state(run: Run, processes: Processes | None = None) -> TrainState:
    """The run's training state, at its latest usable checkpoint or before the first step.

    processes: those that train the run together, all of which call this; by default those that a launcher started.
    """
    processes = processes or Processes()
    step = processes.from_main(run.resume_step)
    loaded = run.load(step) if step is not None else None
    termination = Termination(run.config)
    if loaded is not None:
        termination.load_state_dict(loaded[1]["termination"])
    termination.update(step or 0)
    # A run that is past its switch never builds a teacher.
    teacher = find_teacher(run.study, run.config.teacher) if termination.phase == 1 else None
    state = create(run.config, run.seed, teacher, termination, processes=processes)
    if teacher is not None and run.config.train.cache_teacher:
        place = runs.teacher_path(run.study, run.config.teacher).parent
        alignment, dataset = state.alignment, state.batches.dataset
        assert alignment is not None
        state.read_teacher_from(processes.from_main(lambda: teacher_cache.write(place, run.config, alignment, dataset)))
    if loaded is not None:
        restore(state, *loaded)
    return state


def find_teacher(study: config.Study, teacher: config.Teacher | None = None) -> Teacher:
    """A frozen teacher of a study, by default its own: pretrained in it, or timm's with hub or local weights."""
    teacher = teacher or study.teacher
    if teacher.weights == "pretrain":
        return load_pretrained(teacher, runs.teacher_path(study, teacher))
    return build_teacher(teacher)


def preview(run: Run, state: TrainState) -> None:
    """Write samples/step_<n>.png: four samples of each class from the EMA model, the same noise every time.

    Of latents the first three channels are shown as they are; `haste sample` decodes. All processes call this, the main
    one draws.
    """
    average = sharding.in_one_piece(state.ema, state.processes.is_main)
    state.processes.from_main(lambda: _draw_preview(run, state.step, average))


def _draw_preview(run: Run, step: int, average: DiffusionTransformer) -> None:
    classes = average.null_label
    labels = torch.arange(min(classes, 10)).repeat(4)
    quick = config.Sample(sampler="ddpm" if average.kind == "dit" else "heun", solver_steps=10)
    drawn = sampling.draw(average, labels, range(len(labels)), quick)
    if drawn.shape[1] > 3:
        drawn = drawn[:, :3] / 3  # latents, of about unit variance: no decoder beside a run that needs the memory
    images.save_grid(sampling.to_uint8(drawn), run.dir / "samples" / f"step_{step:08d}.png", min(classes, 10))
