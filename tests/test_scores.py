"""Numbers made of features against closed forms and against torch-fidelity as a whole; the copy check; cards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from haste_core.errors import HasteError
from haste_core.study import adm, config, scores
from haste_core.study.runs import Run
from haste_core.study.scores import (
    Gaussian,
    Moments,
    compare,
    copy_scores,
    frechet_distance,
    nearest_distances,
    pixel_gaussian,
)

import torch_fidelity  # isort: skip
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # isort: skip
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # isort: skip
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # isort: skip


def settings(**changes):
    return config.EvaluateSettings(**{"kid_subsets": 4, "kid_subset_size": 30, **changes})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_images(n, seed, mean=128.0, spread=12.0, side=4, channels=1):
    """uint8 images (n, channels, side, side) from a Gaussian with correlated pixels, the first ones alike for any n."""
    values = channels * side * side
    mixing = noise(values, values, seed=seed + 1000) / side
    drawn = mean + spread * noise(n, values, seed=seed) @ mixing
    return drawn.round().clamp(0, 255).to(torch.uint8).reshape(n, channels, side, side)


class Pixels(torch.nn.Module):
    """Features are the grey values themselves."""

    def features(self, x):
        return ((x + 1) * 127.5).round().flatten(1)


def score(generated, real, evaluate=None):
    evaluate = evaluate or settings()
    features = (scores.extract_features(images, Pixels(), evaluate.batch_size) for images in (generated, real))
    return scores.compare(*features, evaluate)


def covariance(width, seed):
    root = noise(width, width, seed=seed).numpy()
    return root @ root.T / width


# Frechet distance and its statistics


def test_frechet_distance_against_closed_forms_and_torch_fidelity():
    s = covariance(6, 0)
    assert frechet_distance(Gaussian(np.zeros(6), s), Gaussian(np.arange(6.0), s)) == pytest.approx(55, rel=1e-12)
    turn, _ = np.linalg.qr(noise(5, 5).numpy())
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([4.0, 1, 0, 9, 2])
    commuting = (Gaussian(np.zeros(5), turn * values @ turn.T) for values in (x, y))
    assert frechet_distance(*commuting) == pytest.approx(((np.sqrt(x) - np.sqrt(y)) ** 2).sum(), rel=1e-7)
    a, b = (Gaussian(noise(20, seed=i).numpy(), covariance(20, i)) for i in (0, 10))
    library = fid_statistics_to_metric(*({"mu": g.mean, "sigma": g.covariance} for g in (a, b)), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(library[KEY_METRIC_FID], rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    with pytest.raises(HasteError, match="one extractor"):
        frechet_distance(a, Gaussian(np.zeros(3), np.eye(3)))
    with pytest.raises(HasteError, match="1 images"):
        pixel_gaussian(torch.zeros(1, 1, 8, 8))
    with pytest.raises(HasteError, match="uint8"):
        score(gaussian_images(20, 0).float(), gaussian_images(20, 0))


@pytest.mark.parametrize(
    ("x", "size", "tolerance"),
    [
        ((noise(100, 5) * 3 + 50).float(), 7, 1e-10),
        ((noise(100, 5) * 3 + 50).float(), 100, 1e-10),
        (1e4 + 1e-2 * noise(5000, 4, seed=3), 700, 1e-6),  # far from zero
    ],
)
def test_moments_are_those_of_numpy_in_parts_of_any_size(x, size, tolerance):
    moments = Moments()
    for part in x.split(size):
        moments.add(part)
    mean, found = moments.gaussian()
    assert mean.dtype == found.dtype == np.float64
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found, np.cov(x.double().numpy(), rowvar=False), rtol=tolerance, atol=1e-10)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 20)])
def test_pixels_are_compared_whole_or_in_patches_side_by_side(channels, side):
    shown = torch.randint(0, 256, (50, channels, side, side), generator=torch.Generator().manual_seed(0)).byte()
    starts = range(0, side - 7, 8)  # of 20 pixels a margin of 4 is left out
    patches = torch.cat([shown[:, :, i : i + 8, j : j + 8].flatten(1) for i in starts for j in starts])
    pixels = patches.double().numpy() / 127.5 - 1
    found = pixel_gaussian(shown)
    assert found.mean == pytest.approx(pixels.mean(0), abs=1e-6)
    assert found.covariance == pytest.approx(np.cov(pixels.T), abs=1e-5)


# FID, KID, precision and recall


def test_score_is_that_of_torch_fidelity_as_a_whole():
    class Library(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("pixels",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "pixels"

        def forward(self, images):
            return (images[:, 0].flatten(1).double(),)

    class ThreeChannels(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            return self.tensors[0][index].expand(3, -1, -1).contiguous()

    if "test-pixels" not in FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("test-pixels", Library)
    a, b = gaussian_images(120, 0), gaussian_images(100, 1)
    whole = torch_fidelity.calculate_metrics(
        input1=ThreeChannels(a), input2=ThreeChannels(b), feature_extractor="test-pixels", cuda=False, fid=True,
        kid=True, prc=True, kid_subsets=settings().kid_subsets, kid_subset_size=50,
        prc_neighborhood=settings().neighborhood, samples_shuffle=False, save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip
    found = score(a, b, settings(kid_subset_size=50))
    names = ("frechet_inception_distance", "kernel_inception_distance_mean", "precision", "recall")
    assert list(found.values()) == [whole[name] for name in names]


def test_scores_do_not_depend_on_batch_size_or_global_random_state():
    a, b = gaussian_images(80, 0), gaussian_images(80, 1, mean=130)
    one = score(a, b, settings(kid_subset_size=20))
    torch.manual_seed(5)
    np.random.seed(5)
    assert score(a, b, settings(kid_subset_size=20, batch_size=7)) == one


def test_precision_is_of_generated_and_recall_of_real_images():
    real = torch.cat([gaussian_images(60, 0, mean=60, spread=5), gaussian_images(60, 1, mean=190, spread=5)])
    generated = torch.cat([real[:60], torch.full((20, 1, 4, 4), 255, dtype=torch.uint8)])
    one, other = score(generated, real), score(real, generated)
    assert (one["precision"], one["recall"]) == (0.75, 0.5)
    assert (other["precision"], other["recall"]) == (0.5, 0.75)
    equal = score(real, real)
    assert (equal["precision"], equal["recall"]) == (1, 1)
    assert equal["fid"] == pytest.approx(0, abs=1e-6)


# Copies


def test_copies_of_training_images_are_found():
    training, held_out = gaussian_images(200, 0), gaussian_images(100, 1)

    def check(generated):
        return copy_scores(*(nearest_distances(images, training.split(60)) for images in (generated, held_out)))

    assert check(training[:50]) == {"nearest": 0, "copies": 1}
    assert check(torch.cat([training[:50], torch.zeros(50, 1, 4, 4).byte()]))["copies"] == 0.5
    assert check(held_out)["nearest"] == 1
    assert check(held_out)["copies"] <= 0.01


def test_nearest_distances_are_those_of_a_loop_over_all_pairs():
    made, known = gaussian_images(7, 3), gaussian_images(30, 4)
    pairs = (made.double()[:, None] - known.double()[None]).flatten(2).norm(dim=2) / 127.5
    torch.testing.assert_close(nearest_distances(made, known.split(11)), pairs.min(1).values, rtol=1e-6, atol=0)


# The card

# By suite: "both", "study" or "adm" alone.
CHANGES_A_SCORE = {
    "sample.sampler": ("both", "euler"),
    "sample.solver_steps": ("both", 3),
    "sample.grid": ("both", "uniform"),
    "sample.guidance": ("both", 2.0),
    "sample.guidance_low": ("both", 0.1),
    "sample.guidance_high": ("both", 0.9),
    "sample.guidance_channels": ("both", 1),
    "sample.precision": ("both", "bf16"),
    "sample.compile": ("both", "true"),
    "evaluate.n": ("both", 41),
    "evaluate.seed": ("both", 1),
    "evaluate.labels": ("both", "random"),
    "evaluate.kid_subsets": ("study", 3),
    "evaluate.kid_subset_size": ("study", 19),
    "evaluate.neighborhood": ("both", 4),
    "evaluate.denoising_images": ("both", 30),
    "evaluate.dinov2": ("adm", "none"),
    "evaluate.dinov2_model": ("adm", "vit_base_patch14_dinov2.lvd142m"),
    "evaluate.reference": ("adm", "REFERENCE"),  # a file that the test writes
    "train.ema_decay": ("both", 0.5),
    "data.split_seed": ("both", 1),
    "data.test_fraction": ("both", 0.3),
}
CHANGES_NOTHING = {
    "sample.batch_size": 7,
    "train.threads": 2,
    "train.log_every": 3,
    "train.checkpoint_every": 4,
    "evaluate.batch_size": 9,
}
# On the card through something else: the fingerprint of weights, the fields of a preset, the suite's own card, scenes.
ELSEWHERE = {
    "evaluate.extractor", "evaluate.autoencoder", "evaluate.extractor_width", "evaluate.inception", "sample.preset",
    "sample.vae", "sample.any_vae", "evaluate.suite", "evaluate.resize", "evaluate.caption_images",
}  # fmt: skip


def card(study, extractor="x"):
    """The card of a study under an extractor's name, without opening the extractor."""
    if study.evaluate.suite == "adm":
        facts = adm.scoring_facts(study.evaluate, adm.open_reference(study.evaluate, study.data), extractor)
    else:
        facts = scores.scoring_facts(study, extractor)
    return scores.card(study, facts | scores.probe_of(study).facts)


