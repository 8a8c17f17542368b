"""Device, autocast precision, and torch.compile of a generator block by block.

Blocks of one kind share one graph, so that compiling takes seconds. Blocks whose q and k are read run uncompiled in
phase I; from the switch on they use the graph of the others. Numbers are those of uncompiled blocks but for rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager

import torch

from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context with autocast of "bf16" or "fp16", or without any for "no"."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def exact() -> AbstractContextManager[object]:
    """Context in which cuDNN takes deterministic kernels and real float32, where it takes TF32 by default."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def compile_blocks(model: DiffusionTransformer, leave: Collection[int] = ()) -> None:
    """Let the blocks of `model` but those in `leave` (from 0) be compiled at their next forward pass, in place."""
    check_compiler(next(model.buffers()).device)
    for index, block in enumerate(model.blocks):
        if index not in leave and "forward" not in vars(block):
            # The forward alone: hooks on the block, which read its tokens, stay outside the graph.
            block.forward = torch.compile(block.forward)


def check_compiler(device: torch.device) -> None:
    """Raise HasteError where torch.compile lacks what it needs: a C++ compiler on a CPU, Triton on a GPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type != "cpu" and not has_triton():
        raise HasteError("compile=true needs Triton on this GPU; install triton, or set compile=false")
    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise HasteError("compile=true needs a C++ compiler; install g++, or set compile=false") from error
