from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from haste_core.study.classifier import SmallCNN
from haste_core.study.scoring import adm, extractors, image_sources, scorers

from haste_core import training
from haste_core.errors import HasteError
from haste_core.study import config, evaluation, preparation, report
from haste_core.study.data import open_dataset
from haste_core.study.evaluation import CopyCheck, evaluate_run, evaluation_samples, nearest_distances, score
from haste_core.study.runs import Run

import torch_fidelity  # isort: skip
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # isort: skip
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # isort: skip

# One worker builds the trained runs once.
pytestmark = pytest.mark.xdist_group("evaluation")

PIXELS = "test-pixels"
ARMS = ("vanilla", "holistic", "haste")


class Pixels(FeatureExtractorBase):
    """Features are the grey values themselves, so every score has a known answer."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

    def forward(self, images):
        return (images[:, 0].flatten(1).double(),)


if PIXELS not in FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor(PIXELS, Pixels)


def settings(**changes):
    return config.Evaluate(**{"kid_subsets": 4, "kid_subset_size": 30, **changes})


def gaussian_images(n, seed, mean=128.0, spread=12.0, side=4):
    """uint8 images (n, 1, side, side) from a Gaussian with correlated pixels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(side * side, side * side, generator=generator, dtype=torch.float64) / side
    noise = torch.randn(n, side * side, generator=generator, dtype=torch.float64)
    return (mean + spread * noise @ mixing).round().clamp(0, 255).to(torch.uint8).reshape(n, 1, side, side)


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def frechet(a, b):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), every root by a symmetric eigendecomposition."""
    a, b = (x.flatten(1).double().numpy() for x in (a, b))
    difference = a.mean(0) - b.mean(0)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    half = root(s1)
    return difference @ difference + np.trace(s1) + np.trace(s2) - 2 * np.trace(root(half @ s2 @ half))


def two_modes(n, seed):
    """n dark and n bright images, far apart."""
    return torch.cat([gaussian_images(n, seed, mean=60, spread=5), gaussian_images(n, seed + 1, mean=190, spread=5)])


# Numbers against closed forms


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fid_is_the_frechet_distance_of_the_features(seed):
    a, b = gaussian_images(300, seed), gaussian_images(400, seed + 10, mean=140, spread=8)
    expected = frechet(a, b)
    assert expected > 100
    assert score(a, b, PIXELS, settings())["fid"] == pytest.approx(expected, rel=1e-6)


def test_fid_of_a_shift_is_its_squared_length():
    real = gaussian_images(300, 0, mean=100)
    assert score(real + 20, real, PIXELS, settings())["fid"] == pytest.approx(16 * 20**2, rel=1e-6)


def test_fid_of_a_doubled_spread_is_the_trace_of_the_covariance():
    real = gaussian_images(300, 0, mean=60, spread=4)
    # (1 + 4 - 2 * 2) tr S + |mu|^2, with mean mu and covariance S of the real images.
    features = real.flatten(1).double().numpy()
    expected = np.trace(np.cov(features, rowvar=False)) + (features.mean(0) ** 2).sum()
    assert int(real.max()) < 128
    assert score(real * 2, real, PIXELS, settings())["fid"] == pytest.approx(expected, rel=1e-6)


def test_equal_sets_are_perfect():
    real = gaussian_images(100, 0)
    found = score(real, real, PIXELS, settings(kid_subset_size=100))
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["kid"] <= 0


def test_kid_of_whole_sets_is_the_unbiased_mmd_of_the_cubic_kernel():
    # The cross term divides by n^2, as in the reference code.
    a, b = (gaussian_images(40, s, mean=m) / 64 for s, m in ((0, 120), (1, 130)))
    a, b = (x.to(torch.uint8) for x in (a, b))
    x, y = (v.flatten(1).double().numpy() for v in (a, b))
    xx, yy, xy = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    n = len(x)
    inside = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    expected = inside - 2 * xy.sum() / n**2
    assert score(a, b, PIXELS, settings(kid_subset_size=n))["kid"] == pytest.approx(expected, rel=1e-9)


# What must not matter


@pytest.mark.parametrize("batch_size", [7, 64])
def test_score_does_not_depend_on_the_batch_size(batch_size):
    a, b = gaussian_images(120, 0), gaussian_images(100, 1)
    assert score(a, b, PIXELS, settings(batch_size=batch_size)) == score(a, b, PIXELS, settings())


def test_score_is_that_of_torch_fidelity_as_a_whole():
    a, b = gaussian_images(120, 0), gaussian_images(100, 1)
    whole = torch_fidelity.calculate_metrics(
        input1=evaluation.ImageSet(a), input2=evaluation.ImageSet(b), feature_extractor=PIXELS, cuda=False, fid=True,
        kid=True, prc=True, kid_subsets=settings().kid_subsets, kid_subset_size=50,
        prc_neighborhood=settings().neighborhood, samples_shuffle=False, save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip
    found = score(a, b, PIXELS, settings(kid_subset_size=50))
    names = ("frechet_inception_distance", "kernel_inception_distance_mean", "precision", "recall")
    assert list(found.values()) == [whole[name] for name in names]


def shuffled(images, seed):
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


def test_scores_of_whole_sets_do_not_depend_on_the_order():
    a, b = gaussian_images(80, 0), gaussian_images(80, 1, mean=130)
    one = score(a, b, PIXELS, settings(kid_subset_size=80))
    other = score(shuffled(a, 2), shuffled(b, 3), PIXELS, settings(kid_subset_size=80))
    assert other == pytest.approx(one, rel=1e-9)


def test_kid_of_subsets_depends_on_the_order_and_nothing_else_does():
    # KID draws its subsets by position: with subsets smaller than the set the order of images is part of the score.
    a, b = gaussian_images(80, 0), gaussian_images(80, 1, mean=130)
    one = score(a, b, PIXELS, settings(kid_subset_size=20))
    other = score(shuffled(a, 2), b, PIXELS, settings(kid_subset_size=20))
    assert other["kid"] != one["kid"]
    for name in ("fid", "precision", "recall"):
        assert other[name] == pytest.approx(one[name], rel=1e-9)


def test_score_is_repeatable_whatever_the_global_random_state():
    a, b = gaussian_images(80, 0), gaussian_images(80, 1)
    torch.manual_seed(0)
    np.random.seed(0)
    one = score(a, b, PIXELS, settings(kid_subset_size=20))
    torch.manual_seed(1)
    np.random.seed(1)
    assert score(a, b, PIXELS, settings(kid_subset_size=20)) == one


def test_kid_subsets_shrink_to_the_smaller_set():
    found = score(gaussian_images(20, 0), gaussian_images(50, 1), PIXELS, settings(kid_subset_size=400))
    assert np.isfinite(found["kid"])


def test_the_file_cache_of_torch_fidelity_stays_off_and_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    score(gaussian_images(40, 0), gaussian_images(40, 1), PIXELS, settings())
    assert list(tmp_path.rglob("*")) == []


# Direction, copies, types


def test_precision_looks_at_generated_and_recall_at_real_images():
    real = two_modes(60, 0)
    generated = real[:60]  # one of two modes: nothing wrong in it, half missing
    found = score(generated, real, PIXELS, settings())
    assert found["precision"] == 1
    assert found["recall"] == pytest.approx(0.5)


def test_swapping_the_inputs_swaps_precision_and_recall():
    real = two_modes(60, 0)
    generated = torch.cat([real[:60], torch.full((20, 1, 4, 4), 255, dtype=torch.uint8)])
    one, other = score(generated, real, PIXELS, settings()), score(real, generated, PIXELS, settings())
    assert one["precision"] == pytest.approx(0.75)
    assert one["recall"] == pytest.approx(0.5)
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])
    assert one["fid"] == pytest.approx(other["fid"], rel=1e-9)


def test_copies_of_training_images_are_found_out():
    training_images, held_out = gaussian_images(200, 0), gaussian_images(100, 1)
    assert CopyCheck(held_out, lambda: training_images.split(60))(training_images[:50]) == {"nearest": 0, "copies": 1}


def test_held_out_images_are_no_copies():
    training_images, held_out = gaussian_images(200, 0), gaussian_images(100, 1)
    found = CopyCheck(held_out, lambda: training_images.split(60))(held_out)
    assert found["nearest"] == 1
    assert found["copies"] <= 0.01


def test_half_copies_are_half_of_copies():
    training_images, held_out = gaussian_images(200, 0), gaussian_images(100, 1)
    far = torch.zeros(50, 1, 4, 4, dtype=torch.uint8)
    assert (
        CopyCheck(held_out, lambda: training_images.split(60))(torch.cat([training_images[:50], far]))["copies"] == 0.5
    )


def test_nearest_distances_are_those_of_a_loop_over_all_pairs():
    made, known = gaussian_images(7, 3), gaussian_images(30, 4)
    pairs = (made.double()[:, None] - known.double()[None]).flatten(2).norm(dim=2) / 127.5
    for size in (1, 11, 30):
        torch.testing.assert_close(nearest_distances(made, known.split(size)), pairs.min(1).values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_only_uint8_images_are_scored(dtype):
    good = gaussian_images(20, 0)
    for pair in ((good.to(dtype), good), (good, good.to(dtype))):
        with pytest.raises(HasteError, match="uint8"):
            score(*pair, PIXELS, settings())


def test_grey_images_become_three_equal_channels():
    grey = gaussian_images(2, 0)
    item = evaluation.ImageSet(grey)[1]
    assert item.shape == (3, 4, 4)
    assert all(torch.equal(channel, grey[1, 0]) for channel in item)


# The card

MOVES_A_SCORE = {
    "sample.sampler": "euler",
    "sample.solver_steps": 3,
    "sample.grid": "uniform",
    "sample.guidance": 2.0,
    "sample.guidance_low": 0.1,
    "sample.guidance_high": 0.9,
    "sample.guidance_channels": 1,
    "sample.precision": "bf16",
    "sample.compile": "true",
    "evaluate.suite": "adm",
    "evaluate.n": 41,
    "evaluate.seed": 1,
    "evaluate.labels": "random",
    "evaluate.kid_subsets": 3,
    "evaluate.kid_subset_size": 19,
    "evaluate.neighborhood": 4,
    "evaluate.denoising_images": 30,
    "train.ema_decay": 0.5,
    "data.split_seed": 1,
    "data.test_fraction": 0.3,
}
# These reach the card through the fingerprint of the extractor's weights.
IN_THE_EXTRACTOR = {
    "evaluate.extractor",
    "evaluate.autoencoder",
    "evaluate.extractor_width",
    "evaluate.inception",
    "evaluate.dinov2",
}
# These through what they stand for: a preset through the fields it fills, a VAE (of latents only) through its weights.
IN_OTHERS = {"sample.preset", "sample.vae"}
# Of the suite adm alone.
MOVES_AN_ADM_SCORE = {
    "evaluate.dinov2": "none",
    "evaluate.dinov2_model": "vit_base_patch14_dinov2.lvd142m",
    "evaluate.reference": "REFERENCE",  # a file that the test writes
    "evaluate.neighborhood": 4,
    "evaluate.n": 41,
    "evaluate.labels": "random",
    "data.split_seed": 1,
}
MOVES_NOTHING = {
    "sample.batch_size": 7,
    "train.threads": 2,
    "train.log_every": 3,
    "train.checkpoint_every": 4,
    "evaluate.batch_size": 9,
}
MOVES_NO_ADM_SCORE = MOVES_NOTHING | {"evaluate.kid_subsets": 3, "evaluate.kid_subset_size": 19}


@pytest.mark.parametrize("key", MOVES_A_SCORE)
def test_card_changes_with_what_moves_a_score(key, tiny, make_study):
    changed = make_study(f"{key}={MOVES_A_SCORE[key]}")
    assert evaluation.card(changed, "x")["card_id"] != evaluation.card(tiny, "x")["card_id"]


@pytest.mark.parametrize("key", MOVES_NOTHING)
def test_card_stays_with_what_moves_no_score(key, tiny, make_study):
    changed = make_study(f"{key}={MOVES_NOTHING[key]}")
    assert changed != tiny
    assert evaluation.card(changed, "x") == evaluation.card(tiny, "x")


def test_every_sampling_and_scoring_setting_is_known_to_these_tests():
    sections = {"sample": config.Sample, "evaluate": config.Evaluate}
    fields = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    assert fields <= set(MOVES_A_SCORE) | set(MOVES_AN_ADM_SCORE) | set(MOVES_NOTHING) | IN_THE_EXTRACTOR | IN_OTHERS


def write_reference(path, shift=0):
    np.savez(path, arr_0=np.full((9, 8, 8, 3), 7 + shift, np.uint8))
    return path


@pytest.mark.parametrize("key", MOVES_AN_ADM_SCORE)
def test_card_of_the_adm_suite_changes_with_what_moves_its_scores(key, make_study, tmp_path):
    value = MOVES_AN_ADM_SCORE[key]
    if value == "REFERENCE":
        value = write_reference(tmp_path / "r.npz")
    plain, changed = make_study("evaluate.suite=adm"), make_study("evaluate.suite=adm", f"{key}={value}")
    assert evaluation.card(changed, "x")["card_id"] != evaluation.card(plain, "x")["card_id"]


@pytest.mark.parametrize("key", MOVES_NO_ADM_SCORE)
def test_card_of_the_adm_suite_stays_with_what_moves_none(key, make_study):
    plain = make_study("evaluate.suite=adm")
    changed = make_study("evaluate.suite=adm", f"{key}={MOVES_NO_ADM_SCORE[key]}")
    assert changed != plain
    assert evaluation.card(changed, "x") == evaluation.card(plain, "x")


def test_card_follows_the_content_of_the_reference_and_not_its_folder(make_study, tmp_path):
    places = [tmp_path / name / "r.npz" for name in ("one", "moved", "other")]
    for place, shift in zip(places, (0, 0, 1), strict=True):
        place.parent.mkdir()
        write_reference(place, shift)
    one, moved, other = (
        evaluation.card(make_study("evaluate.suite=adm", f"evaluate.reference={place}"), "x") for place in places
    )
    assert one == moved
    assert one["card_id"] != other["card_id"]


def test_card_follows_real_images_and_not_how_they_were_named(tiny, make_study):
    # Augmentation is settings of the data too. It moves no real image but those that the training loss is measured on.
    plain, changed = (evaluation.card(study, "x") for study in (tiny, make_study("data.augment.shift=2")))
    assert plain["denoising"].pop("images_hash") != changed["denoising"].pop("images_hash")
    assert {k: v for k, v in changed.items() if k != "card_id"} == {k: v for k, v in plain.items() if k != "card_id"}
    other = evaluation.card(make_study("data.split_seed=1"), "x")
    for key in ("reference_hash", "reference_heldout_hash"):
        assert other[key] != evaluation.card(tiny, "x")[key]


@pytest.mark.parametrize("suite", ["study", "adm"])
def test_a_preset_changes_the_card_as_its_fields_do(suite, make_study):
    by_name = make_study(f"evaluate.suite={suite}", "sample={preset: haste-xl-400ep}")
    by_hand = ["sampler=sde", "solver_steps=250", "guidance=1.675", "guidance_high=0.7"]
    by_fields = make_study(f"evaluate.suite={suite}", *(f"sample.{field}" for field in by_hand))
    own = make_study(f"evaluate.suite={suite}")
    # The tiny study's own two solver steps win over the preset, as fields do.
    assert by_name.sample.solver_steps == own.sample.solver_steps == 2
    by_name = make_study(f"evaluate.suite={suite}", "sample={preset: haste-xl-400ep, solver_steps: 250, sampler: sde}")
    assert evaluation.card(by_name, "x") == evaluation.card(by_fields, "x")
    assert evaluation.card(by_name, "x")["card_id"] != evaluation.card(own, "x")["card_id"]


def test_card_of_a_run_differs_in_its_own_average_alone(make_study):
    study = make_study("arms.vanilla.train={ema_decay: 0.5}")
    content = evaluation.card(study, "x")
    other = scorers.card_of(content, Run(study, "vanilla", 0))
    assert {key for key in content if content[key] != other[key]} == {"ema_decay", "card_id"}
    assert other == evaluation.card(study, "x", 0.5)


def test_card_of_a_run_that_draws_its_images_in_its_own_way(make_study):
    study = make_study("arms.vanilla.sample={solver_steps: 3}")
    content = evaluation.card(study, "x")
    other = scorers.card_of(content, Run(study, "vanilla", 0))
    assert {key for key in content if content[key] != other[key]} == {"solver_steps", "card_id"}
    assert scorers.card_of(content, Run(study, "repa", 0)) == content


@pytest.mark.parametrize(
    "key", sorted(k for k in {**MOVES_AN_ADM_SCORE, **MOVES_A_SCORE} if not k.startswith("train."))
)
def test_scores_under_other_settings_lie_in_another_file(key, tiny, make_study):
    value = {**MOVES_AN_ADM_SCORE, **MOVES_A_SCORE}[key]
    assert make_study(f"{key}={value}").evaluation_hash != tiny.evaluation_hash


@pytest.mark.parametrize("change", ["evaluate.extractor.steps=21", "evaluate.extractor_width=32"])
def test_another_extractor_lies_in_another_folder_and_file(change, tiny, make_study):
    changed = make_study(change)
    assert changed.extractor_hash != tiny.extractor_hash
    assert changed.evaluation_hash != tiny.evaluation_hash


def test_card_names_the_extractor(tiny):
    assert evaluation.card(tiny, "one")["card_id"] != evaluation.card(tiny, "two")["card_id"]


def test_card_id_is_a_hash_of_the_card(tiny):
    content = evaluation.card(tiny, "x")
    assert content.pop("card_id") == config.digest(content)


# The study's own extractor


def test_extractor_of_the_digits_study_is_not_the_teacher():
    for profile in (None, "smoke"):
        study = config.load("digits", profile)
        extractor = preparation.build_extractor(study, open_dataset(study.data))
        assert study.teacher.model.startswith("vit_")
        assert isinstance(extractor, SmallCNN)
        kinds = {type(module).__name__ for module in extractor.modules()}
        assert "Conv2d" in kinds
        assert not any("Attention" in kind or "Attn" in kind for kind in kinds)


def test_extractor_weights_come_from_their_own_seed(tiny, make_study):
    torch.manual_seed(0)
    one = preparation.build_extractor(tiny, open_dataset(tiny.data)).state_dict()
    torch.manual_seed(1)
    again = preparation.build_extractor(tiny, open_dataset(tiny.data)).state_dict()
    seeded = make_study("evaluate.extractor.seed=5")
    other = preparation.build_extractor(seeded, open_dataset(seeded.data)).state_dict()
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


# Evaluating runs


@pytest.fixture(scope="module")
def trained(new_output, tiny_overrides):
    """A folder with three tiny trained runs and an extractor; tests work on copies of it."""
    with new_output() as folder:
        study = config.load("digits", overrides=tiny_overrides)
        preparation.prepare_extractor(study)
        preparation.prepare_autoencoder(study)
        for arm in ARMS:
            training.fit(Run(study, arm, 0), progress=False)
    return folder


@pytest.fixture
def workshop(trained, output):
    """The folder of this test, with a copy of the trained runs."""
    shutil.copytree(trained, output, dirs_exist_ok=True)
    return output


@pytest.fixture
def counted(monkeypatch):
    """Steps that were drawn, in order: scoring a checkpoint begins with drawing from it."""
    calls, original = [], evaluation.evaluation_samples

    def count(run, step, *more):
        calls.append((run.arm, step))
        return original(run, step, *more)

    monkeypatch.setattr(evaluation, "evaluation_samples", count)
    return calls


def evaluate(study, arm):
    return evaluate_run(Run(study, arm, 0), progress=False)


def test_evaluation_gives_a_row_per_kept_step(workshop, tiny):
    rows = evaluate(tiny, "vanilla")
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        assert list(row)[:4] == ["arm", "seed", "step", "images_seen"]
        assert set(evaluation.columns(tiny)) == set(row)
        assert (row["arm"], row["seed"], row["n"]) == ("vanilla", 0, 40)
        assert row["images_seen"] == 16 * row["step"]
        assert np.isfinite([row[name] for name in evaluation.METRICS]).all()
    assert len({row["fid"] for row in rows}) == 3
    kept = json.loads(Run(tiny, "vanilla", 0).evaluation_path.read_text())
    assert {row["card"] for row in rows} == {kept["card"]["card_id"]}


def test_scores_are_those_of_the_drawn_images(workshop, tiny):
    row = evaluate(tiny, "vanilla")[-1]
    images, _ = evaluation_samples(Run(tiny, "vanilla", 0), 12, 10)
    scorer = evaluation.Scorer(tiny)
    expected = score(images, scorer.real["train"], scorer.extractor, tiny.evaluate)
    held_out = score(images, scorer.real["test"], scorer.extractor, tiny.evaluate)
    assert {name: row[name] for name in evaluation.METRICS} == expected
    assert {name: row[f"{name}_heldout"] for name in evaluation.METRICS} == held_out


def test_what_is_scored_is_not_scored_again(workshop, tiny, counted):
    first = evaluate(tiny, "vanilla")
    assert counted == [("vanilla", 4), ("vanilla", 8), ("vanilla", 12)]
    counted.clear()
    assert evaluate(tiny, "vanilla") == first
    assert counted == []


def test_other_settings_are_scored_again(workshop, tiny, make_study, counted):
    evaluate(tiny, "vanilla")
    counted.clear()
    changed = evaluate(make_study("sample.sampler=euler"), "vanilla")
    assert counted == [("vanilla", 4), ("vanilla", 8), ("vanilla", 12)]
    assert changed[0]["card"] != evaluate(tiny, "vanilla")[0]["card"]


@pytest.mark.parametrize(("first", "second"), [("holistic", "haste"), ("haste", "holistic")])
def test_a_shared_checkpoint_has_one_score(first, second, workshop, tiny, counted):
    one = evaluate(tiny, first)
    counted.clear()
    other = evaluate(tiny, second)
    assert counted == [(second, 12)]
    for a, b in zip(one[:2], other[:2], strict=True):
        assert {k: v for k, v in a.items() if k != "arm"} == {k: v for k, v in b.items() if k != "arm"}


@pytest.mark.parametrize("order", [("holistic", "haste"), ("haste", "holistic")])
def test_samples_of_shared_checkpoints_are_found_in_whatever_order_runs_were_scored(order, workshop, tiny):
    study = tiny.model_copy(update={"arms": {arm: tiny.arms[arm] for arm in ("holistic", "haste")}})
    for arm in order:
        evaluate(study, arm)
    found = report.collect_samples(report.Report(study, workshop / "report"), count=10)
    assert set(found) == {f"{arm}@{step}" for arm in ("holistic", "haste") for step in (4, 8, 12)}
    assert np.array_equal(found["holistic@8"], found["haste@8"])


def test_kept_samples_are_those_of_the_present_settings(workshop, tiny, make_study):
    # Scores are kept per setting, so the pictures beside them have to be too.
    other = make_study("evaluate.seed=1000")
    for study in (tiny, other, tiny):
        evaluate(study, "vanilla")
    only = tiny.model_copy(update={"arms": {"vanilla": {}}})
    found = report.collect_samples(report.Report(only, workshop / "report"), count=10)["vanilla@12"]
    expected, _ = evaluation_samples(Run(tiny, "vanilla", 0), 12, 10)
    assert np.array_equal(found, expected[:10].numpy())


def test_a_missing_checkpoint_is_an_error_with_the_command_that_makes_it(workshop, tiny):
    run = Run(tiny, "vanilla", 0)
    run.checkpoint_path(8).unlink()
    with pytest.raises(HasteError, match=r"\[8\].*haste train digits vanilla --seed 0"):
        evaluate(tiny, "vanilla")


def test_rows_of_a_run_without_scores_name_the_command(output, tiny):
    with pytest.raises(HasteError, match="haste evaluate digits haste --seed 3"):
        evaluation.rows(Run(tiny, "haste", 3))


def test_images_of_equal_weights_are_equal_to_the_bit(workshop, tiny):
    (one, a), (other, b) = (evaluation_samples(Run(tiny, arm, 0), 8, 10) for arm in ("holistic", "haste"))
    assert a == b
    assert one.dtype == torch.uint8
    assert one.shape == (40, 1, 8, 8)
    assert torch.equal(one, other)
    assert not torch.equal(one, evaluation_samples(Run(tiny, "haste", 0), 12, 10)[0])


def test_noise_and_labels_are_the_same_for_every_arm_seed_and_step(workshop, tiny, monkeypatch):
    loaded = evaluation.generator_at(Run(tiny, "vanilla", 0), 12)
    monkeypatch.setattr(evaluation, "generator_at", lambda run, step: loaded)
    expected, _ = evaluation_samples(Run(tiny, "vanilla", 0), 12, 10)
    for arm, seed, step in (("haste", 0, 12), ("repa", 1, 4), ("vanilla", 7, 8)):
        torch.manual_seed(seed)
        assert torch.equal(evaluation_samples(Run(tiny, arm, seed), step, 10)[0], expected)


def test_images_do_not_depend_on_the_batch_they_are_drawn_in(workshop, tiny, make_study):
    # That is why sample.batch_size is not on the card.
    run = Run(tiny, "vanilla", 0)
    expected, _ = evaluation_samples(run, 12, 10)
    for size in (1, 7, 40):
        images, _ = evaluation_samples(Run(make_study(f"sample.batch_size={size}"), "vanilla", 0), 12, 10)
        # Sums in another order may move a value over a rounding edge; nothing else may.
        assert (images.int() - expected.int()).abs().max() <= 1
        assert (images != expected).double().mean() < 0.002


def test_evaluation_draws_from_the_averaged_weights(workshop, tiny):
    run = Run(tiny, "vanilla", 0)
    tensors, state = run.load(12)
    model, fingerprint = evaluation.generator_at(run, 12)
    name = "final_layer.linear.weight"
    assert fingerprint == state["ema_fingerprint"]
    assert torch.equal(model.state_dict()[name].cpu(), tensors[f"ema.{name}"])
    assert not torch.equal(tensors[f"ema.{name}"], tensors[f"model.{name}"])
    assert not model.training


def test_the_floor_compares_real_images_with_real_ones(workshop, tiny):
    scorer = evaluation.Scorer(tiny)
    floor = {row["pair"]: row for row in scorer.floor()}
    sizes = {pair: (row["n"], row["n_reference"]) for pair, row in floor.items()}
    assert sizes == {
        "held-out against held-in": (450, 1212),
        "augmented held-in against held-in": (1212, 1212),
        "augmented held-in against held-out": (1212, 450),
    }
    noise = torch.randint(0, 256, (450, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    far = score(noise, scorer.real["train"], scorer.extractor, tiny.evaluate)["fid"]
    for row in floor.values():
        assert set(row) == {"pair", "n", "n_reference", *evaluation.metrics_of(tiny)}
        assert 0 < row["fid"] < far / 10
        assert row["precision"] > 0.5
    assert floor["held-out against held-in"]["fid"] == pytest.approx(
        score(scorer.real["test"], scorer.real["train"], scorer.extractor, tiny.evaluate)["fid"]
    )


def test_the_floor_is_measured_once_for_a_card(workshop, tiny, monkeypatch):
    scorer = evaluation.Scorer(tiny)
    first = evaluation.floor(scorer, tiny)
    assert first == scorer.floor()
    monkeypatch.setattr(scorer, "floor", lambda: pytest.fail("measured again"))
    assert evaluation.floor(scorer, tiny) == first


def test_an_open_scorer_is_used_as_it_is(workshop, tiny, monkeypatch):
    scorer = evaluation.Scorer(tiny)
    monkeypatch.setattr(evaluation, "open_scorer", lambda *_: pytest.fail("opened again"))
    rows = evaluation.evaluate_run(Run(tiny, "vanilla", 0), progress=False, scorer=scorer)
    assert rows[-1]["card"] == scorer.card["card_id"]


def test_evaluating_touches_no_cache_and_no_teacher(workshop, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr("haste_core.teacher.build_encoder", lambda *_: pytest.fail("the teacher was built"))
    evaluate(tiny, "haste")
    assert not (tmp_path / "torch_home").exists()


def test_an_arm_that_averages_its_weights_differently_has_another_card(workshop, tiny, make_study):
    # The EMA decay is on the card, and an arm may override it.
    usual = evaluate(tiny, "vanilla")[0]["card"]
    study = make_study("arms.vanilla.train.ema_decay=0.5")
    training.fit(Run(study, "vanilla", 0), progress=False)
    assert evaluate(study, "vanilla")[0]["card"] != usual


def test_an_interrupted_evaluation_goes_on_and_never_passes_as_finished(workshop, tiny, counted, monkeypatch):
    run, original = Run(tiny, "vanilla", 0), evaluation.Scorer.score

    def stop_at_the_second(scorer, generated):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return original(scorer, generated)

    monkeypatch.setattr(evaluation.Scorer, "score", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, "vanilla")
    with pytest.raises(HasteError, match="haste evaluate"):
        evaluation.rows(run)
    monkeypatch.setattr(evaluation.Scorer, "score", original)
    counted.clear()
    assert len(evaluate(tiny, "vanilla")) == 3
    assert counted == [("vanilla", 8), ("vanilla", 12)]


# The suite adm


class GreyInception(torch.nn.Module):
    """In Inception's place: features are the grey values of digits."""

    def get_requested_features_list(self):
        return [extractors.POOL, extractors.SPATIAL, extractors.LOGITS]

    def forward(self, images):
        grey = images[:, 0].flatten(1).float()
        return grey, grey[:, :9], grey[:, :10] / 10


