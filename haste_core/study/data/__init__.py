"""Data sets with one interface, `base.Dataset`."""

from __future__ import annotations

from haste_core.study import config
from haste_core.study.data.base import Batch, Batches, Dataset, Digits

__all__ = ["Batch", "Batches", "Dataset", "open_dataset"]


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
