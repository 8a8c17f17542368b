"""Teachers of a study: built from its settings, pretrained in it, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from haste_core.errors import HasteError
from haste_core.seeding import stream
from haste_core.study import config, runs
from haste_core.study.classifier import fit_classifier
from haste_core.study.data import Dataset
from haste_core.teacher import Teacher

# Minimum cosine similarity between half-precision and float32 teacher outputs, and number of images it is checked on.
LEAST_COSINE, CHECKED_ON = 0.999, 8


def build_teacher(teacher: config.Teacher, state: Mapping[str, Tensor] | None = None) -> Teacher:
    """Frozen teacher of a study.

    Args:
        teacher: its settings. state: weights trained in the study (`weights: pretrain`).

    Raises:
        HasteError: as `Teacher`.
    """
    return Teacher(
        teacher.model,
        weights=teacher.weights,
        state=state,
        mean=teacher.mean,
        std=teacher.std,
        resize=teacher.resize,
        low_pass=teacher.low_pass,
        precision=teacher.precision,
        seed=teacher.fitting.seed,
        **teacher.kwargs,
    )


def find_teacher(study: config.Study, teacher: config.Teacher | None = None) -> Teacher:
    """Frozen teacher of a study, by default its own: pretrained in it, or timm's with hub or local weights."""
    teacher = teacher or study.teacher
    if teacher.weights == "pretrain":
        return load_pretrained(teacher, runs.teacher_path(study, teacher))
    return build_teacher(teacher)


def check_precision(teacher: Teacher, dataset: Dataset, blocks: tuple[int, ...], precision: str) -> None:
    """Raise HasteError where a teacher in a precision is no longer the teacher: a cosine to float32 below 0.999.

    Args:
        teacher: where it will be used. dataset: what it looks at. blocks: whose q and k are used.
        precision: of the run, where the teacher has none of its own.
    """
    precision = teacher.precision or precision
    if precision == "no":
        return
    images = dataset.examples("train", CHECKED_ON).images.to(teacher.mean.device)
    cosine = teacher.cosine_to_float32(images, blocks, precision)
    if not cosine >= LEAST_COSINE:
        raise HasteError(
            f"the teacher in {precision} has a cosine of {cosine:.5f} to itself in float32, below {LEAST_COSINE}; "
            f"possible: teacher.precision=no, which the run's own precision does not change"
        )


class PatchClassifier(nn.Module):
    """An encoder under two linear heads, on its class token (if any) and on the mean of its patch tokens.

    The second head makes the patch tokens themselves, which the student is aligned with, carry the class.
    """

    def __init__(self, teacher: Teacher, classes: int) -> None:
        super().__init__()
        self.teacher, self.encoder = [teacher], teacher.encoder  # the list keeps the frozen wrapper unregistered
        self.class_head = nn.Linear(teacher.width, classes)
        self.patch_head = nn.Linear(teacher.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes), the mean of both heads."""
        tokens = self.encoder.forward_features(self.teacher[0].prepare(images))  # type: ignore[operator]
        prefix = int(self.encoder.num_prefix_tokens)  # type: ignore[arg-type]
        logits = self.patch_head(tokens[:, prefix:].mean(1))
        return (logits + self.class_head(tokens[:, 0])) / 2 if prefix else logits


def pretrain(
    teacher: config.Teacher, dataset: Dataset, partial: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train the study's own teacher as a classifier.

    Args:
        teacher, dataset: what is trained, and on what.
        partial: where the state is kept on the way, as in `fit_classifier`.

    Returns:
        The encoder's weights and its accuracies (`train_accuracy`, `validation_accuracy`, `test_accuracy`, in [0, 1]).
    """
    frozen = build_teacher(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("teacher heads", teacher.fitting.seed))
        classifier = PatchClassifier(frozen, dataset.classes)
    classifier.requires_grad_(True)
    accuracies = fit_classifier(classifier, dataset, teacher.fitting, "teacher", partial)
    return {name: value.detach().clone() for name, value in frozen.encoder.state_dict().items()}, accuracies


def load_pretrained(teacher: config.Teacher, path: Path) -> Teacher:
    """The teacher whose weights `pretrain` left in the safetensors file `path`."""
    if not path.is_file():
        raise HasteError(f"no teacher weights at {path}; possible: haste teacher <study> trains them")
    return build_teacher(teacher, load_file(path))
