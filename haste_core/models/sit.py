"""SiT, the student: a plain diffusion transformer with adaLN-Zero, from the digits size to SiT-XL/2.

It knows nothing of teachers or projectors. While a run is in phase I the caller asks for taps; without taps the
forward pass is exactly that of a vanilla run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from haste_core import config
from haste_core.models.layers import (
    QK,
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
    unpatchify,
)


@dataclass(frozen=True)
class Taps:
    """What a forward pass should hand out: tokens after blocks `depths` (from 1), q and k of `blocks` (from 0)."""

    depths: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()


class Tapped(NamedTuple):
    """The velocity (B, C, S, S) with tokens (B, N, D) by depth and q, k (B, H, N, d) by block."""

    velocity: Tensor
    tokens: dict[int, Tensor]
    qk: dict[int, QK]


class SiT(nn.Module):
    """The velocity network v(x_t, t, y), initialised with adaLN-Zero: at first every block is the identity.

    Args:
        image_size: side of the square input, a multiple of `patch`.
        channels: of input and output.
        classes: number of labels; label `classes` is the null label of classifier-free guidance.
        depth, width, heads, patch, mlp_ratio, qk_norm: as in `config.Model`.
    """

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
        self.final_layer = FinalLayer(width, patch, channels)
        self._initialise()

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
        """The velocity at (x, t, y).

        Args:
            x: (B, C, S, S). t: (B,) in [0, 1]. y: (B,) int64 in [0, classes].
            taps: what to hand out beside the velocity; None hands out nothing.

        Returns:
            The velocity (B, C, S, S), or `Tapped` when taps were given.
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
        velocity = unpatchify(self.final_layer(h, c), self.patch, self.channels)
        return velocity if taps is None else Tapped(velocity, tokens, qk)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch convolution is a linear map of the flattened patch, initialised as one.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)


def build(model: config.Model, *, image_size: int, channels: int, classes: int, seed: int) -> SiT:
    """A freshly initialised student in float32 on the CPU, its weights drawn from `seed` alone."""
    sizes = model.model_dump(include={"depth", "width", "heads", "patch", "mlp_ratio", "qk_norm"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SiT(image_size=image_size, channels=channels, classes=classes, **sizes)
