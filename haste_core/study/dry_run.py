"""The dry run of `haste train STUDY ARM --dry-run`: everything a run needs, checked without training or downloading."""

from __future__ import annotations

import difflib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from haste_core import sampling
from haste_core.errors import HasteError
from haste_core.files import output_root
from haste_core.processes import micro_batches
from haste_core.study import config, runs
from haste_core.study.estimate import Estimate, Example, Networks, estimate, estimate_text, networks_of, scoring_flops
from haste_core.study.runs import Run

GIB = 2**30
# The VAE of the released latents: 8 pixels to one latent of 4 channels.
_PIXELS_PER_LATENT, _LATENT_CHANNELS, _ASSUMED_CLASSES = 8, 4, 1000
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm"}
_VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


class Check(NamedTuple):
    """One check: "ok", "missing" (not on this machine) or "problem" (will not work), and what was found."""

    name: str
    state: Literal["ok", "missing", "problem"]
    found: str


@dataclass(frozen=True)
class DryRun:
    """The checks of a run and its estimate, which is None where the data are unknown or the networks do not fit."""

    title: str
    checks: list[Check]
    estimate: Estimate | None
    text: str

    @property
    def lacking(self) -> list[str]:
        """Names of the checks that are not ok."""
        return [check.name for check in self.checks if check.state != "ok"]


def dry_run(run: Run, processes: int = 1) -> DryRun:
    """Check everything that a run and its scores need, and estimate what the run takes.

    Args:
        run: the run.
        processes: processes that train it together, each on a GPU of its own; memory is that of one of them.

    Raises:
        HasteError: so many processes cannot share a step's images.
    """
    settings, study = run.config, run.study
    micro_batches(settings.train.batch_size, settings.train.accumulate, processes)
    checks = [_check("settings", lambda: _settings(run))]
    data, example = check_data(settings.data, settings.train.batch_size)
    checks.append(data)
    found = None
    if example is None:
        checks.append(Check("networks", "problem", "the size of the data is unknown; expected data.image_size"))
    else:
        try:
            nets = networks_of(settings, example)
            found = estimate(settings, example, processes)
            checks.append(Check("networks", "ok", _networks(settings, nets)))
            checks.append(_check("sampler", lambda: _sampler(nets, run.sample)))
        except HasteError as error:
            checks.append(Check("networks", "problem", str(error)))
    if settings.model.kind == "mmdit":
        checks.append(_text_tokens(settings))
    if settings.alignment.active:
        checks.append(_teacher_weights(run))
    if settings.data.kind == "latents":
        checks.append(check_vae(settings.data, run.sample))
    checks += _scores(study)
    checks += [_check("run", lambda: _existing(run)), _device(settings.train.precision)]
    if found is not None:
        checks.append(_check("disk", lambda: _disk(run, found)))
        if torch.cuda.is_available():
            checks.append(_check("memory", lambda: _memory(found)))
    title = f"{study.name} {run.arm}, seed {run.seed}: dry run, nothing is trained, loaded or downloaded"
    return DryRun(title, checks, found, _text(title, checks, run, found))


def _text(title: str, checks: list[Check], run: Run, found: Estimate | None) -> str:
    lines = [title, *(f"  {c.state:<7}  {c.name:<{max(len(c.name) for c in checks)}}  {c.found}" for c in checks), ""]
    if found is not None:
        draws = any(check.name == "sampler" and check.state == "ok" for check in checks)
        scoring = scoring_flops(run.config, run.sample, run.study.evaluate.n, found.forward) if draws else 0
        lines += ["Estimated from the settings, not a measurement:"]
        lines += [estimate_text(found, run.config.train.precision, scoring), ""]
    counts = {state: sum(c.state == state for c in checks) for state in ("missing", "problem")}
    return "\n".join([*lines, ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "nothing is missing"])


def _check(name: str, look: Callable[[], str]) -> Check:
    """A check that is ok with the text of `look`, or a problem with the error it raises."""
    try:
        return Check(name, "ok", look())
    except HasteError as error:
        return Check(name, "problem", str(error))


def _settings(run: Run) -> str:
    run.study.check_claims()
    train, tau = run.config.train, run.config.tau
    phase = "no alignment" if tau == 0 else "aligned throughout" if tau == math.inf else f"aligned until {tau:,}"
    return (
        f"{train.steps:,} steps of {train.batch_size} images, {phase}, precision {train.precision}, "
        f"{len(train.kept_steps)} checkpoints stay"
    )


# -- networks and their weights ----------------------------------------------------------------------------------------


