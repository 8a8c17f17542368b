"""Prepared latents: pairs of an image and a VAE's posterior, found by name and read as they are needed.

images/00000/img00000000.png              RGB, square, one size
vae-sd/00000/img-mean-std-00000000.npy    float32 (2C, h, w): mean, then standard deviation, unscaled
images/dataset.json, vae-sd/dataset.json  {"labels": [["00000/img00000000.png", 12], ...]}
manifest.json                             written by `haste latents`; folders prepared for REPA or HASTE have none
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.data.base import Batch, split_indices
from haste_core.study.data.manifest import Manifest, read_manifest
from haste_core.study.data.pairs import IMAGES, LATENTS, Pairs, read_pairs
from haste_core.study.data.resize import to_signed, to_tensor

# The latent scale of Stable Diffusion's first VAEs (Rombach et al. 2022, Appendix D.1); REPA's folders do not say it.
SCALE, SHIFT = 0.18215, 0.0


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: mean and std (B, C, h, w), unscaled."""

    mean: Tensor
    std: Tensor


class Folder:
    """The pairs of a prepared folder; opening it reads the lists of names and one pair.

    Raises:
        HasteError: there is no such folder, or its lists contradict each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise HasteError(f"data.path {str(path)!r} is no folder; possible: one made by haste latents, or by REPA's "
                             f"preparation (images/, vae-sd/, dataset.json)")  # fmt: skip
        self.manifest: Manifest | None = read_manifest(self.path)
        self.pairs: Pairs = read_pairs(self.path)
        if self.manifest is not None and self.manifest.count != len(self.pairs.labels):
            raise HasteError(
                f"{path}: manifest.json counts {self.manifest.count} images, dataset.json names "
                f"{len(self.pairs.labels)}; possible: the whole folder as haste latents left it"
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
                f"{self.pairs.image(index)} is {picture.width}x{picture.height}; possible: "
                f"{self.image_size}x{self.image_size} like the first"
            )
        return to_tensor(picture)

    def _open_image(self, index: int) -> Image.Image:
        path = self.path / IMAGES / self.pairs.image(index)
        try:
            with Image.open(path) as picture:
                found = picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, struct.error, zlib.error) as error:  # Pillow raises all of these
            raise _unreadable(path, error) from error
        if found.width != found.height:
            raise HasteError(f"{path} is {found.width}x{found.height}; possible: a square image")
        return found

    def _latent(self, index: int) -> Tensor:
        array = self._array(index)
        if array.shape != (2 * self.latent_shape[0], *self.latent_shape[1:]):
            raise HasteError(f"{self.pairs.latent(index)} has shape {array.shape}; possible: one shape for all")
        return torch.from_numpy(array)

    def _array(self, index: int) -> np.ndarray:
        path = self.path / LATENTS / self.pairs.latent(index)
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _unreadable(path, error) from error
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            raise HasteError(f"{path} holds {getattr(array, 'dtype', 'an archive')}; possible: one array of float32")
        return array

    def _first_shape(self) -> tuple[int, int, int]:
        shape = self._array(0).shape
        if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2]:
            raise HasteError(
                f"{self.path / LATENTS / self.pairs.latent(0)} has shape {shape}; possible: (2C, S, S), mean then "
                f"standard deviation"
            )
        return shape[0] // 2, shape[1], shape[2]


def _unreadable(path: Path, error: Exception) -> HasteError:
    cause = "it is missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
    return HasteError(f"{path} cannot be read: {cause}; possible: the file that dataset.json names")


class Latents:
    """Latents x = scale (mean + std noise - shift) for the generator, with the images they come from for the teacher.

    `image_size` and `channels` are the latents'. Test and validation images are held out by `data.test_fraction`,
    `data.validation_fraction` and `data.split_seed`. Examples without augmentation take the posterior's mean.

    Attributes:
        scale, shift: of the latents. pixel_size: side of the images. manifest: None where the folder has none.

    Raises:
        HasteError: the folder cannot be used, or augmentation is asked for: the latent of a mirrored or moved image
            is not the mirrored or moved latent.
    """

    def __init__(self, data: config.Data) -> None:
        if data.augment.flip or data.augment.moves:
            raise HasteError(
                "data.augment with data.kind 'latents': the latent of a mirrored or moved image is not the mirrored or "
                "moved latent; possible: no augmentation"
            )
        self.folder = Folder(str(data.path))
        self.name = self.folder.path.name
        self.pixel_size, self.manifest = self.folder.image_size, self.folder.manifest
        if data.image_size not in (None, self.pixel_size):
            raise HasteError(
                f"data.image_size {data.image_size}, the images in {data.path} have {self.pixel_size}; possible: "
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
        """What the generator models, of latents as the VAE gives them."""
        return (latents - self.shift) * self.scale
