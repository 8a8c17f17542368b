"""The public families of teachers: what they look like, what they are fed, and where their weights come from."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.testing import assert_close

from haste_core import encoders
from haste_core.encoders import get_pretrained_cfg
from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.pretrain import build_teacher
from haste_core.teacher import check_plain_attention, read_qk

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# name: kwargs, parameters in millions, width, blocks, heads, pixels, side of the grid, prefix tokens, (mean, std)
REAL = {
    "vit_small_patch14_dinov2.lvd142m": ({"img_size": 224}, 21.6, 384, 12, 6, 224, 16, 1, IMAGENET),
    "vit_base_patch14_dinov2.lvd142m": ({"img_size": 224}, 85.7, 768, 12, 12, 224, 16, 1, IMAGENET),
    "vit_base_patch14_reg4_dinov2.lvd142m": ({"img_size": 224}, 85.7, 768, 12, 12, 224, 16, 5, IMAGENET),
    "vit_large_patch14_dinov2.lvd142m": ({}, 304.4, 1024, 24, 16, 518, 37, 1, IMAGENET),
    "vit_base_patch16_dinov3.lvd1689m": ({}, 85.6, 768, 12, 12, 256, 16, 5, IMAGENET),
    "vit_base_patch16_clip_224.openai": ({}, 85.8, 768, 12, 12, 224, 14, 1, CLIP),
    "vit_base_patch16_siglip_224.webli": ({}, 92.9, 768, 12, 12, 224, 14, 0, HALF),
    "vit_base_patch16_siglip_224.v2_webli": ({}, 92.9, 768, 12, 12, 224, 14, 0, HALF),
    "vit_base_patch16_224.mae": ({}, 85.8, 768, 12, 12, 224, 14, 1, IMAGENET),
    "vit_huge_patch14_gap_224.in1k_ijepa": ({}, 630.8, 1280, 32, 16, 224, 16, 0, IMAGENET),
    "vit_huge_patch14_gap_224.in22k_ijepa": ({}, 630.8, 1280, 32, 16, 224, 16, 0, IMAGENET),
}
# The same families at full depth, two narrow heads wide: name and patch.
FAMILIES = {
    "dinov2": ("vit_base_patch14_dinov2.lvd142m", 14),
    "dinov2-registers": ("vit_base_patch14_reg4_dinov2.lvd142m", 14),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2.lvd142m", 14),
    "dinov3": ("vit_base_patch16_dinov3.lvd1689m", 16),
    "dinov3-bias": ("vit_base_patch16_dinov3_qkvb.lvd1689m", 16),
    "clip": ("vit_base_patch16_clip_224.openai", 16),
    "siglip": ("vit_base_patch16_siglip_224.webli", 16),
    "siglip2": ("vit_base_patch16_siglip_224.v2_webli", 16),
    "mae": ("vit_base_patch16_224.mae", 16),
    "ijepa": ("vit_huge_patch14_gap_224.in1k_ijepa", 14),
    "perception-encoder": ("vit_pe_spatial_base_patch16_512.fb", 16),
    "aimv2": ("aimv2_large_patch14_224.apple_pt", 14),
}
NARROW = {"embed_dim": 32, "num_heads": 2}
DINOV2 = FAMILIES["dinov2"][0]


def settings(model, weights="random", **kwargs):
    return config.Teacher(model=model, kwargs=kwargs, weights=str(weights))


def narrow(family, rows=3, columns=3, **changes):
    model, patch = FAMILIES[family]
    return build_teacher(settings(model, img_size=[rows * patch, columns * patch], **NARROW | changes))


def pictures(teacher, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, *teacher.image_size, generator=generator) * 2 - 1


def own_maps(teacher, images, blocks):
    """Attention (B, H, N, N) of all tokens in some blocks, from timm's own unfused path."""
    maps, handles = {}, []
    for i in blocks:
        attn = teacher.encoder.blocks[i].attn
        attn.fused_attn = False
        handles.append(attn.attn_drop.register_forward_pre_hook(lambda _m, args, i=i: maps.update({i: args[0]})))
    teacher(images)
    for handle in handles:
        handle.remove()
    return maps


