"""The VAE, prepared latents: pairing by name, batches, encoding in shards, and training on them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_images import numbers, picture
from torch.testing import assert_close

from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked
from haste_core.study import config
from haste_core.study import latents as encoding
from haste_core.study.cli import main
from haste_core.study.data import base, open_dataset
from haste_core.study.data import latents as latent_data
from haste_core.study.data.base import center_crop, to_signed, to_tensor
from haste_core.study.data.images import Split
from haste_core.study.data.latents import Folder, Manifest, read_pairs
from haste_core.study.dry_run import find_example
from haste_core.study.latents import Job, Preparation, check, load_vae, prepare, to_images, vae_facts
from haste_core.study.runs import Run
from haste_core.study.train import fit

pytestmark = [pytest.mark.xdist_group("vae"), pytest.mark.usefixtures("caches")]
SIZE, CHANNELS, SIDE, CLASSES = 16, 4, 8, 3
SPLITS = ("train", "validation", "test")
WEIGHTS, SETTINGS = "diffusion_pytorch_model.safetensors", "config.json"


def posterior(index):
    draw = np.random.default_rng(1000 + index)
    mean, std = draw.normal(size=(CHANNELS, SIDE, SIDE)), draw.uniform(0.1, 2, size=(CHANNELS, SIDE, SIDE))
    return np.concatenate([mean, std]).astype(np.float32)


def write_folder(root, n=24):
    """A folder as REPA's preparation leaves it: two shards, lists on both sides, no manifest."""
    lists = {"images": [], "vae-sd": []}
    for i in range(n):
        folder = f"{i // (n // 2):05d}"
        names = {"images": f"{folder}/img{i:08d}.png", "vae-sd": f"{folder}/img-mean-std-{i:08d}.npy"}
        for side, name in names.items():
            (root / side / folder).mkdir(parents=True, exist_ok=True)
            lists[side].append([name, i % CLASSES])
        Image.fromarray(picture(i)).save(root / "images" / names["images"])
        np.save(root / "vae-sd" / names["vae-sd"], posterior(i))
    for side, entries in lists.items():
        (root / side / "dataset.json").write_text(json.dumps({"labels": entries}))
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "prepared")


def latents(folder, **changes):
    return open_dataset(config.DataSettings(kind="latents", path=str(folder), **changes))


def labels_file(folder, side="vae-sd"):
    return folder / side / "dataset.json"


def refused(message, act, *given):
    """`act` raises HasteError with a message of one line that matches."""
    with pytest.raises(HasteError, match=message) as caught:
        act(*given)
    assert "\n" not in str(caught.value)


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content["labels"])
    path.write_text(json.dumps(content))


def relabel(folder, edit):
    for side in ("images", "vae-sd"):
        change(labels_file(folder, side), edit)


def read_all(folder):
    return [latents(folder).examples(split) for split in SPLITS]


# ---- reading ----


def test_image_latent_and_label_belong_together(folder):
    data = latents(folder)
    assert (data.name, data.channels, data.image_size, data.classes) == ("prepared", CHANNELS, SIDE, CLASSES)
    assert (data.scale, data.shift, data.pixel_size, data.manifest) == (0.18215, 0.0, SIZE, None)
    assert {split: len(data.images(split)[1]) for split in SPLITS} == {"train": 16, "validation": 2, "test": 6}
    for split in SPLITS:
        batch = data.examples(split)
        shown = numbers(batch.images)
        assert batch.y.tolist() == [i % CLASSES for i in shown]
        expected = torch.stack([torch.from_numpy(posterior(i)[:CHANNELS]) for i in shown]) * 0.18215
        assert_close(batch.x, expected)
        assert all(map(torch.equal, data.images(split), (batch.images, batch.y)))


def test_images_of_sixteen_bits_are_scaled(folder):
    levels = np.arange(SIZE**2, dtype=np.uint16).reshape(SIZE, SIZE)
    Image.fromarray(levels * 257).save(folder / "images" / "00000" / "img00000000.png")
    for channel in latents(folder).folder.pixels(torch.tensor([0]))[0]:
        assert channel.tolist() == levels.tolist()


