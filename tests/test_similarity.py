from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch

from haste_core.analysis import probe, similarity
from haste_core.analysis.kernels import Kernels, drawn_again, resampled_hsic
from haste_core.errors import HasteError
from haste_core.figures import similarity as pictures
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.train import fit


def features(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n=24, seed=0):
    x = features(n, 6, seed)
    return x, torch.cat([x[:, :3] @ features(3, 4, seed + 1), 0.7 * features(n, 2, seed + 2)], 1)


def grams(x, y):
    return (x @ x.T).numpy(), (y @ y.T).numpy()


def hsic_1(k, m):
    """Eq. 5 of Song et al. 2012, with the ones written out."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def hsic_1_by_tuples(k, m, w=None):
    """HSIC_1 as means over all tuples of distinct images, each counted as often as it is drawn."""
    n = len(k)
    w = np.ones(n) if w is None else w
    total = 0.0
    for size, factor in ((2, 1), (3, -2), (4, 1)):
        chosen = np.array(list(permutations(range(n), size)))
        weight = w[chosen].prod(1)
        i, j = chosen[:, 0], chosen[:, 1]
        other = {2: (i, j), 3: (i, chosen[:, -1]), 4: (chosen[:, -2], chosen[:, -1])}[size]
        total += factor * (weight * k[i, j] * m[other]).sum() / weight.sum()
    return total


def neighbours(x, k):
    unit = x / x.norm(dim=1, keepdim=True)
    found = []
    for i in range(len(x)):
        near = sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        found.append(set(near[:k]))
    return found


# -- the measures against their definitions ---------------------------------------------------------------------------


def test_biased_cka_with_centring_matrices():
    x, y = related()
    k, m = grams(x, y)
    h = np.eye(24) - np.ones((24, 24)) / 24
    cross, own_k, own_l = (np.trace(a @ h @ b @ h) for a, b in ((k, m), (k, k), (m, m)))
    assert similarity.linear_cka_biased(x, y) == pytest.approx(cross / np.sqrt(own_k * own_l), rel=1e-12)


def test_unbiased_cka_by_the_formula():
    x, y = related()
    k, m = grams(x + 3, y)
    expected = hsic_1(k, m) / np.sqrt(hsic_1(k, k) * hsic_1(m, m))
    assert similarity.linear_cka(x + 3, y) == pytest.approx(expected, rel=1e-10)


def test_unbiased_cka_by_all_tuples_of_distinct_images():
    x, y = related(7)
    k, m = grams(x, y)
    expected = hsic_1_by_tuples(k, m) / np.sqrt(hsic_1_by_tuples(k, k) * hsic_1_by_tuples(m, m))
    assert similarity.linear_cka(x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("k", [2, 5, 23])
def test_cknna_by_loops(k):
    x, y = related()

    def local(a, b):
        near_a, near_b = neighbours(a, k), neighbours(b, k)
        p, q = np.zeros((24, 24)), np.zeros((24, 24))
        for i in range(24):
            for j in near_a[i] & near_b[i]:
                p[i, j], q[i, j] = (float(torch.cosine_similarity(s[i], s[j], dim=0)) for s in (a, b))
        return hsic_1(p, q)

    expected = local(x, y) / np.sqrt(local(x, x) * local(y, y))
    assert similarity.cknna(x, y, k) == pytest.approx(expected, rel=1e-10)


def test_cknna_with_all_neighbours_is_the_unbiased_cka_of_normalised_features():
    x, y = related()
    whole = similarity.linear_cka(*(s / s.norm(dim=1, keepdim=True) for s in (x, y)))
    assert similarity.cknna(x, y, 23) == pytest.approx(whole, rel=1e-10)
    assert similarity.cknna(x, y, 3) != pytest.approx(whole, abs=0.01)


@pytest.mark.parametrize("k", [1, 4])
def test_mutual_knn_by_loops(k):
    x, y = related()
    shared = [len(a & b) / k for a, b in zip(neighbours(x, k), neighbours(y, k), strict=True)]
    assert similarity.mutual_knn(x, y, k) == pytest.approx(np.mean(shared))
    assert similarity.mutual_knn(x, y, 23) == 1


def test_equally_near_images_count_in_order():
    same = torch.ones(5, 2)
    assert Kernels(same).neighbours(2).nonzero().tolist() == [
        [0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1], [3, 0], [3, 1], [4, 0], [4, 1]
    ]  # fmt: skip


# -- what they must not depend on -------------------------------------------------------------------------------------

ALL = {
    "cka": similarity.linear_cka,
    "cka_biased": similarity.linear_cka_biased,
    "cknna": lambda x, y: similarity.cknna(x, y, 5),
    "mutual_knn": lambda x, y: similarity.mutual_knn(x, y, 5),
}
every = pytest.mark.parametrize("name", list(ALL))


@every
def test_rotations_and_scalings_change_nothing(name):
    x, y = related()
    rotation = torch.linalg.qr(features(6, 6, 9)).Q
    assert ALL[name](0.01 * x @ rotation, 30 * y) == pytest.approx(ALL[name](x, y), rel=1e-9)


@every
def test_the_order_of_the_images_changes_nothing(name):
    x, y = related()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    assert ALL[name](x[order], y[order]) == pytest.approx(ALL[name](x, y), rel=1e-9)


@every
def test_equal_features_give_one_and_arrays_do_as_well_as_tensors(name):
    x, y = related()
    assert ALL[name](x, x) == pytest.approx(1, rel=1e-12)
    assert ALL[name](x.numpy(), y.numpy()) == ALL[name](x, y)


def test_cka_does_not_see_a_shift():
    x, y = related()
    for found in (similarity.linear_cka, similarity.linear_cka_biased):
        assert found(x + 100, y - 7) == pytest.approx(found(x, y), rel=1e-8)


def test_more_features_than_images_fool_the_biased_cka_alone():
    x, y = features(40, 400, 0), features(40, 400, 1)
    assert similarity.linear_cka_biased(x, y) > 0.85
    assert abs(similarity.linear_cka(x, y)) < 0.1


def test_features_that_do_not_vary_have_no_similarity():
    assert np.isnan(similarity.linear_cka(torch.ones(8, 3), features(8, 3, 0)))


# -- minibatches, baselines, intervals --------------------------------------------------------------------------------


def test_one_minibatch_is_the_whole():
    x, y = related()
    assert similarity.minibatch_cka([(x, y)]) == pytest.approx(similarity.linear_cka(x, y), rel=1e-12)


def test_minibatches_average_the_terms_and_drop_a_short_last_one():
    x, y = related(26)
    parts = list(zip(x.split(8), y.split(8), strict=True))
    assert [len(a) for a, _ in parts] == [8, 8, 8, 2]
    terms = np.array([[hsic_1(k, m), hsic_1(k, k), hsic_1(m, m)] for k, m in (grams(*part) for part in parts[:3])])
    cross, own_x, own_y = terms.mean(0)
    assert similarity.minibatch_cka(parts) == pytest.approx(cross / np.sqrt(own_x * own_y), rel=1e-10)


def test_a_short_batch_in_the_middle_is_refused():
    x, y = related(24)
    with pytest.raises(HasteError, match="batches of 8, 6, 8 images; possible: one size"):
        similarity.minibatch_cka([(x[:8], y[:8]), (x[8:14], y[8:14]), (x[14:22], y[14:22])])
    with pytest.raises(HasteError, match="no batches"):
        similarity.minibatch_cka([])


def test_the_baseline_is_the_mean_over_shuffled_pairs():
    x, y = related()
    by_hand = [similarity.linear_cka(x, y[order]) for order in similarity.orders(24, 4, 3)]
    assert similarity.shuffled(similarity.linear_cka, x, y, seed=4, permutations=3) == pytest.approx(np.mean(by_hand))
    assert similarity.shuffled(similarity.linear_cka, x, y) < 0.5 * similarity.linear_cka(x, y)


def test_mutual_knn_of_shuffled_pairs_is_the_share_that_chance_gives():
    x, y = related(60)
    found = similarity.shuffled(lambda a, b: similarity.mutual_knn(a, b, 10), x, y, permutations=30)
    assert found == pytest.approx(10 / 59, abs=0.02)


def test_resampled_hsic_by_all_tuples_counted_as_drawn():
    k, m = grams(*related(7))
    weights = drawn_again(7, 3, seed=1)
    assert (weights.sum(1) == 7).all()
    assert (weights > 1).any()
    found = resampled_hsic(torch.from_numpy(k), torch.from_numpy(m), torch.cat([weights, torch.ones(1, 7)]))
    expected = [hsic_1_by_tuples(k, m, w) for w in weights.numpy()] + [hsic_1(k, m)]
    assert found.numpy() == pytest.approx(np.array(expected), rel=1e-9)


def test_the_interval_holds_the_true_value_as_often_as_it_says_and_is_no_wider_than_that():
    x, noise, mix = features(2400, 4, 101), features(2400, 4, 102), features(4, 4, 100)
    y = x @ mix + noise
    truth = similarity.linear_cka(x, y)
    values, bounds = [], []
    for part, (a, b) in enumerate(zip(x.split(60), y.split(60), strict=True)):
        values.append(similarity.linear_cka(a, b))
        bounds.append(similarity.cka_interval(a, b, 100, 0.9, part))
    low, high = np.array(bounds).T
    assert (low < values).all()
    assert (values < high).all()
    assert ((low <= truth) & (truth <= high)).sum() >= 30
    assert np.mean(high - low) / (2 * 1.645) == pytest.approx(np.std(values), rel=0.4)


def test_the_interval_of_independent_features_is_about_zero_however_many_they_are():
    # Copies of an image as pairs would put the whole interval far above zero.
    low, high = similarity.cka_interval(features(40, 400, 0), features(40, 400, 1), 200, 0.95, 0)
    assert -0.2 < low < 0 < high < 0.2


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: similarity.linear_cka(x, x[:9]), "features of 10 and of 9 images"),
        (lambda x: similarity.linear_cka(x[:3], x[:3]), r"shape \(3, 4\); possible"),
        (lambda x: similarity.mutual_knn(x, x, 10), "k 10 nearest neighbours among 10 images; possible: 1 to 9"),
        (lambda x: similarity.cknna(x, x, 1), "CKNNA with k 1; possible: 2 to 9"),
    ],
)
def test_what_cannot_be_compared_is_named(call, match):
    with pytest.raises(HasteError, match=match):
        call(features(10, 4, 0))


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(output, make_study):
    study = make_study(
        "train.keep=[]", "train.steps=8", "train.ema_decay=0.5", "analysis.n=40", "analysis.timesteps=[0.1, 0.6]",
        "analysis.resamples=50",
    )  # fmt: skip
    run = Run(study, "repa", 0)
    fit(run, progress=False)
    return run


@pytest.fixture
def table(run):
    return similarity.measure(run, k=4, permutations=2)


def test_all_pairs_at_one_level_and_the_aligned_one_at_all(table):
    assert len(table) == 2 * (3 * 4 + 1) * 4
    counts = table.groupby(["step", "t"]).size()
    assert counts.to_dict() == {(0, 0.1): 4, (0, 0.6): 48, (8, 0.1): 4, (8, 0.6): 48}
    aligned = table[table["aligned"]]
    assert set(aligned["depth"]) == {2}
    assert set(aligned["teacher_block"]) == {3}
    assert len(aligned) == 2 * 2 * 4
    assert set(table["n"]) == {40}
    assert table.groupby("measure")["k"].agg(lambda k: k.notna().all()).to_dict() == {
        "cka": False, "cka_biased": False, "cknna": True, "mutual_knn": True
    }  # fmt: skip


def test_the_interval_is_that_of_the_aligned_pairs_cka(table):
    with_interval = table["aligned"] & (table["measure"] == "cka")
    assert table["low"].notna().equals(with_interval)
    assert (table["low"] < table["value"])[with_interval].all()
    assert (table["value"] < table["high"])[with_interval].all()


def test_values_are_those_of_the_features_by_hand(run, table):
    batch, teacher = probe.held_out(run), find_teacher(run.study)
    seen = probe.look(probe.student_at(run, 8), batch.x, 0.6, probe.everything(probe.student_at(run, 8)), 0)
    final = teacher(batch.images).tokens.mean(1)
    first = teacher.block_tokens(batch.images, [0])[0].mean(1)
    chosen = table[(table["step"] == 8) & (table["t"] == 0.6) & (table["depth"] == 2)]
    for block, target in ((0, first), (3, final)):
        rows = chosen[chosen["teacher_block"] == block].set_index("measure")
        assert rows.loc["cka", "value"] == pytest.approx(similarity.linear_cka(seen.tokens[2].mean(1), target))
        knn = [seen.tokens[2].mean(1), target]
        assert rows.loc["mutual_knn", "value"] == similarity.mutual_knn(*knn, 4)
        # A mean of permutations of both signs: rounding of the features in float32 is large beside what is left of it.
        assert rows.loc["cknna", "baseline"] == pytest.approx(
            similarity.shuffled(lambda x, y: similarity.cknna(x, y, 4), *knn, seed=0, permutations=2), rel=1e-4
        )


def test_the_same_run_gives_the_same_table(run, table):
    assert similarity.measure(run, k=4, permutations=2).equals(table)


def test_before_training_all_blocks_are_alike(table):
    values = table[(table["step"] == 0) & (table["t"] == 0.6)].groupby(["measure", "teacher_block"])["value"]
    assert (values.max() - values.min()).max() < 1e-9
    later = table[(table["step"] == 8) & (table["t"] == 0.6)].groupby(["measure", "teacher_block"])["value"]
    assert (later.max() - later.min()).max() > 1e-4


def test_a_depth_the_generator_does_not_have_is_its_last(run, make_study):
    teacher = find_teacher(run.study)
    deep = Run(make_study("arms.vanilla.alignment.depth=9"), "vanilla", 0)
    assert similarity.aligned_pair(deep, teacher) == (3, 3)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_of_a_table(table):
    tables = pd.concat([table.assign(arm=arm, seed=0) for arm in ("vanilla", "repa")])
    maps = pictures.similarity_maps(tables, "cka")
    shown = [axis for axis in maps.axes if axis.images]
    assert len(shown) == 4
    chosen = table[(table["step"] == 8) & (table["t"] == 0.6) & (table["measure"] == "cka")]
    expected = chosen.pivot(index="depth", columns="teacher_block", values="value").to_numpy()
    assert np.asarray(shown[1].images[0].get_array()) == pytest.approx(expected)
    curves = pictures.aligned_similarity(tables, 4).axes[0]
    row = table[table["aligned"] & (table["t"] == 0.6) & (table["measure"] == "cka")].sort_values("step")
    drawn = [list(line.get_ydata()) for line in curves.lines]
    assert row["value"].tolist() in drawn
    assert row["baseline"].tolist() in drawn
    over_t = pictures.similarity_over_t(tables, 8, "cknna").axes[0]
    assert list(over_t.lines[0].get_xdata()) == [0.1, 0.6]
