"""The frozen teacher: any timm vision transformer behind one call that returns patch tokens, q and k.

Nothing in timm's forward is replaced: q and k are read by hooks, fused attention stays on. Prefix tokens (class,
registers) are cut from everything handed out, so attention over patches alone is what the student is aligned with
(Sec. 2.3, arXiv 2505.16792).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from haste_core import _torchvision_guard, config  # noqa: F401  (the guard must come before timm)
from haste_core.classifier import fit_classifier
from haste_core.data import Dataset
from haste_core.errors import HasteError, unknown
from haste_core.models.layers import QK

import timm  # isort: skip
from timm.layers import apply_rot_embed_cat  # isort: skip


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
        antialias: of the bicubic resizing of images that are not of `image_size`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: list[float],
        std: list[float],
        image_size: tuple[int, int],
        grid: tuple[int, int],
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.image_size, self.grid, self.antialias = image_size, grid, antialias
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
        x = (images + 1) / 2
        channels = self.mean.shape[1]
        if x.shape[1] == 1 and channels > 1:
            x = x.expand(-1, channels, -1, -1)
        if x.shape[1] != channels:
            raise HasteError(f"the teacher takes {channels} channels, the images have {x.shape[1]}")
        x = (x - self.mean) / self.std
        if tuple(x.shape[-2:]) != self.image_size:
            x = F.interpolate(x, size=self.image_size, mode="bicubic", antialias=self.antialias)
        return x

    @torch.no_grad()
    def forward(self, images: Tensor, blocks: tuple[int, ...] = ()) -> TeacherOutput:
        """Patch tokens of images (B, C, S, S) in [-1, 1], and q, k of `blocks` (counted from 0)."""
        with read_qk(self.encoder, blocks) as qk:
            tokens = self.encoder.forward_features(self.prepare(images))  # type: ignore[operator]
        # Encoders pooled by averaging keep their final norm in `fc_norm`.
        final = getattr(self.encoder, "fc_norm", None)
        if final is not None and isinstance(self.encoder.norm, nn.Identity):
            tokens = final(tokens)
        return TeacherOutput(tokens[:, int(self.encoder.num_prefix_tokens) :], qk)  # type: ignore[arg-type]


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
            rope = kwargs.get("rope", args[1] if len(args) > 1 and hasattr(attn, "num_prefix_tokens") else None)
            q, k = project_qk(attn, args[0])
            q, k = q[:, :, prefix:], k[:, :, prefix:]
            if rope is not None:
                half = bool(getattr(attn, "rotate_half", False))
                q, k = (apply_rot_embed_cat(part, rope, half=half).type_as(part) for part in (q, k))
            found[block] = (q, k)

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


def check_plain_attention(attn: Any) -> None:
    """Raise HasteError where a timm attention module is more than one softmax of its q and k per head."""
    own_logits = ("relative_position_bias_table", "rel_pos", "rel_pos_bias", "lambda_q1")
    extra = next((name for name in own_logits if getattr(attn, name, None) is not None), None)
    grouped = getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads
    if extra or grouped or not hasattr(attn, "q_norm"):
        why = extra or ("fewer key heads than query heads" if grouped else "no q_norm and k_norm")
        raise HasteError(
            f"attention of kind {type(attn).__name__} ({why}) cannot be aligned with; possible: teachers whose "
            f"attention is one softmax of q and k per head (timm's ViT, DINOv2, DINOv3, CLIP, SigLIP, MAE, I-JEPA)"
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


def build_encoder(teacher: config.Teacher) -> nn.Module:
    """The timm encoder a study names, without head, with hub or local weights loaded.

    Raises:
        HasteError: the name, an argument or the weights do not exist.
    """
    weights = teacher.weights
    options: dict[str, Any] = {"num_classes": 0, **teacher.kwargs}
    if weights == "hub":
        options["pretrained"] = True
    elif weights not in ("pretrain", "random"):
        if not Path(weights).is_file():
            raise HasteError(
                f"teacher.weights {weights!r} is no file; possible: hub, pretrain, random, or the path of a checkpoint"
            )
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
    try:
        encoder = _create(teacher.model, options, teacher.fitting.seed)
        unloaded = _unloaded(encoder, teacher, options) if "pretrained_cfg_overlay" in options else []
    except Exception as error:  # timm raises RuntimeError, TypeError, OSError and hub errors alike
        cause = " ".join(str(error).split())
        hint = "give teacher.weights the path of a local checkpoint" if weights == "hub" else "see timm.list_models()"
        raise HasteError(f"teacher {teacher.model!r} (weights: {weights}): {cause}; possible: {hint}") from error
    if not hasattr(encoder, "blocks") or not hasattr(encoder, "num_prefix_tokens"):
        raise HasteError(f"teacher {teacher.model!r} is no vision transformer; possible: any ViT or EVA of timm")
    if unloaded:
        raise HasteError(
            f"{weights} has no weights for {len(unloaded)} of the teacher's tensors ({', '.join(unloaded[:3])}, ...); "
            f"possible: a checkpoint of {teacher.model}"
        )
    return encoder


def _create(model: str, options: dict[str, Any], seed: int) -> nn.Module:
    # Weights that are not loaded are drawn from the given seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(model, **options)


def _unloaded(encoder: nn.Module, teacher: config.Teacher, options: dict[str, Any]) -> list[str]:
    """Names of tensors that a local checkpoint left as they were drawn.

    timm loads such files without insisting on every key and only logs what is missing, so a wrong file would give a
    random teacher. What is really loaded does not depend on the seed of the initialisation; what is not, does.
    """
    other = _create(teacher.model, options, teacher.fitting.seed + 1).state_dict()
    return [name for name, value in encoder.state_dict().items() if not torch.equal(value, other[name])]


def build_teacher(teacher: config.Teacher, state: Mapping[str, Tensor] | None = None) -> Teacher:
    """The frozen teacher of a study.

    Args:
        teacher: its configuration.
        state: weights trained in the study (`weights: pretrain`).
    """
    encoder = build_encoder(teacher)
    if state is not None:
        encoder.load_state_dict(dict(state))
    cfg = encoder.pretrained_cfg
    mean, std = teacher.mean or list(cfg["mean"]), teacher.std or list(cfg["std"])  # type: ignore[index]
    channels = int(encoder.patch_embed.proj.in_channels)  # type: ignore[union-attr, arg-type]
    if not len(mean) == len(std) == channels:
        raise HasteError(
            f"teacher {teacher.model!r} takes {channels} channels, its mean is {mean} and its std {std}; possible: "
            f"teacher.mean and teacher.std with {channels} values each"
        )
    return Teacher(
        encoder,
        mean=mean,
        std=std,
        image_size=tuple(encoder.patch_embed.img_size),  # type: ignore[arg-type, union-attr]
        grid=tuple(encoder.patch_embed.grid_size),  # type: ignore[arg-type, union-attr]
        antialias=teacher.resize == "antialias",
    )


class PatchClassifier(nn.Module):
    """An encoder under two linear heads, on its class token (if any) and on the mean of its patch tokens.

    The second head makes the patch tokens themselves, which the student is aligned with, carry the class.
    """

    def __init__(self, teacher: Teacher, classes: int) -> None:
        super().__init__()
        self.teacher, self.encoder = [teacher], teacher.encoder  # the list keeps the frozen wrapper unregistered
        self.class_head = nn.Linear(teacher.width, classes)
        self.patch_head = nn.Linear(teacher.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes), the mean of both heads."""
        tokens = self.encoder.forward_features(self.teacher[0].prepare(images))  # type: ignore[operator]
        prefix = int(self.encoder.num_prefix_tokens)  # type: ignore[arg-type]
        logits = self.patch_head(tokens[:, prefix:].mean(1))
        return (logits + self.class_head(tokens[:, 0])) / 2 if prefix else logits


def pretrain(teacher: config.Teacher, dataset: Dataset) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train the study's own teacher as a classifier.

    Returns:
        The encoder's weights and its accuracies (`train_accuracy`, `test_accuracy`, in [0, 1]).
    """
    frozen = build_teacher(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(teacher.fitting.seed + 1)
        classifier = PatchClassifier(frozen, dataset.classes)
    classifier.requires_grad_(True)
    accuracies = fit_classifier(classifier, dataset, teacher.fitting, "teacher")
    return {name: value.detach().clone() for name, value in frozen.encoder.state_dict().items()}, accuracies


def load_pretrained(teacher: config.Teacher, path: Path) -> Teacher:
    """The teacher whose weights `pretrain` left in the safetensors file `path`."""
    if not path.is_file():
        raise HasteError(f"no teacher weights at {path}; possible: haste teacher <study> trains them")
    return build_teacher(teacher, load_file(path))