def test_batches_are_draws_from_the_posterior(folder, monkeypatch):
    """Mean and standard deviation over 2,000 draws; the largest of 512 errors is below 5 standard errors."""
    data, n = latents(folder), 2000
    (shown,) = numbers(data.images("train", 1)[0])
    mean, std = torch.from_numpy(posterior(shown)).chunk(2)
    monkeypatch.setattr(data.folder, "posterior", lambda indices: (mean[None], std[None]))
    drawn = data.batch(torch.zeros(n).long(), torch.Generator().manual_seed(0), with_images=False).x
    assert float(((drawn.mean(0) / 0.18215 - mean).abs() / std).max()) < 5 / n**0.5
    assert float((drawn.std(0) / 0.18215 / std - 1).abs().max()) < 5 / (2 * n) ** 0.5


def test_parts_and_counts_and_latents_without_images_are_those_of_the_whole(folder, monkeypatch):
    data, indices = latents(folder), torch.arange(6)
    whole = data.batch(indices, torch.Generator().manual_seed(3))
    assert not torch.equal(whole.x, data.batch(indices, torch.Generator().manual_seed(4)).x)
    assert torch.equal(data.examples("train", 3).x, data.examples("train").x[:3])
    parts = [data.batch(indices, torch.Generator().manual_seed(3), part=slice(i, i + 3)) for i in (0, 3)]
    for together, separate in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.cat(separate).equal(together)
    monkeypatch.setattr(data.folder, "pixels", lambda indices: pytest.fail("an image was read"))
    alone = data.batch(indices, torch.Generator().manual_seed(3), with_images=False)
    assert alone.x.equal(whole.x)
    assert alone.images.shape == (0, *whole.images.shape[1:])
    assert data.examples("train", 3, with_images=False).images.shape[0] == 0


def test_opening_reads_one_image_and_some_latents(folder, monkeypatch):
    monkeypatch.setattr(latent_data, "LOOKED_AT", 3)
    read = []
    monkeypatch.setattr(
        Folder, "_read", lambda self, side, i, old=Folder._read: read.append((side, i)) or old(self, side, i)
    )
    data = latents(folder)
    assert read == [("images", 0), ("vae-sd", 0), *(("vae-sd", i) for i in (0, 9, 18))]
    for path in folder.rglob("*/0000[01]/*"):
        path.unlink()
    refused("cannot be read: it is missing", data.examples, "train")


# ---- the first look ----


def rewrite(folder, edit):
    """Change every latent."""
    for path in folder.glob("vae-sd/*/*.npy"):
        np.save(path, edit(np.load(path)).astype(np.float32))


def test_latents_of_another_scale_are_doubted(folder):
    rewrite(folder, lambda latent: latent / 0.3)
    assert latents(folder).doubts == ""
    for factor, shown in ((0.18215, "mean .* and standard deviation 0.1"), (12.0, "standard deviation 1[01]")):
        copy = shutil.copytree(folder, folder.with_name(f"times{factor}"))
        rewrite(copy, lambda latent, factor=factor: latent * factor)
        doubtful = latents(copy)
        assert re.search(shown, doubtful.doubts)
        assert "is 0.18215 their scale, and are they stored unscaled?" in doubtful.summary
        settings = config.DataSettings(kind="latents", path=str(copy))
        assert not find_example(settings)[1].ok
    assert find_example(config.DataSettings(kind="latents", path=str(folder)))[1].ok


def half(edit):
    """A change to the second half of a latent."""
    return lambda latent: np.concatenate([latent[:CHANNELS], edit(latent[CHANNELS:])])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (half(lambda std: 2 * np.log(std)), r"its second half goes down to -[\d.]+; expected standard deviations"),
        (half(lambda std: std * np.nan), r"img-mean-std-00000000.npy has values that are not finite"),
        (lambda latent: latent + np.inf, "has values that are not finite"),
        (lambda latent: latent[:CHANNELS], "arrays of 4 channels, .*; expected 2C for the C channels of a VAE"),
    ],
)
def test_latents_that_are_no_posteriors_are_refused(folder, edit, message):
    rewrite(folder, edit)
    refused(message, latents, folder)


