"""Prepared latents: pairs of an image and a VAE's posterior, matched by name and read from disk batch by batch.

images/00000/img00000000.png              RGB, square, one size
vae-sd/00000/img-mean-std-00000000.npy    float32 (2C, h, w): mean, then standard deviation, unscaled
images/dataset.json, vae-sd/dataset.json  {"labels": [["00000/img00000000.png", 12], ...]}
captions.json                             {"captions": [["a cat", ...], ...]} by label, of captioned images alone
manifest.json                             written by `haste latents`; folders prepared for REPA or HASTE have none

The pairs come from the dataset.json files alone, so a folder of a million pairs opens in seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, StrictInt, StrictStr
from torch import Generator, Tensor

from haste_core.errors import HasteError, one_line
from haste_core.study import config
from haste_core.study.data.base import (
    MOST_CLASSES,
    UNREADABLE,
    Batch,
    Captions,
    Dataset,
    say,
    split_indices,
    to_rgb,
    to_signed,
    to_tensor,
)
from haste_core.study.sections import Positive, S, Section, validate

# The latent scale of Stable Diffusion's first VAEs (Rombach et al. 2022, Appendix D.1), for folders without manifest.
SCALE, SHIFT = 0.18215, 0.0
IMAGES, LATENTS, CAPTIONS = "images", "vae-sd", "captions.json"
SIDES = (IMAGES, LATENTS)
_AFFIXES = {IMAGES: ("img", ".png"), LATENTS: ("img-mean-std-", ".npy")}  # before and after the number
# Sub-folders, none of them "." or "..", and the number.
_PATTERNS = {
    side: re.compile(rf"((?:(?!\.{{1,2}}/)[^/\\\0]+/)*){re.escape(before)}(\d+){re.escape(after)}")
    for side, (before, after) in _AFFIXES.items()
}
UNLABELLED = -1
# The first look at a folder: latents that are read, and values of each.
LOOKED_AT, VALUES = 64, 4096
# What scaled latents of a VAE have: a mean near 0 and a standard deviation near 1.
MEAN_WITHIN, STD_WITHIN = 0.5, (0.5, 2.0)


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: mean and std (B, C, h, w), unscaled."""

    mean: Tensor
    std: Tensor


class VaeFacts(Section):
    """The VAE that made the latents; the generator's data are x = (latent - shift) scale.

    encoder: hash of the weights that encode; folders made before it was kept have none.
    """

    name: str
    fingerprint: str
    encoder: str | None = None
    scale: float = Field(gt=0, allow_inf_nan=False)
    shift: float = Field(allow_inf_nan=False)


class Source(Section):
    """The source of the images; `labels` is a hash over all labels in order."""

    path: str
    split: str
    labels: str


class Shard(Section):
    """One sub-folder: number of pairs, and a hash over names and contents of its images and of its latents."""

    folder: str
    count: Positive
    images: str
    latents: str


class Manifest(Section):
    """The content of manifest.json, which `haste latents` writes.

    latent_shape: (C, h, w). latent_mean, latent_std: per channel, of unscaled latents drawn from their posteriors.
    """

    format: int = Field(1, ge=1, le=1)
    count: Positive
    image_size: Positive
    latent_shape: tuple[Positive, Positive, Positive]
    classes: Positive = Field(le=MOST_CLASSES)
    class_names: list[str] | None
    vae: VaeFacts
    source: Source
    shard_size: Positive
    latent_mean: list[float]
    latent_std: list[float]
    versions: dict[str, str]
    shards: list[Shard]


class LabelList(BaseModel):
    """The content of dataset.json: name and label of each file; None leaves the files unlabelled."""

    labels: list[tuple[StrictStr, Annotated[StrictInt, Field(ge=0, lt=MOST_CLASSES)]]] | None