def _networks(settings: config.RunSettings, nets: Networks) -> str:
    model, (rows, columns) = settings.model, nets.student.grid
    text = f"{model.preset or model.kind}, {model.depth} blocks of width {model.width}, {rows}x{columns} tokens"
    if nets.teacher is None or nets.haste is None:
        return f"{text}; no teacher"
    teacher, aligned = nets.teacher, settings.alignment
    (rows, columns), (height, width) = teacher.grid, teacher.image_size
    parts = [
        text,
        f"teacher {settings.teacher.model}, {teacher.blocks} blocks, {teacher.heads} heads, {rows}x{columns} tokens of "
        f"{height}x{width} pixels",
    ]
    if aligned.lambda_feature > 0:
        parts.append(f"features after block {aligned.depth}")
    if nets.haste.pairs:
        pairs = ", ".join(f"{s}<-{t}" for s, t in nets.haste.pairs)
        parts.append(f"attention of blocks {pairs} (from 0), {nets.aligned_heads} heads")
    return "; ".join(
        [*parts, f"token grids {'equal' if nets.student.grid == teacher.grid else 'different, resampled'}"]
    )


def _sampler(nets: Networks, sample: config.SampleSettings) -> str:
    sampling.check_sampler(nets.student, sample.options)
    interval = f" for t in [{sample.guidance_low:g}, {sample.guidance_high:g}]"
    guidance = "no guidance" if sample.guidance == 1 else f"guidance {sample.guidance:g}{interval}"
    return f"{sample.sampler}, {sample.solver_steps} steps, {guidance}"


def _text_tokens(settings: config.RunSettings) -> Check:
    from haste_core.study.data.contexts import Contexts

    path = settings.data.contexts
    if path is None or not Path(path).is_file():
        text = f"no file {path}; expected data.contexts=FILE, written by haste_core.study.data.contexts.write"
        return Check("text tokens", "missing", text)

    def look() -> str:
        found = Contexts(path)
        if found.width != settings.model.context_width:
            raise HasteError(
                f"model.context_width is {settings.model.context_width}, but {path} has tokens of width {found.width}"
            )
        return f"{path}: {found.captions:,} captions of {found.length} tokens"

    return _check("text tokens", look)


def _teacher_weights(run: Run) -> Check:
    teacher, name = run.config.teacher, "teacher weights"
    if teacher.weights == "random":
        return Check(name, "ok", "random: for tests and timing only")
    if teacher.weights == "pretrain":
        return _pretrained(name, runs.teacher_path(run.study, teacher), teacher.fitting.steps)
    return timm_weights(name, teacher.model, teacher.weights, "teacher.weights")


def _scores(study: config.StudySettings) -> list[Check]:
    """Checks of what scores need."""
    evaluate = study.evaluate
    if evaluate.suite == "study":
        return [
            _pretrained("extractor", runs.extractor_path(study), evaluate.extractor.steps),
            _pretrained("autoencoder", runs.autoencoder_path(study), evaluate.autoencoder.steps),
        ]
    found = [_inception(evaluate.inception)]
    if evaluate.dinov2 != "none":
        found.append(timm_weights("dinov2", evaluate.dinov2_model, evaluate.dinov2, "evaluate.dinov2"))
    if evaluate.reference is not None:
        found.append(check_reference(evaluate.reference))
    return found


def _pretrained(name: str, path: Path, steps: int) -> Check:
    there = path.is_file()
    return Check(name, "ok", str(path) if there else f"trained first, {steps:,} steps on the study's images")


def timm_weights(name: str, model: str, weights: str, key: str) -> Check:
    """Check of the weights of a timm encoder.

    Args:
        name: the check's name.
        model: timm's name of the encoder.
        weights: "hub", or the path of a file.
        key: the setting that takes a path.
    """
    from timm import list_models
    from timm.models import get_pretrained_cfg, is_model

    if ":" in model:  # "hf-hub:owner/name", "local-dir:folder"
        return Check(name, "missing", f"{model} is resolved by timm when it is loaded, and was not looked for")
    if not is_model(model.split(".")[0]):
        near = ", ".join(difflib.get_close_matches(model, list_models(), n=3)) or "a name of timm.list_models()"
        return Check(name, "problem", f"timm knows no {model!r}; expected {near}")
    if weights != "hub":
        return _file(name, weights, "hub, or the path of a checkpoint")
    try:
        cfg = get_pretrained_cfg(model)
    except RuntimeError as error:
        return Check(name, "problem", f"{' '.join(str(error).split())}; expected {key}=PATH")
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        return Check(name, "problem", f"timm knows no published weights of {model}; expected {key}=PATH")
    if not cfg.hf_hub_id:
        return _download(name, str(cfg.url).rpartition("/")[2], str(cfg.url), key)
    repository, _, revision = cfg.hf_hub_id.partition("@")
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if any(_in_hub_cache(repository, file, revision) for file in files):
        return Check(name, "ok", f"{repository}, in the local cache")
    return _not_in_hub_cache(name, repository, files[0], f"put it anywhere and --set {key}=PATH")


