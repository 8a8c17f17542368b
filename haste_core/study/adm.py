"""The ADM protocol: FID, sFID, Inception Score, precision and recall on Inception, and a Frechet distance on DINOv2.

Dhariwal and Nichol, arXiv 2105.05233, on torch-fidelity's port of the same Inception weights. All scores come from one
pass over the generated images; statistics of the reference are kept in runs/references.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from tqdm.auto import tqdm

from haste_core import checkpoint, sampling
from haste_core.devices import default_device, exact
from haste_core.errors import HasteError
from haste_core.files import atomic, locked, output_root
from haste_core.study import config, runs
from haste_core.study.data import open_dataset
from haste_core.study.images import FolderImages, Images, MemoryImages, NpzImages, TrainingImages, file_hash
from haste_core.study.scores import (
    LIMIT,
    Gaussian,
    Moments,
    augmented,
    card,
    frechet_distance,
    precision_recall,
    probe_of,
)
from haste_core.teacher import build_encoder

POOL, SPATIAL, LOGITS = "2048", "spatial", "logits_unbiased"
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
# On a CPU Inception takes at most this many images at a time: its activations of one image take some 30 MB.
CPU_BATCH = 50
# ADM's evaluator averages the Inception Score over parts of this many images.
IS_PART = 5000
# Number of training images for precision and recall, as in ADM's reference batches; statistics are of all of them.
MANIFOLD = 10_000
# Names of mean and covariance in ADM's own files, and a further pair.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2")}
_DINOV2_SIDE = 224


# Networks


class Inception(nn.Module):
    """torch-fidelity's Inception, giving pool features, logits without bias, and the spatial features of ADM's sFID.

    Spatial features are the output of Mixed_6d.branch1x1 (`mixed_6/conv` in the TensorFlow graph), the first 7 channels
    in NHWC order: 17 x 17 x 7 = 2023 values (Nash et al., arXiv 2103.03841; ADM, arXiv 2105.05233).
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        stream = io.BytesIO()  # torch-fidelity unpickles weight files, so it is given a copy made in memory
        torch.save(dict(weights), stream)
        stream.seek(0)
        self.network = FeatureExtractorInceptionV3("inception", [POOL, LOGITS], feature_extractor_weights_path=stream)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._branch = torch.empty(0)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._branch = output[:, :7].permute(0, 2, 3, 1).flatten(1).float()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images (B, 3, S, S): POOL (B, 2048), SPATIAL (B, 2023), LOGITS (B, 1008), float32."""
        pool, logits = self.network(x)
        return {POOL: pool, SPATIAL: self._branch, LOGITS: logits}


def build_inception(where: str) -> tuple[nn.Module, str]:
    """The Inception network, on the GPU if there is one, and the hash of its weights.

    where: "hub" (torch's cache, or downloaded into it), or the path of a .pth or .safetensors file of tensors alone.
    """
    weights = read_inception(where)
    try:
        network = Inception(weights)
    except (RuntimeError, KeyError) as error:  # other names or shapes
        raise _not_inception(where, error) from error
    return network.to(default_device()), checkpoint.fingerprint(weights)


def read_inception(where: str) -> dict[str, Tensor]:
    """Tensors of Inception's weights from "hub" or a file, read without executing anything.

    Raises:
        HasteError: they cannot be had or read.
    """
    try:
        if where == "hub":
            return torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        return load_state_dict(where, weights_only=True)
    except Exception as error:  # no network, no such file; a damaged pickle can raise anything
        raise _not_inception(where, error) from error


def _not_inception(where: str, error: Exception) -> HasteError:
    cause = " ".join(f"{type(error).__name__} {error}".split())[:160]
    return HasteError(
        f"evaluate.inception {where}: {cause}; download {INCEPTION_FILE} from {URL_INCEPTION_V3} and set "
        f"evaluate.inception=PATH"
    )


class DinoV2(nn.Module):
    """The class token after the final norm of a timm DINOv2, of images resized to 224 pixels (bicubic, antialiased).

    The protocol of Stein et al., arXiv 2306.04675, with ImageNet's mean and standard deviation.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).reshape(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, width) float32 of uint8 images (B, 3, S, S)."""
        x = images.float()
        if x.shape[-2:] != (_DINOV2_SIDE, _DINOV2_SIDE):
            x = F.interpolate(x, size=(_DINOV2_SIDE, _DINOV2_SIDE), mode="bicubic", antialias=True)
        x = (x / 255 - self.mean) / self.std  # type: ignore[operator]
        return self.encoder.forward_features(x)[:, 0].float()  # type: ignore[operator]


def build_dinov2(model: str, weights: str) -> tuple[DinoV2, str]:
    """The DINOv2 network, on the GPU if there is one, and the hash of its weights."""
    try:
        encoder = build_encoder(model, weights, 1000, {"img_size": _DINOV2_SIDE})
    except HasteError as error:
        raise HasteError(
            f"evaluate.dinov2 {weights!r}: {error}; or evaluate.dinov2=none leaves that score out"
        ) from error
    if not encoder.num_prefix_tokens:
        raise HasteError(f"evaluate.dinov2_model {model!r} has no class token; expected a DINOv2")
    return DinoV2(encoder).to(default_device()), checkpoint.fingerprint(encoder.state_dict())


class Networks(NamedTuple):
    """The extractors of an evaluation, and their names with the hashes of their weights."""

    inception: nn.Module
    dinov2: nn.Module | None
    name: str


def build_networks(evaluate: config.EvaluateSettings) -> Networks:
    """The extractors that `evaluate` names, with their weights, which are downloaded or local."""
    inception, inception_hash = build_inception(evaluate.inception)
    name = f"adm-inception-{inception_hash}"
    if evaluate.dinov2 == "none":
        return Networks(inception, None, name)
    dinov2, dinov2_hash = build_dinov2(evaluate.dinov2_model, evaluate.dinov2)
    return Networks(inception, dinov2, f"{name}+dinov2-{dinov2_hash}")


# Features and scores


class Features(NamedTuple):
    """Statistics (pool, spatial, dinov2) of all images; pool (m, 2048) and logits (m, 1008) of the images kept."""

    moments: dict[str, Moments]
    pool: Tensor
    logits: Tensor


@torch.no_grad()
def extract(
    images: Images, networks: Networks, batch_size: int, keep: int | None = None, progress: str | None = None
) -> Features:
    """Features of uint8 images of one or three channels and any size, from one pass over them.

    Args:
        images, networks, batch_size: on a CPU at most 50 images go through the extractors at a time.
        keep: number of images, drawn from a fixed seed, whose pool features and logits are kept; None keeps all.
        progress: the progress bar's label; None shows none.
    """
    device = default_device()
    batch_size = min(batch_size, CPU_BATCH) if device.type == "cpu" else batch_size
    moments = {name: Moments() for name in STATISTICS}
    pool, logits, seen = [], [], 0
    kept = torch.ones(len(images), dtype=torch.bool)
    if keep is not None and keep < len(images):
        kept[torch.randperm(len(images), generator=Generator().manual_seed(0))[keep:]] = False
    with (
        exact(),
        tqdm(total=len(images), desc=progress, unit="image", disable=progress is None, mininterval=1.0) as bar,
    ):
        for batch in images.batches(batch_size):
            x = batch.expand(-1, 3, -1, -1).contiguous().to(device)
            found = networks.inception(x)
            moments["pool"].add(found[POOL])
            moments["spatial"].add(found[SPATIAL])
            if networks.dinov2 is not None:
                moments["dinov2"].add(networks.dinov2(x))
            here = kept[seen : seen + len(x)]
            pool.append(found[POOL].cpu()[here])
            logits.append(found[LOGITS].cpu()[here])
            seen += len(x)
            bar.update(len(x))
    return Features(moments, torch.cat(pool), torch.cat(logits))


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)), taken over parts of 5,000 images in their order and averaged (as ADM does).

    Salimans et al., arXiv 1606.03498. Between 1 and the number of classes, from logits (n, classes) without bias.
    """
    parts = [isc_features_to_metric(part, splits=1, shuffle=False) for part in logits.split(IS_PART)]
    return float(np.mean([part[KEY_METRIC_ISC_MEAN] for part in parts]))


def scores_of(found: Features, real: Reference, neighborhood: int) -> dict[str, float]:
    """The scores of features against a reference: ADM_METRICS by name, nan where the reference lacks what one needs."""
    distances = dict.fromkeys(STATISTICS, float("nan"))
    for name in found.moments.keys() & real.statistics.keys():
        n = min(found.moments[name].n, real.n or found.moments[name].n)
        if n == 0:
            continue
        own = found.moments[name].gaussian()
        if n <= len(own.mean):
            _warn(f"{n} images for {name} features of width {len(own.mean)}: the distance is biased upwards")
        distances[name] = frechet_distance(own, real.statistics[name])
    precision, recall = float("nan"), float("nan")
    if real.manifold is not None:
        made, known = (pool.to(default_device()).double() for pool in (found.pool, real.manifold))
        precision, recall = precision_recall(made, known, neighborhood, batch_size=2500)
    return {
        "fid": distances["pool"],
        "sfid": distances["spatial"],
        "is": inception_score(found.logits),
        "precision": precision,
        "recall": recall,
        "fd_dinov2": distances["dinov2"],
    }


def _warn(text: str) -> None:
    print(f"haste: warning: {text}", file=sys.stderr)


# The reference


class Reference(NamedTuple):
    """Statistics by name (pool, spatial, dinov2), as far as they are known.

    manifold: pool features (m, 2048) for precision and recall. n: number of images behind the statistics, if known.
    """

    statistics: Mapping[str, Gaussian]
    manifold: Tensor | None
    n: int | None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise HasteError(
            f"reference {path}: {' '.join(str(error).split())}; expected an ADM .npz with mu, sigma, mu_s, sigma_s or "
            f"images arr_0 (n, S, S, 3)"
        ) from error


def array_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz file."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def load_reference(path: Path) -> Reference:
    """Statistics and features of an .npz file; its images, if any, are not read."""
    names, statistics = array_names(path), {}
    with _reading(path), np.load(path, allow_pickle=False) as stored:
        if not {"mu", "arr_0"} & set(names):
            raise ValueError(f"it holds {', '.join(names) or 'nothing'}")
        for name, (first, second) in STATISTICS.items():
            if first in names and second in names:
                mean, covariance = stored[first].astype(np.float64), stored[second].astype(np.float64)
                if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                    raise ValueError(f"a mean of shape {mean.shape} with a covariance of shape {covariance.shape}")
                if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                    raise ValueError(f"{first} or {second} has values that are not finite")
                statistics[name] = Gaussian(mean, covariance)
        manifold = torch.from_numpy(stored["manifold"]) if "manifold" in names else None
        return Reference(statistics, manifold, int(stored["n"]) if "n" in names else None)


# The suite


def open_reference(
    evaluate: config.EvaluateSettings, data: config.DataSettings | None
) -> Path | FolderImages | TrainingImages:
    """The .npz file or folder of images that `evaluate.reference` names; the training images of `data` by default.

    Raises:
        HasteError: there is neither, or the folder cannot be used.
    """
    if evaluate.reference:
        path = Path(evaluate.reference)
        return FolderImages(path, evaluate.resize) if path.is_dir() else path
    if data is None:
        raise HasteError("no reference to score against; expected an ADM .npz, a folder or a study")
    return TrainingImages(data)


def scoring_facts(
    evaluate: config.EvaluateSettings, source: Path | FolderImages | TrainingImages, extractor: str
) -> dict[str, Any]:
    """Everything of the scoring that changes a score, for the card.

    Args:
        evaluate: settings. source: of `open_reference`. extractor: name of the networks.
    """
    if isinstance(source, Path):
        names = array_names(source)
        reference: dict[str, Any] = {"reference": source.name, "reference_hash": file_hash(source)}
        reference |= {"reference_statistics": "mu" in names, "reference_images": "arr_0" in names}
    elif isinstance(source, FolderImages):
        found = source.facts()
        reference = {"reference": source.path.name, "reference_hash": found.pop("hash")}
        reference |= {"reference_statistics": False, "reference_images": True, **found}
    else:
        reference = {"reference": f"{source.kind} train split (held-in), not augmented"}
        reference |= {"reference_hash": source.hash(), "reference_manifold": MANIFOLD}
    return {
        "evaluator": f"ADM protocol on torch-fidelity {runs.environment()['torch-fidelity']}",
        "extractor": extractor,
        "sfid": "Mixed_6d.branch1x1, 7 channels, NHWC",
        "is": f"logits without bias, exp of the mean KL of {IS_PART} images in order, averaged over parts",
        "precision_recall": "Inception pool features",
        "neighborhood": evaluate.neighborhood,
        "dinov2": None if evaluate.dinov2 == "none" else evaluate.dinov2_model,
        **reference,
    }


class AdmScorer:
    """Scores of sets of images against one reference, by the ADM protocol; `facts` describe the scoring for the card.

    Args:
        evaluate: settings. data: its training images are the reference where `evaluate.reference` names none.
        progress: show progress bars.

    Raises:
        HasteError: weights or the reference are missing, damaged or of another kind.
    """

    def __init__(
        self, evaluate: config.EvaluateSettings, data: config.DataSettings | None = None, progress: bool = True
    ) -> None:
        self.evaluate, self.progress = evaluate, progress
        self.networks = build_networks(evaluate)
        source = open_reference(evaluate, data)
        self.facts = scoring_facts(evaluate, source, self.networks.name)
        self.side: int | None = None  # of the reference's images, unless it holds statistics alone
        if isinstance(source, Path):
            self.reference = self._of_file(source)
        else:
            self.reference = self._extracted(source, MANIFOLD if isinstance(source, TrainingImages) else len(source))

    def score(self, generated: Images | Tensor) -> dict[str, float]:
        """Every score of ADM_METRICS for uint8 images; nan where the reference does not hold what a score needs.

        Raises:
            HasteError: the images have another size than those of the reference.
        """
        images = MemoryImages(generated) if isinstance(generated, Tensor) else generated
        side = next(images.batches(1)).shape[-1]
        if self.side not in (None, side):
            raise HasteError(
                f"images of {side} pixels against a reference of {self.side}; expected equal sizes: draw them so, or "
                f"bring folders to one size by --resize N"
            )
        return scores_of(self._extract(images, "images"), self.reference, self.evaluate.neighborhood)

    def _extract(self, images: Images, what: str, keep: int | None = None) -> Features:
        label = f"features of {what}" if self.progress else None
        return extract(images, self.networks, self.evaluate.batch_size, keep, label)

    def _of_file(self, path: Path) -> Reference:
        """The reference in a file, with features extracted from its images where it holds no statistics of them."""
        stored = load_reference(path)
        if "arr_0" not in array_names(path):
            if stored.manifold is None:
                _warn(f"{path} holds no images arr_0: precision and recall are not available")
            if self.networks.dinov2 is not None and "dinov2" not in stored.statistics:
                _warn(f"{path} holds neither images nor mu_dinov2: fd_dinov2 is not available")
            return stored
        images = NpzImages(path)
        made = self._extracted(images, len(images))
        # Statistics in the file take precedence: published numbers use them, and they are often of more images.
        return Reference({**made.statistics, **stored.statistics}, made.manifold, None if stored.statistics else made.n)

    def _extracted(self, images: Images, keep: int) -> Reference:
        """Statistics of real images and pool features of `keep` of them, extracted once and kept on disk."""
        self.side = next(images.batches(1)).shape[-1]
        key = config.digest([self.facts["reference_hash"], self.networks.name, keep])
        path = output_root() / "runs" / "references" / f"{key}.npz"
        with locked(path.with_suffix(".lock"), f"the reference {path.stem}", wait=True):
            if not path.is_file():
                found = self._extract(images, "the reference", keep)
                content: dict[str, Any] = {"manifold": found.pool.numpy(), "n": np.array(found.moments["pool"].n)}
                for name, (mean, covariance) in STATISTICS.items():
                    if found.moments[name].n:
                        content[mean], content[covariance] = found.moments[name].gaussian()
                with atomic(path) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, **content)
        return load_reference(path)


class AdmStudyScorer(AdmScorer):
    """The suite `adm` of a study, with its card and the images that the denoising loss is measured on."""

    def __init__(self, study: config.StudySettings, progress: bool = True) -> None:
        super().__init__(study.evaluate, study.data, progress)
        self.study, self.probe = study, probe_of(study)
        self.card = card(study, self.facts | self.probe.facts)

    def floor(self) -> list[dict[str, Any]]:
        """Scores of at most 10,000 real images against the reference, which takes the place of held-in images.

        Rows of `pair`, `n`, `n_reference` and ADM_METRICS.
        """
        dataset = open_dataset(self.study.data)
        pairs = {
            "held-out against held-in": sampling.to_uint8(dataset.images("test", LIMIT)[0]),
            "augmented held-in against held-in": augmented(dataset, self.study.evaluate.seed),
        }
        return [
            {"pair": pair, "n": len(real), "n_reference": self.reference.n, **self.score(real)}
            for pair, real in pairs.items()
        ]
