from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from haste_core.analysis import probe, probing
from haste_core.errors import HasteError
from haste_core.figures import similarity as pictures
from haste_core.study.data import open_dataset
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.train import fit


def clusters(seed, n=200, classes=4, spread=0.1):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    return 5 * np.eye(classes)[labels] + spread * generator.standard_normal((n, classes)), labels


def test_separable_classes_are_told_apart():
    assert probing.linear_probe(*clusters(0), *clusters(1)) == 1


def test_shuffled_labels_leave_chance():
    # Wide clusters: with narrow ones whole classes would be right or wrong at once.
    (x, labels), (a, b) = clusters(0, 800, spread=5), clusters(1, 800, spread=5)
    mixed = np.random.default_rng(2).permutation(labels)
    assert probing.linear_probe(x, mixed, a, b) == pytest.approx(0.25, abs=0.08)
    assert probing.linear_probe(x, labels, a, b) > 0.4


def test_scale_and_shift_of_a_feature_change_nothing():
    (x, y), (a, b) = clusters(0, spread=3), clusters(1, spread=3)
    scale, shift = np.array([1e-4, 1, 1e3, 7]), np.array([5, -3, 100, 0])
    plain = probing.linear_probe(x, y, a, b)
    assert 0.4 < plain < 1
    assert probing.linear_probe(x * scale + shift, y, a * scale + shift, b) == pytest.approx(plain, abs=0.011)


def test_tensors_do_as_well_as_arrays():
    (x, y), (a, b) = clusters(0, spread=3), clusters(1, spread=3)
    assert probing.linear_probe(*map(torch.from_numpy, (x, y, a, b))) == probing.linear_probe(x, y, a, b)


def test_a_class_nobody_trained_on_is_refused():
    x, y = clusters(0)
    with pytest.raises(HasteError, match="trained on 3 classes and tested on 4, of which 1 are new"):
        probing.linear_probe(x[y > 0], y[y > 0], x, y)


@pytest.mark.parametrize(("accuracy", "n"), [(0.0, 10), (0.5, 100), (0.96, 250), (1.0, 40)])
def test_wilson_by_its_closed_form(accuracy, n):
    z = 1.959963984540054
    middle = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    assert probing.wilson(accuracy, n, 0.95) == pytest.approx((middle - half, middle + half), abs=1e-9)


@pytest.fixture
def run(output, make_study):
    study = make_study("train.keep=[]", "train.steps=8", "train.ema_decay=0.5", "analysis.n=60")
    run = Run(study, "vanilla", 0)
    fit(run, progress=False)
    return run


@pytest.fixture
def table(run):
    return probing.measure(run, train=150)


def test_a_row_per_step_and_depth_and_one_of_the_teacher(table):
    assert table["network"].tolist() == ["teacher"] + ["student"] * 6
    student = table[table["network"] == "student"]
    assert list(zip(student["step"], student["depth"], strict=True)) == [(s, d) for s in (0, 8) for d in (1, 2, 3)]
    assert set(student["t"]) == {0.5}
    assert set(table["n"]) == {60}
    assert set(table["n_train"]) == {150}
    assert ((table["low"] < table["accuracy"]) | (table["accuracy"] == 0)).all()
    assert table["accuracy"].between(0, 1).all()


def test_accuracies_are_those_of_the_patch_means_by_hand(run, table):
    data, teacher = open_dataset(run.study.data), find_teacher(run.study)
    fitted, tested = data.examples("train", 150), data.examples("test", 60)
    model = probe.student_at(run, 8)
    taps = probe.everything(model)
    trained, held = (probe.look(model, b.x, 0.5, taps, s) for b, s in ((fitted, 1), (tested, 0)))
    by_hand = probing.linear_probe(trained.tokens[2].mean(1), fitted.y, held.tokens[2].mean(1), tested.y)
    chosen = table[(table["step"] == 8) & (table["depth"] == 2) & (table["network"] == "student")]
    assert chosen["accuracy"].item() == pytest.approx(by_hand, abs=1 / 59)
    seen = [teacher(b.images).tokens.mean(1) for b in (fitted, tested)]
    by_hand = probing.linear_probe(seen[0], fitted.y, seen[1], tested.y)
    assert table["accuracy"].iloc[0] == pytest.approx(by_hand, abs=1 / 59)
    common = int(fitted.y.mode().values)
    assert table["chance"].iloc[0] == pytest.approx(float((tested.y == common).float().mean()))


def test_less_noise_shows_more_of_the_class(run):
    table = probing.measure(run, timesteps=[0.0, 1.0], train=400)
    accuracy = table[(table["network"] == "student") & (table["step"] == 8)].groupby("t")["accuracy"].max()
    assert accuracy[0.0] > accuracy[1.0] + 0.05
    assert accuracy[1.0] < 0.25


def test_pictures_of_a_table(table):
    tables = pd.concat([table.assign(arm=arm, seed=0) for arm in ("vanilla", "repa")])
    student = table[table["network"] == "student"]
    for axis, rows in (
        (pictures.probing_over_depth(tables, 8).axes[0], student[student["step"] == 8]),
        (pictures.probing_over_training(tables, 2, 4).axes[0], student[student["depth"] == 2]),
    ):
        assert rows["accuracy"].tolist() in [list(line.get_ydata()) for line in axis.lines]
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        assert labels == ["vanilla", "repa", "teacher, clean images", "chance"]
