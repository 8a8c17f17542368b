from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from haste_core import figures
from haste_core.analysis import capacity, probe
from haste_core.analysis.tokens import student_tokens, teacher_tokens
from haste_core.errors import HasteError
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.train import fit

ALL = capacity.measures()


def gaussian(n, d, within=None, seed=0):
    """n points of a standard Gaussian of dimension d, turned into a space of `within` dimensions."""
    generator = np.random.default_rng(seed)
    points = generator.standard_normal((n, d))
    turn = np.linalg.qr(generator.standard_normal((within or d, within or d)))[0]
    return points @ turn[:d]


@pytest.mark.parametrize("d", [2, 5, 12])
def test_ranks_of_an_isotropic_gaussian_are_its_dimension(d):
    points = gaussian(4000, d, within=20)
    assert capacity.effective_rank(points) == pytest.approx(d, rel=0.01)
    assert capacity.participation_ratio(points) == pytest.approx(d, rel=0.02)


@pytest.mark.parametrize(("d", "tolerance"), [(1, 0.1), (2, 0.1), (5, 0.15)])
def test_two_nn_finds_the_dimension_a_gaussian_is_embedded_with(d, tolerance):
    assert capacity.two_nn(gaussian(1500, d, within=10)) == pytest.approx(d, rel=tolerance)


def test_two_nn_sees_a_curved_surface_as_two_dimensional():
    u, v = np.random.default_rng(0).uniform(0, 3, (2, 1500))
    roll = np.stack([u * np.cos(u), u * np.sin(u), v], 1)
    assert capacity.two_nn(roll) == pytest.approx(2, rel=0.1)
    assert capacity.participation_ratio(roll) > 2.2


def test_two_nn_is_the_slope_of_the_fit_by_hand():
    points = gaussian(40, 3)
    mu = []
    for i in range(40):
        near = sorted(math.dist(points[i], points[j]) for j in range(40) if j != i)
        mu.append(near[1] / near[0])
    pairs = [(math.log(m), -math.log(1 - (i + 1) / 40)) for i, m in enumerate(sorted(mu)[:36])]
    slope = np.linalg.lstsq(np.array(pairs)[:, :1], np.array(pairs)[:, 1], rcond=None)[0][0]
    assert capacity.two_nn(points) == pytest.approx(slope)
    assert capacity.two_nn(points, discarded=0) != pytest.approx(slope)


def test_two_nn_counts_equal_rows_once():
    points = gaussian(300, 3)
    assert capacity.two_nn(np.repeat(points, 3, axis=0)) == pytest.approx(capacity.two_nn(points))
    assert math.isnan(capacity.two_nn(np.repeat(points[:2], 9, axis=0)))
    assert capacity.two_nn(np.eye(5)) == math.inf


def test_points_on_a_line_have_one_dimension():
    line = 3 + np.random.default_rng(0).standard_normal((400, 1)) * np.arange(1.0, 8.0)
    for name in ("effective_rank", "participation_ratio", "local_rank"):
        assert ALL[name](line) == pytest.approx(1, abs=1e-6), name
    assert capacity.two_nn(line) == pytest.approx(1, rel=0.12)


def test_rows_through_the_origin_that_all_point_one_way_have_no_entropy():
    rows = np.random.default_rng(0).uniform(1, 2, (50, 1)) * np.arange(1.0, 8.0)
    assert capacity.matrix_entropy(rows) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("row", [0.1, 1 / 3, 1e5 / 7, 0.0])
def test_equal_rows_use_no_direction(row):
    same = np.full((50, 7), row)
    for name in ("effective_rank", "participation_ratio", "local_rank"):
        assert ALL[name](same) == 0, name
    assert math.isnan(capacity.two_nn(same))
    assert math.isnan(capacity.matrix_entropy(same)) if row == 0 else capacity.matrix_entropy(same) < 1e-12


def test_matrix_entropy_of_orthogonal_rows_is_log_n_whatever_their_lengths():
    rows = np.diag(np.arange(1.0, 9.0))
    assert capacity.matrix_entropy(rows) == pytest.approx(math.log(8))
    assert capacity.matrix_entropy(np.vstack([rows, np.zeros((3, 8))])) == pytest.approx(math.log(8))


def test_matrix_entropy_is_that_of_the_gram_matrix():
    points = gaussian(30, 6) + 1
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 30)
    expected = -sum(v * math.log(v) for v in values if v > 1e-12)
    assert capacity.matrix_entropy(points) == pytest.approx(expected)


def test_participation_ratio_is_that_of_the_covariance():
    points = gaussian(60, 6) * np.arange(1, 7) + 5
    values = np.linalg.eigvalsh(np.cov(points.T))
    assert capacity.participation_ratio(points) == pytest.approx(values.sum() ** 2 / (values**2).sum())


