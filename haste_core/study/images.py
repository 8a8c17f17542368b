"""Sets of uint8 images: sources read in batches, hashes of their content, and sheets as PNG files."""

from __future__ import annotations

import hashlib
import math
import textwrap
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Generator, Tensor

from haste_core.errors import HasteError, number_of, one_line
from haste_core.files import atomic
from haste_core.sampling import to_uint8
from haste_core.study import config
from haste_core.study.data import Dataset, open_dataset
from haste_core.study.data.base import UNREADABLE, center_crop, parts, say, to_tensor

# Training sets up to this many bytes are hashed completely, larger ones by this many evenly spread images.
HASHED_WHOLE = 2**30
HASHED_IMAGES = 2000


class Images(Protocol):
    """Images in a fixed order that need not fit into memory."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order, uint8 (at most `size`, C, S, S)."""


class MemoryImages:
    """uint8 images (n, C, S, S) in memory."""

    def __init__(self, images: Tensor) -> None:
        self.images = as_uint8(images)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        """As for `Images`."""
        yield from self.images.split(size)


def as_uint8(images: Tensor) -> Tensor:
    """`images` unchanged; raises HasteError unless they are uint8."""
    if images.dtype != torch.uint8:
        raise HasteError(f"images to score are {images.dtype}; expected torch.uint8")
    return images


class NpzImages:
    """The uint8 images arr_0 (n, S, S, C) of an .npz file as ADM's tools write it, read in parts.

    Raises HasteError where the file or the array is missing or unreadable, also while it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        """As for `Images`."""
        with self._open() as (stream, (n, *rest)):
            for part in parts(range(n), size):
                content = bytearray(stream.read(len(part) * math.prod(rest)))
                yield torch.frombuffer(content, dtype=torch.uint8).reshape(len(part), *rest).permute(0, 3, 1, 2)

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], tuple[int, int, int, int]]]:
        """A stream at the first image, and the shape of all."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                np.lib.format.read_magic(stream)
                shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
                if dtype != np.uint8 or by_column or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
                    raise ValueError(f"arr_0 is {dtype} {shape}")
                held = archive.getinfo("arr_0.npy").file_size - stream.tell()
                if held != math.prod(shape):
                    raise ValueError(f"arr_0 is {shape} and holds {held:,} bytes")
                yield stream, shape
        except (OSError, KeyError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise HasteError(
                f"{self.path}: {one_line(error)}; expected an .npz file with uint8 images arr_0 (n, S, S, 3)"
            ) from error


class FolderImages:
    """All images below a folder in the order of their names, as RGB of one size.

    resize: side in pixels that images are cropped and resized to (center-crop-dhariwal); None takes them as they are.
    Raises HasteError where there are no images, or of several sizes or not square without `resize`, or where one cannot
    be decoded, also while it is read.
    """

    def __init__(self, path: Path, resize: int | None = None) -> None:
        from haste_core.study.data.images import not_read, walk  # with Hugging Face's data sets

        self.path, self.resize = path, resize
        skipped: Counter[str] = Counter()
        self.files = sorted(walk(path, (), skipped), key=lambda file: file.parts)
        say(f"{path}: {number_of(len(self.files), 'image')}{not_read(skipped)}")
        if not self.files:
            raise HasteError(f"{path} holds no images; expected PNG, JPEG or WebP files, or a folder of haste sample")
        sizes = Counter(self._decoded(file, lambda image: image.size) for file in self.files)
        if resize is None and (len(sizes) > 1 or len(set(next(iter(sizes)))) > 1):
            shown = ", ".join(f"{n} of {width}x{height}" for (width, height), n in sizes.most_common(3))
            raise HasteError(f"{path} holds {shown}{', ...' * (len(sizes) > 3)}; expected square images of one size; "
                             f"--resize N crops and resizes them")  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Tensor]:
        """As for `Images`."""
        for part in parts(range(len(self.files)), size):
            yield torch.stack([self._decoded(self.files[i], self._tensor) for i in part])

    def _tensor(self, image: Image.Image) -> Tensor:
        return to_tensor(center_crop(image, self.resize or image.width))

    def _decoded(self, file: Path, use: Callable[[Image.Image], Any]) -> Any:
        try:
            with Image.open(self.path / file) as image:
                ImageOps.exif_transpose(image, in_place=True)  # upright, as training reads them
                return use(image)
        except UNREADABLE as error:
            said = f"{self.path / file} cannot be decoded ({one_line(error)}); mend, shrink or remove it"
            raise HasteError(said) from error

    def facts(self) -> dict[str, Any]:
        """For the card: a hash of all files and of the size they are brought to, and that size."""
        found = hashlib.sha256(f"{self.resize}\0".encode())
        for file in self.files:
            found.update(f"{file}\0{file_hash(self.path / file)}\0".encode())
        return {"hash": found.hexdigest()[:16], **({"resize": self.resize} if self.resize else {})}


