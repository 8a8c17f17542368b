from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from haste_core import figures, training
from haste_core.alignment import attention_logits, attention_loss, attention_probabilities
from haste_core.analysis import probe, scene
from haste_core.analysis.attention import student_attention
from haste_core.analysis.attention_similarity import (
    alike,
    attention_distance,
    cross_entropy,
    entropy,
    jensen_shannon,
    measure,
    own_statistics,
    top_k_overlap,
)
from haste_core.analysis.cross_effects import cross_effects, feature_fit
from haste_core.analysis.scene import Scene, other_images
from haste_core.analysis.token_maps import by_arm, token_map_table
from haste_core.errors import HasteError
from haste_core.study.runs import Run
from haste_core.token_grids import resample_attention

GRID = (2, 3)
FACTS = ["step", "t", "n", "student_block", "teacher_block", "baseline", "head", "measure", "value"]


def maps(seed, heads=2, tokens=6, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(5, heads, tokens, tokens, generator=generator, dtype=torch.float64)).softmax(-1)


def uniform(heads=2, tokens=6):
    return torch.full((5, heads, tokens, tokens), 1 / tokens, dtype=torch.float64)


def each_pair(p):
    """(image, head, query, key) of every place of p."""
    return np.ndindex(*p.shape)


def test_equal_maps_are_as_alike_as_can_be():
    p = maps(0)
    assert jensen_shannon(p, p).tolist() == [0, 0]
    assert top_k_overlap(p, p, 2).tolist() == [1, 1]
    torch.testing.assert_close(cross_entropy(p, p), entropy(p))


def test_cross_entropy_is_entropy_plus_the_kullback_leibler_divergence():
    p, q = maps(0), maps(1)
    apart = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1).mean((0, 2))
    assert (apart > 0.1).all()
    torch.testing.assert_close(cross_entropy(p, q), entropy(p) + apart)


def test_cross_entropy_over_heads_is_the_attention_loss():
    generator = torch.Generator().manual_seed(0)
    (q, k), (q_t, k_t) = (torch.randn(2, 3, 4, 6, 8, generator=generator) for _ in range(2))
    found = cross_entropy(attention_probabilities(q_t, k_t), attention_probabilities(q, k))
    assert float(found.mean()) == pytest.approx(float(attention_loss((q, k), (q_t, k_t))), rel=1e-6)


def test_what_neither_looks_at_counts_nothing_and_what_the_student_misses_counts_all():
    one, other = (torch.tensor([[[row]]]) for row in ([1.0, 0.0], [0.0, 1.0]))
    assert cross_entropy(one, one).tolist() == [0]
    assert cross_entropy(one, other).tolist() == [math.inf]


def test_disjoint_maps_are_log_two_apart_and_share_nothing():
    one, other = torch.eye(6).expand(5, 2, 6, 6), torch.eye(6).roll(1, 0).expand(5, 2, 6, 6)
    torch.testing.assert_close(jensen_shannon(one, other), torch.full((2,), math.log(2), dtype=torch.float64))
    assert top_k_overlap(one, other, 1).tolist() == [0, 0]


def test_jensen_shannon_agrees_with_scipys():
    p, q = maps(0), maps(1)
    expected = torch.from_numpy(jensenshannon(p.numpy(), q.numpy(), axis=-1) ** 2).mean((0, 2))
    torch.testing.assert_close(jensen_shannon(p, q), expected)
    torch.testing.assert_close(jensen_shannon(p, q), jensen_shannon(q, p))


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_overlap_counts_the_keys_both_put_first(k):
    p, q = maps(0), maps(1)
    expected = np.zeros(2)
    for image, head, query in np.ndindex(5, 2, 6):
        first = [set(np.argsort(-m[image, head, query].numpy())[:k]) for m in (p, q)]
        expected[head] += len(first[0] & first[1]) / k / 30
    assert top_k_overlap(p, q, k).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_uniform_attention_overlaps_as_chance_would(k):
    assert top_k_overlap(maps(0), uniform(), k).numpy() == pytest.approx(k / 6)
    assert top_k_overlap(uniform(), uniform(), k).numpy() == pytest.approx(k / 6)


