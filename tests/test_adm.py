from __future__ import annotations

import io
import json
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.scoring import adm, extractors, image_sources, reference
from haste_core.study.scoring.adm import Networks, extract, scores_of
from haste_core.study.scoring.extractors import LOGITS, POOL, SPATIAL
from haste_core.study.scoring.frechet import Gaussian, Moments, frechet_distance, inception_score, precision_recall
from haste_core.study.scoring.image_sources import MemoryImages, NpzImages, TrainingImages

import timm  # isort: skip
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # isort: skip
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # isort: skip

pytestmark = pytest.mark.xdist_group("adm")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(width, seed):
    root = noise(width, width, seed=seed).numpy()
    return root @ root.T / width


def pictures(n, seed=0, mean=128.0, spread=12.0, side=4, channels=1):
    """uint8 images (n, channels, side, side) with correlated values."""
    values = channels * side * side
    mixing = noise(values, values, seed=seed + 1000) / side
    drawn = mean + spread * noise(n, values, seed=seed) @ mixing
    return drawn.round().clamp(0, 255).to(torch.uint8).reshape(n, channels, side, side)


class Pixels(nn.Module):
    """In Inception's place: pool features are the grey values, spatial ones the first four, logits the first ten."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def get_requested_features_list(self):
        return [POOL, SPATIAL, LOGITS]

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        self.seen += len(images)
        grey = images[:, 0].flatten(1).float()
        return grey, grey[:, :4], grey[:, :10] / 10


class Means(nn.Module):
    """In DINOv2's place: the mean of each quarter of an image."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images[:, :1].float(), 2).flatten(1)


@pytest.fixture
def networks():
    return Networks(Pixels(), "pixels", Means(), "means")


@pytest.fixture
def patched(networks, monkeypatch, output):
    """The networks that every scorer of this test gets."""
    monkeypatch.setattr(adm, "build_networks", lambda evaluate: networks)
    return networks


# Frechet distance


def test_frechet_distance_of_gaussians_with_one_covariance_is_the_squared_shift():
    s = covariance(6, 0)
    a, b = Gaussian(np.zeros(6), s), Gaussian(np.arange(6.0), s)
    assert frechet_distance(a, b) == pytest.approx(55, rel=1e-12)


def test_frechet_distance_of_commuting_covariances_is_that_of_their_roots():
    turn, _ = np.linalg.qr(noise(5, 5).numpy())
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([4.0, 1, 0, 9, 2])
    a, b = Gaussian(np.zeros(5), turn * x @ turn.T), Gaussian(np.zeros(5), turn * y @ turn.T)
    assert frechet_distance(a, b) == pytest.approx(((np.sqrt(x) - np.sqrt(y)) ** 2).sum(), rel=1e-7)