class TrainingImages:
    """The training images of a data set in its own order, without augmentation."""

    def __init__(self, data: config.DataSettings) -> None:
        self.kind = data.kind
        self.dataset: Dataset = open_dataset(data.model_copy(update={"augment": config.AugmentSettings()}))

    def __len__(self) -> int:
        return len(self.dataset)

    def at(self, indices: Tensor) -> Tensor:
        """uint8 images (B, C, S, S) by index (B,)."""
        return to_uint8(self.dataset.batch(indices, Generator().manual_seed(0)).images)

    def batches(self, size: int) -> Iterator[Tensor]:
        """As for `Images`."""
        for indices in torch.arange(len(self)).split(size):
            yield self.at(indices)

    def hash(self) -> str:
        """The first 16 hexadecimal digits of a SHA-256 over number, shape and pixels of the images."""
        n = len(self)
        first = self.at(torch.zeros(1, dtype=torch.int64))
        whole = n * first[0].numel() <= HASHED_WHOLE
        chosen = torch.arange(n) if whole else torch.linspace(0, n - 1, HASHED_IMAGES).long()
        sha = hashlib.sha256(f"{n} {tuple(first.shape[1:])}".encode())
        for indices in chosen.split(1000):
            sha.update(self.at(indices).contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file; raises HasteError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise HasteError(f"{path} cannot be read ({error.strerror}); expected the path of a file") from error


def save_grid(images: Tensor, path: Path, columns: int, captions: Sequence[str] | None = None) -> None:
    """Write uint8 images (n, C, S, S) atomically as one PNG, enlarged, with white gaps; captions: texts below them."""
    gap, scale = 1, 4
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    enlarged = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    picture = Image.fromarray(enlarged.numpy())
    if captions is not None:
        picture = _captioned(picture, captions, columns, ((width + gap) * scale, (height + gap) * scale))
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")


def _captioned(sheet: Image.Image, captions: Sequence[str], columns: int, step: tuple[int, int]) -> Image.Image:
    """A sheet of images, `step` pixels from one to the next, with the caption of each below it."""
    letters = max(8, step[0] // 6)
    texts = [textwrap.wrap(caption, letters, max_lines=6) for caption in captions]
    below, rows = 11 * max(map(len, texts)) + 8, -(-len(captions) // columns)
    page = Image.new("RGB", (sheet.width, rows * (step[1] + below)), "white")
    draw = ImageDraw.Draw(page)
    for row in range(rows):
        top = row * (step[1] + below)
        page.paste(sheet.crop((0, row * step[1], sheet.width, min((row + 1) * step[1], sheet.height))), (0, top))
        for column, lines in enumerate(texts[row * columns : (row + 1) * columns]):
            draw.multiline_text((column * step[0] + 2, top + step[1]), "\n".join(lines), "black", spacing=1)
    return page