class CaptionList(BaseModel):
    """The content of captions.json, which `haste latents` writes for captioned images: captions by label."""

    captions: Annotated[list[Annotated[list[StrictStr], Field(min_length=1)]], Field(min_length=1)]


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a prepared folder, None where it has none; HasteError if it is damaged or of another format."""
    path = root / "manifest.json"
    return _read_json(path, Manifest) if path.is_file() else None


def _read_json(path: Path, kind: type[S]) -> S:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HasteError(f"{path} is no valid JSON: {one_line(error)}") from error
    return validate(kind, content, str(path))


class Pairs(NamedTuple):
    """Folder and number of each pair ("00000/00000000"), in order, and labels (n,) int64."""

    keys: list[str]
    labels: Tensor


def name_of(side: str, key: str) -> str:
    """The file of a pair ("00000/00000000") on one side: "00000/img00000000.png"."""
    folder, slash, number = key.rpartition("/")
    before, after = _AFFIXES[side]
    return f"{folder}{slash}{before}{number}{after}"


def read_pairs(root: Path) -> Pairs:
    """The pairs of a prepared folder.

    A list lies beside the images and beside the latents; where only one side is listed, the other's names follow from
    it. For {"labels": null} the folder's files are listed instead, all in class 0 unless the other side is labelled.

    Raises:
        HasteError: there is no list, a name leads outside, an image or latent has no partner, or labels disagree.
    """
    lists = {side: root / side / "dataset.json" for side in SIDES}
    listed = {side: _listed(path, side) for side, path in lists.items() if path.is_file()}
    if not listed:
        raise HasteError(f"{root} has no dataset.json; expected one in {IMAGES}/ and in {LATENTS}/")
    images, latents = (listed.get(side, next(iter(listed.values()))) for side in SIDES)
    shared = images.keys() & latents.keys()
    differing = {k for k in shared if images[k] != latents[k] and UNLABELLED not in (images[k], latents[k])}
    problems = [
        f"{len(keys)} {problem} ({', '.join(name_of(side, k) for k in sorted(keys)[:3])}{', ...' * (len(keys) > 3)})"
        for side, keys, problem in (
            (IMAGES, images.keys() - latents.keys(), "without a latent"),
            (LATENTS, latents.keys() - images.keys(), "without an image"),
            (IMAGES, differing, "with another label than its latent"),
        )
        if keys
    ]
    if problems:
        raise HasteError(f"{root}: {'; '.join(problems)}; expected pairs of the same folder, number and label")
    if not images:
        raise HasteError(f"{root}: dataset.json names no images")
    keys = sorted(images)
    # An unlabelled side takes the other's labels, -1 being less than any label.
    labels = torch.tensor([max(images[key], latents[key], 0) for key in keys])
    return Pairs(keys, labels)


def _listed(path: Path, side: str) -> dict[str, int]:
    """Labels of one side by folder and number, {"00000/00000000": 12}, as its list has them."""
    entries = _read_json(path, LabelList).labels
    if entries is None:
        return _unlabelled(path.parent, side)
    found: dict[str, int] = {}
    for name, label in entries:
        match = _PATTERNS[side].fullmatch(name)
        if match is None:
            shown = name_of(side, "00000/00000000")
            raise HasteError(f"{path} names {name[:80]!r}; expected names within the folder like {shown}")
        key = match[1] + match[2]
        if key in found:
            raise HasteError(f"{path} names {name_of(side, key)} twice; expected each once")
        found[key] = label
    return found


def _unlabelled(folder: Path, side: str) -> dict[str, int]:
    """Every file of one side by folder and number; reads directories, never a file."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return {match[1] + match[2]: UNLABELLED for name in names if (match := _PATTERNS[side].fullmatch(name))}