@pytest.fixture
def adm_study(make_study, monkeypatch):
    monkeypatch.setattr(adm, "build_networks", lambda evaluate: adm.Networks(GreyInception(), "grey", None, None))
    # The checkpoints are those of the tiny study; only the evaluation differs.
    return make_study("evaluate.suite=adm", "evaluate.dinov2=none")


def test_the_adm_suite_scores_runs_by_the_same_rows_and_card(workshop, adm_study):
    rows = evaluate(adm_study, "vanilla")
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        head, tail = ("arm", "seed", "step", "images_seen"), ("n", "card", *evaluation.SUMMARIES)
        assert evaluation.columns(adm_study) == (*head, *adm.METRICS, *tail)
        assert set(row) == set(evaluation.columns(adm_study))
        assert np.isfinite([row[name] for name in (*adm.METRICS, *evaluation.SUMMARIES) if name != "fd_dinov2"]).all()
        assert np.isnan(row["fd_dinov2"])
    run = Run(adm_study, "vanilla", 0)
    content = json.loads(run.evaluation_path.read_text())["card"]
    assert content["card_id"] == rows[0]["card"]
    assert (content["suite"], content["extractor"]) == ("adm", "adm-inception-grey")
    assert content["ema_decay"] == run.config.train.ema_decay
    assert evaluation.metrics_of(adm_study) == adm.METRICS


