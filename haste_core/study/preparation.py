"""The study's first stage: the networks it needs before any run, trained once and kept by their settings' hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from haste_core import checkpoint
from haste_core import teacher as teachers
from haste_core.errors import HasteError
from haste_core.files import locked, write_json
from haste_core.seeding import stream
from haste_core.study import classifier, config, runs
from haste_core.study.data import Dataset, open_dataset

T = TypeVar("T")
# A network and its measures by split.
Trained = tuple[nn.Module, dict[str, float]]


def prepare_teacher(study: config.Study, wanted: config.Teacher | None = None) -> dict[str, Any]:
    """Pretrain a teacher of the study (by default its own) if it is to be pretrained and does not exist yet.

    Returns:
        Facts about the teacher: model, weights, width, heads, blocks, grid, parameters, and for a pretrained one its
        `train_accuracy`, `validation_accuracy` and `test_accuracy` in [0, 1].

    Raises:
        HasteError: the validation accuracy stays below the required one, or a hub or local teacher cannot be loaded.
    """
    wanted = wanted or study.teacher
    path = runs.teacher_path(study, wanted)
    accuracies: dict[str, float] = {}
    if wanted.weights == "pretrain":
        with _made_once(path, "the teacher") as missing:
            if missing:
                torch.set_num_threads(study.train.threads)  # the same bits on every machine with this many threads
                dataset = fitting_data(study, wanted.fitting)

                def attempt(fitting: config.Fitting) -> tuple[dict[str, Tensor], dict[str, float]]:
                    partial = path.parent / f"partial-{fitting.seed}.safetensors"
                    return teachers.pretrain(wanted.model_copy(update={"fitting": fitting}), dataset, partial)

                with runs.session(path.parent, what="teacher"):
                    (state, accuracies), attempts = _first_accepted(wanted.fitting, attempt)
                    checkpoint.save(path, state, {"accuracies": accuracies | {"attempts": attempts}})
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
    """Acquire the right to create `path`, waiting for a process that is at it; yields False if it exists then."""
    if path.is_file():
        yield False
        return
    with locked(path.parent / "run.lock", what, wait=True):
        yield not path.is_file()


def _first_accepted(fitting: config.Fitting, train: Callable[[config.Fitting], T]) -> tuple[T, int]:
    """Result of `train` under the first of the fitting's seeds whose network is accepted, and the number of attempts.

    Raises:
        HasteError: no attempt was accepted; the last failure.
    """
    for attempt in range(fitting.attempts):
        try:
            return train(fitting.model_copy(update={"seed": fitting.seed + attempt})), attempt + 1
        except HasteError as error:
            failure = error
    raise failure


def fitting_data(study: config.Study, fitting: config.Fitting) -> Dataset:
    """The study's data under the augmentation a classifier is trained with."""
    return open_dataset(study.data.model_copy(update={"augment": fitting.augment or study.data.augment}))


def build_extractor(study: config.Study, dataset: Dataset, seed: int | None = None) -> classifier.SmallCNN:
    """The extractor's network for the images of `dataset`, its weights drawn from `seed`, by default the settings'."""
    with _drawn("extractor weights", study.evaluate.extractor.seed if seed is None else seed):
        return classifier.SmallCNN(dataset.classes, study.evaluate.extractor_width, *_shape(dataset))


def build_autoencoder(study: config.Study, dataset: Dataset, seed: int | None = None) -> classifier.Autoencoder:
    """The autoencoder for the images of `dataset`, its weights drawn from `seed`, by default the settings'."""
    with _drawn("autoencoder weights", study.evaluate.autoencoder.seed if seed is None else seed):
        return classifier.Autoencoder(study.evaluate.extractor_width, *_shape(dataset))


