"""The study's first stage: the networks it needs before any run, trained once and kept by their settings' hash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste_core import checkpoint, classifier, config, provenance, runs
from haste_core import teacher as teachers
from haste_core.data import Dataset, open_dataset
from haste_core.errors import HasteError
from haste_core.files import locked, write_json


def prepare_teacher(study: config.Study, wanted: config.Teacher | None = None) -> dict[str, Any]:
    """Pretrain a teacher of the study (by default its own) if it is to be pretrained and does not exist yet.

    Returns:
        Facts about the teacher: model, weights, width, heads, blocks, grid, parameters, and for a pretrained one its
        `train_accuracy` and `test_accuracy` in [0, 1].

    Raises:
        HasteError: the held-out accuracy stays below the required one, or a hub or local teacher cannot be loaded.
    """
    wanted = wanted or study.teacher
    path = runs.teacher_path(study, wanted)
    accuracies: dict[str, float] = {}
    if wanted.weights == "pretrain":
        with _made_once(path, "the teacher") as missing:
            if missing:
                torch.set_num_threads(study.train.threads)  # the same bits on every machine with this many threads
                with provenance.session(path.parent, what="teacher"):
                    state, accuracies = _pretrain(wanted, fitting_data(study, wanted.fitting), path.parent)
                    checkpoint.save(path, state, {"accuracies": accuracies})
            accuracies = checkpoint.load(path, prefixes=("none",))[1]["accuracies"]
        teacher = teachers.load_pretrained(wanted, path)
    else:
        teacher = teachers.build_teacher(wanted)
    return {
        "model": wanted.model,
        "weights": wanted.weights,
        "width": teacher.width,
        "heads": teacher.heads,
        "blocks": teacher.blocks,
        "grid": list(teacher.grid),
        "parameters": sum(p.numel() for p in teacher.parameters()),
        **accuracies,
    }


@contextmanager
def _made_once(path: Path, what: str) -> Iterator[bool]:
    """True where `path` is to be made now, alone; runs that only read what there is do not keep each other out.

    Raises:
        InUse: another process is making it.
    """
    if path.is_file():
        yield False
        return
    with locked(path.parent / "run.lock", what):
        yield not path.is_file()


def _pretrain(wanted: config.Teacher, dataset: Dataset, folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and accuracies of the first attempt that is accurate enough; the last failure is raised.

    `folder` holds the state of an attempt that was stopped.
    """
    for attempt in range(wanted.fitting.attempts):
        fitting = wanted.fitting.model_copy(update={"seed": wanted.fitting.seed + attempt})
        try:
            attempted = wanted.model_copy(update={"fitting": fitting})
            state, accuracies = teachers.pretrain(attempted, dataset, folder / f"partial-{fitting.seed}.safetensors")
        except HasteError as error:
            failure = error
            continue
        return state, accuracies | {"attempts": attempt + 1}
    raise failure


def fitting_data(study: config.Study, fitting: config.Fitting) -> Dataset:
    """The study's data under the augmentation a classifier is trained with."""
    return open_dataset(study.data.model_copy(update={"augment": fitting.augment or study.data.augment}))


def build_extractor(study: config.Study, dataset: Dataset) -> classifier.SmallCNN:
    """The extractor's network for the images of `dataset`, its weights drawn from its own seed."""
    channels, size = dataset.images("train", 1)[0].shape[1:3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.evaluate.extractor.seed)
        return classifier.SmallCNN(dataset.classes, study.evaluate.extractor_width, channels, size)


def prepare_extractor(study: config.Study) -> dict[str, Any]:
    """Train the feature extractor behind FID if it does not exist yet.

    Returns:
        Its facts: kind, width, seed, fingerprint of the weights, `train_accuracy` and `test_accuracy` in [0, 1].
    """
    path = runs.extractor_path(study)
    with _made_once(path, "the extractor") as missing:
        if missing:
            torch.set_num_threads(study.train.threads)
            dataset = fitting_data(study, study.evaluate.extractor)
            with provenance.session(path.parent, what="extractor"):
                network = build_extractor(study, dataset)
                accuracies = classifier.fit_classifier(
                    network, dataset, study.evaluate.extractor, "extractor", path.parent / "partial.safetensors"
                )
                weights = network.state_dict()
                facts = {"accuracies": accuracies, "fingerprint": checkpoint.fingerprint(weights)}
                checkpoint.save(path, weights, facts)
    state = checkpoint.load(path, prefixes=("none",))[1]
    evaluate = study.evaluate
    return {
        "kind": "SmallCNN",
        "width": evaluate.extractor_width,
        "seed": evaluate.extractor.seed,
        "fingerprint": state["fingerprint"],
        **state["accuracies"],
    }


def load_extractor(study: config.Study) -> tuple[classifier.SmallCNN, str]:
    """The trained extractor in eval mode, and the fingerprint of its weights."""
    weights, state = checkpoint.load(runs.extractor_path(study))
    network = build_extractor(study, open_dataset(study.data))
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval(), state["fingerprint"]


def write_facts(study: config.Study, path: Path) -> dict[str, Any]:
    """Prepare teachers and extractor, and write their facts to the JSON file `path`; returns them."""
    own, *brought = [prepare_teacher(study, teacher) for teacher in study.teachers()]
    extractor = prepare_extractor(study) if study.evaluate.suite == "study" else None
    facts = {"teacher": own, "further_teachers": brought, "extractor": extractor}
    write_json(path, facts)
    return facts
