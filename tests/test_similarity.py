"""CKA, CKNNA and mutual neighbours against their definitions; linear probing; their tables and pictures."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch

from haste_core import figures
from haste_core.analysis import probe, similarity
from haste_core.errors import HasteError
from haste_core.study.data import open_dataset
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.taps import Taps


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


@pytest.mark.parametrize(("hsic", "n"), [(hsic_1, 24), (hsic_1_by_tuples, 7)])
def test_unbiased_cka_by_the_formula_and_by_all_tuples_of_distinct_images(hsic, n):
    x, y = related(n)
    k, m = grams(x, y)
    assert similarity.linear_cka(x, y) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), rel=1e-10)


@pytest.mark.parametrize("k", [5, 23])
def test_cknna_by_loops(k):
    x, y = related()

    def local(a, b):
        near_a, near_b = neighbours(a, k), neighbours(b, k)
        p, q = np.zeros((24, 24)), np.zeros((24, 24))
        for i in range(24):
            for j in near_a[i] & near_b[i]:
                p[i, j], q[i, j] = (float(torch.cosine_similarity(s[i], s[j], dim=0)) for s in (a, b))
        return hsic_1(p, q)

    assert similarity.cknna(x, y, k) == pytest.approx(local(x, y) / np.sqrt(local(x, x) * local(y, y)), rel=1e-10)
    whole = similarity.linear_cka(*(s / s.norm(dim=1, keepdim=True) for s in (x, y)))
    assert (similarity.cknna(x, y, k) == pytest.approx(whole, rel=1e-10)) == (k == 23)


def test_mutual_knn_by_loops():
    (x, y), k = related(), 4
    shared = [len(a & b) / k for a, b in zip(neighbours(x, k), neighbours(y, k), strict=True)]
    assert similarity.mutual_knn(x, y, k) == pytest.approx(np.mean(shared))
    assert similarity.mutual_knn(x, y, 23) == 1
    # Equally near images count in order.
    first = similarity.Kernels(torch.ones(5, 2)).neighbours(2).nonzero()[:, 1].reshape(5, 2)
    assert first.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("name", similarity.MEASURES)
def test_rotation_scale_and_order_change_nothing_and_equal_features_give_one(name):
    x, y = related()

    def of(a, b):
        return similarity.MEASURES[name](a, b, 5)

    rotation, order = torch.linalg.qr(features(6, 6, 9)).Q, torch.randperm(24)
    assert of(0.01 * x @ rotation, 30 * y) == pytest.approx(of(x, y), rel=1e-9)
    assert of(x[order], y[order]) == pytest.approx(of(x, y), rel=1e-9)
    assert of(x, x) == pytest.approx(1, rel=1e-12)
    assert of(x.numpy(), y.numpy()) == of(x, y)
    if name.startswith("cka"):
        assert of(x + 100, y - 7) == pytest.approx(of(x, y), rel=1e-8)


def test_more_features_than_images_fool_the_biased_cka_alone():
    assert np.isnan(similarity.linear_cka(torch.ones(8, 3), features(8, 3, 0)))  # features that do not vary
    x, y = features(40, 400, 0), features(40, 400, 1)
    assert similarity.linear_cka_biased(x, y) > 0.85
    assert abs(similarity.linear_cka(x, y)) < 0.1
    # Copies of an image as pairs would put the whole interval far above zero.
    low, high = similarity.cka_interval(x, y, 200, 0.95, 0)
    assert -0.2 < low < 0 < high < 0.2


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: similarity.linear_cka(x, x[:9]), "features of 10 and of 9 images"),
        (lambda x: similarity.linear_cka(x[:3], x[:3]), r"shape \(3, 4\); expected"),
        (lambda x: similarity.mutual_knn(x, x, 10), "k is 10 .* there are 10 images; expected 1 to 9"),
        (lambda x: similarity.cknna(x, x, 1), "k of CKNNA is 1; expected 2 to 9"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(call, match):
    with pytest.raises(HasteError, match=match):
        call(features(10, 4, 0))


def test_resampled_hsic_by_all_tuples_counted_as_drawn():
    k, m = grams(*related(7))
    weights = similarity.bootstrap_counts(7, 3, seed=1)
    assert (weights.sum(1) == 7).all()
    assert (weights > 1).any()
    weights = torch.cat([weights, torch.ones(1, 7)])
    found = similarity.resampled_hsic(torch.from_numpy(k), torch.from_numpy(m), weights)
    assert found.numpy() == pytest.approx(np.array([hsic_1_by_tuples(k, m, w) for w in weights.numpy()]), rel=1e-9)


# -- linear probing ---------------------------------------------------------------------------------------------------


def clusters(seed, n=200, classes=4, spread=0.1):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    return 5 * np.eye(classes)[labels] + spread * generator.standard_normal((n, classes)), labels


def test_a_probe_reads_separable_classes_and_leaves_shuffled_labels_at_chance():
    assert similarity.linear_probe(*clusters(0), *clusters(1)) == 1
    # Wide clusters: with narrow ones whole classes would be right or wrong at once.
    (x, labels), (a, b) = clusters(0, 800, spread=5), clusters(1, 800, spread=5)
    mixed = np.random.default_rng(2).permutation(labels)
    assert similarity.linear_probe(x, mixed, a, b) == pytest.approx(0.25, abs=0.08)
    assert similarity.linear_probe(x, labels, a, b) > 0.4


def test_scale_and_shift_of_a_feature_change_nothing_and_tensors_do_as_well():
    (x, y), (a, b) = clusters(0, spread=3), clusters(1, spread=3)
    scale, shift = np.array([1e-4, 1, 1e3, 7]), np.array([5, -3, 100, 0])
    plain = similarity.linear_probe(x, y, a, b)
    assert 0.4 < plain < 1
    assert similarity.linear_probe(x * scale + shift, y, a * scale + shift, b) == pytest.approx(plain, abs=0.011)
    assert similarity.linear_probe(*map(torch.from_numpy, (x, y, a, b))) == plain
    with pytest.raises(HasteError, match="trained on 3 classes and tested on 4, of which 1 are new"):
        similarity.linear_probe(x[y > 0], y[y > 0], x, y)


# -- tables of a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(trained):
    more = ["train.keep=[]", "train.steps=8", "train.ema_decay=0.5", "analysis.n=40", "analysis.timesteps=[0.1, 0.6]"]
    return trained("repa", *more, "analysis.resamples=50")


@pytest.fixture(scope="module")
def table(run):
    return similarity.block_similarity(run, k=4, permutations=2)


@pytest.fixture(scope="module")
def probing(run):
    return similarity.linear_probing(run, train=150)


def test_all_pairs_at_one_level_and_the_aligned_one_at_all(table):
    counts = table.groupby(["step", "t"]).size()
    assert counts.to_dict() == {(0, 0.1): 4, (0, 0.6): 48, (8, 0.1): 4, (8, 0.6): 48}
    aligned = table[table["aligned"]]
    assert set(zip(aligned["depth"], aligned["teacher_block"], strict=True)) == {(2, 3)}
    assert len(aligned) == 2 * 2 * 4
    assert set(table["n"]) == {40}
    assert set(table.loc[table["k"].notna(), "measure"]) == {"cknna", "mutual_knn"}
    with_interval = table["aligned"] & (table["measure"] == "cka")
    assert table["low"].notna().equals(with_interval)
    assert (table["low"] < table["value"])[with_interval].all()
    assert (table["value"] < table["high"])[with_interval].all()


def test_values_are_those_of_the_features_by_hand(run, table, make_study):
    batch, teacher = probe.held_out(run), find_teacher(run.study)
    tapped = probe.student_output(probe.student_at(run, 8), batch.x, 0.6, Taps(depths=(2,)), 0)
    mine, final = tapped.tokens[2].mean(1), teacher(batch.images).tokens.mean(1)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(40, generator=generator) for _ in range(2)]
    chosen = table[(table["step"] == 8) & (table["t"] == 0.6) & (table["depth"] == 2)]
    for block, target in ((0, teacher.block_tokens(batch.images, [0])[0].mean(1)), (3, final)):
        rows = chosen[chosen["teacher_block"] == block].set_index("measure")
        assert rows.loc["cka", "value"] == pytest.approx(similarity.linear_cka(mine, target), rel=1e-4)
        assert rows.loc["mutual_knn", "value"] == similarity.mutual_knn(mine, target, 4)
        # A mean of permutations of both signs: rounding of the features in float32 is large beside what is left of it.
        baseline = np.mean([similarity.cknna(mine, target[order], 4) for order in orders])
        assert rows.loc["cknna", "baseline"] == pytest.approx(baseline, rel=1e-4)
    # A depth the generator does not have is its last.
    deep = Run(make_study("arms.vanilla.alignment.depth=9"), "vanilla", 0)
    assert similarity.aligned_pair(deep, teacher) == (3, 3)


def test_probing_has_a_row_per_step_and_depth_and_one_of_the_teacher(probing):
    assert probing["network"].tolist() == ["teacher"] + ["student"] * 6
    student = probing[probing["network"] == "student"]
    assert list(zip(student["step"], student["depth"], strict=True)) == [(s, d) for s in (0, 8) for d in (1, 2, 3)]
    assert set(student["t"]) == {0.6}
    assert set(zip(probing["n"], probing["n_train"], strict=True)) == {(40, 150)}
    assert probing["accuracy"].between(0, 1).all()
    # Wilson's interval by its closed form.
    z, n, p = 1.959963984540054, 40, probing["accuracy"]
    middle, half = (p + z**2 / (2 * n)), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert probing["low"].to_numpy() == pytest.approx(((middle - half) / (1 + z**2 / n)).to_numpy(), abs=1e-9)
    assert probing["high"].to_numpy() == pytest.approx(((middle + half) / (1 + z**2 / n)).to_numpy(), abs=1e-9)


def test_accuracies_are_those_of_the_patch_means_by_hand(run, probing):
    data, teacher = open_dataset(run.study.data), find_teacher(run.study)
    fitted, tested = data.examples("train", 150), data.examples("test", 40)
    model, taps = probe.student_at(run, 8), Taps(depths=(2,))
    trained, held = (probe.student_output(model, b.x, 0.6, taps, s) for b, s in ((fitted, 1), (tested, 0)))
    by_hand = similarity.linear_probe(trained.tokens[2].mean(1), fitted.y, held.tokens[2].mean(1), tested.y)
    chosen = probing[(probing["step"] == 8) & (probing["depth"] == 2) & (probing["network"] == "student")]
    assert chosen["accuracy"].item() == pytest.approx(by_hand, abs=1 / 39)
    seen = [teacher(b.images).tokens.mean(1) for b in (fitted, tested)]
    by_hand = similarity.linear_probe(seen[0], fitted.y, seen[1], tested.y)
    assert probing["accuracy"].iloc[0] == pytest.approx(by_hand, abs=1 / 39)
    common = int(fitted.y.mode().values)
    assert probing["chance"].iloc[0] == pytest.approx(float((tested.y == common).float().mean()))


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_of_similarity(table):
    tables = pd.concat([table.assign(arm=arm, seed=0) for arm in ("vanilla", "repa")])
    shown = [axis for axis in figures.similarity_maps(tables, "cka").axes if axis.images]
    assert len(shown) == 4
    chosen = table[(table["step"] == 8) & (table["t"] == 0.6) & (table["measure"] == "cka")]
    expected = chosen.pivot(index="depth", columns="teacher_block", values="value").to_numpy()
    assert np.asarray(shown[1].images[0].get_array()) == pytest.approx(expected)
    row = table[table["aligned"] & (table["t"] == 0.6) & (table["measure"] == "cka")].sort_values("step")
    drawn = [list(line.get_ydata()) for line in figures.aligned_similarity(tables, 4).axes[0].lines]
    assert row["value"].tolist() in drawn
    assert row["baseline"].tolist() in drawn
    over_t = figures.similarity_over_t(tables, 8, "cknna").axes[0]
    assert list(over_t.lines[0].get_xdata()) == [0.1, 0.6]


def test_pictures_of_probing(probing):
    tables = pd.concat([probing.assign(arm=arm, seed=0) for arm in ("vanilla", "repa")])
    student = probing[probing["network"] == "student"]
    for axis, rows in (
        (figures.probing_over_depth(tables, 8).axes[0], student[student["step"] == 8]),
        (figures.probing_over_training(tables, 2, 4).axes[0], student[student["depth"] == 2]),
    ):
        assert rows["accuracy"].tolist() in [list(line.get_ydata()) for line in axis.lines]
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        assert labels == ["vanilla", "repa", "teacher, clean images", "chance"]


@pytest.mark.parametrize("name", similarity.MEASURES)
@pytest.mark.parametrize(
    "broken", [torch.ones(12, 3), torch.full((12, 3), 0.1), torch.zeros(12, 3), torch.full((12, 3), torch.nan)]
)
def test_features_with_nothing_to_compare_have_no_similarity(name, broken):
    measure, other = similarity.MEASURES[name], features(12, 3, 0)
    for a, b in ((broken, other), (other, broken), (broken, broken)):
        assert math.isnan(measure(a, b, 3))
    one_zero = other.clone()
    one_zero[4] = 0
    assert math.isnan(measure(one_zero, other, 3))
    assert math.isnan(measure(torch.ones(12, 3) + 1e-15 * other, other, 3))
    if "cka" not in name:  # these look at directions alone
        assert math.isnan(measure(torch.outer(torch.arange(1.0, 13), torch.ones(3)), other, 3))
