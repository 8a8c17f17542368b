"""scikit-learn's 1,797 real handwritten digits: the data set that is always there."""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor
from torch.nn import functional as F

from haste_core import config
from haste_core.data.base import Batch


class Digits:
    """8x8 digits with one channel in [-1, 1], a stratified split by a fixed seed, mild augmentation in training."""

    name = "digits"
    image_size = 8
    channels = 1
    classes = 10

    def __init__(self, data: config.Data) -> None:
        self.augment = data.augment
        pixels, labels = load_digits(return_X_y=True)
        # 17 grey levels, 0 to 16.
        x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
        y = torch.from_numpy(labels).long()
        train, test = train_test_split(
            range(len(y)), test_size=data.test_fraction, random_state=data.split_seed, stratify=labels
        )
        self._splits = {"train": (x[train], y[train]), "test": (x[test], y[test])}

    def __len__(self) -> int:
        return len(self._splits["train"][1])

    def images(self, split: str) -> tuple[Tensor, Tensor]:
        """Images (n, 1, 8, 8) and labels (n,) of "train" or "test", without augmentation."""
        return self._splits[split]

    def batch(self, indices: Tensor, generator: Generator) -> Batch:
        """Training examples under a random affine map each, drawn from `generator`."""
        x, y = self._splits["train"]
        x = affine(x[indices], self.augment, generator)
        return Batch(x, y[indices], x)


def affine(x: Tensor, augment: config.Augment, generator: Generator) -> Tensor:
    """x (B, C, S, S) shifted, rotated and scaled at random, bilinear, the background (-1) filling the border."""
    u = torch.rand(len(x), 4, generator=generator) * 2 - 1
    angle = u[:, 0] * augment.rotation * math.pi / 180
    scale = 1 + u[:, 1] * augment.scale
    shift = u[:, 2:] * augment.shift * 2 / x.shape[-1]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1