def test_labels_with_gaps_or_none_are_said_and_absurd_ones_refused(folder, capfd):
    base.say.cache_clear()
    assert "classes have no image" not in latents(folder).summary
    assert capfd.readouterr().err.startswith("prepared: 16 training images, ")
    with pytest.raises(ValueError, match="classes\n  Input should be less than or equal to 1000000"):
        Manifest.model_validate({"classes": 10**12})
    relabel(folder, lambda e: [entry.__setitem__(1, (0, 5, 900)[i % 3]) for i, entry in enumerate(e)])
    assert "901 classes" in latents(folder).summary
    assert "898 of the classes have no image" in latents(folder).summary
    relabel(folder, lambda e: [entry.__setitem__(1, 10**12) for entry in e])
    refused(r"labels.0.1: .* less than 1000000, given 1000000000000 \(and 23 more\)", latents, folder)
    for side in ("images", "vae-sd"):
        labels_file(folder, side).write_text('{"labels": null}')
    assert "all in one class, since there are no labels" in latents(folder).summary


# ---- lists ----


def test_a_list_on_one_side_is_enough_and_its_order_has_no_effect(folder):
    expected = read_pairs(folder)
    entries = json.loads(labels_file(folder, "images").read_text())["labels"]
    assert expected.labels.tolist() == [label for _, label in entries]
    labels_file(folder).unlink()
    change(labels_file(folder, "images"), list.reverse)
    pairs = read_pairs(folder)
    assert pairs.keys == expected.keys
    assert pairs.labels.equal(expected.labels)
    labels_file(folder, "images").unlink()
    refused(r"has no dataset\.json; expected one in images/ and in vae-sd/", read_pairs, folder)


def test_null_labels_on_one_side_are_those_of_the_other(folder):
    expected = read_pairs(folder).labels
    labels_file(folder, "images").write_text('{"labels": null}')
    assert read_pairs(folder).labels.equal(expected)
    (folder / "vae-sd" / "00000" / "img-mean-std-00000003.npy").unlink()
    assert read_pairs(folder).labels.equal(expected), "a labelled list is taken at its word"
    (folder / "images" / "00000" / "img00000003.png").unlink()
    refused("1 without an image", read_pairs, folder)


NAME = "00000/img-mean-std-00000000.npy"
LISTS = [
    ("[]", "valid dictionary"),
    ("{}", "labels: Field required"),
    ("{", "is no valid JSON"),
    ({"a": 1}, "labels: .* valid list"),
    ([], "24 without a latent"),
    ([[NAME]], r"labels\.0\.1: Field required"),
    ([[NAME, [0, 1]]], r"labels\.0\.1: .* integer, given \[0, 1\]"),
    ([[NAME, -1]], r"labels\.0\.1: .* equal to 0, given -1"),
 ([[NAME, 10**30]], r"labels\.0\.1: .* less than 1000000"),
    ([[NAME, True]], r"labels\.0\.1: .* integer, given True"),
    ([["00000/img00000000.png", 1]], "names within the folder like"),
    ([["a/img-mean-std-1.npy", 1]] * 2, "a/img-mean-std-1.npy twice"),
    *[([[f"{place}img-mean-std-1.npy", 0]], "names within the folder like")
      for place in ("../a/", "/etc/", "a/../../", "a\\", "./", "a//")],
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), LISTS)
def test_other_lists_are_refused_in_one_line(folder, content, message):
    labels_file(folder).write_text(content if isinstance(content, str) else json.dumps({"labels": content}))
    refused(message, read_pairs, folder)


# ---- damage ----


def entries(edit):
    """A change to a list."""
    return lambda path: change(path, edit)


def archive(path):
    with path.open("wb") as stream:
        np.savez(stream, a=posterior(0))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:200])


