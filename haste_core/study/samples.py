"""Large sets of images, drawn in shards that can be divided among processes, and merged into one .npz file.

    FOLDER/manifest.json        everything that affects the pixels; a folder with another manifest is refused
    FOLDER/shards/00000.npy     uint8 (shard size, S, S, C), complete or absent
    FOLDER/samples.npz          all images, in the format of ADM's tools

Process r of n draws the shards r, r + n, r + 2n, ... that are absent. Each image depends on its own label and seed
alone and shards are cut into batches from their own start, so neither the number of processes nor interruptions change
a byte.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from haste_core.errors import HasteError, Interrupted
from haste_core.files import atomic, locked, write_json
from haste_core.models import DiffusionTransformer
from haste_core.sampling import draw as sample
from haste_core.sampling import sample_labels, to_uint8
from haste_core.study import config, signals
from haste_core.study.data.base import mapped_images, parts
from haste_core.study.images import NpzImages
from haste_core.study.latents import check_same, drawing_facts, to_images
from haste_core.study.runs import Run

# A function of labels (b,) and their seeds that returns uint8 images (b, C, S, S).
Draw = Callable[[Tensor, range], Tensor]


def plan(
    run: Run, step: int, checkpoint: str, classes: int, n: int, first_seed: int, shard_size: int
) -> dict[str, Any]:
    """The manifest of `n` images of a run: everything that decides their pixels, and their origin.

    checkpoint: fingerprint of the weights. classes: number of labels. first_seed: image i has seed first_seed + i.
    """
    return {
        **drawing_facts(run.study.data, run.sample),
        "from": f"{run.study.name} {run.arm} seed {run.seed} step {step}",
        "checkpoint": checkpoint,
        "classes": classes,
        "labels": run.study.evaluate.labels,
        "n": n,
        "first_seed": first_seed,
        "shard_size": shard_size,
    }


def drawer(
    model: DiffusionTransformer, data: config.DataSettings, how: config.SampleSettings, progress: str | None = None
) -> Draw:
    """A function that draws uint8 images (b, C, S, S) from a generator of `data`, decoded where these are latents."""

    def draw(labels: Tensor, seeds: range) -> Tensor:
        return to_uint8(to_images(sample(model, labels, seeds, how.options, progress), data, how))

    return draw


class SampleSet:
    """A folder of images under its manifest; `n`, `shard_size`, `labels`, `classes` and `first_seed` are part of it.

    Raises:
        HasteError: the folder holds another set or other files.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, dict(manifest)
        self.n = int(manifest["n"])
        self.shards = parts(range(self.n), int(manifest["shard_size"]))
        path = folder / "manifest.json"
        others = [folder] if folder.is_file() else [p for p in folder.glob("*") if not p.name.startswith(".")]
        if others and not path.is_file():  # another process may have begun meanwhile
            raise HasteError(f"{others[0]} is in the way; expected a new or an empty folder")
        if not path.is_file():
            write_json(path, self.manifest)
        # Equal weights may come from several arms.
        check_same(folder, read_manifest(folder), self.manifest, free=("from",))

    @property
    def merged(self) -> Path:
        """Path of the finished set."""
        return self.folder / "samples.npz"

    def labels(self) -> Tensor:
        """The label (n,) of every image."""
        return sample_labels(self.n, self.manifest["classes"], self.manifest["labels"], self.manifest["first_seed"])

    def paths(self) -> list[Path]:
        """Every shard, whether it is there or not."""
        return [self.folder / "shards" / f"{i:05d}.npy" for i in range(len(self.shards))]

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        return [i for i, path in enumerate(self.paths()) if not path.is_file()]

    def drawn(self) -> int:
        """Number of images in finished shards."""
        return self.n - sum(len(self.shards[i]) for i in self.missing())

    def fill(self, draw: Draw, batch_size: int, progress: str | None = None, rank: int = 0, processes: int = 1) -> None:
        """Draw the missing shards of process `rank` out of `processes`.

        Raises:
            Interrupted: SIGTERM or SIGINT arrived; complete shards are kept, the unfinished one is not.
            HasteError: an existing shard is damaged, or images cannot be drawn.
        """
        mine, paths, labels = range(len(self.shards))[rank::processes], self.paths(), self.labels()
        size, first_seed = sum(len(self.shards[i]) for i in mine), self.manifest["first_seed"]
        with (
            signals.catch() as stopping,
            tqdm(total=size, desc=progress, unit="image", disable=progress is None, mininterval=1.0) as bar,
        ):
            for index in mine:
                if paths[index].is_file():
                    bar.update(len(self._shard(index)))
                    continue
                drawn = []
                for batch in parts(self.shards[index], batch_size):
                    if stopping.is_set():
                        done = f"{self.drawn()} of {self.n} images are drawn"
                        raise Interrupted(f"{self.folder}: {done}; run again to go on")
                    seeds = range(first_seed + batch.start, first_seed + batch.stop)
                    try:
                        images = draw(labels[batch.start : batch.stop], seeds)
                    except HasteError as error:
                        raise HasteError(f"{self.manifest.get('from', self.folder)}: {error}") from error
                    drawn.append(images.permute(0, 2, 3, 1))
                    bar.update(len(batch))
                with atomic(paths[index]) as temporary, temporary.open("wb") as stream:
                    np.save(stream, torch.cat(drawn).contiguous().numpy(), allow_pickle=False)

    def _shard(self, index: int) -> np.ndarray:
        """The images (k, S, S, C) of a shard, mapped from its file."""
        return mapped_images(self.paths()[index], len(self.shards[index]))

    def __len__(self) -> int:
        return self.n

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order, uint8 (at most `size`, C, S, S), read from the shards."""
        for index in range(len(self.shards)):
            for part in torch.from_numpy(self._shard(index)).split(size):
                yield part.clone().permute(0, 3, 1, 2)

    def merge(self, path: Path, channels: int | None = None) -> None:
        """Write all shards into one .npz file, a shard at a time: arr_0 uint8 (n, S, S, C) and labels (n,) int64.

        Args:
            path: the file. channels: 3 repeats grey images, as ADM's tools want them; None leaves them as they are.
        """
        with locked(self.folder / "merge.lock", f"the merging of {self.folder}", wait=True):
            if self._is_merged(path, channels):
                return
            first = self._shard(0)
            shape = (self.n, *first.shape[1:3], channels or first.shape[3])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                # ZipInfo's own date makes equal sets equal files.
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                    np.lib.format.write_array_header_1_0(stream, header)
                    for index in range(len(self.shards)):
                        images = self._shard(index)
                        stream.write(np.broadcast_to(images, (len(images), *shape[1:])).tobytes())
                with archive.open(zipfile.ZipInfo("labels.npy"), "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, self.labels().numpy(), allow_pickle=False)

    def _is_merged(self, path: Path, channels: int | None) -> bool:
        """True when `path` holds so many images and is newer than every shard, which may be deleted by then."""
        try:
            shape = NpzImages(path).shape
        except HasteError:
            return False  # missing, or something else, which is replaced
        if shape[0] != self.n or channels not in (None, shape[3]):
            return False
        return all(p.stat().st_mtime_ns <= path.stat().st_mtime_ns for p in self.paths() if p.is_file())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of samples.

    Raises:
        HasteError: there is none, or it cannot be read.
    """
    path = folder / "manifest.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise HasteError(f"{path} cannot be read; expected a folder that haste sample made") from error
