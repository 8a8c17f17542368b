"""The two suites of scores behind one protocol, and the card that names everything that moves a score.

`study` scores on features of a classifier that the study trains itself; `adm` by the ADM protocol (`.adm`).
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from haste_core import sampling
from haste_core.seeding import stream
from haste_core.study import config
from haste_core.study.data import Batches, Dataset, open_dataset
from haste_core.study.preparation import load_autoencoder, load_extractor
from haste_core.study.runs import Run, environment
from haste_core.study.scoring import adm
from haste_core.study.scoring.denoising import SUMMARIES, Probe
from haste_core.study.scoring.frechet import Gaussian, frechet_distance, pixel_gaussian
from haste_core.study.scoring.image_sources import Images, MemoryImages, TrainingImages, training_hash
from haste_core.study.scoring.metrics import METRICS, CopyCheck, compare, extract_features, frechet, register_extractor

# Of the suite `study`: on features of the extractor trained on labels; then on one trained without, and on pixels.
STUDY_METRICS = (*METRICS, "fid_unlabelled", "fd_pixel")
_HEAD, _TAIL = ("arm", "seed", "step", "images_seen"), ("n", "card")
_HELD_OUT = tuple(f"{name}_heldout" for name in STUDY_METRICS)
# Real images on each side of a score, at most: neighbours are looked up among all pairs.
LIMIT = 10_000
# Held-out images whose distance to the training images says what is near.
COPY_CHECKED = 1000


def metrics_of(study: config.Study) -> tuple[str, ...]:
    """Names of the scores of the study's suite, without those against held-out images."""
    return adm.METRICS if study.evaluate.suite == "adm" else STUDY_METRICS


def columns(study: config.Study) -> tuple[str, ...]:
    """Columns of the study's table of scores, the keys of `evaluation.rows`."""
    if study.evaluate.suite == "adm":
        return (*_HEAD, *adm.METRICS, *_TAIL, *SUMMARIES)
    return (*_HEAD, *STUDY_METRICS, *_TAIL, *_HELD_OUT, "nearest", "copies", *SUMMARIES)


class Scoring(Protocol):
    """Scores sets of images of one study: holds the real side, the extractors and the card."""

    classes: int
    extractor: str
    card: dict[str, Any]
    probe: Probe

    def score(self, generated: Any) -> dict[str, float]:
        """All scores of uint8 images."""
        ...

    def floor(self) -> list[dict[str, Any]]:
        """What real images score: rows of `pair`, `n`, `n_reference` and the scores of `metrics_of`."""
        ...


def open_scorer(study: config.Study, progress: bool = True) -> Scoring:
    """The scorer of the study's suite."""
    return AdmStudyScorer(study, progress) if study.evaluate.suite == "adm" else Scorer(study)


def probe_of(study: config.Study) -> Probe:
    """The images of a study that the denoising loss is measured on."""
    return Probe(open_dataset(study.data), study.evaluate.denoising_images, study.evaluate.seed)


