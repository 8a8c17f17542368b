from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from haste_core import _torchvision_guard
from haste_core.devices import in_precision
from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.pretrain import build_teacher, check_precision
from haste_core.teacher import low_passed, project_qk, read_qk
from haste_core.training import Batch

VIT = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
PLAIN = ("vit_tiny_patch16_224", VIT)
ENCODERS = {
    "vit": PLAIN,
    "vit-registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 4}),
    "vit-qk-norm": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}),
    "vit-no-prefix": ("vit_tiny_patch16_224", VIT | {"class_token": False, "global_pool": "avg"}),
    "eva-dinov3": ("vit_small_patch16_dinov3", VIT),
    "eva-dinov3-bias": ("vit_tiny_patch16_dinov3_qkvb", VIT),
    "eva02-interleaved-rope": ("eva02_tiny_patch14_224", VIT),
    "eva02-separate-projections": ("eva02_base_patch14_224", VIT),
}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-3}
PREFIXES = {"vit": 1, "vit-registers": 5, "vit-no-prefix": 0, "eva-dinov3": 5, "eva02-interleaved-rope": 1}


def settings(model, kwargs, img_size=16, **changes):
    kwargs = kwargs | {"img_size": img_size if isinstance(img_size, int) else list(img_size)}
    return config.Teacher(**{"model": model, "kwargs": kwargs, "weights": "random"} | changes)


def make(name="vit", img_size=16, **changes):
    return build_teacher(settings(*ENCODERS[name], img_size, **changes))


def images(batch=2, channels=3, height=16, width=16):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def unfused_maps(encoder, x):
    """Attention maps (B, H, N, N) and outputs of every block, as timm's own unfused path computes them."""
    maps, outputs, handles = {}, {}, []
    for i, block in enumerate(encoder.blocks):
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_pre_hook(lambda _m, args, i=i: maps.update({i: args[0]})))
        handles.append(block.attn.register_forward_hook(lambda _m, args, out, i=i: outputs.update({i: (args[0], out)})))
    encoder.forward_features(x)
    for handle in handles:
        handle.remove()
    for block in encoder.blocks:
        block.attn.fused_attn = True
    return maps, outputs


# -- torchvision guard ------------------------------------------------------------------------------------------------