def check_vae(data: config.DataSettings, sample: config.SampleSettings) -> Check:
    """Check of the VAE that decodes latents."""
    from haste_core.study.latents import vae_of

    try:
        named = vae_of(data, sample)[0]
    except HasteError as error:
        return Check("vae", "problem", str(error))
    folder = Path(named).expanduser()
    if folder.is_dir():
        lacking = [file for file in _VAE_FILES if not (folder / file).is_file()]
        return Check("vae", "problem", f"{folder} has no {' and no '.join(lacking)}") if lacking else Check(
            "vae", "ok", str(folder)
        )  # fmt: skip
    if all(_in_hub_cache(named, file) for file in _VAE_FILES):
        return Check("vae", "ok", f"{named}, in the local cache")
    return _not_in_hub_cache(
        "vae", named, " and ".join(_VAE_FILES), "put both into a folder and --set sample.vae=FOLDER"
    )


def _inception(where: str) -> Check:
    from haste_core.study.adm import INCEPTION_FILE, URL_INCEPTION_V3

    if where != "hub":
        return _file("inception", where, "hub, or the path of torch-fidelity's weights")
    return _download("inception", INCEPTION_FILE, URL_INCEPTION_V3, "evaluate.inception")


def check_reference(path: str) -> Check:
    """Check of a file of reference statistics or images."""
    from haste_core.study.adm import array_names

    if not Path(path).is_file():
        return _file("reference", path, "ADM's .npz there, or --set evaluate.reference=null (training images)")
    try:
        names = array_names(Path(path))
    except HasteError as error:
        return Check("reference", "problem", str(error))
    if "arr_0" not in names and not {"mu", "sigma"} <= set(names):
        return Check("reference", "problem", f"{path} holds {', '.join(names)}; expected mu and sigma, or arr_0")
    return Check("reference", "ok", f"{path} ({', '.join(names)})")


def _file(name: str, path: str, expected: str) -> Check:
    there = Path(path).is_file()
    return Check(name, "ok" if there else "missing", path if there else f"no file {path}; expected {expected}")


def _download(name: str, file: str, url: str, key: str) -> Check:
    target = Path(torch.hub.get_dir()) / "checkpoints" / file
    if target.is_file():
        return Check(name, "ok", str(target))
    return Check(name, "missing", f"{url} is not at {target}: downloaded there at first use, or --set {key}=PATH")


def _in_hub_cache(repository: str, file: str, revision: str = "") -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str)


def _not_in_hub_cache(name: str, repository: str, file: str, instead: str) -> Check:
    text = (
        f"not in the local cache: {file} of https://huggingface.co/{repository}; downloaded at first use, or {instead}"
    )
    return Check(name, "missing", text)


# -- data --------------------------------------------------------------------------------------------------------------


def example_of(study: config.StudySettings) -> tuple[Example, Check]:
    """One example of a study's data, assumed from the settings where the data are missing, and the check of the data.

    Raises:
        HasteError: the settings do not say how large the images are.
    """
    check, example = check_data(study.data, 1)
    if example is None:
        raise HasteError(f"{check.found}; so the size of the data is unknown; expected data.image_size")
    return example, check


def check_data(settings: config.DataSettings, batch_size: int) -> tuple[Check, Example | None]:
    """Check of the data, and one example of them, assumed from the settings where the data are missing.

    Only lists of files, headers and one pair of a prepared folder are read.
    """
    try:
        if settings.kind == "digits":
            text = "1,797 digits of 8x8 pixels, 10 classes, part of scikit-learn"
            return Check("data", "ok", text), Example(8, 1, 10, 8, 1)
        known = _latents(settings) if settings.kind == "latents" else _images(settings)
    except HasteError as error:
        return Check("data", "problem", str(error)), _assumed(settings)
    check, example, training = known
    if training is not None and check.state == "ok" and training < batch_size:
        text = f"train.batch_size is {batch_size}, more than the {training:,} training images"
        return Check("data", "problem", text), example
    return check, example


