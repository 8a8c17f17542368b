"""Training of a run of a study: its settings mapped onto the core, its folder filled, interrupted and resumed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tqdm.auto import tqdm

from haste_core import checkpoint, gradient_angle, released, sampling
from haste_core.errors import HasteError, Interrupted, is_disk_full
from haste_core.files import locked, write_bytes, write_text
from haste_core.haste import HASTE
from haste_core.models import DiffusionTransformer, build
from haste_core.processes import Processes
from haste_core.seeding import stream
from haste_core.study import config, images, runs, signals, text
from haste_core.study.data import Batches, Dataset, check_unchanged, open_dataset
from haste_core.study.data.base import say
from haste_core.study.pretrain import check_precision, find_teacher, prepare_teacher
from haste_core.study.runs import Run
from haste_core.study.text import Contexts
from haste_core.teacher import Teacher
from haste_core.termination import Switch, Trigger, make_trigger
from haste_core.training import NotFinite, Optimization, Trainer, check_finite


def fit(
    run: Run,
    on_step: Callable[[Trainer], None] | None = None,
    progress: bool = True,
    processes: Processes | None = None,
) -> None:
    """Train a run until every checkpoint its configuration asks for exists; no effect when they all do.

    It resumes from the latest usable checkpoint of its own, else from a donor's at the switch (`Study.donor`), else
    starts from scratch; all three end in the same bits on the CPU. A teacher that is pretrained in the study is trained
    first where it does not exist. SIGTERM and SIGINT save a checkpoint and stop. Under a launcher every process calls
    this: all train, the main one writes, and a signal to any stops all.

    Args:
        run: the arm, seed and directory. on_step: called after every step. progress: show a progress bar.
        processes: those that train together; by default those that a launcher started.

    Raises:
        HasteError: bad configuration, another process on the run, a full disk, a loss that is not finite, or a
            checkpoint that was removed in between.
        Interrupted: a signal arrived; the run is saved.
    """
    processes = processes or Processes()
    with ExitStack() as held:
        what = f"run {run.arm} seed {run.seed}"
        processes.from_main(lambda: held.enter_context(locked(run.dir / "run.lock", what)) and None)
        if not processes.from_main(lambda: _begin(run)):
            return
        trainer = open_trainer(run, processes)
        repeated = range(trainer.step + 1, run.config.train.steps + 1)
        processes.from_main(lambda: run.tidy_metrics(repeated))
        try:
            stopped = _train(run, trainer, on_step, progress)
        except NotFinite as error:
            last = processes.from_main(lambda: max(run.steps(), default=None))
            left = "there is no checkpoint before it" if last is None else f"the checkpoint of step {last} is intact"
            raise HasteError(f"{error}; {left}") from error
        processes.from_main(lambda: _check_there(run))
        processes.from_main(run.tidy_metrics)
        missing = processes.from_main(run.missing_steps)  # the others wait until the main process is done
    if stopped and missing:
        raise Interrupted(f"{run.arm} seed {run.seed} stopped at step {trainer.step}, saved; run again to go on")
    if missing:
        raise HasteError(f"{run.dir}: checkpoints {missing} were removed while it trained; run again to make them")


def _begin(run: Run) -> bool:
    """Prepare a run's directory; False when there is nothing left to train."""
    if not run.missing_steps():
        return False
    check_unchanged(run.dir, run.config.data, begun=bool(run.steps()))
    prepare(run)
    run.describe()
    if run.resume_step() is None:
        adopt_shared_part(run)
    return True


def prepare(run: Run) -> None:
    """Pretrain the teacher of an aligned run that is not finished, where the study has yet to do so."""
    if run.config.alignment.active and run.missing_steps():
        prepare_teacher(run.study, run.config.teacher)


