"""A run's weights, gradients, optimizer states and average divided among its processes (`train.sharded`).

torch's `fully_shard` does it, block by block: what one block needs is put together for the time it takes. Everything
here takes modules and tensors that are not divided, too, and leaves them as they are; so there is one way to train,
save and restore.

accelerate keeps precision, optimizers and clipping. Its own plugin for this is not used: it is one setting of the whole
process, takes blocks by class name for one model at a time, clips without the projector, and has no place for a second
set of weights that is never trained.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

M = TypeVar("M", bound=nn.Module)
# What a divided module was before, without its weights: a divided one cannot be copied.
_SHAPES: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def mesh_of(processes: int, device: torch.device) -> DeviceMesh:
    """All processes in a row, each with its own device of the kind of `device`; all of them call this together."""
    return init_device_mesh(device.type, (processes,))


def divide(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Leave in each process its part of a module's weights, on the mesh's device; units are `blocks` and the rest.

    The weights are the same in all processes before, on any device; only one unit of them is whole on the mesh's device
    at a time.
    """
    # Blocks hand out q and k, which are views; nothing writes into them, which is all that torch warns of here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()
    }
    _SHAPES[module] = copy.deepcopy(module, empty)
    for unit in (*blocks, module):
        fully_shard(unit, mesh=mesh)


@contextmanager
def unsynchronised(module: nn.Module) -> Iterator[None]:
    """While open, each process adds up whole gradients of a divided module by itself."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def together(tensor: Tensor) -> Tensor:
    """A divided tensor whole, on its device in every process; all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Divided tensors put together on the CPU, the others as they are; all processes call this together.

    keep: True in the process that wants them; elsewhere divided tensors are left out, so that there is one copy.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            # One at a time: a device never holds more than one of them whole.
            complete = together(tensor.detach())
            if keep:
                found[name] = complete.cpu()
        else:
            found[name] = tensor
    return found


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor where `like` is divided, in the same way; otherwise the tensor itself."""
    if not isinstance(like, DTensor):
        return tensor
    # Every process has the whole tensor: nothing is sent. What is cut out of it would keep all of it in memory.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module its state from whole tensors by name.

    Raises:
        RuntimeError: names or shapes are not the module's.
    """
    own = module.state_dict()
    module.load_state_dict({name: part(t, own[name]) if name in own else t for name, t in tensors.items()})


def in_one_piece(module: M, keep: bool) -> M:
    """A module that runs in one process alone, on its device: an undivided copy, or the module where it is undivided.

    All processes call this together. keep: True in the process that runs it; the others get the module as it came.
    """
    if module not in _SHAPES:
        return module
    tensors = whole(module.state_dict(), keep)
    if not keep:
        return module
    twin = copy.deepcopy(_SHAPES[module])
    twin.load_state_dict(tensors, assign=True)
    return twin.to(next(module.parameters()).device)  # type: ignore[return-value]