IMAGE, LATENT = "images/00001/img00000015.png", "vae-sd/00001/img-mean-std-00000015.npy"
IMAGE_LIST, LATENT_LIST = "images/dataset.json", "vae-sd/dataset.json"
BROKEN = [
    (LATENT_LIST, entries(lambda e: e.pop(5)), r"1 without a latent \(00000/img00000005.png\)"),
    (IMAGE_LIST, entries(lambda e: e.__delitem__(slice(8, 15))), r"7 without an image \(.*08.npy, .*10.npy, \.\.\.\)"),
    (LATENT_LIST, entries(lambda e: e[4].__setitem__(1, 0)), r"1 with another label .* \(00000/img00000004.png\)"),
    (LATENT_LIST, entries(lambda e: e[0].__setitem__(0, "00001/img-mean-std-00000000.npy")),
     "1 without a latent .*; 1 without an image"),
    (IMAGE, lambda path: path.unlink(), "img00000015.png cannot be read: it is missing"),
    (IMAGE, cut_short, "cannot be read"),
    (IMAGE, lambda path: Image.fromarray(picture(15, 32)).save(path), "is 32x32; expected .* of 16 pixels"),
    (IMAGE, lambda path: Image.fromarray(picture(15)[:8]).save(path), "is 16x8; expected a square"),
    (LATENT, cut_short, "cannot be read"),
    (LATENT, lambda path: np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True), "Object arrays cannot"),
    (LATENT, archive, "it is an archive; expected one float32 array"),
    (LATENT, lambda path: np.save(path, posterior(15)[:4]), r"it is float32 \(4, 8, 8\)"),
    (LATENT, lambda path: np.save(path, posterior(15).astype(np.float64)), "it is float64"),
    *[("manifest.json", lambda path, text=text: path.write_text(text), r"manifest\.json")
      for text in ("{", "[]", '{"format": 2}', '{"count": 1}')],
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), BROKEN, ids=[message for _, _, message in BROKEN])
def test_a_damaged_folder_is_an_error_of_one_line(folder, name, damage, message):
    damage(folder / name)
    refused(message, read_all, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": {"rotation": 3.0}}, "expected no augmentation"),
        ({"image_size": 32}, r"data.image_size 32; expected 16"),
        ({"path": "nothing"}, "is no folder"),
        ({"validation_fraction": 0.01, "test_fraction": 0.95}, "1 image cannot be divided"),
    ],
    ids=str,
)
def test_unusable_settings_are_refused(folder, changes, message):
    settings = config.DataSettings(**{"kind": "latents", "path": str(folder), **changes})
    refused(message, open_dataset, settings)


# ---- the VAE ----


def save_vae(folder, widths=(8, 8), **settings):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), norm_num_groups=4, latent_channels=4, **settings,
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def loaded(vae_folder):
    return load_vae(str(vae_folder))


def images():
    return torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_posterior_is_that_of_diffusers(loaded):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    x = images()
    with torch.no_grad():
        moments = loaded.model.quant_conv(loaded.model.encoder(x))
    expected = DiagonalGaussianDistribution(moments)
    mean, std = loaded.encode(x)
    assert_close(mean, expected.mode())
    assert_close(std, (moments.chunk(2, dim=1)[1] / 2).exp())
    assert_close(std.square(), expected.var)
    assert (mean.shape, mean.dtype, mean.requires_grad, loaded.model.training) == (
        (5, 4, 8, 8), torch.float32, False, False
    )  # fmt: skip
    refused("latents of 3 channels .* expected 4", loaded.decode, torch.zeros(1, 3, 8, 8))


def test_scale_and_shift_are_undone_exactly_once(tmp_path):
    scale, shift = 1.5305, 0.0609
    ours = load_vae(str(save_vae(tmp_path, scaling_factor=scale, shift_factor=shift)))
    mean, _ = ours.encode(images())
    x = (mean - shift) * scale
    with torch.no_grad():
        straight, unscaled = (ours.model.decode(z, return_dict=False)[0].clamp(-1, 1) for z in (mean, x))
    assert_close(ours.decode(x), straight, atol=1e-5, rtol=0)
    assert_close(ours.decode(x, 2), straight, atol=1e-5, rtol=0)
    assert not torch.allclose(unscaled, straight, atol=1e-2), "a decoder that ignored the scale would pass otherwise"
    assert float(ours.decode(x * 1000).abs().max()) == 1.0


def shift_bias(folder, name):
    weights = load_file(folder / WEIGHTS)
    weights[name][0] += 1
    save_file(weights, folder / WEIGHTS)


