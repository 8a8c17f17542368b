"""The frozen teacher: any timm encoder behind one call that returns patch tokens, q and k.

Nothing in timm's forward is replaced: q and k are read by hooks, fused attention stays on. Prefix tokens (class,
registers) are cut off, so the student is aligned with attention over patches alone (Sec. 2.3, arXiv 2505.16792).
Encoders without such attention (ConvNeXt, EfficientNet, ResNet, Swin) give feature maps: their positions are tokens.
"""

from __future__ import annotations

import inspect
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub as hub
import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.nn import functional as F

from haste_core.alignment import Grid, resample_tokens
from haste_core.devices import in_precision
from haste_core.errors import HasteError, NotDownloaded, unknown
from haste_core.files import package_file
from haste_core.seeding import stream
from haste_core.taps import QK

# timm takes seconds to import: what needs it imports it, so that a page of figures does not wait.
# Seconds the hub has to answer before it counts as out of reach. Without it the client tries again for a minute.
HUB_TIMEOUT = 5.0
LONGEST_CAUSE = 300  # characters of a library's own message that are repeated


class TeacherOutput(NamedTuple):
    """Patch tokens (B, N, D) after the final norm, and q, k (B, H, N, d) of the chosen blocks, prefix tokens cut."""

    tokens: Tensor
    qk: dict[int, QK]


class Similarity(NamedTuple):
    """Attention made of a block's tokens, in place of q and k: softmax of their cosine similarities / temperature.

    The same map for every head. Not in the paper: it makes attention alignment possible with any encoder.
    """

    temperature: float
    heads: int

    def of(self, tokens: Tensor) -> QK:
        """q and k (B, heads, N, D) float32 of tokens (B, N, D), whose softmax(q k^T / sqrt(D)) is that attention."""
        unit = F.normalize(tokens.float(), dim=-1)[:, None].expand(-1, self.heads, -1, -1)
        return unit * (unit.shape[-1] ** 0.5 / self.temperature), unit


