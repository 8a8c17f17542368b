"""How images become squares: the cropping and resizing that ImageNet is prepared with for diffusion models."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """A square RGB image of side `size` from the middle of any image: "center-crop-dhariwal" of ADM and EDM2.

    Halved by box filter while the shorter side is at least twice `size`, then bicubic to `size` on the shorter side,
    then cropped. An image that has the size already comes back as it is.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]; `sampling.to_uint8` gives exactly the same pixels back."""
    return pixels.float() / 127.5 - 1