def test_another_vae_than_that_of_the_latents_decodes_only_if_asked_to(reference, vae_folder, loaded, tmp_path):
    data = config.DataSettings(kind="latents", path=str(reference))
    x = latents(reference).examples("test", 2).x
    own = config.SampleSettings()
    assert_close(to_images(x, data, own), loaded.decode(x))
    assert vae_facts(data, own) == {"name": str(vae_folder), "weights": loaded.fingerprint}
    for place, settings in (("scale", {"scaling_factor": 0.5}), ("shift", {"shift_factor": 0.1})):
        other = config.SampleSettings(vae=str(save_vae(tmp_path / place, **settings)))
        refused(
            rf"{place} 0\.\d.*; expected {loaded.fingerprint}, 0.18215, 0, those of .*any_vae",
            to_images,
            x,
            data,
            other,
        )
    # Another decoder of the same encoder, as of sd-vae-ft-mse and sd-vae-ft-ema, is named on the card alone.
    shift_bias(save_vae(tmp_path / "decoder"), "decoder.conv_in.bias")
    tuned = config.SampleSettings(vae=str(tmp_path / "decoder"))
    assert_close(to_images(x, data, tuned), load_vae(str(tmp_path / "decoder")).decode(x))
    assert vae_facts(data, tuned)["latents_by"]["fingerprint"] == loaded.fingerprint
    shift_bias(save_vae(tmp_path / "weights"), "encoder.conv_in.bias")
    name = str(tmp_path / "weights")
    refused(f"expected {loaded.fingerprint}", to_images, x, data, config.SampleSettings(vae=name))
    asked = config.SampleSettings(vae=name, any_vae=True)
    assert_close(to_images(x, data, asked), load_vae(name).decode(x))
    facts = vae_facts(data, asked)
    assert facts["latents_by"]["fingerprint"] == loaded.fingerprint != facts["weights"]


def test_latents_without_a_manifest_are_decoded_by_a_vae_of_the_usual_scale(folder, vae_folder, tmp_path):
    data = config.DataSettings(kind="latents", path=str(folder))
    x = latents(folder).examples("test", 2).x
    assert to_images(x, data, config.SampleSettings(vae=str(vae_folder))).shape == (2, 3, SIZE, SIZE)
    other = str(save_vae(tmp_path / "flux", scaling_factor=0.3611, shift_factor=0.1159))
    refused("scale 0.3611 and shift 0.1159, but latents without a manifest", to_images, x, data,
            config.SampleSettings(vae=other))  # fmt: skip
    assert to_images(x, data, config.SampleSettings(vae=other, any_vae=True)).shape == (2, 3, SIZE, SIZE)


def test_half_precision_files_and_old_names_of_attention_weights_are_read(tmp_path, loaded):
    """The published sd-vae-ft files call the attention weights query, key, value and proj_attn."""
    path = save_vae(tmp_path) / WEIGHTS
    text = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(path)
    for new, old in text.items():
        weights = {name.replace(new, old): value for name, value in weights.items()}
    assert sum(".query." in name for name in weights) == 4
    save_file(weights, path)
    assert load_vae(str(tmp_path)).fingerprint == loaded.fingerprint
    save_file({name: value.half() for name, value in weights.items()}, path)
    half = load_vae(str(tmp_path))
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert_close(half.encode(images()).mean, loaded.encode(images()).mean, atol=1e-2, rtol=1e-2)