def _train(run: Run, trainer: Trainer, on_step: Callable[[Trainer], None] | None, progress: bool) -> bool:
    """The loop with its bar, log and record, which the main process keeps; True when a signal ended it."""
    train, processes = run.config.train, trainer.processes
    facts = {"first_step": trainer.step, "processes": processes.count}
    session: AbstractContextManager[dict[str, Any]] = (
        runs.session(run.dir, **facts) if processes.is_main else nullcontext({})
    )
    followed: AbstractContextManager[list[GeneralTracker]] = trackers(run) if processes.is_main else nullcontext([])
    with (
        session as record,
        signals.catch() as stopping,
        tqdm(
            total=train.steps, initial=trainer.step, disable=not (progress and processes.is_main), unit="step",
            mininterval=1.0, desc=f"{run.arm} seed {run.seed}",
        ) as bar,
        (run.metrics_path if processes.is_main else Path(os.devnull)).open("a") as stream,
        followed as tracking,
    ):  # fmt: skip
        log, kept = _Log(stream, bar, trainer, tracking), set(train.kept_steps)
        stopped = processes.any(stopping.is_set())
        while trainer.step < train.steps and not stopped:
            trainer.train_step()
            if trainer.step % train.log_every == 0 or trainer.step == train.steps:
                log.write(**exact_angle(run.config, trainer))
            try:  # before the checkpoint, from which a run that is killed in between would go on without the picture
                if trainer.step % train.sample_every == 0 or trainer.step == train.steps:
                    processes.from_main(lambda: _check_there(run))
                    processes.from_main(lambda: _preview(run, trainer.step, trainer.ema, tracking))
            finally:  # a picture that cannot be drawn costs no steps
                if trainer.step in kept or trainer.step % train.checkpoint_every == 0:
                    _save_checkpoint(run, trainer)
            if on_step is not None:
                on_step(trainer)
            # All leave after the same step, whichever of them the signal reached.
            stopped = processes.any(stopping.is_set())
        if stopped:
            _save_checkpoint(run, trainer)
        record["last_step"] = trainer.step
    return stopped


@contextmanager
def trackers(run: Run) -> Iterator[list[GeneralTracker]]:
    """accelerate's trackers that `train.trackers` names: event files in the run's directory, a W&B run of its own.

    Raises:
        HasteError: its package is not installed.
    """
    with ExitStack() as ended:
        begun = []
        for name in run.config.train.trackers:
            label = f"{run.arm}-{run.config.hash}-seed{run.seed}"
            where: dict[str, Any] = {"logging_dir": run.dir}
            if name == "wandb":
                where = {"dir": str(run.dir), "group": run.arm, "name": label, "id": label, "resume": "allow"}
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](
                    "tensorboard" if name == "tensorboard" else run.study.name, **where
                )
                tracker.start()
            except ImportError as error:
                raise HasteError(f"train.trackers names {name}, which is not installed; pip install {name}") from error
            ended.callback(tracker.finish)
            begun.append(tracker)
        yield begun


class _Log:
    """Lines of metrics.jsonl and updates of the bar. Nothing is read off the device between two of them."""

    def __init__(self, stream: TextIO, bar: Any, trainer: Trainer, tracking: Sequence[GeneralTracker] = ()) -> None:
        self.stream, self.bar, self.trainer, self.tracking = stream, bar, trainer, tracking
        self.time, self.step = time.perf_counter(), trainer.step

    def write(self, **readings: float) -> None:
        """Log the means since the last call, and further readings; refuses a loss that is not finite."""
        trainer = self.trainer
        line = trainer.measure(**readings)
        rate = (trainer.step - self.step) / max(time.perf_counter() - self.time, 1e-9)
        trainer.processes.from_main(lambda: self._append(line | {"steps_per_s": round(rate, 3)}))
        for tracker in self.tracking:
            tracker.log({name: value for name, value in line.items() if isinstance(value, int | float)}, trainer.step)
        names = [name for name in ("loss", "denoising", "feature", "attention", "grad_norm") if name in line]
        shown = {name: f"{line[name]:.3f}" for name in names}
        self.bar.set_postfix(phase=line["phase"], **shown, refresh=False)
        self.bar.update(trainer.step - self.step)
        self.time, self.step = time.perf_counter(), trainer.step

    def _append(self, line: dict[str, Any]) -> None:
        # JSON knows no infinity: a norm that was not finite for once is null.
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        try:
            self.stream.write(json.dumps(line, allow_nan=False) + "\n")
            self.stream.flush()
        except OSError as error:
            if is_disk_full(error):
                raise HasteError(
                    f"no room to write metrics ({error}); checkpoints are intact, free some space"
                ) from error
            raise


