"""The real side of the ADM scores: statistics and features of reference images, and the .npz files they are kept in."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste_core.errors import HasteError
from haste_core.files import atomic
from haste_core.study import config
from haste_core.study.scoring.frechet import Gaussian, Moments
from haste_core.study.scoring.image_sources import TrainingImages, file_hash, training_hash

# Of training images, statistics take all; precision and recall take this many, as in ADM's reference batches.
MANIFOLD = 10_000
# The names ADM's own files use, and one pair more.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2")}


@dataclass(frozen=True)
class Reference:
    """Statistics by name (pool, spatial, dinov2), as far as they are known.

    manifold: pool features (m, 2048) for precision and recall. n: how many images the statistics are of, if known.
    """

    statistics: Mapping[str, Gaussian]
    manifold: Tensor | None
    n: int | None


def array_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz file.

    Raises:
        HasteError: it is no such file.
    """
    try:
        stored = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise not_a_reference(path, " ".join(str(error).split())) from error
    if not isinstance(stored, np.lib.npyio.NpzFile):
        raise not_a_reference(path, "it holds one array without a name")
    with stored:
        return list(stored.files)


def not_a_reference(path: Path, reason: str) -> HasteError:
    """The error for a file that is no reference."""
    return HasteError(
        f"reference {path}: {reason}; possible: an ADM .npz with mu, sigma, mu_s, sigma_s or images arr_0 (n, S, S, 3)"
    )


def load(path: Path) -> Reference:
    """What statistics and features an .npz file holds; its images, if any, are not looked at.

    Raises:
        HasteError: it has neither statistics nor images, or statistics that do not belong together.
    """
    names = array_names(path)
    if not {"mu", "arr_0"} & set(names):
        raise not_a_reference(path, f"it holds {', '.join(names) or 'nothing'}")
    statistics = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name, (mean, covariance) in STATISTICS.items():
                if mean in names and covariance in names:
                    statistics[name] = _gaussian(stored[mean], stored[covariance])
            manifold = torch.from_numpy(stored["manifold"]) if "manifold" in names else None
            n = int(stored["n"]) if "n" in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise not_a_reference(path, " ".join(str(error).split())) from error
    return Reference(statistics, manifold, n)


def _gaussian(mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"a mean of shape {mean.shape} with a covariance of shape {covariance.shape}")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def save(path: Path, moments: Mapping[str, Moments], manifold: Tensor) -> None:
    """Keep statistics (of those with any image) and pool features of real images, atomically."""
    content: dict[str, Any] = {"manifold": manifold.numpy(), "n": np.array(moments["pool"].n)}
    for name, (mean, covariance) in STATISTICS.items():
        if moments[name].n:
            content[mean], content[covariance] = moments[name].gaussian()
    with atomic(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **content)


def facts(reference: str | None, data: config.Data | None) -> dict[str, Any]:
    """What a reference is, for the card: its name, the hash of its content, and what it has.

    Args:
        reference: the path of an .npz file. data: where there is none, the data whose training images it is.

    Raises:
        HasteError: there is neither, or it cannot be read.
    """
    if reference:
        path = Path(reference)
        names = array_names(path)
        held = {"reference_statistics": "mu" in names, "reference_images": "arr_0" in names}
        return {"reference": path.name, "reference_hash": file_hash(path), **held}
    if data is None:
        raise HasteError("no reference to score against; possible: an ADM .npz or a study")
    return {
        "reference": f"{data.kind} train split (held-in), not augmented",
        "reference_hash": training_hash(TrainingImages(data)),
        "reference_manifold": MANIFOLD,
    }


def warn(text: str) -> None:
    """Say on stderr, in one line, what a score lacks."""
    print(f"haste: warning: {text}", file=sys.stderr)
