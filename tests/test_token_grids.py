"""Resampling of tokens and attention between token grids, and alignment of a student and a teacher that differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from haste_core.alignment import (
    Alignment,
    attention_cross_entropy,
    attention_probabilities,
    feature_loss,
    resample_attention,
    resample_tokens,
)
from haste_core.errors import HasteError
from haste_core.models import SiT
from haste_core.study import config
from haste_core.study.pretrain import build_teacher

GRIDS = [((4, 4), (3, 3)), ((3, 3), (4, 4)), ((2, 5), (4, 3)), ((3, 2), (1, 7)), ((16, 16), (14, 14))]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(tokens, batch=2, heads=3, seed=0):
    return draw(batch, heads, tokens, tokens, seed=seed).softmax(-1)


def line_weights(old, new):
    """Weights (new, old) of linear interpolation along one axis, by the definition of half-pixel centres."""
    weights = torch.zeros(new, old)
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5  # in units of old tokens
        place = min(max(place, 0.0), old - 1.0)
        low = int(place)
        weights[i, low] += 1 - (place - low)
        if place > low:
            weights[i, low + 1] += place - low
    return weights


def grid_weights(grid, new_grid):
    """(N', N): one row of weights over the old tokens for every new token, rows first."""
    return torch.kron(line_weights(grid[0], new_grid[0]), line_weights(grid[1], new_grid[1]))


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "new_grid"), GRIDS)
def test_tokens_are_the_weighted_sums_of_bilinear_interpolation(grid, new_grid):
    tokens = draw(2, grid[0] * grid[1], 6)
    expected = torch.einsum("mn,bnd->bmd", grid_weights(grid, new_grid), tokens)
    assert_close(resample_tokens(tokens, grid, new_grid), expected, atol=1e-5, rtol=1e-5)


def test_equal_grids_return_the_very_same_tensors():
    tokens, probabilities = draw(2, 6, 5).bfloat16(), attention(6)
    assert resample_tokens(tokens, (2, 3), (2, 3)) is tokens
    assert resample_attention(probabilities, (2, 3), (2, 3)) is probabilities


@pytest.mark.parametrize(("grid", "new_grid"), GRIDS)
def test_constant_tokens_stay_constant_and_sums_and_multiples_carry_over(grid, new_grid):
    n = grid[0] * grid[1]
    constant = draw(2, 1, 6).expand(2, n, 6)
    assert_close(resample_tokens(constant, grid, new_grid), constant[:, :1].expand(2, new_grid[0] * new_grid[1], 6))
    a, b = draw(2, n, 6), draw(2, n, 6, seed=1)
    apart = 2 * resample_tokens(a, grid, new_grid) - 3 * resample_tokens(b, grid, new_grid)
    assert_close(resample_tokens(2 * a - 3 * b, grid, new_grid), apart, atol=1e-5, rtol=1e-5)


def test_a_map_of_columns_stays_one_of_columns_which_resampling_the_index_would_not_give():
    """Token (r, c) holds c: along the index that is a saw-tooth, and interpolating over it would mix rows."""
    columns = torch.arange(6.0).repeat(4)[None, :, None]  # a 4x6 grid
    found = resample_tokens(columns, (4, 6), (2, 3)).reshape(2, 3)
    assert_close(found, torch.tensor([[0.5, 2.5, 4.5], [0.5, 2.5, 4.5]]))
    flattened = nn.functional.interpolate(columns.transpose(1, 2), size=6, mode="linear").reshape(2, 3)
    assert (found - flattened).abs().max() > 0.5
    rows = torch.arange(4.0).repeat_interleave(6)[None, :, None]
    assert_close(resample_tokens(rows, (4, 6), (2, 3)).reshape(2, 3), torch.tensor([[0.5] * 3, [2.5] * 3]))


def test_tokens_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(HasteError, match="12 tokens do not fill a 4x4 grid"):
        resample_tokens(draw(1, 12, 2), (4, 4), (3, 3))


def test_resampling_is_in_float32_under_autocast_and_lets_gradients_through():
    tokens = draw(1, 16, 4).requires_grad_()
    plain = resample_tokens(tokens, (4, 4), (3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resample_tokens(tokens.bfloat16().float(), (4, 4), (3, 3))
        wide = resample_tokens(tokens, (4, 4), (3, 3))
    assert inside.dtype == wide.dtype == torch.float32
    assert torch.equal(wide, plain)
    plain.sum().backward()
    assert_close(tokens.grad.sum(1), torch.full((1, 4), 9.0))  # every new token hands out weights that sum to one


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "new_grid"), GRIDS[:4])
def test_attention_is_resampled_over_keys_and_queries_by_brute_force(grid, new_grid):
    probabilities, weights = attention(grid[0] * grid[1]), grid_weights(grid, new_grid)
    new = len(weights)
    expected = torch.zeros(2, 3, new, new)
    for b in range(2):
        for h in range(3):
            over_keys = torch.stack([weights @ row for row in probabilities[b, h]])
            over_queries = torch.stack([weights @ column for column in over_keys.T], dim=1)
            for query in range(new):
                expected[b, h, query] = over_queries[query] / over_queries[query].sum()
    assert_close(resample_attention(probabilities, grid, new_grid), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("grid", "new_grid"), GRIDS)
def test_resampled_rows_are_distributions(grid, new_grid):
    found = resample_attention(attention(grid[0] * grid[1], batch=1), grid, new_grid)
    new = new_grid[0] * new_grid[1]
    assert found.shape == (1, 3, new, new)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert_close(found.sum(-1), torch.ones(1, 3, new))