def exact_angle(run: config.RunSettings, trainer: Trainer) -> dict[str, float]:
    """`gradient_angle` at the steps where the run's trigger reads it (Eq. 2, arXiv 2505.16792), else nothing."""
    settings, haste = run.termination, trainer.haste
    if haste is None or settings.kind != "gradient_angle":
        return {}
    if trainer.step <= settings.after or trainer.step % settings.every:
        return {}
    batch = trainer.batches.dataset.examples("validation", settings.n)  # type: ignore[attr-defined]
    block = run.alignment.depth - 1 if settings.block is None else settings.block
    # The images are not divided among processes.
    found = trainer.processes.from_main(
        lambda: gradient_angle.exact(trainer.generator, haste, trainer.objective, batch, settings.timesteps, block)
    )
    return {"gradient_angle": found}


def _save_checkpoint(run: Run, trainer: Trainer) -> None:
    """Write the checkpoint of the present step, unless a weight is not finite, and remove temporary ones before it."""
    trainer.gather()
    trainer.processes.from_main(lambda: _check_there(run))
    trainer.processes.from_main(lambda: _write_checkpoint(run, trainer))


def _check_there(run: Run) -> None:
    """Refuse to write into a folder that was removed meanwhile: files that were written before would be missing."""
    if not (run.dir / "run.lock").is_file():
        raise HasteError(f"{run.dir} was removed while it trained; run again to begin anew")


def _write_checkpoint(run: Run, trainer: Trainer) -> None:
    tensors, rest = checkpoint.capture(trainer)
    if not all(value.isfinite().all() for name, value in tensors.items() if name.startswith("model.")):
        check_finite(float("nan"), trainer.step)
    kept = run.config.train.kept_steps
    rest |= {"seed": run.seed, "lineage": run.config.lineage, "run": run.config.hash}
    checkpoint.save(run.checkpoint_path(trainer.step), tensors, rest | {"temporary": trainer.step not in kept})
    for step in run.steps():
        # Checkpoints say themselves whether they are temporary: `keep` may have been another one before.
        if step < trainer.step and step not in kept and run.load(step, prefixes=())[1]["temporary"]:
            run.checkpoint_path(step).unlink(missing_ok=True)


def adopt_shared_part(run: Run) -> bool:
    """Take over a donor's checkpoints and metrics up to the switch, if it has them; True when it did.

    Files are never changed in place, so they are hard-linked where possible.
    """
    donor_arm = run.study.donor(run.arm)
    if donor_arm is None:
        return False
    donor, tau = Run(run.study, donor_arm, run.seed), int(run.config.tau)
    wanted = {step for step in (*run.config.train.kept_steps, tau) if step <= tau}
    if not wanted <= set(donor.steps()):
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
    runs.note(run.dir, shared_with=f"{donor_arm} seed {run.seed}", shared_until_step=tau)
    return True


