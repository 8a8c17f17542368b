"""A VAE of diffusers' AutoencoderKL kind: images to posteriors, and scaled latents to images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste_core import checkpoint  # noqa: F401(the guard must come before diffusers)
from haste_core.errors import HasteError
from haste_core.study.data.latents import SCALE, SHIFT, Posterior

from diffusers import AutoencoderKL  # isort: skip

_FILES = "config.json and diffusion_pytorch_model.safetensors"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Vae:
    """A frozen VAE in float32. The generator models x = (latent - shift) scale.

    Attributes:
        name: a hub name or folder. scale, shift: of the latents. channels: of the latents. factor: how many pixels
            one latent is wide.

    Raises:
        HasteError: its latents are not scaled by one number.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model.float().eval().requires_grad_(False), name
        settings = self.model.config
        if settings.get("latents_mean") is not None or settings.get("latents_std") is not None:
            raise HasteError(f"VAE {name} normalises latents per channel; possible: one with a scaling_factor alone")
        scale, shift = settings.get("scaling_factor"), settings.get("shift_factor")
        self.scale = SCALE if scale is None else float(scale)
        self.shift = SHIFT if shift is None else float(shift)
        self.channels = int(settings["latent_channels"])
        self.factor = 2 ** (len(settings["block_out_channels"]) - 1)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return checkpoint.fingerprint(self.model.state_dict())

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 32) -> Posterior:
        """The posterior of images (n, 3, S, S) in [-1, 1]: mean and std (n, C, S / factor, S / factor), unscaled.

        Float32 on the device of `images`; `batch_size` images are encoded at a time.

        Raises:
            HasteError: S is not a multiple of `factor`.
        """
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            raise HasteError(
                f"VAE {self.name} takes images whose sides are multiples of {self.factor}, these are "
                f"{images.shape[-1]}x{images.shape[-2]}"
            )
        with _exact():
            found = [self.model.encode(part.to(self.model.device, torch.float32), return_dict=False)[0]
                     for part in images.split(batch_size)]  # fmt: skip
        mean, std = (torch.cat([getattr(d, which) for d in found]).to(images.device) for which in ("mean", "std"))
        return Posterior(mean, std)

    @torch.no_grad()
    def decode(self, x: Tensor, batch_size: int = 32) -> Tensor:
        """Images (n, 3, S factor, S factor) in [-1, 1] of what the generator models, x (n, C, S, S).

        Float32 on the device of `x`; `batch_size` images are decoded at a time.

        Raises:
            HasteError: x has other channels than the VAE's latents.
        """
        if x.shape[1] != self.channels:
            raise HasteError(f"VAE {self.name} has latents of {self.channels} channels, these have {x.shape[1]}")
        latents = x.float() / self.scale + self.shift
        with _exact():
            found = [self.model.decode(part.to(self.model.device), return_dict=False)[0].clamp(-1, 1)
                     for part in latents.split(batch_size)]  # fmt: skip
        return torch.cat(found).to(x.device)


@contextmanager
def _exact() -> Iterator[None]:
    """Convolutions in real float32, by kernels that give the same bits every time (cuDNN's default is TF32)."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def load(name: str, device: str | torch.device = "cpu", fingerprint: str | None = None) -> Vae:
    """The VAE in a local folder or of a hub name such as "stabilityai/sd-vae-ft-mse", from safetensors alone.

    Args:
        name: the folder (config.json, diffusion_pytorch_model.safetensors), or owner/name.
        device: where it computes.
        fingerprint: of the weights that are expected; None takes any.

    Raises:
        HasteError: it is not there, cannot be downloaded, is damaged, or has other weights than expected.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and not _HUB_NAME.fullmatch(name):
        raise HasteError(f"VAE {name!r} is no folder; possible: a folder with {_FILES}, or a hub name (owner/name)")
    model = _from_folder(folder) if local else _from_hub(name)
    vae = Vae(model.to(device), name)
    if fingerprint not in (None, vae.fingerprint):
        raise HasteError(
            f"VAE {name} has weights {vae.fingerprint}, expected are {fingerprint}; possible: the VAE that the latents "
            f"were made with"
        )
    return vae


def _from_folder(folder: Path) -> Any:
    for needed in _FILES.split(" and "):
        if not (folder / needed).is_file() and not list(folder.glob(f"{Path(needed).stem}-*.safetensors")):
            raise HasteError(f"VAE folder {folder} has no {needed}; possible: a folder with {_FILES}")
    return _pretrained(str(folder), local_files_only=True)


def _from_hub(name: str) -> Any:
    """What was downloaded before is taken without asking the hub again."""
    try:
        return _pretrained(name, local_files_only=True)
    except HasteError:
        return _pretrained(name)


def _pretrained(name: str, **options: Any) -> Any:
    try:
        model, report = AutoencoderKL.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32, **options
        )
    except Exception as error:  # diffusers, the hub, safetensors and torch each raise their own
        cause = " ".join(str(error).split())[:300]
        raise HasteError(
            f"VAE {name!r} cannot be loaded: {cause}; possible: download {_FILES} of a VAE (such as "
            f"https://huggingface.co/stabilityai/sd-vae-ft-mse/tree/main) into a folder and give its path"
        ) from error
    # diffusers draws missing weights at random and only logs it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise HasteError(
            f"VAE {name!r}: the file has no weights for {len(missing)} tensors of its config.json ({missing[0]}, ...)"
        )
    return model
