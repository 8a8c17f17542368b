"""Alignment losses derived a second time, resampling between token grids, and both inside HASTE."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from haste_core.alignment import (
    DENSE_UP_TO,
    attention_loss,
    attention_probabilities,
    feature_loss,
    projector,
    queries_at_once,
    resample_attention,
    resample_tokens,
)
from haste_core.analysis.attention import attention_similarity
from haste_core.analysis.probe import StudentTeacher
from haste_core.errors import HasteError
from haste_core.haste import HASTE
from haste_core.models import SiT
from haste_core.study.runs import Run
from haste_core.study.text import write_parts
from haste_core.study.train import fit
from haste_core.teacher import Teacher
from haste_core.termination import Never


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(img_size=8, patch=2):
    """Three blocks of four heads of width 6; a grid of 4x4 tokens by default."""
    sizes = {"img_size": img_size, "patch_size": patch, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 4}
    return Teacher("vit_tiny_patch16_224", weights="random", mean=[0.5], std=[0.5], **sizes)


@pytest.fixture(scope="module")
def teacher():
    return encoder()


def student(heads=4, width=24):
    return SiT(image_size=8, channels=1, classes=3, depth=3, width=width, heads=heads, patch=2)


def haste_of(teacher, model, **changes):
    chosen = {"lambda_feature": 0.5, "lambda_attention": 0.25, "depth": 2, "layer_pairs": [(0, 1), (2, 2)]}
    sizes = {"width": model.x_embedder.proj.out_channels, "heads": model.heads, "grid": model.grid}
    return HASTE(teacher, **sizes | chosen | {"projector_width": 16} | changes)


def step(haste, model, t=None):
    """Readings of the student, its losses, and the teacher's images."""
    images, t = draw(5, 1, 8, 8).clamp(-1, 1), torch.linspace(0.1, 0.9, 5) if t is None else t
    with haste.tap(model.blocks) as seen:
        model(draw(5, 1, 8, 8, seed=1), t, torch.arange(5) % 4)
    return seen, haste.losses(seen, images, t), images


# -- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradient_at_tokens_of_zeros_is_finite(dtype):
    tokens = torch.zeros(2, 3, 8, dtype=dtype, requires_grad=True)
    feature_loss(tokens, torch.ones(2, 3, 8, dtype=dtype)).backward()
    assert tokens.grad.isfinite().all()
    assert tokens.grad.abs().max() > 0


def test_feature_loss_is_minus_the_mean_cosine():
    a, b = draw(2, 5, 7), draw(2, 5, 7, seed=1)
    total = 0.0
    for i in range(2):
        for n in range(5):
            dot = sum(float(a[i, n, d] * b[i, n, d]) for d in range(7))
            total -= dot / math.sqrt(float((a[i, n] ** 2).sum()) * float((b[i, n] ** 2).sum()))
    assert float(feature_loss(a, b)) == pytest.approx(total / 10, abs=1e-6)
    assert float(feature_loss(a, 3 * a)) == pytest.approx(-1, abs=1e-6)
    assert float(feature_loss(a, -a)) == pytest.approx(1, abs=1e-6)


def test_attention_loss_equals_a_plain_loop_with_widths_of_its_own_on_each_side():
    q_s, k_s = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    q_t, k_t = draw(2, 3, 4, 8, seed=2), draw(2, 3, 4, 8, seed=3)

    def row(q, k, b, h, n):
        logits = [float(q[b, h, n] @ k[b, h, m]) / math.sqrt(q.shape[-1]) for m in range(4)]
        normaliser = math.log(sum(math.exp(x) for x in logits))
        return [x - normaliser for x in logits]

    total = 0.0
    for b in range(2):
        for h in range(3):
            for n in range(4):
                student_log, teacher_log = row(q_s, k_s, b, h, n), row(q_t, k_t, b, h, n)
                total -= sum(math.exp(t) * s for t, s in zip(teacher_log, student_log, strict=True))
    assert float(attention_loss((q_s, k_s), (q_t, k_t))) == pytest.approx(total / 24, abs=1e-5)
    assert attention_loss((1e3 * q_s, 1e3 * k_s), (-1e3 * q_t, 1e3 * k_t)).isfinite()