@pytest.mark.parametrize("seed", [0, 1])
def test_frechet_distance_is_the_one_of_torch_fidelity(seed):
    a, b = (Gaussian(noise(20, seed=seed + i).numpy(), covariance(20, seed + i)) for i in (0, 10))
    library = fid_statistics_to_metric(*({"mu": g.mean, "sigma": g.covariance} for g in (a, b)), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(library[KEY_METRIC_FID], rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_of_fewer_images_than_features_is_finite_and_zero_for_equal_sets():
    moments = Moments()
    moments.add(noise(10, 50))
    gaussian = moments.gaussian()
    assert np.linalg.matrix_rank(gaussian.covariance) == 9
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-5)


def test_statistics_of_different_widths_are_refused():
    with pytest.raises(HasteError, match="one extractor"):
        frechet_distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_moments_are_those_of_numpy_however_features_come(size):
    x = (noise(100, 5) * 3 + 50).float()
    moments = Moments()
    for part in x.split(size):
        moments.add(part)
    mean, found = moments.gaussian()
    assert mean.dtype == found.dtype == np.float64
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(found, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_one_image_has_no_covariance():
    moments = Moments()
    moments.add(noise(1, 3))
    with pytest.raises(HasteError, match="1 images"):
        moments.gaussian()


# Inception Score, precision and recall


def test_inception_score_of_certain_and_balanced_classes_is_their_number():
    logits = 1000 * torch.eye(8).repeat(5, 1)
    assert inception_score(logits) == pytest.approx(8, rel=1e-9)


def test_inception_score_of_images_that_say_nothing_is_one():
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1, rel=1e-12)
    assert inception_score(noise(1, 10).repeat(50, 1)) == pytest.approx(1, rel=1e-9)


def test_inception_score_is_averaged_over_parts_of_5000_in_order():
    logits = 50 * torch.eye(2).repeat_interleave(5000, 0)
    assert inception_score(logits) == pytest.approx(1, rel=1e-9)  # each part knows one class
    mixed = logits[torch.randperm(10000, generator=torch.Generator().manual_seed(0))]
    assert inception_score(mixed) == pytest.approx(2, rel=1e-3)
    # 5,000 of both classes and 2,500 of one: (2 + 1) / 2.
    short = torch.cat([50 * torch.eye(2).repeat(2500, 1), logits[:2500]])
    assert inception_score(short) == pytest.approx(1.5, rel=1e-9)


def test_precision_and_recall_of_equal_sets_and_of_half_a_set():
    near, far = noise(40, 6), noise(40, 6, seed=1) + 100
    both = torch.cat([near, far])
    assert precision_recall(both, both, 3) == (1, 1)
    assert precision_recall(near, both, 3) == (1, 0.5)
    assert precision_recall(both, near, 3) == (0.5, 1)


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(HasteError, match=r"3 generated and 9 real images need more than evaluate.neighborhood 3"):
        precision_recall(noise(3, 2), noise(9, 2), 3)


# One pass over the images


def test_scores_of_known_features_are_their_closed_forms(networks):
    real, made = pictures(200, 0), pictures(150, 1, mean=120)
    statistics = {}
    for name, width in (("pool", 16), ("spatial", 4)):
        x = real.flatten(1)[:, :width].double().numpy()
        statistics[name] = Gaussian(x.mean(0), np.cov(x, rowvar=False))
    known = reference.Reference(statistics, real.flatten(1).float(), 200)
    found = scores_of(extract(MemoryImages(made), networks, 64), known, 3)
    x = made.flatten(1).double().numpy()
    for name, width in (("fid", 16), ("sfid", 4)):
        own = Gaussian(x[:, :width].mean(0), np.cov(x[:, :width], rowvar=False))
        assert found[name] == pytest.approx(frechet_distance(own, statistics["pool" if width == 16 else "spatial"]))
    assert (found["precision"], found["recall"]) == precision_recall(made.flatten(1), real.flatten(1), 3)
    assert found["is"] == pytest.approx(inception_score(made.flatten(1)[:, :10].float() / 10))
    assert np.isnan(found["fd_dinov2"])  # the reference has none
    assert list(found) == list(adm.METRICS)
    assert networks.inception.seen == 150


def test_features_do_not_depend_on_the_batch_size_and_scores_not_on_the_order(networks):
    images = pictures(60, 0)
    whole = extract(MemoryImages(images), networks, 60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for other in (extract(MemoryImages(images), networks, 7), extract(MemoryImages(images[order]), networks, 60)):
        for name in ("pool", "spatial", "dinov2"):
            for one, two in zip(whole.moments[name].gaussian(), other.moments[name].gaussian(), strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-11)
    assert torch.equal(extract(MemoryImages(images), networks, 7).pool, whole.pool)


def test_features_are_kept_of_a_fixed_choice_of_images_and_statistics_taken_of_all(networks):
    images = pictures(60, 0)
    some, again = (extract(MemoryImages(images), networks, size, keep=20) for size in (60, 9))
    assert some.pool.shape == (20, 16)
    assert torch.equal(some.pool, again.pool)
    assert some.moments["pool"].n == 60
    rows = {tuple(row) for row in images.flatten(1).float().tolist()}
    assert {tuple(row) for row in some.pool.tolist()} < rows


def test_grey_images_count_as_three_equal_channels(networks):
    grey = pictures(20, 0)
    assert torch.equal(
        extract(MemoryImages(grey), networks, 8).pool,
        extract(MemoryImages(grey.expand(-1, 3, -1, -1)), networks, 8).pool,
    )


def test_too_few_images_are_warned_about(networks, capsys):
    few = extract(MemoryImages(pictures(10, 0)), networks, 10)
    statistics = {"pool": Gaussian(np.zeros(16), np.eye(16)), "spatial": Gaussian(np.zeros(4), np.eye(4))}
    scores_of(few, reference.Reference(statistics, None, 5000), 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "haste: warning: 10 images for pool features of width 16: the distance is biased upwards"


# References


def settings(**more):
    return config.Evaluate(**{"suite": "adm", "batch_size": 64, **more})


def write_npz(path, images=None, **arrays):
    if images is not None:
        arrays["arr_0"] = images.permute(0, 2, 3, 1).numpy()
    np.savez(path, **arrays)
    return str(path)


def statistics_of(images, cut=()):
    """ADM's arrays for the features of `Pixels`."""
    found = {}
    for mean, sigma, width in (("mu", "sigma", 16), ("mu_s", "sigma_s", 4)):
        x = images.flatten(1)[:, :width].double().numpy()
        found |= {mean: x.mean(0), sigma: np.cov(x, rowvar=False)}
    return {key: value for key, value in found.items() if key not in cut}


def score(reference, images, **more):
    return adm.AdmScorer(settings(reference=reference, **more), progress=False).score(MemoryImages(images))


def test_equal_sets_are_perfect(patched, tmp_path):
    images = pictures(100, 0)
    found = score(write_npz(tmp_path / "r.npz", images), images)
    assert found["fid"] == pytest.approx(0, abs=1e-4)
    assert found["sfid"] == pytest.approx(0, abs=1e-4)
    assert found["fd_dinov2"] == pytest.approx(0, abs=1e-4)
    assert (found["precision"], found["recall"]) == (1, 1)


def test_swapping_the_sides_swaps_precision_and_recall_and_keeps_distances(patched, tmp_path):
    one, two = torch.cat([pictures(40, 0, mean=60), pictures(40, 1, mean=190)]), pictures(40, 0, mean=60)
    a = score(write_npz(tmp_path / "one.npz", one), two)
    b = score(write_npz(tmp_path / "two.npz", two), one)
    assert (a["precision"], a["recall"]) == (b["recall"], b["precision"])
    assert a["precision"] != a["recall"]
    for name in ("fid", "sfid", "fd_dinov2"):
        assert a[name] == pytest.approx(b[name], rel=1e-6)


def test_a_reference_of_images_of_statistics_and_of_both_give_the_same(patched, tmp_path):
    real, made = pictures(100, 0), pictures(80, 1, mean=120)
    from_images = score(write_npz(tmp_path / "images.npz", real), made)
    both = score(write_npz(tmp_path / "both.npz", real, **statistics_of(real)), made)
    assert both == pytest.approx(from_images, rel=1e-7)
    alone = score(write_npz(tmp_path / "statistics.npz", **statistics_of(real)), made)
    for name in ("fid", "sfid", "is"):
        assert alone[name] == pytest.approx(from_images[name], rel=1e-7)


def test_a_reference_of_statistics_alone_has_no_precision_and_says_so(patched, tmp_path, capsys):
    path = write_npz(tmp_path / "statistics.npz", **statistics_of(pictures(100, 0)))
    found = score(path, pictures(50, 1))
    assert np.isnan([found[name] for name in ("precision", "recall", "fd_dinov2")]).all()
    assert np.isfinite([found[name] for name in ("fid", "sfid", "is")]).all()
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"haste: warning: {path} holds no images arr_0: precision and recall are not available"
    assert "fd_dinov2 is not available" in second


def test_statistics_in_a_file_win_over_those_of_its_images(patched, tmp_path):
    # ADM's reference batches hold statistics of the whole training set beside 10,000 images.
    whole, some, made = pictures(300, 0), pictures(300, 0)[:60], pictures(80, 1)
    found = score(write_npz(tmp_path / "both.npz", some, **statistics_of(whole)), made)
    assert found["fid"] == score(write_npz(tmp_path / "w.npz", **statistics_of(whole)), made)["fid"]
    assert found["precision"] == score(write_npz(tmp_path / "s.npz", some), made)["precision"]


def test_float32_statistics_are_taken_to_float64(patched, tmp_path):
    real, made = pictures(100, 0), pictures(80, 1)
    single = {key: value.astype(np.float32) for key, value in statistics_of(real).items()}
    found = score(write_npz(tmp_path / "single.npz", **single), made)
    assert found["fid"] == pytest.approx(
        score(write_npz(tmp_path / "d.npz", **statistics_of(real)), made)["fid"], rel=1e-4
    )


def test_training_images_are_the_reference_by_default_and_are_looked_at_once(patched, make_study, tmp_path):
    study = make_study("evaluate.suite=adm")
    one = adm.AdmScorer(study.evaluate, study.data, progress=False)
    assert patched.inception.seen == 1212
    other = adm.AdmScorer(study.evaluate, study.data, progress=False)
    assert patched.inception.seen == 1212
    assert other.facts == one.facts
    images = torch.cat(list(TrainingImages(study.data).batches(500)))
    made = (pictures(90, 0, side=8) // 2).clamp(0, 255)
    from_file = score(write_npz(tmp_path / "train.npz", images), made)
    assert one.score(MemoryImages(made)) == pytest.approx(from_file, rel=1e-9)


def test_what_a_scorer_keeps_of_a_reference_is_itself_a_reference(patched, tmp_path, output):
    real, made = pictures(100, 0), pictures(80, 1)
    expected = score(write_npz(tmp_path / "images.npz", real), made)
    (kept,) = (output / "runs" / "references").glob("*.npz")
    copy = tmp_path / "kept.npz"
    copy.write_bytes(kept.read_bytes())
    assert score(str(copy), made) == pytest.approx(expected, rel=1e-9)
    assert reference.load(copy).n == 100


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros(3)}, "it holds x"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "covariance of shape (2, 2)"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.zeros((1, 1))}, "allow_pickle=False"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "arr_0 is uint8 (4, 8, 8)"),
    ],
)
def test_a_file_that_is_no_reference_is_refused_in_one_line(patched, tmp_path, arrays, words):
    path = tmp_path / "r.npz"
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(HasteError) as stop:
        score(str(path), pictures(20, 0))
    assert words in str(stop.value)
    assert str(path) in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_missing_cut_or_other_file_is_refused(patched, tmp_path):
    good = Path(write_npz(tmp_path / "good.npz", pictures(50, 0))).read_bytes()
    (tmp_path / "cut.npz").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("none.npz", "cut.npz", "text.npz", "one.npy"):
        with pytest.raises(HasteError, match=name):
            score(str(tmp_path / name), pictures(20, 0))
    with pytest.raises(HasteError, match="no reference"):
        adm.AdmScorer(settings(), progress=False)


