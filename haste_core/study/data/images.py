"""Any labelled images in pixel space: folders, and what Hugging Face `datasets` reads (parquet files, hub names)."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from haste_core.errors import HasteError, number_of, one_line
from haste_core.files import atomic, output_root
from haste_core.study import config
from haste_core.study.data.base import (
    MOST_CLASSES,
    UNREADABLE,
    Dataset,
    center_crop,
    hold_out,
    mapped_images,
    parts,
    say,
    split_indices,
    to_signed,
    to_tensor,
)

# Splits up to this many bytes are decoded once and kept in runs/decoded/, larger ones are decoded batch by batch.
KEPT_DECODED = 2**30
# What the name of a folder, or a word in that of a parquet file, says of a split.
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
# Images whose size is looked at, and files whose content is part of a folder's fingerprint.
SAMPLED = 64
# Blocks of each sampled parquet file.
PARQUET_BLOCKS = 64
# Images longer than this many times their width are worth a note.
LONG = 4
_FORMATS = "a folder with one sub-folder per class, a .parquet file or a folder of them, or a hub name (owner/name)"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# By setting that names a column: its usual names, and the kinds that it may have.
_COLUMNS = {
    "image_column": (("image",), ("images",)),
    "label_column": (("label",), ("classes", "integers")),
    "caption_column": (("caption", "captions", "text"), ("text", "lists of text")),
}


class Images(Dataset):
    """RGB images of one size in [-1, 1] with labels; training images are augmented as `data.augment` says.

    `summary` is printed once by a process. Raises HasteError where the data cannot be found or read, or hold no images
    with labels.
    """

    channels = 3

    def __init__(self, data: config.DataSettings) -> None:
        self.augment, self.image_size = data.augment, int(data.image_size or 0)
        path, columns = str(data.path), (data.image_column, data.label_column)
        self.name = Path(path).name
        rows, note = _divided(data, *self._load(data))
        self._splits = {name: Split(part, self.image_size, path, *columns) for name, part in rows.items()}
        labels = torch.cat([split.labels for split in self._splits.values()])
        self.classes = max(split.classes for split in self._splits.values())
        counts = torch.bincount(labels, minlength=self.classes)
        sizes = ", ".join(f"{len(split.labels):,} {name}" for name, split in self._splits.items())
        note += self._splits["train"].odd_sizes()
        self.decodes = self._splits["train"].too_large
        named = (
            f"{number_of(self.classes, 'class')} of {int(counts.min()):,} to {number_of(int(counts.max()), 'image')}"
        )
        self._found = (
            f"{self.name}: {number_of(len(labels), 'image')} ({sizes}), {self._named() or named}, "
            f"3x{self.image_size}x{self.image_size}{note}"
        )
        say(self._found)

    def _load(self, data: config.DataSettings) -> tuple[dict[str, Any], str]:
        """The source's splits and a note, as of `load_splits`."""
        return load_splits(str(data.path), data.label_column)

    def _named(self) -> str:
        """The name of the labels for `summary`; empty for classes."""
        return ""

    @property
    def summary(self) -> str:
        """Images by split, classes and their least and largest number of images, and what was not read."""
        return self._found

    def identity(self) -> dict[str, Any]:
        """As for `Dataset`."""
        found, files = hashlib.sha256(), hashlib.sha256()
        for split in self._splits.values():
            found.update(split.labels.numpy().tobytes())
            for content in split.samples():
                found.update(content)
            files.update("\0".join([*(split.class_names or []), *split.files()]).encode(errors="surrogateescape"))
        hashes = {"content": found.hexdigest()[:16], "files": files.hexdigest()[:16]}
        return {"images": sum(len(s.labels) for s in self._splits.values()), "classes": self.classes, **hashes}

    def __len__(self) -> int:
        return len(self._splits["train"].labels)

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        rows = self._splits[split]
        return to_signed(rows.pixels(chosen)), rows.labels[chosen]


