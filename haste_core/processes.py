"""The processes that train one run together, started by a launcher (torchrun, accelerate launch): a single one is a
group of one, in which nothing here has an effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed

from haste_core.errors import HasteError

T = TypeVar("T")
# Time that the others wait while the main process works alone (trains a teacher, writes a checkpoint). If it dies they
# learn of it at once.
PATIENCE = timedelta(hours=6)


# accelerate's own variables: those that move no number (and of them the truth values), and those that ask for what is
# not there.
HARMLESS = {
    "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_CPU_AFFINITY", "ACCELERATE_ENABLE_RICH",
}  # fmt: skip
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")
UNSUPPORTED = tuple(f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"))


class Processes:
    """The group that this process trains in: `count` of them, numbered by `index`; number 0 is the main one.

    Messages go by gloo beside the gradients' own way, so they never wait for a GPU.
    """

    def __init__(self) -> None:
        _check_environment()
        # accelerate takes processes without GPUs for single ones unless it is told that the CPU is meant, and a single
        # one that has a LOCAL_RANK for one of several.
        several_on_cpu = launched() > 1 and not torch.cuda.is_available()
        with _without(["LOCAL_RANK"] if launched() == 1 else []):
            environment = PartialState(cpu=several_on_cpu or flag("ACCELERATE_USE_CPU"))
        self.count: int = environment.num_processes
        self.index: int = environment.process_index
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        return self.index == 0

    def any(self, flag: bool) -> bool:
        """True in every process when `flag` is true in one of them."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag))
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self._group)
        return bool(found)

    def mean(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the processes of tensors that all of them have by the same names, each where it was."""
        if self.count == 1:
            return dict(tensors)
        means = {}
        for name in sorted(tensors):
            total = tensors[name].detach().to("cpu", copy=True)
            distributed.all_reduce(total, group=self._group)
            means[name] = (total / self.count).to(tensors[name].device)
        return means

    def from_main(self, action: Callable[[], T]) -> T:
        """Result of `action`, called in the main process alone; all processes get it, or raise its HasteError."""
        if self.count == 1:
            return action()
        sent: list[Any] = [None, None]
        if self.is_main:
            try:
                sent[0] = action()
            except HasteError as error:
                sent[1] = error
        distributed.broadcast_object_list(sent, src=0, group=self._group)
        if sent[1] is not None:
            raise sent[1]
        return sent[0]

    def share(self, batch_size: int) -> slice:
        """This process's part of the images of a global batch."""
        (part,) = micro_batches(batch_size, 1, self.count)
        return slice(self.index * part.stop, (self.index + 1) * part.stop)

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1:
            PartialState().destroy_process_group()


@contextmanager
def own_settings() -> Iterator[None]:
    """Context in which accelerate sees no settings of the environment: what changes numbers is given as arguments.

    Raises:
        HasteError: the environment asks for a way of training in parallel that is not supported.
    """
    for name in UNSUPPORTED:
        if flag(name):
            raise HasteError(f"{name} is set; expected plain data parallel training, as by torchrun")
    with _without([name for name in os.environ if name.startswith("ACCELERATE_") and name not in HARMLESS]):
        yield


@contextmanager
def _without(names: Iterable[str]) -> Iterator[None]:
    """Context without these variables of the environment."""
    aside = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(aside)


def flag(name: str) -> bool:
    """The truth value of a variable of the environment, False where it is not set; raises HasteError for others."""
    try:
        return parse_flag_from_env(name)
    except ValueError as error:
        raise HasteError(f"{name} is {os.environ[name]!r}; expected true or false, or no such variable") from error


def _number(name: str, default: int = 0) -> int:
    """The number in a launcher's variable of the environment."""
    given = os.environ.get(name, str(default))
    if not (given.isascii() and given.isdecimal()):
        raise HasteError(f"{name} is {given!r}; expected a number, as torchrun sets it, or no such variable")
    return int(given)


def _check_environment() -> None:
    """Raise HasteError where the variables of a launcher or of accelerate do not name processes and devices here."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launched() > 1 and missing and not distributed.is_initialized():
        raise HasteError(
            f"WORLD_SIZE is {launched()}, and these are not set: {', '.join(missing)}; expected all of them, as "
            f"torchrun sets them, or none"
        )
    rank(), local_rank(), _number("MASTER_PORT")
    for name in FLAGS:
        flag(name)
    device = os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu")
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise HasteError(
            f"ACCELERATE_TORCH_DEVICE is {device!r}, no device of this machine; expected cpu, cuda or cuda:N with "
            f"{torch.cuda.device_count()} GPUs here, or no such variable"
        ) from error


def launched() -> int:
    """Number of processes that a launcher started, this one included; 1 without. HasteError for another WORLD_SIZE."""
    count = _number("WORLD_SIZE", 1)
    if count < 1:
        raise HasteError(f"WORLD_SIZE is {count}; expected 1 and above, or no such variable")
    return count


def rank() -> int:
    """The number of this process among those that a launcher started; 0 without. HasteError for another RANK."""
    number = _number("RANK")
    if number >= launched():
        raise HasteError(
            f"RANK is {number} and WORLD_SIZE {os.environ.get('WORLD_SIZE', 'is not set')}; expected RANK below "
            f"WORLD_SIZE, as torchrun sets them, or neither"
        )
    return number


def local_rank() -> int:
    """The number of this process on its machine; its `rank` where a launcher does not say."""
    return _number("LOCAL_RANK", rank())


def micro_batches(batch_size: int, accumulate: int, processes: int) -> list[slice]:
    """Equal micro-batches of one process's share of a global batch, as slices of it; HasteError if there are none."""
    if processes < 1:
        raise HasteError(f"{processes} processes; expected 1 or more")
    size, rest = divmod(batch_size, processes * accumulate)
    if not rest:
        return [slice(i * size, (i + 1) * size) for i in range(accumulate)]
    share = batch_size // processes if batch_size % processes == 0 else 0
    counts = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
    raise HasteError(
        f"train.batch_size {batch_size} cannot go through {processes} process(es) in {accumulate} equal micro-batches "
        f"each; expected a multiple of {processes * accumulate} for train.batch_size"
        + (f", or {counts} for train.accumulate" if counts else "")
    )