class Folder:
    """The pairs of a prepared folder; opening it reads the lists of names and one pair.

    image_size: side of the images in pixels. latent_shape: (C, h, w). Raises HasteError where there is no such folder,
    or its lists contradict each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise HasteError(
                f"data.path {str(path)!r} is no folder; expected one made by haste latents, or by REPA's preparation "
                f"(images/, vae-sd/, dataset.json)"
            )
        self.manifest, self.pairs = read_manifest(self.path), read_pairs(self.path)
        # Without a manifest the first pair says both.
        self.image_size = 0
        self._array_shape: tuple[int, ...] | None = None
        if self.manifest is not None:
            if self.manifest.count != len(self.pairs.labels):
                raise HasteError(
                    f"{path}: manifest.json counts {self.manifest.count} images, dataset.json names "
                    f"{len(self.pairs.labels)}; expected the whole folder as haste latents left it"
                )
            channels, *sides = self.manifest.latent_shape
            self.image_size, self._array_shape = self.manifest.image_size, (2 * channels, *sides)
        self.image_size = self._read(IMAGES, 0).shape[-1]
        self._array_shape = tuple(self._read(LATENTS, 0).shape)
        self.latent_shape = (self._array_shape[0] // 2, *self._array_shape[1:])
        if self.manifest is None and self._array_shape[0] == 4:
            raise HasteError(
                f"{path}: arrays of 4 channels, a mean and a standard deviation of 2 each; expected 2C for the C "
                f"channels of a VAE, 8 for Stable Diffusion's: means alone are not enough"
            )

    def first_look(self) -> Tensor:
        """Values of some latents drawn from their posteriors, (n, up to VALUES) float32, unscaled.

        Raises HasteError where one is not finite, or its second half is no standard deviation.
        """
        count, found = len(self.pairs.keys), []
        for index in range(0, count, count // LOOKED_AT + 1):
            mean, std = (half.flatten()[:VALUES] for half in self._read(LATENTS, index).chunk(2))
            path = self.path / LATENTS / name_of(LATENTS, self.pairs.keys[index])
            if not bool(mean.isfinite().all() and std.isfinite().all()):
                raise HasteError(f"{path} has values that are not finite; expected a VAE's mean and standard deviation")
            if float(std.min()) < 0:
                raise HasteError(
                    f"{path}: its second half goes down to {float(std.min()):.3g}; expected standard deviations, which "
                    f"are not negative; log-variances v are exp(v / 2)"
                )
            found.append(mean + std * torch.randn(mean.shape, generator=Generator().manual_seed(index)))
        return torch.stack(found)

    def pixels(self, indices: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S)."""
        return self._stacked(IMAGES, indices)

    def posterior(self, indices: Tensor) -> Posterior:
        """Mean and standard deviation of the latents, float32 (B, C, h, w) each, unscaled."""
        return Posterior(*self._stacked(LATENTS, indices).chunk(2, dim=1))

    def _stacked(self, side: str, indices: Tensor) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(lambda index: self._read(side, index), indices.tolist())))

    def _read(self, side: str, index: int) -> Tensor:
        """An image or a latent of one pair."""
        path = self.path / side / name_of(side, self.pairs.keys[index])
        try:
            return self._image(path) if side == IMAGES else self._latent(path)
        except UNREADABLE as error:
            cause = "it is missing" if isinstance(error, FileNotFoundError) else one_line(error)
            expected = f"a square image of {self.image_size or 'S'} pixels a side"
            if side == LATENTS:
                expected = f"one float32 array {self._array_shape or '(2C, S, S)'}, mean then standard deviation"
            raise HasteError(f"{path} cannot be read: {cause}; expected {expected}") from error

    def _image(self, path: Path) -> Tensor:
        with Image.open(path) as picture:
            pixels = to_tensor(to_rgb(picture))
        _, height, width = pixels.shape
        if height != width or width != (self.image_size or width):
            raise ValueError(f"it is {width}x{height}")
        return pixels

    def _latent(self, path: Path) -> Tensor:
        array = _loaded(path)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive")
        shape = array.shape
        fits = len(shape) == 3 and shape[0] % 2 == 0 and shape[1] == shape[2] and self._array_shape in (None, shape)
        if array.dtype != np.float32 or not fits:
            raise ValueError(f"it is {array.dtype} {shape}")
        return torch.from_numpy(array)


def _loaded(path: Path, tries: int = 20) -> Any:
    """The content of an .npy file, read anew where headers that several threads parse at once confuse CPython 3.11."""
    try:
        return np.load(path, allow_pickle=False)
    except SystemError as error:  # https://github.com/python/cpython/issues/106905
        if tries <= 1 or "recursion depth" not in str(error):
            raise
    return _loaded(path, tries - 1)


