from __future__ import annotations

import pandas as pd
import pytest
import torch

from haste_core import training
from haste_core.alignment import attention_logits, attention_loss, resample_attention
from haste_core.analysis.attention import divergence, student_attention, teacher_maps, token_maps
from haste_core.figures import attention_maps
from haste_core.study import pretrain
from haste_core.study.data import open_dataset
from haste_core.study.pretrain import build_teacher
from haste_core.study.runs import Run

QUERIES = [0, 5, 15]


def queries_and_keys(seed, scale=1.0, heads=2, tokens=9, width=4):
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(3, heads, tokens, width, generator=generator) for _ in range(2))


def probabilities(qk):
    return attention_logits(*qk).softmax(-1)


def entropy(p):
    return float(torch.special.entr(p).sum(-1).mean())


def test_divergence_of_equal_attention_is_zero():
    p = probabilities(queries_and_keys(0))
    assert divergence(p, p) == 0


@pytest.mark.parametrize("seed", range(4))
def test_divergence_of_different_attention_is_positive(seed):
    a, b = (probabilities(queries_and_keys(s)) for s in (seed, seed + 10))
    assert divergence(a, b) > 0.01
    assert divergence(a, b) != pytest.approx(divergence(b, a))


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_divergence_is_the_attention_loss_minus_the_teachers_entropy(scale):
    teacher, student = queries_and_keys(0, scale), queries_and_keys(1, scale)
    target = probabilities(teacher)
    expected = float(attention_loss(student, teacher)) - entropy(target)
    assert divergence(target, probabilities(student)) == pytest.approx(expected, abs=2e-5)


def test_divergence_by_hand():
    teacher, student = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[0.25, 0.75]]]])
    assert divergence(teacher, student) == pytest.approx(0.5 * torch.tensor(4 / 3).log().item(), rel=1e-6)


def test_divergence_counts_what_the_teacher_does_not_look_at_as_nothing():
    teacher, student = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    assert divergence(teacher, student) == 0


@pytest.fixture
def run(output, make_study):
    """A trained run whose averaged weights follow the model closely, so that its attention is its own."""
    study = make_study("train.ema_decay=0.5", "train.steps=8", "train.keep=[4]")
    chosen = Run(study, "atta", 0)
    pretrain.prepare_teacher(study)
    training.fit(chosen, progress=False)
    return chosen


@pytest.fixture
def teacher(make_study):
    return build_teacher(make_study().teacher)


def test_student_attention_is_a_distribution_over_keys(run):
    images, labels = (part[:6] for part in open_dataset(run.study.data).images("test"))
    found = student_attention(run, 8, 1, images, labels, t=0.5)
    assert found.shape == (6, 4, 16, 16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(6, 4, 16))
    assert torch.equal(found, student_attention(run, 8, 1, images, labels, t=0.5))
    for other in (
        student_attention(run, 4, 1, images, labels, t=0.5),
        student_attention(run, 8, 2, images, labels, t=0.5),
        student_attention(run, 8, 1, images, labels, t=0.9),
        student_attention(run, 8, 1, images, labels, t=0.5, seed=1),
    ):
        assert not torch.equal(found, other)


def test_student_attention_of_clean_images_does_not_depend_on_the_noise(run):
    images, labels = (part[:6] for part in open_dataset(run.study.data).images("test"))
    one, other = (student_attention(run, 8, 1, images, labels, t=0.0, seed=seed) for seed in (0, 1))
    assert torch.equal(one, other)