# Where images lie


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_npz_file_are_read_in_parts(tmp_path, save):
    images = pictures(23, 0, channels=3)
    save(tmp_path / "x.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), labels=np.zeros(23))
    source = NpzImages(tmp_path / "x.npz")
    assert len(source) == 23
    parts = list(source.batches(10))
    assert [len(part) for part in parts] == [10, 10, 3]
    assert torch.equal(torch.cat(parts), images)


def test_an_npz_file_cut_behind_its_header_is_refused_when_read(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=np.zeros((50, 8, 8, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[2000] ^= 1  # a flipped bit inside the images
    path.write_bytes(bytes(content))
    with pytest.raises(HasteError, match=r"x.npz"):
        list(NpzImages(path).batches(10))


def test_training_images_are_not_augmented(make_study):
    study = make_study("data.augment.shift=2")
    source = TrainingImages(study.data)
    plain = source.dataset.images("train")[0]
    assert torch.equal(torch.cat(list(source.batches(100))), image_sources.to_uint8(plain))


def image_folder(folder, shade=0):
    """Six images of two classes; `shade` changes one value of one of them."""
    from PIL import Image

    for i in range(12):
        pixels = np.full((8, 8, 3), 10 * i, np.uint8)
        pixels[0, 0, 0] = shade if i == 3 else 0
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return config.Data(kind="images", path=str(folder), image_size=8, test_fraction=0.5)


def test_the_hash_of_training_images_follows_their_content_and_not_their_path(output, tmp_path):
    one, moved, other = (
        image_sources.training_hash(TrainingImages(image_folder(tmp_path / name, shade)))
        for name, shade in (("one", 0), ("moved", 0), ("other", 1))
    )
    assert one == moved
    in_train = bool((torch.cat(list(TrainingImages(image_folder(tmp_path / "other", 1)).batches(9))) == 1).any())
    assert (one != other) == in_train


def test_of_a_large_set_a_spread_of_images_is_hashed(make_study, monkeypatch):
    source = TrainingImages(make_study().data)
    whole = image_sources.training_hash(source)
    monkeypatch.setattr(image_sources, "HASHED_WHOLE", 1000)
    monkeypatch.setattr(image_sources, "HASHED_IMAGES", 10)
    asked = []
    at = source.at
    monkeypatch.setattr(source, "at", lambda indices: asked.extend(indices.tolist()) or at(indices))
    assert image_sources.training_hash(source) != whole
    assert len(asked) == 11
    assert (min(asked), max(asked)) == (0, 1211)


# The real Inception


class Blank(FeatureExtractorInceptionV3):
    """torch-fidelity's network with the weights it was built with."""

    def load_state_dict(self, state):
        pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random Inception weights, of a size that keeps activations alive, as a local file."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Blank("blank", [POOL], feature_extractor_weights_path=empty)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return extractors.build_inception(str(weights))[0]


@torch.no_grad()
def test_spatial_features_are_seven_channels_of_the_branch_before_concatenation(inception):
    images = pictures(3, 0, channels=3, side=16)
    plain = FeatureExtractorInceptionV3.forward
    found = dict(zip(inception.get_requested_features_list(), inception(images), strict=True))
    blocks = {}
    handle = inception.Mixed_6d.register_forward_hook(lambda module, inputs, output: blocks.update(cat=output))
    again = dict(zip([POOL, LOGITS], plain(inception, images), strict=True))
    handle.remove()
    # The block's output is (branch1x1, ...) side by side, so its first channels are that branch's.
    assert blocks["cat"].shape == (3, 768, 17, 17)
    assert found[SPATIAL].shape == (3, 17 * 17 * 7)
    by_hand = np.stack([
        [blocks["cat"][i, c, y, x].item() for y in range(17) for x in range(17) for c in range(7)] for i in range(3)
    ])  # fmt: skip
    assert np.array_equal(found[SPATIAL].numpy(), by_hand)
    assert by_hand.std() > 0.01
    assert torch.equal(found[POOL], again[POOL])
    assert torch.equal(found[LOGITS], again[LOGITS])
    assert found[POOL].shape == (3, 2048)
    assert found[LOGITS].shape == (3, 1008)


def test_the_real_network_gives_all_scores_from_one_file_of_images(inception, weights, tmp_path, output, capsys):
    real, made = pictures(6, 0, channels=3, side=16), pictures(5, 1, channels=3, side=16)
    evaluate = settings(reference=write_npz(tmp_path / "r.npz", real), inception=str(weights), dinov2="none")
    scorer = adm.AdmScorer(evaluate, progress=False)
    found = scorer.score(MemoryImages(made))
    assert np.isfinite([found[name] for name in adm.METRICS if name != "fd_dinov2"]).all()
    assert np.isnan(found["fd_dinov2"])
    assert found["fid"] > 0
    assert 1 <= found["is"] <= 5
    assert scorer.facts["extractor"].startswith("adm-inception-")
    assert scorer.facts["dinov2"] is None
    assert "5 images for pool features of width 2048" in capsys.readouterr().err


def test_only_the_spatial_features_can_be_asked_for(weights, inception):
    name, _ = extractors.register_inception(str(weights))
    one = extractors.create_feature_extractor(name, [SPATIAL], cuda=False, verbose=False)
    images = pictures(1, 0, channels=3, side=16)
    with torch.no_grad():
        assert torch.equal(one(images)[0], inception(images)[1])
    assert list(one.convert_features_tuple_to_dict((torch.zeros(1),))) == [SPATIAL]


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_weights_that_would_execute_something_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.bias": Evil()}, "a.pth")
    Path("b.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(HasteError, match=name) as stop:
            extractors.build_inception(name)
        assert "\n" not in str(stop.value)
    assert not Path("evil").exists()


def test_weights_of_another_network_or_none_are_refused_in_one_line(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"123")
    for name in ("linear.pth", "list.pth", "bad.safetensors", "none.pth"):
        with pytest.raises(HasteError) as stop:
            extractors.build_inception(str(tmp_path / name))
        line = str(stop.value)
        assert name in line
        assert "\n" not in line
        assert extractors.INCEPTION_FILE in line


def test_without_network_the_error_names_file_source_and_setting(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(HasteError) as stop:
        extractors.build_inception("hub")
    line = str(stop.value)
    for word in ("weights-inception-2015-12-05-6726825d.pth", "https://github.com/toshas", "evaluate.inception=PATH"):
        assert word in line
    assert "\n" not in line


def test_hub_weights_are_downloaded_once_checked_by_their_hash_and_read_safely(tmp_path, monkeypatch, weights):
    calls = []

    def copy(url, path, hash_prefix, progress):
        calls.append((url, hash_prefix))
        Path(path).write_bytes(weights.read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", copy)
    names = {extractors.register_inception("hub")[0] for _ in range(2)}
    assert calls == [(extractors.URL_INCEPTION_V3, "6726825d")]
    assert names == {extractors.register_inception(str(weights))[0]}


# DINOv2


TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A small vision transformer and its weights as a local file."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model(TINY, num_classes=0).eval()
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(model.state_dict(), path)
    return model, path


@torch.no_grad()
def test_dinov2_features_are_class_tokens_of_resized_and_normalised_images(vit):
    model, path = vit
    network, fingerprint = extractors.build_dinov2(settings(dinov2=str(path), dinov2_model=TINY))
    images = pictures(2, 0, channels=3, side=32)
    x = nn.functional.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(network(images), model.forward_features((x - mean) / std)[:, 0])
    assert len(fingerprint) == 16


def test_dinov2_can_be_left_out_and_its_absence_is_one_line(tmp_path):
    assert extractors.build_dinov2(settings(dinov2="none")) is None
    with pytest.raises(HasteError, match=r"or evaluate.dinov2=none leaves that score out") as stop:
        extractors.build_dinov2(settings(dinov2=str(tmp_path / "no.pth"), dinov2_model=TINY))
    assert "\n" not in str(stop.value)


# haste score


def run_score(*words):
    from haste_core.study.cli import parser

    arguments = parser().parse_args(["score", *map(str, words)])
    arguments.action(arguments)


def test_score_prints_and_writes_the_scores_of_any_npz(patched, tmp_path, capsys):
    made = write_npz(tmp_path / "theirs.npz", pictures(80, 1, channels=3))
    real = write_npz(tmp_path / "real.npz", **statistics_of(pictures(100, 0)))
    run_score(made, "--reference", real, "--out", tmp_path / "scores.json")
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert shown["precision"] == "not available"
    assert stored["scores"]["precision"] is None
    assert shown["fid"] == f"{stored['scores']['fid']:.4f}"
    card = stored["card"]
    assert (card["n"], card["samples"], card["reference"]) == (80, "theirs.npz", "real.npz")
    assert card["samples_hash"] == image_sources.file_hash(Path(made))
    assert card["reference_hash"] == image_sources.file_hash(Path(real))
    assert config.digest({k: v for k, v in card.items() if k != "card_id"}) == card["card_id"] == shown["card_id"]


def test_score_takes_a_study_as_reference(patched, tmp_path, capsys):
    made = write_npz(tmp_path / "made.npz", pictures(90, 0, side=8))
    run_score(made, "--reference", "digits")
    assert "digits train split" in capsys.readouterr().out
    assert patched.inception.seen == 1212 + 90


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no.npz", "--reference", "digits"], "no.npz"),
        (["made.npz", "--reference", "digitz"], "did you mean 'digits'"),
        (["made.npz", "--reference", "no.npz"], "reference no.npz"),
        (["made.npz", "--reference", "digits", "--out", "x.txt"], ".json"),
        (["made.npz", "--reference", "digits", "--batch-size", "0"], "1 and above"),
        ([".", "--reference", "digits"], "a folder that haste sample made"),
    ],
)
def test_score_refuses_what_it_cannot_score(patched, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "made.npz", pictures(90, 0, side=8))
    with pytest.raises(HasteError, match=said.replace("(", r"\(")):
        run_score(*words)