class Latents(Dataset):
    """Latents x = scale (mean + std noise - shift) for the generator, with their images for the teacher.

    Training batches draw from the posterior, other examples take its mean. pixel_size: side of the images. manifest:
    None where the folder has none. Raises HasteError where the folder cannot be used, or augmentation is asked for.
    """

    decodes = True

    def __init__(self, data: config.DataSettings) -> None:
        if data.augment.flip or data.augment.moves:
            raise HasteError(
                "data.augment with data.kind 'latents': the latent of a mirrored or moved image is not the mirrored or "
                "moved latent; expected no augmentation"
            )
        self.folder = Folder(str(data.path))
        self.name = self.folder.path.name
        self.pixel_size, self.manifest = self.folder.image_size, self.folder.manifest
        if data.image_size not in (None, self.pixel_size):
            raise HasteError(
                f"data.image_size {data.image_size}; expected {self.pixel_size}, the size of the images in "
                f"{data.path}, or none"
            )
        self.channels, self.image_size, _ = self.folder.latent_shape
        self.scale, self.shift = SCALE, SHIFT
        self.labels = self.folder.pairs.labels
        self.classes = int(self.labels.max()) + 1
        if self.manifest is not None:
            self.scale, self.shift = self.manifest.vae.scale, self.manifest.vae.shift
            self.classes = max(self.classes, self.manifest.classes)
        if (path := self.folder.path / CAPTIONS).is_file():
            self.captions = Captions(_read_json(path, CaptionList).captions)
            if len(self.captions.first) != self.classes:
                raise HasteError(
                    f"{path} has captions of {len(self.captions.first)} images, labels number {self.classes}; expected "
                    f"the folder as haste latents left it"
                )
            self.labels, self.classes = self.captions.first[self.labels], len(self.captions.texts)
        self._splits = split_indices(self.labels, data, f"data {data.path}")
        self.doubts = self._doubts()
        say(self.summary)

    def _doubts(self) -> str:
        """A sentence on scaled latents with another mean or deviation than a VAE's; empty where they look like them."""
        seen = (self.folder.first_look() - self.shift) * self.scale
        mean, std = float(seen.mean()), float(seen.std())
        if abs(mean) <= MEAN_WITHIN and STD_WITHIN[0] <= std <= STD_WITHIN[1]:
            return ""
        return (
            f"scaled latents have mean {mean:.2f} and standard deviation {std:.2f}, a VAE's about 0 and 1; is "
            f"{self.scale:g} their scale, and are they stored unscaled?"
        )

    @property
    def summary(self) -> str:
        """As for `Dataset`, with classes that have no image and with doubts."""
        if self.captions is not None:
            return "; ".join([f"{super().summary} (captions)", *([self.doubts] if self.doubts else [])])
        empty = int((torch.bincount(self.labels, minlength=self.classes) == 0).sum())
        notes = [f"{empty:,} of the classes have no image"] if empty else []
        if self.classes == 1:
            notes.append("all in one class, since there are no labels")
        return "; ".join([super().summary, *notes, *([self.doubts] if self.doubts else [])])

    def identity(self) -> dict[str, Any]:
        """As for `Dataset`."""
        found = hashlib.sha256("\n".join(self.folder.pairs.keys).encode())
        for part in (self.labels, self.folder.first_look()):
            found.update(part.numpy().tobytes())
        if self.captions is not None:
            found.update("\0".join(self.captions.texts).encode())
        return {"images": len(self.labels), "classes": self.classes, "content": found.hexdigest()[:16]}

    def __len__(self) -> int:
        return len(self._splits["train"])

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        chosen = self._splits[split][chosen]
        return to_signed(self.folder.pixels(chosen)), self.labels[chosen]

    def examples(self, split: str, count: int | None = None, with_images: bool = True) -> Batch:
        """As for `Dataset`, x being the means of the posteriors."""
        chosen = self._splits[split][:count]
        return self._batch(self.folder.posterior(chosen).mean, chosen, with_images)

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """As for `Dataset`, x being drawn from the posteriors."""
        chosen = self._splits["train"][indices[part]]
        mean, std = self.folder.posterior(chosen)
        drawn = mean + std * torch.randn(len(indices), *mean.shape[1:], generator=generator)[part]
        batch = self._batch(drawn, chosen, with_images)
        return batch._replace(y=self._told(batch.y, generator, len(indices), part))

    def _batch(self, latents: Tensor, chosen: Tensor, with_images: bool) -> Batch:
        images = self.folder.pixels(chosen) if with_images else torch.empty(0, 3, *[self.pixel_size] * 2)
        return Batch((latents - self.shift) * self.scale, self.labels[chosen], to_signed(images))