def test_teacher_and_torch_fidelity_import_in_a_fresh_process_and_the_guard_is_done_then():
    script = (
        "import haste_core.teacher, torch_fidelity, sys\n"
        "from haste_core import _torchvision_guard as g\n"
        "assert 'torchvision' in sys.modules\n"
        "assert g.guard() is False\n"
        "from torchvision import transforms\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_guard_does_nothing_when_torchvision_is_already_imported(monkeypatch):
    monkeypatch.setattr(_torchvision_guard, "_library", None)
    monkeypatch.setattr(_torchvision_guard, "compiled_part_loads", lambda _: pytest.fail("looked at the compiled part"))
    monkeypatch.setitem(sys.modules, "torchvision", sys)
    assert _torchvision_guard.guard() is False
    assert _torchvision_guard._library is None


def test_guard_does_nothing_when_the_compiled_part_loads(monkeypatch):
    asked = []
    monkeypatch.setattr(_torchvision_guard, "_library", None)
    monkeypatch.setattr(_torchvision_guard, "compiled_part_loads", lambda where: asked.append(where) or True)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert _torchvision_guard.guard() is False
    assert _torchvision_guard._library is None
    assert [where.name for where in asked] == ["torchvision"]


def test_a_folder_without_a_loadable_library_counts_as_not_loading(tmp_path):
    assert _torchvision_guard.compiled_part_loads(tmp_path) is False
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert _torchvision_guard.compiled_part_loads(tmp_path) is False


# -- q and k ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("img_size", [16, (16, 24)], ids=["square", "wide"])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_attention_from_q_and_k_is_the_encoders_own_over_patch_tokens(randomise, name, img_size):
    teacher = make(name, img_size)
    randomise(teacher.encoder, std=0.4)
    height, width = teacher.image_size
    x = images(height=height, width=width)
    prefix, patches = teacher.encoder.num_prefix_tokens, teacher.grid[0] * teacher.grid[1]
    seen = teacher(x, (0, 2))
    assert list(seen.qk) == [0, 2]
    maps, _ = unfused_maps(teacher.encoder, teacher.prepare(x))
    for block, (q, k) in seen.qk.items():
        assert q.shape == k.shape == (2, 4, patches, 8)
        own = maps[block][:, :, prefix:, prefix:]
        # Cutting prefix tokens before the softmax is the same as renormalising over the patches after it.
        assert_close((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1), own / own.sum(-1, keepdim=True), **TOLERANCE)
        assert own.std() > 1e-3


@torch.no_grad()
def test_without_prefix_tokens_q_and_k_give_the_attention_modules_output(randomise):
    teacher = make("vit-no-prefix")
    randomise(teacher.encoder, std=0.4)
    q, k = teacher(images(), (1,)).qk[1]
    _, outputs = unfused_maps(teacher.encoder, teacher.prepare(images()))
    x, out = outputs[1]
    attn = teacher.encoder.blocks[1].attn
    v = attn.qkv(x)[..., 64:].unflatten(-1, (4, 8)).transpose(1, 2)
    mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    assert_close(attn.proj(mixed.transpose(1, 2).flatten(2)), out, **TOLERANCE)


@pytest.mark.parametrize("name", ["vit", "vit-registers", "vit-qk-norm"])
@torch.no_grad()
def test_projected_q_and_k_of_all_tokens_give_the_attention_modules_output(randomise, name):
    encoder = randomise(make(name).encoder, std=0.4)
    attn = encoder.blocks[1].attn
    attn.fused_attn = False
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1))
    q, k = project_qk(attn, x)
    v = attn.qkv(x)[..., 64:].unflatten(-1, (4, 8)).transpose(1, 2)
    mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    assert_close(attn.proj(mixed.transpose(1, 2).flatten(2)), attn(x), **TOLERANCE)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_reading_q_and_k_changes_nothing_leaves_no_hook_and_keeps_fused_attention(randomise, name):
    teacher = make(name)
    encoder = randomise(teacher.encoder, std=0.4)
    assert all(block.attn.fused_attn for block in encoder.blocks)
    before = teacher(images()).tokens
    assert torch.equal(teacher(images(), (0, 1, 2)).tokens, before)
    assert not any(block.attn._forward_pre_hooks for block in encoder.blocks)
    assert all(block.attn.fused_attn for block in encoder.blocks)


def test_hooks_are_removed_when_the_forward_pass_fails():
    encoder = make().encoder
    with pytest.raises(RuntimeError, match="boom"), read_qk(encoder, (0, 1)):
        raise RuntimeError("boom")
    assert not any(block.attn._forward_pre_hooks for block in encoder.blocks)


def test_a_block_that_does_not_exist_is_refused_naming_the_possible_ones():
    with pytest.raises(HasteError, match=r"'3'.*possible: 0, 1, 2"):
        make()(images(), (1, 3))


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREFIXES)
@torch.no_grad()
def test_prefix_tokens_are_cut(randomise, name):
    teacher = make(name)
    randomise(teacher.encoder, std=0.4)
    assert teacher.encoder.num_prefix_tokens == PREFIXES[name]
    seen = teacher(images(), (0,))
    assert seen.tokens.shape == (2, 16, 32)
    assert seen.qk[0][0].shape[2] == 16