def test_overlap_of_ties_is_what_drawing_among_them_gives():
    teacher = torch.tensor([[[[0.5, 0.3, 0.1, 0.1]]]])
    student = torch.tensor([[[[0.4, 0.2, 0.2, 0.2]]]])  # one sure key, then one of three
    assert float(top_k_overlap(teacher, student, 2)) == pytest.approx((1 + 1 / 3) / 2)


@pytest.mark.parametrize("k", [0, 7])
def test_overlap_of_keys_that_do_not_exist_is_an_error(k):
    with pytest.raises(HasteError, match=f"top {k} of 6 keys; possible: 1 to 6"):
        top_k_overlap(maps(0), maps(1), k)


def test_entropy_of_uniform_attention_is_log_n_and_of_one_key_zero():
    assert entropy(uniform()).numpy() == pytest.approx(math.log(6))
    assert entropy(torch.eye(6).expand(5, 2, 6, 6)).tolist() == [0, 0]


def test_distance_by_loops_over_rows_and_columns():
    p, expected = maps(0), np.zeros(2)
    for image, head, query, key in each_pair(p):
        apart = math.dist(divmod(query, GRID[1]), divmod(key, GRID[1]))
        expected[head] += float(p[image, head, query, key]) * apart / (5 * 6)
    assert attention_distance(p, GRID).numpy() == pytest.approx(expected)
    assert attention_distance(p, (3, 2)).numpy() != pytest.approx(expected)


@pytest.mark.parametrize("grid", [GRID, (1, 6), (8, 8)])
def test_distance_to_oneself_is_zero(grid):
    tokens = grid[0] * grid[1]
    assert attention_distance(torch.eye(tokens).expand(2, 3, tokens, tokens), grid).tolist() == [0, 0, 0]


def test_distance_on_a_grid_of_another_size_is_an_error():
    with pytest.raises(HasteError, match="6 tokens do not fill a 2x2 grid"):
        attention_distance(maps(0), (2, 2))


def test_the_order_of_images_does_not_matter():
    p, q, order = maps(0), maps(1), torch.tensor([3, 1, 4, 0, 2])
    for name, value in alike(p[order], q[order]).items():
        torch.testing.assert_close(value, alike(p, q)[name])
    for statistic in (entropy, lambda m: attention_distance(m, GRID)):
        torch.testing.assert_close(statistic(p[order]), statistic(p))


def test_every_number_is_float64_whatever_comes_in():
    p, q = maps(0).float(), maps(1).float()
    found = [*alike(p, q).values(), entropy(p), attention_distance(p, GRID)]
    assert {value.dtype for value in found} == {torch.float64}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_other_image_is_never_the_same_and_every_image_is_one(count):
    other = other_images(count, seed=0).tolist()
    assert sorted(other) == list(range(count))
    assert all(i != o for i, o in enumerate(other))
    assert other == other_images(count, seed=0).tolist()


def test_one_image_has_no_other():
    with pytest.raises(HasteError, match="n is 1; possible: 2 and above"):
        other_images(1, 0)