class Split:
    """One split: labels in memory, pixels decoded on several threads, and kept if they are few.

    rows: as `datasets` reads them. size: side of the squares in pixels. path: the data's name in errors. image_column,
    label_column: their names, where more than one could be meant. Raises HasteError where there are no images, or one
    is empty or has no label that numbers a class.
    """

    def __init__(
        self, rows: Any, size: int, path: str, image_column: str | None = None, label_column: str | None = None
    ) -> None:
        self.image_column = find_column(rows, path, "image_column", image_column)
        label_column = find_column(rows, path, "label_column", label_column)
        # Files written without datasets' own metadata hold images as {bytes, path}.
        self.rows, self.size, self.path = rows.cast_column(self.image_column, datasets.Image()), size, path
        labels = rows[label_column][:]
        wrong = [i for i, label in enumerate(labels) if label is None or not 0 <= label < MOST_CLASSES]
        empty = pc.index(pc.and_(*map(pc.is_null, self._stored())), True).as_py()
        if not labels or wrong or empty >= 0:
            found = f"image {wrong[0]} has label {labels[wrong[0]]}" if wrong else "a split has no images"
            found = f"image {empty} of column {self.image_column!r} is empty" if empty >= 0 else found
            raise HasteError(f"data {path}: {found}; expected images, each with a label from 0 to {MOST_CLASSES - 1:,}")
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.class_names: list[str] | None = getattr(rows.features[label_column], "names", None)
        self.classes = max(len(self.class_names or []), int(self.labels.max()) + 1)

    def _stored(self) -> tuple[Any, Any]:
        """Bytes and paths of all images of the file that the split is part of, as Arrow columns."""
        column = self.rows.data.column(self.image_column)
        return pc.struct_field(column, "bytes"), pc.struct_field(column, "path")

    def _numbers(self) -> Sequence[int]:
        """Positions of the split's images among those of `_stored`."""
        chosen = self.rows._indices
        return range(len(self.rows)) if chosen is None else chosen.column(0).to_pylist()

    def files(self) -> Iterator[str]:
        """Name and size of each image as it is stored."""
        content, paths = self._stored()
        sizes, names = pc.binary_length(content).to_pylist(), paths.to_pylist()
        for i in self._numbers():
            name = names[i] or ""
            size = os.path.isfile(name) and os.path.getsize(name) if sizes[i] is None else sizes[i]
            yield f"{os.path.basename(name)} {size:d}"

    def samples(self) -> Iterator[bytes]:
        """The files of some images, evenly spread; one that is missing is named when it is decoded."""
        stored = self.rows.cast_column(self.image_column, datasets.Image(decode=False))
        for i in range(0, len(stored), len(stored) // SAMPLED + 1):
            row = stored[i][self.image_column]
            try:
                yield Path(row["path"]).read_bytes() if row["bytes"] is None else row["bytes"]
            except OSError:
                continue

    def odd_sizes(self) -> str:
        """A note on images that are enlarged, or of which most is cropped, among some that are looked at."""
        sizes = []
        for content in self.samples():
            try:
                with Image.open(io.BytesIO(content)) as image:
                    sizes.append(image.size)
            except UNREADABLE:  # named when it is decoded
                continue
        note = ""
        for found, what in (
            ([size for size in sizes if min(size) < self.size], f"enlarged to {self.size}"),
            ([size for size in sizes if max(size) > LONG * min(size)], "cropped to a small part"),
        ):
            if found:
                smallest = "x".join(map(str, min(found, key=min)))
                note += f"; {len(found)} of {len(sizes)} looked at are {what} (such as {smallest})"
        return note

    def pixels(self, chosen: Tensor | slice) -> Tensor:
        """uint8 (B, 3, S, S)."""
        if self.too_large:
            return self.decode(torch.arange(len(self.labels))[chosen].tolist())
        return self._kept[chosen]

    @property
    def too_large(self) -> bool:
        """True where the images are decoded anew for every batch."""
        return len(self.labels) * 3 * self.size**2 > KEPT_DECODED

    @cached_property
    def _kept(self) -> Tensor:
        """All pixels, mapped from a file that is written at first use and shared by all processes."""
        path = output_root() / "runs" / "decoded" / f"{self.rows._fingerprint}-{self.size}.npy"
        if not path.is_file():
            with atomic(path) as temporary, temporary.open("wb") as stream:
                np.save(stream, self.decode(range(len(self.labels))).numpy(), allow_pickle=False)
        return torch.from_numpy(mapped_images(path, len(self.labels)))

    def decode(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, 3, S, S), decoded from the source; HasteError names a file that is missing or no image."""
        with ThreadPoolExecutor() as pool:
            chosen = ([indices[i] for i in part] for part in parts(range(len(indices)), 64))
            return torch.cat(list(pool.map(self._decode, chosen)))

    def _decode(self, chosen: list[int]) -> Tensor:
        try:
            pictures = self.rows[chosen][self.image_column]
            return torch.stack([to_tensor(center_crop(picture, self.size)) for picture in pictures])
        except UNREADABLE as error:
            if len(chosen) > 1:  # one by one, to name the one that fails
                return torch.cat([self._decode([index]) for index in chosen])
            stored = self.rows.cast_column(self.image_column, datasets.Image(decode=False))[chosen[0]]
            name = stored[self.image_column]["path"] or f"image {self._numbers()[chosen[0]]}"
            said = f"data {self.path}: {name} cannot be decoded ({one_line(error)}); mend, shrink or remove it"
            raise HasteError(said) from error


def find_column(rows: Any, path: str, setting: str, given: str | None) -> str:
    """The name of the column that `data.<setting>` gives, or else of the only one that can be meant.

    One of its usual name is meant where there are several of its kind, and classes rather than integers. Raises
    HasteError where none, or more than one, can be meant.
    """
    usual, wanted = _COLUMNS[setting]
    kinds = {name: column_kind(feature) for name, feature in rows.features.items()}
    fitting = [name for name in kinds if kinds[name] in wanted]
    if not given:
        fitting = [name for name in fitting if kinds[name] == "classes"] or fitting
    named = [name for name in usual if name in fitting]
    chosen = given or next((names[0] for names in (named, fitting) if len(names) == 1), None)
    if chosen is None or chosen not in fitting:
        there = ", ".join(f"{name} ({_described(rows, name, kind)})" for name, kind in kinds.items())
        asked = f"there are {len(fitting)} columns" if fitting else "there is no column"
        raise HasteError(
            f"data {path}: {f'data.{setting}={given} is no column' if given else asked} of {' or '.join(wanted)}; the "
            f"columns are: {there}; expected data.{setting} to name a column of {usual[0]}s"
        )
    return chosen


def column_kind(feature: Any) -> str:
    """The kind of a column: "images", "classes", "integers", "text", "lists of text", or the name of another dtype."""
    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
        return "images"  # files written without datasets' own metadata hold images as {bytes, path}
    if isinstance(feature, datasets.ClassLabel):
        return "classes"
    if (inner := getattr(feature, "feature", None)) is not None and column_kind(inner) == "text":
        return "lists of text"
    dtype = str(getattr(feature, "dtype", "other values"))
    return "integers" if dtype.startswith(("int", "uint")) else "text" if dtype.endswith("string") else dtype


def _described(rows: Any, name: str, kind: str) -> str:
    """A column's kind, and the number of distinct values where it could hold labels."""
    labels = kind in ("classes", "integers", "text")
    return f"{kind}, {number_of(len(rows.unique(name)), 'distinct value')}" if labels else kind


def _divided(data: config.DataSettings, found: Mapping[str, Any], note: str) -> tuple[dict[str, Any], str]:
    """Rows of "train", "validation" and "test" among the source's splits, and the note on files with what is not used.

    A split of the data's own for validation or test is used as it is; one named like validation serves as the test
    split where there is none. What is missing is held out of the training split. Raises HasteError where
    `data.test_split` names the training split, or one that is missing and not just called "test".
    """
    path = str(data.path)
    train = found[pick_split(found, data.train_split, path)]
    others = {name: rows for name, rows in found.items() if rows is not train}
    own = {SPLITS[name.lower()]: rows for name, rows in others.items() if name.lower() in SPLITS}
    test = others.get(data.test_split, own.get("test", own.get("validation")))
    if SPLITS.get(data.test_split.lower()) != "test":
        test = found[pick_split(found, data.test_split, path)]
    if test is train:
        raise HasteError(
            f"data {path}: data.train_split and data.test_split name the same split; expected two of: "
            f"{', '.join(found)}"
        )
    validation = own.get("validation")
    unused = [name for name, rows in others.items() if rows is not test and rows is not validation]
    note += "".join(f"; split {name!r} is not used" for name in unused)
    columns = (data.image_column, data.label_column)
    labels = Split(train, int(data.image_size or 0), path, *columns).labels
    if test is None:
        chosen = split_indices(labels, data, f"data {path} without a split {data.test_split!r}")
        return {name: train.select(indices.tolist()) for name, indices in chosen.items()}, note
    if validation is not None and validation is not test:
        return {"train": train, "validation": validation, "test": test}, note
    kept, held_out = hold_out(labels, data, "validation", f"data {path}")
    own = {"train": train.select(kept.tolist()), "validation": train.select(held_out.tolist())}
    return own | {"test": test}, note


def pick_split(found: Mapping[str, Any], name: str, path: str) -> str:
    """The split of that name, or of the one name that means the same; HasteError where there is none."""
    alike = [other for other in found if SPLITS.get(other.lower()) == SPLITS.get(name.lower(), name)]
    if name in found or len(alike) != 1:
        alike = [name]
    if alike[0] not in found:
        raise HasteError(f"data {path} has no split {name!r}; expected one of: {', '.join(found)}")
    return alike[0]


def load_splits(path: str, label_column: str | None = None) -> tuple[dict[str, Any], str]:
    """Every split of a folder, parquet file or hub name by its name, and a note on files that were not read.

    Labels of text in `label_column` become classes in alphabetical order. Raises HasteError where nothing can be read.
    """
    place = Path(path)
    if not place.exists() and not _HUB_NAME.fullmatch(path):
        raise HasteError(f"data.path {path!r} does not exist; expected {_FORMATS}")
    source: dict[str, Any] = {"path": path}
    files, note = [Path()], ""
    if place.is_file():
        source = {"path": "parquet", "data_files": {"train": str(place)}}
    elif place.is_dir():
        files, note = _listed(place)
        if not files or files[0].suffix.lower() != ".parquet":
            return _tree(place, files, note), note
        splits: dict[str, list[str]] = {}
        for file in files:
            # The usual names: train-00000-of-00002.parquet, cifar10-test.parquet.
            words = [re.sub("(set|data|split)$", "", word) for word in re.split(r"[^a-z]+", file.stem.lower())]
            splits.setdefault(next((SPLITS[w] for w in words if w in SPLITS), "train"), []).append(str(place / file))
        source = {"path": "parquet", "data_files": splits}
    try:
        if place.exists():  # datasets reads its copy again while names and times are the same: content is in its name
            source["name"] = data_fingerprint(place, files, PARQUET_BLOCKS)
        found = dict(datasets.load_dataset(**source))
    except Exception as error:  # datasets raises its own errors, OSError, ValueError and the hub's alike
        # datasets wraps the cause in "An error occurred while generating the dataset".
        cause = one_line(error.__cause__ or error)[:300]
        raise HasteError(f"data.path {path!r} cannot be read: {cause}; expected {_FORMATS}") from error
    if label_column and all(column_kind(rows.features.get(label_column)) == "text" for rows in found.values()):
        names = sorted({str(name) for rows in found.values() for name in rows.unique(label_column)})
        classes = datasets.ClassLabel(names=names)
        found = {split: rows.cast_column(label_column, classes) for split, rows in found.items()}
    return found, note


def _listed(root: Path) -> tuple[list[Path], str]:
    """The images or the parquet files of a folder, and a note on files that are not read.

    Parquet files lie at the top or one level below, as a clone has them, and are not read where two folders or more
    hold images.
    """
    skipped: Counter[str] = Counter()
    files = sorted(walk(root, (), skipped, {*IMAGE_SUFFIXES, ".parquet"}), key=lambda file: file.parts)
    images = [file for file in files if file.suffix.lower() != ".parquet"]
    tables = sorted({*files} - {*images})
    highest = min((len(file.parts) for file in tables), default=0)
    read = [file for file in tables if len(file.parts) == highest < 3]
    if not read or len({file.parent for file in images} - {Path()}) > 1:
        read = images
    skipped.update(file.suffix.lower() for file in {*files} - {*read})
    return read, not_read(skipped)


def _tree(root: Path, images: Sequence[Path], note: str) -> dict[str, Any]:
    """The splits of a folder of `images`, which are sorted; `note` says what else is there.

    The class of an image is its folder, "animals/cat" for a nested one. A top level that consists of split names alone,
    with class folders inside, is one of splits; else everything is "train". Raises HasteError where there are no
    images, or one lies in no class folder.
    """
    tops = {file.parts[0] for file in images}
    divided = (
        bool(images) and all(len(file.parts) > 2 for file in images) and {top.lower() for top in tops} <= set(SPLITS)
    )
    loose = [str(file) for file in images if len(file.parts) < 2 + divided]
    if loose or not images:
        what = f"no images{note}"
        if loose:
            what = f"{number_of(len(loose), 'image')} in no class folder ({', '.join(loose[:3])})"
        raise HasteError(f"data.path {str(root)!r} holds {what}; expected {_FORMATS}")
    splits: dict[str, list[Path]] = {}
    for file in images:
        splits.setdefault(file.parts[0] if divided else "train", []).append(file)
    folders = {file: "/".join(file.parts[int(divided) : -1]) for file in images}
    names = sorted(set(folders.values()))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    numbers, found = {name: i for i, name in enumerate(names)}, {}
    for split, files in splits.items():
        columns = {"image": [str(root / file) for file in files], "label": [numbers[folders[file]] for file in files]}
        found[split] = datasets.Dataset.from_dict(columns, features=features)
        found[split]._fingerprint = data_fingerprint(root, files)
    return found


def not_read(skipped: Mapping[str, int]) -> str:
    """A note on files by kind; empty without any."""
    return "; not read: " + ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items())) if skipped else ""


