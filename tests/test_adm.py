"""The ADM protocol: scores against closed forms, references, the real Inception's features, DINOv2, haste score."""

from __future__ import annotations

import io
import json
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scores import gaussian_images as pictures
from test_scores import noise
from torch import nn

from haste_core.errors import HasteError
from haste_core.study import adm, config, images
from haste_core.study.adm import LOGITS, POOL, SPATIAL, Networks, extract, inception_score, scores_of
from haste_core.study.cli import main
from haste_core.study.images import MemoryImages, NpzImages, TrainingImages
from haste_core.study.scores import ADM_METRICS, Gaussian, frechet_distance, precision_recall

import timm  # isort: skip
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # isort: skip

pytestmark = pytest.mark.xdist_group("adm")


class Pixels(nn.Module):
    """Replaces Inception: pool features are the grey values, spatial ones the first four, logits the first ten."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        assert (x.dtype, x.shape[1]) == (torch.uint8, 3)
        self.seen += len(x)
        grey = x[:, 0].flatten(1).float()
        return {POOL: grey, SPATIAL: grey[:, :4], LOGITS: grey[:, :10] / 10}


class Means(nn.Module):
    """Replaces DINOv2: the mean of each quarter of an image."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x[:, :1].float(), 2).flatten(1)


@pytest.fixture
def networks():
    return Networks(Pixels(), Means(), "pixels+means")


@pytest.fixture
def patched(networks, monkeypatch, output):
    """The networks that every scorer of this test gets."""
    monkeypatch.setattr(adm, "build_networks", lambda evaluate: networks)
    return networks


# One pass over the images


def test_inception_score_of_known_classes_averaged_over_parts_of_5000_in_order():
    assert inception_score(1000 * torch.eye(8).repeat(5, 1)) == pytest.approx(8, rel=1e-9)
    assert inception_score(noise(1, 10).repeat(50, 1)) == pytest.approx(1, rel=1e-9)
    logits = 50 * torch.eye(2).repeat_interleave(5000, 0)
    assert inception_score(logits) == pytest.approx(1, rel=1e-9)  # one class in each part
    # 5,000 of both classes and 2,500 of one: (2 + 1) / 2.
    short = torch.cat([50 * torch.eye(2).repeat(2500, 1), logits[:2500]])
    assert inception_score(short) == pytest.approx(1.5, rel=1e-9)


def test_scores_of_known_features_are_their_closed_forms(networks, capsys):
    real, made = pictures(200, 0), pictures(150, 1, mean=120)

    def gaussians(x):
        found = statistics_of(x)
        return {"pool": Gaussian(found["mu"], found["sigma"]), "spatial": Gaussian(found["mu_s"], found["sigma_s"])}

    statistics = gaussians(real)
    known = adm.Reference(statistics, real.flatten(1).float(), 200)
    found = scores_of(extract(MemoryImages(made), networks, 64), known, 3)
    assert capsys.readouterr().err == ""
    assert list(found) == list(ADM_METRICS)
    for name, part in (("fid", "pool"), ("sfid", "spatial")):
        assert found[name] == pytest.approx(frechet_distance(gaussians(made)[part], statistics[part]))
    assert (found["precision"], found["recall"]) == precision_recall(
        made.flatten(1).double(), real.flatten(1).double(), 3
    )
    assert found["is"] == pytest.approx(inception_score(made.flatten(1)[:, :10].float() / 10))
    assert np.isnan(found["fd_dinov2"])  # the reference has none
    assert networks.inception.seen == 150
    scores_of(extract(MemoryImages(made[:10]), networks, 64), known, 3)
    warning = "haste: warning: 10 images for pool features of width 16: the distance is biased upwards"
    assert warning in capsys.readouterr().err.splitlines()


def test_features_do_not_depend_on_batch_size_or_channels(networks):
    grey = pictures(60, 0)
    whole, parts = (extract(MemoryImages(grey), networks, size) for size in (60, 7))
    for name in ("pool", "spatial", "dinov2"):
        for one, two in zip(whole.moments[name].gaussian(), parts.moments[name].gaussian(), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-11)
    assert torch.equal(parts.pool, whole.pool)
    assert torch.equal(extract(MemoryImages(grey.expand(-1, 3, -1, -1)), networks, 8).pool, whole.pool)
    some, again = (extract(MemoryImages(grey), networks, size, keep=20) for size in (60, 9))
    assert some.moments["pool"].n == 60
    assert torch.equal(some.pool, again.pool)
    assert some.pool.shape == (20, 16)
    assert {tuple(row) for row in some.pool.tolist()} < {tuple(row) for row in whole.pool.tolist()}


# References


def settings(**more):
    return config.EvaluateSettings(**{"suite": "adm", "batch_size": 64, **more})


