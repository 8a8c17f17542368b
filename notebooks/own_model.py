"""A small SiT with timm's attention and MLP, independent of this package.

Used by `09_your_own_trainer.ipynb`.
"""

import math

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import nn


class Block(nn.Module):
    """A transformer block under adaLN-Zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """x (B, N, D) under c (B, D) to the same shape."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    """Tokens to patches."""

    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        """x (B, N, D) under c (B, D) to (B, N, outputs)."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimeEmbedder(nn.Module):
    """t (B,) in [0, 1] to (B, width)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """t (B,) to (B, width)."""
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class OwnSiT(nn.Module):
    """The velocity network v(x_t, t, y) on square images."""

    def __init__(self, size=8, channels=1, classes=10, depth=6, width=64, heads=4, patch=2):
        super().__init__()
        self.patch, self.grid = patch, size // patch
        self.x_embedder = PatchEmbed(size, patch, channels, width)
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid**2, width) * 0.02)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels)
        for layer in [*(block.adaLN_modulation for block in self.blocks), self.final_layer.adaLN_modulation]:
            nn.init.zeros_(layer[-1].weight)
            nn.init.zeros_(layer[-1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(self, x, t, y):
        """x (B, C, S, S), t (B,) in [0, 1], y (B,) to the velocity, shaped like x."""
        tokens, c = self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        patches = self.final_layer(tokens, c).unflatten(1, (self.grid, self.grid))
        return patches.unflatten(-1, (self.patch, self.patch, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