class Teacher(nn.Module):
    """A frozen encoder: images in [-1, 1] to patch tokens, q and k.

    Args:
        model: name of a timm encoder, or such an encoder: a vision transformer (ViT, DINOv2, DINOv3, CLIP, SigLIP, MAE,
            I-JEPA, EVA), or one of feature maps, whose stages stand for blocks.
        weights: "hub" (timm's published weights), "random", or the path of a checkpoint.
        state: the encoder's state dict, in place of `weights`.
        mean, std: per channel, of images in [0, 1]; timm's for the model by default.
        resize: of images of another size: "antialias" (timm's interpolation of the model), or "reference", bicubic
            without antialias after normalisation, as in the released code of REPA.
        low_pass: share of the Nyquist frequency above which the encoder sees nothing; None shows it all.
        stage: of an encoder of feature maps, from 0, whose positions are the tokens; the last by default. Tokens of
            other stages are resampled to its grid.
        precision: "no" (float32), "bf16" or "fp16" whatever autocast is on around it; None takes what is on.
        seed: of random weights.
        kwargs: further arguments of `timm.create_model`, such as img_size (of feature maps, too).

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
        stage: int | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # null takes one back
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
        self.maps, self.grid = not is_transformer(encoder), (0, 0)
        if self.maps:
            stages = range(len(encoder.feature_info))
            if stage is not None and stage not in stages:
                raise unknown(f"stage of teacher {model!r} (teacher.stage, from 0)", stage, stages)
            self.stage = stages[-1] if stage is None else stage
            side = kwargs.get("img_size", cfg["input_size"][1:])
            self.image_size: Grid = (side, side) if isinstance(side, int) else tuple(side)
        elif stage is not None:
            raise HasteError(f"teacher.stage {stage}: {model!r} has no stages; expected none for a vision transformer")
        else:
            self.image_size, self.grid = tuple(encoder.patch_embed.img_size), tuple(encoder.patch_embed.grid_size)
        self.antialias = resize == "antialias"
        # torch resizes with antialias in these two ways only.
        bilinear = self.antialias and cfg["interpolation"] == "bilinear"
        self.resize = "bilinear" if bilinear else "bicubic"
        self.low_pass, self.precision = low_pass, precision
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.requires_grad_(False).eval()
        if self.maps:
            encoder.to(memory_format=torch.channels_last)  # makes convolutions faster
            self.grid = self._grid(channels)

    def _grid(self, channels: int) -> Grid:
        """The grid of the stage's positions."""
        empty = next(self.encoder.parameters()).new_zeros(1, channels, *self.image_size)
        try:
            rows, columns = self.feature_maps(empty, [self.stage])[0].shape[-2:]
        except (RuntimeError, AssertionError) as error:
            raise HasteError(
                f"the teacher cannot look at images of {self.image_size}: {_cause(error)}; expected another "
                f"teacher.kwargs.img_size"
            ) from error
        return rows, columns

    def train(self, mode: bool = True) -> Teacher:
        """No effect: a frozen teacher stays in eval mode."""
        return super().train(False)

    @property
    def blocks(self) -> int:
        """Number of transformer blocks, or of stages of feature maps."""
        return len(self.encoder.feature_info if self.maps else self.encoder.blocks)  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Width of the patch tokens."""
        if self.maps:
            return int(self.encoder.feature_info[self.stage]["num_chs"])  # type: ignore[index]
        return int(self.encoder.num_features)  # type: ignore[arg-type]

    @property
    def heads(self) -> int:
        """Attention heads of a block; 0 of feature maps."""
        return 0 if self.maps else int(self.encoder.blocks[0].attn.num_heads)  # type: ignore[index, union-attr]

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
    def forward(
        self, images: Tensor, blocks: tuple[int, ...] = (), similarity: Similarity | None = None
    ) -> TeacherOutput:
        """Patch tokens of images (B, C, S, S) in [-1, 1], and q, k of `blocks` (from 0), or those `similarity` makes.

        Raises:
            HasteError: a block does not exist, or has no q and k that can be read.
        """
        if similarity is not None or (self.maps and not blocks):
            tokens, found = self._seen(images, blocks)
            return TeacherOutput(tokens, {b: similarity.of(found[b]) for b in blocks} if similarity else {})
        if self.maps:
            raise HasteError(
                "this teacher has feature maps and no attention that could be aligned with; expected "
                "alignment.attention_from=similarity, or lambda_attention 0"
            )
        with self._own_precision(images.device), read_qk(self.encoder, blocks) as qk:
            tokens = self.encoder.forward_features(self.prepare(images))  # type: ignore[operator]
        return TeacherOutput(self._final(tokens), qk)

    @torch.no_grad()
    def block_tokens(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Patch tokens (B, N, D) after each of `blocks` (from 0), before the final norm, prefix tokens cut."""
        return self._seen(images, blocks)[1]

    def _seen(self, images: Tensor, blocks: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The tokens, and those after each of `blocks`."""
        _check_blocks(blocks, self.blocks)
        chosen = sorted({*blocks, self.stage} if self.maps else {*blocks})
        with self._own_precision(images.device):
            if self.maps:
                maps = self.feature_maps(images, chosen)
                found = dict(zip(chosen, map(self._tokens, maps), strict=True))
                return found[self.stage], found
            tokens, parts = self.encoder.forward_intermediates(  # type: ignore[operator]
                self.prepare(images), indices=chosen, norm=False, output_fmt="NLC"
            )
        return self._final(tokens), dict(zip(chosen, parts, strict=True))

    def _tokens(self, maps: Tensor) -> Tensor:
        """The positions of maps (B, D, rows, columns) as tokens (B, N, D) on the teacher's grid."""
        rows, columns = maps.shape[-2:]
        return resample_tokens(maps.flatten(2).transpose(1, 2), (rows, columns), self.grid)

    def feature_maps(self, images: Tensor, stages: list[int]) -> list[Tensor]:
        """Feature maps (B, D, rows, columns) of images (B, C, S, S) in [-1, 1] after stages."""
        return self.encoder.forward_intermediates(  # type: ignore[operator]
            self.prepare(images).contiguous(memory_format=torch.channels_last),
            indices=stages,
            norm=False,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",
        )

    def _final(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, N, D) of a transformer's output (B, prefix + N, D)."""
        # Encoders pooled by averaging keep their final norm in `fc_norm`.
        final = getattr(self.encoder, "fc_norm", None)
        if final is not None and isinstance(self.encoder.norm, nn.Identity):
            tokens = final(tokens)
        return tokens[:, int(self.encoder.num_prefix_tokens) :]  # type: ignore[arg-type]

    def _own_precision(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self.precision is None else in_precision(self.precision, device)

    def cosine_to_float32(self, images: Tensor, blocks: tuple[int, ...], precision: str) -> float:
        """Least mean cosine, in [-1, 1], between tokens, q and k of `blocks` in a precision and those in float32."""
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
    (fy, fx) in cycles per pixel with sqrt(fy^2 + fx^2) <= share / 2 stay as they are, the others become zero.
    """
    if share is None:
        return images
    height, width = images.shape[-2:]
    fy = torch.fft.fftfreq(height, device=images.device)[:, None]
    fx = torch.fft.rfftfreq(width, device=images.device)[None, :]
    kept = fy.square() + fx.square() <= (share / 2) ** 2 + 1e-12
    return torch.fft.irfft2(torch.fft.rfft2(images.float()) * kept, s=(height, width))


# -- q and k ----------------------------------------------------------------------------------------------------------


@contextmanager
def read_qk(encoder: nn.Module, blocks: tuple[int, ...]) -> Iterator[dict[int, QK]]:
    """Context in which forward passes of a timm transformer leave q and k (B, H, patches, d) of `blocks` in the dict.

    The values are those the attention kernel sees: after q/k norm and rotary embedding, before 1 / sqrt(d).
    """
    modules: Any = encoder.blocks
    _check_blocks(blocks, len(modules))
    prefix = int(encoder.num_prefix_tokens)  # type: ignore[arg-type]
    found: dict[int, QK] = {}

    def keep(block: int, attn: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(attn.forward).bind(*args, **kwargs).arguments
        if given.get("attn_mask") is not None or given.get("is_causal"):
            raise HasteError(f"the attention of teacher block {block} is masked; expected an unmasked teacher")
        found[block] = _patch_qk(attn, args[0], given.get("rope"), prefix)

    handles = [modules[b].attn.register_forward_pre_hook(partial(keep, b), with_kwargs=True) for b in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_blocks(blocks: Sequence[int], count: int) -> None:
    for block in blocks:
        if block >= count:
            raise unknown("teacher block", block, range(count))


def _patch_qk(attn: Any, x: Tensor, rope: Tensor | None, prefix: int) -> QK:
    """q and k (B, H, patches, d) of a timm attention module at its input x (B, N, D)."""
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
    q, k = attn.q_norm(q)[:, :, prefix:], attn.k_norm(k)[:, :, prefix:]
    if rope is not None:  # timm rotates every token but the prefix ones
        from timm.layers import apply_rot_embed_cat

        half = bool(getattr(attn, "rotate_half", False))
        q, k = (apply_rot_embed_cat(part, rope, half=half).type_as(part) for part in (q, k))
    return q, k


def check_plain_attention(attn: Any) -> None:
    """Raise HasteError where a timm attention module is more than one softmax of q k^T / sqrt(d) per head."""
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import EvaAttention

    # Read by their layout; another kind, even one derived from these, may do more.
    if type(attn) not in (Attention, AttentionRope, EvaAttention):
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


# -- encoders and their weights ---------------------------------------------------------------------------------------


def build_encoder(model: str, weights: str, seed: int, kwargs: Mapping[str, Any]) -> nn.Module:
    """timm encoder without head, with hub or local weights, or random ones ("random", "pretrain") from `seed`."""
    _check_sizes(kwargs)
    options: dict[str, Any] = {"num_classes": 0, **kwargs}
    unloaded = []
    try:
        file = weights_file(model, weights)
        if file is not None:
            state = _in_timms_names(model, file)
            unloaded = _unloaded(model, options, state)
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
        elif weights == "hub":
            options["pretrained"] = True
        encoder: Any = _create(model, options, stream("teacher weights", seed))
    except HasteError:
        raise
    except Exception as error:  # timm raises RuntimeError, TypeError, OSError and unpickling errors alike
        raise _not_loaded(model, weights, error) from error
    if unloaded:
        raise HasteError(
            f"{file} has no weights for {len(unloaded)} of the teacher's tensors ({', '.join(unloaded[:3])}, ...); "
            f"expected a checkpoint of {model} that fits teacher.kwargs {dict(kwargs)}"
        )
    _check_kind(encoder, model)
    return encoder


def _check_kind(encoder: Any, model: str) -> None:
    """Refuse an encoder that has neither the tokens of a vision transformer nor feature maps."""
    if not is_transformer(encoder):
        if not (hasattr(encoder, "forward_intermediates") and getattr(encoder, "feature_info", None)):
            raise HasteError(f"teacher {model!r} shows timm no stages; expected a vision transformer or feature maps")
        return
    missing = [part for part in ("blocks", "patch_embed") if not hasattr(encoder, part)]
    if missing:
        why = f"it has no {missing[0]}"
    elif not hasattr(getattr(encoder.blocks[0], "attn", None), "num_heads"):
        why = "its blocks have no attention module of their own"
    elif not getattr(encoder.patch_embed, "img_size", None):
        why = "it has no fixed input size"
    elif not all(encoder.patch_embed.grid_size):
        raise HasteError(
            f"teacher {model!r} has patches of {encoder.patch_embed.patch_size} and an input of "
            f"{encoder.patch_embed.img_size} pixels; expected an image of at least one patch"
        )
    else:
        return
    raise HasteError(
        f"teacher {model!r} is no vision transformer that can be aligned with: {why}; expected any ViT "
        "or EVA of timm with a fixed input size and one attention per block, or feature maps"
    )


def is_transformer(encoder: nn.Module) -> bool:
    """True for a vision transformer, whose blocks keep all tokens; else an encoder has feature maps, if anything."""
    return hasattr(encoder, "num_prefix_tokens")


def _check_sizes(kwargs: Mapping[str, Any]) -> None:
    """Refuse sizes with which timm builds a network that cannot run, or stops without a reason."""
    for name in ("dynamic_img_size", "dynamic_img_pad"):
        if kwargs.get(name):
            raise HasteError(f"teacher.kwargs.{name} is set; expected a fixed token grid")
    for name in ("depth", "num_heads", "embed_dim", "patch_size", "img_size", "in_chans"):
        given = np.atleast_1d(kwargs.get(name, 1)).tolist()
        largest = 1000 if name == "depth" else 100_000
        if not all(isinstance(size, int) and 1 <= size <= largest for size in given):
            raise HasteError(f"teacher.kwargs.{name} is {kwargs[name]}; expected whole numbers from 1 to {largest:,}")
    size, patch = (np.atleast_1d(kwargs.get(name, 0)) for name in ("img_size", "patch_size"))
    if size.min() and patch.max() > size.min():
        raise HasteError(
            f"teacher.kwargs has img_size {kwargs['img_size']} and patch_size {kwargs['patch_size']}; expected an "
            f"image of at least one patch"
        )


def _create(model: str, options: dict[str, Any], seed: int) -> nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return timm.create_model(model, **options)
        except TypeError as error:
            if "img_size" not in options or "img_size" not in str(error):
                raise
        # Convolutions take images of any size, and no argument for it.
        torch.manual_seed(seed)
        return timm.create_model(model, **{name: value for name, value in options.items() if name != "img_size"})


def _in_timms_names(model: str, file: Path) -> Any:
    """The content of a checkpoint; tensors under other names than timm's are taken in timm's order, if that fits.

    It fits where the shapes and the last parts of the names (weight, running_mean, ...) are those of timm's model one
    by one, as for EfficientNet's weights of efficientnet_pytorch.
    """
    import timm
    from timm.models import load_state_dict

    state = load_state_dict(str(file), weights_only=True)
    with torch.device("meta"):
        own = timm.create_model(model).state_dict()

    def kinds(tensors: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(name.rpartition(".")[2], getattr(value, "shape", None)) for name, value in tensors.items()]

    renamed = not own.keys() & state and kinds(own) == kinds(state)
    return dict(zip(own, state.values(), strict=True)) if renamed else state


def _unloaded(model: str, options: dict[str, Any], state: Any) -> list[str]:
    """Names of parameters that a checkpoint's content leaves as they were initialised.

    timm only logs keys that are missing, so a wrong file would give a random teacher. A checkpoint of the same keys and
    shapes that holds NaN throughout shows what arrives where, whatever timm renames or resizes on the way.
    """

    def marked(state: Any) -> Any:
        if isinstance(state, Mapping):
            return {name: marked(value) for name, value in state.items()}
        if isinstance(state, Tensor) and state.is_floating_point():
            return torch.tensor(float("nan"), dtype=state.dtype).expand(state.shape)
        return state

    overlay = {"pretrained_cfg_overlay": {"state_dict": marked(state)}, "pretrained": True}
    encoder = _create(model, options | overlay, seed=0)
    return [name for name, parameter in encoder.named_parameters() if not parameter.isnan().any()]


def weights_file(model: str, weights: str, key: str = "teacher.weights", download: bool = True) -> Path | None:
    """Checkpoint that a timm encoder's `weights` stand for: "hub", "pretrain", "random", "package:NAME/PATH" or a path.

    None for random weights, and for names such as "hf-hub:owner/name" that timm itself resolves. key: setting that
    takes a path, for errors. download: False looks for published weights in local caches alone.

    Raises:
        HasteError: there is no such file, nothing is published under that name, or it cannot be had.
    """
    if weights in ("pretrain", "random") or (weights == "hub" and ":" in model):
        return None
    if weights.startswith("package:"):
        return package_file(weights.removeprefix("package:"), key)
    if weights != "hub":
        if not Path(weights).is_file():
            raise HasteError(
                f"{key} {weights!r} is no file; expected hub, pretrain, random, package:NAME/PATH, or the path of a "
                "checkpoint (.safetensors, or .pth and .bin that hold tensors alone)"
            )
        return Path(weights)
    from timm.models import get_pretrained_cfg

    try:
        cfg = get_pretrained_cfg(model)
    except RuntimeError as error:
        raise _not_loaded(model, weights, error) from error
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise _not_loaded(model, weights, RuntimeError("timm knows no published weights"))
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    source = f"{names[0]} of {constants.ENDPOINT}/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    try:
        if cfg.hf_hub_id:
            return _from_repository(cfg.hf_hub_id, names, download)
        return _from_url(str(cfg.url), download)
    except Exception as error:  # the client raises its own errors and those of two HTTP libraries
        raise (NotDownloaded if isinstance(error, NotDownloaded) else HasteError)(
            f"teacher {model!r} (weights: hub): {type(error).__name__}: {_cause(error)}; download {source} elsewhere "
            f"and give {key} the path of that local checkpoint"
        ) from error


def _from_repository(repository: str, names: list[str], download: bool) -> Path:
    repository, _, revision = repository.partition("@")
    given: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    for name in names:
        cached = hub.try_to_load_from_cache(**given, filename=name)
        if isinstance(cached, str):
            return Path(cached)
    if not download:
        raise NotDownloaded("not in the local cache, downloaded at first use")
    for name in names:
        try:
            # Asked once, because a download that cannot begin is tried again for half a minute per file.
            hub.get_hf_file_metadata(hub.hf_hub_url(**given, filename=name), timeout=HUB_TIMEOUT)
        except LocalEntryNotFoundError:
            raise  # the hub is out of reach
        except EntryNotFoundError:
            continue
        return Path(hub.hf_hub_download(**given, filename=name))
    raise FileNotFoundError(f"{repository} has none of {', '.join(names)}")


def _from_url(url: str, download: bool) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not target.is_file():
        if not download:
            raise NotDownloaded("not in the local cache, downloaded at first use")
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT):
            target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target))
    return target


def _not_loaded(model: str, weights: str, error: Exception) -> HasteError:
    expected = f"one of timm.list_models({'pretrained=True' if weights == 'hub' else ''})"
    if isinstance(error, AssertionError | TypeError | ValueError):  # of a model that timm knows
        expected = "teacher.kwargs that timm builds this model with"
    return HasteError(f"teacher {model!r} (weights: {weights}): {_cause(error)}; expected {expected}")


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + " ..."
