"""What all generators share: sizes, the first layers, and the forward pass that hands out what the caller asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from haste_core.models.layers import (
    QK,
    FinalLayer,
    PatchEmbed,
    Tapped,
    Taps,
    TimestepEmbedder,
    sincos_positions,
    unpatchify,
)


class DiffusionTransformer(nn.Module, ABC):
    """A transformer over the patches of a square image, from (x, t, y) to an output of the image's size.

    A generator of its own makes what else it needs: an embedding of y, `blocks`, `final_layer`; and says in `streams`
    what enters the blocks.

    Args:
        image_size: side of the square input, a multiple of `patch`.
        channels: of the input.
        classes: number of labels; label `classes` is the null label of classifier-free guidance.
        width, heads, patch: as in `config.Model`.
    """

    kind: str
    outputs_per_channel = 1
    blocks: nn.ModuleList
    final_layer: FinalLayer

    def __init__(self, *, image_size: int, channels: int, classes: int, width: int, heads: int, patch: int) -> None:
        super().__init__()
        self.patch, self.channels, self.classes, self.heads = patch, channels, classes, heads
        self.image_size = image_size
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.register_buffer("pos_embed", sincos_positions(width, image_size // patch)[None])
        self.pos_embed: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        side = self.image_size // self.patch
        return side, side

    @property
    def null_label(self) -> int:
        """The label that stands for "no class" (MM-DiT: the index of the empty caption)."""
        return self.classes

    @abstractmethod
    def streams(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the blocks update, each (B, tokens, D) and the image's tokens last, and the condition (B, D)."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, taps: Taps | None = None) -> Tensor | Tapped:
        """The output at (x, t, y): the velocity, for DiT the noise and what makes its variance.

        Args:
            x: (B, C, S, S). t: (B,) in [0, 1] (DiT: 0 to 999).
            y: (B,) int64 in [0, classes]; an MM-DiT takes text tokens (B, L, context_width) too.
            taps: what to hand out beside the output; None hands out nothing.

        Returns:
            The output (B, C, S, S) (DiT: (B, 2C, S, S)), or `Tapped` when taps were given; tokens, q and k are the
            image's.
        """
        tokens: dict[int, Tensor] = {}
        qk: dict[int, QK] = {}
        streams, c = self.streams(x, t, y)
        for i, block in enumerate(self.blocks):
            *streams, handed_out = block(*streams, c, hand_out=taps is not None and i in taps.blocks)
            if handed_out is not None:
                qk[i] = handed_out
            if taps is not None and i + 1 in taps.depths:
                tokens[i + 1] = streams[-1]
        patches = self.final_layer(streams[-1], c)
        output = unpatchify(patches, self.patch, self.channels * self.outputs_per_channel)
        return output if taps is None else Tapped(output, tokens, qk)
