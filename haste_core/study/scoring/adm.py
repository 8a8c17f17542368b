"""The ADM protocol: FID, sFID, Inception Score, precision and recall on Inception, and a Frechet distance on DINOv2.

Dhariwal and Nichol, arXiv 2105.05233, on torch-fidelity's port of the same Inception weights. One pass over the
generated images gives all scores; what is taken from the reference is kept in runs/references.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from haste_core.devices import default_device
from haste_core.files import locked, output_root
from haste_core.study import config
from haste_core.study.runs import environment
from haste_core.study.scoring import reference
from haste_core.study.scoring.extractors import LOGITS, POOL, SPATIAL, build_dinov2, build_inception
from haste_core.study.scoring.frechet import IS_PART, Moments, frechet_distance, inception_score, precision_recall
from haste_core.study.scoring.image_sources import Images, NpzImages, TrainingImages
from haste_core.study.scoring.reference import MANIFOLD, Reference

METRICS = ("fid", "sfid", "is", "precision", "recall", "fd_dinov2")
# Inception's activations of one image take some 30 MB.
CPU_BATCH = 50


@dataclass(frozen=True)
class Networks:
    """The extractors of one evaluation and the hashes of their weights."""

    inception: nn.Module
    inception_hash: str
    dinov2: nn.Module | None
    dinov2_hash: str | None

    @property
    def name(self) -> str:
        """Both networks in one word, for the card."""
        return f"adm-inception-{self.inception_hash}" + (f"+dinov2-{self.dinov2_hash}" if self.dinov2_hash else "")


def build_networks(evaluate: config.Evaluate) -> Networks:
    """The extractors that `evaluate` names.

    Raises:
        HasteError: weights are not there.
    """
    return Networks(*build_inception(evaluate.inception), *(build_dinov2(evaluate) or (None, None)))


@dataclass(frozen=True)
class Features:
    """What one pass over images leaves.

    moments: pool, spatial and dinov2 statistics of all images; without DINOv2 the last stays empty. pool: features
    (m, 2048) of the images that were kept. logits: (m, 1008), without bias, of the same.
    """

    moments: dict[str, Moments]
    pool: Tensor
    logits: Tensor


@torch.no_grad()
def extract(
    images: Images, networks: Networks, batch_size: int, keep: int | None = None, progress: str | None = None
) -> Features:
    """Features of uint8 images of one or three channels, from one pass over them.

    Args:
        images: of any size. networks: the extractors.
        batch_size: images at a time, on a CPU at most 50.
        keep: of how many images, drawn from a fixed seed, pool features and logits are kept; None keeps all.
        progress: the progress bar's label; None shows none.
    """
    device = default_device()
    batch_size = min(batch_size, CPU_BATCH) if device.type == "cpu" else batch_size
    moments = {name: Moments() for name in reference.STATISTICS}
    kept: dict[str, list[Tensor]] = {POOL: [], LOGITS: []}
    chosen, seen = _chosen(len(images), keep), 0
    with tqdm(total=len(images), desc=progress, unit="image", disable=progress is None, mininterval=1.0) as bar:
        for batch in images.batches(batch_size):
            x = batch.expand(-1, 3, -1, -1).contiguous().to(device)
            names = networks.inception.get_requested_features_list()  # type: ignore[operator]
            found = dict(zip(names, networks.inception(x), strict=True))
            moments["pool"].add(found[POOL])
            moments["spatial"].add(found[SPATIAL])
            if networks.dinov2 is not None:
                moments["dinov2"].add(networks.dinov2(x))
            here = chosen[seen : seen + len(x)]
            for name, parts in kept.items():
                parts.append(found[name].cpu()[here])
            seen += len(x)
            bar.update(len(x))
    return Features(moments, torch.cat(kept[POOL]), torch.cat(kept[LOGITS]))


def _chosen(n: int, keep: int | None) -> Tensor:
    """Which of n images are kept, (n,) bool."""
    if keep is None or keep >= n:
        return torch.ones(n, dtype=torch.bool)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.randperm(n, generator=Generator().manual_seed(0))[:keep]] = True
    return chosen


class AdmScorer:
    """Scores sets of images against one reference, by the ADM protocol.

    `facts` holds everything of the scoring that moves a score, for the card.

    Args:
        evaluate: names the reference, the extractors and the sizes.
        data: whose training images are the reference where `evaluate.reference` names none.
        progress: whether bars are shown.

    Raises:
        HasteError: weights or the reference are not there.
    """

    def __init__(self, evaluate: config.Evaluate, data: config.Data | None = None, progress: bool = True) -> None:
        self.evaluate, self.data, self.progress = evaluate, data, progress
        self.networks = build_networks(evaluate)
        self.extractor = self.networks.name
        self.facts = scoring_facts(evaluate, data, self.extractor)
        self.reference = self._open_reference()

    def score(self, generated: Images) -> dict[str, float]:
        """Every score of METRICS; nan where the reference does not hold what a score needs."""
        label = "features of images" if self.progress else None
        found = extract(generated, self.networks, self.evaluate.batch_size, None, label)
        return scores_of(found, self.reference, self.evaluate.neighborhood)

    def _open_reference(self) -> Reference:
        """The reference from its file; what the file holds as images only is extracted."""
        if not self.evaluate.reference:
            assert self.data is not None  # scoring_facts has seen to it
            return self._extracted(TrainingImages(self.data), MANIFOLD)
        path = Path(self.evaluate.reference)
        stored = reference.load(path)
        if "arr_0" not in reference.array_names(path):
            if stored.manifold is None:
                reference.warn(f"{path} holds no images arr_0: precision and recall are not available")
            if self.networks.dinov2 is not None and "dinov2" not in stored.statistics:
                reference.warn(f"{path} holds neither images nor mu_dinov2: fd_dinov2 is not available")
            return stored
        images = NpzImages(path)
        made = self._extracted(images, len(images))
        # Statistics that a file brings are those that published numbers were made with, often of more images.
        own = {"n": None} if stored.statistics else {"n": made.n}
        return Reference({**made.statistics, **stored.statistics}, made.manifold, **own)

    def _extracted(self, images: Images, keep: int) -> Reference:
        """Statistics of real images and features of `keep` of them, made once and kept for every later scoring."""
        key = config.digest([self.facts["reference_hash"], self.extractor, keep])
        path = output_root() / "runs" / "references" / f"{key}.npz"
        with locked(path.with_suffix(".lock"), f"the reference {path.stem}", wait=True):
            if not path.is_file():
                label = "features of the reference" if self.progress else None
                found = extract(images, self.networks, self.evaluate.batch_size, keep, label)
                reference.save(path, found.moments, found.pool)
        return reference.load(path)


def scores_of(found: Features, real: Reference, neighborhood: int) -> dict[str, float]:
    """The scores of features against a reference: METRICS by name, nan where the reference lacks what one needs."""
    distances = dict.fromkeys(reference.STATISTICS, float("nan"))
    for name in found.moments.keys() & real.statistics.keys():
        n = min(found.moments[name].n, real.n or found.moments[name].n)
        if n == 0:
            continue
        own = found.moments[name].gaussian()
        if n <= len(own.mean):
            reference.warn(f"{n} images for {name} features of width {len(own.mean)}: the distance is biased upwards")
        distances[name] = frechet_distance(own, real.statistics[name])
    precision, recall = float("nan"), float("nan")
    if real.manifold is not None:
        precision, recall = precision_recall(found.pool, real.manifold, neighborhood)
    return {
        "fid": distances["pool"],
        "sfid": distances["spatial"],
        "is": inception_score(found.logits),
        "precision": precision,
        "recall": recall,
        "fd_dinov2": distances["dinov2"],
    }


def scoring_facts(evaluate: config.Evaluate, data: config.Data | None, extractor: str) -> dict[str, Any]:
    """What of the scoring moves a score, for the card.

    Raises:
        HasteError: there is no reference, or it cannot be read.
    """
    return {
        "evaluator": f"ADM protocol on torch-fidelity {environment()['torch-fidelity']}",
        "extractor": extractor,
        "sfid": "Mixed_6d.branch1x1, 7 channels, NHWC",
        "is": f"logits without bias, exp of the mean KL of {IS_PART} images in order, averaged over parts",
        "precision_recall": "Inception pool features",
        "neighborhood": evaluate.neighborhood,
        "dinov2": None if evaluate.dinov2 == "none" else evaluate.dinov2_model,
        **reference.facts(evaluate.reference, data),
    }
