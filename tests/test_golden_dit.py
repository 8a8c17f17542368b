"""DiT's forward pass, loss and posterior against numbers of the reference implementation (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from haste_core import ddpm
from haste_core.models import DiT
from haste_core.paths import objective_of
from haste_core.released import load_reference
from haste_core.released_layout import KINDS
from haste_core.taps import Taps

FILE = Path(__file__).parent / "golden" / "dit_a.safetensors"
EXACT = {"atol": 2e-5, "rtol": 1e-4}
SIZES = {"image_size": 32, "channels": 4, "classes": 1000, "depth": 6, "width": 48, "heads": 6, "patch": 2}


def fill(name, shape, std):
    drawn = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(drawn.astype(np.float32) * np.float32(std))


def state_dict():
    """The reference's state dict: every tensor by the rule, positions as they are."""
    dit = DiT(**SIZES)
    weights = {name: fill(f"dit-a.{name}", value.shape, 0.06) for name, value in dit.state_dict().items()}
    return weights | {"pos_embed": dit.pos_embed}


@pytest.fixture(scope="module")
def golden():
    return load_file(FILE)


@pytest.fixture(scope="module", params=["built here", "read from a file"])
def model(request, tmp_path_factory):
    if request.param == "built here":
        dit = DiT(**SIZES)
        dit.load_state_dict(state_dict())
        return dit.eval()
    path = tmp_path_factory.mktemp("dit") / "dit.pt"
    torch.save(state_dict(), path)
    generator, projectors = load_reference(path, family="dit", num_heads=6)
    assert len(projectors) == 0
    return generator


def output_at_loss(golden, model):
    """x_t of the loss and the model's output there."""
    x_t = ddpm.Schedule().noised(golden["forward.x"], golden["loss.noise"], golden["forward.t"])
    return x_t, model(x_t, golden["forward.t"], golden["forward.y"])


@torch.no_grad()
def test_forward(golden, model):
    output = model(*(golden[f"forward.{name}"] for name in "xty"))
    assert golden["forward.output"].std() > 0.1
    assert_close(output, golden["forward.output"], **EXACT)


@torch.no_grad()
def test_loss_with_its_two_parts_at_the_first_and_later_timesteps(golden, model):
    assert golden["forward.t"][0] == 0  # the likelihood; the others are Kullback-Leibler divergences
    _, output = output_at_loss(golden, model)
    x, noise, t = golden["forward.x"], golden["loss.noise"], golden["forward.t"]
    losses = ddpm.Schedule().losses(output, x, noise, t)
    for part, name in zip(losses, ("mse", "vb", "total"), strict=True):
        assert_close(part.mean((1, 2, 3)), golden[f"loss.{name}"], **EXACT)
    assert_close(objective_of("dit").loss(output, x, noise, t).mean((1, 2, 3)), golden["loss.total"], **EXACT)


@torch.no_grad()
def test_posterior_without_clipping(golden, model):
    x_t, output = output_at_loss(golden, model)
    assert_close(x_t, golden["posterior.x_t"], **EXACT)
    found = ddpm.Schedule().posterior(output, x_t, golden["forward.t"])
    assert_close(found.mean, golden["posterior.mean"], **EXACT)
    assert_close(found.variance, golden["posterior.variance"], **EXACT)
    assert_close(found.log_variance.exp(), golden["posterior.variance"], **EXACT)
    assert_close(found.clean, golden["posterior.pred_x_start"], **EXACT)


def written_out(weights, x, t, y, heads):
    """The published forward pass from a state dict's names alone, in float64; output and projected tokens."""
    w = {name: value.double() for name, value in weights.items()}
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    patch, width = w["x_embedder.proj.weight"].shape[-1], len(w["x_embedder.proj.weight"])

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normalised(value, eps=1e-6):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def silu(value):
        return value / (1 + (-value).exp())

    def gelu(value):
        return value / 2 * (1 + ((2 / np.pi) ** 0.5 * (value + 0.044715 * value**3)).tanh())

    def modulation(name, count):
        return linear(f"{name}.adaLN_modulation.1", silu(c)).reshape(len(x), count, 1, width).unbind(1)

    B, C, S, _ = x.shape
    side = S // patch
    pieces = x.double().reshape(B, C, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, -1)
    h = pieces @ w["x_embedder.proj.weight"].reshape(width, -1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128).double() / 128)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = c + w["y_embedder.embedding_table.weight"][y]
    tokens = []
    for i in range(depth):
        name, d = f"blocks.{i}", width // heads
        shift, scale, gate, shift_m, scale_m, gate_m = modulation(name, 6)
        q, k, v = linear(f"{name}.attn.qkv", normalised(h) * (1 + scale) + shift).split(width, dim=-1)
        q, k, v = (part.reshape(B, -1, heads, d) for part in (q, k, v))
        if f"{name}.attn.q_norm.weight" in w:
            q = normalised(q, 1e-5) * w[f"{name}.attn.q_norm.weight"] + w[f"{name}.attn.q_norm.bias"]
            k = normalised(k, 1e-5) * w[f"{name}.attn.k_norm.weight"] + w[f"{name}.attn.k_norm.bias"]
        attention = (torch.einsum("bnhd,bmhd->bhnm", q, k) / d**0.5).softmax(-1)
        h = h + gate * linear(f"{name}.attn.proj", torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2))
        hidden = gelu(linear(f"{name}.mlp.fc1", normalised(h) * (1 + scale_m) + shift_m))
        h = h + gate_m * linear(f"{name}.mlp.fc2", hidden)
        tokens.append(h)
    shift, scale = modulation("final_layer", 2)
    out = linear("final_layer.linear", normalised(h) * (1 + scale) + shift).reshape(B, side, side, patch, patch, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, S, S), tokens


@pytest.mark.parametrize("family", ["sit", "dit"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("depth", "width", "heads", "patch", "size", "channels", "batch"),
    [(1, 24, 1, 2, 8, 4, 1), (3, 48, 16, 2, 8, 4, 5), (12, 32, 4, 4, 16, 3, 2), (28, 24, 6, 1, 4, 1, 3)],
)
@torch.no_grad()
def test_any_configuration_equals_the_published_forward_pass(
    randomise, family, qk_norm, depth, width, heads, patch, size, channels, batch
):
    sizes = {"image_size": size, "channels": channels, "classes": 10, "depth": depth, "width": width, "heads": heads}
    made = randomise(KINDS[family](**sizes, patch=patch, qk_norm=qk_norm), seed=depth, std=0.15)
    model = load_reference(made.state_dict(), family, None if qk_norm else heads).generator
    x, y = fill("x", (batch, channels, size, size), 1), torch.arange(batch) * 3 % 11
    t = torch.linspace(0, 999, batch).round() if family == "dit" else torch.linspace(0.05, 0.95, batch)
    tapped = model(x, t, y, Taps(depths=tuple(range(1, depth + 1))))
    output, tokens = written_out(made.state_dict(), x, t, y, heads)
    scale = output.std().item()
    assert scale > 0.1
    assert_close(tapped.output.double(), output, atol=1e-4 * scale, rtol=1e-3)
    for i, expected in enumerate(tokens, start=1):
        assert_close(tapped.tokens[i].double(), expected, atol=1e-4 * expected.std().item(), rtol=1e-3)
