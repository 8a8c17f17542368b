"""MM-DiT: text and image tokens, each with weights of their own, attend to each other in one joint attention.

Sec. 3.2, arXiv 2505.16792 (text to image on MS-COCO); layout of Stable Diffusion 3's blocks. Alignment reads q and k of
the image's stream.

B batch, N image tokens, L text tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haste_core.errors import HasteError
from haste_core.models.layers import DiffusionTransformer, FinalLayer, Mlp, initialise, modulate


class Stream(nn.Module):
    """One side of a joint block, text or image: its adaLN, q, k, v, projection and MLP.

    pre_only: returns q, k and v for the attention and is not updated itself (the text side of the last block).
    """

    def __init__(self, width: int, heads: int, pre_only: bool = False) -> None:
        super().__init__()
        self.heads, self.pre_only = heads, pre_only
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        # Without a norm; q and k are read off the two identities.
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "q_norm": nn.Identity(), "k_norm": nn.Identity()}
        )
        parts = 2
        if not pre_only:
            self.attn["proj"] = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(width, 4 * width)
            parts = 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))

    def before(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """q, k, v (B, H, tokens, d) of tokens x (B, tokens, D) under c (B, D), and the modulation for `after`."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(2 if self.pre_only else 6, dim=1)
        qkv = self.attn["qkv"](modulate(self.norm1(x), shift, scale))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.attn["q_norm"](q), self.attn["k_norm"](k), v), tuple(rest)

    def after(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """x (B, tokens, D) updated by its share of the attention's output (B, tokens, D) and by the MLP."""
        gate_a, shift_m, scale_m, gate_m = rest
        x = x + gate_a[:, None] * self.attn["proj"](attended)
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class JointBlock(nn.Module):
    """One joint attention over [text, image] between two streams."""

    def __init__(self, width: int, heads: int, last: bool) -> None:
        super().__init__()
        self.context_block = Stream(width, heads, pre_only=last)
        self.x_block = Stream(width, heads)

    def forward(self, text: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Text (B, L, D) and image (B, N, D) tokens to the same shapes."""
        text_qkv, text_rest = self.context_block.before(text, c)
        image_qkv, image_rest = self.x_block.before(x, c)
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(text_qkv, image_qkv, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        of_text, of_image = attended.split([text.shape[1], x.shape[1]], dim=1)
        if not self.context_block.pre_only:
            text = self.context_block.after(text, of_text, text_rest)
        return text, self.x_block.after(x, of_image, image_rest)


class MMDiT(DiffusionTransformer):
    """The velocity network v(x_t, t, text), initialised with adaLN-Zero.

    Args:
        image_size, channels, patch: as in `DiffusionTransformer`.
        classes: number of captions; index `classes` is the empty caption.
        depth, width, heads: the paper takes width 32 x depth and heads = depth.
        context_width: of the text tokens.
        contexts: from caption indices (B,) to text tokens (B, L, context_width).
    """

    kind = "mmdit"

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        classes: int,
        depth: int,
        width: int,
        heads: int,
        patch: int,
        context_width: int = 768,
        contexts: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size, channels=channels, classes=classes, width=width, heads=heads, patch=patch
        )
        self.contexts = contexts
        self.context_embedder = nn.Linear(context_width, width)
        self.joint_blocks = nn.ModuleList(JointBlock(width, heads, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(width, patch, channels)
        initialise(self)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]  # the weights' own name is joint_blocks
        """The transformer blocks, by the name all generators share."""
        return self.joint_blocks

    def streams(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """Text (B, L, D) and image (B, N, D) tokens; the timestep (B, D)."""
        text = self.context_embedder(self.text_tokens(y).to(x))
        return [text, self.x_embedder(x) + self.pos_embed], self.t_embedder(t)

    def text_tokens(self, y: Tensor) -> Tensor:
        """Text tokens (B, L, context_width) for y: text tokens already, or caption indices (B,) int64."""
        if y.is_floating_point():
            return y
        if self.contexts is None:
            raise HasteError("this MM-DiT has no table of text tokens; expected data.contexts, or text tokens as y")
        return self.contexts(y)
