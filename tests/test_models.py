from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from haste_core import models
from haste_core.models import SiT
from haste_core.models.layers import Attention, TimestepEmbedder, sincos_positions, unpatchify
from haste_core.study import config
from haste_core.taps import Taps

SMALL = {"image_size": 8, "channels": 3, "classes": 5, "depth": 3, "width": 16, "heads": 4, "patch": 2}


def inputs(batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 5


def test_velocity_is_exactly_zero_and_blocks_are_the_identity_at_initialisation():
    model = SiT(**SMALL)
    x, t, y = inputs()
    tapped = model(x, t, y, Taps(depths=(1, 2, 3)))
    assert torch.equal(tapped.output, torch.zeros_like(x))
    embedded = model.x_embedder(x) + model.pos_embed
    for tokens in tapped.tokens.values():
        assert torch.equal(tokens, embedded)


@pytest.mark.parametrize(("preset", "millions"), [("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)])
def test_presets_have_the_published_number_of_parameters(preset, millions):
    with torch.device("meta"):
        model = models.build(config.Model(preset=preset), image_size=32, channels=4, classes=1000, seed=0)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(("width", "grid"), [(8, 3), (16, 4), (48, 16)])
def test_positions_equal_a_plain_loop(width, grid):
    quarter = width // 4
    expected = torch.zeros(grid * grid, width)
    for row in range(grid):
        for column in range(grid):
            for j in range(quarter):
                frequency = 10000 ** (-2 * j / (width / 2))
                values = [math.sin(column * frequency), math.cos(column * frequency)]
                values += [math.sin(row * frequency), math.cos(row * frequency)]
                for part, value in enumerate(values):
                    expected[row * grid + column, part * quarter + j] = value
    assert_close(sincos_positions(width, grid), expected)


def test_no_taps_returns_the_tensor_alone(randomise):
    velocity = randomise(SiT(**SMALL))(*inputs())
    assert isinstance(velocity, torch.Tensor)
    assert velocity.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_taps_do_not_change_the_velocity(randomise, qk_norm):
    model = randomise(SiT(**SMALL, qk_norm=qk_norm))
    plain = model(*inputs())
    assert plain.abs().max() > 0
    for taps in (Taps(), Taps(depths=(2,)), Taps(blocks=(0, 2)), Taps(depths=(1, 3), blocks=(0, 1, 2))):
        assert torch.equal(model(*inputs(), taps).output, plain)


def test_taps_hand_out_what_was_asked_for_and_nothing_else(randomise):
    model = randomise(SiT(**SMALL))
    seen = {}
    for depth, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda _m, _i, out, depth=depth: seen.update({depth: out[0]}))
    tapped = model(*inputs(), Taps(depths=(1, 3), blocks=(2,)))
    assert list(tapped.tokens) == [1, 3]
    assert list(tapped.qk) == [2]
    for depth, tokens in tapped.tokens.items():
        assert torch.equal(tokens, seen[depth])
        assert tokens.shape == (4, 16, 16)
    assert [part.shape for part in tapped.qk[2]] == [(4, 4, 16, 4)] * 2


@pytest.mark.parametrize("qk_norm", [False, True])
def test_handed_out_q_and_k_reproduce_the_fused_attention(randomise, qk_norm):
    attention = randomise(Attention(16, 4, qk_norm), std=0.5)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    out, (q, k) = attention(x, hand_out=True)
    v = attention.qkv(x)[..., 32:].reshape(2, 9, 4, 4).transpose(1, 2)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(4), dim=-1)
    by_hand = attention.proj((weights @ v).transpose(1, 2).reshape(2, 9, 16))
    assert weights.std() > 0.01
    assert_close(out, by_hand, atol=1e-5, rtol=1e-4)


def test_attention_hands_out_nothing_unasked():
    assert Attention(16, 4)(torch.zeros(1, 4, 16))[1] is None


def test_null_label_is_the_last_row_of_the_class_table(randomise):
    model = randomise(SiT(**SMALL))
    assert model.null_label == 5
    table = model.y_embedder.embedding_table.weight
    assert table.shape == (6, 16)
    x, t, _ = inputs()
    null = torch.full((4,), model.null_label)
    before = model(x, t, null)
    with torch.no_grad():
        table[:5] += 1
    assert torch.equal(model(x, t, null), before)
    with torch.no_grad():
        table[5] += 1
    assert not torch.equal(model(x, t, null), before)


@pytest.mark.parametrize(("patch", "channels", "side"), [(2, 1, 8), (2, 4, 6), (4, 3, 8), (1, 2, 3)])
def test_unpatchify_inverts_patching(patch, channels, side):
    image = torch.arange(2 * channels * side * side).float().reshape(2, channels, side, side)
    tokens = []
    for row in range(0, side, patch):
        for column in range(0, side, patch):
            piece = image[:, :, row : row + patch, column : column + patch]
            tokens.append(piece.permute(0, 2, 3, 1).reshape(2, -1))  # (row, column, channel)
    assert torch.equal(unpatchify(torch.stack(tokens, 1), patch, channels), image)


def test_patch_embedding_orders_tokens_row_by_row(randomise):
    model = randomise(SiT(**SMALL))
    x, _, _ = inputs(1)
    tokens = model.x_embedder(x)
    weight, bias = model.x_embedder.proj.weight.flatten(1), model.x_embedder.proj.bias
    piece = x[:, :, 2:4, 6:8].flatten(1)  # second row of patches, fourth column
    assert_close(tokens[:, 1 * 4 + 3], piece @ weight.T + bias, atol=1e-6, rtol=1e-5)


def test_time_embedding_takes_t_unscaled_as_cosines_then_sines(randomise):
    embedder = randomise(TimestepEmbedder(8))
    t = torch.tensor([0.0, 0.3, 1.0])
    angles = [[value * 10000 ** (-i / 128) for i in range(128)] for value in t.tolist()]
    features = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles])
    assert_close(embedder(t), embedder.mlp(features), atol=1e-5, rtol=1e-5)


def test_weights_come_from_the_seed_alone():
    settings = config.Model(depth=2, width=16, heads=2)
    sizes = {"image_size": 8, "channels": 1, "classes": 3}
    torch.manual_seed(1)
    first = models.build(settings, seed=4, **sizes).state_dict()
    torch.manual_seed(2)
    again, other = (
        models.build(settings, seed=4, **sizes).state_dict(),
        models.build(settings, seed=5, **sizes).state_dict(),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