# -- what they look like ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_published_encoders_at_their_real_size(name):
    kwargs, millions, width, blocks, heads, pixels, side, prefix, (mean, std) = REAL[name]
    with torch.device("meta"):
        teacher = build_teacher(settings(name, **kwargs))
    assert sum(p.numel() for p in teacher.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert (teacher.width, teacher.blocks, teacher.heads) == (width, blocks, heads)
    assert (teacher.image_size, teacher.grid) == ((pixels, pixels), (side, side))
    assert teacher.encoder.num_prefix_tokens == prefix
    cfg = teacher.encoder.pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["interpolation"]) == (mean, std, "bicubic")
    for block in teacher.encoder.blocks:
        check_plain_attention(block.attn)


@pytest.mark.parametrize("extra", [{}, {"dynamic_img_size": True}], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("grid", [(3, 3), (2, 4)], ids=["square", "wide"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_q_and_k_of_every_family_are_those_of_its_own_attention(randomise, family, grid, extra):
    teacher = narrow(family, *grid, **extra)
    randomise(teacher.encoder, std=0.3)
    blocks = (0, teacher.blocks // 2, teacher.blocks - 1)
    images, prefix = pictures(teacher), teacher.encoder.num_prefix_tokens
    seen, maps = teacher(images, blocks), own_maps(teacher, images, blocks)
    assert teacher.grid == grid
    assert seen.tokens.shape == (2, grid[0] * grid[1], 32)
    for block in blocks:
        q, k = seen.qk[block]
        own = maps[block][:, :, prefix:, prefix:]
        assert own.shape[-1] == grid[0] * grid[1]
        found = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        assert_close(found, own / own.sum(-1, keepdim=True), atol=1e-4, rtol=1e-3)
        assert own.std() > 1e-3


@pytest.mark.parametrize("family", ["dinov2", "dinov2-registers", "dinov3", "clip", "siglip", "mae", "ijepa"])
@torch.no_grad()
def test_patch_tokens_follow_their_patch(randomise, family):
    """A change within one patch moves that patch's token most, so prefix tokens are cut and rows come first."""
    teacher = randomise(narrow(family, 2, 4), std=0.05)
    images = pictures(teacher, batch=1)
    changed, patch = images.clone(), FAMILIES[family][1]
    changed[:, :, patch : 2 * patch, 2 * patch : 3 * patch] *= -1  # row 1, column 2
    moved = (teacher(images).tokens - teacher(changed).tokens).norm(dim=-1)
    assert int(moved.argmax()) == 1 * 4 + 2


def test_dinov2_at_its_default_size_has_a_grid_of_37():
    with torch.device("meta"):
        assert build_teacher(settings(DINOV2)).grid == (37, 37)


# -- attention that must not be read ----------------------------------------------------------------------------------


def test_an_attention_with_another_scale_is_refused():
    teacher = narrow("clip")
    teacher.encoder.blocks[1].attn.scale *= 2
    teacher(pictures(teacher), (0,))
    with pytest.raises(HasteError, match=r"scaled by 0.5 instead of 1 / sqrt\(16\)"):
        teacher(pictures(teacher), (1,))


def test_an_attention_derived_from_a_known_one_is_refused():
    attn = narrow("dinov2").encoder.blocks[0].attn
    attn.__class__ = type("Sigmoid", (type(attn),), {})
    with pytest.raises(HasteError, match="kind Sigmoid"):
        check_plain_attention(attn)


@pytest.mark.parametrize("given", [{"attn_mask": torch.zeros(10, 10)}, {"is_causal": True}], ids=["mask", "causal"])
@torch.no_grad()
def test_a_masked_attention_is_refused(given):
    encoder = narrow("mae").encoder
    with pytest.raises(HasteError, match="block 1 is masked"), read_qk(encoder, (1,)):
        encoder.blocks[1].attn(torch.zeros(1, 10, 32), **given)


# -- what they are fed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "white"),
    [
        ("dinov2", (2.2489, 2.4286, 2.64)),
        ("dinov3", (2.2489, 2.4286, 2.64)),
        ("clip", (1.9303, 2.0749, 2.1459)),
        ("siglip", (1.0, 1.0, 1.0)),
    ],
)
def test_white_is_what_the_family_was_trained_to_see_as_white(family, white):
    teacher = narrow(family)
    prepared = teacher.prepare(torch.ones(1, 3, 8, 8))
    assert_close(prepared.mean((0, 2, 3)), torch.tensor(white), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("model", "resize", "mode", "antialias"),
    [
        ("vit_base_patch16_clip_224.openai", "antialias", "bicubic", True),
        ("vit_base_patch16_224_miil", "antialias", "bilinear", True),
        ("vit_base_patch16_224_miil", "reference", "bicubic", False),
    ],
)
def test_images_are_resized_as_the_encoder_was_trained_or_as_the_reference_does(model, resize, mode, antialias):
    chosen = settings(model, img_size=32, depth=1, **NARROW).model_copy(update={"resize": resize})
    teacher = build_teacher(chosen)
    assert get_pretrained_cfg(model).interpolation == (mode if resize == "antialias" else "bilinear")
    x = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    normalised = ((x + 1) / 2 - teacher.mean) / teacher.std
    expected = F.interpolate(normalised, (32, 32), mode=mode, antialias=antialias)
    assert_close(teacher.prepare(x), expected)


# -- local weights ----------------------------------------------------------------------------------------------------

SMALL = {"depth": 2, **NARROW}


def state_of(randomise, family, grid=3):
    return randomise(narrow(family, grid, grid, depth=2).encoder).state_dict()


LAYOUTS = {
    "as timm names them": ("clip", lambda s: s),
    "with class scores": ("clip", lambda s: s | {"head.weight": torch.ones(512, 32), "head.bias": torch.ones(512)}),
    "DINOv2's own": ("dinov2", lambda s: s | {"mask_token": torch.zeros(1, 32)}),
    "MAE's own": ("mae", lambda s: {"model": s}),
    "open_clip's of SigLIP": ("siglip", lambda s: {f"visual.trunk.{k}": v for k, v in s.items()}),
    "I-JEPA's own": ("ijepa", lambda s: {"encoder": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}),
    "DINOv3 of timm": ("dinov3", lambda s: s),
}


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pth.tar"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_are_read_in_the_layouts_they_are_published_in(tmp_path, randomise, layout, suffix):
    family, wrap = LAYOUTS[layout]
    state, path = state_of(randomise, family), tmp_path / f"weights{suffix}"
    torch.save(wrap(dict(state)), path)
    model, patch = FAMILIES[family]
    loaded = build_teacher(settings(model, path, img_size=3 * patch, **SMALL)).encoder.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("family", ["dinov2", "clip", "siglip"])
def test_positions_are_resized_to_another_input_size(tmp_path, randomise, family):
    state, path = state_of(randomise, family, grid=4), tmp_path / "weights.safetensors"
    save_file(state, path)
    model, patch = FAMILIES[family]
    teacher = build_teacher(settings(model, path, img_size=2 * patch, **SMALL))
    assert teacher.grid == (2, 2)
    loaded = teacher.encoder.state_dict()
    assert loaded["pos_embed"].shape[1] == 4 + (state["pos_embed"].shape[1] - 16)
    assert all(torch.equal(loaded[key], state[key]) for key in state if key != "pos_embed")


@pytest.mark.parametrize("lacking", ["norm.weight", "blocks.1.norm2.bias", "blocks.0.attn.qkv.bias", "cls_token"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_even_where_its_initial_value_is_fixed(tmp_path, lacking):
    kwargs = {"patch_size": 4, "img_size": 16, **SMALL}
    state = build_teacher(settings("vit_tiny_patch16_224", **kwargs)).encoder.state_dict()
    path = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in state.items() if k != lacking}, path)
    with pytest.raises(HasteError, match=lacking) as caught:
        build_teacher(settings("vit_tiny_patch16_224", path, **kwargs))
    assert "\n" not in str(caught.value)


def test_weights_of_another_size_are_an_error_of_one_short_line(tmp_path, randomise):
    path = tmp_path / "weights.safetensors"
    save_file(state_of(randomise, "dinov2"), path)
    with pytest.raises(HasteError, match="size mismatch") as caught:
        build_teacher(settings(DINOV2, path, img_size=42, depth=2, embed_dim=48, num_heads=2))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


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


@pytest.mark.parametrize(("name", "write"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_published_weights_are_downloaded_once(tmp_path, randomise, online, name, write):
    state, path = state_of(randomise, "dinov2"), tmp_path / name
    write(state, path)
    chosen = settings(DINOV2, "hub", img_size=42, **SMALL)
    with serving({name: path}) as url:
        online(url)
        loaded = build_teacher(chosen).encoder.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    again = build_teacher(chosen).encoder.state_dict()  # the server is gone
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_weights_published_at_a_plain_address_are_downloaded_once(tmp_path, randomise, online, monkeypatch):
    state, path = state_of(randomise, "ijepa"), tmp_path / "ijepa.pth.tar"
    torch.save({"encoder": {f"module.{k}": v for k, v in state.items()}}, path)
    chosen, cfg = settings(FAMILIES["ijepa"][0], "hub", img_size=42, **SMALL), get_pretrained_cfg(FAMILIES["ijepa"][0])
    with serving({"ijepa.pth.tar": path}) as url:
        online(url)
        cfg.url = f"{url}/ijepa.pth.tar"
        monkeypatch.setattr(encoders, "get_pretrained_cfg", lambda _: cfg)
        loaded = build_teacher(chosen).encoder.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert build_teacher(chosen).encoder.state_dict().keys() == state.keys()  # the server is gone


@pytest.mark.parametrize("family", ["dinov2", "ijepa"])
@pytest.mark.parametrize("reach", ["offline", "refused", "silent"])
def test_without_a_network_the_error_names_the_file_to_download_and_comes_at_once(online, monkeypatch, family, reach):
    monkeypatch.setattr(encoders, "HUB_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes connections, never answers
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if reach == "refused":
            listening.close()
        online(url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", reach == "offline")
        if family == "dinov2":
            expected = f"download model.safetensors of {url}/timm/{DINOV2} "
        else:
            expected = f"download {url}/IN1K-vit.h.14-300e.pth.tar "
            cfg = get_pretrained_cfg(FAMILIES[family][0])
            cfg.url = cfg.url.replace("https://dl.fbaipublicfiles.com/ijepa", url)
            monkeypatch.setattr(encoders, "get_pretrained_cfg", lambda _: cfg)
        start = time.monotonic()
        with pytest.raises(HasteError) as caught:
            build_teacher(settings(FAMILIES[family][0], "hub", **SMALL))
    assert time.monotonic() - start < 5
    assert expected in str(caught.value)
    assert "teacher.weights the path" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("vit_base_patch14_dinov2.no_such_tag", "no_such_tag"),
        ("vit_no_such_model", "no published weights"),
        ("vit_base_patch16_xp_224", "no published weights"),
    ],
)
def test_a_name_under_which_nothing_is_published_is_refused(model, words):
    with pytest.raises(HasteError, match=words):
        build_teacher(settings(model, "hub"))


def test_a_repository_without_weights_is_refused(online):
    with serving({}) as url:
        online(url)
        with pytest.raises(HasteError, match=r"none of model\.safetensors, pytorch_model\.bin"):
            build_teacher(settings(DINOV2, "hub", **SMALL))
