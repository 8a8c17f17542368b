"""scikit-learn's 1,797 real handwritten digits: the data set that is always there."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor

from haste_core.study import config
from haste_core.study.data.base import Batch, augmented, split_indices


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
        self._splits = {name: (x[chosen], y[chosen]) for name, chosen in split_indices(y, data, "the digits").items()}

    def __len__(self) -> int:
        return len(self._splits["train"][1])

    def images(self, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, 1, 8, 8) and labels (n,) of a split, without augmentation."""
        x, y = self._splits[split]
        return x[:count], y[:count]

    def examples(self, split: str, count: int | None = None, with_images: bool = True) -> Batch:
        """The same images as a batch."""
        x, y = self.images(split, count)
        return Batch(x, y, x)

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """Training examples augmented at random, drawn from `generator`."""
        x, y = self._splits["train"]
        x = augmented(x[indices[part]], self.augment, generator, len(indices), part)
        return Batch(x, y[indices[part]], x)