def card(
    study: config.Study, extractor: str, ema_decay: float | None = None, scoring: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that changes a score, apart from the weights that are scored; `card_id` names it.

    Args:
        study: its data, sampling and evaluation.
        extractor: name of the extractor, or of several, with the hash of its weights.
        ema_decay: of the run, where it is not the study's.
        scoring: scoring facts for the card, where they are known already; real images are hashed otherwise.
    """
    evaluate = study.evaluate
    if scoring is None:
        adm_facts = evaluate.suite == "adm"
        scoring = adm.scoring_facts(evaluate, study.data, extractor) if adm_facts else _study_facts(study, extractor)
        scoring |= probe_of(study).facts
    content = {
        **sampling.drawing_facts(study.data, study.sample),
        "suite": evaluate.suite,
        "n": evaluate.n,
        "seeds": [evaluate.seed, evaluate.seed + evaluate.n - 1],
        "labels": evaluate.labels,
        "ema_decay": study.train.ema_decay if ema_decay is None else ema_decay,
        **scoring,
    }
    return content | {"card_id": config.digest(content)}


def card_of(known: dict[str, Any], run: Run) -> dict[str, Any]:
    """A study's card for one of its runs, which may average its weights and draw its images in its own way."""
    own = {**sampling.drawing_facts(run.study.data, run.sample), "ema_decay": run.config.train.ema_decay}
    content = {key: value for key, value in known.items() if key != "card_id"} | own
    return content | {"card_id": config.digest(content)}


def _study_facts(study: config.Study, extractor: str) -> dict[str, Any]:
    evaluate = study.evaluate
    held_out = sampling.to_uint8(open_dataset(study.data).images("test", LIMIT)[0])
    return {
        "extractor": extractor,
        "evaluator": f"torch-fidelity {environment()['torch-fidelity']}",
        "kid": [evaluate.kid_subsets, evaluate.kid_subset_size],
        "neighborhood": evaluate.neighborhood,
        "reference": f"{study.data.kind} train split (held-in), not augmented, {LIMIT} images at most",
        "reference_hash": training_hash(TrainingImages(study.data)),
        "reference_heldout": f"{study.data.kind} test split (held-out), {LIMIT} images at most",
        "reference_heldout_hash": hashlib.sha256(held_out.contiguous().numpy().tobytes()).hexdigest()[:16],
    }


class Side(NamedTuple):
    """A set of images as it is scored: features by both extractors (n, width), pixel statistics, how many."""

    labelled: Tensor
    unlabelled: Tensor
    pixels: Gaussian
    n: int


class Scorer:
    """The suite `study`: STUDY_METRICS against held-in and held-out images, and a copy check."""

    def __init__(self, study: config.Study) -> None:
        self.study = study
        dataset = open_dataset(study.data)
        self.classes = dataset.classes
        training = TrainingImages(study.data)
        self.real = {
            "train": training.at(held_in(len(training))),
            "test": sampling.to_uint8(dataset.images("test", LIMIT)[0]),
        }
        self.copies = CopyCheck(self.real["test"][:COPY_CHECKED], lambda: training.batches(5000))
        self.augmented = augmented(dataset, study.evaluate.seed)
        self.extractor = register_extractor(*load_extractor(study))
        self.unlabelled = register_extractor(*load_autoencoder(study))
        self.probe = probe_of(study)
        # The real sides stay the same for every set that is scored, so they are looked at once.
        self.sides = {name: self._side(images) for name, images in self.real.items()}
        facts = _study_facts(study, f"{self.extractor}+{self.unlabelled}") | self.probe.facts
        self.card = card(study, self.extractor, scoring=facts)

    def _side(self, images: Tensor) -> Side:
        """Features and statistics of uint8 images."""
        batch_size = self.study.evaluate.batch_size
        labelled, unlabelled = (extract_features(images, e, batch_size) for e in (self.extractor, self.unlabelled))
        return Side(labelled, unlabelled, pixel_gaussian(images), len(images))

    def _compare(self, a: Side, b: Side) -> dict[str, float]:
        """The scores of STUDY_METRICS of one side against another."""
        return compare(a.labelled, b.labelled, self.study.evaluate) | {
            "fid_unlabelled": frechet(a.unlabelled, b.unlabelled),
            "fd_pixel": frechet_distance(a.pixels, b.pixels),
        }

    def score(self, generated: Tensor) -> dict[str, float]:
        """All scores of uint8 images: against held-in images, with `_heldout` against held-out ones, and copies."""
        found = self._side(generated)
        out_scores = self._compare(found, self.sides["test"])
        in_scores = self._compare(found, self.sides["train"])
        return in_scores | {f"{k}_heldout": v for k, v in out_scores.items()} | self.copies(generated)

    def floor(self) -> list[dict[str, Any]]:
        """What real images score against real ones: the value a perfect generator could reach at these sizes."""
        train, test, moved = self.sides["train"], self.sides["test"], self._side(self.augmented)
        pairs = {
            "held-out against held-in": (test, train),
            "augmented held-in against held-in": (moved, train),
            "augmented held-in against held-out": (moved, test),
        }
        return [{"pair": name, "n": a.n, "n_reference": b.n, **self._compare(a, b)} for name, (a, b) in pairs.items()]


def held_in(n: int) -> Tensor:
    """Which of n training images are the held-in side, (m,) int64: all, or LIMIT of them from a fixed seed."""
    if n <= LIMIT:
        return torch.arange(n)
    return torch.randperm(n, generator=Generator().manual_seed(0))[:LIMIT].sort().values


def augmented(dataset: Dataset, seed: int) -> Tensor:
    """uint8 training images under one draw of the augmentation, at most LIMIT of them."""
    return sampling.to_uint8(Batches(dataset, min(len(dataset), LIMIT), stream("floor", seed)).next().images)


class AdmStudyScorer:
    """The suite `adm`: scores of METRICS in `haste_core.study.scoring.adm` against the study's reference."""

    def __init__(self, study: config.Study, progress: bool = True) -> None:
        self.study = study
        self.classes = open_dataset(study.data).classes
        self.adm = adm.AdmScorer(study.evaluate, study.data, progress)
        self.extractor = self.adm.extractor
        self.probe = probe_of(study)
        self.card = card(study, self.extractor, scoring=self.adm.facts | self.probe.facts)

    def score(self, generated: Images) -> dict[str, float]:
        """All scores of uint8 images."""
        return self.adm.score(generated)

    def floor(self) -> list[dict[str, Any]]:
        """What at most 10,000 real images score against the reference, which takes the place of held-in images."""
        dataset = open_dataset(self.study.data)
        pairs = {
            "held-out against held-in": sampling.to_uint8(dataset.images("test", LIMIT)[0]),
            "augmented held-in against held-in": augmented(dataset, self.study.evaluate.seed),
        }
        n_reference = self.adm.reference.n
        return [
            {"pair": name, "n": len(real), "n_reference": n_reference, **self.adm.score(MemoryImages(real))}
            for name, real in pairs.items()
        ]
