"""Images -> features -> statistics -> numbers through torch-fidelity, and a check for copied training images.

input1 is always the generated set, input2 the real one: precision and recall swap when the inputs do. torch-fidelity's
file cache stays off: it is keyed by name alone, so it goes stale, and it unpickles what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from haste_core import _torchvision_guard  # noqa: F401  (must come before timm)
from haste_core.devices import default_device
from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.classifier import FeatureNetwork, SmallCNN

import torch_fidelity  # isort: skip
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # isort: skip
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # isort: skip
from torch_fidelity.metric_kid import kid_features_to_metric  # isort: skip
from torch_fidelity.metric_prc import prc_features_to_metric  # isort: skip
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # isort: skip
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset  # isort: skip

METRICS = ("fid", "kid", "precision", "recall")
_KEYS = {
    "fid": torch_fidelity.KEY_METRIC_FID,
    "kid": torch_fidelity.KEY_METRIC_KID_MEAN,
    "precision": torch_fidelity.KEY_METRIC_PRECISION,
    "recall": torch_fidelity.KEY_METRIC_RECALL,
}


class ImageSet(TorchDataset[Tensor]):
    """uint8 images (n, C, S, S) as torch-fidelity wants them: tensors of 3 channels, one by one."""

    def __init__(self, images: Tensor) -> None:
        if images.dtype != torch.uint8:
            raise HasteError(f"images to score are {images.dtype}; possible: torch.uint8")
        self.images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].contiguous()


def register_extractor(network: FeatureNetwork, fingerprint: str) -> str:
    """Make `network` known to torch-fidelity under a name that holds its fingerprint; returns the name.

    Features are (n, width) float64, taken from images in [-1, 1] with the channels that the network takes.
    """
    name = f"{'small-cnn' if isinstance(network, SmallCNN) else 'autoencoder'}-{fingerprint}"
    if name in FEATURE_EXTRACTORS_REGISTRY:
        return name

    class Extractor(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.network = network

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("embedding",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "embedding"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            # torch-fidelity hands every image over with three channels.
            seen = images.float() if network.channels == 3 else images.float().mean(1, keepdim=True)
            return (self.network.features(seen / 127.5 - 1).double(),)

    torch_fidelity.register_feature_extractor(name, Extractor)
    return name


def extract_features(images: Tensor, extractor: str, batch_size: int) -> Tensor:
    """Features (n, width) of uint8 images (n, C, S, S) by a registered extractor's default layer, on the CPU.

    Args:
        images: uint8, one or three channels.
        extractor: a name from `register_extractor`, or one of torch-fidelity's own.
        batch_size: images at a time.
    """
    cuda = torch.cuda.is_available()
    layer = FEATURE_EXTRACTORS_REGISTRY[extractor].get_default_feature_layer_for_metric("fid")
    network = create_feature_extractor(extractor, [layer], cuda=cuda, verbose=False)
    return get_featuresdict_from_dataset(ImageSet(images), network, batch_size, cuda, True, False)[layer]


def frechet(generated: Tensor, real: Tensor) -> float:
    """The Frechet distance of features (n, width) and (m, width), as torch-fidelity takes it."""
    statistics = [fid_features_to_statistics(side) for side in (generated, real)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[_KEYS["fid"]])


def compare(generated: Tensor, real: Tensor, evaluate: config.Evaluate) -> dict[str, float]:
    """FID, KID, precision and recall of the features of generated against those of real images.

    Args:
        generated, real: (n, width), (m, width) from `extract_features`.
        evaluate: sizes of KID subsets and of the precision and recall neighbourhood.

    Returns:
        `fid` and `kid` (both 0 for equal distributions, KID can be slightly negative), `precision` and `recall` in
        [0, 1]: the numbers of `torch_fidelity.calculate_metrics`, which extracts both sides anew at every call.
    """
    subset_size = min(evaluate.kid_subset_size, len(generated), len(real))
    measured = {_KEYS["fid"]: frechet(generated, real)}
    measured |= kid_features_to_metric(
        generated, real, kid_subsets=evaluate.kid_subsets, kid_subset_size=subset_size, verbose=False
    )
    measured |= prc_features_to_metric(
        generated, real, prc_neighborhood=evaluate.neighborhood, save_cpu_ram=True, verbose=False
    )
    return {name: float(measured[key]) for name, key in _KEYS.items()}


def score(generated: Tensor, real: Tensor, extractor: str, evaluate: config.Evaluate) -> dict[str, float]:
    """FID, KID, precision and recall of generated against real uint8 images (n, C, S, S); see `compare`."""
    made, known = (extract_features(images, extractor, evaluate.batch_size) for images in (generated, real))
    return compare(made, known, evaluate)


def nearest_distances(images: Tensor, training: Iterable[Tensor]) -> Tensor:
    """The Euclidean distance (n,) of each uint8 image to its nearest training image, on the scale of [-1, 1] pixels.

    Args:
        images: (n, C, S, S) uint8.
        training: batches of uint8 training images.
    """
    device = default_device()
    x = images.flatten(1).to(device).float() / 127.5
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64, device=device)
    for batch in training:
        known = batch.flatten(1).to(device).float() / 127.5
        # Who is nearest is found by one matrix product, how near exactly: the product alone loses small distances.
        closest = torch.cat([(known.square().sum(1) - 2 * part @ known.T).argmin(1) for part in x.split(1000)])
        nearest = torch.minimum(nearest, (x.double() - known[closest].double()).norm(dim=1))
    return nearest.cpu()


class CopyCheck:
    """Whether generated images sit closer to training images than fresh real ones do.

    Args:
        held_out: uint8 images nobody trained on. training: the training images, batch by batch, once per call.
    """

    def __init__(self, held_out: Tensor, training: Callable[[], Iterable[Tensor]]) -> None:
        self.training = training
        self.real = nearest_distances(held_out, training())

    def __call__(self, generated: Tensor) -> dict[str, float]:
        """`nearest` and `copies` of uint8 images.

        `nearest` is the median nearest-training-image distance of generated images over that of held-out images
        (below 1: closer than real ones), `copies` the share of generated images closer than 99 % of held-out images
        are; 0.01 is what real images give.
        """
        made = nearest_distances(generated, self.training())
        return {
            "nearest": float(made.median() / self.real.median()),
            "copies": float((made < self.real.quantile(0.01)).double().mean()),
        }