def open_trainer(run: Run, processes: Processes | None = None) -> Trainer:
    """Trainer of a run, at its latest usable checkpoint or before the first step; all `processes` call this."""
    processes = processes or Processes()
    step = processes.from_main(run.resume_step)
    tensors, state = run.load(step) if step is not None else ({}, {})
    switch = switch_of(run.config)
    if state:
        switch.load_state_dict(state["termination"])
    switch.update(step or 0)
    # A run that is past its switch never builds a teacher.
    teacher = find_teacher(run.study, run.config.teacher) if switch.phase == 1 else None
    trainer = create(run.config, run.seed, teacher, switch, processes=processes)
    if state:
        checkpoint.restore(trainer, tensors, state)
    elif run.config.train.init_from is not None:
        _begin_from(run, trainer, Path(run.config.train.init_from))
    return trainer


def _begin_from(run: Run, trainer: Trainer, path: Path) -> None:
    """Give generator and average the weights of a checkpoint, and record which they are.

    Raises:
        HasteError: they do not fit, or another run of the study began with other weights from the same path.
    """
    taken = released.begin_from(trainer.generator, path)
    trainer.ema.load_state_dict(trainer.generator.state_dict())
    facts = {"file": str(path), "weights": taken}

    def record() -> None:
        for other in sorted(runs.study_dir(run.study).glob("*/seed*")):
            before = runs.provenance(other).get("begun_from", facts)
            if before["file"] == facts["file"] and before != facts:
                raise HasteError(
                    f"{path} holds {taken}, {other} began with {before['weights']}; expected the same file for all "
                    f"runs of a study, or another path"
                )
        runs.note(run.dir, begun_from=facts)

    trainer.processes.from_main(record)
    say(f"{run.arm} seed {run.seed} begins with {path}: {taken}")


def create(
    run: config.RunSettings,
    seed: int,
    teacher: Teacher | None,
    switch: Switch | None = None,
    dataset: Dataset | None = None,
    processes: Processes | None = None,
) -> Trainer:
    """Trainer of a run before its first step; every initial value comes from `seed`.

    Args:
        run: its settings. seed: of weights, projector, data order and noise, each with a stream of its own.
        teacher: the frozen encoder; needed in phase I only. switch: the phase to begin in; by default that of step 0.
        dataset: images to learn from in place of the run's data; for timing.
        processes: those that train the run together; by default those that a launcher started.

    Raises:
        HasteError: there is no teacher, or settings, data and machine do not fit together.
    """
    processes = processes or Processes()
    seeds = seeds_of(seed)
    torch.manual_seed(seeds.rest)  # nothing draws from it; set so that it is the same in every run
    dataset = open_dataset(run.data) if dataset is None else dataset
    student = build_generator(run, dataset, seeds.weights)
    if switch is None:
        switch = switch_of(run)
        switch.update(0)
    haste = None
    if switch.phase == 1:
        if teacher is None:
            raise HasteError("an aligned run needs its teacher; haste teacher STUDY prepares it")
        haste = build_haste(run, student, teacher, seeds.projector, switch)
    train = run.train
    share, aligned = processes.share(train.batch_size), haste is not None
    batches = Batches(dataset, train.batch_size, seeds.order, aligned, share, train.prefetch)
    options = Optimization(**train.model_dump(include=set(Optimization.__dataclass_fields__)))
    trainer = Trainer(student, batches, options, seeds.noise, haste, switch, processes)
    if haste is not None:
        check_precision(haste.teacher, dataset, haste.teacher_blocks, train.precision)
    return trainer


def build_haste(
    run: config.RunSettings, student: DiffusionTransformer, teacher: Teacher, seed: int, switch: Switch | None = None
) -> HASTE:
    """Phase I of a run with a student; `seed` is that of the projector's weights.

    switch: the phase, by default one that never ends.
    """
    settings = run.alignment
    names = ("depth", "layer_pairs", "lambda_feature", "lambda_attention", "projector_width", "t_low", "t_high")
    return HASTE(
        teacher,
        width=run.model.width,
        heads=student.heads,
        grid=student.grid,
        aligned_heads=settings.heads,
        temperature=settings.similarity,
        watch_angle=run.train.watch_angle or run.termination.kind == "online_angle",
        seed=seed,
        switch=switch,
        **{name: getattr(settings, name) for name in names},
    )


