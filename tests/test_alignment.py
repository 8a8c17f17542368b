from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from haste_core import training
from haste_core.alignment import (
    DENSE_UP_TO,
    Alignment,
    attention_cross_entropy,
    attention_loss,
    feature_loss,
    projector,
)
from haste_core.errors import HasteError
from haste_core.models import SiT, build
from haste_core.study import config
from haste_core.study.data import contexts
from haste_core.study.pretrain import build_teacher
from haste_core.study.runs import Run
from haste_core.teacher import Teacher


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher():
    """Three blocks of four heads over a 4x4 grid of tokens of width 24."""
    kwargs = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 4}
    settings = config.Teacher(model="vit_tiny_patch16_224", kwargs=kwargs, weights="random", mean=[0.5], std=[0.5])
    return build_teacher(settings)


def student(heads=4, width=24, patch=2, depth=3):
    return SiT(image_size=8, channels=1, classes=3, depth=depth, width=width, heads=heads, patch=patch)


def settings(**changes):
    chosen = {"lambda_feature": 0.5, "lambda_attention": 0.25, "depth": 2, "layer_pairs": [(0, 1), (2, 2)]}
    return config.Alignment(**chosen | {"projector_width": 16} | changes)


def step(alignment, model, seed=0):
    images = draw(5, 1, 8, 8, seed=seed).clamp(-1, 1)
    tapped = model(draw(5, 1, 8, 8, seed=seed + 1), torch.linspace(0.1, 0.9, 5), torch.arange(5) % 4, alignment.taps)
    return tapped, alignment.losses(tapped, images), images


def test_feature_loss_equals_a_plain_loop():
    a, b = draw(2, 5, 7), draw(2, 5, 7, seed=1)
    total = 0.0
    for i in range(2):
        for n in range(5):
            dot = sum(float(a[i, n, d] * b[i, n, d]) for d in range(7))
            total -= dot / math.sqrt(float((a[i, n] ** 2).sum()) * float((b[i, n] ** 2).sum()))
    assert float(feature_loss(a, b)) == pytest.approx(total / 10, abs=1e-6)


def test_feature_loss_is_minus_one_for_the_same_directions_and_one_for_opposite_ones():
    a = draw(3, 4, 6)
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


def test_attention_loss_is_torchs_cross_entropy_and_at_least_the_teachers_entropy():
    q, k = draw(2, 3, 6, 4), draw(2, 3, 6, 4, seed=1)
    other = (draw(2, 3, 6, 4, seed=2), draw(2, 3, 6, 4, seed=3))
    target = (q @ k.transpose(-1, -2) / 2).softmax(-1).reshape(-1, 6)
    logits = (other[0] @ other[1].transpose(-1, -2) / 2).reshape(-1, 6)
    assert_close(attention_loss(other, (q, k)), torch.nn.functional.cross_entropy(logits, target))
    entropy = torch.distributions.Categorical(probs=target).entropy().mean()
    assert_close(attention_loss((q, k), (q, k)), entropy)
    assert attention_loss(other, (q, k)) > entropy


def loss_and_gradients(chunk, weights=None, dtype=torch.float32):
    """Attention loss of 40 tokens and its gradients to the student's q and k; the teacher is twice as wide."""
    student = tuple(draw(2, 3, 40, 8, seed=s).to(dtype).requires_grad_() for s in (0, 1))
    teacher = tuple(draw(2, 3, 40, 16, seed=s).to(dtype) for s in (2, 3))
    loss = attention_loss(student, teacher, weights, chunk)
    return loss.detach(), *torch.autograd.grad(loss, student)