@pytest.mark.parametrize("name", ["vit", "vit-registers", "vit-qk-norm"])
@torch.no_grad()
def test_tokens_are_timms_own_normalised_patch_tokens(randomise, name):
    teacher = make(name)
    randomise(teacher.encoder, std=0.4)
    (expected,) = teacher.encoder.forward_intermediates(
        teacher.prepare(images()), indices=[2], norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert_close(teacher(images()).tokens, expected)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_tokens_have_passed_the_final_norm_wherever_timm_keeps_it(name):
    """A fresh LayerNorm has weight 1 and bias 0, so each token has mean 0 and variance 1."""
    tokens = make(name)(images()).tokens
    assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-4, rtol=0)
    assert_close(tokens.var(-1, unbiased=False), torch.ones(2, 16), atol=1e-2, rtol=0)


def test_teacher_describes_itself():
    teacher = make("vit-registers", (16, 24))
    assert (teacher.width, teacher.heads, teacher.blocks) == (32, 4, 3)
    assert (teacher.image_size, teacher.grid) == ((16, 24), (4, 6))


def test_teacher_is_frozen_and_always_in_eval_mode():
    teacher = make()
    assert not any(p.requires_grad for p in teacher.parameters())
    nn.ModuleList([teacher]).train()
    teacher.train(True)
    assert not any(module.training for module in teacher.modules())
    seen = teacher(images().requires_grad_(), (0,))
    assert not seen.tokens.requires_grad
    assert not seen.qk[0][0].requires_grad


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_images_are_normalised_from_minus_one_to_one():
    teacher = make(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    x = images()
    prepared = teacher.prepare(x)
    for c, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)]):
        assert_close(prepared[:, c], ((x[:, c] + 1) / 2 - mean) / std)


def test_mean_and_std_are_the_encoders_own_unless_given():
    teacher = make()
    cfg = teacher.encoder.pretrained_cfg
    assert teacher.mean.flatten().tolist() == pytest.approx(list(cfg["mean"]))
    assert teacher.std.flatten().tolist() == pytest.approx(list(cfg["std"]))


def test_grey_images_fill_all_channels_of_a_colour_teacher():
    teacher = make()
    grey = images(channels=1)
    assert torch.equal(teacher.prepare(grey), teacher.prepare(grey.repeat(1, 3, 1, 1)))


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(HasteError, match="3 channels, the images have 2"):
        make().prepare(images(channels=2))


@pytest.mark.parametrize(("resize", "antialias"), [("antialias", True), ("reference", False)])
@pytest.mark.parametrize("side", [8, 40])
def test_other_sizes_are_normalised_and_then_resized_bicubically(resize, antialias, side):
    teacher = make(resize=resize)
    x = images(height=side, width=side)
    normalised = ((x + 1) / 2 - teacher.mean) / teacher.std
    expected = F.interpolate(normalised, (16, 16), mode="bicubic", antialias=antialias)
    assert_close(teacher.prepare(x), expected)
    assert teacher(x).tokens.shape == (2, 16, 32)


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["vit", "vit-registers", "eva-dinov3"])
def test_local_weights_are_loaded(tmp_path, randomise, name, suffix):
    state = randomise(make(name).encoder).state_dict()
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, path)
    loaded = make(name, weights=str(path)).encoder.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"features.0.weight": torch.zeros(3)}, path)
    with pytest.raises(HasteError):
        make(weights=str(path))


def test_weights_that_lack_a_block_are_refused(tmp_path):
    path = tmp_path / "shallow.safetensors"
    state = {k: v for k, v in make().encoder.state_dict().items() if not k.startswith("blocks.2.")}
    save_file(state, path)
    with pytest.raises(HasteError):
        make(weights=str(path))


