"""What the teacher makes of every training image, written down once: tokens, q and k, read from then on.

    runs/<study>/teacher-<hash>/seen-<hash>/     tokens.npy, q<block>.npy, k<block>.npy: (images, ...), facts.json

For data without augmentation, where an image looks the same every time. The values are the teacher's own but for
rounding, because an image's batch is another one. Arrays are mapped, not loaded, and hold what the teacher's precision
holds: float32, float16, or bfloat16 as its 16 bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from haste_core.alignment import Alignment
from haste_core.devices import in_precision
from haste_core.errors import HasteError
from haste_core.files import locked, write_json
from haste_core.study import config
from haste_core.study.data import Dataset
from haste_core.teacher import TeacherOutput

READ_AT_ONCE = 64
GIB = 2**30


class TeacherCache:
    """The teacher's view of the training images by their indices; `folder` is whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.facts = json.loads((folder / "facts.json").read_text())
        self.blocks: list[int] = self.facts["blocks"]
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                        for name in names(self.blocks)}  # fmt: skip

    def seen(self, indices: Tensor, device: torch.device) -> TeacherOutput:
        """Tokens (B, N, D) and q, k (B, H, N, d) of training images `indices` (B,) on the CPU; theirs is `device`."""
        rows = indices.numpy()
        found = {name: self._rows(array, rows).to(device) for name, array in self._arrays.items()}
        return TeacherOutput(found["tokens"], {b: (found[f"q{b}"], found[f"k{b}"]) for b in self.blocks})

    def _rows(self, array: np.ndarray, rows: np.ndarray) -> Tensor:
        values = torch.from_numpy(array[rows])
        return values.view(torch.bfloat16) if values.dtype == torch.int16 else values


def names(blocks: Sequence[int]) -> list[str]:
    """Names of the arrays of a cache with q and k of `blocks`."""
    return ["tokens", *(f"{part}{block}" for block in blocks for part in "qk")]


def write(place: Path, run: config.RunConfig, alignment: Alignment, dataset: Dataset) -> Path:
    """The folder of a run's cache, filled first where it is not there; its size is told before anything is written.

    Args:
        place: the folder of the teacher. run: its data, layers and precision. alignment: the run's. dataset: the run's.

    Raises:
        HasteError: the data are augmented, or there is no room.
    """
    if run.data.augment.flip or run.data.augment.moves:
        raise HasteError(
            "train.cache_teacher with data.augment: the teacher sees another image every time; possible: "
            "train.cache_teacher=false, or no augmentation"
        )
    teacher, blocks = alignment.teacher, list(alignment.teacher_blocks)
    precision = teacher.precision or run.train.precision
    data = run.data.model_dump(mode="json")
    decides = [data, len(dataset), run.teacher.model_dump(mode="json"), blocks, precision]
    folder = place / f"seen-{config.digest(decides)}"
    with locked(place / "seen.lock", "what the teacher sees", wait=True):
        if not folder.is_dir():
            _fill(folder, _parts(alignment, precision, dataset), blocks, len(dataset))
    return folder


def _fill(folder: Path, parts: Iterator[dict[str, np.ndarray]], blocks: list[int], count: int) -> None:
    """Fill a folder beside `folder`, and give it that name when it is whole."""
    first = next(parts)
    size = sum(prod(array.shape[1:]) * array.itemsize for array in first.values()) * count
    tqdm.write(f"the teacher's view of {count:,} images takes {size / GIB:.3f} GiB in {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise HasteError(
            f"train.cache_teacher needs {size / GIB:.2f} GiB in {folder.parent}, {free / GIB:.2f} are free; possible: "
            f"train.cache_teacher=false, or another HASTE_OUTPUT"
        )
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    arrays = {
        name: np.lib.format.open_memmap(unfinished / f"{name}.npy", "w+", array.dtype, (count, *array.shape[1:]))
        for name, array in first.items()
    }
    with tqdm(total=count, desc="teacher's view", unit="image", mininterval=1.0) as bar:
        for part in chain([first], parts):
            for name, array in part.items():
                arrays[name][bar.n : bar.n + len(array)] = array
            bar.update(len(part["tokens"]))
    for array in arrays.values():
        array.flush()
    write_json(unfinished / "facts.json", {"blocks": blocks, "images": count, "bytes": size})
    unfinished.rename(folder)


def _parts(alignment: Alignment, precision: str, dataset: Dataset) -> Iterator[dict[str, np.ndarray]]:
    """Arrays by name, of so many training images after the other."""
    unused = torch.Generator()  # without augmentation nothing that the teacher sees is drawn
    device, blocks = alignment.teacher.mean.device, alignment.teacher_blocks
    for indices in torch.arange(len(dataset)).split(READ_AT_ONCE):
        images = dataset.batch(indices, unused).images.to(device)
        with in_precision(precision, device):
            seen = alignment.teacher(images, blocks)
        found = [seen.tokens, *(part for block in blocks for part in seen.qk[block])]
        yield dict(zip(names(blocks), map(_plain, found), strict=True))


def _plain(values: Tensor) -> np.ndarray:
    values = values.contiguous().cpu()
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()
