"""Tokens and attention carried from one token grid to another: bilinear over rows and columns, never over the index.

A grid is (rows, columns); its tokens are numbered row by row. Tables 11 and 12, arXiv 2505.16792 (CLIP's 14x14 tokens
beside a generator's 16x16).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from haste_core.errors import HasteError

Grid = tuple[int, int]


def resample_tokens(tokens: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Tokens (B, N, D) of `grid` on `new_grid`, (B, N', D) float32; the tokens themselves where the grids are equal.

    Bilinear between token centres (align_corners=False), constant beyond the outermost centres, without antialias.

    Raises:
        HasteError: `grid` does not have N places.
    """
    if grid == new_grid:
        return tokens
    if tokens.shape[1] != grid[0] * grid[1]:
        raise HasteError(f"{tokens.shape[1]} tokens do not fill a {grid[0]}x{grid[1]} grid")
    maps = tokens.float().transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
    with torch.autocast(maps.device.type, enabled=False):
        maps = F.interpolate(maps, size=new_grid, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def resample_attention(probabilities: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Attention probabilities (B, H, N, N) among the tokens of `grid`, among those of `new_grid` (B, H, N', N').

    Float32: first over the grid of keys, then over the grid of queries, each as in `resample_tokens`; then every row
    is divided by its sum. Where the grids are equal the probabilities come back as they are.

    Args:
        probabilities: rows sum to one; in the study the teacher's, so that no gradient is needed.
        grid, new_grid: (rows, columns), for queries and keys alike.

    Raises:
        HasteError: `grid` does not have N places.
    """
    if grid == new_grid:
        return probabilities
    rows = probabilities.flatten(0, 1)  # (B H, queries, keys)
    by_key = resample_tokens(rows.transpose(1, 2), grid, new_grid)  # (B H, new keys, queries)
    carried = resample_tokens(by_key.transpose(1, 2), grid, new_grid)  # (B H, new queries, new keys)
    return (carried / carried.sum(-1, keepdim=True)).unflatten(0, probabilities.shape[:2])