def tokens(seed, width, images=40, places=9):
    return torch.randn(images, places, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_linear_map_of_the_tokens_is_explained_whatever_their_scale(scale):
    x = tokens(0, 5)
    assert feature_fit(scale * x, x @ tokens(1, 7, 1, 5)[0] + 3) == pytest.approx(1, abs=1e-6)


def test_independent_tokens_explain_nothing():
    assert -0.2 < feature_fit(tokens(0, 5), tokens(1, 7)) < 0.01


def test_fit_is_the_least_squares_solution_scored_on_images_it_has_not_seen():
    x, noise = tokens(0, 5), tokens(2, 3)
    y = x @ tokens(1, 3, 1, 5)[0] + noise
    design = [torch.cat([part, torch.ones(len(part), 1)], 1) for part in (x[h::2].reshape(-1, 5) for h in (0, 1))]
    fit, scored = y[0::2].reshape(-1, 3), y[1::2].reshape(-1, 3)
    left = scored - design[1] @ torch.linalg.lstsq(design[0], fit).solution
    expected = 1 - float((left**2).sum() / ((scored - scored.mean(0)) ** 2).sum())
    assert 0.3 < expected < 0.95
    assert feature_fit(x, y) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shape", [(40, 4, 3), (39, 9, 3)])
def test_tokens_that_do_not_belong_together_are_an_error(shape):
    with pytest.raises(HasteError, match="possible: the same two or more images"):
        feature_fit(tokens(0, 5), torch.zeros(shape))


@pytest.fixture
def trained(output, make_study):
    def train(arm, *more):
        study = make_study(
            "train.ema_decay=0.5", "train.steps=8", "train.keep=[]", "analysis.n=20", "analysis.timesteps=[0.1, 0.6]",
            *more,
        )  # fmt: skip
        run = Run(study, arm, 0)
        training.fit(run, progress=False)
        return run

    return train


def whole(baseline, table, *by):
    """Values by `by` of the rows of one baseline."""
    return table[table["baseline"] == baseline].set_index(list(by))["value"]


def test_measure_has_a_row_for_each_pair_head_step_and_level(trained):
    table = measure(trained("atta"))
    assert list(table.columns) == FACTS
    assert set(zip(table["student_block"], table["teacher_block"], strict=True)) == {(1, 1), (2, 2)}
    assert set(table["n"]) == {20}
    counts = table["baseline"].value_counts()
    # 2 steps, 2 levels, 2 pairs, 4 heads, 3 measures; the references once per pair and head.
    assert counts.to_dict() == {"none": 96, "shuffled": 96, "uniform": 24, "teacher": 24}
    assert not table.duplicated([c for c in FACTS if c != "value"]).any()
    assert np.isfinite(table["value"]).all()


def test_measure_is_the_same_again_to_the_bit_and_in_parts_nearly(trained, monkeypatch):
    run = trained("atta")
    table = measure(run)
    pd.testing.assert_frame_equal(table, measure(run))
    monkeypatch.setattr(scene, "MAP_NUMBERS", 4 * 16**2 * 7)  # seven images at a time
    pd.testing.assert_frame_equal(table, measure(run), rtol=1e-12)


def test_measure_compares_what_the_student_sees_with_the_teachers_map(trained):
    run = trained("atta")
    batch, teacher = probe.held_out(run), training.find_teacher(run.study, run.config.teacher)
    seen = probe.look(probe.student_at(run, 8), batch.x, 0.6, probe.Taps(blocks=(2,)), seed=0)
    # In float64: tiny networks look nearly everywhere alike, and float32 makes ties of it.
    student, target = (
        attention_logits(*both.qk[2]).double().softmax(-1) for both in (seen, teacher(batch.images, (2,)))
    )
    other = other_images(20, 0)
    table = measure(run)
    table = table[(table["student_block"] == 2) & table["step"].isin([0, 8]) & table["t"].isin([0.0, 0.6])]
    for baseline, step, p, q in (
        ("none", 8, target, student),
        ("shuffled", 8, target[other], student),
        ("teacher", 0, target, target),
        ("uniform", 0, target, torch.full_like(target, 1 / 16)),
    ):
        found = whole(baseline, table[table["step"] == step], "measure")
        for name, value in alike(p, q).items():
            assert found[name].to_numpy() == pytest.approx(value.numpy(), abs=1e-6)


def test_baselines_are_ordered_as_they_must_be(trained):
    means = measure(trained("atta")).groupby(["baseline", "measure"])["value"].mean()
    assert means["teacher", "jensen_shannon"] == 0
    assert means["teacher", "top_k_overlap"] == 1
    assert means["uniform", "top_k_overlap"] == pytest.approx(2 / 16)
    assert means["uniform", "cross_entropy"] == pytest.approx(math.log(16))
    assert means["teacher", "cross_entropy"] < means["none", "cross_entropy"]


def test_an_arm_without_alignment_is_looked_at_where_the_study_aligns(trained):
    table = measure(trained("vanilla", "alignment.heads=[1, 3]"))
    assert set(zip(table["student_block"], table["teacher_block"], strict=True)) == {(1, 1), (2, 2)}
    assert set(table["head"]) == {1, 3}


UNEQUAL = "teacher.kwargs={img_size: 12, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 4, num_heads: 4}"


@pytest.mark.filterwarnings("ignore:token grids differ")
def test_a_teacher_with_another_grid_is_compared_on_the_students(trained):
    run = trained("haste", UNEQUAL, "arms.haste.termination.at=4", "analysis.timesteps=[0.5]")
    table, looked = measure(run), Scene(run)
    assert (looked.grid, looked.teacher_grid) == ((4, 4), (3, 3))
    teacher = training.find_teacher(run.study, run.config.teacher)
    coarse = attention_probabilities(*teacher(looked.batch.images, (2,)).qk[2])
    target = resample_attention(coarse, (3, 3), (4, 4))
    torch.testing.assert_close(looked.teacher_maps(2, torch.arange(20)).float(), target)
    floor = whole("teacher", table[table["measure"] == "cross_entropy"], "teacher_block")
    assert floor[2].to_numpy() == pytest.approx(entropy(target).numpy(), abs=1e-5)
    effects = cross_effects(run)
    assert np.isfinite(effects["value"]).all()
    own = own_statistics(run)
    assert own[own["source"] == "teacher"]["value"].notna().all()
    shown = token_map_table(run, 1, 0, 0.5, 15)
    assert shown.groupby("source")["probability"].agg(["sum", "count"]).to_numpy() == pytest.approx(
        np.array([[1, 16], [1, 16]]), abs=1e-5
    )


def test_own_statistics_tell_of_every_block_and_head_of_both(trained, monkeypatch):
    run = trained("vanilla")
    table = own_statistics(run)
    counts = table.groupby(["source", "measure"]).size()
    # 2 steps, 2 levels, 3 blocks, 4 heads; 4 blocks of 4 heads; one line.
    assert counts.to_dict() == {
        (source, name): count
        for source, count in (("student", 48), ("teacher", 16), ("uniform", 1))
        for name in ("entropy", "distance")
    }
    batch = probe.held_out(run)
    maps = student_attention(run, 8, 0, batch.x, torch.full((20,), 10), 0.6)
    chosen = table[(table["source"] == "student") & (table["step"] == 8) & (table["t"] == 0.6) & (table["block"] == 0)]
    found = chosen.pivot(index="head", columns="measure", values="value")
    assert found["entropy"].to_numpy() == pytest.approx(entropy(maps).numpy(), abs=1e-6)
    assert found["distance"].to_numpy() == pytest.approx(attention_distance(maps, (4, 4)).numpy(), abs=1e-6)
    assert table["value"][table["measure"] == "entropy"].max() <= math.log(16) + 1e-9
    monkeypatch.setattr("haste_core.analysis.attention_similarity.QK_NUMBERS", 1)  # block after block
    pd.testing.assert_frame_equal(table, own_statistics(run))


def test_cross_effects_put_both_sides_in_one_table(trained):
    run = trained("repa")
    table = cross_effects(run)
    assert list(table.columns) == ["step", "t", "n", "side", "measure", "baseline", "value"]
    features, attention = (table[table["side"] == side] for side in ("features", "attention"))
    assert set(features["n"]) == {10}
    assert len(features) == 2 * 2 * 2
    expected = measure(run).groupby(["step", "t", "measure", "baseline"])["value"].mean()
    found = attention.set_index(["step", "t", "measure", "baseline"])["value"]
    pd.testing.assert_series_equal(found.sort_index(), expected.sort_index())
    looked = Scene(run)
    seen = looked.student(8, 0.1, probe.Taps(depths=(2,))).tokens[2]
    value = whole("none", features, "step", "t")[8, 0.1]
    assert value == pytest.approx(feature_fit(seen, looked.teacher.tokens), abs=1e-9)
    assert value <= 1
    # At the start and near the data the teacher's tokens are partly a linear map of the patches.
    assert whole("none", features, "step", "t")[0, 0.1] > whole("shuffled", features, "step", "t")[0, 0.1]


def test_token_maps_are_the_students_and_the_teachers_of_one_token(trained):
    run = trained("atta")
    table = token_map_table(run, block=2, head=3, t=0.6, query=5)
    batch, teacher = probe.held_out(run, 1), training.find_teacher(run.study, run.config.teacher)
    student = student_attention(run, 8, 2, batch.x, torch.full((1,), 10), 0.6)[0, 3, 5]
    target = attention_probabilities(*teacher(batch.images, (2,)).qk[2])[0, 3, 5]
    for source, expected in (("student", student), ("teacher", target)):
        chosen = table[table["source"] == source]
        assert (chosen["row"] * 4 + chosen["column"]).tolist() == list(range(16))
        assert chosen["probability"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    # A block that is not aligned stands beside the teacher's at its relative depth.
    first = token_map_table(run, block=0, head=0, t=0.6, query=5)
    assert first.groupby("source")["block"].first().to_dict() == {"student": 0, "teacher": 0}
    assert not token_map_table(run, 2, 3, 0.6, 5, step=0).equals(table)


@pytest.mark.parametrize(("place", "message"), [
    ((3, 0, 0.6, 0), "unknown block '3'; possible: 0, 1, 2"), ((0, 0, 0.6, 16), "unknown query '16'"),
    ((0, 4, 0.6, 0), "unknown head '4'; possible: 0, 1, 2, 3"),
])  # fmt: skip
def test_a_place_that_does_not_exist_is_an_error(trained, place, message):
    with pytest.raises(HasteError, match=message):
        token_map_table(trained("vanilla"), *place)


def test_every_table_has_its_picture(trained):
    run = trained("haste", "arms.haste.termination.at=4")
    alike_rows, own, effects = (f(run) for f in (measure, own_statistics, cross_effects))
    for rows in (alike_rows, own, effects):
        rows.insert(0, "seed", 0)
        rows.insert(0, "arm", "haste")
    assert len(figures.attention_similarity(alike_rows, 4).axes) == 3
    found = figures.head_map(alike_rows, "jensen_shannon", 8, 0.6).axes[0]
    chosen = alike_rows[(alike_rows["measure"] == "jensen_shannon") & (alike_rows["baseline"] == "none")]
    chosen = chosen[(chosen["step"] == 8) & (chosen["t"] == 0.6)].sort_values(["student_block", "head"])
    assert np.asarray(found.images[0].get_array()).ravel() == pytest.approx(chosen["value"].to_numpy())
    assert len(figures.head_statistics(own, 8, 0.6).axes) == 2
    left, right = figures.cross_effects(effects, 4).axes
    drawn = left.lines[0].get_ydata()
    mean = effects[(effects["measure"] == "jensen_shannon") & (effects["baseline"] == "none")].groupby("step")["value"]
    assert drawn == pytest.approx(mean.mean().to_numpy())
    assert "R^2" in right.get_ylabel()
    maps = by_arm([run])(arm="haste", block=2, head=0, t=0.6, query=6)
    picture = figures.query_maps(maps, np.zeros((8, 8)))
    assert picture.axes[1].patches[0].get_xy() == (1.5, 0.5)