@pytest.mark.parametrize(("grid", "new_grid"), GRIDS)
def test_uniform_attention_stays_uniform(grid, new_grid):
    n, new = grid[0] * grid[1], new_grid[0] * new_grid[1]
    found = resample_attention(torch.full((1, 1, n, n), 1 / n), grid, new_grid)
    assert_close(found, torch.full((1, 1, new, new), 1 / new))


def test_every_token_looking_one_column_to_the_right_still_does_so_on_another_grid():
    """4x6 -> 4x12: one old column is two new ones. Columns whose target is at the border are left out."""
    look = torch.zeros(1, 1, 24, 24)
    for r in range(4):
        for c in range(6):
            look[0, 0, r * 6 + c, r * 6 + min(c + 1, 5)] = 1
    found = resample_attention(look, (4, 6), (4, 12)).reshape(4, 12, 4, 12)
    mass = found.sum((1, 3)) / 12  # (query row, key row)
    assert_close(mass, torch.eye(4))
    centre = (found.sum(2) * torch.arange(12.0)).sum(-1)  # (query row, query column): the mean column looked at
    assert_close(centre[:, 2:7], (torch.arange(2.0, 7.0) + 2).expand(4, 5), atol=1e-4, rtol=0)


# -- alignment --------------------------------------------------------------------------------------------------------


def encoder(side=12, patch=4, heads=4, width=24, img_size=None):
    kwargs = {"img_size": img_size or side, "patch_size": patch, "in_chans": 1, "embed_dim": width, "depth": 3}
    chosen = config.Teacher(
        model="vit_tiny_patch16_224", kwargs=kwargs | {"num_heads": heads}, weights="random", mean=[0.5], std=[0.5]
    )
    return build_teacher(chosen)


def student(heads=4, width=24, patch=2):
    return SiT(image_size=8, channels=1, classes=3, depth=3, width=width, heads=heads, patch=patch)


def settings(**changes):
    chosen = {"lambda_feature": 0.5, "lambda_attention": 0.25, "depth": 2, "layer_pairs": [(0, 1), (2, 2)]}
    return config.Alignment(**chosen | {"projector_width": 16} | changes)


def tapped_and_images(alignment, model):
    images = draw(5, 1, 8, 8).clamp(-1, 1)
    return model(draw(5, 1, 8, 8, seed=1), torch.linspace(0.1, 0.9, 5), torch.arange(5) % 4, alignment.taps), images


@pytest.mark.parametrize(
    "teacher",
    [encoder(12), encoder(20), encoder(img_size=(8, 20))],
    ids=["3x3", "5x5", "2x5"],
)
def test_features_meet_on_the_teachers_grid_and_attention_on_the_students(randomise, teacher):
    randomise(teacher.encoder, std=0.4)
    model = randomise(student())
    with pytest.warns(UserWarning, match="student 4x4, teacher"):
        alignment = Alignment(settings(), model, teacher, 0)
    tapped, images = tapped_and_images(alignment, model)
    losses, seen = alignment.losses(tapped, images), teacher(images, (1, 2))
    projected = grid_weights((4, 4), teacher.grid) @ alignment.projector(tapped.tokens[2])
    assert_close(losses.feature, feature_loss(projected, seen.tokens))
    weights, parts = grid_weights(teacher.grid, (4, 4)), []
    for s, t in ((0, 1), (2, 2)):
        target = weights @ attention_probabilities(*seen.qk[t]) @ weights.T
        target = target / target.sum(-1, keepdim=True)
        parts.append(-(target * attention_probabilities(*tapped.qk[s]).log()).sum(-1).mean())
    assert_close(losses.attention, torch.stack(parts).mean())
    assert_close(losses.total, 0.5 * losses.feature + 0.25 * losses.attention)


def test_gradients_reach_the_student_across_grids_and_never_the_teacher(randomise):
    teacher, model = encoder(12), randomise(student())
    with pytest.warns(UserWarning, match="grids differ"):
        alignment = Alignment(settings(), model, teacher, 0)
    alignment.losses(*tapped_and_images(alignment, model)).total.backward()
    assert all(p.grad.abs().sum() > 0 for p in alignment.projector.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_the_input_size_that_the_warning_names_makes_the_grids_equal(recwarn):
    with pytest.warns(UserWarning, match=r"teacher 3x3.*teacher.kwargs=\{img_size: \[16, 16\]\}"):
        Alignment(settings(), student(), encoder(12), 0)
    recwarn.clear()
    equal = encoder(16)
    assert Alignment(settings(), student(), equal, 0).grids == ((4, 4), (4, 4))
    assert not recwarn.list


def test_losses_across_grids_are_float32_under_autocast(randomise):
    model = randomise(student())
    with pytest.warns(UserWarning, match="grids differ"):
        alignment = Alignment(settings(), model, encoder(12), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = alignment.losses(*tapped_and_images(alignment, model))
    assert all(part.dtype == torch.float32 for part in losses)


@pytest.mark.parametrize("side", [8, 12], ids=["equal grids", "unequal grids"])
def test_attention_that_already_is_the_target_has_the_least_loss(randomise, side):
    """Steps down the attention loss alone bring the student's attention to the resampled teacher's."""
    teacher = randomise(encoder(side, patch=2 if side == 8 else 4, heads=4), std=0.6)
    images = draw(5, 1, 8, 8).clamp(-1, 1)
    target = resample_attention(attention_probabilities(*teacher(images, (1,)).qk[1]), teacher.grid, (4, 4))
    floor = float(torch.special.entr(target).sum(-1).mean())
    q, k = draw(5, 4, 16, 16).requires_grad_(), draw(5, 4, 16, 16, seed=1).requires_grad_()
    optimizer = torch.optim.Adam([q, k], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = attention_cross_entropy((q, k), target)
        loss.backward()
        optimizer.step()
    assert floor - 1e-4 <= loss.item() < floor + 0.02
