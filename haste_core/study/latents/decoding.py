"""From what a generator draws to images: nothing to do in pixel space, the VAE's decoder for latents."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from haste_core.devices import default_device
from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.data.manifest import read_manifest

if TYPE_CHECKING:
    from haste_core.study.latents.vae import Vae


def to_images(x: Tensor, data: config.Data, sample: config.Sample) -> Tensor:
    """Images (n, C, S, S) in [-1, 1] of what a generator drew, x (n, C', S', S')."""
    if data.kind != "latents":
        return x
    return _load(*vae_of(data, sample)).decode(x.to(default_device())).to(x.device)


def vae_facts(data: config.Data, sample: config.Sample) -> dict[str, Any] | None:
    """The decoder's name and the hash of its weights, for cards and manifests; None in pixel space."""
    if data.kind != "latents":
        return None
    vae = _load(*vae_of(data, sample))
    return {"name": vae.name, "weights": vae.fingerprint}


def vae_of(data: config.Data, sample: config.Sample) -> tuple[str, str | None]:
    """The VAE that decodes, and the hash its weights must have, if one is known.

    It is the one `sample.vae` names, else the one the latents were made with.

    Raises:
        HasteError: neither is known.
    """
    if sample.vae is not None:
        return sample.vae, None
    manifest = read_manifest(Path(str(data.path)))
    if manifest is None:
        raise HasteError(f"the latents in {data.path} name no VAE; possible: sample.vae=NAME or its folder")
    return manifest.vae.name, manifest.vae.fingerprint


@lru_cache(maxsize=1)
def _load(name: str, fingerprint: str | None) -> Vae:
    # diffusers is heavy, and pixel space needs none of it.
    from haste_core.study.latents import vae

    return vae.load(name, default_device(), fingerprint)


def drawing_facts(data: config.Data, sample: config.Sample) -> dict[str, Any]:
    """Sampler settings that affect the images, for cards and manifests."""
    return {
        "sampler": sample.sampler,
        "solver_steps": sample.solver_steps,
        # SDE and DDPM have a grid of their own.
        **({"grid": sample.grid} if sample.sampler in ("euler", "heun") else {}),
        "guidance": sample.guidance,
        "guidance_interval": [sample.guidance_low, sample.guidance_high],
        "guidance_channels": sample.guidance_channels,
        "integrator_dtype": "float64",
        # What is as ever is not named, so that cards from before there was a choice stay the same.
        **({"precision": sample.precision} if sample.precision != "no" else {}),
        **({"compiled": True} if sample.compile else {}),
        "vae": vae_facts(data, sample),
        "uint8_rule": "clip(127.5 x + 128), truncated",
    }