def walk(
    folder: Path, above: tuple[str, ...], skipped: Counter[str], suffixes: Collection[str] = IMAGE_SUFFIXES
) -> Iterator[Path]:
    """Images below `folder`, relative to it; other files are counted by kind. above: the folders on the way here.

    Raises HasteError where a link is broken or leads in a circle, or something is neither a file nor a folder.
    """
    here = os.path.realpath(folder)
    if here in above:
        raise HasteError(f"{folder} is a link to a folder that holds it; expected a folder without circles")
    for entry in os.scandir(folder):
        # Path takes a link to itself for a broken one, where an entry's own methods fail.
        place = Path(entry.path) if entry.is_symlink() else entry
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif place.is_dir():
            yield from (entry.name / inside for inside in walk(Path(entry.path), (*above, here), skipped, suffixes))
        elif not place.is_file():
            what = "a broken link" if entry.is_symlink() else "neither of the two"
            raise HasteError(f"{entry.path} is {what}; expected a file or a folder; mend or remove it")
        elif (suffix := Path(entry.name).suffix.lower()) in suffixes:
            yield Path(entry.name)
        else:
            skipped[suffix or "without a suffix"] += 1


def data_fingerprint(root: Path, files: Sequence[Path], blocks: int = 1) -> str:
    """A hash of the names, sizes and times of files, and of some bytes of some, 16 hexadecimal digits.

    blocks: of 4 KiB that are read of each of these, from the first one to the last.
    """
    found = hashlib.sha256()
    for i, file in enumerate(files):
        facts = (root / file).stat()
        found.update(f"{file}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
        if i % (len(files) // SAMPLED + 1) == 0:
            with (root / file).open("rb") as stream:
                for start in np.linspace(0, max(0, facts.st_size - 4096), blocks):
                    stream.seek(int(start))
                    found.update(stream.read(4096))
    return found.hexdigest()[:16]
