"""Scenes of two coloured digits with captions: where they stand to each other decides which caption is true.

Real handwritten digits (scikit-learn's, 8x8) stand in two neighbouring cells of 2x2: enlarged to 14x14 in cells of 16
pixels, or as they are in cells of 8.
A combination is a relation with two things, a thing a digit in a colour. A fixed share of the combinations is unseen:
neither teacher nor generator has them, and networks behind scores have them all.
"""

from __future__ import annotations

import math
from copy import copy
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from haste_core.errors import number_of
from haste_core.seeding import stream
from haste_core.study import config
from haste_core.study.data.base import Captions, Dataset, digits, split_indices, to_signed
from haste_core.study.sections import ScenesSettings

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RGB = {"red": (1.0, 0.25, 0.25), "green": (0.25, 1.0, 0.25), "blue": (0.3, 0.45, 1.0), "yellow": (1.0, 0.9, 0.2)}
PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
ACROSS, FIRST = ("left", "right"), ("left", "above")  # relations side by side, and those whose subject comes first
WORDINGS = (
    "a {one} {phrase} a {other}",
    "{phrase} the {other} there is a {one}",
    "the {one} is {phrase} the {other}",
)
SIDE = 32
# Held-out images by training images.
SHARES = {"train": 1.0, "validation": 1 / 16, "test": 1 / 8, "unseen": 1 / 16}


class Combination(NamedTuple):
    """Two things, numbered, the first left of the second or above it."""

    across: bool
    first: int
    second: int


class Drawn(NamedTuple):
    """Images of a split: uint8 (n, 3, S, S), combinations (n,), and things by cell (n, 4) from 1, 0 for none."""

    pixels: Tensor
    combinations: Tensor
    cells: Tensor


def things(scenes: ScenesSettings) -> list[tuple[int, str]]:
    """Digit and colour of every thing."""
    return list(product(scenes.digits, scenes.colours))


def combinations(scenes: ScenesSettings, seed: int) -> tuple[list[Combination], int]:
    """All combinations in the order of their numbers, seen ones first, and the number of those."""
    count = len(things(scenes))
    there = [
        Combination(across, first, second)
        for across in sorted({relation in ACROSS for relation in scenes.relations})
        for first, second in product(range(count), repeat=2)
        if first != second
    ]
    order = torch.randperm(len(there), generator=Generator().manual_seed(stream("unseen scenes", seed)))
    return [there[i] for i in order.tolist()], len(there) - math.ceil(scenes.unseen * len(there))


def wordings(combination: Combination, scenes: ScenesSettings) -> list[str]:
    """Every caption of a combination."""
    first, second = (
        f"{colour} {NUMBERS[digit]}"
        for digit, colour in (things(scenes)[i] for i in (combination.first, combination.second))
    )
    found = []
    for relation in scenes.relations:
        if (relation in ACROSS) == combination.across:
            one, other = (first, second) if relation in FIRST else (second, first)
            found += [wording.format(one=one, phrase=PHRASES[relation], other=other) for wording in WORDINGS]
    return found


