"""MM-DiT: one block by brute force, what it hands out, what of the text matters, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from haste_core import models
from haste_core.errors import HasteError
from haste_core.models import MMDiT
from haste_core.models.layers import sincos_positions
from haste_core.study import config
from haste_core.study.data import contexts
from haste_core.study.data.contexts import Contexts
from haste_core.taps import Taps

SMALL = {
    "image_size": 8, "channels": 3, "classes": 4, "depth": 3, "width": 16, "heads": 2, "patch": 2, "context_width": 6,
}  # fmt: skip


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch=2, length=5):
    x, text = draws(batch, 3, 8, 8), draws(batch, length, 6, seed=1)
    return x, torch.linspace(0.1, 0.9, batch), text


def normalised(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def parts(stream, c, count):
    linear = stream.adaLN_modulation[1]
    return (F.silu(c) @ linear.weight.T + linear.bias).reshape(len(c), count, 1, -1).unbind(1)


def by_hand(block, text, x, c, last):
    """A joint block with loops over samples, heads and queries; also the image tokens' q and k."""
    width, heads = x.shape[-1], 2
    d, pre_only = width // heads, last
    of_text, of_image = parts(block.context_block, c, 2 if pre_only else 6), parts(block.x_block, c, 6)
    qkv = []
    for stream, tokens, (shift, scale, *_) in ((block.context_block, text, of_text), (block.x_block, x, of_image)):
        qkv.append(stream.attn["qkv"](normalised(tokens) * (1 + scale) + shift))
    joint = torch.cat(qkv, dim=1)  # (B, L + N, 3 D), text first
    out = torch.zeros(*joint.shape[:2], width)
    for b in range(len(joint)):
        for head in range(heads):
            q, k, v = (joint[b, :, i * width + head * d : i * width + (head + 1) * d] for i in range(3))
            for n in range(len(q)):
                logits = torch.stack([q[n] @ k[m] for m in range(len(k))]) / math.sqrt(d)
                out[b, n, head * d : (head + 1) * d] = logits.softmax(0) @ v
    updated = []
    halves = out[:, : text.shape[1]], out[:, text.shape[1] :]
    streams = (block.context_block, text, halves[0], of_text), (block.x_block, x, halves[1], of_image)
    for stream, tokens, attended, modulation in streams:
        if len(modulation) == 2:
            updated.append(tokens)
            continue
        _, _, gate_a, shift_m, scale_m, gate_m = modulation
        tokens = tokens + gate_a * stream.attn["proj"](attended)
        hidden = F.gelu(stream.mlp.fc1(normalised(tokens) * (1 + scale_m) + shift_m), approximate="tanh")
        updated.append(tokens + gate_m * stream.mlp.fc2(hidden))
    q, k = (qkv[1][..., i * width : (i + 1) * width].unflatten(-1, (heads, d)).transpose(1, 2) for i in range(2))
    return updated[0], updated[1], q, k


@pytest.mark.parametrize("index", [0, 1, 2])
@torch.no_grad()
def test_a_block_equals_brute_force(randomise, index):
    model = randomise(MMDiT(**SMALL), std=0.3)
    text, x, c = draws(2, 5, 16), draws(2, 16, 16, seed=1), draws(2, 16, seed=2)
    found = model.joint_blocks[index](text, x, c, hand_out=True)
    expected = by_hand(model.joint_blocks[index], text, x, c, last=index == 2)
    assert (found[1] - x).abs().max() > 0.5
    assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
    assert_close(found[1], expected[1], atol=1e-5, rtol=1e-4)
    assert_close(found[2][0], expected[2], atol=1e-5, rtol=1e-4)
    assert_close(found[2][1], expected[3], atol=1e-5, rtol=1e-4)
    assert model.joint_blocks[index](text, x, c, hand_out=False)[2] is None


