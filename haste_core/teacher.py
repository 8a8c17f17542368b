"""The frozen teacher: any timm vision transformer behind one call that returns patch tokens, q and k.

Nothing in timm's forward is replaced: q and k are read by hooks, fused attention stays on. Prefix tokens (class,
registers) are cut from everything handed out, so attention over patches alone is what the student is aligned with
(Sec. 2.3, arXiv 2505.16792).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haste_core.devices import in_precision
from haste_core.encoders import build_encoder
from haste_core.errors import HasteError
from haste_core.models.layers import QK
from haste_core.study import config
from haste_core.teacher_qk import read_qk


class TeacherOutput(NamedTuple):
    """Patch tokens (B, N, D) after the final norm, and q, k (B, H, N, d) of the chosen blocks, prefix tokens cut."""

    tokens: Tensor
    qk: dict[int, QK]


class Teacher(nn.Module):
    """A frozen encoder of images in [-1, 1].

    Args:
        encoder: a timm vision transformer with `blocks`, `num_prefix_tokens` and `forward_features`.
        mean, std: per channel, for images in [0, 1].
        image_size: (height, width) the encoder expects, in pixels.
        grid: (rows, columns) of its patch tokens.
        resize: how images that are not of `image_size` are resized: "bicubic" or "bilinear".
        antialias: of that resizing.
        low_pass: the share of the Nyquist frequency up to which the encoder sees anything; None shows it all.
        precision: "no" (float32), "bf16" or "fp16", whatever autocast is on around it; None takes what is on.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: list[float],
        std: list[float],
        image_size: tuple[int, int],
        grid: tuple[int, int],
        resize: str = "bicubic",
        antialias: bool = True,
        low_pass: float | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.image_size, self.grid, self.resize, self.antialias = image_size, grid, resize, antialias
        self.low_pass, self.precision = low_pass, precision
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: a frozen teacher has no other."""
        return super().train(False)

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.encoder.blocks)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Width of the patch tokens."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(self.encoder.blocks[0].attn.num_heads)  # type: ignore[index, union-attr]

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) in [-1, 1], normalised and then resized to what the encoder expects."""
        x = (low_passed(images, self.low_pass) + 1) / 2
        channels = self.mean.shape[1]
        if x.shape[1] == 1 and channels > 1:
            x = x.expand(-1, channels, -1, -1)
        if x.shape[1] != channels:
            raise HasteError(f"the teacher takes {channels} channels, the images have {x.shape[1]}")
        x = (x - self.mean.to(x.device)) / self.std.to(x.device)
        if tuple(x.shape[-2:]) != self.image_size:
            x = F.interpolate(x, size=self.image_size, mode=self.resize, antialias=self.antialias)
        return x

    @torch.no_grad()
    def forward(self, images: Tensor, blocks: tuple[int, ...] = ()) -> TeacherOutput:
        """Patch tokens of images (B, C, S, S) in [-1, 1], and q, k of `blocks` (counted from 0)."""
        with self._own_precision(images.device), read_qk(self.encoder, blocks) as qk:
            tokens = self.encoder.forward_features(self.prepare(images))  # type: ignore[operator]
        # Encoders pooled by averaging keep their final norm in `fc_norm`.
        final = getattr(self.encoder, "fc_norm", None)
        if final is not None and isinstance(self.encoder.norm, nn.Identity):
            tokens = final(tokens)
        return TeacherOutput(tokens[:, int(self.encoder.num_prefix_tokens) :], qk)  # type: ignore[arg-type]

    @torch.no_grad()
    def block_tokens(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Patch tokens (B, N, D) after each of `blocks` (from 0), before the final norm, prefix tokens cut."""
        chosen = sorted(set(blocks))
        with self._own_precision(images.device):
            found = self.encoder.forward_intermediates(  # type: ignore[operator]
                self.prepare(images), indices=chosen, norm=False, output_fmt="NLC", intermediates_only=True
            )
        return dict(zip(chosen, found, strict=True))

    def _own_precision(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self.precision is None else in_precision(self.precision, device)

    def cosine_to_float32(self, images: Tensor, blocks: tuple[int, ...], precision: str) -> float:
        """The mean cosine, in [-1, 1], of tokens, q and k made in a precision to those made in float32; the least one.

        Args:
            images: (B, C, S, S) in [-1, 1]. blocks: whose q and k count. precision: as of the teacher.
        """
        found = []
        own = self.precision
        try:
            for self.precision in ("no", precision):
                seen = self(images, blocks)
                found.append([seen.tokens, *(part for pair in seen.qk.values() for part in pair)])
        finally:
            self.precision = own
        pairs = zip(*found, strict=True)
        return min(float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean()) for a, b in pairs)


def build_teacher(teacher: config.Teacher, state: Mapping[str, Tensor] | None = None) -> Teacher:
    """The frozen teacher of a study.

    Args:
        teacher: its configuration.
        state: weights trained in the study (`weights: pretrain`).

    Its input size, mean, std and interpolation are timm's for that model unless the configuration names others;
    `resize: reference` always is bicubic without antialias, as in the released code of REPA.

    Raises:
        HasteError: there is no such encoder, its weights cannot be loaded, or mean and std do not fit its channels.
    """
    encoder = build_encoder(teacher)
    if state is not None:
        encoder.load_state_dict(dict(state))
    cfg: Mapping[str, Any] = encoder.pretrained_cfg  # type: ignore[assignment]
    mean, std = teacher.mean or list(cfg["mean"]), teacher.std or list(cfg["std"])
    channels = int(teacher.kwargs.get("in_chans", cfg["input_size"][0]))
    if not len(mean) == len(std) == channels:
        raise HasteError(
            f"teacher {teacher.model!r} takes {channels} channels, its mean is {mean} and its std {std}; possible: "
            f"teacher.mean and teacher.std with {channels} values each"
        )
    # torch resizes with antialias in these two ways only.
    own = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
    return Teacher(
        encoder,
        mean=mean,
        std=std,
        image_size=tuple(encoder.patch_embed.img_size),  # type: ignore[arg-type, union-attr]
        grid=tuple(encoder.patch_embed.grid_size),  # type: ignore[arg-type, union-attr]
        resize=own if teacher.resize == "antialias" else "bicubic",
        antialias=teacher.resize == "antialias",
        low_pass=teacher.low_pass,
        precision=teacher.precision,
    )


def low_passed(images: Tensor, share: float | None) -> Tensor:
    """Images (B, C, H, W) without spatial frequencies above `share` of Nyquist; the images themselves for None.

    Fig 5, arXiv 2505.16792, which leaves the filter open; here it is ideal and round: of the 2-D Fourier transform all
    (fy, fx) in cycles per pixel with sqrt(fy^2 + fx^2) <= share / 2 stay as they are, the others become zero. The mean
    always stays.
    """
    if share is None:
        return images
    height, width = images.shape[-2:]
    fy = torch.fft.fftfreq(height, device=images.device)[:, None]
    fx = torch.fft.rfftfreq(width, device=images.device)[None, :]
    kept = fy.square() + fx.square() <= (share / 2) ** 2 + 1e-12
    return torch.fft.irfft2(torch.fft.rfft2(images.float()) * kept, s=(height, width))
