"""Data sets with one interface, `base.Dataset`."""

from __future__ import annotations

import json
from pathlib import Path

from haste_core.errors import HasteError
from haste_core.files import write_json
from haste_core.study import config
from haste_core.study.data.base import Batch, Batches, Dataset, Digits

__all__ = ["Batch", "Batches", "Dataset", "check_unchanged", "open_dataset"]


def open_dataset(data: config.DataSettings) -> Dataset:
    """The data set of a study.

    Raises:
        HasteError: it is missing or cannot be read.
    """
    if data.kind == "digits":
        return Digits(data)
    if data.kind == "images":
        from haste_core.study.data.images import Images

        return Images(data)
    from haste_core.study.data.latents import Latents

    return Latents(data)


def check_unchanged(folder: Path, data: config.DataSettings, begun: bool) -> None:
    """Keep what the data are in FOLDER/data.json, and compare it with what is kept there once work has begun.

    Raises:
        HasteError: images, labels or classes are other ones than those that the work in `folder` began with.
    """
    now, path = open_dataset(data).identity(), folder / "data.json"
    before = json.loads(path.read_text()) if begun and path.is_file() else now
    if before != now:
        counts = (f"{facts['images']:,} images in {facts['classes']:,} classes" for facts in (before, now))
        raise HasteError(
            f"data {data.path} changed since {folder} was begun: {' before, '.join(counts)} now"
            f"{'' if before['images'] != now['images'] else ', of other content'}; expected the same data; give the "
            f"new ones another data.path, or remove {folder}"
        )
    if now:
        write_json(path, now)