def loss_and_gradients(chunk, weights=None, dtype=torch.float32):
    """Attention loss of 40 tokens and its gradients to the student's q and k; the teacher is twice as wide."""
    student = tuple(draw(2, 3, 40, 8, seed=s).to(dtype).requires_grad_() for s in (0, 1))
    teacher = tuple(draw(2, 3, 40, 16, seed=s).to(dtype) for s in (2, 3))
    loss = attention_loss(student, teacher, weights, chunk)
    return loss.detach(), *torch.autograd.grad(loss, student)


@pytest.mark.parametrize("chunk", [1, 16])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.0, 1.0])])
def test_chunks_of_queries_give_the_numbers_of_whole_maps(chunk, weights):
    for whole, parts in zip(loss_and_gradients(40, weights), loss_and_gradients(chunk, weights), strict=True):
        assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_memory_for_the_backward_pass_grows_with_tokens_and_not_with_their_square():
    def kept(tokens):
        storages = {}

        def count(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        q, k = (draw(1, 1, tokens, 4, seed=s).requires_grad_() for s in (0, 1))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            attention_loss((q, k), (q.detach(), k.detach()))
        return sum(storage.nbytes() for storage in storages.values())

    dense = 4 * DENSE_UP_TO**2
    assert kept(DENSE_UP_TO) > dense
    assert kept(4 * DENSE_UP_TO) < dense


def test_losses_are_computed_in_float32_whatever_their_inputs_and_autocast():
    parts = [draw(1, 2, 5, 4, seed=i).bfloat16() for i in range(4)]
    wide = [part.float() for part in parts]
    plain = attention_loss((*wide[:2],), (*wide[2:],)), feature_loss(wide[0], wide[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b, c, d in (parts, wide):
            for found, expected in zip((attention_loss((a, b), (c, d)), feature_loss(a, b)), plain, strict=True):
                assert found.dtype == torch.float32
                assert torch.equal(found, expected)
    exact, rounded = loss_and_gradients(40), loss_and_gradients(16, dtype=torch.bfloat16)
    assert float(rounded[0]) == pytest.approx(float(exact[0]), rel=0.01)
    for gradient, expected in zip(rounded[1:], exact[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - expected).norm() < 0.02 * expected.norm()


def test_projector_is_three_linear_layers_with_silu_between_from_its_seed_alone():
    torch.manual_seed(7)
    first, again, other = (projector(6, 10, 4, seed=seed) for seed in (3, 3, 4))
    x, w = draw(2, 6), first.state_dict()
    h = F.silu(x @ w["0.weight"].T + w["0.bias"])
    h = F.silu(h @ w["2.weight"].T + w["2.bias"])
    assert_close(first(x), h @ w["4.weight"].T + w["4.bias"])
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))


# -- resampling between token grids -----------------------------------------------------------------------------------

GRIDS = [((4, 4), (3, 3)), ((2, 5), (4, 3)), ((3, 2), (1, 7))]


def line_weights(old, new):
    """Weights (new, old) of linear interpolation along one axis, by the definition of half-pixel centres."""
    weights = torch.zeros(new, old)
    for i in range(new):
        place = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)  # in units of old tokens
        low = int(place)
        weights[i, low] += 1 - (place - low)
        if place > low:
            weights[i, low + 1] += place - low
    return weights


def grid_weights(grid, new_grid):
    """(N', N): one row of weights over the old tokens for every new token, rows first."""
    return torch.kron(line_weights(grid[0], new_grid[0]), line_weights(grid[1], new_grid[1]))


@pytest.mark.parametrize(("grid", "new_grid"), GRIDS)
def test_tokens_and_attention_are_resampled_by_bilinear_weights(grid, new_grid):
    weights, n = grid_weights(grid, new_grid), grid[0] * grid[1]
    tokens = draw(2, n, 6)
    assert_close(resample_tokens(tokens, grid, new_grid), weights @ tokens, atol=1e-5, rtol=1e-5)
    attention = draw(1, 3, n, n).softmax(-1)
    expected = torch.zeros(1, 3, len(weights), len(weights))
    for h in range(3):
        over_keys = torch.stack([weights @ row for row in attention[0, h]])
        over_queries = torch.stack([weights @ column for column in over_keys.T], dim=1)
        expected[0, h] = torch.stack([row / row.sum() for row in over_queries])
    found = resample_attention(attention, grid, new_grid)
    assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert_close(found.sum(-1), torch.ones(1, 3, len(weights)))
    uniform = resample_attention(torch.full((1, 1, n, n), 1 / n), grid, new_grid)
    assert_close(uniform, torch.full_like(uniform, 1 / len(weights)))


def test_resampling_leaves_equal_grids_alone_is_float32_under_autocast_and_refuses_other_counts():
    tokens, probabilities = draw(2, 6, 5).bfloat16(), draw(1, 1, 6, 6).softmax(-1)
    assert resample_tokens(tokens, (2, 3), (2, 3)) is tokens
    assert resample_attention(probabilities, (2, 3), (2, 3)) is probabilities
    tokens = draw(1, 16, 4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resample_tokens(tokens, (4, 4), (3, 3))
    assert torch.equal(inside, resample_tokens(tokens, (4, 4), (3, 3)))
    inside.sum().backward()
    assert_close(tokens.grad.sum(1), torch.full((1, 4), 9.0))  # weights of a new token sum to one
    with pytest.raises(HasteError, match="12 tokens do not fill a 4x4 grid"):
        resample_tokens(draw(1, 12, 2), (4, 4), (3, 3))


# -- HASTE ------------------------------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_of_parts_each_of_which_can_be_left_out(teacher, randomise):
    model = randomise(student())
    haste = haste_of(teacher, model)
    seen, losses, images = step(haste, model)
    assert list(seen.tokens) == [2]
    assert_close(losses.feature, feature_loss(haste.projector(seen.tokens[2]), teacher(images).tokens))
    assert_close(losses.total, 0.5 * losses.feature + 0.25 * losses.attention)
    features = haste_of(teacher, model, lambda_attention=0)
    seen, only, _ = step(features, model)
    assert (seen.qk, features.teacher_blocks, only.attention) == ({}, (), None)
    assert_close(only.total, 0.5 * losses.feature)
    attention = haste_of(teacher, model, lambda_feature=0)
    seen, only, _ = step(attention, model)
    assert (seen.tokens, only.feature, list(attention.parameters())) == ({}, None, [])
    assert_close(only.total, 0.25 * losses.attention)


HEADS = {  # student heads, aligned_heads -> heads aligned with a teacher of four
    "more in the student": (6, None, [0, 1, 2, 3]),
    "fewer in the student": (2, None, [0, 1]),
    "a list": (6, [1, 3], [1, 3]),
    "a list out of order": (4, [2, 0], [2, 0]),
}


@pytest.mark.parametrize(("heads", "named", "aligned"), HEADS.values(), ids=HEADS)
def test_head_m_meets_head_m_in_the_mean_over_layer_pairs_and_no_other_head_moves(
    teacher, randomise, heads, named, aligned
):
    model = randomise(student(heads, width=48))
    haste = haste_of(teacher, model, lambda_feature=0, aligned_heads=named)
    seen, losses, images = step(haste, model)
    target, parts = teacher(images, (1, 2)), []
    for s, t in ((0, 1), (2, 2)):
        (q_s, k_s), (q_t, k_t) = seen.qk[s], target.qk[t]
        assert (q_s.shape[-1], q_t.shape[-1]) == (48 // heads, 6)
        parts += [attention_loss((q_s[:, [m]], k_s[:, [m]]), (q_t[:, [m]], k_t[:, [m]])) for m in aligned]
    assert_close(losses.attention, torch.stack(parts).mean())
    losses.total.backward()
    weights = model.blocks[2].attn.qkv.weight.grad.reshape(3, heads, 48 // heads, 48)
    for head in range(heads):
        moved = [weights[part, head].abs().sum() > 0 for part in range(3)]
        assert moved == [head in aligned, head in aligned, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aligned_heads": [0, 4], "heads": 6}, ["head 4", "0 to 3", "student 6 heads", "teacher 4"]),
        ({"aligned_heads": [2], "heads": 2}, ["head 2", "0 to 1"]),
        ({"layer_pairs": [(3, 1)]}, ["block", "'3'", "0, 1, 2"]),
        ({"layer_pairs": [(1, 3)]}, ["teacher block", "'3'", "0, 1, 2"]),
        ({"layer_pairs": []}, ["lambda_attention", "(student block, teacher block)"]),
        ({"depth": 4}, ["depth", "'4'", "1, 2, 3"]),
        ({"stop_at": 3, "trigger": Never()}, ["stop_at=3 and a trigger"]),
    ],
)
def test_what_does_not_exist_is_refused_naming_what_is_possible(teacher, changes, words):
    model = student()
    with pytest.raises(HasteError) as caught:
        step(haste_of(teacher, model, **changes), model)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_samples_inside_the_interval_of_noise_levels_are_aligned(teacher, randomise):
    model, t = randomise(student()), torch.tensor([0.1, 0.39, 0.5, 0.61, 0.9])
    part, whole = haste_of(teacher, model, t_low=0.4, t_high=0.6), haste_of(teacher, model)
    seen, losses, images = step(part, model, t)
    alone = type(seen)(
        {d: h[2:3] for d, h in seen.tokens.items()}, {b: (q[2:3], k[2:3]) for b, (q, k) in seen.qk.items()}
    )
    assert_close(losses.total, whole.losses(alone, images[2:3], t[2:3]).total / 5)
    assert whole.losses(seen, images, t).total.equal(whole.losses(seen, images).total)


@pytest.mark.parametrize(("img_size", "grid"), [(12, (3, 3)), ((8, 20), (2, 5))])
def test_features_meet_on_the_teachers_grid_and_attention_on_the_students(randomise, img_size, grid):
    other = encoder(img_size, patch=4)
    randomise(other.encoder, std=0.4)
    model = randomise(student())
    with pytest.warns(UserWarning, match="student 4x4, teacher"):
        haste = haste_of(other, model)
    seen, losses, images = step(haste, model)
    target = other(images, (1, 2))
    assert other.grid == grid
    projected = grid_weights((4, 4), grid) @ haste.projector(seen.tokens[2])
    assert_close(losses.feature, feature_loss(projected, target.tokens))
    weights, parts = grid_weights(grid, (4, 4)), []
    for s, t in ((0, 1), (2, 2)):
        wanted = weights @ attention_probabilities(*target.qk[t]) @ weights.T
        wanted = wanted / wanted.sum(-1, keepdim=True)
        parts.append(-(wanted * attention_probabilities(*seen.qk[s]).log()).sum(-1).mean())
    assert_close(losses.attention, torch.stack(parts).mean())
    losses.total.backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in other.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen, half, _ = step(haste, model)
    assert seen.qk[0][0].dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in half)
    # Grid and heads are read off the first pass where they are not given.
    with pytest.warns(UserWarning, match="student 4x4, teacher"):
        assert_close(step(haste_of(other, model, grid=None, heads=None), model)[1].total, losses.total)


def test_the_input_size_that_the_warning_names_makes_the_grids_equal(recwarn):
    with pytest.warns(UserWarning, match=r"teacher 3x3.*teacher.kwargs=\{img_size: \[16, 16\]\}"):
        haste_of(encoder(12, patch=4), student())
    recwarn.clear()
    haste_of(encoder(16, patch=4), student())
    assert not recwarn.list


# -- every kind of generator ------------------------------------------------------------------------------------------

KINDS = {"sit": [], "dit": ["model.kind=dit", "sample.sampler=ddpm"], "mmdit": ["model.kind=mmdit"]}


@pytest.fixture(params=KINDS)
def of_kind(request, make_study, tmp_path):
    """A function from overrides to the tiny study with a generator of one kind."""
    more = list(KINDS[request.param])
    if request.param == "mmdit":
        write_parts(tmp_path / "contexts.safetensors", [draw(10, 3, 12), torch.zeros(1, 3, 12)], 11)
        more += [f"data.contexts={tmp_path / 'contexts.safetensors'}", "model.context_width=12"]
    return lambda *overrides: make_study(*more, *overrides)


def test_both_losses_reach_every_kind_of_generator_in_phase_one_and_end_with_it(output, of_kind, monkeypatch):
    run, seen, calls = Run(of_kind(), "haste", 0), {}, []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda *args: calls.append(1) or forward(*args))
    fit(
        run,
        on_step=lambda trainer: seen.update({trainer.step: (len(calls), trainer.haste is not None)}),
        progress=False,
    )
    # The switch is at step 8: eight calls in phase I, none in the four steps of phase II.
    assert seen == {n: (min(n, 8), n <= 8) for n in range(1, 13)}
    lines = run.metrics()
    assert [("feature" in line, "attention" in line) for line in lines] == [(True, True)] * 4 + [(False, False)] * 2
    assert all(line["feature"] < 1 and line["attention"] > 0 for line in lines[:4])


FEATURE_MAPS = [
    "teacher={model: resnet10t, mean: [0.5], std: [0.5], stage: 1}",
    "teacher.kwargs={img_size: 16, patch_size: null, embed_dim: null, depth: null, num_heads: null}",
]


def test_a_study_aligns_with_feature_maps_and_compares_attention_by_similarity(output, make_study):
    with pytest.raises(HasteError, match="a teacher of feature maps, which has no attention"):
        fit(Run(make_study(*FEATURE_MAPS), "haste", 0), progress=False)
    study = make_study(
        *FEATURE_MAPS, "alignment.attention_from=similarity", "alignment.temperature=0.2", "analysis.n=20"
    )
    run = Run(study, "haste", 0)
    fit(run, progress=False)
    lines = run.metrics()
    assert all(line["feature"] < 1 and line["attention"] > 0 for line in lines[:4])
    assert "feature" not in lines[-1]
    both = StudentTeacher(run)
    assert both.heads == [0, 1, 2, 3]
    maps = both.teacher_maps(2, torch.arange(3))
    assert maps.shape == (3, 4, 16, 16)
    assert_close(maps.sum(-1), torch.ones(3, 4, 16, dtype=torch.float64))
    assert_close(maps[:, 0], maps[:, 3])
    assert set(attention_similarity(run)["head"]) == {0, 1, 2, 3}


def test_a_gpu_holds_whole_maps_up_to_a_size_and_a_cpu_up_to_a_number_of_tokens():
    assert [queries_at_once((8, 12, n, 64), "cpu") for n in (256, 512, 1024)] == [256, 512, 128]
    assert queries_at_once((8, 12, 1024, 64), "cuda") == 1024  # 0.4 GB
    held = queries_at_once((256, 12, 1024, 64), "cuda")  # of 13 GB
    assert held == 85
    assert 256 * 12 * 1024 * 4 * held <= 2**30 < 256 * 12 * 1024 * 4 * (held + 1)
    assert queries_at_once((10**6, 12, 4096, 64), "cuda") == 1
