"""The suite `study`: scores on features of networks that the study trains itself, and the card of every score.

The generated set comes first, the real one second: precision and recall swap when the sets do. The suite `adm` is in
`haste_core.study.adm`, scores of a run's checkpoints in `haste_core.study.evaluation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from haste_core import sampling
from haste_core.devices import default_device, exact
from haste_core.errors import HasteError
from haste_core.seeding import stream
from haste_core.study import config, latents, runs
from haste_core.study.data import Batches, Dataset, open_dataset
from haste_core.study.data.base import to_signed
from haste_core.study.denoising import Probe
from haste_core.study.images import TrainingImages, as_uint8
from haste_core.study.pretrain import EXTRACTORS, FeatureNetwork, load_extractor
from haste_core.study.runs import Run

METRICS = ("fid", "kid", "precision", "recall")
# The scores above on the extractor trained on labels; then a distance on the one trained without, and one on pixels.
ADM_METRICS = ("fid", "sfid", "is", "precision", "recall", "fd_dinov2")
STUDY_METRICS = (*METRICS, "fid_unlabelled", "fd_pixel")
# Read off images by the law of the data, where it is known: `Law.read`, and the share of digits that are as asked for.
LAW_METRICS = ("texture_power", "direction", "digit_accuracy")
# Maximum number of real images of a score: precision and recall compare all pairs.
LIMIT = 10_000
# Held-out images whose distance to the training images is the scale of the copy check.
COPY_CHECKED = 1000
# Side of the patches in which pixels of larger images are compared.
PATCH = 8


# Statistics of features


class Gaussian(NamedTuple):
    """Mean (d,) and covariance (d, d) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of features that come in parts; sums and outer products in float64.

    They are taken about the mean of the first part: about zero, features far from it would lose their covariance.
    """

    def __init__(self) -> None:
        self.n = 0
        self._centre = self._sum = self._outer = torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Add features (B, d).

        Raises:
            HasteError: some are not finite.
        """
        part = features.double()
        check_features(part)
        if self.n == 0:
            self._centre = part.mean(0)
            self._sum, self._outer = torch.zeros_like(self._centre), part.new_zeros(part.shape[1], part.shape[1])
        part = part - self._centre
        self.n += len(part)
        self._sum += part.sum(0)
        self._outer.addmm_(part.T, part)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (divided by n - 1) of all features added."""
        if self.n < 2:
            raise HasteError(f"a covariance of {self.n} images; expected at least 2")
        off = self._sum / self.n
        covariance = (self._outer - self.n * torch.outer(off, off)) / (self.n - 1)
        return Gaussian((self._centre + off).cpu().numpy(), covariance.cpu().numpy())


def check_features(features: Tensor) -> None:
    """Raise HasteError where features (n, d) are not finite."""
    wrong = int((~features.isfinite()).any(1).sum())
    if wrong:
        raise HasteError(f"features of {wrong} of {len(features)} images are not finite; expected a sound extractor")


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians: |m - n|^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2).

    Heusel et al., arXiv 1706.08500. Both roots come from symmetric eigendecompositions in float64; torch-fidelity
    takes eigenvalues of the unsymmetric product S T: the same number, slower and with imaginary parts by rounding.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
        raise HasteError(f"features of width {a.mean.shape} and {b.mean.shape}; expected statistics of one extractor")
    s, t = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    inner = root @ t @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(s) + np.trace(t) - 2 * cross)


def pixel_gaussian(images: Tensor) -> Gaussian:
    """Mean and covariance of the pixels of uint8 images (n, C, S, S), scaled to [-1, 1].

    Larger images are cut into 8x8 patches from the upper left corner; a margin narrower than a patch is left out.
    """
    moments = Moments()
    for part in images.split(1000):
        pixels = part.float() / 127.5 - 1
        side = min(PATCH, pixels.shape[-1])
        tiles = pixels.unfold(2, side, side).unfold(3, side, side)  # (n, C, rows, columns, side, side)
        moments.add(tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1))
    return moments.gaussian()


@torch.no_grad()
def extract_features(images: Tensor, network: FeatureNetwork, batch_size: int) -> Tensor:
    """Features (n, width) float64 on the CPU of uint8 images (n, C, S, S), `batch_size` at a time."""
    device = default_device()
    network.to(device)
    batches = (part.to(device).contiguous().float() for part in as_uint8(images).split(batch_size))
    with exact():
        return torch.cat([network.features(batch / 127.5 - 1).double().cpu() for batch in batches])


def frechet(generated: Tensor, real: Tensor) -> float:
    """The Frechet distance of features (n, width) and (m, width), by torch-fidelity."""
    from torch_fidelity import metric_fid  # takes seconds to import

    statistics = [metric_fid.fid_features_to_statistics(side) for side in (generated, real)]
    return float(metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID])


def precision_recall(
    generated: Tensor, real: Tensor, neighborhood: int, batch_size: int = 10_000
) -> tuple[float, float]:
    """Improved precision and recall in [0, 1] of features (n, d) and (m, d), by torch-fidelity.

    Kynkaanniemi et al., arXiv 1904.06991: the share of generated features within the distance of a real one to its
    `neighborhood`-th neighbour, and the share of real ones within that of a generated one. Tables of distances have
    `batch_size` rows.

    Raises:
        HasteError: there are too few images.
    """
    from torch_fidelity import metric_prc

    if min(len(generated), len(real)) <= neighborhood:
        raise HasteError(
            f"precision and recall of {len(generated)} generated and {len(real)} real images; expected more than "
            f"evaluate.neighborhood ({neighborhood}) of each"
        )
    found = metric_prc.prc_features_to_metric(
        generated, real, prc_neighborhood=neighborhood, prc_batch_size=batch_size, save_cpu_ram=True, verbose=False
    )
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]


def compare(generated: Tensor, real: Tensor, evaluate: config.EvaluateSettings) -> dict[str, float]:
    """FID, KID, precision and recall of features (n, width) and (m, width) float64, by torch-fidelity.

    FID and KID are 0 for equal distributions, KID can be slightly negative.

    Raises:
        HasteError: features are not finite, or of so few images that a score has no meaning.
    """
    from torch_fidelity import metric_kid

    for side in (generated, real):
        check_features(side)
    precision, recall = precision_recall(generated, real, evaluate.neighborhood)  # refuses too few images
    kid = metric_kid.kid_features_to_metric(
        generated,
        real,
        kid_subsets=evaluate.kid_subsets,
        kid_subset_size=min(evaluate.kid_subset_size, len(generated), len(real)),
        verbose=False,
    )
    mean = float(kid[metric_kid.KEY_METRIC_KID_MEAN])
    return {"fid": frechet(generated, real), "kid": mean, "precision": precision, "recall": recall}


# Copies of training images


def nearest_distances(images: Tensor, training: Iterable[Tensor]) -> Tensor:
    """The Euclidean distance (n,) of each uint8 image (n, C, S, S) to its nearest training image, pixels in [-1, 1].

    training: batches of uint8 images.
    """
    device = default_device()
    x = images.flatten(1).to(device).float() / 127.5
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64, device=device)
    for batch in training:
        known = batch.flatten(1).to(device).float() / 127.5
        # One matrix product finds the nearest; its distance is computed exactly, as the product loses small distances.
        closest = torch.cat([(known.square().sum(1) - 2 * part @ known.T).argmin(1) for part in x.split(1000)])
        nearest = torch.minimum(nearest, (x.double() - known[closest].double()).norm(dim=1))
    return nearest.cpu()


def copy_scores(generated: Tensor, held_out: Tensor) -> dict[str, float]:
    """`nearest` and `copies` of generated images, from `nearest_distances` of theirs and of held-out images.

    `nearest` is the ratio of medians (below 1: closer to training images than real ones are), `copies` the share of
    generated images closer than 99 % of held-out images are; real images give 0.01.
    """
    return {
        "nearest": float(generated.median() / held_out.median()),
        "copies": float((generated < held_out.quantile(0.01)).double().mean()),
    }


# The card


def card(study: config.StudySettings, scoring: dict[str, Any]) -> dict[str, Any]:
    """Everything that changes a score, apart from the weights that are scored; `card_id` is its hash.

    scoring: facts of the suite's scoring and of the denoising images (`Probe.facts`).
    """
    evaluate = study.evaluate
    content = {
        **latents.drawing_facts(study.data, study.sample),
        "suite": evaluate.suite,
        "n": evaluate.n,
        "seeds": [evaluate.seed, evaluate.seed + evaluate.n - 1],
        "labels": evaluate.labels,
        "ema_decay": study.train.ema_decay,
        **scoring,
    }
    return content | {"card_id": config.digest(content)}


def card_of(known: dict[str, Any], run: Run) -> dict[str, Any]:
    """The study's card for one of its runs, with the run's own EMA decay and sampling."""
    own = {**latents.drawing_facts(run.study.data, run.sample), "ema_decay": run.config.train.ema_decay}
    content = {key: value for key, value in known.items() if key != "card_id"} | own
    return content | {"card_id": config.digest(content)}


def probe_of(study: config.StudySettings) -> Probe:
    """The images of a study that the denoising loss is measured on."""
    return Probe(open_dataset(study.data), study.evaluate.denoising_images, study.evaluate.seed)


# The suite


def scoring_facts(study: config.StudySettings, extractor: str) -> dict[str, Any]:
    """Facts of the suite's scoring for the card: extractors, settings, and the real images."""
    evaluate = study.evaluate
    held_out = sampling.to_uint8(open_dataset(study.data).images("test", LIMIT)[0])
    return {
        "extractor": extractor,
        "evaluator": f"torch-fidelity {runs.environment()['torch-fidelity']}",
        "kid": [evaluate.kid_subsets, evaluate.kid_subset_size],
        "neighborhood": evaluate.neighborhood,
        "reference": f"{study.data.kind} train split (held-in), not augmented, {LIMIT} images at most",
        "reference_hash": TrainingImages(study.data).hash(),
        "reference_heldout": f"{study.data.kind} test split (held-out), {LIMIT} images at most",
        "reference_heldout_hash": hashlib.sha256(held_out.contiguous().numpy().tobytes()).hexdigest()[:16],
        **({"caption_images": evaluate.caption_images} if study.data.has_scenes else {}),
    }