class Bomb:
    """Unpickles by creating a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_execute_code_are_refused_unexecuted(tmp_path, suffix):
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"norm.weight": Bomb(trace)}, protocol=2))
    with pytest.raises(HasteError):
        make(weights=str(path))
    torch.save({"norm.weight": Bomb(trace)}, path)
    with pytest.raises(HasteError):
        make(weights=str(path))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "vit_no_such_model"}, "vit_no_such_model"),
        ({"model": "resnet18", "kwargs": {}}, "no vision transformer.*no blocks"),
        ({"model": "vit_small_patch16_18x2_224", "kwargs": VIT}, "no attention module"),
        ({"model": "naflexvit_base_patch16_gap", "kwargs": {"embed_dim": 24, "num_heads": 2}}, "no patch_embed"),
        ({"kwargs": {"no_such_argument": 1}}, "no_such_argument"),
        ({"weights": "nowhere/weights.pth"}, "nowhere/weights.pth.*possible: hub, pretrain, random"),
    ],
)
def test_what_does_not_exist_is_an_error_of_one_line(changes, words):
    with pytest.raises(HasteError, match=words) as caught:
        build_teacher(settings(*PLAIN).model_copy(update=changes))
    assert "\n" not in str(caught.value)


def test_hub_weights_that_cannot_be_reached_point_to_local_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HasteError, match="local checkpoint") as caught:
        make(weights="hub")
    assert "\n" not in str(caught.value)


def test_random_weights_come_from_the_teachers_own_seed():
    torch.manual_seed(1)
    first = make()
    torch.manual_seed(2)
    again, other = make(), make(fitting=config.Fitting(seed=1))
    weights = [t.encoder.blocks[0].attn.qkv.weight for t in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("beit_base_patch16_224", VIT),  # a bias on the logits, which q and k do not hold
        ("vit_tiny_patch16_224", VIT | {"attn_layer": "diff"}),  # the difference of two maps
        (
            "vit_base_patch16_sapiens2",
            {"patch_size": 4, "embed_dim": 96, "num_kv_heads": 6},
        ),  # fewer key heads than query heads
    ],
)
@torch.no_grad()
def test_attention_that_is_no_plain_softmax_of_q_and_k_is_refused_or_read_rightly(randomise, model, kwargs):
    blocks = (1, 6) if "sapiens2" in model else (1,)
    try:
        teacher = build_teacher(settings(model, kwargs))
        randomise(teacher.encoder, std=0.2)
        seen = teacher(images(), blocks)
    except HasteError as error:
        assert "attention" in str(error)  # noqa: PT017 (either outcome is right)
        return
    maps, _ = unfused_maps(teacher.encoder, teacher.prepare(images()))
    prefix = teacher.encoder.num_prefix_tokens
    for block, (q, k) in seen.qk.items():
        own = maps[block][:, :, prefix:, prefix:]
        read = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        assert_close(read, own / own.sum(-1, keepdim=True), **TOLERANCE)


def test_a_grey_teacher_needs_no_mean_of_its_own_or_says_so():
    kwargs = VIT | {"in_chans": 1}
    try:
        teacher = build_teacher(settings("vit_tiny_patch16_224", kwargs))
        tokens = teacher(images(channels=1)).tokens
    except HasteError as error:
        assert "mean" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert tokens.shape == (2, 16, 32)


# Low-pass input


def waves(size, fy, fx):
    """A plane wave of fy by fx cycles per image, (1, 1, size, size)."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (2 * torch.pi * (fy * y + fx * x) / size).cos()[None, None]


@pytest.mark.parametrize(("fy", "fx", "kept"), [(0, 0, True), (2, 0, True), (0, 4, True), (3, 3, False), (5, 0, False)])
def test_a_low_pass_keeps_what_is_inside_a_circle_and_nothing_else(fy, fx, kept):
    # Nyquist of 16 pixels is 8 cycles, so half of it is a radius of 4.
    image = waves(16, fy, fx)
    expected = image if kept else torch.zeros_like(image)
    assert_close(low_passed(image, 0.5), expected, atol=1e-5, rtol=0)


def test_without_a_cut_off_images_stay_as_they_are():
    image = torch.randn(2, 3, 8, 8)
    assert low_passed(image, None) is image


def test_a_low_pass_is_a_projection_that_keeps_the_mean():
    image = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    once = low_passed(image, 0.6)
    assert_close(low_passed(once, 0.6), once, atol=1e-5, rtol=0)
    assert_close(once.mean((2, 3)), image.mean((2, 3)), atol=1e-6, rtol=0)


