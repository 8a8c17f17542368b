"""SiT and DiT: plain class-conditional diffusion transformers with adaLN-Zero, from the digits size to XL/2.

They know nothing of teachers or projectors. While a run is in phase I the caller asks for taps; without taps the
forward pass is exactly that of a vanilla run.
"""

from __future__ import annotations

from torch import Tensor, nn

from haste_core.models.layers import (
    QK,
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    Tapped,
    Taps,
    TimestepEmbedder,
    initialise,
    sincos_positions,
    unpatchify,
)


class SiT(nn.Module):
    """The velocity network v(x_t, t, y), initialised with adaLN-Zero: at first every block is the identity.

    Args:
        image_size: side of the square input, a multiple of `patch`.
        channels: of the input, and of the velocity.
        classes: number of labels; label `classes` is the null label of classifier-free guidance.
        depth, width, heads, patch, mlp_ratio, qk_norm: as in `config.Model`.
    """

    kind = "sit"
    outputs_per_channel = 1

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
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.channels, self.classes, self.heads = patch, channels, classes, heads
        self.image_size = image_size
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.register_buffer("pos_embed", sincos_positions(width, image_size // patch)[None])
        self.pos_embed: Tensor
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, channels * self.outputs_per_channel)
        initialise(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        side = self.image_size // self.patch
        return side, side

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor, taps: Taps | None = None) -> Tensor | Tapped:
        """The output at (x, t, y): for SiT the velocity.

        Args:
            x: (B, C, S, S). t: (B,) in [0, 1] (DiT: 0 to 999). y: (B,) int64 in [0, classes].
            taps: what to hand out beside the output; None hands out nothing.

        Returns:
            The output (B, C, S, S) (DiT: (B, 2C, S, S)), or `Tapped` when taps were given.
        """
        tokens: dict[int, Tensor] = {}
        qk: dict[int, QK] = {}
        h = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for i, block in enumerate(self.blocks):
            h, handed_out = block(h, c, hand_out=taps is not None and i in taps.blocks)
            if handed_out is not None:
                qk[i] = handed_out
            if taps is not None and i + 1 in taps.depths:
                tokens[i + 1] = h
        output = unpatchify(self.final_layer(h, c), self.patch, self.channels * self.outputs_per_channel)
        return output if taps is None else Tapped(output, tokens, qk)


class DiT(SiT):
    """The same network for improved DDPM: its output is the noise, then the values that interpolate the log-variance.

    Takes timesteps 0 to 999 and returns (B, 2C, S, S); see `haste_core.ddpm`.
    """

    kind = "dit"
    outputs_per_channel = 2
