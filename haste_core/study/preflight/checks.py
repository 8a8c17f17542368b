"""What a study needs and whether it is on this machine: data, weights, references. Nothing is loaded or downloaded."""

from __future__ import annotations

import difflib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.preflight.tracing import Example

State = Literal["ok", "missing", "problem"]
# What the VAE of the released latents does: 8 pixels to one latent of 4 channels.
_PIXELS_PER_LATENT, _LATENT_CHANNELS = 8, 4
_ASSUMED_CLASSES = 1000
DIGITS = Example(8, 1, 10, 8, 1)
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm"}
_VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class Check(NamedTuple):
    """One thing looked at: ok, missing (not on this machine) or a problem (will not work), and what was found."""

    name: str
    state: State
    found: str


def data(settings: config.Data, batch_size: int) -> tuple[Check, Example | None]:
    """Whether the data are there, and what an example looks like; assumed from the settings where they are not.

    Only lists of files, headers and one pair of a prepared folder are read.
    """
    try:
        if settings.kind == "digits":
            return Check("data", "ok", "1,797 digits of 8x8 pixels, 10 classes, part of scikit-learn"), DIGITS
        known = _latents(settings) if settings.kind == "latents" else _images(settings)
    except HasteError as error:
        return Check("data", "problem", str(error)), assumed(settings)
    check, example, training = known
    if training is not None and check.state == "ok" and training < batch_size:
        text = f"train.batch_size {batch_size} exceeds the {training:,} training images"
        return Check("data", "problem", text), example
    return check, example


def assumed(settings: config.Data, classes: int | None = None) -> Example | None:
    """An example as the settings suggest it: latents of 4 channels an eighth as wide, 1000 classes unless known."""
    if settings.image_size is None:
        return None
    classes = classes or _ASSUMED_CLASSES
    if settings.kind == "images":
        return Example(settings.image_size, 3, classes, settings.image_size, 3)
    side = settings.image_size // _PIXELS_PER_LATENT
    return Example(side, _LATENT_CHANNELS, classes, settings.image_size, 3)


def _latents(settings: config.Data) -> tuple[Check, Example | None, int | None]:
    from haste_core.study.data.latents import Folder

    if not Path(str(settings.path)).is_dir():
        text = (
            f"no folder {settings.path}; possible: haste latents makes it, or one prepared for REPA or HASTE "
            f"(images/, vae-sd/, dataset.json), or --set data.path=FOLDER"
        )
        return Check("data", "missing", text), assumed(settings), None
    folder = Folder(str(settings.path))
    if settings.image_size not in (None, folder.image_size):
        raise HasteError(f"data.image_size {settings.image_size}, the images in {settings.path} have "
                         f"{folder.image_size}; possible: {folder.image_size}")  # fmt: skip
    labels, (channels, side, _) = folder.pairs.labels, folder.latent_shape
    classes = int(labels.max()) + 1
    if folder.manifest is not None:
        classes = max(classes, folder.manifest.classes)
    rest = len(labels) - math.ceil(len(labels) * settings.test_fraction)
    training = rest - math.ceil(rest * settings.validation_fraction)
    text = (
        f"{settings.path}: {len(labels):,} pairs, {training:,} of them for training, {classes} classes, latents "
        f"{channels}x{side}x{side} of {folder.image_size} pixels"
    )
    return Check("data", "ok", text), Example(side, channels, classes, folder.image_size, 3), training


def _images(settings: config.Data) -> tuple[Check, Example | None, int | None]:
    place = Path(str(settings.path))
    if not place.exists():
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(settings.path)):
            raise HasteError(f"data.path {str(settings.path)!r} does not exist; possible: a folder, file or hub name")
        return *_hub_images(settings), None
    parquet = [place] if place.is_file() else sorted(place.glob("*.parquet"))
    count, classes = _in_parquet(parquet, settings) if parquet else _in_folders(place, settings)
    if count == 0:
        raise HasteError(f"data {place} holds no images; possible: one sub-folder per class, or .parquet files")
    size = settings.image_size
    text = f"{place}: {count:,} training images, {classes or 'an unknown number of'} classes, taken as {size}x{size}"
    return Check("data", "ok", text), assumed(settings, classes), count


def _hub_images(settings: config.Data) -> tuple[Check, Example | None]:
    from datasets.config import HF_DATASETS_CACHE

    cached = Path(HF_DATASETS_CACHE) / str(settings.path).lower().replace("/", "___")
    if cached.is_dir():
        return Check("data", "ok", f"hub data set {settings.path}, in the local cache {cached}"), assumed(settings)
    text = (
        f"hub data set {settings.path} is not in the local cache: downloaded at first use, or --set data.path=FOLDER "
        f"(parquet files, or one sub-folder per class)"
    )
    return Check("data", "missing", text), assumed(settings)