def write_npz(path, content=None, **arrays):
    if content is not None:
        arrays["arr_0"] = content.permute(0, 2, 3, 1).numpy()
    np.savez(path, **arrays)
    return str(path)


def statistics_of(content):
    """ADM's arrays for the features of `Pixels`."""
    found = {}
    for mean, sigma, width in (("mu", "sigma", 16), ("mu_s", "sigma_s", 4)):
        x = content.flatten(1)[:, :width].double().numpy()
        found |= {mean: x.mean(0), sigma: np.cov(x, rowvar=False)}
    return found


def score(reference, generated):
    return adm.AdmScorer(settings(reference=reference), progress=False).score(generated)


def test_references_of_images_of_statistics_and_of_features_agree(patched, tmp_path, output, capsys):
    real, made = pictures(100, 0), pictures(80, 1, mean=120)
    from_images = score(write_npz(tmp_path / "images.npz", real), made)
    # The file kept of a reference is itself a reference.
    (kept,) = (output / "runs" / "references").glob("*.npz")
    assert score(str(kept), made) == pytest.approx(from_images, rel=1e-9)
    assert adm.load_reference(kept).n == 100
    assert capsys.readouterr().err == ""
    for dtype, tolerance in ((np.float64, 1e-7), (np.float32, 1e-4)):
        arrays = {key: value.astype(dtype) for key, value in statistics_of(real).items()}
        path = write_npz(tmp_path / "statistics.npz", **arrays)
        found = score(path, made)
        for name in ("fid", "sfid", "is"):
            assert found[name] == pytest.approx(from_images[name], rel=tolerance)
        assert {name for name in found if np.isnan(found[name])} == {"precision", "recall", "fd_dinov2"}
        first, second = capsys.readouterr().err.splitlines()
        assert first == f"haste: warning: {path} holds no images arr_0: precision and recall are not available"
        assert "fd_dinov2 is not available" in second


def test_statistics_in_a_file_take_precedence_over_those_of_its_images(patched, tmp_path):
    # ADM's reference batches hold statistics of the whole training set beside 10,000 images.
    whole, some, made = pictures(300, 0), pictures(300, 0)[:60], pictures(80, 1)
    found = score(write_npz(tmp_path / "both.npz", some, **statistics_of(whole)), made)
    assert found["fid"] == score(write_npz(tmp_path / "w.npz", **statistics_of(whole)), made)["fid"]
    assert found["precision"] == score(write_npz(tmp_path / "s.npz", some), made)["precision"]


def test_training_images_are_the_reference_by_default_and_are_extracted_once(patched, make_study, tmp_path):
    study = make_study("evaluate.suite=adm")
    one, other = (adm.AdmScorer(study.evaluate, study.data, progress=False) for _ in range(2))
    assert patched.inception.seen == 1212
    assert other.facts == one.facts
    training = torch.cat(list(TrainingImages(study.data).batches(500)))
    made = pictures(90, 0, side=8) // 2
    from_file = score(write_npz(tmp_path / "train.npz", training), made)
    assert one.score(made) == pytest.approx(from_file, rel=1e-9)


def saved(**arrays):
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=True, **arrays)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (saved(x=np.zeros(3)), "it holds x"),
        (saved(mu=np.zeros(3), sigma=np.zeros((2, 2))), "covariance of shape (2, 2)"),
        (saved(mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1))), "allow_pickle=False"),
        (saved(arr_0=np.zeros((4, 8, 8, 3), np.float32)), "arr_0 is float32"),
        (saved(arr_0=np.zeros((4, 8, 8), np.uint8)), "arr_0 is uint8 (4, 8, 8)"),
        (saved(arr_0=np.zeros((4, 8, 8, 3), np.uint8))[:400], "not a zip file"),
        (b"hello", "not a zip file"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_reference_is_refused_in_one_line(patched, tmp_path, content, words):
    path = tmp_path / "r.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HasteError) as stop:
        score(str(path), pictures(20, 0))
    assert words in str(stop.value)
    assert str(path) in str(stop.value)
    assert "\n" not in str(stop.value)


# Sources of images


def test_images_of_an_npz_file_are_read_in_parts_and_refused_where_they_are_damaged(tmp_path):
    content = pictures(23, 0, channels=3)
    np.savez_compressed(tmp_path / "x.npz", arr_0=content.permute(0, 2, 3, 1).numpy(), labels=np.zeros(23))
    parts = list(NpzImages(tmp_path / "x.npz").batches(10))
    assert [len(part) for part in parts] == [10, 10, 3]
    assert torch.equal(torch.cat(parts), content)
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((50, 8, 8, 3), np.uint8))
    with (tmp_path / "x.npz").open("r+b") as stream:
        stream.seek(2000)
        stream.write(b"x")
    with pytest.raises(HasteError, match=r"x.npz"):
        list(NpzImages(tmp_path / "x.npz").batches(10))


