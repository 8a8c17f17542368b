"""SiT and DiT: plain class-conditional diffusion transformers with adaLN-Zero."""

from __future__ import annotations

from torch import Tensor, nn

from haste_core.models.layers import Block, DiffusionTransformer, FinalLayer, LabelEmbedder, initialise


class SiT(DiffusionTransformer):
    """The velocity network v(x_t, t, y), initialised with adaLN-Zero.

    depth: number of blocks. mlp_ratio: hidden width of the MLPs over `width`. qk_norm: LayerNorm on q and k of each
    head. The others are those of `DiffusionTransformer`.
    """

    kind = "sit"

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
        super().__init__(
            image_size=image_size, channels=channels, classes=classes, width=width, heads=heads, patch=patch
        )
        self.y_embedder = LabelEmbedder(classes, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, channels * self.outputs_per_channel)
        initialise(self)

    def streams(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """The image's tokens (B, N, D); timestep and label together (B, D)."""
        return [self.x_embedder(x) + self.pos_embed], self.t_embedder(t) + self.y_embedder(y)


class DiT(SiT):
    """The same network for improved DDPM: its output is the noise, then the values that interpolate the log-variance.

    Takes timesteps 0 to 999 and returns (B, 2C, S, S); see `haste_core.paths.DDPMSchedule`.
    """

    kind = "dit"
    outputs_per_channel = 2