def trigger_of(settings: config.TerminationSettings) -> Trigger:
    """Trigger named by the settings."""
    names = {"kind", "at", "after", "threshold", "smoothing", "patience", "window", "gain"}
    return make_trigger(**settings.model_dump(include=names))


def switch_of(run: config.RunSettings) -> Switch:
    """Phase of a run before its first step."""
    return Switch(trigger_of(run.termination) if run.alignment.active else None, run.termination.fade)


class Seeds(NamedTuple):
    """Seeds of the random parts of a run, one each, so that the draws of one do not depend on another."""

    weights: int
    projector: int
    order: int
    noise: int
    rest: int


def seeds_of(seed: int) -> Seeds:
    """Seeds of all parts from the seed of a run."""
    return Seeds(*(stream(role, seed) for role in Seeds._fields))


def build_generator(run: config.RunSettings, dataset: Dataset, seed: int) -> DiffusionTransformer:
    """Generator of a run before the first step, sized for the images of `dataset`."""
    model = run.model
    contexts = text.find(run.data, dataset.captions) if model.kind == "mmdit" else None
    if model.kind == "mmdit" and (
        contexts is None or (contexts.captions, contexts.width) != (dataset.classes, model.context_width)
    ):
        found = "none" if contexts is None else f"{contexts.captions} captions of width {contexts.width}"
        raise HasteError(
            f"an MM-DiT needs text tokens for {dataset.classes} labels of width {model.context_width}, data.contexts "
            f"has {found}; expected a file by haste contexts, data.text_encoder, or another model.context_width"
        )
    return student_of(model, dataset.image_size, dataset.channels, dataset.classes, seed, contexts)


def student_of(
    model: config.ModelSettings, size: int, channels: int, classes: int, seed: int, contexts: Contexts | None = None
) -> DiffusionTransformer:
    """Generator with the given settings for images of `size` pixels or latents; `seed` is that of its weights.

    contexts: text tokens by label, for an MM-DiT.

    Raises:
        HasteError: the patch does not divide the size.
    """
    if size % model.patch:
        fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise HasteError(
            f"model.patch is {model.patch}, which does not divide the side {size} of what is modelled; expected one "
            f"of: {fitting}"
        )
    sizes = {"image_size": size, "channels": channels, "classes": classes}
    sizes |= model.model_dump(include={"depth", "width", "heads", "patch"})
    if model.kind == "mmdit":
        return build(model.kind, seed, **sizes, context_width=model.context_width, contexts=contexts)
    return build(model.kind, seed, **sizes, mlp_ratio=model.mlp_ratio, qk_norm=model.qk_norm)


def _preview(run: Run, step: int, average: DiffusionTransformer, tracking: Sequence[GeneralTracker] = ()) -> None:
    """Write samples/step_<n>.png: four samples of each class from the EMA model, the same noise every time.

    Of latents the first three channels are shown as they are; `haste sample` decodes.
    """
    classes, told = min(average.null_label, 10), open_dataset(run.config.data).captions
    labels = torch.arange(classes).repeat(4)
    quick = sampling.Sampler(sampler="ddpm" if average.kind == "dit" else "heun", solver_steps=10)
    drawn = sampling.draw(average, labels, range(len(labels)), quick)
    if drawn.shape[1] > 3:
        drawn = drawn[:, :3] / 3  # latents, of about unit variance: no decoder beside a run that needs the memory
    path = run.dir / "samples" / f"step_{step:08d}.png"
    texts = None if told is None else [told.texts[i] for i in labels.tolist()]
    images.save_grid(sampling.to_uint8(drawn), path, classes, captions=texts)
    for tracker in tracking:
        with Image.open(path) as grid:
            shown = np.array(grid.convert("RGB"))[None]
        tracker.log_images(
            {"samples": shown}, step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {})
        )