@contextmanager
def _drawn(role: str, seed: int) -> Iterator[None]:
    """A context in which weights are drawn from the stream of a role."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(role, seed))
        yield


def _shape(dataset: Dataset) -> tuple[int, int]:
    """Channels and side of the images."""
    channels, side = dataset.images("train", 1)[0].shape[1:3]
    return channels, side


def prepare_extractor(study: config.Study) -> dict[str, Any]:
    """Train the feature extractor behind FID if it does not exist yet.

    Returns:
        Its facts: kind, width, seed, fingerprint of the weights, attempts, and `train_accuracy`, `validation_accuracy`
        and `test_accuracy` in [0, 1].
    """

    def train(fitting: config.Fitting, dataset: Dataset, partial: Path) -> Trained:
        network = build_extractor(study, dataset, fitting.seed)
        return network, classifier.fit_classifier(network, dataset, fitting, "extractor", partial)

    facts = _prepared(study, runs.extractor_path(study), study.evaluate.extractor, train)
    return {"kind": "SmallCNN", **facts}


def prepare_autoencoder(study: config.Study) -> dict[str, Any]:
    """Train the feature extractor that needs no labels if it does not exist yet.

    Returns:
        Its facts: kind, width, seed, fingerprint of the weights, attempts, and `train_explained`,
        `validation_explained` and `test_explained`, shares of pixel variance.
    """

    def train(fitting: config.Fitting, dataset: Dataset, partial: Path) -> Trained:
        network = build_autoencoder(study, dataset, fitting.seed)
        return network, classifier.fit_autoencoder(network, dataset, fitting, "autoencoder", partial)

    facts = _prepared(study, runs.autoencoder_path(study), study.evaluate.autoencoder, train)
    return {"kind": "Autoencoder", **facts}


def _prepared(
    study: config.Study,
    path: Path,
    fitting: config.Fitting,
    train: Callable[[config.Fitting, Dataset, Path], Trained],
) -> dict[str, Any]:
    """Facts of the feature extractor in `path`, which `train` makes if it does not exist yet."""
    what = path.stem
    with _made_once(path, f"the {what}") as missing:
        if missing:
            torch.set_num_threads(study.train.threads)
            dataset = fitting_data(study, fitting)

            def attempt(chosen: config.Fitting) -> Trained:
                return train(chosen, dataset, path.parent / f"partial-{chosen.seed}.safetensors")

            with runs.session(path.parent, what=what):
                (network, measured), attempts = _first_accepted(fitting, attempt)
                weights = network.state_dict()
                measured = measured | {"attempts": attempts}
                checkpoint.save(path, weights, {"measured": measured, "fingerprint": checkpoint.fingerprint(weights)})
    state = checkpoint.load(path, prefixes=("none",))[1]
    common = {"width": study.evaluate.extractor_width, "seed": fitting.seed, "fingerprint": state["fingerprint"]}
    return {**common, **state["measured"]}


def load_extractor(study: config.Study) -> tuple[classifier.SmallCNN, str]:
    """The trained extractor in eval mode, and the fingerprint of its weights."""
    network = build_extractor(study, open_dataset(study.data))
    return network, _load(network, runs.extractor_path(study))


def load_autoencoder(study: config.Study) -> tuple[classifier.Autoencoder, str]:
    """The trained autoencoder in eval mode, and the fingerprint of its weights."""
    network = build_autoencoder(study, open_dataset(study.data))
    return network, _load(network, runs.autoencoder_path(study))


def _load(network: nn.Module, path: Path) -> str:
    """Load the weights in `path` into a network, freeze it, and return their fingerprint."""
    weights, state = checkpoint.load(path)
    network.load_state_dict(weights)
    network.requires_grad_(False).eval()
    return str(state["fingerprint"])


def write_facts(study: config.Study, path: Path) -> dict[str, Any]:
    """Prepare teachers, extractor and autoencoder, and write their facts to the JSON file `path`; returns them."""
    own, *brought = [prepare_teacher(study, teacher) for teacher in study.teachers()]
    scored_here = study.evaluate.suite == "study"
    extractor = prepare_extractor(study) if scored_here else None
    autoencoder = prepare_autoencoder(study) if scored_here else None
    facts = {"teacher": own, "further_teachers": brought, "extractor": extractor, "autoencoder": autoencoder}
    write_json(path, facts)
    return facts