def test_token_maps_are_one_distribution_per_source_and_query(run, teacher):
    maps = pd.DataFrame(token_maps([run], teacher, QUERIES, count=20))
    assert list(maps["source"].unique()) == ["teacher", "atta"]
    sums = maps.groupby(["source", "query"])["probability"].agg(["sum", "count"])
    assert sorted(sums.index) == sorted((source, query) for source in ("teacher", "atta") for query in QUERIES)
    assert sums["sum"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert (sums["count"] == 16).all()
    assert (maps["probability"] >= 0).all()
    assert set(maps["n"]) == {20}


def test_token_maps_show_the_last_aligned_pair_of_layers(run, teacher):
    maps = pd.DataFrame(token_maps([run], teacher, QUERIES, count=20)).set_index("source")
    assert set(maps.loc["teacher", "block"]) == {2}
    assert set(maps.loc["atta", "block"]) == {2}


def test_token_maps_put_the_divergence_beside_the_map(run, teacher):
    maps = pd.DataFrame(token_maps([run], teacher, QUERIES, count=20))
    apart = maps.groupby("source")["divergence"].unique()
    assert list(apart["teacher"]) == [0]
    assert len(apart["atta"]) == 1
    images, labels = (part[:20] for part in open_dataset(run.study.data).images("test"))
    target = probabilities(teacher(images, (2,)).qk[2])
    student = student_attention(run, 8, 2, images, labels, t=0.5)
    assert apart["atta"][0] == pytest.approx(divergence(target, student))
    shown = maps[(maps["source"] == "teacher") & (maps["query"] == 5)].sort_values("key")["probability"]
    assert shown.to_numpy() == pytest.approx(target[0, :, 5].mean(0).numpy(), abs=1e-6)


def test_teacher_maps_show_every_block(teacher, tiny):
    maps = teacher_maps(teacher, open_dataset(tiny.data), QUERIES)
    assert list(maps["source"].unique()) == [f"block {b}" for b in range(4)]
    assert maps.groupby(["source", "query"])["probability"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    assert (maps["divergence"] == 0).all()


def test_alignment_brings_attention_closer_to_the_teacher(output, make_study, teacher):
    study = make_study(
        "train.ema_decay=0.5", "train.steps=60", "train.keep=[60]", "train.lr=0.003", "train.checkpoint_every=60",
        "arms.atta.alignment.lambda_attention=5",
    )  # fmt: skip
    runs = [Run(study, arm, 0) for arm in ("vanilla", "atta")]
    for chosen in runs:
        training.fit(chosen, progress=False)
    apart = pd.DataFrame(token_maps(runs, teacher, [5], count=50)).groupby("source")["divergence"].first()
    assert apart["atta"] < 0.7 * apart["vanilla"]


def test_token_maps_follow_an_arm_that_pairs_other_layers(output, make_study, teacher):
    # An arm may override the pairing; showing another block than the aligned one would mislead.
    study = make_study("arms.atta.alignment.layer_pairs=[[0, 3]]")
    chosen = Run(study, "atta", 0)
    training.fit(chosen, progress=False)
    maps = pd.DataFrame(token_maps([chosen], teacher, QUERIES, count=10)).set_index("source")
    assert set(maps.loc["atta", "block"]) == {0}


def test_token_maps_average_the_heads_an_arm_aligns(output, make_study, teacher):
    study = make_study("alignment.heads=[1, 3]")
    chosen = Run(study, "atta", 0)
    training.fit(chosen, progress=False)
    maps = pd.DataFrame(token_maps([chosen], teacher, [5], count=10)).set_index("source")
    images, labels = (part[:10] for part in open_dataset(study.data).images("test"))
    target = probabilities(teacher(images, (2,)).qk[2])[:, [1, 3]]
    student = student_attention(chosen, 12, 2, images, labels, t=0.5)[:, [1, 3]]
    assert maps.loc["teacher", "probability"].to_numpy() == pytest.approx(target[0, :, 5].mean(0).numpy(), abs=1e-6)
    assert maps.loc["atta", "probability"].to_numpy() == pytest.approx(student[0, :, 5].mean(0).numpy(), abs=1e-6)
    assert maps.loc["atta", "divergence"].iloc[0] == pytest.approx(divergence(target, student))


@pytest.mark.filterwarnings("ignore:token grids differ")
def test_token_maps_of_a_teacher_with_another_grid_are_on_the_students(output, make_study):
    study = make_study(
        "teacher.kwargs={img_size: 12, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 4, num_heads: 4}"
    )
    chosen, other = Run(study, "atta", 0), build_teacher(study.teacher)
    training.fit(chosen, progress=False)
    assert other.grid == (3, 3)
    maps = pd.DataFrame(token_maps([chosen], other, count=10))
    assert set(maps["query"]) == {5, 6, 10}
    assert (maps.groupby(["source", "query"])["key"].agg(list).map(len) == 16).all()
    assert maps.groupby(["source", "query"])["probability"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    images, labels = (part[:10] for part in open_dataset(study.data).images("test"))
    target = resample_attention(probabilities(other(images, (2,)).qk[2]), (3, 3), (4, 4))
    student = student_attention(chosen, 12, 2, images, labels, t=0.5)
    apart = maps.groupby("source")["divergence"].first()
    assert apart["atta"] == pytest.approx(divergence(target, student))
    shown = maps[(maps["source"] == "teacher") & (maps["query"] == 6)]["probability"]
    assert shown.to_numpy() == pytest.approx(target[0, :, 6].mean(0).numpy(), abs=1e-6)
    assert len(attention_maps(maps, images[0, 0].numpy()).axes) == 9


def test_an_arm_with_another_patch_is_shown_on_the_studys_grid_and_compared_on_its_own(output, make_study):
    study = make_study("arms.atta.model.patch=4")
    chosen, teacher = Run(study, "atta", 0), build_teacher(study.teacher)
    with pytest.warns(UserWarning, match="student 2x2, teacher 4x4"):
        training.fit(chosen, progress=False)
    maps = pd.DataFrame(token_maps([chosen], teacher, [5], count=10))
    assert (maps.groupby("source")["key"].agg(list).map(len) == 16).all()
    images, labels = (part[:10] for part in open_dataset(study.data).images("test"))
    target = resample_attention(probabilities(teacher(images, (2,)).qk[2]), (4, 4), (2, 2))
    student = student_attention(chosen, 12, 2, images, labels, t=0.5)
    assert student.shape == (10, 4, 4, 4)
    assert maps.groupby("source")["divergence"].first()["atta"] == pytest.approx(divergence(target, student))
