"""Any labelled images that Hugging Face `datasets` reads, in pixel space: folders, parquet files, hub names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from haste_core.errors import HasteError
from haste_core.files import atomic, output_root
from haste_core.study import config
from haste_core.study.data.base import (
    Dataset,
    center_crop,
    hold_out,
    mapped_images,
    parts,
    split_indices,
    to_signed,
    to_tensor,
)

# Splits up to this many bytes are decoded once and kept in runs/decoded/, larger ones are decoded batch by batch.
KEPT_DECODED = 2**30
_FORMATS = "a folder with one sub-folder per class, a .parquet file or a folder of them, or a hub name (owner/name)"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Images(Dataset):
    """RGB images of one size in [-1, 1] with labels; training images are augmented as `data.augment` says.

    Raises:
        HasteError: the data cannot be found or read, or hold no images with labels.
    """

    channels = 3

    def __init__(self, data: config.DataSettings) -> None:
        self.augment, self.image_size = data.augment, int(data.image_size or 0)
        path = str(data.path)
        self.name = Path(path).name
        self._splits = {name: Split(rows, self.image_size, path) for name, rows in _divided(data).items()}
        labels = torch.cat([split.labels for split in self._splits.values()])
        self.classes = max(int(labels.max()) + 1, *(split.classes for split in self._splits.values()))

    def __len__(self) -> int:
        return len(self._splits["train"].labels)

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        rows = self._splits[split]
        return to_signed(rows.pixels(chosen)), rows.labels[chosen]


class Split:
    """One split: labels in memory, pixels decoded on several threads, and kept if they are few.

    Args:
        rows: as `datasets` reads them. size: side of the squares in pixels. path: the data's name in errors.

    Raises:
        HasteError: there are no images, or not a label for each.
    """

    def __init__(self, rows: Any, size: int, path: str) -> None:
        self.image_column, label_column = _columns(rows, path)
        # Files written without datasets' own metadata hold images as {bytes, path}.
        self.rows, self.size, self.path = rows.cast_column(self.image_column, datasets.Image()), size, path
        labels = rows[label_column][:]
        wrong = [i for i, label in enumerate(labels) if label is None or label < 0]
        if not labels or wrong:
            found = f"image {wrong[0]} has label {labels[wrong[0]]}" if wrong else "a split has no images"
            raise HasteError(f"data {path}: {found}; expected images, each with a label of 0 or above")
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.class_names: list[str] | None = getattr(rows.features[label_column], "names", None)
        self.classes = len(self.class_names or [])

    def pixels(self, chosen: Tensor | slice) -> Tensor:
        """uint8 (B, 3, S, S)."""
        if len(self.labels) * 3 * self.size**2 > KEPT_DECODED:
            return self.decode(torch.arange(len(self.labels))[chosen].tolist())
        return self._kept[chosen]

    @cached_property
    def _kept(self) -> Tensor:
        """All pixels, mapped from a file that is written at first use and shared by all processes."""
        path = output_root() / "runs" / "decoded" / f"{self.rows._fingerprint}-{self.size}.npy"
        if not path.is_file():
            with atomic(path) as temporary, temporary.open("wb") as stream:
                np.save(stream, self.decode(range(len(self.labels))).numpy(), allow_pickle=False)
        return torch.from_numpy(mapped_images(path, len(self.labels)))

    def decode(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, 3, S, S), decoded from the source.

        Raises:
            HasteError: a file is missing or no image.
        """
        with ThreadPoolExecutor() as pool:
            chosen = ([indices[i] for i in part] for part in parts(range(len(indices)), 64))
            return torch.cat(list(pool.map(self._decode, chosen)))

    def _decode(self, chosen: list[int]) -> Tensor:
        try:
            pictures = self.rows[chosen][self.image_column]
            return torch.stack([to_tensor(center_crop(picture, self.size)) for picture in pictures])
        except (OSError, ValueError, SyntaxError, AttributeError) as error:  # Pillow raises all of these
            if len(chosen) > 1:  # one by one, to name the one that fails
                return torch.cat([self._decode([index]) for index in chosen])
            cause = " ".join(str(error).split())
            raise HasteError(f"data {self.path}: image {chosen[0]} cannot be decoded ({cause})") from error


def _columns(rows: Any, path: str) -> tuple[str, str]:
    """The names of the image column and of the label column."""
    kinds = rows.features.items()
    images = [
        n for n, kind in kinds if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
    ]
    labels = [n for n, kind in kinds if isinstance(kind, datasets.ClassLabel)] or [
        n for n, kind in kinds if str(getattr(kind, "dtype", "")).startswith(("int", "uint"))
    ]
    if not images or not labels:
        raise HasteError(
            f"data {path} has columns {', '.join(rows.features)}; expected one of images and one of integers"
        )
    return images[0], "label" if "label" in labels else labels[0]


def _divided(data: config.DataSettings) -> dict[str, Any]:
    """Rows of "train", "validation" and "test" as `datasets` reads them.

    Validation images are held out of the training split, and so are test images where there is no test split.
    """
    path = str(data.path)
    found = load_splits(path, data.train_split)
    train = found[data.train_split]
    labels = Split(train, int(data.image_size or 0), path).labels
    if data.test_split in found and data.test_split != data.train_split:
        kept, held_out = hold_out(labels, data, "validation", f"data {path}")
        own = {"train": train.select(kept.tolist()), "validation": train.select(held_out.tolist())}
        return own | {"test": found[data.test_split]}
    chosen = split_indices(labels, data, f"data {path} without a split {data.test_split!r}")
    return {name: train.select(indices.tolist()) for name, indices in chosen.items()}


def load_splits(path: str, needed: str) -> dict[str, Any]:
    """Every split of a folder, parquet file or hub name, as `datasets` reads it.

    Raises:
        HasteError: nothing is there, it cannot be read, or the split `needed` is missing.
    """
    place = Path(path)
    if not place.exists() and not _HUB_NAME.fullmatch(path):
        raise HasteError(f"data.path {path!r} does not exist; expected {_FORMATS}")
    source: dict[str, Any]
    if place.is_file():
        source = {"path": "parquet", "data_files": {"train": str(place)}}
    elif files := sorted(place.glob("*.parquet")):
        splits: dict[str, list[str]] = {}
        for file in files:
            # The usual names: train-00000-of-00002.parquet, cifar10-test.parquet.
            name = next((s for s in ("train", "test", "validation") if s in file.stem), "train")
            splits.setdefault(name, []).append(str(file))
        source = {"path": "parquet", "data_files": splits}
    elif place.is_dir():
        source = {"path": "imagefolder", "data_dir": str(place), "drop_labels": False}
    else:
        source = {"path": path}
    try:
        found = dict(datasets.load_dataset(**source))
    except Exception as error:  # datasets raises its own errors, OSError, ValueError and the hub's alike
        # datasets wraps the cause in "An error occurred while generating the dataset".
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise HasteError(f"data.path {path!r} cannot be read: {cause}; expected {_FORMATS}") from error
    if needed not in found:
        raise HasteError(f"data {path} has no split {needed!r}; expected one of: {', '.join(found)}")
    return found