def test_effective_rank_by_hand():
    # Two centred directions with singular values 3 : 1.
    points = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert capacity.effective_rank(points) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_local_rank_is_the_mean_over_neighbourhoods():
    points = gaussian(30, 5)
    ranks = []
    for i in range(30):
        near = sorted((j for j in range(30) if j != i), key=lambda j, i=i: math.dist(points[i], points[j]))[:6]
        ranks.append(capacity.effective_rank(points[near]))
    assert capacity.local_rank(points, 6) == pytest.approx(np.mean(ranks))


@pytest.mark.parametrize("k", [1, 30])
def test_local_rank_needs_k_other_rows(k):
    with pytest.raises(HasteError, match=f"30 rows with k={k}"):
        capacity.local_rank(gaussian(30, 5), k)


@pytest.mark.parametrize("name", ALL)
def test_turning_and_scaling_changes_nothing(name):
    points = gaussian(120, 6) * np.arange(1, 7)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    assert ALL[name](7 * points @ turn) == pytest.approx(ALL[name](points), rel=1e-8)


@pytest.mark.parametrize("name", [n for n in ALL if n != "matrix_entropy"])
def test_moving_changes_nothing_but_the_entropy_of_directions(name):
    points = gaussian(120, 6) * np.arange(1, 7)
    assert ALL[name](points + 5) == pytest.approx(ALL[name](points), rel=1e-8)
    assert capacity.matrix_entropy(points + 5) < capacity.matrix_entropy(points) - 0.1


def test_intervals_cover_the_true_value_about_as_often_as_they_say():
    def deviation(points):
        return float(points.std())

    inside = 0
    for seed in range(200):
        low, high = capacity.interval(gaussian(60, 1, seed=seed), deviation, 0.9)
        inside += low < 1 < high
    assert 164 <= inside <= 194


def test_the_place_of_a_token_is_the_same_on_a_finer_grid():
    coarse = torch.arange(4.0).reshape(1, 4, 1).expand(50, 4, 1)
    fine = coarse[0].reshape(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(1, 16, 1).expand(50, 16, 1)
    one, other = (capacity.one_per_image(tokens, grid, 3) for tokens, grid in ((coarse, (2, 2)), (fine, (4, 4))))
    assert np.array_equal(one, other)
    assert set(one[:, 0]) == {0, 1, 2, 3}


@pytest.fixture
def run(output, make_study):
    study = make_study("train.keep=[]", "train.steps=6", "analysis.n=40", "analysis.timesteps=[0.1, 0.6]")
    chosen = Run(study, "vanilla", 0)
    fit(chosen, progress=False)
    return chosen


def test_measure_of_a_run(run):
    table = capacity.measure(run)
    assert set(table["n"]) == {40}
    # Teacher: 4 blocks and the final tokens; student: 2 steps, 2 noise levels, 3 blocks; 2 kinds, 5 measures.
    assert table["who"].value_counts().to_dict() == {"student": 120, "teacher": 50}
    assert set(table[table["who"] == "student"]["step"]) == {0, 6}
    assert set(table[table["who"] == "teacher"]["t"]) == {0.0}
    assert table["value"].notna().all()
    known = table[table["measure"] != "local_rank"]
    assert (known["low"] < known["value"]).all()
    assert (known["value"] < known["high"]).all()
    assert table[table["measure"] == "local_rank"]["low"].isna().all()
    assert capacity.measure(run).equals(table)

    x, _, images, _ = probe.held_out(run)
    tokens = student_tokens(probe.student_at(run, 6), x, 0.6, 1, run.study.analysis.seed)
    keys = ["who", "step", "t", "block", "kind", "measure"]
    found = table.set_index(keys)["value"]
    expected = capacity.effective_rank(tokens.double().mean(1).numpy())
    assert found["student", 6, 0.6, 1, "patch mean", "effective_rank"] == pytest.approx(expected)
    teacher = find_teacher(run.study)
    final = capacity.one_per_image(teacher(images).tokens, teacher.grid, run.study.analysis.seed)
    assert found["teacher", 0, 0.0, 4, "tokens", "two_nn"] == pytest.approx(capacity.two_nn(final))

    table.insert(0, "seed", 0)
    table.insert(0, "arm", "vanilla")
    assert len(figures.capacity_over_depth(table, 6, 0.6).axes) == 6
    drawn = figures.capacity_over_training(table, 1, 0.1, 4, "patch mean").axes[0]
    assert list(drawn.lines[1].get_xdata()) == [0, 6]


def test_tokens_of_a_teacher_are_those_of_each_block(run):
    teacher, images = find_teacher(run.study), probe.held_out(run).images
    assert teacher_tokens(teacher, images, 4).equal(teacher(images).tokens)
    third = teacher_tokens(teacher, images, 3)
    torch.testing.assert_close(teacher.encoder.norm(third), teacher(images).tokens)