def edit(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def without_conv_in(folder):
    save_file({n: v for n, v in load_file(folder / WEIGHTS).items() if "conv_in" not in n}, folder / WEIGHTS)


UNUSABLE = [
    (lambda f: (f / WEIGHTS).unlink(), f"no file named {WEIGHTS}.*give a folder"),
    (lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"), f"no file named {WEIGHTS}"),
    (lambda f: (f / SETTINGS).unlink(), "no file named config.json"),
    (lambda f: cut_short(f / WEIGHTS), "cannot be loaded"),
    (without_conv_in, "lacks the weights of 4 tensors"),
    (lambda f: edit(f / SETTINGS, latent_channels=8), "cannot be loaded"),
    (lambda f: edit(f / SETTINGS, latents_mean=[0.0] * 4), "normalises latents per channel"),
]


@pytest.mark.parametrize(("damage", "message"), UNUSABLE)
def test_unusable_vaes_are_an_error_of_one_line(tmp_path, damage, message):
    damage(save_vae(tmp_path))
    refused(message, load_vae, str(tmp_path))


def test_a_vae_that_is_not_there_is_an_error_of_one_line():
    refused(f"cannot be loaded: .*{SETTINGS} and {WEIGHTS}", load_vae, "nobody/no-such-vae")
    refused("is no folder", load_vae, "a/b/c")


# ---- encoding ----


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """23 images of odd sizes in three classes."""
    root = tmp_path_factory.mktemp("source")
    for i in range(23):
        folder = root / "train" / ("ant", "bee", "cat")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, 40)[: 20 + i % 7, : 30 - i % 5]).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture
def job(source, vae_folder, tmp_path):
    return Job(str(source), str(tmp_path / "out"), str(vae_folder), SIZE, batch_size=3, shard_size=5)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(source, vae_folder, tmp_path_factory):
    """The folder that one process makes without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
        out = tmp_path_factory.mktemp("reference") / "out"
        prepare(Job(str(source), str(out), str(vae_folder), SIZE, batch_size=3, shard_size=5), progress=False)
    return out


def test_what_is_written(reference, source):
    manifest = json.loads((reference / "manifest.json").read_text())
    assert [shard["count"] for shard in manifest["shards"]] == [5, 5, 5, 5, 3]
    assert (manifest["count"], manifest["latent_shape"]) == (23, [CHANNELS, SIDE, SIDE])
    assert (manifest["class_names"], manifest["source"]["path"]) == (["ant", "bee", "cat"], str(source))
    assert (manifest["vae"]["scale"], manifest["vae"]["shift"]) == (0.18215, 0.0)
    data = latents(reference)
    assert (data.classes, data.channels, data.image_size, data.pixel_size) == (3, CHANNELS, SIDE, SIZE)


def test_every_pair_is_the_encoded_crop_of_one_source_image(reference, source, vae_folder):
    model = load_vae(str(vae_folder))
    labels = dict(json.loads(labels_file(reference, "images").read_text())["labels"])
    files = [p for name in ("ant", "bee", "cat") for p in sorted((source / "train" / name).iterdir())]
    assert len(labels) == len(files) == 23
    for i, path in enumerate(files):
        name = f"{i // 5:05d}/img{i:08d}.png"
        crop = to_tensor(center_crop(Image.open(path), SIZE))
        with Image.open(reference / "images" / name) as written:
            assert torch.equal(to_tensor(written), crop)
        array = np.load(reference / "vae-sd" / f"{i // 5:05d}/img-mean-std-{i:08d}.npy")
        expected = torch.cat(model.encode(to_signed(crop)[None]), dim=1)[0]
        assert_close(torch.from_numpy(array), expected, atol=1e-5, rtol=1e-5)
        assert labels[name] == ("ant", "bee", "cat").index(path.parent.name)


def test_the_statistics_are_those_of_drawn_latents(reference):
    manifest = json.loads((reference / "manifest.json").read_text())
    arrays = np.stack([np.load(p) for p in reference.rglob("*.npy")]).astype(np.float64)
    mean, std = arrays[:, :CHANNELS], arrays[:, CHANNELS:]
    np.testing.assert_allclose(manifest["latent_mean"], mean.mean((0, 2, 3)), rtol=1e-10)
    drawn = mean + std * np.random.default_rng(0).normal(size=(200, *mean.shape))
    np.testing.assert_allclose(manifest["latent_std"], drawn.std((0, 1, 3, 4)), rtol=0.01)


def test_scale_and_shift_of_the_manifest_are_used(reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "other")
    plain = latents(folder).examples("train").x
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["vae"] |= {"scale": 2.0, "shift": 0.5}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_close(latents(folder).examples("train").x, (plain / 0.18215 - 0.5) * 2)


def test_processes_divide_the_shards_and_the_first_one_finishes_the_same_folder(job, reference):
    task = Preparation(job)
    assert prepare(job, rank=1, processes=2, progress=False) is None
    assert [shard for shard in range(5) if task.is_complete(shard)] == [1, 3]
    with locked(task.work / "lock", "x"), pytest.raises(HasteError, match="is in use by process"):
        prepare(job, progress=False)
    assert prepare(job, rank=0, processes=2, progress=False).count == 23
    assert prepare(job, rank=1, processes=2, progress=False).count == 23
    assert content(task.out) == content(reference)


def interrupt_at(monkeypatch, call):
    """SIGINT to this process when the `call`-th batch is read."""
    calls, decode = [], Split.decode

    def decoding(self, indices):
        calls.append(indices)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(self, indices)

    monkeypatch.setattr(Split, "decode", decoding)
    return calls


def test_an_interrupted_folder_is_resumed_to_the_same_bytes(job, reference, monkeypatch):
    """Two shards are complete, of which one loses a side; one is half written, and one was never recorded."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(Interrupted, match=r"2 of 5 shards of .* are complete; run again"):
            prepare(job, progress=False)
    task = Preparation(job)
    assert not task.manifest_path.exists()
    assert list((task.out / "images" / "00002").iterdir())
    (task.out / "images" / "00003").mkdir()
    (task.out / "images" / "00003" / "img00000099.png").write_text("stray")
    shutil.rmtree(task.out / "vae-sd" / "00000")
    with monkeypatch.context() as patch:
        calls = interrupt_at(patch, -1)
        prepare(job, progress=False)
        assert len(calls) == 7, "nine batches but the two of the shard that is complete"
    assert content(task.out) == content(reference)


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(job, reference, monkeypatch, tmp_path):
    finished, begun = (replace(job, out=str(tmp_path / name)) for name in ("finished", "begun"))
    shutil.copytree(reference, finished.out)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "finished").rglob("*")}
    assert prepare(replace(finished, vae=f"{job.vae}/."), progress=False).count == 23, "the same VAE by another name"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "finished").rglob("*")} == before
    interrupt_at(monkeypatch, 1)
    with pytest.raises(Interrupted):
        prepare(begun, progress=False)
    other = str(save_vae(tmp_path / "vae", act_fn="relu", layers_per_block=2))
    smaller = shutil.copytree(job.source, tmp_path / "source")
    next((smaller / "train" / "ant").iterdir()).unlink()
    for there, changes, message in (
        (finished, {"vae": other}, r"vae.fingerprint '[0-9a-f]+', now it is"),
        (finished, {"source": str(smaller)}, r"count 23, now it is 22"),
        (begun, {"size": 32}, r"image_size 16, now it is 32"),
        (begun, {"shard_size": 6}, r"shard_size 5, now it is 6"),
    ):
        refused(message, prepare, replace(there, **changes), 0, 1, False)


