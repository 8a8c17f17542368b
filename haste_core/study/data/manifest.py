"""manifest.json: what `haste latents` says of a folder it has made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from haste_core.errors import HasteError
from haste_core.study.sections import Positive, Section
from haste_core.study.validation import validate


class Encoder(Section):
    """The VAE that made latents, and how a generator's x comes from them: (latent - shift) scale."""

    name: str
    fingerprint: str
    scale: float = Field(gt=0, allow_inf_nan=False)
    shift: float = Field(allow_inf_nan=False)


class Source(Section):
    """Where images come from: labels is a hash over all labels in order."""

    path: str
    split: str
    labels: str


class Shard(Section):
    """One sub-folder: number of pairs, and a hash over names and contents of its images and of its latents."""

    folder: str
    count: Positive
    images: str
    latents: str


class Manifest(Section):
    """What `haste latents` says of a folder it has made.

    latent_shape: (C, h, w). latent_mean, latent_std: per channel, of unscaled latents drawn from their posteriors.
    """

    format: int = Field(1, ge=1, le=1)
    count: Positive
    image_size: Positive
    latent_shape: tuple[Positive, Positive, Positive]
    classes: Positive
    class_names: list[str] | None
    vae: Encoder
    source: Source
    shard_size: Positive
    latent_mean: list[float]
    latent_std: list[float]
    versions: dict[str, str]
    shards: list[Shard]


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a prepared folder, None where it has none.

    Raises:
        HasteError: it is damaged or of another format.
    """
    path = root / "manifest.json"
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise HasteError(f"{path} holds {type(content).__name__}; possible: the manifest that haste latents writes")
    return validate(Manifest, content, str(path))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        HasteError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HasteError(f"{path} is no valid JSON: {' '.join(str(error).split())}") from error
