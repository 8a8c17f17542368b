"""The processes that train one run together: how a step's images are divided among them."""

from __future__ import annotations

from haste_core import config
from haste_core.errors import HasteError


def micro_batches(train: config.Train, processes: int = 1) -> list[slice]:
    """Where in one process's share of a step's images each of its micro-batches lies; all are equally large.

    Raises:
        HasteError: the images cannot be divided equally.
    """
    size, rest = divmod(train.batch_size, processes * train.accumulate)
    if rest:
        share = train.batch_size // processes if train.batch_size % processes == 0 else 0
        counts = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise HasteError(
            f"train.batch_size {train.batch_size} cannot go through {processes} process(es) in {train.accumulate} "
            f"equal micro-batches each; possible: a multiple of {processes * train.accumulate} for train.batch_size"
            + (f", or {counts} for train.accumulate" if counts else "")
        )
    return [slice(i * size, (i + 1) * size) for i in range(train.accumulate)]
