"""Any labelled images that Hugging Face `datasets` reads, in pixel space: folders, parquet files, hub names."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor

from haste_core import config
from haste_core.data.base import Batch, augmented
from haste_core.data.resize import center_crop, to_signed, to_tensor
from haste_core.errors import HasteError
from haste_core.files import output_root, write_bytes

# Splits up to this many bytes are decoded once and kept in runs/decoded/, larger ones are decoded when asked for.
KEPT_DECODED = 2**30
_FORMATS = "a folder with one sub-folder per class, a .parquet file or a folder of them, or a hub name (owner/name)"


class Images:
    """RGB images of one size in [-1, 1] with labels; flips and affine maps in training as `data.augment` says.

    Raises:
        HasteError: the data cannot be found or read, or hold no images with labels.
    """

    channels = 3

    def __init__(self, data: config.Data) -> None:
        self.augment, self.image_size = data.augment, int(data.image_size or 0)
        path = str(data.path)
        self.name = Path(path).name
        rows = read_splits(data)
        self._splits = {name: Split(part, self.image_size, path) for name, part in rows.items()}
        labels = torch.cat([split.labels for split in self._splits.values()])
        self.classes = max(int(labels.max()) + 1, *(split.classes for split in self._splits.values()))

    def __len__(self) -> int:
        return len(self._splits["train"].labels)

    def images(self, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, 3, S, S) and labels (n,) of "train" or "test", without augmentation."""
        chosen = self._splits[split]
        indices = torch.arange(len(chosen.labels))[:count]
        return to_signed(chosen.pixels(indices)), chosen.labels[:count]

    def examples(self, split: str, count: int | None = None) -> Batch:
        """The same images as a batch."""
        x, y = self.images(split, count)
        return Batch(x, y, x)

    def batch(self, indices: Tensor, generator: Generator) -> Batch:
        """Training examples, augmented at random."""
        chosen = self._splits["train"]
        x = augmented(to_signed(chosen.pixels(indices)), self.augment, generator)
        return Batch(x, chosen.labels[indices], x)


class Split:
    """One split: labels in memory, pixels decoded on several threads, and kept where they are few enough."""

    def __init__(self, rows: Any, size: int, path: str) -> None:
        self.image_column, label_column = columns_of(rows, path)
        # Files written without datasets' own metadata hold images as {bytes, path}.
        self.rows, self.size = rows.cast_column(self.image_column, datasets.Image()), size
        self.labels = torch.tensor(rows[label_column][:], dtype=torch.int64)
        self.classes = int(getattr(rows.features[label_column], "num_classes", None) or 0)
        if len(self.labels) == 0:
            raise HasteError(f"data {path}: a split without images")
        if int(self.labels.min()) < 0:
            raise HasteError(f"data {path}: label {int(self.labels.min())}; possible: 0 and above")
        self._kept: Tensor | None = None

    def pixels(self, indices: Tensor) -> Tensor:
        """uint8 (B, 3, S, S)."""
        if len(self.labels) * 3 * self.size**2 > KEPT_DECODED:
            return self._decode(indices.tolist())
        if self._kept is None:
            self._kept = self._open_kept()
        return self._kept[indices]

    def _open_kept(self) -> Tensor:
        """All pixels, mapped from a file that is written at first use and shared by every process of a study."""
        path = output_root() / "runs" / "decoded" / f"{self.rows._fingerprint}-{self.size}.npy"
        if not path.is_file():
            stream = io.BytesIO()
            np.save(stream, self._decode(list(range(len(self.labels)))).numpy(), allow_pickle=False)
            write_bytes(path, stream.getvalue())
        # Copy-on-write: torch wants memory it may write to, the file stays as it is.
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))

    def _decode(self, indices: list[int]) -> Tensor:
        def some(chosen: list[int]) -> Tensor:
            pictures = self.rows[chosen][self.image_column]
            return torch.stack([to_tensor(center_crop(picture, self.size)) for picture in pictures])

        parts = [indices[i : i + 64] for i in range(0, len(indices), 64)]
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            return torch.cat(list(pool.map(some, parts)))


def columns_of(rows: Any, path: str) -> tuple[str, str]:
    """The names of the image column and of the label column.

    Raises:
        HasteError: there is no such column.
    """
    pictures = [
        name
        for name, kind in rows.features.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
    ]
    whole = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    labels = [n for n, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)] or [
        name for name, kind in rows.features.items() if getattr(kind, "dtype", None) in whole
    ]
    if not pictures or not labels:
        raise HasteError(
            f"data {path} has columns {', '.join(rows.features)}; possible: one of images and one of whole numbers"
        )
    return pictures[0], "label" if "label" in labels else labels[0]


def read_splits(data: config.Data) -> dict[str, Any]:
    """Rows of "train" and "test" as `datasets` reads them; held out of train where there is no test split.

    Raises:
        HasteError: nothing is there, or a split is missing.
    """
    path = str(data.path)
    try:
        found = _load(path)
    except Exception as error:  # datasets raises its own errors, OSError, ValueError and the hub's alike
        raise HasteError(f"data.path {path!r} cannot be read: {' '.join(str(error).split())}; possible: {_FORMATS}"
                         ) from error  # fmt: skip
    if data.train_split not in found:
        raise HasteError(f"data {path} has no split {data.train_split!r}; possible: {', '.join(found)}")
    train = found[data.train_split]
    if data.test_split in found and data.test_split != data.train_split:
        return {"train": train, "test": found[data.test_split]}
    label_column = columns_of(train, path)[1]
    labels = train[label_column][:]
    try:
        kept, held_out = train_test_split(
            range(len(labels)), test_size=data.test_fraction, random_state=data.split_seed, stratify=labels
        )
    except ValueError as error:
        raise HasteError(f"data {path} has no split {data.test_split!r} and cannot be divided: {error}") from error
    assert isinstance(train, datasets.Dataset)
    return {"train": train.select(kept), "test": train.select(held_out)}


def _load(path: str) -> Any:
    place = Path(path)
    if place.is_file():
        return datasets.load_dataset("parquet", data_files={"train": str(place)})
    if not place.is_dir():
        return datasets.load_dataset(path)
    files = sorted(place.glob("*.parquet"))
    if not files:
        return datasets.load_dataset("imagefolder", data_dir=str(place), drop_labels=False)
    # The usual names: train-00000-of-00002.parquet, cifar10-test.parquet.
    splits: dict[str, list[str]] = {}
    for file in files:
        name = next((s for s in ("train", "test", "validation") if s in file.stem), "train")
        splits.setdefault(name, []).append(str(file))
    return datasets.load_dataset("parquet", data_files=splits)