@pytest.fixture(scope="module")
def plain(tiny_overrides):
    """Cards of the tiny study in both suites."""
    suites = ("study", "adm")
    return {s: card(config.load("digits", overrides=[*tiny_overrides, f"evaluate.suite={s}"])) for s in suites}


def write_reference(path, shift=0):
    path.parent.mkdir(exist_ok=True)
    np.savez(path, arr_0=np.full((9, 8, 8, 3), 7 + shift, np.uint8))
    return path


OF_ONE_SUITE = [key for key, (where, _) in CHANGES_A_SCORE.items() if where != "both"]


@pytest.mark.parametrize(
    ("suite", "key"),
    [("study", key) for key in (*CHANGES_A_SCORE, *CHANGES_NOTHING)]
    + [("adm", key) for key in (*OF_ONE_SUITE, "evaluate.neighborhood")],
)
def test_the_card_changes_with_settings_that_change_a_score_and_no_others(suite, key, make_study, plain, tmp_path):
    where, value = CHANGES_A_SCORE[key] if key in CHANGES_A_SCORE else ("none", CHANGES_NOTHING[key])
    if value == "REFERENCE":
        value = write_reference(tmp_path / "r.npz")
    changed = make_study(f"evaluate.suite={suite}", f"{key}={value}")
    if where in ("both", suite):
        assert card(changed)["card_id"] != plain[suite]["card_id"]
    else:
        assert card(changed) == plain[suite]
    # Scores under other settings are kept in another file.
    if key in CHANGES_A_SCORE and not key.startswith("train."):
        assert changed.evaluation_hash != make_study(f"evaluate.suite={suite}").evaluation_hash


