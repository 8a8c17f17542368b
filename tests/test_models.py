"""Generators derived a second time: parts by plain loops, joint blocks by brute force, initialisation, and seeds."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from haste_core.errors import HasteError
from haste_core.models import SIZES, build
from haste_core.study import config
from haste_core.study.text import Contexts, write_parts
from haste_core.taps import Taps, tap, tapped

SMALL = {"image_size": 8, "channels": 3, "classes": 5, "depth": 3, "width": 16, "heads": 4, "patch": 2}
JOINT = SMALL | {"classes": 4, "heads": 2, "context_width": 6}


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(kind="sit", batch=2, length=5):
    """x, t, and labels or text tokens."""
    y = draws(batch, length, 6, seed=1) if kind == "mmdit" else torch.arange(batch) % 5
    return draws(batch, 3, 8, 8), torch.linspace(0.1, 0.9, batch), y


def small(kind="sit", **changes):
    return build(kind, 0, **(JOINT if kind == "mmdit" else SMALL) | changes)


# -- joint blocks of text and image -----------------------------------------------------------------------------------


def test_q_and_k_of_an_mmdit_are_those_of_image_tokens_for_text_of_any_length(randomise):
    model = randomise(small("mmdit"))
    x, t, _ = inputs("mmdit")
    found = [tapped(model, x, t, draws(2, n, 6), Taps(blocks=(0, 1, 2))) for n in (1, 5, 77)]
    for one in found:
        assert one.output.isfinite().all()
        assert [part.shape for pair in one.qk.values() for part in pair] == [(2, 2, 16, 8)] * 6
    assert all(torch.equal(found[0].qk[0][i], one.qk[0][i]) for one in found for i in range(2))  # before any exchange
    assert not torch.equal(found[0].qk[1][0], found[1].qk[1][0])
    alone = model(x[:1], t[:1], draws(2, 77, 6)[:1])
    assert_close(alone, found[2].output[:1], atol=1e-5, rtol=1e-4)


# -- whole generators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sit", "dit", "mmdit"])
def test_at_initialisation_the_output_is_zero_and_blocks_are_the_identity(kind):
    model, (x, t, y) = small(kind), inputs(kind)
    found = tapped(model, x, t, y, Taps(depths=(1, 2, 3)))
    assert torch.equal(found.output, torch.zeros(2, 6 if kind == "dit" else 3, 8, 8))
    for tokens in found.tokens.values():
        assert torch.equal(tokens, model.x_embedder(x) + model.pos_embed)


@pytest.mark.parametrize(("kind", "changes"), [("sit", {}), ("sit", {"qk_norm": True}), ("dit", {}), ("mmdit", {})])
def test_reading_changes_no_number_and_leaves_no_hook(randomise, kind, changes):
    model, given = randomise(small(kind, **changes)), inputs(kind)
    plain = model(*given)
    assert plain.abs().max() > 0
    for taps in (Taps(), Taps(depths=(2,)), Taps(blocks=(0, 2)), Taps(depths=(1, 3), blocks=(0, 1, 2))):
        with tap(model.blocks, taps) as seen:
            assert torch.equal(model(*given), plain)
        assert (tuple(seen.tokens), tuple(seen.qk)) == (taps.depths, taps.blocks)
        assert all(q.shape == k.shape == (2, model.heads, 16, 16 // model.heads) for q, k in seen.qk.values())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["sit", "dit", "mmdit"])
def test_gradients_reach_every_parameter_and_activation_checkpointing_changes_none(randomise, kind):
    model, gradients = randomise(small(kind)), []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        found = tapped(model, *inputs(kind, batch=5), Taps(depths=(2,), blocks=(1,)))
        loss = found.output.square().sum() + found.tokens[2].square().sum() + (found.qk[1][0] * found.qk[1][1]).sum()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradients[1][name], gradient), name


def test_null_label_is_the_last_row_of_the_class_table(randomise):
    model = randomise(small())
    x, t, _ = inputs()
    table, null = model.y_embedder.embedding_table.weight, torch.full((2,), model.null_label)
    before = model(x, t, null)
    with torch.no_grad():
        table[:5] += 1
        assert torch.equal(model(x, t, null), before)
        table[5] += 1
        assert not torch.equal(model(x, t, null), before)


@pytest.fixture
def table(tmp_path):
    write_parts(tmp_path / "contexts.safetensors", [draws(4, 5, 6, seed=7), draws(1, 5, 6, seed=8)], 5)
    return Contexts(tmp_path / "contexts.safetensors")


def test_caption_indices_stand_for_their_text_tokens_and_the_last_for_the_empty_caption(randomise, table):
    assert (table.captions, table.length, table.width) == (4, 5, 6)
    model = randomise(small("mmdit", contexts=table))
    x, t, _ = inputs("mmdit")
    captions = draws(4, 5, 6, seed=7)
    assert torch.equal(model(x, t, torch.tensor([3, 1])), model(x, t, captions[[3, 1]]))
    null = torch.full((2,), model.null_label)
    assert torch.equal(model(x, t, null), model(x, t, draws(5, 6, seed=8).expand(2, 5, 6)))
    with pytest.raises(HasteError, match=r"no table of text tokens; expected data\.contexts"):
        small("mmdit")(x, t, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675), ("MMDiT-12/2", None), ("MMDiT-24/2", None)],
)
def test_presets_have_the_published_sizes(preset, millions):
    chosen = config.ModelSettings(preset=preset)
    sizes = chosen.model_dump(include={"depth", "width", "heads", "patch"})
    with torch.device("meta"):
        model = build(chosen.kind, 0, image_size=32, channels=4, classes=1000, **sizes)
    if millions is None:  # width 32 and one head for each block
        depth = int(preset[6:8])
        assert (len(model.blocks), model.heads, model.x_embedder.proj.out_channels) == (depth, depth, 32 * depth)
        assert model.context_embedder.in_features == chosen.context_width == 768
        return
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    assert (len(model.blocks), model.x_embedder.proj.out_channels, model.heads) == SIZES[preset[4:-2]]


@pytest.mark.parametrize("kind", ["sit", "mmdit"])
def test_weights_come_from_the_seed_alone(kind, table):
    first = small(kind).state_dict()
    torch.manual_seed(9)
    again = small(kind, **{"contexts": table} if kind == "mmdit" else {}).state_dict()  # a table is no weight
    other = build(kind, 1, **JOINT if kind == "mmdit" else SMALL).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["x_embedder.proj.weight"], other["x_embedder.proj.weight"])


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(HasteError, match=r"unknown kind of generator 'sat' .did you mean 'sit'.*sit, dit, mmdit"):
        build("sat", 0, **SMALL)
