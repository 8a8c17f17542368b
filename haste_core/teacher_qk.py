"""q and k of a timm transformer's blocks, read by hooks while its own forward pass runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haste_core.errors import HasteError, unknown
from haste_core.models.layers import QK

from timm.layers import Attention, AttentionRope, apply_rot_embed_cat  # isort: skip
from timm.models.eva import EvaAttention  # isort: skip

# Attention modules read here by their layout; another kind, even one derived from these, may do more.
PLAIN = (Attention, AttentionRope, EvaAttention)


@contextmanager
def read_qk(encoder: nn.Module, blocks: tuple[int, ...]) -> Iterator[dict[int, QK]]:
    """While open, forward passes of a timm transformer leave q and k (B, H, patches, d) of `blocks` in the dict.

    The values are those the attention kernel sees: after q/k norm and rotary embedding, before 1 / sqrt(d).
    """
    count = len(encoder.blocks)  # type: ignore[arg-type]
    for block in blocks:
        if block >= count:
            raise unknown("teacher block", block, range(count))
    prefix = int(encoder.num_prefix_tokens)  # type: ignore[arg-type]
    found: dict[int, QK] = {}

    def hook_for(block: int) -> Any:
        def hook(attn: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            given = inspect.signature(attn.forward).bind(*args, **kwargs).arguments
            if given.get("attn_mask") is not None or given.get("is_causal"):
                raise HasteError(f"the attention of teacher block {block} is masked; possible: an unmasked teacher")
            found[block] = _patch_qk(attn, args[0], given.get("rope"), prefix)

        return hook

    handles = [
        encoder.blocks[b].attn.register_forward_pre_hook(hook_for(b), with_kwargs=True)  # type: ignore[index, union-attr]
        for b in blocks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _patch_qk(attn: Any, x: Tensor, rope: Tensor | None, prefix: int) -> QK:
    # timm rotates every token but the prefix ones.
    q, k = (part[:, :, prefix:] for part in project_qk(attn, x))
    if rope is not None:
        half = bool(getattr(attn, "rotate_half", False))
        q, k = (apply_rot_embed_cat(part, rope, half=half).type_as(part) for part in (q, k))
    return q, k


def check_plain_attention(attn: Any) -> None:
    """Raise HasteError where a timm attention module is more than one softmax of q k^T / sqrt(d) per head."""
    if type(attn) not in PLAIN:
        why = "its maps are not known to be a softmax of q and k alone"
    elif getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        why = "fewer key heads than query heads"
    elif abs(attn.scale * attn.head_dim**0.5 - 1) > 1e-6:
        why = f"logits scaled by {attn.scale:g} instead of 1 / sqrt({attn.head_dim})"
    else:
        return
    raise HasteError(
        f"attention of kind {type(attn).__name__} ({why}) cannot be aligned with; possible: teachers whose attention "
        "is one softmax of q and k per head (timm's ViT, DINOv2, DINOv3, CLIP, SigLIP, MAE, I-JEPA)"
    )


def project_qk(attn: Any, x: Tensor) -> QK:
    """q and k (B, H, N, d) of a timm attention module at its input x (B, N, D), norms applied, without rope.

    Raises:
        HasteError: the module's attention is not a plain softmax of q and k.
    """
    check_plain_attention(attn)
    if getattr(attn, "qkv", None) is not None:
        # Only the rows of q and k are computed; v would be thrown away.
        rows = attn.qkv.weight.shape[0] // 3 * 2
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            separate = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            bias = separate if bias is None else bias + separate
        qk = F.linear(x, attn.qkv.weight[:rows], None if bias is None else bias[:rows])
        q, k = qk.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        q, k = (p(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
    return attn.q_norm(q), attn.k_norm(k)
