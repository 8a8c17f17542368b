"""Shards of prepared latents: what one is, who may write it, and how it is written.

Work is divided into shards, sub-folders of `shard_size` images. A shard is written to a temporary folder, renamed
when it is whole and then recorded, so a stop loses at most one shard of each process. What is in a shard depends on
the images, the VAE and the settings alone: not on the number of processes, nor on interruptions.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from haste_core.errors import HasteError, is_disk_full
from haste_core.files import write_json
from haste_core.study.data.images import Split, load_splits, pick_split
from haste_core.study.data.latents import Posterior
from haste_core.study.data.pairs import IMAGES, LATENTS, name_of
from haste_core.study.data.resize import to_signed
from haste_core.study.latents.workspace import Job, Workspace

_PACKAGES = ("torch", "diffusers", "datasets", "numpy", "pillow")


class Stopped(Exception):
    """A shard was left unfinished on request."""


class Encoder:
    """The source and the VAE of a job, each opened at first use."""

    def __init__(self, job: Job) -> None:
        self.job, self.space = job, Workspace(job)

    @cached_property
    def split(self) -> Split:
        """The source's images and labels."""
        job = self.job
        return Split(pick_split(load_splits(job.source), job.split, job.source), job.size, job.source)

    @cached_property
    def vae(self) -> Any:
        """The VAE on the job's device."""
        from haste_core.study.latents import vae

        return vae.load(self.job.vae, self.job.device)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.split.labels)

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(-(-self.count // self.job.shard_size))

    def settings(self) -> dict[str, Any]:
        """Everything that decides what the folder will hold, under the manifest's names."""
        vae, job, labels = self.vae, self.job, self.split.labels
        if job.size % vae.factor:
            raise HasteError(f"--size {job.size}; possible with VAE {job.vae}: multiples of {vae.factor}")
        side = job.size // vae.factor
        return {
            "count": self.count,
            "image_size": job.size,
            "latent_shape": [vae.channels, side, side],
            "classes": max(self.split.classes, int(labels.max()) + 1),
            "class_names": self.split.class_names,
            "vae": {"name": vae.name, "fingerprint": vae.fingerprint, "scale": vae.scale, "shift": vae.shift},
            "source": {
                "path": job.source,
                "split": job.split,
                "labels": labels_hash(labels),
            },
            "shard_size": job.shard_size,
            "versions": {package: version(package) for package in _PACKAGES},
        }

    def work(self, stopping: Callable[[], bool], progress: Callable[[int], None]) -> bool:
        """Encode every shard that is neither whole nor claimed by another process; False when told to stop.

        progress: called with the number of images done in the present shard.
        """
        for shard in self.shards:
            if self.space.is_whole(shard):
                continue
            with self.space.claim(shard) as free:
                if stopping():
                    return False
                if not free:
                    continue
                try:
                    self.encode(shard, stopping, progress)
                except Stopped:
                    return False
        return True

    def encode(self, shard: int, stopping: Callable[[], bool], progress: Callable[[int], None]) -> None:
        """Write one shard, whole or not at all.

        Raises:
            Stopped: `stopping` became true. HasteError: an image cannot be read, or the VAE gives no numbers.
        """
        space, folder = self.space, self.space.folder(shard)
        temporary = space.work / f"{folder}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        try:
            for side in (IMAGES, LATENTS):
                (temporary / side).mkdir(parents=True)
            record = self._fill(temporary, space.members(shard, self.count), stopping, progress)
            for side in (IMAGES, LATENTS):
                final = space.out / side / folder
                final.parent.mkdir(exist_ok=True)
                if final.exists():  # of a process that was killed before it recorded the shard
                    shutil.rmtree(final)
                (temporary / side).rename(final)
            write_json(space.record_path(shard), {"folder": folder, **record})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _fill(
        self, folder: Path, members: range, stopping: Callable[[], bool], progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Write a shard's files; reading ahead, encoding and writing overlap."""
        parts = [members[i : i + self.job.batch_size] for i in range(0, len(members), self.job.batch_size)]
        sums = torch.zeros(2, self.vae.channels, dtype=torch.float64)
        written: dict[str, list[Future[bytes]]] = {IMAGES: [], LATENTS: []}
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(4) as writer:
            ahead = reader.submit(self.split.decode, parts[0])
            for i, part in enumerate(parts):
                pixels = ahead.result()
                if stopping():
                    raise Stopped
                if i + 1 < len(parts):
                    ahead = reader.submit(self.split.decode, parts[i + 1])
                posterior = self.vae.encode(to_signed(pixels), len(part))
                sums += moments(posterior, part)
                for j, index in enumerate(part):
                    array = torch.cat([posterior.mean[j], posterior.std[j]]).numpy()
                    written[IMAGES].append(writer.submit(_write, folder / IMAGES / _file(IMAGES, index), pixels[j]))
                    written[LATENTS].append(writer.submit(_write, folder / LATENTS / _file(LATENTS, index), array))
                progress(part.stop - members.start)
            hashes = {
                side: combined((_file(side, i), f.result()) for i, f in zip(members, written[side], strict=True))
                for side in (IMAGES, LATENTS)
            }
        return {"count": len(members), "images": hashes[IMAGES], "latents": hashes[LATENTS], "sums": sums.tolist()}


def moments(posterior: Posterior, which: range) -> Tensor:
    """Sums over images and positions of E[z] and E[z^2] for latents z drawn from their posteriors, (2, C) float64.

    Raises:
        HasteError: a value is not finite.
    """
    mean, std = posterior.mean.double(), posterior.std.double()
    found = torch.stack([mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))])
    if not found.isfinite().all():
        raise HasteError(f"the VAE gives no finite latents for the images {which.start} to {which.stop - 1}")
    return found


def _file(side: str, index: int) -> str:
    return name_of(side, f"{index:08d}")


def _write(path: Path, content: Tensor | np.ndarray) -> bytes:
    """Write an image (3, S, S) or an array, and return the SHA-256 of the file."""
    stream = io.BytesIO()
    if isinstance(content, Tensor):
        picture = Image.fromarray(content.permute(1, 2, 0).contiguous().numpy())
        # Fast to write and to read in training; a higher level saves a few percent of the space.
        picture.save(stream, format="PNG", compress_level=1)
    else:
        np.save(stream, content, allow_pickle=False)
    try:
        path.write_bytes(stream.getvalue())
    except OSError as error:
        if is_disk_full(error):
            raise HasteError(f"no room to write {path} ({error}); whole shards are intact, free some space and run "
                             f"again") from error  # fmt: skip
        raise
    return hashlib.sha256(stream.getvalue()).digest()


def labels_hash(labels: Tensor) -> str:
    """Hash of labels (n,) int64 in order."""
    return hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]


def combined(files: Iterable[tuple[str, bytes]]) -> str:
    """One SHA-256 over names and the SHA-256 of each file, in order."""
    sha = hashlib.sha256()
    for name, digest in files:
        sha.update(name.encode() + b"\0" + digest)
    return sha.hexdigest()
