"""The dry run of `haste train STUDY ARM --dry-run`, and its checks of a study: everything a run needs, opened where
that is cheap.

Nothing is trained and nothing is downloaded. Problems are worded by what opens the same thing in training.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from haste_core import released, sampling
from haste_core.errors import HasteError, NotDownloaded
from haste_core.files import output_root
from haste_core.haste import HASTE
from haste_core.models import DiffusionTransformer
from haste_core.processes import micro_batches
from haste_core.study import adm, config, estimate, pretrain, runs, text
from haste_core.study.data import Batches, open_dataset
from haste_core.study.data.base import MNIST_SIDE
from haste_core.study.estimate import Example, size_text
from haste_core.study.latents import vae_of
from haste_core.study.runs import Run
from haste_core.teacher import weights_file

# The VAE of the released latents: 8 pixels to one latent of 4 channels.
_PIXELS_PER_LATENT, _LATENT_CHANNELS, _ASSUMED_CLASSES = 8, 4, 1000
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


# What a failed check says: settings do not fit, wherever they are used; a file, data set or space is not here; it is
# downloaded at first use; the device here does not do.
SETTINGS, MISSING, DOWNLOAD, DEVICE = "settings", "missing", "download", "device"
# Problems of this machine alone.
ELSEWHERE = (MISSING, DOWNLOAD, DEVICE)
_KINDS = {"settings": SETTINGS, "networks": SETTINGS, "sampler": SETTINGS, "memory": DEVICE, "device": DEVICE}


class Check(NamedTuple):
    """One check: its name, True where nothing is missing or wrong, what was found, and the kind of a problem."""

    name: str
    ok: bool
    found: str
    kind: str = MISSING


class Built(NamedTuple):
    """Networks of a run on the meta device (`estimate.networks_of`), and the example that they are sized for."""

    example: Example
    student: DiffusionTransformer
    haste: HASTE | None


def _checked(name: str, look: Callable[[], object]) -> Check:
    try:
        return Check(name, True, str(look()))
    except HasteError as error:
        return _problem(name, error)


def _problem(name: str, error: HasteError) -> Check:
    kind = DOWNLOAD if isinstance(error, NotDownloaded) else _KINDS.get(name, MISSING)
    return Check(name, False, str(error), kind)


def dry_run(run: Run, processes: int = 1) -> tuple[list[Check], str]:
    """Checks of everything that a run and its scores need, and an estimate of what the run takes, in words.

    The estimate is empty where the size of the data is unknown or the networks do not fit.

    Args:
        run: the run.
        processes: processes that train it together, each on a GPU of its own; memory is that of one of them.

    Raises:
        HasteError: so many processes cannot share a step's images.
    """
    settings, text = run.config, ""
    micro_batches(settings.train.batch_size, settings.train.accumulate, processes)
    example, data = find_example(settings.data, settings.train.batch_size)
    built, networks = _build(settings, example)
    checks = [_checked("settings", lambda: _settings(run)), data, networks]
    checks += [_checked(name, look) for name, (_, look) in _needed(run, built, processes).items()]
    if built is not None:
        needed = _still_needed(run, built) + 2 * estimate.checkpoint_bytes(built.student, built.haste)
        checks.append(_checked("disk", lambda: _disk(needed)))
        found = estimate.estimate(settings, built.example, processes)
        scoring = 0  # FLOPs of sampling the images of one score
        if all(check.ok for check in checks if check.name == "sampler"):
            forward = int(found["forward"][0])
            scoring = estimate.sampling_flops(settings, run.sample, run.study.evaluate.n, forward)
        text = estimate.run_text(found, settings.train.precision, scoring)

    def begun() -> str:
        pretrain.check_begun(run.study, [run])
        return _existing(run)

    checks.append(_checked("run", begun))
    return checks, text


def check_study(study: config.StudySettings, processes: int = 1, allowed: Collection[str] = ()) -> list[str]:
    """Run the checks of `dry_run` on a study, once for equal settings of its arms, before anything is trained.

    Args:
        study: the study. processes: processes that train each run together.
        allowed: kinds of problems that come back as remarks and are no errors. `haste study` allows DOWNLOAD, since its
            jobs download, its dry run nothing, and DEVICE where a cluster runs the jobs. `haste plan`, `teacher` and
            `cost` allow ELSEWHERE: a plan may be for another machine, which has the GPU, data and files.

    Returns:
        A line for each allowed problem. Teachers and extractors that the study trains itself are none.

    Raises:
        HasteError: the first other problem; it names the arm. The data changed since a run was begun.
    """
    pretrain.check_begun(study, [Run(study, arm, seed) for arm in study.arms for seed in study.seeds_of(arm)])
    remarks: list[str] = []
    done: list[tuple[str, object]] = []

    def judge(check: Check, arm: str = "") -> None:
        said = f"arm {arm!r}: {check.found}" if arm else check.found
        if not check.ok and check.kind not in allowed:
            raise HasteError(said)
        if not check.ok:
            remarks.append(f"{check.name}: {said}")

    largest = max(study.arms, key=lambda arm: study.run(arm).train.batch_size)
    example, data = find_example(study.data, study.run(largest).train.batch_size)
    judge(data, largest if data.kind == SETTINGS else "")
    needed = 0
    for arm in study.arms:
        settings, seeds = study.run(arm), [Run(study, arm, seed) for seed in study.seeds_of(arm)]
        train, built = settings.train, None
        judge(_checked("settings", partial(micro_batches, train.batch_size, train.accumulate, processes)), arm)
        if example is not None:
            built, networks = _build(settings, example)
            judge(networks, arm)
        if built is not None:
            shared = estimate.shared_steps(study, arm)[1]
            needed += sum(_still_needed(run, built, shared) for run in seeds)
        for name, (subject, look) in _needed(seeds[0], built, processes).items():
            # The memory of a GPU that is not here is not traced, which takes seconds.
            if (name, subject) not in done and (name != "memory" or DEVICE not in allowed):
                done.append((name, subject))
                judge(_checked(name, look), arm if subject is not None else "")
        for run in seeds:
            judge(_checked("run", partial(_existing, run)), arm)
    judge(_checked("disk", lambda: _disk(needed)))
    return remarks


def _still_needed(run: Run, built: Built, shared: int = 0) -> int:
    """Bytes of the checkpoints that a run has yet to keep. shared: steps whose checkpoints another arm makes for it."""
    end = estimate.aligned_until(run.config)
    steps = [step for step in run.missing_steps() if step > shared]
    return sum(estimate.checkpoint_bytes(built.student, built.haste if step <= end else None) for step in steps)


def _needed(run: Run, built: Built | None, processes: int) -> dict[str, tuple[object, Callable[[], str]]]:
    """Checks of what a run and its scores need beside data and networks, each with the settings of an arm behind it."""
    settings, study, evaluate = run.config, run.study, run.study.evaluate
    train = settings.train
    needed: dict[str, tuple[object, Callable[[], str]]] = {}
    if built is not None:
        student = built.student
        needed["sampler"] = (settings.model, run.sample), lambda: _sampler(student, run.sample)
        if torch.cuda.is_available():
            needed["memory"] = settings, lambda: _memory(settings, built.example, processes)
        if train.init_from is not None:
            start = Path(train.init_from)
            words = (train.init_from, settings.model)
            needed["initial weights"] = words, lambda: f"{start}: {released.check_start(student, start)}"
    if settings.model.kind == "mmdit":
        needed["text tokens"] = settings.model, lambda: _text_tokens(settings)
    if settings.alignment.active:
        needed["teacher weights"] = settings.teacher, lambda: _teacher_weights(run)
    if settings.data.kind == "latents":
        needed["vae"] = run.sample, lambda: _vae(settings.data, run.sample)
    if evaluate.suite == "study":
        needed["extractor"] = None, lambda: _trained_here(runs.extractor_path(study), evaluate.extractor)
        needed["autoencoder"] = None, lambda: _trained_here(runs.autoencoder_path(study), evaluate.autoencoder)
    else:
        needed["inception"] = None, lambda: _inception(evaluate.inception)
        if evaluate.dinov2 != "none":
            needed["dinov2"] = None, lambda: _encoder(evaluate.dinov2_model, evaluate.dinov2, "evaluate.dinov2")
        if evaluate.reference is not None:
            needed["reference"] = None, lambda: _reference(Path(str(evaluate.reference)))
    needed["device"] = train.precision, lambda: _device(train.precision)
    return needed


def _settings(run: Run) -> str:
    run.study.check_claims()
    train, tau = run.config.train, run.config.tau
    phase = "no alignment" if tau == 0 else "aligned throughout" if tau == math.inf else f"aligned until {tau:,}"
    if train.steps <= tau < math.inf:
        phase = f"aligned throughout: the switch at {tau:,} lies beyond the last step"
    return (
        f"{train.steps:,} steps of {train.batch_size} images, {phase}, precision {train.precision}, "
        f"{len(train.kept_steps)} checkpoints stay"
    )


def _build(settings: config.RunSettings, example: Example | None) -> tuple[Built | None, Check]:
    """Networks of a run, None where they cannot be built, and the check of them."""
    try:
        if example is None:
            raise HasteError("the size of the data is unknown; expected data.image_size")
        student, haste = estimate.networks_of(settings, example)
    except HasteError as error:
        return None, _problem("networks", error)
    built, model, (rows, columns) = Built(example, student, haste), settings.model, student.grid
    text = f"{model.preset or model.kind}, {model.depth} blocks of width {model.width}, {rows}x{columns} tokens"
    if haste is None:
        return built, Check("networks", True, f"{text}; no teacher")
    teacher = haste.teacher
    (rows, columns), (height, width) = teacher.grid, teacher.image_size
    parts = f"{teacher.blocks} stages" if teacher.maps else f"{teacher.blocks} blocks, {teacher.heads} heads"
    grids = "equal" if student.grid == teacher.grid else "different, resampled"
    if min(height, width) < example.image_size:
        grids += f"; it sees images of {example.image_size} pixels shrunk, see teacher.kwargs.img_size"
    text += f"; teacher {settings.teacher.model}, {parts}, {rows}x{columns} tokens of {height}x{width} pixels"
    return built, Check("networks", True, f"{text}; token grids {grids}")


def _sampler(student: DiffusionTransformer, sample: config.SampleSettings) -> str:
    sampling.check_sampler(student, sample.options)
    interval = f" for t in [{sample.guidance_low:g}, {sample.guidance_high:g}]"
    guidance = "no guidance" if sample.guidance == 1 else f"guidance {sample.guidance:g}{interval}"
    return f"{sample.sampler}, {sample.solver_steps} steps, {guidance}"


# -- data --------------------------------------------------------------------------------------------------------------


def find_example(settings: config.DataSettings, batch_size: int = 1) -> tuple[Example | None, Check]:
    """One example of the data and the check of them.

    Where the data are missing the example is what `data.image_size` makes of it, None without one.
    """
    place = Path(str(settings.path))
    try:
        if settings.kind in ("images", "captions") and not settings.has_scenes and not place.exists():
            return _assumed(settings), Check("data", True, _in_cache(str(place)))
        dataset = open_dataset(settings)
    except HasteError as error:
        return _assumed(settings), _problem("data", error)
    size, channels, classes = dataset.image_size, dataset.channels, dataset.classes
    shown = (getattr(dataset, "pixel_size", size), 3 if settings.kind == "latents" else channels)
    example, found = Example(size, channels, classes, *shown), Check("data", not dataset.doubts, dataset.summary)
    try:
        Batches(dataset, batch_size, seed=0)  # refuses too few images
    except HasteError as error:
        found = Check("data", False, str(error), SETTINGS)
    return example, found


def _in_cache(name: str) -> str:
    from datasets.config import HF_DATASETS_CACHE

    cached = Path(HF_DATASETS_CACHE) / name.lower().replace("/", "___")
    if not cached.is_dir():
        raise (NotDownloaded if _HUB_NAME.fullmatch(name) else HasteError)(
            f"data.path {name} does not exist here, and no data set of the hub by that name is in the local cache; "
            f"expected a hub name (downloaded at first use), parquet files, or a folder with one sub-folder per class"
        )
    return f"{name}, in the local cache {cached}"


def _assumed(settings: config.DataSettings) -> Example | None:
    size = settings.image_size
    if settings.kind == "mnist":
        return Example(size or MNIST_SIDE, 1, 10, size or MNIST_SIDE, 1)
    if size is None:
        return None
    if settings.kind == "textured":
        return Example(size, 1, 10, size, 1)
    if settings.kind != "latents":
        return Example(size, 3, _ASSUMED_CLASSES, size, 3)
    return Example(size // _PIXELS_PER_LATENT, _LATENT_CHANNELS, _ASSUMED_CLASSES, size, 3)


def _text_tokens(settings: config.RunSettings) -> str:
    path, encoder = settings.data.contexts, settings.data.text_encoder
    if path is None and encoder is None:
        raise HasteError("an MM-DiT needs data.text_encoder, or data.contexts=FILE written by haste contexts")
    if path is None:
        if encoder == text.WORDS:
            text.word_files()
        return f"made at first use by {encoder}"
    if encoder is not None and not Path(path).is_file():
        raise HasteError(f"data.contexts {path} is missing; make it by: haste contexts STUDY")
    found = text.Contexts(path)
    if found.width != settings.model.context_width:
        raise HasteError(
            f"model.context_width is {settings.model.context_width}, but {path} has tokens of width {found.width}"
        )
    return f"{path}: {found.captions:,} captions of {found.length} tokens"


# -- weights -----------------------------------------------------------------------------------------------------------


def _teacher_weights(run: Run) -> str:
    teacher = run.config.teacher
    if teacher.weights == "random":
        return "random: for tests and timing only"
    if teacher.weights == "pretrain":
        return _trained_here(runs.teacher_path(run.study, teacher), teacher.fitting)
    return _encoder(teacher.model, teacher.weights, "teacher.weights")


def _trained_here(path: Path, fitting: config.FittingSettings) -> str:
    return str(path) if path.is_file() else f"trained first, {fitting.steps:,} steps on the study's images"


def _encoder(model: str, weights: str, key: str) -> str:
    """Place of an encoder's weights. key: the setting that takes a path."""
    return str(weights_file(model, weights, key, download=False) or f"{model} is resolved by timm when it is loaded")


