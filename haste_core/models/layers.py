"""Parts of a diffusion transformer, named and laid out as in the released DiT and SiT checkpoints.

B batch, N tokens, D width, H heads, d head width. Golden values in tests/golden pin every number here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sin-cos positions, (grid * grid, width) float32, tokens row by row.

    The first half of the width encodes the column, the second the row, each as [sin, cos] at frequencies
    10000^(-2j / (width / 2)). Not in the paper: the DiT convention.
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    return torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, 0)], dim=1).float()


class TimestepEmbedder(nn.Module):
    """Embeds t (B,), unscaled, to (B, width): [cos(t f), sin(t f)] at 256 values, then a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        half = frequencies // 2
        values = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("frequencies", values.float(), persistent=False)
        self.frequencies: Tensor

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) to (B, width)."""
        angles = t.float()[:, None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embeds labels (B,) to (B, width); row `classes` is the null label."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """y (B,) int64 to (B, width)."""
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """Images (B, C, S, S) to tokens (B, N, D), row by row, by a strided convolution with bias."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, S, S) to (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between, (B, N, D) to (B, N, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) to the same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) scaled by 1 + scale and shifted, both (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Stream(nn.Module):
    """One stream of tokens in a block under adaLN-Zero: norms, modulation, q, k, v, projection and MLP.

    Shift, scale and gate of each branch come from the condition c (B, D); q and k can be read off `q_norm`, `k_norm`.

    mlp_ratio: hidden width of the MLP over `width`. qk_norm: LayerNorm on q and k of each head. pre_only: gives q, k, v
    to the attention and is not updated itself (the text side of an MM-DiT's last block).
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False, pre_only: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.pre_only = heads, pre_only
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})
        for name in ("q_norm", "k_norm"):
            self.attn[name] = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        if not pre_only:
            self.attn["proj"] = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if pre_only else 6) * width))

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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q, k, v (B, H, tokens, d) by torch's fused kernel, (B, tokens, H d)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(Stream):
    """A transformer block of one stream."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D) under c (B, D) to the same shape."""
        qkv, rest = self.before(x, c)
        return self.after(x, attend(*qkv), rest)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to patches (B, N, patch * patch * channels), unfolding as (row, column, channel)."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D) under c (B, D) to patches."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(patches: Tensor, patch: int, channels: int) -> Tensor:
    """Patches (B, N, patch * patch * channels) back to images (B, channels, S, S)."""
    grid = int(patches.shape[1] ** 0.5)
    x = patches.reshape(-1, grid, grid, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid * patch, grid * patch)


def initialise(model: nn.Module) -> None:
    """adaLN-Zero: at first every block is the identity and the output is zero."""
    modules = list(model.modules())
    for linear in (m for m in modules if isinstance(m, nn.Linear)):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    for embedder in (m for m in modules if isinstance(m, PatchEmbed)):
        # The patch convolution is a linear map of the flattened patch, initialised as one.
        nn.init.xavier_uniform_(embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(embedder.proj.bias)  # type: ignore[arg-type]
    for labels in (m for m in modules if isinstance(m, LabelEmbedder)):
        nn.init.normal_(labels.embedding_table.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if name.startswith("t_embedder") and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02)
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)


class DiffusionTransformer(nn.Module, ABC):
    """A transformer over the patches of a square image, from (x, t, y) to an output of the image's size.

    Subclasses make an embedding of y, `blocks` and `final_layer`, and return from `streams` the inputs of the blocks.

    image_size: side of the input, a multiple of `patch`. classes: number of labels; label `classes` is the null label
    of classifier-free guidance. patch: side of a patch in pixels. The attribute `activation_checkpointing` makes the
    backward pass compute activations of blocks again.
    """

    kind: str
    outputs_per_channel = 1
    blocks: nn.ModuleList
    final_layer: FinalLayer

    def __init__(self, *, image_size: int, channels: int, classes: int, width: int, heads: int, patch: int) -> None:
        super().__init__()
        self.image_size, self.channels, self.classes = image_size, channels, classes
        self.patch, self.heads = patch, heads
        self.activation_checkpointing = False
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.register_buffer("pos_embed", sincos_positions(width, image_size // patch)[None])
        self.pos_embed: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        return (self.image_size // self.patch,) * 2

    @property
    def null_label(self) -> int:
        """The label that stands for "no class" (MM-DiT: the index of the empty caption)."""
        return self.classes

    @abstractmethod
    def streams(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """Inputs of the blocks: token streams, each (B, tokens, D), the image's last, and the condition (B, D)."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The output at (x, t, y): the velocity, for DiT the noise and the values that interpolate its log-variance.

        x, and the output: (B, C, S, S), of DiT (B, 2C, S, S). t: (B,) in [0, 1], for DiT 0 to 999. y: (B,) int64 in
        [0, classes]; an MM-DiT takes text tokens (B, L, context_width) too.
        """
        streams, c = self.streams(x, t, y)
        saving = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            updated = checkpoint(block, *streams, c, use_reentrant=False) if saving else block(*streams, c)
            streams = list(updated) if isinstance(updated, tuple) else [updated]
        patches = self.final_layer(streams[-1], c)
        return unpatchify(patches, self.patch, self.channels * self.outputs_per_channel)
