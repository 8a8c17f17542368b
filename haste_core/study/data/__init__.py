"""Data sets with one interface, `base.Dataset`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haste_core.errors import HasteError, number_of
from haste_core.files import write_json
from haste_core.study import config
from haste_core.study.data.base import Batch, Batches, Dataset, Digits, Mnist
from haste_core.study.data.latents import Latents
from haste_core.study.data.scenes import Scenes

__all__ = ["Batch", "Batches", "Dataset", "check_same", "check_unchanged", "open_dataset"]


def open_dataset(data: config.DataSettings) -> Dataset:
    """The data set of a study; raises HasteError where it is missing or cannot be read."""
    if data.kind == "digits":
        return Digits(data)
    if data.kind == "mnist":
        return Mnist(data)
    if data.kind == "latents":
        return Latents(data)
    if data.has_scenes:
        return Scenes(data)
    # With Hugging Face's data sets, or with pandas, which take seconds to import.
    if data.kind == "captions":
        from haste_core.study.data.captions import CaptionedImages

        return CaptionedImages(data)
    if data.kind == "textured":
        from haste_core.study.data.textured import Textured

        return Textured(data)
    from haste_core.study.data.images import Images

    return Images(data)


def check_unchanged(folder: Path, data: config.DataSettings, begun: bool) -> None:
    """Keep what the data are in FOLDER/data.json; once work has begun, `check_same` with what is kept there."""
    now = open_dataset(data).identity()
    if begun:
        check_same(folder, data, now)
    if now:
        write_json(folder / "data.json", now)


def check_same(folder: Path, data: config.DataSettings, now: Mapping[str, Any]) -> None:
    """Compare the identity of the data with FOLDER/data.json, if it is there, in the facts that are kept there.

    Raises HasteError where images, labels or classes are other ones than those that the work in `folder` began with.
    """
    path = folder / "data.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    if any(now.get(fact) != before[fact] for fact in before):
        counts = (
            f"{number_of(facts['images'], 'image')} in {number_of(facts['classes'], 'class')}"
            for facts in (before, now)
        )
        raise HasteError(
            f"data {data.path} changed since {folder} was begun: {' before, '.join(counts)} now"
            f"{'' if before['images'] != now['images'] else ', of other content or names'}; expected the same data; "
            f"give the new ones another data.path, or remove {folder}"
        )