def _vae(data: config.DataSettings, sample: config.SampleSettings) -> str:
    name = vae_of(data, sample)
    folder = Path(name).expanduser()
    for file in _VAE_FILES:
        found = folder / file if folder.is_dir() else try_to_load_from_cache(name, file)
        if not isinstance(found, str | Path) or not Path(found).is_file():
            kind = NotDownloaded if _HUB_NAME.fullmatch(name) and not folder.is_dir() else HasteError
            raise kind(f"{name} has no {file} on this machine: a hub name is downloaded at first use, or --set "
                       f"sample.vae=FOLDER with {' and '.join(_VAE_FILES)}")  # fmt: skip
    return name


def _inception(where: str) -> str:
    path = Path(torch.hub.get_dir()) / "checkpoints" / adm.INCEPTION_FILE if where == "hub" else Path(where)
    if where == "hub" and not path.is_file():
        raise NotDownloaded(
            f"no file {path}: downloaded there from {adm.URL_INCEPTION_V3} at first use, or --set "
            f"evaluate.inception=PATH"
        )
    adm.read_inception(str(path))
    return str(path)


def _reference(path: Path) -> str:
    if path.is_dir():
        return f"{path}, a folder of images"
    if not path.is_file():
        raise HasteError(
            f"nothing at {path}; expected ADM's .npz or a folder of images there, or --set evaluate.reference=null "
            f"(training images)"
        )
    adm.load_reference(path)
    return str(path)


