"""The frozen teacher: any timm vision transformer behind one call that returns patch tokens, q and k.

Nothing in timm's forward is replaced: q and k are read by hooks, fused attention stays on. Prefix tokens (class,
registers) are cut off, so the student is aligned with attention over patches alone (Sec. 2.3, arXiv 2505.16792).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from haste_core import _torchvision_guard  # noqa: F401  (must come before timm)
from haste_core.devices import in_precision
from haste_core.encoders import build_encoder
from haste_core.errors import HasteError, unknown
from haste_core.taps import QK

from timm.layers import Attention, AttentionRope, apply_rot_embed_cat  # isort: skip
from timm.models.eva import EvaAttention  # isort: skip

# Attention modules read here by their layout; another kind, even one derived from these, may do more.
PLAIN = (Attention, AttentionRope, EvaAttention)


class TeacherOutput(NamedTuple):
    """Patch tokens (B, N, D) after the final norm, and q, k (B, H, N, d) of the chosen blocks, prefix tokens cut."""

    tokens: Tensor
    qk: dict[int, QK]


class Teacher(nn.Module):
    """A frozen encoder: images in [-1, 1] to patch tokens, q and k.

    Args:
        model: name of a timm vision transformer (ViT, DINOv2, DINOv3, CLIP, SigLIP, MAE, I-JEPA, EVA), or such an
            encoder.
        weights: "hub" (timm's published weights), "random", or the path of a checkpoint.
        state: the encoder's state dict, in place of `weights`.
        mean, std: per channel, of images in [0, 1]; timm's for the model by default.
        resize: of images of another size: "antialias" (timm's interpolation of the model), or "reference", bicubic
            without antialias after normalisation, as in the released code of REPA.
        low_pass: share of the Nyquist frequency above which the encoder sees nothing; None shows it all.
        precision: "no" (float32), "bf16" or "fp16" whatever autocast is on around it; None takes what is on.
        seed: of random weights.
        kwargs: further arguments of `timm.create_model`, such as img_size.

    Raises:
        HasteError: there is no such encoder, its weights cannot be loaded, or mean and std do not fit its channels.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        weights: str = "hub",
        state: Mapping[str, Tensor] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resize: str = "antialias",
        low_pass: float | None = None,
        precision: str | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        source = "random" if state is not None else weights
        encoder: Any = build_encoder(model, source, seed, kwargs) if isinstance(model, str) else model
        if state is not None:
            encoder.load_state_dict(dict(state))
        self.encoder = encoder
        cfg = encoder.pretrained_cfg
        mean, std = list(mean or cfg["mean"]), list(std or cfg["std"])
        channels = int(kwargs.get("in_chans", cfg["input_size"][0]))
        if not len(mean) == len(std) == channels:
            raise HasteError(
                f"teacher {model!r} takes {channels} channels, its mean is {mean} and its std {std}; expected "
                f"teacher.mean and teacher.std with {channels} values each"
            )
        self.image_size: tuple[int, int] = tuple(encoder.patch_embed.img_size)
        self.grid: tuple[int, int] = tuple(encoder.patch_embed.grid_size)
        # torch resizes with antialias in these two ways only.
        own = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
        self.antialias = resize == "antialias"
        self.resize = own if self.antialias else "bicubic"
        self.low_pass, self.precision = low_pass, precision
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """No effect: a frozen teacher stays in eval mode."""
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
        """Least mean cosine, in [-1, 1], between tokens, q and k in a precision and those in float32.

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


@contextmanager
def read_qk(encoder: nn.Module, blocks: tuple[int, ...]) -> Iterator[dict[int, QK]]:
    """While open, forward passes of a timm transformer leave q and k (B, H, patches, d) of `blocks` in the dict.

    The values are those the attention kernel sees: after q/k norm and rotary embedding, before 1 / sqrt(d).
    """
    count = len(encoder.blocks)  # type: ignore[arg-type]
    for block in blocks:
        if block >= count:
            raise unknown("teacher block", block, range(count))
    prefix = int(encoder.num_prefix_tokens)  # type: ignore[arg-type]
    found: dict[int, QK] = {}

    def hook_for(block: int) -> Any:
        def hook(attn: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            given = inspect.signature(attn.forward).bind(*args, **kwargs).arguments
            if given.get("attn_mask") is not None or given.get("is_causal"):
                raise HasteError(f"the attention of teacher block {block} is masked; expected an unmasked teacher")
            found[block] = _patch_qk(attn, args[0], given.get("rope"), prefix)

        return hook

    handles = [
        encoder.blocks[b].attn.register_forward_pre_hook(hook_for(b), with_kwargs=True)  # type: ignore[index, union-attr]
        for b in blocks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _patch_qk(attn: Any, x: Tensor, rope: Tensor | None, prefix: int) -> QK:
    # timm rotates every token but the prefix ones.
    q, k = (part[:, :, prefix:] for part in project_qk(attn, x))
    if rope is not None:
        half = bool(getattr(attn, "rotate_half", False))
        q, k = (apply_rot_embed_cat(part, rope, half=half).type_as(part) for part in (q, k))
    return q, k


def check_plain_attention(attn: Any) -> None:
    """Raise HasteError where a timm attention module is more than one softmax of q k^T / sqrt(d) per head."""
    if type(attn) not in PLAIN:
        why = "its maps are not known to be a softmax of q and k alone"
    elif getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        why = "fewer key heads than query heads"
    elif abs(attn.scale * attn.head_dim**0.5 - 1) > 1e-6:
        why = f"logits scaled by {attn.scale:g} instead of 1 / sqrt({attn.head_dim})"
    else:
        return
    raise HasteError(
        f"attention of kind {type(attn).__name__} ({why}) cannot be aligned with; expected teachers whose attention "
        "is one softmax of q and k per head (timm's ViT, DINOv2, DINOv3, CLIP, SigLIP, MAE, I-JEPA)"
    )


def project_qk(attn: Any, x: Tensor) -> QK:
    """q and k (B, H, N, d) of a timm attention module at its input x (B, N, D), norms applied, without rope.

    Raises:
        HasteError: the module's attention is not a plain softmax of q and k.
    """
    check_plain_attention(attn)
    if getattr(attn, "qkv", None) is not None:
        # Only the rows of q and k are computed; v would be thrown away.
        rows = attn.qkv.weight.shape[0] // 3 * 2
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            separate = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            bias = separate if bias is None else bias + separate
        qk = F.linear(x, attn.qkv.weight[:rows], None if bias is None else bias[:rows])
        q, k = qk.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        q, k = (p(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
    return attn.q_norm(q), attn.k_norm(k)