def test_every_sampling_and_scoring_setting_is_in_the_lists_above():
    sections = {"sample": config.SampleSettings, "evaluate": config.EvaluateSettings}
    fields = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    assert fields <= set(CHANGES_A_SCORE) | set(CHANGES_NOTHING) | ELSEWHERE


def test_the_card_follows_suite_extractor_and_content_of_the_reference_and_not_its_folder(
    tiny, plain, make_study, tmp_path
):
    assert plain["study"]["card_id"] != plain["adm"]["card_id"]
    assert card(tiny, "another")["card_id"] != plain["study"]["card_id"]
    places = [write_reference(tmp_path / name / "r.npz", shift) for name, shift in (("a", 0), ("b", 0), ("c", 1))]
    one, moved, other = (card(make_study("evaluate.suite=adm", f"evaluate.reference={place}")) for place in places)
    assert one == moved
    assert one["card_id"] != other["card_id"]


def test_the_card_follows_real_images_and_not_the_settings_behind_them(make_study, plain):
    # Of the images on the card, augmentation changes only the training images of the denoising loss.
    changed, usual = card(make_study("data.augment.shift=2")), plain["study"]
    assert {key for key in usual if usual[key] != changed[key]} == {"denoising", "card_id"}
    other = card(make_study("data.split_seed=1"))
    assert all(other[key] != usual[key] for key in ("reference_hash", "reference_heldout_hash"))


def test_the_card_of_a_run_differs_in_its_own_settings_alone(make_study):
    study = make_study("arms.vanilla.train={ema_decay: 0.5}", "arms.vanilla.sample={solver_steps: 3}")
    content = card(study)
    other = scores.card_of(content, Run(study, "vanilla", 0))
    assert {name for name in content if content[name] != other[name]} == {"ema_decay", "solver_steps", "card_id"}
    assert scores.card_of(content, Run(study, "repa", 0)) == content


def test_features_that_are_not_finite_or_too_few_are_refused():
    good, bad, few = noise(50, 4, seed=0), noise(50, 4, seed=1), noise(3, 4, seed=2)
    bad[[3, 7]] = torch.nan
    for pair, words in (
        ((bad, good), "features of 2 of 50 images are not finite"),
        ((good, bad), "features of 2 of 50 images are not finite"),
        ((few, good), "3 generated and 50 real images; expected more than evaluate.neighborhood"),
        ((good, few), "50 generated and 3 real images; expected more than evaluate.neighborhood"),
    ):
        with pytest.raises(HasteError, match=words):
            compare(*pair, settings())
    with pytest.raises(HasteError, match="features of 2 of 50 images"):
        Moments().add(bad)
