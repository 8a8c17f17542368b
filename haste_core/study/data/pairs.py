"""Which image belongs to which latent in a prepared folder: by name, from its dataset.json files alone.

No file but the lists is touched, so a folder of a million pairs opens in seconds.
"""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from haste_core.errors import HasteError
from haste_core.study.data.manifest import read_json

IMAGES, LATENTS = "images", "vae-sd"
# What stands before the number, and after it.
_AFFIXES = {IMAGES: ("img", ".png"), LATENTS: ("img-mean-std-", ".npy")}
_PATTERNS = {
    side: re.compile(rf"((?:[^\\\0]*/)?){re.escape(before)}(\d+){re.escape(after)}")
    for side, (before, after) in _AFFIXES.items()
}
_OTHER = {IMAGES: LATENTS, LATENTS: IMAGES}
UNLABELLED = -1


class Pairs(NamedTuple):
    """Folder and number of each pair, "00000/00000000" as UTF-8 (n,), in order, and labels (n,) int64."""

    keys: np.ndarray
    labels: Tensor

    def image(self, index: int) -> str:
        """The name of an image, relative to images/."""
        return name_of(IMAGES, bytes(self.keys[index]).decode())

    def latent(self, index: int) -> str:
        """The name of a latent, relative to vae-sd/."""
        return name_of(LATENTS, bytes(self.keys[index]).decode())


def name_of(side: str, key: str) -> str:
    """The file of a pair ("00000/00000000") on one side: "00000/img00000000.png"."""
    folder, slash, number = key.rpartition("/")
    before, after = _AFFIXES[side]
    return f"{folder}{slash}{before}{number}{after}"


def read_pairs(root: Path) -> Pairs:
    """The pairs of a prepared folder.

    A list may lie beside the images, beside the latents or at the top; where only one side is listed, the other's
    names follow from it. {"labels": null} lists nothing: the folder's files are listed instead, all in class 0
    unless the other side knows better.

    Raises:
        HasteError: there is no list, a name leads outside, an image or latent has no partner, or labels disagree.
    """
    with _uncollected():
        listed = {side: _labels_by_key(root, side) for side in (IMAGES, LATENTS)}
    first, second = (listed[side] if listed[side] is not None else listed[other]
                     for side, other in _OTHER.items())  # fmt: skip
    if first is None or second is None:
        raise HasteError(f"{root} has no dataset.json; possible: one at the top, in {IMAGES}/ or in {LATENTS}/")
    labels = _agreed(root, first, second)
    if not labels:
        raise HasteError(f"{root}: dataset.json names no images")
    keys = sorted(labels)
    ordered = np.fromiter((labels[key] for key in keys), np.int64, len(keys))
    return Pairs(np.array([key.encode() for key in keys]), torch.from_numpy(ordered).clamp_min(0))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Millions of small lists without a cycle: looking for cycles among them takes longer than reading them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _agreed(root: Path, images: Mapping[str, int], latents: Mapping[str, int]) -> dict[str, int]:
    """Labels by key, after checking that both sides have the same keys and labels."""
    if images == latents:
        return dict(images)
    problems = [
        _some([name_of(side, key) for key in keys], what)
        for side, keys, what in (
            (IMAGES, images.keys() - latents.keys(), "without a latent"),
            (LATENTS, latents.keys() - images.keys(), "without an image"),
        )
        if keys
    ]
    unlabelled = [set(side.values()) == {UNLABELLED} for side in (images, latents)]
    differing = [k for k in images.keys() & latents.keys() if images[k] != latents[k]]
    if differing and not any(unlabelled):
        problems.append(_some([name_of(IMAGES, k) for k in differing], "with another label than its latent"))
    if problems:
        raise HasteError(f"{root}: {'; '.join(problems)}; possible: pairs of the same folder, number and label")
    return dict(latents if unlabelled[0] else images)


def _some(names: list[str], what: str) -> str:
    return f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"


def _labels_by_key(root: Path, side: str) -> dict[str, int] | None:
    """What the lists say of one side; None where no list speaks of it.

    Raises:
        HasteError: two lists contradict each other.
    """
    found = []
    for path, at_top in ((root / side / "dataset.json", False), (root / "dataset.json", True)):
        if path.is_file():
            entries = _entries(path)
            keyed = _scan(root / side, side) if entries is None else _keyed(entries, side, path, at_top)
            if keyed or not at_top:
                found.append(keyed)
    found = [keyed for keyed in found if set(keyed.values()) != {UNLABELLED}] or found
    if len(found) == 2 and found[0] != found[1]:
        raise HasteError(
            f"{root / side / 'dataset.json'} and {root / 'dataset.json'} disagree; possible: remove the wrong one"
        )
    return found[0] if found else None


def _entries(path: Path) -> list[Any] | None:
    content = read_json(path)
    if not isinstance(content, dict) or "labels" not in content or not isinstance(content["labels"], list | None):
        raise HasteError(f'{path} is no list of labels; possible: {{"labels": [["00000/img00000000.png", 12], ...]}}')
    return content["labels"]


def _keyed(entries: list[Any], side: str, path: Path, at_top: bool) -> dict[str, int]:
    """Labels by folder and number: {"00000/00000000": 12} of [["00000/img00000000.png", 12]].

    At the top of a folder names of both sides may stand, with or without the side's own folder before them.
    """
    names, labels = _columns(entries, path)
    if at_top:
        ours = [not _PATTERNS[_OTHER[side]].fullmatch(name) for name in names]
        names = [name.removeprefix(f"{side}/") for name in compress(names, ours)]
        labels = list(compress(labels, ours))
    matches = [_PATTERNS[side].fullmatch(name) for name in names]
    folders = {match[1] for match in matches if match}
    if None in matches or any(map(_leads_outside, folders)):
        wrong = (n for n, match in zip(names, matches, strict=True) if not match or _leads_outside(match[1]))
        raise _bad_name(next(wrong), path)
    keys = [match[1] + match[2] for match in matches if match]
    found = dict(zip(keys, labels, strict=True))
    if len(found) < len(keys):
        twice = name_of(side, Counter(keys).most_common(1)[0][0])
        raise HasteError(f"{path} names {twice} twice; possible: each once")
    return found


def _columns(entries: list[Any], path: Path) -> tuple[list[str], list[int]]:
    for entry in entries:
        # bool is an int to Python, and no label.
        if (
            type(entry) is not list
            or len(entry) != 2
            or type(entry[0]) is not str
            or type(entry[1]) is not int
            or entry[1] < 0
        ):
            raise HasteError(f"{path} has the entry {str(entry)[:80]}; possible: a name and a label of 0 or above")
    return [name for name, _ in entries], [label for _, label in entries]


def _leads_outside(name: str) -> bool:
    # An empty part is what an absolute path begins with.
    return "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")[:-1])


def _bad_name(name: str, path: Path) -> HasteError:
    if _leads_outside(name):
        return HasteError(f"{path} names {name[:80]!r}, which leads outside of the folder; possible: names within it")
    shown = " or ".join(name_of(side, "00000/00000000") for side in _AFFIXES)
    return HasteError(f"{path} names {name[:80]!r}; possible: names like {shown}")


def _scan(folder: Path, side: str) -> dict[str, int]:
    """Every file of one side, unlabelled; reads directories, never a file."""
    return {m[1] + m[2]: UNLABELLED for name in _walk(folder, "") if (m := _PATTERNS[side].fullmatch(name))}


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    if not folder.is_dir():
        raise HasteError(f"{folder} is no folder; possible: the folder whose files dataset.json leaves unnamed")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name
