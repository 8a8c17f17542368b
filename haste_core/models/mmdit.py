"""MM-DiT: text and image tokens, each with weights of their own, attend to each other in one joint attention.

Sec. 3.2, arXiv 2505.16792 (text to image on MS-COCO); layout of Stable Diffusion 3's blocks. Alignment reads q and k of
the image's stream. L is the number of text tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from haste_core.errors import HasteError
from haste_core.models.layers import DiffusionTransformer, FinalLayer, Stream, attend, initialise


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
        attended = attend(*(torch.cat(parts, dim=2) for parts in zip(text_qkv, image_qkv, strict=True)))
        of_text, of_image = attended.split([text.shape[1], x.shape[1]], dim=1)
        if not self.context_block.pre_only:
            text = self.context_block.after(text, of_text, text_rest)
        return text, self.x_block.after(x, of_image, image_rest)


class MMDiT(DiffusionTransformer):
    """The velocity network v(x_t, t, text), initialised with adaLN-Zero.

    classes: number of captions; index `classes` is the empty caption. depth, width, heads: the paper takes width
    32 x depth and heads = depth. contexts: from caption indices (B,) to text tokens (B, L, context_width). The others
    are those of `DiffusionTransformer`.
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