def test_unusable_jobs_are_an_error_of_one_line_and_leave_nothing(job, tmp_path):
    out = Preparation(job).out
    for changes, message in (
        ({"size": 0}, "--size 0"),
        ({"size": 15}, "--size 15; expected a multiple of 2 with VAE"),
        ({"split": "valid"}, "no split 'valid'; expected one of: train"),
        ({"source": str(tmp_path / "nothing")}, "does not exist"),
        ({"vae": str(tmp_path / "nothing")}, "is no folder"),
        ({"device": "toaster"}, "--device toaster"),
    ):
        refused(message, lambda changes=changes: prepare(replace(job, **changes), progress=False))
    assert not out.exists()
    write_folder(out, 2)
    refused("holds other files", prepare, job)


def test_an_undecodable_image_and_a_full_disk_are_errors_of_one_line(job, tmp_path, monkeypatch, capsys):
    copy = replace(job, source=str(shutil.copytree(job.source, tmp_path / "copy")), out=str(tmp_path / "other"))
    (tmp_path / "copy" / "train" / "bee" / "004.png").write_bytes(b"no image")
    refused("bee/004.png cannot be decoded", prepare, copy, 0, 1, False)

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding.Path, "write_bytes", full)
    assert command(job) == 2
    assert "no room" in capsys.readouterr().err.splitlines()[-1]
    assert not any(Preparation(job).is_complete(shard) for shard in range(5))