def augmented(dataset: Dataset, seed: int) -> Tensor:
    """uint8 training images under one draw of the augmentation, at most LIMIT of them."""
    return sampling.to_uint8(Batches(dataset, min(len(dataset), LIMIT), stream("floor", seed)).next().images)


class Side(NamedTuple):
    """Features of a set of images by the extractors of EXTRACTORS, and pixel statistics."""

    labelled: Tensor
    unlabelled: Tensor
    pixels: Gaussian


class StudyScorer:
    """Scores of sets of uint8 images: STUDY_METRICS against held-in and held-out images, and a copy check."""

    def __init__(self, study: config.StudySettings) -> None:
        self.study = study
        dataset, self.training = open_dataset(study.data), TrainingImages(study.data)
        self.law = dataset.law
        order = torch.randperm(len(self.training), generator=Generator().manual_seed(0))
        self.real = {
            "train": self.training.at(order[:LIMIT].sort().values),
            "test": sampling.to_uint8(dataset.images("test", LIMIT)[0]),
        }
        self.held_out_distances = nearest_distances(self.real["test"][:COPY_CHECKED], self.training.batches(5000))
        self.augmented = augmented(dataset, study.evaluate.seed)
        self.networks, names = zip(*(load_extractor(study, role) for role in EXTRACTORS), strict=True)
        self.sides = {name: self._side(images) for name, images in self.real.items()}
        self.probe = probe_of(study)
        self.card = card(study, scoring_facts(study, "+".join(names)) | self.probe.facts)

    def _side(self, images: Tensor) -> Side:
        batch_size = self.study.evaluate.batch_size
        labelled, unlabelled = (extract_features(images, network, batch_size) for network in self.networks)
        return Side(labelled, unlabelled, pixel_gaussian(images))

    def _compare(self, a: Side, b: Side) -> dict[str, float]:
        """The scores of STUDY_METRICS of one side against another."""
        return compare(a.labelled, b.labelled, self.study.evaluate) | {
            "fid_unlabelled": frechet(a.unlabelled, b.unlabelled),
            "fd_pixel": frechet_distance(a.pixels, b.pixels),
        }

    def score(self, generated: Tensor) -> dict[str, float]:
        """Scores of uint8 images: against held-in images, with `_heldout` against held-out ones, and copies."""
        found = self._side(generated)
        scores = self._compare(found, self.sides["train"])
        held_out = {f"{name}_heldout": value for name, value in self._compare(found, self.sides["test"]).items()}
        distances = nearest_distances(generated, self.training.batches(5000))
        return scores | held_out | copy_scores(distances, self.held_out_distances) | self._read_by_law(generated)

    def _read_by_law(self, generated: Tensor) -> dict[str, float]:
        if self.law is None:
            return {}
        evaluate, images = self.study.evaluate, to_signed(generated)
        asked = sampling.sample_labels(len(images), len(self.law.templates), evaluate.labels, evaluate.seed)
        read, found = self.law.read(images)
        return read | {"digit_accuracy": float((found == asked).double().mean())}

    def floor(self) -> list[dict[str, Any]]:
        """Scores of real images against real ones, the values of a perfect generator at these sizes.

        Rows of `pair`, `n`, `n_reference` and STUDY_METRICS.
        """
        train, test, moved = self.sides["train"], self.sides["test"], self._side(self.augmented)
        pairs = {
            "held-out against held-in": (test, train),
            "augmented held-in against held-in": (moved, train),
            "augmented held-in against held-out": (moved, test),
        }
        return [
            {"pair": pair, "n": len(a.labelled), "n_reference": len(b.labelled), **self._compare(a, b)}
            for pair, (a, b) in pairs.items()
        ]
