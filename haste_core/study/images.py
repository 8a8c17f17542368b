"""Pictures as arrays and PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from haste_core.files import write_bytes


def grid(images: Tensor, columns: int, gap: int = 1, scale: int = 4) -> Tensor:
    """uint8 images (n, C, S, S) as one picture (height, width, 3), white gaps between, enlarged `scale` times."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images.expand(-1, 3, -1, -1) if channels == 1 else images[:, :3]):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write uint8 images (n, C, S, S) atomically as one PNG."""
    stream = io.BytesIO()
    Image.fromarray(grid(images, columns).numpy()).save(stream, format="PNG")
    write_bytes(path, stream.getvalue())
