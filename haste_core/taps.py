"""Tokens, q and k read off the blocks of a transformer by hooks while its own forward pass runs.

Works for any model with a list of blocks; the model is not changed, and once the context is closed no hook is left.
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

    Args:
        blocks: the transformer's blocks in order. taps: what to read.
        read: for other attention: a function from a block to a module inside it, and one from that module's output to
            (q, k), each (B, H, N, d). The online angle of attention is known where the kernel's q and k come from these
            tensors themselves.

    Raises:
        HasteError: there is no such block, or q and k cannot be found in it.
    """
    seen, handles = Seen(), []
    count = len(blocks)
    for what, asked, possible in (
        ("block (from 0) to read q and k in", taps.blocks, range(count)),
        ("depth (from 1) to read tokens at", taps.depths, range(1, count + 1)),
    ):
        for index in asked:
            if index not in possible:
                raise unknown(what, index, possible)
    try:
        for depth in taps.depths:
            handles.append(blocks[depth - 1].register_forward_hook(partial(_keep_tokens, seen, depth)))
        for index in taps.blocks:
            handles.extend(_read_qk(blocks[index], seen.qk, index, read))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tapped(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, taps: Taps) -> Tapped:
    """One forward pass of a generator with `blocks`, and what `taps` asks for.

    Args:
        model: called as model(x, t, y). x, t, y: its input.
        taps: what to read.
    """
    with tap(model.blocks, taps) as seen:  # type: ignore[arg-type]
        output = model(x, t, y)
    return Tapped(output, seen.tokens, seen.qk)


def _keep_tokens(seen: Seen, depth: int, block: nn.Module, inputs: Any, output: Any) -> None:
    seen.tokens[depth] = output[-1] if isinstance(output, tuple | list) else output


def _read_qk(block: nn.Module, into: dict[int, QK], index: int, read: Reader | None) -> list[Any]:
    """Hooks on one block that leave its q and k in `into`."""
    parts: dict[str, Tensor] = {}

    # A hook returns the same values as the module, by way of the tensors it leaves: gradients of everything above pass
    # through these, which the online angle needs.
    def keep(name: str, shaped: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Tensor) -> Any:
        parts[name] = tensor = shaped(output)
        if len(parts) == 2:
            into[index] = parts.pop("q"), parts.pop("k")
        return None if tensor is output else _as_before(tensor, output)

    def keep_joint(heads: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        q, k, v = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        into[index] = q, k
        return torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).flatten(2)

    def keep_both(module: nn.Module, inputs: Any, output: Any) -> None:
        into[index] = read[1](output)  # type: ignore[index]

    if read is not None:
        return [read[0](block).register_forward_hook(keep_both)]
    attention = _attention(block)
    heads = next((getattr(attention, n) for n in ("num_heads", "heads", "n_heads") if hasattr(attention, n)), None)
    if _is_module(attention, "q_norm") and _is_module(attention, "k_norm"):
        sides = {side: (_child(attention, f"{side}_norm"), _whole) for side in "qk"}
    elif _is_module(attention, "to_q") and _is_module(attention, "to_k"):
        normed = all(_is_module(attention, f"norm_{side}") for side in "qk")
        sides = {
            side: (
                _child(attention, f"norm_{side}" if normed else f"to_{side}"),
                partial(_by_head, heads=int(heads or 1)),
            )
            for side in "qk"
        }
    elif _is_module(attention, "qkv") and heads is not None:
        return [_child(attention, "qkv").register_forward_hook(partial(keep_joint, int(heads)))]
    else:
        found = ", ".join(name for name, _ in block.named_modules() if name) or "none"
        raise HasteError(
            f"q and k cannot be read off a block of type {type(block).__name__} with the modules {found}; expected "
            f"attn with q_norm and k_norm, or with qkv and num_heads, or attn or attn1 with to_q and to_k; or give "
            f"read=(module_of_block, output_to_qk)"
        )
    return [module.register_forward_hook(partial(keep, side, shaped)) for side, (module, shaped) in sides.items()]


def _attention(block: nn.Module) -> Any:
    """The self-attention module of a block, or the block itself."""
    for name in ("attn", "attn1", "x_block.attn", "attention", "self_attn"):
        try:
            return block.get_submodule(name)
        except AttributeError:
            continue
    return block


def _child(module: Any, name: str) -> nn.Module:
    return module[name] if isinstance(module, nn.ModuleDict) else getattr(module, name)


def _is_module(module: Any, name: str) -> bool:
    inside = name in module if isinstance(module, nn.ModuleDict) else hasattr(module, name)
    return inside and isinstance(_child(module, name), nn.Module)


def _whole(output: Tensor) -> Tensor:
    return output


def _by_head(output: Tensor, heads: int) -> Tensor:
    """(B, N, H d), (B, N, H, d) or (B, H, N, d) as (B, H, N, d)."""
    if output.dim() == 3:
        return output.unflatten(-1, (heads, -1)).transpose(1, 2)
    return output.transpose(1, 2) if output.shape[1] != heads and output.shape[2] == heads else output


def _as_before(tensor: Tensor, like: Tensor) -> Tensor:
    """(B, H, N, d) in the shape that it had before `_by_head`."""
    back = tensor.transpose(1, 2)
    return back.flatten(2) if like.dim() == 3 else back
