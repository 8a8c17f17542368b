"""torch.compile of a generator, block by block: blocks of one kind share one graph, so that compiling takes seconds.

Blocks whose q and k are read run uncompiled in phase I. From the switch on they use the graph of the others, so the
switch compiles nothing where there are others. Numbers are those of uncompiled blocks but for rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager

import torch
from torch import nn

from haste_core.errors import HasteError
from haste_core.models import DiffusionTransformer


def compile_blocks(model: DiffusionTransformer, leave: Collection[int] = ()) -> None:
    """Let the blocks of `model` be compiled at their next forward pass, in place; names of weights stay.

    Args:
        model: the generator. leave: blocks, from 0, that are not compiled.

    Raises:
        HasteError: this machine has no compiler that torch could use.
    """
    check_compiler(next(model.buffers()).device)
    for index, block in enumerate(model.blocks):
        if index not in leave and not is_compiled(block):
            # The forward alone: hooks on the block, which read its tokens, stay outside the graph.
            block.forward = torch.compile(block.forward)


def is_compiled(block: nn.Module) -> bool:
    """True when `compile_blocks` has been here."""
    return "forward" in vars(block)


def uncompiled() -> AbstractContextManager[object]:
    """While open, compiled blocks run as they were written: for passes that ask more of a graph than training does."""
    return torch.compiler.set_stance("force_eager")


def check_compiler(device: torch.device) -> None:
    """Raise HasteError where torch.compile lacks what it needs: a C++ compiler on a CPU, Triton on a GPU."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise HasteError("compile=true needs a C++ compiler; install g++, or compile=false") from error
    else:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise HasteError("compile=true needs Triton on this GPU; install triton, or compile=false")