def test_adm_scores_are_those_of_the_same_images_and_are_made_once(workshop, tiny, adm_study, monkeypatch):
    rows = evaluate(adm_study, "vanilla")
    images, _ = evaluation_samples(Run(tiny, "vanilla", 0), 12, 10)
    scorer = adm.AdmScorer(adm_study.evaluate, adm_study.data, progress=False)
    expected = scorer.score(image_sources.MemoryImages(images))
    assert {name: rows[-1][name] for name in adm.METRICS} == pytest.approx(expected, nan_ok=True)
    kept = np.load(evaluation.find_samples(Run(adm_study, "vanilla", 0), 12), allow_pickle=False)
    assert np.array_equal(kept, images[:100].numpy())
    monkeypatch.setattr(evaluation, "evaluation_set", lambda *_: pytest.fail("drawn again"))
    again = evaluate(adm_study, "vanilla")
    assert [row["fid"] for row in again] == [row["fid"] for row in rows]


def test_another_reference_under_the_same_name_is_scored_anew(workshop, make_study, adm_study, tmp_path):
    path = tmp_path / "reference.npz"
    study = make_study("evaluate.suite=adm", "evaluate.dinov2=none", f"evaluate.reference={path}")
    cards = []
    for seed in (0, 1):
        np.savez(path, arr_0=gaussian_images(60, seed, side=8).permute(0, 2, 3, 1).numpy())
        cards.append({(row["card"], row["fid"]) for row in evaluate(study, "vanilla")})
    assert not cards[0] & cards[1]


def test_the_floor_of_the_adm_suite_compares_real_images_with_the_reference(workshop, adm_study):
    scorer = evaluation.open_scorer(adm_study, progress=False)
    rows = {row["pair"]: row for row in scorer.floor()}
    sizes = {pair: (row["n"], row["n_reference"]) for pair, row in rows.items()}
    assert sizes == {"held-out against held-in": (450, 1212), "augmented held-in against held-in": (1212, 1212)}
    far = scorer.score(image_sources.MemoryImages(gaussian_images(450, 0, side=8)))["fid"]
    for row in rows.values():
        assert set(row) == {"pair", "n", "n_reference", *evaluation.metrics_of(adm_study)}
        assert 0 < row["fid"] < far / 10
