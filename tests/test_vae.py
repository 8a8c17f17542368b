"""The VAE: posteriors, the scale on both sides, and what cannot be loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from haste_core.errors import HasteError
from haste_core.study.latents import vae

pytestmark = pytest.mark.xdist_group("vae")  # diffusers takes seconds to import


def save_vae(folder, **settings):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, **settings,
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def loaded(folder):
    return vae.load(str(folder))


def images(n=5, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_types_and_constants(loaded):
    assert (loaded.scale, loaded.shift, loaded.channels, loaded.factor) == (0.18215, 0.0, 4, 2)
    mean, std = loaded.encode(images())
    assert mean.shape == std.shape == (5, 4, 8, 8)
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    assert float(std.min()) > 0
    decoded = loaded.decode(mean)
    assert decoded.shape == (5, 3, 16, 16)
    assert decoded.dtype == torch.float32
    assert not loaded.model.training


def test_the_posterior_is_that_of_diffusers(loaded):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    x = images()
    with torch.no_grad():
        moments = loaded.model.quant_conv(loaded.model.encoder(x))
    expected = DiagonalGaussianDistribution(moments)
    mean, std = loaded.encode(x)
    assert_close(mean, expected.mode())
    assert_close(std, (moments.chunk(2, dim=1)[1] / 2).exp())
    assert_close(std.square(), expected.var)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_change_nothing(loaded, batch_size):
    x = images()
    assert_close(loaded.encode(x, batch_size), loaded.encode(x), atol=1e-5, rtol=1e-5)
    latents = loaded.encode(x).mean * 0.18215
    assert_close(loaded.decode(latents, batch_size), loaded.decode(latents), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (1.5305, 0.0609)])
def test_scale_and_shift_are_undone_exactly_once(tmp_path, scale, shift):
    ours = vae.load(str(save_vae(tmp_path, scaling_factor=scale, shift_factor=shift)))
    assert (ours.scale, ours.shift) == (scale, shift or 0.0)
    mean, _ = ours.encode(images())
    with torch.no_grad():
        straight = ours.model.decode(mean, return_dict=False)[0].clamp(-1, 1)
        unscaled = ours.model.decode((mean - ours.shift) * scale, return_dict=False)[0].clamp(-1, 1)
    assert_close(ours.decode((mean - ours.shift) * scale), straight, atol=1e-5, rtol=0)
    assert not torch.allclose(unscaled, straight, atol=1e-2), "a decoder that ignored the scale would pass otherwise"


def test_decoded_images_stay_in_range(loaded):
    decoded = loaded.decode(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 1000)
    assert float(decoded.abs().max()) == 1.0


def test_wrong_shapes_are_refused(loaded):
    with pytest.raises(HasteError, match="multiples of 2, these are 15x15"):
        loaded.encode(images(size=15))
    with pytest.raises(HasteError, match="latents of 4 channels, these have 3"):
        loaded.decode(torch.zeros(1, 3, 8, 8))


def test_the_fingerprint_is_of_the_weights(folder, loaded, tmp_path):
    assert vae.load(str(folder), fingerprint=loaded.fingerprint).fingerprint == loaded.fingerprint
    save_vae(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"][0] += 1
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(HasteError, match=f"expected are {loaded.fingerprint}"):
        vae.load(str(tmp_path), fingerprint=loaded.fingerprint)


def test_half_precision_files_compute_in_float32(folder, tmp_path, loaded):
    save_vae(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    half = vae.load(str(tmp_path))
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert_close(half.encode(images()).mean, loaded.encode(images()).mean, atol=1e-2, rtol=1e-2)


def test_old_names_of_attention_weights_are_understood(folder, tmp_path, loaded):
    """The published sd-vae-ft files call them query, key, value and proj_attn."""
    save_vae(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, value in load_file(path).items():
        for new, former in old.items():
            name = name.replace(new, former)
        weights[name] = value
    assert sum(".query." in name for name in weights) == 4
    save_file(weights, path)
    assert vae.load(str(tmp_path)).fingerprint == loaded.fingerprint


def damaged(folder, how):
    save_vae(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    settings = folder / "config.json"
    if how == "no weights":
        weights.unlink()
    elif how == "pickle only":
        weights.unlink()
        torch.save({}, folder / "diffusion_pytorch_model.bin")
    elif how == "no config":
        settings.unlink()
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "missing tensors":
        save_file({n: v for n, v in load_file(weights).items() if "conv_in" not in n}, weights)
    elif how == "other shapes":
        content = json.loads(settings.read_text()) | {"latent_channels": 8}
        settings.write_text(json.dumps(content))
    elif how == "normalised per channel":
        content = json.loads(settings.read_text()) | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        settings.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "has no diffusion_pytorch_model.safetensors"),
        ("pickle only", "has no diffusion_pytorch_model.safetensors"),
        ("no config", "has no config.json"),
        ("cut short", "cannot be loaded"),
        ("missing tensors", "no weights for 4 tensors"),
        ("other shapes", "cannot be loaded"),
        ("normalised per channel", "normalises latents per channel"),
    ],
)
def test_unusable_folders_are_one_line(tmp_path, how, message):
    with pytest.raises(HasteError, match=message) as caught:
        vae.load(str(damaged(tmp_path, how)))
    assert "\n" not in str(caught.value)


def test_a_hub_name_without_network_says_what_to_download():
    with pytest.raises(HasteError, match=r"download config.json and diffusion_pytorch_model.safetensors") as caught:
        vae.load("nobody/no-such-vae")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./vae", "../x/vae", "a/b/c"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(name):
    with pytest.raises(HasteError, match="is no folder"):
        vae.load(name)


def test_diffusers_imports_in_a_fresh_process():
    """With torch's CPU build torchvision's compiled part does not load; diffusers must import all the same."""
    done = subprocess.run(
        [sys.executable, "-c", "import haste_core.study.latents.vae; print('fine')"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "fine\n", done.stderr