def _assumed(settings: config.DataSettings, classes: int | None = None) -> Example | None:
    size, classes = settings.image_size, classes or _ASSUMED_CLASSES
    if size is None:
        return None
    if settings.kind == "images":
        return Example(size, 3, classes, size, 3)
    return Example(size // _PIXELS_PER_LATENT, _LATENT_CHANNELS, classes, size, 3)


def _latents(settings: config.DataSettings) -> tuple[Check, Example | None, int | None]:
    from haste_core.study.data.latents import Folder

    if not Path(str(settings.path)).is_dir():
        text = (
            f"no folder {settings.path}; make it by haste latents, take one prepared for REPA or HASTE (images/, "
            f"vae-sd/, dataset.json), or --set data.path=FOLDER"
        )
        return Check("data", "missing", text), _assumed(settings), None
    folder = Folder(str(settings.path))
    if settings.image_size not in (None, folder.image_size):
        raise HasteError(
            f"data.image_size is {settings.image_size}, but the images in {settings.path} have {folder.image_size}"
        )
    labels, (channels, side, _) = folder.pairs.labels, folder.latent_shape
    classes = max(int(labels.max()) + 1, folder.manifest.classes if folder.manifest is not None else 0)
    rest = len(labels) - math.ceil(len(labels) * settings.test_fraction)
    training = rest - math.ceil(rest * settings.validation_fraction)
    text = (
        f"{settings.path}: {len(labels):,} pairs, {training:,} of them for training, {classes} classes, latents "
        f"{channels}x{side}x{side} of {folder.image_size} pixels"
    )
    return Check("data", "ok", text), Example(side, channels, classes, folder.image_size, 3), training


def _images(settings: config.DataSettings) -> tuple[Check, Example | None, int | None]:
    place = Path(str(settings.path))
    if not place.exists():
        return *_hub_images(settings), None
    parquet = [place] if place.is_file() else sorted(place.glob("*.parquet"))
    count, classes = _in_parquet(parquet, settings) if parquet else _in_folders(place, settings)
    if count == 0:
        raise HasteError(f"data.path {place} holds no images; expected one sub-folder per class, or .parquet files")
    size = settings.image_size
    text = f"{place}: {count:,} training images, {classes or 'an unknown number of'} classes, taken as {size}x{size}"
    return Check("data", "ok", text), _assumed(settings, classes), count


def _hub_images(settings: config.DataSettings) -> tuple[Check, Example | None]:
    from datasets.config import HF_DATASETS_CACHE

    name = str(settings.path)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise HasteError(f"data.path {name!r} does not exist; expected a folder, a file or a hub name")
    cached = Path(HF_DATASETS_CACHE) / name.lower().replace("/", "___")
    if cached.is_dir():
        return Check("data", "ok", f"hub data set {name}, in the local cache {cached}"), _assumed(settings)
    text = (
        f"hub data set {name} is not in the local cache: downloaded at first use, or --set data.path=FOLDER (parquet "
        f"files, or one sub-folder per class)"
    )
    return Check("data", "missing", text), _assumed(settings)


def _in_parquet(files: list[Path], settings: config.DataSettings) -> tuple[int, int | None]:
    """Rows of the training split and number of classes, from the files' footers."""
    import pyarrow
    import pyarrow.parquet

    others = [word for word in ("test", "validation") if word != settings.train_split]
    try:
        footers = [pyarrow.parquet.ParquetFile(f) for f in files if not any(word in f.stem for word in others)]
    except (OSError, pyarrow.ArrowException) as error:
        raise HasteError(f"data.path {settings.path} cannot be read: {' '.join(str(error).split())}") from error
    named: list[list[str]] = []
    if footers:
        described = json.loads((footers[0].schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        kinds = described.get("info", {}).get("features", {}).values()
        named = [kind["names"] for kind in kinds if isinstance(kind, dict) and "names" in kind]
    return sum(footer.metadata.num_rows for footer in footers), len(named[0]) if named else None


def _in_folders(place: Path, settings: config.DataSettings) -> tuple[int, int | None]:
    """Pictures of the training split and number of classes, from names alone."""
    root = place / settings.train_split if (place / settings.train_split).is_dir() else place
    classes = [folder for folder in root.iterdir() if folder.is_dir()]
    return sum(file.suffix.lower() in _PICTURES for folder in classes for file in folder.iterdir()), len(classes)


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


def _device(precision: str) -> Check:
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        return Check("device", "ok", f"{torch.cuda.get_device_name(0)}, {total:.0f} GiB")
    if precision == "fp16":
        text = (
            "train.precision is fp16 and there is no GPU, so training would be in float32; expected no, bf16, or a GPU"
        )
        return Check("device", "problem", text)
    return Check("device", "ok", "CPU, no GPU found")


def _disk(run: Run, found: Estimate) -> str:
    place = output_root()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    written = sum(run.checkpoint_path(step).is_file() for step in run.config.train.kept_steps)
    needed = found.disk - written * min(phase.checkpoint for phase in found.phases.values())
    text = f"{needed / GIB:.2f} GiB of checkpoints to come, {free / GIB:.1f} GiB free at {place}"
    if needed > free:
        raise HasteError(f"{text}; expected HASTE_OUTPUT on another disk, or fewer steps in train.keep")
    return text


def _memory(found: Estimate) -> str:
    total, peak = torch.cuda.get_device_properties(0).total_memory, max(p.peak for p in found.phases.values())
    text = f"about {peak / GIB:.1f} of {total / GIB:.1f} GiB at the peak of a step"
    if peak > total:
        raise HasteError(f"{text}; expected a larger train.accumulate, more processes, or a larger GPU")
    return text
