"""What latents are prepared from and where: the job, its folder, and which shards of it are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from haste_core.errors import HasteError, InUse
from haste_core.files import locked
from haste_core.study.data.pairs import IMAGES, LATENTS


@dataclass(frozen=True)
class Job:
    """What is encoded, by what, to where.

    source: as `data.path` of kind images. split: its name in there. vae: hub name or folder. size: pixels of the
    square images. batch_size: images encoded at a time. device: "cpu", "cuda", "cuda:1", ...
    """

    source: str
    out: str
    vae: str
    size: int
    split: str = "train"
    batch_size: int = 32
    shard_size: int = 1000
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise HasteError(f"--{name.replace('_', '-')} {getattr(self, name)}; possible: 1 and above")

    @classmethod
    def read(cls, text: str) -> Job:
        """The job that `text` describes, from `write`."""
        return cls(**json.loads(text))

    def write(self) -> str:
        """The job as text for another process."""
        return json.dumps(asdict(self))


class Workspace:
    """The folder of a job: where shards go, and which of them are whole."""

    def __init__(self, job: Job) -> None:
        self.job, self.out = job, Path(job.out)
        self.work = self.out / ".work"
        self.manifest_path = self.out / "manifest.json"

    @property
    def settings_path(self) -> Path:
        """What the shards in here were made with."""
        return self.work / "settings.json"

    def folder(self, shard: int) -> str:
        """The name of a shard's sub-folder; with 1,000 images a shard, the first five digits of their numbers."""
        return f"{shard:05d}"

    def members(self, shard: int, count: int) -> range:
        """The images of a shard, of `count` in all."""
        return range(shard * self.job.shard_size, min(count, (shard + 1) * self.job.shard_size))

    def record_path(self, shard: int) -> Path:
        """Written last of all that belongs to a shard."""
        return self.work / f"{self.folder(shard)}.json"

    def is_whole(self, shard: int) -> bool:
        """True when a shard is complete on disk."""
        folders = (self.out / side / self.folder(shard) for side in (IMAGES, LATENTS))
        return self.record_path(shard).is_file() and all(folder.is_dir() for folder in folders)

    def record(self, shard: int) -> dict[str, Any]:
        """What was recorded of a whole shard."""
        return json.loads(self.record_path(shard).read_text())

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """True while this process alone may write a shard that is not whole; False where there is nothing to do."""
        try:
            held = locked(self.work / f"{self.folder(shard)}.lock", f"shard {self.folder(shard)}")
            held.__enter__()
        except InUse:
            yield False
            return
        try:
            yield not (self.manifest_path.is_file() or self.is_whole(shard))
        finally:
            held.__exit__(None, None, None)