def _in_parquet(files: list[Path], settings: config.Data) -> tuple[int, int | None]:
    """Rows of the training split and number of classes, from the files' footers."""
    import pyarrow
    import pyarrow.parquet

    others = [word for word in ("test", "validation") if word != settings.train_split]
    files = [file for file in files if not any(word in file.stem for word in others)]
    try:
        footers = [pyarrow.parquet.ParquetFile(file) for file in files]
    except (OSError, pyarrow.ArrowException) as error:
        raise HasteError(f"data {settings.path} cannot be read: {' '.join(str(error).split())}") from error
    classes = None
    for footer in footers[:1]:
        described = json.loads((footer.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        kinds = described.get("info", {}).get("features", {}).values()
        named = [kind["names"] for kind in kinds if isinstance(kind, dict) and "names" in kind]
        classes = len(named[0]) if named else None
    return sum(footer.metadata.num_rows for footer in footers), classes


def _in_folders(place: Path, settings: config.Data) -> tuple[int, int | None]:
    """Pictures of the training split and number of classes, from names alone."""
    root = place / settings.train_split if (place / settings.train_split).is_dir() else place
    classes = [folder for folder in root.iterdir() if folder.is_dir()]
    return sum(file.suffix.lower() in _PICTURES for folder in classes for file in folder.iterdir()), len(classes)


def timm_weights(name: str, what: config.Teacher, key: str) -> Check:
    """Whether the weights of a timm encoder are there. key: the setting that takes a local file instead."""
    import torch
    from timm import list_models
    from timm.models import get_pretrained_cfg, is_model

    if ":" in what.model:  # "hf-hub:owner/name", "local-dir:folder"
        return Check(name, "missing", f"{what.model} is resolved by timm when it is loaded, and was not looked for")
    if not is_model(what.model.split(".")[0]):
        near = difflib.get_close_matches(what.model, list_models(), n=3)
        return Check(
            name, "problem", f"timm knows no {what.model!r}; possible: {', '.join(near) or 'timm.list_models()'}"
        )
    if what.weights != "hub":
        there = Path(what.weights).is_file()
        text = what.weights if there else f"no file {what.weights}; possible: hub, or the path of a checkpoint"
        return Check(name, "ok" if there else "missing", text)
    try:
        cfg = get_pretrained_cfg(what.model)
    except RuntimeError as error:
        return Check(name, "problem", f"{' '.join(str(error).split())}; possible: {key}=PATH")
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        return Check(name, "problem", f"timm knows no published weights of {what.model}; possible: {key}=PATH")
    if cfg.hf_hub_id:
        files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        return _hub_file(name, cfg.hf_hub_id, files, key)
    target = Path(torch.hub.get_dir()) / "checkpoints" / str(cfg.url).rpartition("/")[2]
    return _published(name, target, str(cfg.url), key)


def vae(data: config.Data, sample: config.Sample) -> Check | None:
    """Whether the decoder of latents is there; None in pixel space."""
    if data.kind != "latents":
        return None
    from haste_core.study.latents import vae_of

    try:
        named = vae_of(data, sample)[0]
    except HasteError as error:
        return Check("vae", "problem", str(error))
    folder = Path(named).expanduser()
    if not folder.is_dir():
        return _hub_vae(named)
    lacking = [file for file in _VAE_FILES if not (folder / file).is_file()]
    if lacking:
        return Check("vae", "problem", f"{folder} has no {' and no '.join(lacking)}")
    return Check("vae", "ok", str(folder))


def _hub_vae(repository: str) -> Check:
    from huggingface_hub import try_to_load_from_cache

    if all(isinstance(try_to_load_from_cache(repository, file), str) for file in _VAE_FILES):
        return Check("vae", "ok", f"{repository}, in the local cache")
    text = (
        f"{' and '.join(_VAE_FILES)} of https://huggingface.co/{repository} are not in the local cache: downloaded at "
        f"first use, or put both into a folder and --set sample.vae=FOLDER"
    )
    return Check("vae", "missing", text)


def inception(where: str) -> Check:
    """Whether the Inception weights of the ADM scores are there."""
    import torch

    from haste_core.study.adm import INCEPTION_FILE, URL_INCEPTION_V3

    if where != "hub":
        there = Path(where).is_file()
        return Check("inception", "ok" if there else "missing", where if there else f"no file {where}")
    target = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return _published("inception", target, URL_INCEPTION_V3, "evaluate.inception")


def reference(path: str) -> Check:
    """Whether a file of reference statistics or images is there and holds what one should."""
    from haste_core.study.adm import array_names

    if not Path(path).is_file():
        text = (
            f"no file {path}; possible: ADM's .npz under that name, or --set evaluate.reference=null (training images)"
        )
        return Check("reference", "missing", text)
    try:
        names = array_names(Path(path))
    except HasteError as error:
        return Check("reference", "problem", str(error))
    if "arr_0" not in names and not {"mu", "sigma"} <= set(names):
        return Check("reference", "problem", f"{path} holds {', '.join(names)}; possible: mu and sigma, or arr_0")
    return Check("reference", "ok", f"{path} ({', '.join(names)})")


def _hub_file(name: str, repository: str, files: list[str], key: str) -> Check:
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    options: dict[str, Any] = {"revision": revision or None}
    for file in files:
        found = try_to_load_from_cache(repository, file, **options)
        if isinstance(found, str):
            return Check(name, "ok", f"{repository}, in the local cache {found}")
    text = (
        f"{files[0]} of https://huggingface.co/{repository} is not in the local cache: downloaded at first use, or put "
        f"it anywhere and --set {key}=PATH"
    )
    return Check(name, "missing", text)


def _published(name: str, target: Path, url: str, key: str) -> Check:
    if target.is_file():
        return Check(name, "ok", str(target))
    return Check(name, "missing", f"{url} is not at {target}: downloaded there at first use, or --set {key}=PATH")
