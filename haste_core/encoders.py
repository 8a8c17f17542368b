"""Encoders for the teacher: any timm ViT or EVA by name, with published, local or random weights."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haste_core import _torchvision_guard  # noqa: F401  (must come before timm)
from haste_core.errors import HasteError
from haste_core.seeding import stream

import huggingface_hub as hub  # isort: skip
import timm  # isort: skip
from huggingface_hub import constants  # isort: skip
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # isort: skip
from timm.models import get_pretrained_cfg, load_state_dict  # isort: skip

# Seconds the hub has to answer before it counts as out of reach. Without it the client tries again for a minute.
HUB_TIMEOUT = 5.0
LONGEST_CAUSE = 300  # characters of a library's own message that are repeated


def build_encoder(model: str, weights: str, seed: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """timm encoder without head, with hub or local weights loaded, or random ones ("random", "pretrain") from `seed`.

    Raises:
        HasteError: the name, an argument or the weights do not exist, or the weights belong to another network.
    """
    options: dict[str, Any] = {"num_classes": 0, **kwargs}
    file = weights_file(model, weights)
    if weights == "hub" and file is None:
        options["pretrained"] = True
    if file is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    try:
        unloaded = _unloaded(model, options, file) if file is not None else []
        encoder = _create(model, options, stream("teacher weights", seed))
    except Exception as error:  # timm raises RuntimeError, TypeError, OSError and unpickling errors alike
        raise _refused(model, weights, _cause(error), "see timm.list_models()") from error
    if unloaded:
        raise HasteError(
            f"{file} has no weights for {len(unloaded)} of the teacher's tensors ({', '.join(unloaded[:3])}, ...); "
            f"expected a checkpoint of {model} that fits teacher.kwargs {dict(kwargs)}"
        )
    why = _unusable(encoder)
    if why:
        raise HasteError(
            f"teacher {model!r} is no vision transformer that can be aligned with: {why}; expected any ViT "
            "or EVA of timm with a fixed input size and one attention per block"
        )
    return encoder


def _unusable(encoder: Any) -> str | None:
    parts = ("blocks", "num_prefix_tokens", "patch_embed", "forward_features")
    lacking = next((part for part in parts if not hasattr(encoder, part)), None)
    if lacking:
        return f"it has no {lacking}"
    if not hasattr(getattr(encoder.blocks[0], "attn", None), "num_heads"):
        return "its blocks have no attention module of their own"
    if not getattr(encoder.patch_embed, "img_size", None):
        return "it has no fixed input size"
    return None


def weights_file(model: str, weights: str) -> Path | None:
    """Checkpoint that a teacher's `weights` stand for, downloaded where it is published.

    None for random weights, and for names such as "hf-hub:owner/name" that timm itself resolves.

    Raises:
        HasteError: there is no such file, nothing is published under that name, or the hub is out of reach.
    """
    if weights in ("pretrain", "random") or (weights == "hub" and ":" in model):
        return None
    if weights == "hub":
        return hub_file(model)
    if not Path(weights).is_file():
        raise HasteError(
            f"teacher.weights {weights!r} is no file; expected hub, pretrain, random, or the path of a "
            "checkpoint (.safetensors, or .pth and .bin that hold tensors alone)"
        )
    return Path(weights)


def hub_file(model: str) -> Path:
    """The published checkpoint of a teacher, from the local cache or downloaded into it.

    Raises:
        HasteError: nothing is published under that name, or the hub is out of reach; names the file to download.
    """
    try:
        cfg = get_pretrained_cfg(model)
    except RuntimeError as error:
        raise _refused(model, "hub", _cause(error), "see timm.list_models(pretrained=True)") from error
    repository = cfg.hf_hub_id if cfg else None
    if cfg is None or not (repository or cfg.url):
        raise _refused(model, "hub", "timm knows no published weights", "see timm.list_models(pretrained=True)")
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    source = f"{names[0]} of {constants.ENDPOINT}/{repository}" if repository else cfg.url
    try:
        return _from_repository(repository, names) if repository else _from_url(str(cfg.url))
    except Exception as error:  # the client raises its own errors and those of two HTTP libraries
        hint = f"download {source} elsewhere and give teacher.weights the path of that local checkpoint"
        raise _refused(model, "hub", f"{type(error).__name__}: {_cause(error)}", hint) from error


def _from_repository(repository: str, names: list[str]) -> Path:
    repository, _, revision = repository.partition("@")
    given: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    for name in names:
        cached = hub.try_to_load_from_cache(**given, filename=name)
        if isinstance(cached, str):
            return Path(cached)
    for name in names:
        url = hub.hf_hub_url(**given, filename=name)
        try:
            # Asked once, because a download that cannot begin is tried again for half a minute per file.
            hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
        except LocalEntryNotFoundError:
            raise  # the hub is out of reach
        except EntryNotFoundError:
            continue
        return Path(hub.hf_hub_download(**given, filename=name))
    raise FileNotFoundError(f"{repository} has none of {', '.join(names)}")


def _from_url(url: str) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not target.is_file():
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT):
            target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target))
    return target


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + " ..."


def _refused(model: str, weights: str, cause: str, expected: str) -> HasteError:
    return HasteError(f"teacher {model!r} (weights: {weights}): {cause}; expected {expected}")


def _create(model: str, options: dict[str, Any], seed: int) -> nn.Module:
    # Weights that are not loaded are drawn from the given seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(model, **options)


def _unloaded(model: str, options: dict[str, Any], file: Path) -> list[str]:
    """Names of parameters that a checkpoint leaves as they were initialised.

    timm loads checkpoints without insisting on every key and only logs what is missing, so a wrong file would give a
    random teacher. A checkpoint of the same keys and shapes that holds NaN throughout shows what arrives where,
    whatever timm renames or resizes on the way.
    """
    marked = options | {"pretrained_cfg_overlay": {"state_dict": _marked(load_state_dict(str(file)))}}
    encoder = _create(model, marked, seed=0)
    return [name for name, parameter in encoder.named_parameters() if not parameter.isnan().any()]


def _marked(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {name: _marked(value) for name, value in state.items()}
    if isinstance(state, Tensor) and state.is_floating_point():
        return torch.tensor(float("nan"), dtype=state.dtype).expand(state.shape)
    return state