DAMAGE = [
    (lambda f: Image.fromarray(picture(77)).save(f / "images/00001/img00000007.png"), r"images/00001\)"),
    (lambda f: np.save(f / "vae-sd/00002/img-mean-std-00000011.npy", posterior(0)), r"vae-sd/00002\)"),
    (lambda f: (f / "images/00003/note.txt").write_text("hello"), r"images/00003\)"),
    (lambda f: (f / "images/00004/img00000022.png").unlink(), r"images/00004\)"),
    (lambda f: relabel(f, lambda e: e[3].__setitem__(1, 2)), r"1 of its parts .* \(labels\)"),
    (lambda f: relabel(f, lambda e: e.pop()), "counts 23 images, dataset.json names 22"),
    (lambda f: (f / "manifest.json").unlink(), r"has no manifest\.json"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_checking_finds_what_changed(reference, tmp_path, damage, message):
    folder = shutil.copytree(reference, tmp_path / "copy")
    assert check(folder, progress=False).count == 23
    damage(folder)
    refused(message, check, folder, False)


def command(job, *more):
    words = ["--vae", job.vae, "--size", "16", "--device", "cpu", "--batch-size", "3", "--shard-size", "5"]
    return main(["latents", job.source, job.out, *words, *more])


def test_the_command(job, reference, capsys):
    assert command(job) == 0
    assert content(Preparation(job).out) == content(reference)
    assert "23 images of 16 pixels in 3 classes, latents 4x8x8 of" in capsys.readouterr().out
    assert main(["latents", "--check", job.out]) == 0
    assert job.out in capsys.readouterr().out
    for words in ([], [job.source], [job.source, job.out, "--check", job.out]):
        assert main(["latents", *words]) == 2
        assert "expected: haste latents" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_same_folder(job, reference, capsys):
    assert command(job, "--processes", "2") == 0
    assert content(Preparation(job).out) == content(reference)
    assert "23 images of 16 pixels" in capsys.readouterr().out


# ---- training ----


def test_a_tiny_model_trains_through_both_phases_and_reads_images_in_the_first(
    reference, output, make_study, monkeypatch
):
    study = make_study(
        f"data={{kind: latents, path: {reference}, augment: {{shift: 0, rotation: 0, scale: 0}}}}",
        "arms.haste.termination.at=4", "train.steps=8", "train.keep=[4]", "train.batch_size=8",
        "teacher.kwargs={img_size: 16, patch_size: 4, in_chans: 3, embed_dim: 24, depth: 4, num_heads: 4}",
        "teacher.mean=[0.5, 0.5, 0.5]", "teacher.std=[0.5, 0.5, 0.5]", "model.patch=2", "claims.early=4",
    )  # fmt: skip
    seen, reads, pixels = [], [], Folder.pixels
    monkeypatch.setattr(Folder, "pixels", lambda self, indices: reads.append(len(indices)) or pixels(self, indices))
    run = Run(study, "haste", 0)
    fit(run, on_step=lambda state: seen.append((state.step, state.haste is None)), progress=False)
    assert seen == [(step, step > 4) for step in range(1, 9)]
    assert reads.count(8) == 4
    logged = run.metrics()
    assert [row["phase"] for row in logged] == [1, 1, 2, 2]
    assert logged[0]["loss"] != logged[0]["denoising"]
    assert logged[-1]["loss"] == logged[-1]["denoising"]
    tensors, _ = run.load(8, prefixes=("ema.",))
    assert tensors["ema.x_embedder.proj.weight"].shape == (32, CHANNELS, 2, 2)


def test_a_header_that_confuses_the_parser_is_read_again(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.ones((8, 2, 2), np.float32))
    load, failed = np.load, []

    def confused(*args, **options):
        if len(failed) < 2:
            failed.append(1)
            raise SystemError("AST constructor recursion depth mismatch (before=39, after=35)")
        return load(*args, **options)

    monkeypatch.setattr(np, "load", confused)
    assert latent_data._loaded(tmp_path / "a.npy").shape == (8, 2, 2)
    failed.clear()
    with pytest.raises(SystemError):
        latent_data._loaded(tmp_path / "a.npy", tries=2)