class Scenes(Dataset):
    """Scenes with captions; labels are numbers of captions, those of seen combinations first.

    The split "unseen" has held-out images of unseen combinations, the others have seen ones alone.

    Attributes:
        scenes: their settings. combinations, seen: as of the function `combinations`.
    """

    name = "scenes"
    channels = 3
    captions: Captions

    def __init__(self, data: config.DataSettings) -> None:
        self.data, self.augment, self.scenes = data, data.augment, data.scenes or ScenesSettings()
        self.image_size = data.image_size or SIDE
        self.combinations, self.seen = combinations(self.scenes, data.split_seed)
        self.captions = Captions(wordings(combination, self.scenes) for combination in self.combinations)
        self.classes = len(self.captions.texts)
        self._splits = self._drawn(everything=False)

    def _drawn(self, everything: bool) -> dict[str, Drawn]:
        facts = {"kind", "scenes", "image_size", "test_fraction", "validation_fraction", "split_seed"}
        return _drawn(self.data.model_copy(update={"scenes": self.scenes}).model_dump_json(include=facts), everything)

    @property
    def summary(self) -> str:
        """As for `Dataset`, with captions and combinations."""
        return (
            f"{self.name}: {number_of(len(self), 'training image')}, {self.classes:,} captions of "
            f"{number_of(len(self.combinations), 'combination')}, {len(self.combinations) - self.seen} of them unseen, "
            f"3x{self.image_size}x{self.image_size}"
        )

    @property
    def sampled(self) -> int:
        """Number of captions of seen combinations."""
        return int(self.captions.first[self.seen])

    def told(self, captions: Tensor) -> Tensor:
        """Combinations (n,) of captions by number (n,)."""
        return torch.searchsorted(self.captions.first, captions, right=True) - 1

    def labelled(self, role: str, knows: str = "labels") -> Dataset:
        """The scenes whose labels are the thing in each of 2x2 cells, row by row, (n, 4) from 1, 0 for an empty cell.

        The teacher sees seen combinations, extractors all of them in all splits.
        """
        found = copy(self)
        found.cells, found.captions, found.classes = 2, None, 1 + len(things(self.scenes))  # type: ignore[assignment]
        found._splits = self._drawn(everything=role != "teacher")
        return found

    def __len__(self) -> int:
        return len(self._splits["train"].pixels)

    def _read(self, split: str, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        drawn = self._splits[split]
        told = self.captions.first[drawn.combinations[chosen]] if self.cells == 1 else drawn.cells[chosen]
        return to_signed(drawn.pixels[chosen]), told


@lru_cache(maxsize=8)
def _drawn(settings: str, everything: bool) -> dict[str, Drawn]:
    """Every split's images. settings: `data` as JSON. everything: unseen combinations too."""
    data = config.DataSettings.model_validate_json(settings)
    scenes = data.scenes or ScenesSettings()
    there, seen = combinations(scenes, data.split_seed)
    x, labels = digits()
    cell = (data.image_size or SIDE) // 2
    margin = cell // 16
    ink = F.interpolate((x + 1) / 2, size=cell - 2 * margin, mode="bilinear", align_corners=False)
    ink = F.pad(ink, (margin,) * 4)[:, 0]
    sources = split_indices(labels, data, "the digits")
    found = {}
    for split, share in SHARES.items():
        generator = Generator().manual_seed(stream(f"scenes {split}{' all' * everything}", data.split_seed))
        count = math.ceil(share * scenes.images)
        low, high = (seen, len(there)) if split == "unseen" else (0, len(there) if everything else seen)
        chosen = torch.randint(low, high, (count,), generator=generator)
        of_digit = [(m := sources.get(split, sources["test"]))[labels[m] == digit] for digit in range(10)]
        found[split] = _composed(scenes, there, chosen, of_digit, ink, generator)
    return found


def _composed(
    scenes: ScenesSettings,
    there: list[Combination],
    chosen: Tensor,
    of_digit: list[Tensor],
    ink: Tensor,
    generator: Generator,
) -> Drawn:
    """Images of combinations (n,). of_digit: numbers of the images of each digit. ink: (N, S / 2, S / 2) in [0, 1]."""
    known, count, cell = things(scenes), len(chosen), ink.shape[-1]
    table = torch.tensor(there)[chosen]  # (n, 3)
    across, line = table[:, 0].bool(), torch.randint(2, (count,), generator=generator)
    colours = torch.tensor([RGB[colour] for _, colour in known])
    sizes = torch.tensor([len(of_digit[digit]) for digit, _ in known])
    numbers = torch.nn.utils.rnn.pad_sequence([of_digit[digit] for digit, _ in known], batch_first=True)
    canvas = torch.zeros(count, 2, 2, 3, cell, cell)
    cells = torch.zeros(count, 2, 2, dtype=torch.int64)
    for place in (0, 1):
        thing, where = table[:, 1 + place], torch.full((count,), place)
        row, column = torch.where(across, line, where), torch.where(across, where, line)
        image = numbers[thing, (torch.rand(count, generator=generator) * sizes[thing]).long()]
        canvas[torch.arange(count), row, column] = ink[image][:, None] * colours[thing][:, :, None, None]
        cells[torch.arange(count), row, column] = 1 + thing
    whole = canvas.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 2 * cell, 2 * cell)
    return Drawn((255 * whole).round().to(torch.uint8), chosen, cells.flatten(1))


# Reading


class Reading(NamedTuple):
    """Content of images: side by side or not (n,), and the two things, the left or upper one first, (n, 2)."""

    across: Tensor
    things: Tensor


def read(logits: Tensor, scenes: ScenesSettings) -> Reading:
    """The most likely scene of exactly two neighbouring things, from logits (n, 4, 1 + things) of the four cells."""
    scores = logits.log_softmax(-1)
    empty, (best, thing) = scores[..., 0], scores[..., 1:].max(-1)
    pairs = [(True, 0, 1), (True, 2, 3)] if set(scenes.relations) & set(ACROSS) else []
    pairs += [(False, 0, 2), (False, 1, 3)] if set(scenes.relations) - set(ACROSS) else []
    gain = best - empty
    chosen = torch.tensor(pairs)[torch.stack([gain[:, a] + gain[:, b] for _, a, b in pairs], 1).argmax(1)]
    return Reading(chosen[:, 0].bool(), thing.gather(1, chosen[:, 1:]))


PARTS = ("digits", "colours", "relation")


def right(dataset: Scenes, captions: Tensor, reading: Reading) -> dict[str, float]:
    """Shares of images whose reading agrees with their captions (n,) on both digits, both colours, relation, and "all".

    The things that were read are matched with those of the caption in the order that agrees more; the relation is
    right where the arrangement is the caption's and the order need not be turned.
    """
    wanted = torch.tensor(dataset.combinations)[dataset.told(captions)]
    colours = len(dataset.scenes.colours)

    def parts(thing: Tensor) -> Tensor:
        return torch.stack([thing // colours, thing % colours], -1)  # (n, 2 things, digit and colour)

    straight = parts(reading.things) == parts(wanted[:, 1:])
    turned = parts(reading.things.flip(1)) == parts(wanted[:, 1:])
    crossed = turned.sum((1, 2)) > straight.sum((1, 2))
    agrees = torch.where(crossed[:, None, None], turned, straight).all(1)
    relation = (reading.across == wanted[:, 0].bool()) & ~crossed
    every = torch.cat([agrees, relation[:, None]], 1)
    shares = [*every.double().mean(0).tolist(), float(every.all(1).double().mean())]
    return dict(zip((*PARTS, "all"), shares, strict=True))
