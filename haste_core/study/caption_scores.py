"""Caption accuracy of built-in scenes: the share of drawn images in which the study's classifier reads their captions.

Four sets of images are read: captions of seen and of unseen combinations, guidance 1 and 2. The classifier is the
network behind FID, trained on the thing in each cell of real scenes of all combinations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from haste_core import sampling
from haste_core.devices import default_device, exact
from haste_core.models import DiffusionTransformer
from haste_core.seeding import stream
from haste_core.study import config
from haste_core.study.data.scenes import PARTS, Scenes, read, right
from haste_core.study.pretrain import SmallCNN

GUIDANCE = 2.0
SETS = tuple((split, guided) for split in ("seen", "unseen") for guided in (False, True))
SHOWN = 6  # images of each set in the report


def name_of(split: str, guided: bool) -> str:
    """The column of a set in fid.csv."""
    return f"caption_{split}{'_guided' * guided}"


# All parts of the caption, then each of them.
COLUMNS = tuple(name_of(*which) + suffix for which in SETS for suffix in ("", *(f"_{part}" for part in PARTS)))


class Set(NamedTuple):
    """Images drawn for captions: whether of unseen combinations and guided, captions (n,), uint8 images."""

    name: str
    captions: Tensor
    images: Tensor


def labels_of(study: config.StudySettings, dataset: Scenes, split: str) -> Tensor:
    """Numbers of the captions of a set's images: the first ones of FID's images, or as many of unseen combinations."""
    evaluate = study.evaluate
    if split == "seen":
        return sampling.sample_labels(evaluate.n, dataset.sampled, evaluate.labels, evaluate.seed)
    generator = Generator().manual_seed(stream("unseen captions", evaluate.seed))
    return torch.randint(dataset.sampled, dataset.classes, (evaluate.caption_images,), generator=generator)


def shown(study: config.StudySettings) -> list[dict[str, str]]:
    """`set` and `caption` of the images that are kept of each set, in order."""
    dataset = Scenes(study.data)
    return [
        {"set": name_of(split, guided), "caption": dataset.captions.texts[label]}
        for split, guided in SETS
        for label in labels_of(study, dataset, split)[:SHOWN].tolist()
    ]


def drawn(
    study: config.StudySettings, model: DiffusionTransformer, sample: config.SampleSettings, generated: Tensor
) -> Iterator[Set]:
    """Every set of a generator's images; generated: those that FID is measured on."""
    dataset, evaluate = Scenes(study.data), study.evaluate
    for split, guided in SETS:
        labels = labels_of(study, dataset, split)
        if split == "seen" and not guided and sample.guidance == 1:
            yield Set(name_of(split, guided), labels, generated)
            continue
        labels = labels[: evaluate.caption_images]
        options = replace(sample.options, guidance=GUIDANCE if guided else 1.0, guidance_low=0.0, guidance_high=1.0)
        images = sampling.draw(model, labels, range(evaluate.seed, evaluate.seed + len(labels)), options)
        yield Set(name_of(split, guided), labels, sampling.to_uint8(images))


@torch.no_grad()
def accuracies(sets: list[Set], study: config.StudySettings, network: SmallCNN) -> dict[str, float]:
    """Scores by COLUMNS, read by the extractor of the study."""
    dataset, found = Scenes(study.data), {}
    for name, captions, images in sets:
        with exact():
            logits = torch.cat(
                [network(part.to(default_device()).float() / 127.5 - 1).cpu() for part in images.split(500)]
            )
        for part, share in right(dataset, captions, read(logits, dataset.scenes)).items():
            found[name if part == "all" else f"{name}_{part}"] = share
    return found
