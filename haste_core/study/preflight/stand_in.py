"""A small run that takes training steps like those of a study, for timing: fewer blocks, invented images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from haste_core.files import write_json
from haste_core.study import config
from haste_core.study.data import Dataset, open_dataset
from haste_core.study.data.base import augmented
from haste_core.study.preflight.estimates import parameters
from haste_core.study.preflight.tracing import Example, student_of
from haste_core.training import Batch


def smaller(run: config.RunConfig, example: Example, limit: float) -> config.RunConfig:
    """The run with so few of its blocks that its student has at most `limit` parameters, but one block at least.

    Width, tokens, teacher and both losses stay; layers that are gone hand their place to the last one. The teacher's
    weights are random, and alignment never ends.
    """
    depth = run.model.depth
    while depth > 1 and parameters(student_of(_with_depth(run, depth), example)) > limit:
        depth //= 2
    return _with_depth(run, depth)


def _with_depth(run: config.RunConfig, depth: int) -> config.RunConfig:
    aligned = run.alignment
    # Of several pairs at one student block the last stays: a block is aligned once in the whole run, too.
    pairs = {min(student, depth - 1): teacher for student, teacher in aligned.layer_pairs}
    few = {"depth": min(aligned.depth, depth), "layer_pairs": list(pairs.items())}
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"preset": None, "depth": depth}),
            "alignment": aligned.model_copy(update=few),
            "teacher": run.teacher.model_copy(update={"weights": "random"}),
            "termination": config.Termination(),
        }
    )


def unaligned(run: config.RunConfig) -> config.RunConfig:
    """The run without alignment, whose every step is one of phase II."""
    off = {"lambda_feature": 0.0, "lambda_attention": 0.0}
    return run.model_copy(update={"alignment": run.alignment.model_copy(update=off)})


@contextmanager
def images(data: config.Data, example: Example, batch: int) -> Iterator[Dataset]:
    """While open, a data set for batches of so many images: the digits, else noise of the shape of the study's data.

    Latents lie in a temporary folder and are read as in training, other images in memory.
    """
    if data.kind == "digits":
        yield open_dataset(data)
    elif data.kind == "images":
        yield Noise(example, data.augment, batch)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder), example, 2 * batch + 2)
            yield open_dataset(config.Data(kind="latents", path=folder, test_fraction=0.5))


def write_pairs(folder: Path, example: Example, count: int) -> None:
    """Fill a folder with so many pairs of a noise image and a noise latent, laid out as for REPA, in two classes."""
    rng = np.random.default_rng(0)
    for side, name in (("images", "img{:08d}.png"), ("vae-sd", "img-mean-std-{:08d}.npy")):
        (folder / side / "00000").mkdir(parents=True)
        names = [f"00000/{name.format(i)}" for i in range(count)]
        write_json(folder / side / "dataset.json", {"labels": [[name, i % 2] for i, name in enumerate(names)]})
        for path in (folder / side / name for name in names):
            if side == "images":
                pixels = rng.integers(0, 256, (example.image_size, example.image_size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
            else:
                np.save(path, rng.random((2 * example.channels, example.size, example.size), dtype=np.float32))


class Noise:
    """Images of noise in memory, augmented as a study's are."""

    name = "noise"

    def __init__(self, example: Example, augment: config.Augment, count: int) -> None:
        self.image_size, self.channels, self.classes = example.size, example.channels, example.classes
        self.augment = augment
        generator = Generator().manual_seed(0)
        self.x = torch.rand(count, example.channels, example.size, example.size, generator=generator) * 2 - 1
        self.y = torch.arange(count) % example.classes

    def __len__(self) -> int:
        return len(self.x)

    def batch(
        self, indices: Tensor, generator: Generator, with_images: bool = True, part: slice = slice(None)
    ) -> Batch:
        """Training examples, augmented at random."""
        wanted = indices[part]
        x = augmented(self.x[wanted], self.augment, generator, len(indices), part)
        return Batch(x, self.y[wanted], x)

    def images(self, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels, the same of every split."""
        return self.x[:count], self.y[:count]

    def examples(self, split: str, count: int | None = None, with_images: bool = True) -> Batch:
        """The same images as a batch."""
        return Batch(self.x[:count], self.y[:count], self.x[:count])