# -- this machine ------------------------------------------------------------------------------------------------------


def _existing(run: Run) -> str:
    """The state of the run's directory, and the step that training would begin at."""
    done, step, tau = run.steps(), run.resume_step(), run.config.tau
    if not run.missing_steps():
        return f"complete, nothing to train: {run.dir}"
    if step is not None:
        run.load(step, prefixes=("none",))  # refuses a damaged or foreign checkpoint
        return f"would go on from step {step:,} of {run.config.train.steps:,}: {run.dir}"
    donor = run.study.donor(run.arm)
    if donor and Run(run.study, donor, run.seed).checkpoint_path(int(tau)).is_file():
        return f"would begin at step {int(tau):,}, shared with arm {donor}: {run.dir}"
    return f"would begin at step 0{f' ({len(done)} checkpoints there cannot be used)' if done else ''}: {run.dir}"


def _device(precision: str) -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)}, {size_text(torch.cuda.get_device_properties(0).total_memory)}"
    if precision == "fp16":
        raise HasteError("train.precision is fp16 and there is no GPU, so training would be in float32; expected no, "
                         "bf16, or a GPU")  # fmt: skip
    return "CPU, no GPU found"


def _disk(needed: int) -> str:
    place = output_root()
    while not place.exists():
        place = place.parent
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        raise HasteError(
            f"nothing can be written to {place} ({error.strerror}); expected HASTE_OUTPUT=FOLDER that can be written"
        ) from error
    free = shutil.disk_usage(place).free
    text = f"{size_text(max(needed, 0))} of checkpoints to come, {size_text(free)} free at {place}"
    if needed > free:
        raise HasteError(f"{text}; expected HASTE_OUTPUT on another disk, or fewer steps in train.keep")
    return text


def _memory(settings: config.RunSettings, example: Example, processes: int) -> str:
    peak = int(estimate.estimate(settings, example, processes)["memory_bytes"].max())
    total = torch.cuda.get_device_properties(0).total_memory
    text = f"about {size_text(peak)} of {size_text(total)} at the peak of a step"
    if peak > total:
        raise HasteError(f"{text}; expected a larger train.accumulate, more processes, or a larger GPU")
    return text