def test_a_low_passed_teacher_sees_less_through_the_same_weights(tiny):
    low = tiny.teacher.model_copy(update={"low_pass": 0.25})
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert tiny.teacher_hash(low) == tiny.teacher_hash(tiny.teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = build_teacher(tiny.teacher)
        blurred = build_teacher(low, plain.encoder.state_dict())
    assert blurred(images).tokens.equal(plain(low_passed(images, 0.25)).tokens)
    assert not blurred(images).tokens.equal(plain(images).tokens)


def test_tokens_after_a_block_are_what_the_final_norm_makes_the_output_of(tiny):
    teacher = build_teacher(tiny.teacher)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = teacher.block_tokens(images, [3, 1])
    assert sorted(found) == [1, 3]
    assert_close(teacher.encoder.norm(found[3]), teacher(images).tokens)


# -- precision --------------------------------------------------------------------------------------------------------


class Noise:
    """Training images for the check of a teacher's precision."""

    def examples(self, split, count=None, with_images=True):
        x = images(count or 8)
        return Batch(x, torch.zeros(len(x), dtype=torch.int64), x)


@pytest.mark.parametrize(("own", "around", "expected"), [
    (None, None, torch.float32), (None, "bf16", torch.bfloat16), ("no", "bf16", torch.float32),
    ("bf16", None, torch.bfloat16), ("bf16", "bf16", torch.bfloat16),
])  # fmt: skip
def test_a_teacher_keeps_its_own_precision_whatever_the_runs(randomise, own, around, expected):
    teacher = make(precision=own)
    randomise(teacher.encoder)
    exact = make()
    exact.encoder.load_state_dict(teacher.encoder.state_dict())
    with in_precision(around or "no", torch.device("cpu")):
        q, k = teacher(images(), (1,)).qk[1]
    assert q.dtype == k.dtype == expected
    if expected == torch.float32:
        assert torch.equal(q, exact(images(), (1,)).qk[1][0])


def test_a_teacher_in_half_precision_is_still_the_teacher(randomise):
    teacher = make()
    randomise(teacher.encoder)
    assert teacher.cosine_to_float32(images(4), (0, 1), "no") == pytest.approx(1, abs=1e-12)
    assert 0.999 < teacher.cosine_to_float32(images(4), (0, 1), "bf16") < 1
    assert teacher.precision is None
    check_precision(teacher, Noise(), (0, 1), "bf16")


def test_a_teacher_that_half_precision_changes_is_refused(randomise, monkeypatch):
    teacher = make(precision="bf16")
    randomise(teacher.encoder)
    monkeypatch.setattr("haste_core.study.pretrain.LEAST_COSINE", 1.0)
    with pytest.raises(
        HasteError, match=r"teacher in bf16 has a cosine of (0\.99\d+|1\.0+) .* set teacher.precision=no"
    ):
        check_precision(teacher, Noise(), (1,), "no")
    teacher.precision = "no"
    check_precision(teacher, Noise(), (1,), "bf16")


def test_half_precision_of_an_encoder_that_overflows_is_refused(randomise):
    teacher = make(precision="fp16")
    randomise(teacher.encoder)
    teacher.encoder.patch_embed.proj.weight.data *= 1e6
    with pytest.raises(HasteError, match="cosine of nan"):
        check_precision(teacher, Noise(), (), "no")


def test_a_precision_that_is_not_given_leaves_every_hash_as_it_was(make_study):
    """Runs that were made before there was such a setting keep their names."""
    assert "precision" not in make_study().teacher.model_dump(mode="json")
    own, other = make_study(), make_study("teacher.precision=bf16")
    assert own.run("haste").hash != other.run("haste").hash
    assert own.run("vanilla").hash == other.run("vanilla").hash
    assert own.teacher_hash(own.teacher) == other.teacher_hash(other.teacher)
    assert make_study("teacher.precision=no").teacher.precision == "no"
