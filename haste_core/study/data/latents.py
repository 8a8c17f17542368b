"""Prepared latents: pairs of an image and a VAE's posterior, matched by name and read from disk batch by batch.

images/00000/img00000000.png              RGB, square, one size
vae-sd/00000/img-mean-std-00000000.npy    float32 (2C, h, w): mean, then standard deviation, unscaled
images/dataset.json, vae-sd/dataset.json  {"labels": [["00000/img00000000.png", 12], ...]}
manifest.json                             written by `haste latents`; folders prepared for REPA or HASTE have none

The pairs come from the dataset.json files alone, so a folder of a million pairs opens in seconds.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Generator, Tensor

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.data.base import Batch, split_indices, to_signed, to_tensor
from haste_core.study.sections import Positive, Section, validate

# The latent scale of Stable Diffusion's first VAEs (Rombach et al. 2022, Appendix D.1), for folders without manifest.
SCALE, SHIFT = 0.18215, 0.0
IMAGES, LATENTS = "images", "vae-sd"
_OTHER = {IMAGES: LATENTS, LATENTS: IMAGES}
_AFFIXES = {IMAGES: ("img", ".png"), LATENTS: ("img-mean-std-", ".npy")}  # before and after the number
# Sub-folders, none of them "." or "..", and the number.
_PATTERNS = {
    side: re.compile(rf"((?:(?!\.{{1,2}}/)[^/\\\0]+/)*){re.escape(before)}(\d+){re.escape(after)}")
    for side, (before, after) in _AFFIXES.items()
}
UNLABELLED = -1


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: mean and std (B, C, h, w), unscaled."""

    mean: Tensor
    std: Tensor


