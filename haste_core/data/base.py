"""The one interface of all data sets: labelled images in memory or on disk, drawn in seeded batches."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from haste_core.errors import HasteError


class Batch(NamedTuple):
    """What one training step sees.

    x: what the generator models, (B, C, S, S) float32; pixels in [-1, 1], or scaled latents.
    y: labels (B,) int64. images: what the teacher sees, (B, C', S', S') float32 in [-1, 1]; x itself in pixel space.
    """

    x: Tensor
    y: Tensor
    images: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class Dataset(Protocol):
    """A split into training ("held-in") and test ("held-out") images with labels."""

    name: str
    image_size: int
    channels: int
    classes: int

    def __len__(self) -> int:
        """Number of training images."""
        ...

    def batch(self, indices: Tensor, generator: Generator) -> Batch:
        """Training examples `indices` (B,), augmented with draws from `generator`."""
        ...

    def images(self, split: str) -> tuple[Tensor, Tensor]:
        """All images of "train" or "test" without augmentation, (n, C, S, S) in [-1, 1], and labels (n,)."""
        ...


class Batches:
    """An endless, seeded stream of batches; every image once per pass, the short last batch of a pass left out.

    Its state (order of the pass, position in it, generator) can be saved and restored exactly.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        if batch_size > len(dataset):
            raise HasteError(f"train.batch_size {batch_size} exceeds the {len(dataset)} training images")
        self.dataset, self.batch_size = dataset, batch_size
        self.generator = Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def next(self) -> Batch:
        """The next batch of the stream."""
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.dataset), generator=self.generator)
            self.position = 0
        indices = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return self.dataset.batch(indices, self.generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on with exactly the next batch."""
        return {
            "order": self.order,
            "position": torch.tensor(self.position),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was saved."""
        self.order = state["order"]
        self.position = int(state["position"])
        self.generator.set_state(state["generator"])
