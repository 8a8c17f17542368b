"""Feature extractors of the ADM protocol: torch-fidelity's Inception with spatial features, and DINOv2's class token.

Both take uint8 images (B, 3, S, S) of any size. The names of registered extractors end in the hash of their weights.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from haste_core import _torchvision_guard, checkpoint  # noqa: F401  (must come before timm)
from haste_core.devices import default_device
from haste_core.errors import HasteError
from haste_core.study import config

import torch_fidelity  # isort: skip
from torch_fidelity.feature_extractor_inceptionv3 import (  # isort: skip
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # isort: skip
from torch_fidelity.utils import create_feature_extractor  # isort: skip

POOL, SPATIAL, LOGITS = "2048", "spatial", "logits_unbiased"
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINOV2_SIDE = 224


class SpatialInception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with one more feature, `spatial`, which ADM's sFID is measured on.

    It is the output of the branch Mixed_6d.branch1x1 (`mixed_6/conv` in the TensorFlow graph), the first 7 channels in
    NHWC order: 17 x 17 x 7 = 2023 values (Nash et al., arXiv 2103.03841; ADM, arXiv 2105.05233).
    """

    def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
        # The base class stops at an unknown feature, so it is asked for the others only.
        super().__init__(name, [f for f in features_list if f != SPATIAL] or [POOL], **options)
        self.requested = list(features_list)
        self._branch: Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._branch = output[:, :7].permute(0, 2, 3, 1).flatten(1).float()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The requested features, each (B, width) float32."""
        found = dict(zip(self.features_list, super().forward(x), strict=True))
        if self._branch is None:
            raise HasteError("the Inception network ended before its spatial features; possible: request 2048 too")
        found[SPATIAL], self._branch = self._branch, None
        return tuple(found[name] for name in self.requested)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the features that can be requested."""
        return (*FeatureExtractorInceptionV3.get_provided_features_list(), SPATIAL)

    def get_requested_features_list(self) -> list[str]:
        """Names of the features that `forward` returns, in its order."""
        return self.requested

    def convert_features_tuple_to_dict(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What `forward` returned, by name."""
        return dict(zip(self.requested, features, strict=True))


def register_inception(where: str) -> tuple[str, str]:
    """Make the Inception with spatial features known to torch-fidelity.

    torch-fidelity unpickles weight files as they come; here they are read with weights_only, and what it unpickles is
    a copy of the tensors in memory.

    Args:
        where: "hub", or the path of the weights as a .pth or .safetensors file.

    Returns:
        The name it is registered under, and the hash of its weights.

    Raises:
        HasteError: the weights are not there.
    """
    path = _hub_weights() if where == "hub" else Path(where)
    weights = read_weights(path)
    fingerprint = checkpoint.fingerprint(weights)
    name = f"adm-inception-{fingerprint}"
    if name in FEATURE_EXTRACTORS_REGISTRY:
        return name, fingerprint
    stream = io.BytesIO()
    torch.save(weights, stream)

    class Registered(SpatialInception):
        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            stream.seek(0)
            super().__init__(name, features_list, **(options | {"feature_extractor_weights_path": stream}))

    torch_fidelity.register_feature_extractor(name, Registered)
    return name, fingerprint


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, read without executing anything.

    Raises:
        HasteError: the file is missing or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:160]
        raise HasteError(f"evaluate.inception {path}: {reason}; possible: {_sources()}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise HasteError(f"evaluate.inception {path} holds no tensors by name; possible: {_sources()}")
    return dict(weights)


def _sources() -> str:
    return f"the path of {INCEPTION_FILE}, from {URL_INCEPTION_V3}"


def _hub_weights() -> Path:
    """Where torch keeps the published Inception weights, downloaded if they are not there yet."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    digits = INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[1]
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=digits, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no such file, or other bytes than published
        raise HasteError(
            f"the Inception weights {INCEPTION_FILE} cannot be downloaded from {URL_INCEPTION_V3} "
            f"({' '.join(str(error).split())}); possible: fetch the file elsewhere and set evaluate.inception=PATH"
        ) from error
    return path


def build_inception(where: str) -> tuple[nn.Module, str]:
    """The Inception that gives pool, spatial and logit features, on the GPU if there is one, and its weights' hash.

    Raises:
        HasteError: the weights are not there or are of another network.
    """
    name, fingerprint = register_inception(where)
    wanted = [POOL, SPATIAL, LOGITS]
    try:
        network = create_feature_extractor(name, wanted, cuda=default_device().type == "cuda", verbose=False)
    except RuntimeError as error:  # names or shapes that do not fit
        reason = " ".join(str(error).split())[:160]
        raise HasteError(f"evaluate.inception {where}: {reason}; possible: {_sources()}") from error
    return network, fingerprint


class DinoV2(nn.Module):
    """The class token after the final norm of a timm DINOv2, of images resized to 224 pixels (bicubic, antialiased).

    The protocol of Stein et al., arXiv 2306.04675, with ImageNet's mean and standard deviation.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        for name, values in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, width) float32."""
        x = images.float()
        if x.shape[-2:] != (_DINOV2_SIDE, _DINOV2_SIDE):
            x = F.interpolate(x, size=(_DINOV2_SIDE, _DINOV2_SIDE), mode="bicubic", antialias=True)
        x = (x / 255 - self.mean) / self.std  # type: ignore[operator]
        return self.encoder.forward_features(x)[:, 0].float()  # type: ignore[operator]


def build_dinov2(evaluate: config.Evaluate) -> tuple[DinoV2, str] | None:
    """The DINOv2 that a study names, on the GPU if there is one, and its weights' hash; None where it is left out.

    Raises:
        HasteError: its weights are not there, or the network has no class token.
    """
    if evaluate.dinov2 == "none":
        return None
    from haste_core.encoders import build_encoder

    try:
        encoder = build_encoder(evaluate.dinov2_model, evaluate.dinov2, 1000, {"img_size": _DINOV2_SIDE})
    except HasteError as error:
        raise HasteError(
            f"evaluate.dinov2 {evaluate.dinov2!r}: {error}; or evaluate.dinov2=none leaves that score out"
        ) from error
    if not encoder.num_prefix_tokens:
        raise HasteError(f"evaluate.dinov2_model {evaluate.dinov2_model!r} has no class token; possible: a DINOv2")
    network = DinoV2(encoder).to(default_device())
    return network, checkpoint.fingerprint(encoder.state_dict())
