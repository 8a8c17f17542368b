"""Models, losses, posterior and samplers against numbers of the reference implementation (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from haste_core import sampling
from haste_core.alignment import attention_logits, projector
from haste_core.haste import HASTE
from haste_core.models import KINDS, DiT, MMDiT, SiT
from haste_core.paths import DDPMSchedule, interpolate, objective_of, velocity
from haste_core.released import load_reference
from haste_core.taps import Taps, tapped
from haste_core.teacher import TeacherOutput

EXACT = {"atol": 2e-5, "rtol": 1e-4}
LOOSE = {"atol": 1e-3, "rtol": 1e-3}
PAIRS = [(4, 8), (5, 9), (6, 10), (7, 11)]
IMAGE = {"image_size": 32, "channels": 4, "patch": 2}


def fill(name, shape, std):
    drawn = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(drawn.astype(np.float32) * np.float32(std))


def filled(module, prefix, std):
    """A state dict with every tensor by the rule, positions as they are."""
    found = {name: fill(prefix + name, value.shape, std) for name, value in module.state_dict().items()}
    return found | ({"pos_embed": module.pos_embed} if "pos_embed" in found else {})


def golden_of(name):
    return load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")


def loaded(module, weights):
    module.load_state_dict(weights)
    return module.eval()


# -- SiT, HASTE's losses, samplers ------------------------------------------------------------------------------------


class RecordedTeacher(nn.Module):
    """The interface of a teacher of 12 blocks over what the rule gives for its features, q and k."""

    width, heads, blocks, grid, mean = 24, 12, 12, (16, 16), torch.zeros(1)

    def forward(self, images, blocks, similarity=None):
        q, k = (fill(f"sit-a.loss.teacher_{part}", (4, 2, 12, 256, 4), 1) for part in "qk")
        tokens = fill("sit-a.loss.teacher_features", (2, 256, 24), 1)
        return TeacherOutput(tokens, {block: (q[block - 8], k[block - 8]) for block in blocks})


@pytest.fixture(scope="module")
def golden():
    return golden_of("sit_a")


@pytest.fixture
def model():
    sit = SiT(**IMAGE, classes=1000, depth=9, width=48, heads=16)
    return loaded(sit, filled(sit, "sit-a.", 0.06))


@pytest.fixture
def haste(model):
    made = HASTE(RecordedTeacher(), width=48, depth=8, layer_pairs=PAIRS, projector_width=64)
    loaded(made.projector, filled(made.projector, "sit-a.projectors.0.", 0.06))
    return made


@torch.no_grad()
def test_forward_velocity_projected_tokens_and_attention_logits(golden, model, haste):
    x, t, y = (golden[f"forward.{name}"] for name in "xty")
    found = tapped(model, x, t, y, Taps(depths=(8,), blocks=(4,)))
    assert_close(found.output, golden["forward.velocity"], **EXACT)
    assert_close(haste.projector(found.tokens[8]), golden["forward.projected"], **EXACT)
    logits = attention_logits(*found.qk[4])[:, :, :4]
    assert_close(logits, golden["forward.attention_logits_block4_first_query_rows"], **EXACT)


def test_losses_and_gradient_norms(golden, model, haste):
    x, noise, t, y = (golden[f"loss.{name}"] for name in ("x", "noise", "t", "y"))
    with haste.tap(model.blocks) as seen:
        output = model(interpolate(x, noise, t), t, y)
    per_sample = (output - velocity(x, noise)).square().mean((1, 2, 3))
    losses = haste.losses(seen, x)
    total = per_sample.mean() + losses.total
    assert_close(per_sample, golden["loss.denoising_per_sample"], **EXACT)
    assert_close(losses.feature[None], golden["loss.projection"], **EXACT)
    assert_close(losses.attention[None], golden["loss.attention"], **EXACT)
    assert_close(total[None], golden["loss.total"], **EXACT)
    assert_close(haste(seen, x, step=0), losses.total)

    total.backward()
    parameters = dict(model.named_parameters())
    parameters |= {f"projectors.0.{n}": p for n, p in haste.projector.named_parameters()}
    names = [name for name in golden if name.startswith("loss.grad_norm.")]
    assert len(names) == 5
    for name in names:
        norm = parameters[name.removeprefix("loss.grad_norm.")].grad.norm()
        assert_close(norm[None], golden[name], **LOOSE)


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "guidance"),
    [
        ("euler", "euler", 8, {}),
        ("heun", "heun", 5, {}),
        ("euler_cfg", "euler", 8, {"guidance": 2.5, "guidance_low": 0.2, "guidance_high": 0.8}),
        ("sde", "sde", 8, {}),
        ("sde_cfg", "sde", 8, {"guidance": 1.8, "guidance_low": 0.0, "guidance_high": 0.7}),
    ],
)
@torch.no_grad()
def test_samplers(golden, model, name, sampler, steps, guidance):
    sample = sampling.Sampler(sampler=sampler, solver_steps=steps, **guidance)

    def replayed(step, like):
        return fill(f"sit-a.sample.noise{step}", like.shape, 1)

    drift = sampling.guided_by(model, golden["sample.y"], sample)
    drawn = sampling.integrate(drift, golden["sample.latents"], sample, replayed)
    assert_close(drawn.float(), golden[f"sample.{name}"], **LOOSE)


# -- DiT and improved DDPM --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dit_with_its_loss_and_posterior_at_the_first_and_later_timesteps():
    golden, dit = golden_of("dit_a"), DiT(**IMAGE, classes=1000, depth=6, width=48, heads=6)
    loaded(dit, filled(dit, "dit-a.", 0.06))
    x, t, y, noise = (golden[name] for name in ("forward.x", "forward.t", "forward.y", "loss.noise"))
    output = dit(x, t, y)
    assert golden["forward.output"].std() > 0.1
    assert_close(output, golden["forward.output"], **EXACT)

    schedule, objective = DDPMSchedule(), objective_of("dit")
    x_t = objective.noised(x, noise, t)
    assert_close(x_t, golden["posterior.x_t"], **EXACT)
    output = dit(x_t, t, y)
    assert t[0] == 0  # the likelihood; the others are Kullback-Leibler divergences
    for part, name in zip(schedule.losses(output, x, noise, t), ("mse", "vb"), strict=True):
        assert_close(part.mean((1, 2, 3)), golden[f"loss.{name}"], **EXACT)
    assert_close(objective.loss(output, x, noise, t).mean((1, 2, 3)), golden["loss.total"], **EXACT)

    found = schedule.posterior(output, x_t, t)
    assert_close(found.mean, golden["posterior.mean"], **EXACT)
    assert_close(found.log_variance.exp(), golden["posterior.variance"], **EXACT)
    assert_close(found.clean, golden["posterior.pred_x_start"], **EXACT)


# -- MM-DiT -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mmdit_velocity_projected_tokens_and_logits_of_the_image_tokens():
    golden = golden_of("mmdit_a")
    model = MMDiT(**IMAGE, classes=1, depth=4, width=128, heads=4, context_width=768)
    projected = projector(128, 64, 16, seed=0)
    loaded(model, filled(model, "mmdit-a.", 0.05))
    loaded(projected, filled(projected, "mmdit-a.projectors.0.", 0.05))
    context = fill("mmdit-a.forward.context", (2, 77, 768), 1)
    found = tapped(model, golden["forward.x"], golden["forward.t"], context, Taps(depths=(3,), blocks=(1,)))
    assert golden["forward.velocity"].std() > 0.1
    assert_close(found.output, golden["forward.velocity"], **EXACT)
    assert_close(projected(found.tokens[3]), golden["forward.projected"], **EXACT)
    logits = attention_logits(*found.qk[1])[:, :, :4]
    assert_close(logits, golden["forward.image_attention_logits_block1_first_query_rows"], **EXACT)


# -- the published forward pass, written out --------------------------------------------------------------------------


def written_out(weights, x, t, y, heads):
    """The published forward pass from a state dict's names alone, in float64; output and tokens of every block."""
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


@pytest.mark.parametrize(
    ("family", "qk_norm", "depth", "width", "heads", "patch", "size", "channels", "batch"),
    [
        ("sit", False, 3, 48, 16, 2, 8, 4, 5),
        ("sit", True, 28, 24, 6, 1, 4, 1, 3),
        ("dit", True, 12, 32, 4, 4, 16, 3, 2),
    ],
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
    found = tapped(model, x, t, y, Taps(depths=tuple(range(1, depth + 1))))
    output, tokens = written_out(made.state_dict(), x, t, y, heads)
    assert output.std() > 0.1
    for ours, expected in ((found.output, output), *((found.tokens[i], h) for i, h in enumerate(tokens, start=1))):
        assert_close(ours.double(), expected, atol=1e-4 * expected.std().item(), rtol=1e-3)
