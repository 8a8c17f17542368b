"""Similarity of student and teacher attention against definitions; its tables, token maps and pictures."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from haste_core import figures
from haste_core.alignment import attention_logits, attention_loss, attention_probabilities, resample_attention
from haste_core.analysis import attention, probe
from haste_core.analysis.attention import (
    attention_distance,
    attention_similarity,
    cross_effects,
    cross_entropy,
    entropy,
    feature_fit,
    head_maps,
    head_statistics,
    jensen_shannon,
    similarities,
    teacher_maps,
    token_maps,
    top_k_overlap,
)
from haste_core.errors import HasteError
from haste_core.study.data import open_dataset
from haste_core.study.notebook import drawn_from
from haste_core.study.pretrain import find_teacher
from haste_core.taps import Taps

GRID = (2, 3)
FACTS = ["step", "t", "n", "student_block", "teacher_block", "baseline", "head", "measure", "value"]


def maps(seed, heads=2, tokens=6, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(5, heads, tokens, tokens, generator=generator, dtype=torch.float64)).softmax(-1)


UNIFORM = torch.full((5, 2, 6, 6), 1 / 6, dtype=torch.float64)
ONE_KEY = torch.eye(6).expand(5, 2, 6, 6)

# -- the measures -----------------------------------------------------------------------------------------------------


def test_equal_maps_are_as_similar_as_can_be_and_disjoint_ones_share_nothing():
    p, other = maps(0), ONE_KEY.roll(1, -1)
    assert jensen_shannon(p, p).tolist() == [0, 0]
    assert top_k_overlap(p, p, 2).tolist() == [1, 1]
    torch.testing.assert_close(cross_entropy(p, p), entropy(p))
    torch.testing.assert_close(jensen_shannon(ONE_KEY, other), torch.full((2,), math.log(2), dtype=torch.float64))
    assert top_k_overlap(ONE_KEY, other, 1).tolist() == [0, 0]
    assert cross_entropy(ONE_KEY, ONE_KEY).tolist() == [0, 0]
    assert cross_entropy(ONE_KEY, other).tolist() == [math.inf] * 2
    assert entropy(UNIFORM).numpy() == pytest.approx(math.log(6))
    assert entropy(ONE_KEY).tolist() == [0, 0]


def test_cross_entropy_is_entropy_plus_divergence_and_its_mean_the_attention_loss():
    p, q = maps(0), maps(1)
    apart = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1).mean((0, 2))
    torch.testing.assert_close(cross_entropy(p, q), entropy(p) + apart)
    generator = torch.Generator().manual_seed(0)
    (q, k), (q_t, k_t) = (torch.randn(2, 3, 4, 6, 8, generator=generator) for _ in range(2))
    found = cross_entropy(attention_probabilities(q_t, k_t), attention_probabilities(q, k))
    assert float(found.mean()) == pytest.approx(float(attention_loss((q, k), (q_t, k_t))), rel=1e-6)


def test_jensen_shannon_agrees_with_scipys():
    p, q = maps(0), maps(1)
    expected = torch.from_numpy(jensenshannon(p.numpy(), q.numpy(), axis=-1) ** 2).mean((0, 2))
    torch.testing.assert_close(jensen_shannon(p, q), expected)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_overlap_counts_the_keys_both_put_first_and_ties_as_chance_would(k):
    p, q = maps(0), maps(1)
    expected = np.zeros(2)
    for image, head, query in np.ndindex(5, 2, 6):
        first = [set(np.argsort(-m[image, head, query].numpy())[:k]) for m in (p, q)]
        expected[head] += len(first[0] & first[1]) / k / 30
    assert top_k_overlap(p, q, k).numpy() == pytest.approx(expected)
    for other in (p, UNIFORM):
        assert top_k_overlap(other, UNIFORM, k).numpy() == pytest.approx(k / 6)
    teacher = torch.tensor([[[[0.5, 0.3, 0.1, 0.1]]]])
    student = torch.tensor([[[[0.4, 0.2, 0.2, 0.2]]]])  # one sure key, then one of three
    assert float(top_k_overlap(teacher, student, 2)) == pytest.approx((1 + 1 / 3) / 2)


def test_distance_by_loops_over_rows_and_columns():
    p, expected = maps(0), np.zeros(2)
    for image, head, query, key in np.ndindex(*p.shape):
        apart = math.dist(divmod(query, GRID[1]), divmod(key, GRID[1]))
        expected[head] += float(p[image, head, query, key]) * apart / (5 * 6)
    assert attention_distance(p, GRID).numpy() == pytest.approx(expected)
    assert attention_distance(torch.eye(64).expand(2, 3, 64, 64), (8, 8)).tolist() == [0, 0, 0]
    halves = [*similarities(p.float(), p.float()).values(), entropy(p.float()), attention_distance(p.float(), GRID)]
    assert {value.dtype for value in halves} == {torch.float64}


@pytest.mark.parametrize("count", [2, 10])
def test_the_other_image_is_never_the_same_and_every_image_is_one(count):
    other = probe.other_images(count, seed=0).tolist()
    assert sorted(other) == list(range(count))
    assert all(i != o for i, o in enumerate(other))
    assert other == probe.other_images(count, seed=0).tolist()
    with pytest.raises(HasteError, match="n is 1; expected at least 2"):
        probe.other_images(1, 0)


def tokens(seed, width, images=40, places=9):
    return torch.randn(images, places, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_linear_map_of_the_tokens_is_explained_whatever_their_scale(scale):
    x = tokens(0, 5)
    assert feature_fit(scale * x, x @ tokens(1, 7, 1, 5)[0] + 3) == pytest.approx(1, abs=1e-6)
    assert -0.2 < feature_fit(scale * x, tokens(1, 7)) < 0.01


def test_fit_is_the_least_squares_solution_scored_on_images_it_has_not_seen():
    x, noise = tokens(0, 5), tokens(2, 3)
    y = x @ tokens(1, 3, 1, 5)[0] + noise
    design = [torch.cat([part, torch.ones(len(part), 1)], 1) for part in (x[h::2].reshape(-1, 5) for h in (0, 1))]
    fit, scored = y[0::2].reshape(-1, 3), y[1::2].reshape(-1, 3)
    left = scored - design[1] @ torch.linalg.lstsq(design[0], fit).solution
    expected = 1 - float((left**2).sum() / ((scored - scored.mean(0)) ** 2).sum())
    assert 0.3 < expected < 0.95
    assert feature_fit(x, y) == pytest.approx(expected, abs=1e-4)


# -- tables of runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def atta(trained):
    """A trained run whose averaged weights follow the model closely, so that its attention is its own."""
    more = ["train.ema_decay=0.5", "train.steps=8", "train.keep=[]", "analysis.n=20", "analysis.timesteps=[0.1, 0.6]"]
    return trained("atta", *more)


@pytest.fixture(scope="module")
def table(atta):
    return attention_similarity(atta)


@pytest.fixture(scope="module")
def teacher(atta):
    return find_teacher(atta.study, atta.config.teacher)


def student_maps(run, block, x, t, labels=None):
    output = probe.student_output(probe.student_at(run, run.config.train.steps), x, t, Taps(blocks=(block,)), 0, labels)
    return attention_logits(*output.qk[block]).double().softmax(-1)


def whole(baseline, table, *by):
    """Values by `by` of the rows of one baseline."""
    return table[table["baseline"] == baseline].set_index(list(by))["value"]


def test_a_row_for_each_pair_head_step_and_level(table):
    assert list(table.columns) == FACTS
    assert set(zip(table["student_block"], table["teacher_block"], strict=True)) == {(1, 1), (2, 2)}
    assert set(table["n"]) == {20}
    # 2 steps, 2 levels, 2 pairs, 4 heads, 3 measures; the references once per pair and head.
    counts = table["baseline"].value_counts().to_dict()
    assert counts == {"none": 96, "shuffled": 96, "uniform": 24, "teacher": 24}
    assert not table.duplicated([c for c in FACTS if c != "value"]).any()
    means = table.groupby(["baseline", "measure"])["value"].mean()
    assert means["teacher", "jensen_shannon"] == 0
    assert means["teacher", "top_k_overlap"] == 1
    assert means["uniform", "top_k_overlap"] == pytest.approx(2 / 16)
    assert means["uniform", "cross_entropy"] == pytest.approx(math.log(16))
    assert means["teacher", "cross_entropy"] < means["none", "cross_entropy"]


def test_the_table_does_not_depend_on_how_many_maps_fit_into_memory(atta, table, monkeypatch):
    monkeypatch.setattr(probe, "MAP_NUMBERS", 4 * 16**2 * 7)  # seven images at a time
    pd.testing.assert_frame_equal(table, attention_similarity(atta), rtol=1e-12)


def test_the_students_map_is_compared_with_the_teachers(atta, table, teacher):
    batch = probe.held_out(atta)
    # In float64: maps of tiny networks are nearly uniform, and float32 makes ties of them.
    student = student_maps(atta, 2, batch.x, 0.6)
    target = attention_logits(*teacher(batch.images, (2,)).qk[2]).double().softmax(-1)
    rows = table[(table["student_block"] == 2) & table["step"].isin([0, 8]) & table["t"].isin([0.0, 0.6])]
    for baseline, step, p, q in (
        ("none", 8, target, student),
        ("shuffled", 8, target[probe.other_images(20, 0)], student),
        ("teacher", 0, target, target),
        ("uniform", 0, target, torch.full_like(target, 1 / 16)),
    ):
        found = whole(baseline, rows[rows["step"] == step], "measure")
        for name, value in similarities(p, q).items():
            assert found[name].to_numpy() == pytest.approx(value.numpy(), abs=1e-6)


def test_an_arm_without_alignment_is_compared_where_the_study_aligns(trained):
    found = attention_similarity(
        trained("vanilla", "train.steps=4", "train.keep=[]", "analysis.n=20", "alignment.heads=[1, 3]")
    )
    assert set(zip(found["student_block"], found["teacher_block"], strict=True)) == {(1, 1), (2, 2)}
    assert set(found["head"]) == {1, 3}


def test_statistics_of_every_block_and_head_of_both(atta, monkeypatch):
    found = head_statistics(atta)
    # 2 steps, 2 levels, 3 blocks, 4 heads; 4 blocks of 4 heads; one line.
    assert found.groupby(["source", "measure"]).size().to_dict() == {
        (source, name): count
        for source, count in (("student", 48), ("teacher", 16), ("uniform", 1))
        for name in ("entropy", "distance")
    }
    p = student_maps(atta, 0, probe.held_out(atta).x, 0.6)
    rows = found[(found["source"] == "student") & (found["step"] == 8) & (found["t"] == 0.6) & (found["block"] == 0)]
    by_head = rows.pivot(index="head", columns="measure", values="value")
    assert by_head["entropy"].to_numpy() == pytest.approx(entropy(p).numpy(), abs=1e-6)
    assert by_head["distance"].to_numpy() == pytest.approx(attention_distance(p, (4, 4)).numpy(), abs=1e-6)
    monkeypatch.setattr(attention, "QK_NUMBERS", 1)  # block after block
    pd.testing.assert_frame_equal(found, head_statistics(atta))


def test_cross_effects_hold_attention_and_features(atta, table):
    found = cross_effects(atta)
    assert list(found.columns) == ["step", "t", "n", "side", "measure", "baseline", "value"]
    features, maps_side = (found[found["side"] == side] for side in ("features", "attention"))
    assert set(features["n"]) == {10}
    assert len(features) == 2 * 2 * 2
    keys = ["step", "t", "measure", "baseline"]
    pd.testing.assert_series_equal(
        maps_side.set_index(keys)["value"].sort_index(), table.groupby(keys)["value"].mean().sort_index()
    )
    both = probe.StudentTeacher(atta)
    value = whole("none", features, "step", "t")
    expected = feature_fit(both.student(8, 0.1, Taps(depths=(2,))).tokens[2], both.teacher.tokens)
    assert value[8, 0.1] == pytest.approx(expected, abs=1e-9)
    # At the start and near the data the teacher's tokens are partly a linear map of the patches.
    assert 1 >= value[0, 0.1] > whole("shuffled", features, "step", "t")[0, 0.1]


# -- maps of single tokens --------------------------------------------------------------------------------------------

UNEQUAL = "teacher.kwargs={img_size: 12, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 4, num_heads: 4}"


@pytest.mark.filterwarnings("ignore:token grids differ")
@pytest.mark.parametrize(
    ("changes", "heads", "grid", "teacher_grid"),
    [
        (["alignment.heads=[1, 3]", "arms.atta.alignment.layer_pairs=[[0, 3]]"], [1, 3], (4, 4), (4, 4)),
        ([UNEQUAL], [0, 1, 2, 3], (4, 4), (3, 3)),
        (["arms.atta.model.patch=4"], [0, 1, 2, 3], (2, 2), (4, 4)),
    ],
    ids=["own pair and heads", "teacher's grid", "arm's grid"],
)
def test_token_maps_are_means_over_aligned_heads_on_the_studys_grid(trained, changes, heads, grid, teacher_grid):
    more = ["train.ema_decay=0.5", "train.steps=4", "train.keep=[]", "analysis.n=20", "analysis.timesteps=[0.5]"]
    expects = pytest.warns(UserWarning, match="student 2x2, teacher 4x4")
    with expects if grid == (2, 2) else nullcontext():
        run = trained("atta", *more, *changes)
    teacher, (student_block, teacher_block) = find_teacher(run.study), run.config.alignment.layer_pairs[-1]
    found = pd.DataFrame(token_maps([run], teacher, [5, 6], count=10))
    blocks = found.groupby("source", sort=False)["block"].unique().map(list).to_dict()
    assert blocks == {"teacher": [teacher_block], "atta": [student_block]}
    assert set(found["n"]) == {10}
    sums = found.groupby(["source", "query"])["probability"].agg(["sum", "count"])
    assert sums.to_numpy() == pytest.approx(np.array([[1, 16]] * 4), abs=1e-5)
    images, labels = (part[:10] for part in open_dataset(run.study.data).images("test"))
    coarse = attention_probabilities(*teacher(images, (teacher_block,)).qk[teacher_block])[:, heads]
    student = student_maps(run, student_block, images, 0.5, labels)[:, heads]
    target = resample_attention(coarse, teacher_grid, grid).double()
    divergence = (target * (target.log() - student.log())).sum(-1).mean()
    apart = found.groupby("source")["divergence"].first()
    assert (apart["teacher"], apart["atta"]) == (0, pytest.approx(float(divergence), rel=1e-4))
    for source, p, own in (("teacher", coarse, teacher_grid), ("atta", student, grid)):
        shown = found[(found["source"] == source) & (found["query"] == 6)]["probability"]
        expected = resample_attention(p[:1].float(), own, (4, 4))[0, :, 6].mean(0)
        assert shown.to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert len(figures.attention_maps(found, images[0, 0].numpy()).axes) == 6
    assert np.isfinite(cross_effects(run)["value"]).all()
    views = {"atta": probe.StudentTeacher(run, every_block=True, n=1)}
    shown = head_maps(views, "atta", 1, 0, 0.5, 3).groupby("source")["probability"].agg(["sum", "count"])
    assert shown.to_numpy() == pytest.approx(np.array([[1, math.prod(grid)]] * 2), abs=1e-5)


def test_teacher_maps_show_every_block(teacher, tiny):
    found = teacher_maps(teacher, open_dataset(tiny.data))
    assert list(found["source"].unique()) == [f"block {b}" for b in range(4)]
    assert found.groupby(["source", "query"])["probability"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    assert (found["divergence"] == 0).all()


def test_alignment_brings_attention_closer_to_the_teacher(trained, teacher):
    more = [
        "train.ema_decay=0.5", "train.steps=40", "train.keep=[40]", "train.lr=0.005", "train.checkpoint_every=40",
        "arms.atta.alignment.lambda_attention=5",
    ]  # fmt: skip
    found = pd.DataFrame(token_maps([trained(arm, *more) for arm in ("vanilla", "atta")], teacher, [5], count=50))
    apart = found.groupby("source")["divergence"].first()
    assert apart["atta"] < 0.7 * apart["vanilla"]


def test_arms_that_read_similarities_are_shown_beside_a_teacher_of_fewer_heads(trained):
    more = [
        "teacher.kwargs.num_heads=2", "arms.atta.alignment.attention_from=similarity", "train.steps=4",
        "train.keep=[4]", "claims.early=4",
    ]  # fmt: skip
    runs = [trained(arm, *more) for arm in ("vanilla", "atta")]
    found = pd.DataFrame(token_maps(runs, find_teacher(runs[0].study), [5], count=10))
    assert list(found["source"].unique()) == ["teacher", "vanilla", "atta"]
    assert probe.StudentTeacher(runs[0]).heads == [0, 1]
    assert probe.StudentTeacher(runs[1]).heads == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def views(atta):
    return {"atta": probe.StudentTeacher(atta, every_block=True, n=1)}


def test_head_maps_are_the_students_and_the_teachers_of_one_token(atta, teacher, views):
    found = head_maps(views, "atta", block=2, head=3, t=0.6, query=5)
    batch = probe.held_out(atta, 1)
    target = attention_probabilities(*teacher(batch.images, (2,)).qk[2])
    for source, expected in (("student", student_maps(atta, 2, batch.x, 0.6)), ("teacher", target)):
        chosen = found[found["source"] == f"{source}\nblock 2, head 3"]
        assert chosen["key"].tolist() == list(range(16))
        assert chosen["probability"].to_numpy() == pytest.approx(expected[0, 3, 5].numpy(), abs=1e-6)
    # A block that is not aligned is compared with the teacher's at its relative depth.
    first = head_maps(views, "atta", block=0, head=0, t=0.6, query=5)
    assert set(first["source"]) == {"student\nblock 0, head 0", "teacher\nblock 0, head 0"}
    with pytest.raises(HasteError, match="block"):
        head_maps(views, "atta", 3, 0, 0.6, 0)


def test_every_table_has_its_picture(atta, table, views):
    similarity, own, effects = (
        rows.assign(arm="atta", seed=0) for rows in (table, head_statistics(atta), cross_effects(atta))
    )
    assert len(figures.attention_similarity(similarity, 4).axes) == 3
    found = figures.head_map(similarity, "jensen_shannon", 8, 0.6).axes[0]
    chosen = similarity[(similarity["measure"] == "jensen_shannon") & (similarity["baseline"] == "none")]
    chosen = chosen[(chosen["step"] == 8) & (chosen["t"] == 0.6)].sort_values(["student_block", "head"])
    assert np.asarray(found.images[0].get_array()).ravel() == pytest.approx(chosen["value"].to_numpy())
    assert len(figures.head_statistics(own, 8, 0.6).axes) == 2
    left, right = figures.cross_effects(effects, 4).axes
    mean = effects[(effects["measure"] == "jensen_shannon") & (effects["baseline"] == "none")].groupby("step")["value"]
    assert left.lines[0].get_ydata() == pytest.approx(mean.mean().to_numpy())
    assert "R^2" in right.get_ylabel()
    draw = drawn_from(partial(attention.head_maps, views), partial(figures.attention_maps, image=np.zeros((8, 8))))
    picture = draw(arm="atta", block=2, head=0, t=0.6, query=6)
    assert picture.axes[1].patches[0].get_xy() == (1.5, 0.5)
