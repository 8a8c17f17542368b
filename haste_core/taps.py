"""Tokens, q and k read off the blocks of a transformer by hooks while its own forward pass runs.

Works for any model with a list of blocks; the model is not changed, and no hook is left once the context is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from haste_core.errors import HasteError, unknown

QK = tuple[Tensor, Tensor]
# (block to a module inside it, output of that module to (q, k)), for attention that is not known here.
Reader = tuple[Callable[[nn.Module], nn.Module], Callable[[Any], QK]]


@dataclass(frozen=True)
class Taps:
    """Tokens, q and k to read: tokens after the blocks at `depths` (from 1), q and k in `blocks` (from 0)."""

    depths: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()


@dataclass
class Seen:
    """Tokens (B, N, D) by depth (from 1), and q, k (B, H, N, d) by block (from 0), of the last forward pass."""

    tokens: dict[int, Tensor] = field(default_factory=dict)
    qk: dict[int, QK] = field(default_factory=dict)


class Tapped(NamedTuple):
    """Output of a model with the tokens (B, N, D) by depth and q, k (B, H, N, d) by block behind it."""

    output: Tensor
    tokens: dict[int, Tensor]
    qk: dict[int, QK]


@contextmanager
def tap(blocks: Sequence[nn.Module], taps: Taps, read: Reader | None = None) -> Iterator[Seen]:
    """Context in which forward passes through `blocks` leave tokens, q and k in the `Seen` it yields.

    q and k are those that the attention kernel gets, before the scale 1 / sqrt(d), with their graph. Known blocks:
    attention as `attn` (or `x_block.attn`) with `q_norm` and `k_norm` on (B, H, N, d), as in timm and this package, or
    with `qkv` alone; diffusers' `Attention` as `attn` or `attn1` with `to_q` and `to_k`. Tokens are a block's output,
    of several outputs the last (the image's in joint blocks).

    read: for other attention: a function from a block to a module inside it, and one from that module's output to
    (q, k), each (B, H, N, d). The online angle of attention is known where the kernel's q and k come from these tensors
    themselves.

    Raises:
        HasteError: there is no such block, or q and k cannot be found in it.
    """
    count = len(blocks)
    for what, asked, known in (
        ("block (from 0) to read q and k in", taps.blocks, range(count)),
        ("depth (from 1) to read tokens at", taps.depths, range(1, count + 1)),
    ):
        for index in asked:
            if index not in known:
                raise unknown(what, index, known)
    seen, handles = Seen(), []

    def keep_tokens(depth: int, block: nn.Module, inputs: Any, output: Any) -> None:
        seen.tokens[depth] = output[-1] if isinstance(output, tuple | list) else output

    try:
        for depth in taps.depths:
            handles.append(blocks[depth - 1].register_forward_hook(partial(keep_tokens, depth)))
        for index in taps.blocks:
            handles.extend(_read_qk(blocks[index], seen.qk, index, read))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tapped(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, taps: Taps) -> Tapped:
    """One forward pass model(x, t, y) of a generator with `blocks`, and what `taps` asks for."""
    with tap(model.blocks, taps) as seen:  # type: ignore[arg-type]
        output = model(x, t, y)
    return Tapped(output, seen.tokens, seen.qk)


def _read_qk(block: nn.Module, into: dict[int, QK], index: int, read: Reader | None) -> list[Any]:
    parts: dict[str, Tensor] = {}

    # A hook returns the same values as the module, by way of the tensors it leaves: gradients of everything above pass
    # through these, which the online angle needs.
    def keep(side: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        parts[side] = tensor = _by_head(output, heads)
        if len(parts) == 2:
            into[index] = parts.pop("q"), parts.pop("k")
        if tensor is output:
            return output
        back = tensor.transpose(1, 2)
        return back.flatten(2) if output.dim() == 3 else back

    def keep_joint(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        q, k, v = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        into[index] = q, k
        return torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).flatten(2)

    def keep_both(module: nn.Module, inputs: Any, output: Any) -> None:
        into[index] = read[1](output)  # type: ignore[index]

    if read is not None:
        return [read[0](block).register_forward_hook(keep_both)]
    attention = _attention(block)
    modules = dict(attention.named_children())
    heads = next((int(getattr(attention, n)) for n in ("num_heads", "heads", "n_heads") if hasattr(attention, n)), None)
    for names in (("q_norm", "k_norm"), ("norm_q", "norm_k"), ("to_q", "to_k")):
        if modules.keys() >= set(names):
            return [modules[n].register_forward_hook(partial(keep, s)) for n, s in zip(names, "qk", strict=True)]
    if "qkv" in modules and heads is not None:
        return [modules["qkv"].register_forward_hook(keep_joint)]
    found = ", ".join(name for name, _ in block.named_modules() if name) or "none"
    raise HasteError(
        f"q and k cannot be read off a block of type {type(block).__name__} with the modules {found}; expected "
        f"attn with q_norm and k_norm, or with qkv and num_heads, or attn or attn1 with to_q and to_k; or give "
        f"read=(module_of_block, output_to_qk)"
    )


def _attention(block: nn.Module) -> nn.Module:
    """The self-attention module of a block, or the block itself."""
    modules = dict(block.named_modules())
    names = ("attn", "attn1", "x_block.attn", "attention", "self_attn")
    return next((modules[name] for name in names if name in modules), block)


def _by_head(output: Tensor, heads: int | None) -> Tensor:
    """(B, N, H d), (B, N, H, d) or (B, H, N, d) as (B, H, N, d)."""
    if output.dim() == 3:
        return output.unflatten(-1, (heads or 1, -1)).transpose(1, 2)
    return output.transpose(1, 2) if output.shape[1] != heads and output.shape[2] == heads else output