def test_training_images_are_not_augmented_and_are_hashed_by_content(make_study, monkeypatch):
    study, other = make_study("data.augment.shift=2"), make_study("data.split_seed=1")
    source = TrainingImages(study.data)
    whole = source.hash()
    assert torch.equal(torch.cat(list(source.batches(100))), images.to_uint8(source.dataset.images("train")[0]))
    assert TrainingImages(make_study().data).hash() == whole
    assert TrainingImages(other.data).hash() != whole
    # Of a large set a spread of images is hashed.
    monkeypatch.setattr(images, "HASHED_WHOLE", 1000)
    monkeypatch.setattr(images, "HASHED_IMAGES", 10)
    assert source.hash() != whole


# The real Inception


class Blank(FeatureExtractorInceptionV3):
    """torch-fidelity's network with its initial weights."""

    def load_state_dict(self, state):
        pass


@pytest.fixture
def weights(tmp_path):
    """Random Inception weights, of a size that keeps activations away from zero, as a local file."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = Blank("blank", [POOL], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
@torch.no_grad()
def test_spatial_features_are_seven_channels_of_the_branch_before_concatenation(weights):
    shown = pictures(2, 0, channels=3, side=16)
    inception, _ = adm.build_inception(str(weights))
    blocks = {}
    inception.network.Mixed_6d.register_forward_hook(lambda module, inputs, output: blocks.update(cat=output))
    found = inception(shown)
    # The block's output is (branch1x1, ...) side by side, so its first channels are that branch's.
    assert blocks["cat"].shape == (2, 768, 17, 17)
    by_hand = np.stack([
        [blocks["cat"][i, c, y, x].item() for y in range(17) for x in range(17) for c in range(7)] for i in range(2)
    ])  # fmt: skip
    assert np.array_equal(found[SPATIAL].numpy(), by_hand)
    assert by_hand.std() > 0.01
    plain = FeatureExtractorInceptionV3("plain", [POOL, LOGITS], feature_extractor_weights_path=str(weights))(shown)
    assert all(torch.equal(found[name], value) for name, value in zip((POOL, LOGITS), plain, strict=True))
    assert (found[POOL].shape, found[LOGITS].shape) == ((2, 2048), (2, 1008))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_weights_that_are_missing_execute_code_or_are_of_another_network_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.bias": Evil()}, "a.pth")
    Path("b.pth").write_bytes(pickle.dumps(Evil()))
    torch.save(nn.Linear(2, 2).state_dict(), "linear.pth")
    torch.save([1, 2], "list.pth")
    Path("bad.safetensors").write_bytes(b"123")

    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    expected = ("weights-inception-2015-12-05-6726825d.pth", "https://github.com/toshas", "evaluate.inception=PATH")
    for name in ("a.pth", "b.pth", "linear.pth", "list.pth", "bad.safetensors", "none.pth", "hub"):
        with pytest.raises(HasteError) as stop:
            adm.build_inception(name)
        line = str(stop.value)
        assert all(word in line for word in (name, *expected))
        assert "\n" not in line
    assert not Path("evil").exists()


def test_hub_weights_are_downloaded_once_and_checked_by_their_hash(tmp_path, monkeypatch):
    calls, file = [], tmp_path / "weights.pth"
    torch.save({"x": torch.ones(2)}, file)

    def copy(url, path, hash_prefix, progress):
        calls.append((url, hash_prefix))
        Path(path).write_bytes(file.read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", copy)
    monkeypatch.setattr(adm, "Inception", lambda tensors: nn.Identity())
    hashes = {adm.build_inception(where)[1] for where in ("hub", "hub", str(file))}
    assert calls == [(adm.URL_INCEPTION_V3, "6726825d")]
    assert len(hashes) == 1


# DINOv2


@torch.no_grad()
def test_dinov2_features_are_class_tokens_of_resized_and_normalised_images(tmp_path):
    name, path = "vit_tiny_patch16_224", tmp_path / "vit.pth"
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0).eval()
    torch.save(model.state_dict(), path)
    network, fingerprint = adm.build_dinov2(name, str(path))
    shown = pictures(2, 0, channels=3, side=32)
    x = nn.functional.interpolate(shown.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(network(shown), model.forward_features((x - mean) / std)[:, 0])
    assert len(fingerprint) == 16


def test_dinov2_can_be_left_out_and_missing_weights_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(adm, "build_inception", lambda where: (Pixels(), where))
    left_out = adm.build_networks(settings(dinov2="none", inception="x"))
    assert (left_out.dinov2, left_out.name) == (None, "adm-inception-x")
    with pytest.raises(HasteError, match=r"no.pth.*or evaluate.dinov2=none leaves that score out"):
        adm.build_networks(settings(dinov2=str(tmp_path / "no.pth"), dinov2_model="vit_tiny_patch16_224"))


# haste score


def test_score_prints_and_writes_the_scores_of_any_npz(patched, tmp_path, capsys):
    made = write_npz(tmp_path / "theirs.npz", pictures(80, 1, channels=3))
    real = write_npz(tmp_path / "real.npz", **statistics_of(pictures(100, 0)))
    main(["score", made, "--reference", real, "--out", str(tmp_path / "scores.json")])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert shown["precision"] == "not available"
    assert stored["scores"]["precision"] is None
    assert shown["fid"] == f"{stored['scores']['fid']:.4f}"
    card = stored["card"]
    assert (card["n"], card["samples"], card["reference"]) == (80, "theirs.npz", "real.npz")
    assert card["samples_hash"] == images.file_hash(Path(made))
    assert card["reference_hash"] == images.file_hash(Path(real))
    assert config.digest({k: v for k, v in card.items() if k != "card_id"}) == card["card_id"] == shown["card_id"]


def test_folders_of_images_have_the_scores_of_the_same_npz(patched, tmp_path, capsys):
    shown = {
        name: pictures(n, seed, channels=3, side=8) for seed, (name, n) in enumerate({"made": 80, "real": 90}.items())
    }
    for name, of_one in shown.items():
        write_npz(tmp_path / f"{name}.npz", of_one)
        for i, image in enumerate(of_one):
            place = tmp_path / name / f"{i // 50}" / f"{i:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place)

    def score(suffix, *more):
        words = [str(tmp_path / f"made{suffix}"), "--reference", str(tmp_path / f"real{suffix}")]
        assert main(["score", *words, "--out", str(tmp_path / "scores.json"), *more]) == 0
        return json.loads((tmp_path / "scores.json").read_text())

    folders = score("")
    said = capsys.readouterr().err
    assert [said.count(f"{tmp_path / name}: {n} images") for name, n in (("made", 80), ("real", 90))] == [1, 1]
    files = score(".npz")
    assert folders["scores"] == files["scores"]
    assert (folders["card"]["n"], folders["card"]["samples"], folders["card"]["reference"]) == (80, "made", "real")
    halved = score("", "--resize", "4")
    assert halved["scores"]["fid"] != files["scores"]["fid"]
    assert halved["card"]["resize"] == 4
    assert len({card["card"]["card_id"] for card in (folders, files, halved)}) == 3
    (tmp_path / "made" / "manifest.json").write_text('{"icons": []}')  # somebody else's
    assert score("") == folders
    (tmp_path / "made" / "0" / "007.png").write_bytes(b"no image")
    assert main(["score", str(tmp_path / "made"), "--reference", str(tmp_path / "real")]) == 2
    assert "0/007.png cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["made.npz", "--reference", "digitz"], "did you mean 'digits'"),
        (["made.npz", "--reference", "digits", "--out", "x.txt"], ".json"),
        (["made.npz", "--reference", "digits", "--batch-size", "0"], "1 and above"),
        (["empty", "--reference", "digits"], "empty holds no images; expected PNG, JPEG or WebP files"),
        (["mixed", "--reference", "digits"], "mixed holds 2 of 8x8, 1 of 9x9; expected square images of one size"),
        (["long", "--reference", "made.npz"], "long holds 1 of 8x4; expected square images of one size; --resize N"),
        (["made.npz", "--reference", "empty"], "empty holds no images"),
        (["made.npz", "--reference", "large.npz"], "images of 8 pixels against a reference of 12"),
        (["made.npz", "--reference", "large.npz", "--resize", "8"], "--resize 8 is for folders of images"),
        (["made.npz", "--reference", "digits", "--resize", "0"], "--resize 0; expected 1 and above"),
        (["made.npz", "--reference", "no/where"], "--reference no/where is not there; expected a folder"),
        (["made.npz", "--reference", "nan.npz"], "mu or sigma has values that are not finite"),
    ],
)
def test_score_refuses_wrong_input(patched, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "made.npz", pictures(90, 0, side=8))
    write_npz(tmp_path / "large.npz", pictures(90, 0, side=12))
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    for name in ("empty", "mixed", "long"):
        (tmp_path / name).mkdir()
    for i, size in enumerate(((8, 8), (9, 9), (8, 8))):
        Image.new("RGB", size).save(tmp_path / "mixed" / f"{i}.png")
    Image.new("RGB", (8, 4)).save(tmp_path / "long" / "a.webp")
    assert main(["score", *words]) != 0
    assert said in capsys.readouterr().err