class VaeFacts(Section):
    """The VAE that made the latents; the generator's data are x = (latent - shift) scale."""

    name: str
    fingerprint: str
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
    classes: Positive
    class_names: list[str] | None
    vae: VaeFacts
    source: Source
    shard_size: Positive
    latent_mean: list[float]
    latent_std: list[float]
    versions: dict[str, str]
    shards: list[Shard]


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a prepared folder, None where it has none.

    Raises:
        HasteError: it is damaged or of another format.
    """
    path = root / "manifest.json"
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise HasteError(f"{path} holds {type(content).__name__}; expected the manifest that haste latents writes")
    return validate(Manifest, content, str(path))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        HasteError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HasteError(f"{path} is no valid JSON: {' '.join(str(error).split())}") from error


class Pairs(NamedTuple):
    """Folder and number of each pair, "00000/00000000" as UTF-8 (n,), in order, and labels (n,) int64."""

    keys: np.ndarray
    labels: Tensor

    def name(self, side: str, index: int) -> str:
        """The file of a pair, relative to images/ or vae-sd/."""
        return name_of(side, bytes(self.keys[index]).decode())


def name_of(side: str, key: str) -> str:
    """The file of a pair ("00000/00000000") on one side: "00000/img00000000.png"."""
    folder, slash, number = key.rpartition("/")
    before, after = _AFFIXES[side]
    return f"{folder}{slash}{before}{number}{after}"


def read_pairs(root: Path) -> Pairs:
    """The pairs of a prepared folder.

    A list may lie beside the images, beside the latents or at the top; if only one side is listed, the other's names
    follow from it. For {"labels": null} the folder's files are listed instead, all in class 0 unless the other side is
    labelled.

    Raises:
        HasteError: there is no list, a name leads outside, an image or latent has no partner, or labels disagree.
    """
    listed = {side: _labels_by_key(root, side) for side in (IMAGES, LATENTS)}
    images, latents = (listed[side] if listed[side] is not None else listed[_OTHER[side]] for side in (IMAGES, LATENTS))
    if images is None or latents is None:
        raise HasteError(f"{root} has no dataset.json; expected one at the top, in {IMAGES}/ or in {LATENTS}/")
    labels = _matched(root, images, latents)
    if not labels:
        raise HasteError(f"{root}: dataset.json names no images")
    keys = sorted(labels)
    ordered = np.fromiter((labels[key] for key in keys), np.int64, len(keys))
    return Pairs(np.array([key.encode() for key in keys]), torch.from_numpy(ordered).clamp_min(0))


def _matched(root: Path, images: Mapping[str, int], latents: Mapping[str, int]) -> Mapping[str, int]:
    """Labels by key, after checking that both sides have the same keys and labels."""
    if images == latents:
        return images
    unlabelled = [set(side.values()) == {UNLABELLED} for side in (images, latents)]
    shared = set() if any(unlabelled) else images.keys() & latents.keys()
    problems = [
        f"{len(keys)} {what} ({', '.join(name_of(side, k) for k in sorted(keys)[:3])}{', ...' * (len(keys) > 3)})"
        for side, keys, what in (
            (IMAGES, images.keys() - latents.keys(), "without a latent"),
            (LATENTS, latents.keys() - images.keys(), "without an image"),
            (IMAGES, {k for k in shared if images[k] != latents[k]}, "with another label than its latent"),
        )
        if keys
    ]
    if problems:
        raise HasteError(f"{root}: {'; '.join(problems)}; expected pairs of the same folder, number and label")
    return latents if unlabelled[0] else images


def _labels_by_key(root: Path, side: str) -> dict[str, int] | None:
    """Labels of one side by folder and number, {"00000/00000000": 12}; None if no list names this side.

    Raises:
        HasteError: a list cannot be read, or two lists contradict each other.
    """
    found = []
    for path, at_top in ((root / side / "dataset.json", False), (root / "dataset.json", True)):
        if path.is_file():
            content = read_json(path)
            if not isinstance(content, dict) or not isinstance(content.get("labels", 0), list | None):
                expected = '{"labels": [["00000/img00000000.png", 12], ...]}'
                raise HasteError(f"{path} is no list of labels; expected {expected}")
            entries = content["labels"]
            keyed = _scan(root / side, side) if entries is None else _keyed(entries, side, path, at_top)
            if keyed or not at_top:
                found.append(keyed)
    found = [keyed for keyed in found if set(keyed.values()) != {UNLABELLED}] or found
    if len(found) == 2 and found[0] != found[1]:
        raise HasteError(f"{root / side / 'dataset.json'} and {root / 'dataset.json'} disagree; remove the wrong one")
    return found[0] if found else None


def _keyed(entries: list[Any], side: str, path: Path, at_top: bool) -> dict[str, int]:
    """Labels by folder and number of [["00000/img00000000.png", 12], ...].

    A list at the top may name both sides, with or without "images/" and "vae-sd/".
    """
    keys, labels = [], []
    for entry in entries:
        # bool is a subclass of int, and no label.
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, int] or entry[1] < 0:
            raise HasteError(f"{path} has the entry {str(entry)[:80]}; expected a name and a label of 0 or above")
        name, label = entry
        if at_top and _PATTERNS[_OTHER[side]].fullmatch(name):
            continue
        match = _PATTERNS[side].fullmatch(name.removeprefix(f"{side}/") if at_top else name)
        if match is None:
            shown = " or ".join(name_of(side, "00000/00000000") for side in _AFFIXES)
            raise HasteError(f"{path} names {name[:80]!r}; expected names within the folder like {shown}")
        keys.append(match[1] + match[2])
        labels.append(label)
    found = dict(zip(keys, labels, strict=True))
    if len(found) < len(keys):
        raise HasteError(f"{path} names {name_of(side, Counter(keys).most_common(1)[0][0])} twice; expected each once")
    return found


def _scan(folder: Path, side: str) -> dict[str, int]:
    """Every file of one side, unlabelled; reads directories, never a file."""
    if not folder.is_dir():
        raise HasteError(f"{folder} is no folder; dataset.json has no labels and leaves its files unnamed")
    names = (Path(place, name).relative_to(folder).as_posix() for place, _, files in os.walk(folder) for name in files)
    return {m[1] + m[2]: UNLABELLED for name in names if (m := _PATTERNS[side].fullmatch(name))}


class Folder:
    """The pairs of a prepared folder; opening it reads the lists of names and one pair.

    Raises:
        HasteError: there is no such folder, or its lists contradict each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise HasteError(f"data.path {str(path)!r} is no folder; expected one made by haste latents, or by REPA's "
                             f"preparation (images/, vae-sd/, dataset.json)")  # fmt: skip
        self.manifest: Manifest | None = read_manifest(self.path)
        self.pairs: Pairs = read_pairs(self.path)
        if self.manifest is not None and self.manifest.count != len(self.pairs.labels):
            raise HasteError(
                f"{path}: manifest.json counts {self.manifest.count} images, dataset.json names "
                f"{len(self.pairs.labels)}; expected the whole folder as haste latents left it"
            )
        self.image_size = self._open_image(0).width
        self.latent_shape = self._first_shape()
        if self.manifest is not None and (self.image_size, self.latent_shape) != (
            self.manifest.image_size, self.manifest.latent_shape
        ):  # fmt: skip
            raise HasteError(
                f"{path}: manifest.json says images of {self.manifest.image_size} and latents "
                f"{self.manifest.latent_shape}, the files have {self.image_size} and {self.latent_shape}"
            )

    def pixels(self, indices: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S)."""
        return torch.stack(self._threaded(self._image, indices))

    def posterior(self, indices: Tensor) -> Posterior:
        """Mean and standard deviation of the latents, float32 (B, C, h, w) each, unscaled."""
        mean, std = torch.stack(self._threaded(self._latent, indices)).chunk(2, dim=1)
        return Posterior(mean, std)

    def _threaded(self, read: Callable[[int], Tensor], indices: Tensor) -> list[Tensor]:
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            return list(pool.map(read, indices.tolist()))

    def _image(self, index: int) -> Tensor:
        picture = self._open_image(index)
        if picture.size != (self.image_size, self.image_size):
            raise HasteError(
                f"{self.pairs.name(IMAGES, index)} is {picture.width}x{picture.height}; expected "
                f"{self.image_size}x{self.image_size} like the first"
            )
        return to_tensor(picture)

    def _open_image(self, index: int) -> Image.Image:
        path = self.path / IMAGES / self.pairs.name(IMAGES, index)
        try:
            with Image.open(path) as picture:
                found = picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, struct.error, zlib.error) as error:  # Pillow raises all of these
            raise _unreadable(path, error) from error
        if found.width != found.height:
            raise HasteError(f"{path} is {found.width}x{found.height}; expected a square image")
        return found

    def _latent(self, index: int) -> Tensor:
        array = self._array(index)
        if array.shape != (2 * self.latent_shape[0], *self.latent_shape[1:]):
            raise HasteError(f"{self.pairs.name(LATENTS, index)} has shape {array.shape}; expected one shape for all")
        return torch.from_numpy(array)

    def _array(self, index: int) -> np.ndarray:
        path = self.path / LATENTS / self.pairs.name(LATENTS, index)
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _unreadable(path, error) from error
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            raise HasteError(f"{path} holds {getattr(array, 'dtype', 'an archive')}; expected one array of float32")
        return array

    def _first_shape(self) -> tuple[int, int, int]:
        shape = self._array(0).shape
        if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2]:
            raise HasteError(
                f"{self.path / LATENTS / self.pairs.name(LATENTS, 0)} has shape {shape}; expected (2C, S, S), mean "
                f"then standard deviation"
            )
        return shape[0] // 2, shape[1], shape[2]


def _unreadable(path: Path, error: Exception) -> HasteError:
    cause = "it is missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    return HasteError(f"{path} cannot be read: {cause}; expected the file that dataset.json names")


class Latents:
    """Latents x = scale (mean + std noise - shift) for the generator, with their images for the teacher.

    `image_size` and `channels` are those of the latents. Examples that are not training batches take the posterior's
    mean.

    Attributes:
        scale, shift: of the latents. pixel_size: side of the images. manifest: None where the folder has none.

    Raises:
        HasteError: the folder cannot be used, or augmentation is asked for: the latent of a mirrored or moved image
            is not the mirrored or moved latent.
    """

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
                f"data.image_size {data.image_size}, the images in {data.path} have {self.pixel_size}; expected "
                f"{self.pixel_size}, or none"
            )
        self.channels, self.image_size, _ = self.folder.latent_shape
        self.scale, self.shift = SCALE, SHIFT
        self.labels = self.folder.pairs.labels
        self.classes = int(self.labels.max()) + 1
        if self.manifest is not None:
            self.scale, self.shift = self.manifest.vae.scale, self.manifest.vae.shift
            self.classes = max(self.classes, self.manifest.classes)
        self._splits = split_indices(self.labels, data, f"data {data.path}")

    def __len__(self) -> int:
        return len(self._splits["train"])

    def images(self, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, 3, S, S) and labels (n,) of a split."""
        chosen = self._splits[split][:count]
        return to_signed(self.folder.pixels(chosen)), self.labels[chosen]

    def examples(self, split: str, count: int | None = None, with_images: bool = True) -> Batch:
        """The posterior means, scaled, with the same images."""
        chosen = self._splits[split][:count]
        mean = self.folder.posterior(chosen).mean
        return Batch(self.scaled(mean), self.labels[chosen], self._images(chosen, with_images))

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """Training examples, the latents drawn from their posteriors."""
        chosen = self._splits["train"][indices[part]]
        mean, std = self.folder.posterior(chosen)
        drawn = mean + std * torch.randn(len(indices), *mean.shape[1:], generator=generator)[part]
        return Batch(self.scaled(drawn), self.labels[chosen], self._images(chosen, with_images))

    def _images(self, chosen: Tensor, wanted: bool) -> Tensor:
        """Images of these pairs, or none of them, (0, 3, S', S')."""
        return to_signed(self.folder.pixels(chosen)) if wanted else torch.empty(0, 3, *[self.pixel_size] * 2)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents scaled for the generator, from latents as the VAE returns them."""
        return (latents - self.shift) * self.scale