@pytest.mark.parametrize("chunk", [1, 16, 39])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.0, 1.0])])
def test_chunks_of_queries_give_the_numbers_of_whole_maps(chunk, weights):
    for whole, parts in zip(loss_and_gradients(40, weights), loss_and_gradients(chunk, weights), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_chunks_of_bfloat16_queries_are_near_those_of_float32():
    exact, rounded = loss_and_gradients(40), loss_and_gradients(16, dtype=torch.bfloat16)
    assert rounded[0].dtype == torch.float32
    assert float(rounded[0]) == pytest.approx(float(exact[0]), rel=0.01)
    for gradient, expected in zip(rounded[1:], exact[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - expected).norm() < 0.02 * expected.norm()


def test_memory_for_the_backward_pass_grows_with_tokens_and_not_with_their_square():
    def kept(tokens):
        storages = {}

        def count(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        q, k = (draw(1, 1, tokens, 4, seed=s).requires_grad_() for s in (0, 1))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            attention_loss((q, k), (q.detach(), k.detach()))
        return sum(storage.nbytes() for storage in storages.values())

    dense = 4 * DENSE_UP_TO**2
    assert kept(DENSE_UP_TO) > dense
    assert kept(4 * DENSE_UP_TO) < dense


def test_attention_loss_stays_finite_for_huge_logits():
    q, k = 1e3 * draw(1, 1, 4, 4), 1e3 * draw(1, 1, 4, 4, seed=1)
    assert attention_loss((q, k), (-q, k)).isfinite()


@pytest.mark.parametrize(("heads", "expected"), [(6, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (2, [0, 1])])
def test_the_first_heads_that_both_sides_have_are_aligned(teacher, heads, expected):
    assert Alignment(settings(), student(heads), teacher, 0).heads == expected


@pytest.mark.parametrize("heads", [None, [0, 2], [3, 1], [2]])
def test_attention_part_is_the_mean_over_layer_pairs_of_the_named_heads(teacher, randomise, heads):
    model = randomise(student(heads=6))
    alignment = Alignment(settings(heads=heads), model, teacher, 0)
    tapped, losses, images = step(alignment, model)
    seen = teacher(images, (1, 2))
    named = heads or [0, 1, 2, 3]
    expected = [
        attention_loss(tuple(p[:, named] for p in tapped.qk[s]), tuple(p[:, named] for p in seen.qk[t]))
        for s, t in [(0, 1), (2, 2)]
    ]
    assert_close(losses.attention, (expected[0] + expected[1]) / 2)


def test_total_is_the_weighted_sum_and_the_feature_part_reads_the_aligned_depth(teacher, randomise):
    model = randomise(student())
    alignment = Alignment(settings(), model, teacher, 0)
    tapped, losses, images = step(alignment, model)
    assert list(tapped.tokens) == [2]
    assert_close(losses.feature, feature_loss(alignment.projector(tapped.tokens[2]), teacher(images).tokens))
    assert_close(losses.total, 0.5 * losses.feature + 0.25 * losses.attention)


def test_parts_that_are_switched_off_cost_nothing(teacher):
    features = Alignment(settings(lambda_attention=0), student(), teacher, 0)
    assert (features.taps.depths, features.taps.blocks, features.teacher_blocks) == ((2,), (), ())
    attention = Alignment(settings(lambda_feature=0), student(), teacher, 0)
    assert (attention.taps.depths, attention.taps.blocks) == ((), (0, 2))
    assert attention.projector is None
    model = student()
    assert step(features, model)[1].attention is None
    assert step(attention, model)[1].feature is None


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({"heads": [0, 4]}, {"heads": 6}, ["4", "0 to 3", "student 6", "teacher 4"]),
        ({"heads": [2]}, {"heads": 2}, ["2", "0 to 1"]),
        ({"layer_pairs": [(3, 1)]}, {}, ["student block", "'3'", "0, 1, 2"]),
        ({"layer_pairs": [(1, 3)]}, {}, ["teacher block", "'3'", "0, 1, 2"]),
        ({"depth": 4}, {}, ["depth", "'4'", "1, 2, 3"]),
    ],
)
def test_what_does_not_exist_is_refused_naming_what_is_possible(teacher, changes, sizes, words):
    with pytest.raises(HasteError) as caught:
        Alignment(settings(**changes), student(**sizes), teacher, 0)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_losses_are_float32_under_bf16_autocast(teacher, randomise):
    q, k = draw(2, 3, 6, 4), draw(2, 3, 6, 4, seed=1)
    plain = attention_loss((q, k), (k, q)), feature_loss(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention_loss((q, k), (k, q)), feature_loss(q, k)
    for a, b in zip(plain, inside, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)
    model = randomise(student())
    alignment = Alignment(settings(), model, teacher, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tapped, losses, _ = step(alignment, model)
    assert tapped.qk[0][0].dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in losses)


def test_half_precision_inputs_are_widened_before_any_arithmetic():
    parts = [draw(1, 2, 5, 4, seed=i).bfloat16() for i in range(4)]
    wide = [part.float() for part in parts]
    assert torch.equal(attention_loss(tuple(parts[:2]), tuple(parts[2:])), attention_loss((*wide[:2],), (*wide[2:],)))
    assert torch.equal(feature_loss(parts[0], parts[1]), feature_loss(wide[0], wide[1]))


def test_gradients_reach_student_and_projector_but_never_the_teacher(teacher, randomise):
    model = randomise(student())
    alignment = Alignment(settings(), model, teacher, 0)
    step(alignment, model)[1].total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in alignment.projector.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_projector_is_no_part_of_the_generator(teacher):
    model = student()
    before = set(model.state_dict())
    alignment = Alignment(settings(), model, teacher, 0)
    assert set(model.state_dict()) == before
    assert not any("projector" in name or "teacher" in name for name in before)
    mine = {id(p) for p in alignment.projector.parameters()}
    assert mine.isdisjoint(id(p) for p in model.parameters())


def test_projector_is_three_linear_layers_with_silu_between_from_its_seed_alone():
    torch.manual_seed(7)
    first = projector(6, 10, 4, seed=3)
    again, other = projector(6, 10, 4, seed=3), projector(6, 10, 4, seed=4)
    x = draw(2, 6)
    w = first.state_dict()
    h = torch.nn.functional.silu(x @ w["0.weight"].T + w["0.bias"])
    h = torch.nn.functional.silu(h @ w["2.weight"].T + w["2.bias"])
    assert_close(first(x), h @ w["4.weight"].T + w["4.bias"])
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))


# -- heads ------------------------------------------------------------------------------------------------------------

HEADS = {  # student heads, alignment.heads -> heads aligned with a teacher of four
    "more in the student": (6, None, [0, 1, 2, 3]),
    "fewer in the student": (2, None, [0, 1]),
    "a list": (6, [1, 3], [1, 3]),
    "a list out of order": (4, [2, 0], [2, 0]),
}


@pytest.mark.parametrize(("heads", "named", "aligned"), HEADS.values(), ids=HEADS)
def test_the_attention_loss_moves_q_and_k_of_aligned_heads_and_of_no_other(teacher, randomise, heads, named, aligned):
    model = randomise(student(heads))
    chosen = settings(lambda_feature=0, layer_pairs=[(2, 1)], heads=named)
    alignment = Alignment(chosen, model, teacher, 0)
    assert alignment.heads == aligned
    step(alignment, model)[1].total.backward()
    weights = model.blocks[2].attn.qkv.weight.grad.reshape(3, heads, 24 // heads, 24)
    for head in range(heads):
        moved = [weights[part, head].abs().sum() > 0 for part in range(3)]
        assert moved == [head in aligned, head in aligned, False]


@pytest.mark.parametrize(("heads", "named", "aligned"), HEADS.values(), ids=HEADS)
def test_head_m_meets_head_m_whatever_the_widths_of_the_heads(teacher, randomise, heads, named, aligned):
    model = randomise(student(heads, width=48))
    alignment = Alignment(settings(lambda_feature=0, layer_pairs=[(2, 1)], heads=named), model, teacher, 0)
    tapped, losses, images = step(alignment, model)
    (q_s, k_s), (q_t, k_t) = tapped.qk[2], teacher(images, (1,)).qk[1]
    assert (q_s.shape[-1], q_t.shape[-1]) == (48 // heads, 6)
    parts = [
        attention_loss((q_s[:, m : m + 1], k_s[:, m : m + 1]), (q_t[:, m : m + 1], k_t[:, m : m + 1])) for m in aligned
    ]
    assert_close(losses.attention, torch.stack(parts).mean())


# -- every kind of generator ------------------------------------------------------------------------------------------

KINDS = {"sit": [], "dit": ["model.kind=dit", "sample.sampler=ddpm"], "mmdit": ["model.kind=mmdit"]}


@pytest.fixture(params=KINDS)
def of_kind(request, make_study, tmp_path):
    """A function from overrides to the tiny study with a generator of one kind."""
    more = list(KINDS[request.param])
    if request.param == "mmdit":
        contexts.write(tmp_path / "contexts.safetensors", draw(10, 3, 12), torch.zeros(3, 12))
        more += [f"data.contexts={tmp_path / 'contexts.safetensors'}", "model.context_width=12"]
    return lambda *overrides: make_study(*more, *overrides)


def test_both_losses_reach_every_kind_of_generator_in_phase_one_and_end_with_it(output, of_kind, monkeypatch):
    study = of_kind()
    run, seen, calls = Run(study, "haste", 0), {}, []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda *args: calls.append(1) or forward(*args))
    training.fit(run, on_step=lambda s: seen.update({s.step: (len(calls), s.alignment is not None)}), progress=False)
    # The switch is at step 8: eight calls in phase I, none in the four steps of phase II.
    assert seen == {step: (min(step, 8), step <= 8) for step in range(1, 13)}
    lines = run.metrics()
    assert [("feature" in line, "attention" in line) for line in lines] == [(True, True)] * 4 + [(False, False)] * 2
    assert all(line["feature"] < 1 and line["attention"] > 0 for line in lines[:4])


def test_alignment_brings_every_kind_of_generator_closer_to_the_teacher(output, of_kind):
    study = of_kind("train.lr=0.003", "train.steps=60", "train.keep=[60]", "train.checkpoint_every=60")
    run = Run(study, "holistic", 0)
    training.fit(run, progress=False)
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["feature"] < first["feature"] - 0.1
    assert last["attention"] < first["attention"]


def test_every_kind_of_generator_can_be_aligned_across_token_grids(output, of_kind):
    kwargs = "{img_size: 12, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 4, num_heads: 4}"
    study = of_kind(f"teacher.kwargs={kwargs}", "train.steps=4", "train.keep=[4]", "arms.haste.termination.at=2")
    run = Run(study, "haste", 0)
    with pytest.warns(UserWarning, match="student 4x4, teacher 3x3"):
        training.fit(run, progress=False)
    assert ["attention" in line for line in run.metrics()] == [True, False]
    assert all(math.isfinite(line["loss"]) for line in run.metrics())


# Intervals of the noise level


def test_weighted_losses_are_sums_over_the_weighted_samples():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 9, 6, generator=generator)
    weights = torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = sum(feature_loss(a[i : i + 1], b[i : i + 1]) for i in (0, 3)) / 4
    assert_close(feature_loss(a, b, weights), expected)
    q, k = torch.randn(2, 4, 2, 9, 6, generator=generator)
    target = torch.randn(4, 2, 9, 9, generator=generator).softmax(-1)
    parts = [attention_cross_entropy((q[i : i + 1], k[i : i + 1]), target[i : i + 1]) for i in (0, 3)]
    assert_close(attention_cross_entropy((q, k), target, weights), sum(parts) / 4)


def test_only_samples_inside_the_interval_are_aligned(tiny, make_study, randomise):
    run = make_study("alignment.t_low=0.4", "alignment.t_high=0.6").run("holistic")
    teacher = build_teacher(tiny.teacher)
    student = randomise(build(run.model, image_size=8, channels=1, classes=10, seed=0))
    part, whole = (Alignment(r.alignment, student, teacher, 0) for r in (run, tiny.run("holistic")))
    images, t = torch.randn(3, 1, 8, 8), torch.tensor([0.39, 0.5, 0.61])
    tapped = student(images, t, torch.zeros(3, dtype=torch.int64), part.taps)
    alone = student(images[1:2], t[1:2], torch.zeros(1, dtype=torch.int64), part.taps)
    assert_close(part.losses(tapped, images, t).total, whole.losses(alone, images[1:2], t[1:2]).total / 3)
    assert whole.losses(tapped, images, t).total.equal(whole.losses(tapped, images).total)


def test_an_interval_has_a_lower_and_a_higher_end(make_study):
    with pytest.raises(HasteError, match=r"t_low 0\.6 is not below t_high 0\.4"):
        make_study("alignment.t_low=0.6", "alignment.t_high=0.4")