@torch.no_grad()
def test_the_whole_model_is_its_blocks_between_embeddings_and_last_layer(randomise):
    model = randomise(MMDiT(**SMALL), std=0.3)
    x, t, y = inputs()
    tapped = model(x, t, y, Taps(depths=(1, 2, 3), blocks=(0, 2)))
    text, h = model.context_embedder(y), model.x_embedder(x) + sincos_positions(16, 4)
    c = model.t_embedder(t)
    for i, block in enumerate(model.joint_blocks):
        text, h, q, k = by_hand(block, text, h, c, last=i == 2)
        assert_close(tapped.tokens[i + 1], h, atol=1e-4, rtol=1e-3)
        if i in (0, 2):
            assert_close(tapped.qk[i], (q, k), atol=1e-4, rtol=1e-3)
    assert list(tapped.qk) == [0, 2]
    assert torch.equal(model(x, t, y), tapped.output)
    shift, scale = parts(model.final_layer, c, 2)
    patches = model.final_layer.linear(normalised(h) * (1 + scale) + shift)
    for token in range(16):
        row, column = 2 * (token // 4), 2 * (token % 4)
        piece = patches[:, token].reshape(2, 2, 2, 3).permute(0, 3, 1, 2)
        assert_close(tapped.output[:, :, row : row + 2, column : column + 2], piece, atol=1e-4, rtol=1e-3)


def test_q_and_k_belong_to_image_tokens_and_keep_their_shape_for_any_text(randomise):
    model = randomise(MMDiT(**SMALL))
    x, t, _ = inputs()
    first = [model(x, t, draws(2, length, 6), Taps(blocks=(0, 1, 2))).qk for length in (1, 5, 40)]
    for qk in first:
        assert [part.shape for pair in qk.values() for part in pair] == [(2, 2, 16, 8)] * 6
    assert all(torch.equal(first[0][0][i], qk[0][i]) for qk in first for i in range(2))  # before any exchange with text
    assert not torch.equal(first[0][1][0], first[1][1][0])


@pytest.mark.parametrize(("length", "batch"), [(1, 1), (2, 3), (77, 2), (256, 1)])
def test_any_number_of_text_tokens_and_samples(randomise, length, batch):
    model = randomise(MMDiT(**SMALL))
    velocity = model(*inputs(batch, length))
    assert velocity.shape == (batch, 3, 8, 8)
    assert velocity.isfinite().all()
    one = model(*(part[:1] for part in inputs(batch, length)))
    assert_close(one, velocity[:1], atol=1e-5, rtol=1e-4)


def test_text_has_no_positions_and_its_content_matters(randomise):
    model = randomise(MMDiT(**SMALL), std=0.3)
    x, t, text = inputs()
    velocity = model(x, t, text)
    shuffled = text[:, torch.tensor([3, 1, 4, 0, 2])]
    assert_close(model(x, t, shuffled), velocity, atol=1e-4, rtol=1e-3)
    assert (model(x, t, text + 1) - velocity).abs().max() > 1e-2
    assert (model(x, t, text[:, :3]) - velocity).abs().max() > 1e-2


def test_image_tokens_do_have_positions(randomise):
    model = randomise(MMDiT(**SMALL), std=0.3)
    x, t, text = inputs()
    swapped = torch.cat([x[..., 2:4], x[..., :2], x[..., 4:]], dim=-1)
    back = model(swapped, t, text)
    back = torch.cat([back[..., 2:4], back[..., :2], back[..., 4:]], dim=-1)
    assert (back - model(x, t, text)).abs().max() > 1e-2


def test_the_last_block_has_no_text_side_beyond_the_attention():
    model = MMDiT(**SMALL)
    own = {n for n, _ in model.joint_blocks[-1].context_block.named_parameters()}
    assert own == {"attn.qkv.weight", "attn.qkv.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias"}
    assert model.joint_blocks[-1].context_block.adaLN_modulation[1].out_features == 2 * 16
    both = {n for n, _ in model.joint_blocks[0].context_block.named_parameters()}
    assert both == {n for n, _ in model.joint_blocks[-1].x_block.named_parameters()}
    assert {"attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.bias"} <= both


def test_names_and_shapes_are_those_of_the_released_layout():
    def stream(name, parts):
        shapes = {"attn.qkv": (48, 16), "adaLN_modulation.1": (16 * parts, 16)}
        if parts == 6:
            shapes |= {"attn.proj": (16, 16), "mlp.fc1": (64, 16), "mlp.fc2": (16, 64)}
        return {f"joint_blocks.{name}.{key}": shape for key, shape in shapes.items()}

    linear = {"t_embedder.mlp.0": (16, 256), "t_embedder.mlp.2": (16, 16), "context_embedder": (16, 6)}
    linear |= {"final_layer.linear": (12, 16), "final_layer.adaLN_modulation.1": (32, 16)}
    for i in range(3):
        linear |= stream(f"{i}.context_block", 2 if i == 2 else 6) | stream(f"{i}.x_block", 6)
    expected = {f"{name}.weight": shape for name, shape in linear.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    expected |= {"x_embedder.proj.weight": (16, 3, 2, 2), "x_embedder.proj.bias": (16,), "pos_embed": (1, 16, 16)}
    found = {name: tuple(value.shape) for name, value in MMDiT(**SMALL).state_dict().items()}
    assert found == expected


def test_velocity_is_exactly_zero_and_blocks_are_the_identity_at_initialisation():
    model = MMDiT(**SMALL)
    x, t, text = inputs()
    tapped = model(x, t, text, Taps(depths=(1, 2, 3)))
    assert torch.equal(tapped.output, torch.zeros_like(x))
    for tokens in tapped.tokens.values():
        assert torch.equal(tokens, model.x_embedder(x) + model.pos_embed)


def test_gradients_reach_every_parameter(randomise):
    model = randomise(MMDiT(**SMALL))
    model(*inputs()).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []


@pytest.mark.parametrize(("preset", "depth"), [("MMDiT-12/2", 12), ("MMDiT-24/2", 24)])
def test_presets_have_width_32_and_one_head_for_each_block(preset, depth):
    with torch.device("meta"):
        model = models.build(config.Model(preset=preset), image_size=32, channels=4, classes=9, seed=0)
    assert (len(model.blocks), model.heads, model.x_embedder.proj.out_channels) == (depth, depth, 32 * depth)
    assert model.context_embedder.in_features == 768


@pytest.fixture
def table(tmp_path):
    contexts.write(tmp_path / "contexts.safetensors", draws(4, 5, 6, seed=7), draws(5, 6, seed=8))
    return Contexts(tmp_path / "contexts.safetensors")


def test_caption_indices_stand_for_their_text_tokens_and_the_last_for_the_empty_caption(randomise, table):
    assert (table.captions, table.length, table.width) == (4, 5, 6)
    model = randomise(MMDiT(**SMALL, contexts=table))
    x, t, _ = inputs()
    captions = draws(4, 5, 6, seed=7)
    assert torch.equal(model(x, t, torch.tensor([3, 1])), model(x, t, captions[[3, 1]]))
    assert model.null_label == 4
    null = torch.full((2,), model.null_label)
    assert torch.equal(model(x, t, null), model(x, t, draws(5, 6, seed=8).expand(2, 5, 6)))
    assert not torch.equal(model(x, t, null), model(x, t, torch.tensor([3, 1])))


def test_indices_without_a_table_are_refused():
    x, t, _ = inputs()
    with pytest.raises(HasteError, match=r"no table of text tokens; possible: data\.contexts"):
        MMDiT(**SMALL)(x, t, torch.tensor([0, 1]))


def test_weights_come_from_the_seed_alone_and_the_table_is_no_weight(table):
    settings = config.Model(kind="mmdit", depth=2, width=16, heads=2, context_width=6)
    sizes = {"image_size": 8, "channels": 3, "classes": 4}
    first = models.build(settings, seed=4, **sizes).state_dict()
    torch.manual_seed(9)
    again = models.build(settings, seed=4, **sizes, contexts=table).state_dict()
    other = models.build(settings, seed=5, **sizes).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["context_embedder.weight"], other["context_embedder.weight"])
