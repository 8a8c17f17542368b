"""Digits under an oriented texture, drawn anew for every batch: data whose best velocity is known (`analysis.law`)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Generator, Tensor

from haste_core.analysis.law import Law, band_spectra, upsampled
from haste_core.seeding import stream
from haste_core.study import config
from haste_core.study.data.base import Dataset, digits
from haste_core.training import Batch

SIDE = 16
# Fixed draws by split; training itself draws fresh images.
SIZES = {"train": 5000, "validation": 500, "test": 500}


class Textured(Dataset):
    """Fresh draws of a `Law`, with the digit as label.

    knows: the target that is given as label: the digit ("labels"), the direction of the texture ("orientation"), or
        "both", each pair of the two a class.
    """

    name = "textured"
    channels = 1
    law: Law

    def __init__(self, data: config.DataSettings, knows: str = "labels") -> None:
        assert data.texture is not None
        self.data, self.augment, self.seed, self.knows = data, data.augment, data.split_seed, knows
        self.law = law_of(data.texture, data.image_size or SIDE)
        self.image_size = self.law.side
        digits, directions = len(self.law.templates), len(self.law.spectra)
        self.classes = {"labels": digits, "orientation": directions, "both": digits * directions}[knows]
        self._splits: dict[str, tuple[Tensor, Tensor]] = {}
        # Read off a target, the facts that a classifier is scored on one by one.
        self.parts = {
            "labels": {}, "orientation": {},
            "both": {"label": lambda target: target // directions, "orientation": lambda target: target % directions},
        }[knows]  # fmt: skip

    def __len__(self) -> int:
        return SIZES["train"]

    def labelled(self, role: str, knows: str = "labels") -> Dataset:
        """As for `Dataset`."""
        return self if knows == self.knows else Textured(self.data, knows)

    def _draw(self, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        x, direction = self.law.draw(y, generator)
        both = y * len(self.law.spectra) + direction
        return x, {"labels": y, "orientation": direction, "both": both}[self.knows]

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        if split not in self._splits:
            y = torch.arange(SIZES[split]) % len(self.law.templates)
            self._splits[split] = self._draw(y, Generator().manual_seed(stream(f"textured {split}", self.seed)))
        x, target = self._splits[split]
        return x[chosen], target[chosen]

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """Fresh images of the digits `indices` modulo their number; arguments as of `Dataset.batch`."""
        x, target = self._draw(indices % len(self.law.templates), generator)
        return Batch(x[part], target[part], x[part])


@cache
def law_of(texture: config.TextureSettings, side: int) -> Law:
    """The law that settings describe: scikit-learn's digits of 8 pixels as templates, the first ones of each class.

    Raises HasteError where templates are larger than the image, or the spectrum is not positive.
    """
    x, labels = digits()
    chosen = torch.cat([x[labels == digit, 0].double()[: texture.templates] for digit in range(10)])
    templates = texture.contrast * upsampled(chosen, side).reshape(10, texture.templates, side, side)
    shape = texture.model_dump(exclude={"templates", "contrast"})
    return Law(templates, band_spectra(side, **shape))
