"""The VAE, prepared latents: pairing by name, batches, encoding in shards, and training on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked
from haste_core.sampling import to_uint8
from haste_core.study import config
from haste_core.study import latents as encoding
from haste_core.study.cli import main
from haste_core.study.data import open_dataset
from haste_core.study.data.base import center_crop, to_signed, to_tensor
from haste_core.study.data.images import Split
from haste_core.study.data.latents import Folder, read_pairs
from haste_core.study.latents import Job, Preparation, check, load_vae, prepare
from haste_core.study.pretrain import find_teacher
from haste_core.study.runs import Run
from haste_core.study.train import create, fit

pytestmark = pytest.mark.xdist_group("vae")
SIZE, CHANNELS, SIDE, CLASSES = 16, 4, 8, 3
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Nothing is left in the home directory, by this process or by those it starts."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def picture(index, size=SIZE):
    return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


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


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content["labels"])
    path.write_text(json.dumps(content))


# ---- reading ----


def numbers(images):
    """Which pictures these are."""
    known = {picture(i).tobytes(): i for i in range(24)}
    return [known[pixels.permute(1, 2, 0).numpy().tobytes()] for pixels in to_uint8(images)]


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
        assert torch.equal(batch.images, data.images(split)[0])
        assert torch.equal(batch.y, data.images(split)[1])


def test_the_split_is_complete_disjoint_stratified_and_seeded(folder):
    split = {name: numbers(latents(folder).images(name)[0]) for name in SPLITS}
    assert sorted(i for shown in split.values() for i in shown) == list(range(24))
    assert torch.bincount(latents(folder).images("test")[1]).tolist() == [2, 2, 2]
    assert numbers(latents(folder).images("test")[0]) == split["test"]
    assert set(numbers(latents(folder, split_seed=1).images("test")[0])) != set(split["test"])
    assert len(latents(folder, test_fraction=0.5)) == 10
    other = latents(folder, validation_fraction=0.3)
    assert torch.bincount(other.images("validation")[1]).tolist() == [2, 2, 2]
    assert numbers(other.images("test")[0]) == split["test"]


def test_batches_are_draws_from_the_posterior(folder):
    """Mean and standard deviation over 4,000 draws; the largest of 512 errors is below 5 standard errors."""
    data, n = latents(folder), 4000
    shown = numbers(data.images("train", 1)[0])[0]
    drawn = torch.cat([data.batch(torch.zeros(n // 10).long(), torch.Generator().manual_seed(s)).x for s in range(10)])
    mean, std = torch.from_numpy(posterior(shown)).chunk(2)
    error = (drawn.mean(0) / 0.18215 - mean).abs() / std
    assert float(error.max()) < 5 / n**0.5
    spread = (drawn.std(0) / 0.18215 / std - 1).abs()
    assert float(spread.max()) < 5 / (2 * n) ** 0.5


def test_parts_and_counts_and_latents_without_images_are_those_of_the_whole(folder, monkeypatch):
    data, indices = latents(folder), torch.arange(6)
    whole = data.batch(indices, torch.Generator().manual_seed(3))
    assert not torch.equal(whole.x, data.batch(indices, torch.Generator().manual_seed(4)).x)
    assert torch.equal(data.examples("train", 3).x, data.examples("train").x[:3])
    assert len(data.images("test", 2)[1]) == 2
    parts = [data.batch(indices, torch.Generator().manual_seed(3), part=slice(i, i + 3)) for i in (0, 3)]
    for together, separate in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.cat(separate).equal(together)
    monkeypatch.setattr(data.folder, "pixels", lambda indices: pytest.fail("an image was read"))
    alone = data.batch(indices, torch.Generator().manual_seed(3), with_images=False)
    assert alone.x.equal(whole.x)
    assert alone.images.shape == (0, *whole.images.shape[1:])
    assert data.examples("train", 3, with_images=False).images.shape[0] == 0


@pytest.mark.parametrize(("arm", "reads"), [("vanilla", 0), ("haste", 8), ("holistic", 12)])
def test_training_reads_images_in_phase_one_only(folder, arm, reads, output, make_study, monkeypatch):
    counted, original = [], Folder.pixels
    monkeypatch.setattr(Folder, "pixels", lambda self, indices: counted.append(1) or original(self, indices))
    kwargs = {"in_chans": 3, "img_size": SIZE, "patch_size": SIZE // 4, "embed_dim": 24, "depth": 4, "num_heads": 4}
    data = {"kind": "latents", "path": str(folder), "augment": {"shift": 0, "rotation": 0, "scale": 0}}
    study = make_study(
        f"data={json.dumps(data)}", f"teacher.kwargs={json.dumps(kwargs)}",
        "teacher.mean=[0.5, 0.5, 0.5]", "teacher.std=[0.5, 0.5, 0.5]",
        "train.batch_size=4", "alignment.layer_pairs=[[1, 1]]",
    )  # fmt: skip
    run = study.run(arm)
    state = create(run, 0, find_teacher(study, run.teacher))
    for _ in range(12):
        state.train_step()
    assert len(counted) == reads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": {"flip": True}}, "expected no augmentation"),
        ({"augment": {"rotation": 3.0}}, "expected no augmentation"),
        ({"image_size": 32}, r"data.image_size 32, the images .* have 16"),
        ({"path": "nothing"}, "is no folder"),
        ({"validation_fraction": 0.01, "test_fraction": 0.95}, "1 image cannot be divided"),
    ],
    ids=str,
)
def test_unusable_settings_are_refused(folder, changes, message):
    with pytest.raises(HasteError, match=message):
        open_dataset(config.DataSettings(**{"kind": "latents", "path": str(folder), **changes}))


# ---- names and lists ----


def same(one, other):
    return (one.keys == other.keys).all() and one.labels.equal(other.labels)


def test_lists_may_lie_at_the_top_or_on_one_side(folder):
    expected = read_pairs(folder)
    entries = json.loads(labels_file(folder, "images").read_text())["labels"]
    assert expected.labels.tolist() == [label for _, label in entries]
    labels_file(folder, "images").unlink()
    assert same(read_pairs(folder), expected)
    for prefix in ("", "images/"):
        labels_file(folder).unlink(missing_ok=True)
        (folder / "dataset.json").write_text(json.dumps({"labels": [[prefix + n, label] for n, label in entries]}))
        assert same(read_pairs(folder), expected)
    both = [["images/" + n, label] for n, label in entries]
    both += [["vae-sd/" + n.replace("img", "img-mean-std-").replace("png", "npy"), label] for n, label in entries]
    (folder / "dataset.json").write_text(json.dumps({"labels": both}))
    assert same(read_pairs(folder), expected)
    (folder / "dataset.json").write_text(json.dumps({"labels": both[::-1]}))
    assert same(read_pairs(folder), expected), "the order of a list has no effect"
    (folder / "dataset.json").unlink()
    with pytest.raises(HasteError, match=r"has no dataset\.json"):
        read_pairs(folder)


def test_null_labels_on_one_side_are_those_of_the_other(folder):
    expected = read_pairs(folder)
    labels_file(folder, "images").write_text('{"labels": null}')
    assert same(read_pairs(folder), expected)
    (folder / "vae-sd" / "00000" / "img-mean-std-00000003.npy").unlink()
    assert same(read_pairs(folder), expected), "a labelled list is taken at its word"
    (folder / "images" / "00000" / "img00000003.png").unlink()
    with pytest.raises(HasteError, match="1 without an image"):
        read_pairs(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no list of labels"),
        ("{}", "is no list of labels"),
        ('{"labels": {"a": 1}}', "is no list of labels"),
        ("{", "is no valid JSON"),
        ('{"labels": []}', "24 without a latent"),
        ('{"labels": [["00000/img-mean-std-00000000.npy"]]}', "has the entry"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", [0, 1]]]}', "has the entry"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", -1]]}', "has the entry"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", true]]}', "has the entry"),
        ('{"labels": [["00000/img00000000.png", 1]]}', "names within the folder like"),
        ('{"labels": [["a/img-mean-std-1.npy", 1], ["a/img-mean-std-1.npy", 1]]}', "a/img-mean-std-1.npy twice"),
        *(
            (json.dumps({"labels": [[f"{place}img-mean-std-1.npy", 0]]}), "names within the folder like")
            for place in ("../a/", "/etc/", "a/../../", "a\\", "./", "a//")
        ),
    ],
)
def test_other_lists_are_refused_in_one_line(folder, content, message):
    labels_file(folder).write_text(content)
    with pytest.raises(HasteError, match=message) as caught:
        read_pairs(folder)
    assert "\n" not in str(caught.value)
    if "names within" in message:
        labels_file(folder).unlink()
        (folder / "dataset.json").write_text(content.replace("img00000000.png", "cat.png"))
        with pytest.raises(HasteError, match=message):
            read_pairs(folder)


MISMATCHES = {
    "missing latent": ("vae-sd", lambda e: e.pop(5), r"1 without a latent \(00000/img00000005.png\)"),
    "missing images": ("images", lambda e: e.__delitem__(slice(8, 15)),
                       r"7 without an image \(.*08.npy, .*09.npy, .*10.npy, \.\.\.\)"),
    "other label": ("vae-sd", lambda e: e[4].__setitem__(1, 0), r"1 with another label .* \(00000/img00000004.png\)"),
    "other folder": ("vae-sd", lambda e: e[0].__setitem__(0, "00001/img-mean-std-00000000.npy"),
                     "1 without a latent .*; 1 without an image"),
}  # fmt: skip


@pytest.mark.parametrize("how", MISMATCHES)
def test_both_sides_must_have_the_same_names_and_labels(folder, how):
    side, edit, message = MISMATCHES[how]
    change(labels_file(folder, side), edit)
    with pytest.raises(HasteError, match=message):
        read_pairs(folder)


def test_a_list_at_the_top_must_not_contradict(folder):
    entries = json.loads(labels_file(folder, "images").read_text())["labels"]
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    read_pairs(folder)
    (folder / "dataset.json").write_text(json.dumps({"labels": entries[:-1]}))
    with pytest.raises(HasteError, match="disagree"):
        read_pairs(folder)


# ---- files ----


IMAGE, LATENT = "images/00001/img00000015.png", "vae-sd/00001/img-mean-std-00000015.npy"
BROKEN = {
    "image missing": (IMAGE, lambda path: path.unlink(), "img00000015.png cannot be read: it is missing"),
    "latent missing": (LATENT, lambda path: path.unlink(), "00000015.npy cannot be read: it is missing"),
    "image cut short": (IMAGE, lambda path: cut_short(path), "cannot be read"),
    "latent cut short": (LATENT, lambda path: cut_short(path), "cannot be read"),
    "text for an image": (IMAGE, lambda path: path.write_text("hello"), "cannot be read"),
    "pickle": (LATENT, lambda path: np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True),
               "cannot be read: Object arrays cannot be loaded"),
    "archive": (LATENT, lambda path: archive(path), "expected one array of float32"),
    "other size": (IMAGE, lambda path: Image.fromarray(picture(15, 32)).save(path), "is 32x32; expected 16x16"),
    "not square": (IMAGE, lambda path: Image.fromarray(picture(15)[:8]).save(path), "is 16x8; expected a square"),
    "other shape": (LATENT, lambda path: np.save(path, posterior(15)[:4]), r"has shape \(4, 8, 8\)"),
    "float64": (LATENT, lambda path: np.save(path, posterior(15).astype(np.float64)), "holds float64"),
}  # fmt: skip


def archive(path):
    with path.open("wb") as stream:
        np.savez(stream, a=posterior(0))


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_an_error_of_one_line_when_it_is_read(folder, how):
    name, broken, message = BROKEN[how]
    broken(folder / name)
    data = latents(folder)
    with pytest.raises(HasteError, match=message) as caught:
        [data.examples(split) for split in SPLITS]
    assert "\n" not in str(caught.value)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.slow
def test_many_pairs_open_without_a_look_at_their_files(tmp_path):
    """200,000 listed pairs of which one exists; ImageNet has six times as many."""
    folder, n = write_folder(tmp_path / "large", 2), 200_000
    lists = {"images": "{:05d}/img{:08d}.png", "vae-sd": "{:05d}/img-mean-std-{:08d}.npy"}
    for side, form in lists.items():
        entries = [[form.format(i // 1000, i), i % 1000] for i in range(n)]
        labels_file(folder, side).write_text(json.dumps({"labels": entries}))
    begun = time.perf_counter()
    data = latents(folder, test_fraction=0.01)
    seconds = time.perf_counter() - begun
    assert (len(data), data.classes) == (178_200, 1000)
    assert seconds < 15, f"{seconds:.1f} s"
    with pytest.raises(HasteError, match="it is missing"):
        data.batch(torch.arange(4), torch.Generator())


# ---- the VAE ----


def save_vae(folder, **settings):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, **settings,
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def loaded(vae_folder):
    return load_vae(str(vae_folder))


def images(n=5, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


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
    assert mean.shape == std.shape == (5, 4, 8, 8)
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    assert not loaded.model.training
    decoded = loaded.decode(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 1000)
    assert (decoded.shape, decoded.dtype, float(decoded.abs().max())) == ((2, 3, 16, 16), torch.float32, 1.0)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_batches_change_nothing(loaded, batch_size):
    x = images()
    assert_close(loaded.encode(x, batch_size), loaded.encode(x), atol=1e-5, rtol=1e-5)
    latents = loaded.encode(x).mean * 0.18215
    assert_close(loaded.decode(latents, batch_size), loaded.decode(latents), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (1.5305, 0.0609)])
def test_scale_and_shift_are_undone_exactly_once(tmp_path, scale, shift):
    ours = load_vae(str(save_vae(tmp_path, scaling_factor=scale, shift_factor=shift)))
    assert (ours.scale, ours.shift) == (scale, shift or 0.0)
    mean, _ = ours.encode(images())
    with torch.no_grad():
        straight = ours.model.decode(mean, return_dict=False)[0].clamp(-1, 1)
        unscaled = ours.model.decode((mean - ours.shift) * scale, return_dict=False)[0].clamp(-1, 1)
    assert_close(ours.decode((mean - ours.shift) * scale), straight, atol=1e-5, rtol=0)
    assert not torch.allclose(unscaled, straight, atol=1e-2), "a decoder that ignored the scale would pass otherwise"


def test_wrong_shapes_are_refused(loaded):
    with pytest.raises(HasteError, match="multiples of 2, these are 15x15"):
        loaded.encode(images(size=15))
    with pytest.raises(HasteError, match="latents of 4 channels, these have 3"):
        loaded.decode(torch.zeros(1, 3, 8, 8))


def test_the_fingerprint_is_of_the_weights(vae_folder, loaded, tmp_path):
    assert load_vae(str(vae_folder), fingerprint=loaded.fingerprint).fingerprint == loaded.fingerprint
    save_vae(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"][0] += 1
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(HasteError, match=f"expected are {loaded.fingerprint}"):
        load_vae(str(tmp_path), fingerprint=loaded.fingerprint)


def test_half_precision_files_and_old_names_of_attention_weights_are_read(tmp_path, loaded):
    """The published sd-vae-ft files call the attention weights query, key, value and proj_attn."""
    save_vae(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, value in load_file(path).items():
        for new, former in old.items():
            name = name.replace(new, former)
        weights[name] = value
    assert sum(".query." in name for name in weights) == 4
    save_file(weights, path)
    assert load_vae(str(tmp_path)).fingerprint == loaded.fingerprint
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    half = load_vae(str(tmp_path))
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert_close(half.encode(images()).mean, loaded.encode(images()).mean, atol=1e-2, rtol=1e-2)


def edit(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


WEIGHTS, SETTINGS = "diffusion_pytorch_model.safetensors", "config.json"
UNUSABLE = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "pickle only": (lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"), f"has no {WEIGHTS}"),
    "no config": (lambda f: (f / SETTINGS).unlink(), "has no config.json"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:1000]), "cannot be loaded"),
    "missing tensors": (lambda f: save_file({n: v for n, v in load_file(f / WEIGHTS).items() if "conv_in" not in n},
                                            f / WEIGHTS), "no weights for 4 tensors"),
    "other shapes": (lambda f: edit(f / SETTINGS, latent_channels=8), "cannot be loaded"),
    "normalised per channel": (lambda f: edit(f / SETTINGS, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
                               "normalises latents per channel"),
}  # fmt: skip


@pytest.mark.parametrize("how", UNUSABLE)
def test_unusable_vaes_are_an_error_of_one_line(tmp_path, how):
    damage, message = UNUSABLE[how]
    damage(save_vae(tmp_path))
    with pytest.raises(HasteError, match=message) as caught:
        load_vae(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-vae", f"download {SETTINGS} and {WEIGHTS}"),
        ("./vae", "is no folder"),
        ("a/b/c", "is no folder"),
    ],
)
def test_a_name_that_is_not_there_is_an_error_of_one_line(name, message):
    with pytest.raises(HasteError, match=message) as caught:
        load_vae(name)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_vae_is_loaded_in_a_fresh_process(vae_folder):
    """With torch's CPU build torchvision's compiled part does not load; diffusers must import all the same."""
    code = f"from haste_core.study.latents import load_vae; load_vae({str(vae_folder)!r}); print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


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
    """What one process makes in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
        out = tmp_path_factory.mktemp("reference") / "out"
        prepare(Job(str(source), str(out), str(vae_folder), SIZE, batch_size=3, shard_size=5), progress=False)
    return out


def test_what_is_written(reference, source, vae_folder):
    manifest = json.loads((reference / "manifest.json").read_text())
    assert sorted(p.name for p in reference.iterdir()) == ["images", "manifest.json", "vae-sd"]
    assert [shard["count"] for shard in manifest["shards"]] == [5, 5, 5, 5, 3]
    names = [name for name in content(reference) if name.endswith((".png", ".npy"))]
    assert len(names) == 46
    assert "images/00004/img00000022.png" in names
    assert "vae-sd/00004/img-mean-std-00000022.npy" in names
    assert manifest["count"] == 23
    assert manifest["latent_shape"] == [CHANNELS, SIDE, SIDE]
    assert manifest["class_names"] == ["ant", "bee", "cat"]
    assert manifest["source"]["path"] == str(source)
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
        assert (array.dtype, array.shape) == (np.float32, (2 * CHANNELS, SIDE, SIDE))
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


@pytest.mark.parametrize("call", [1, 4])
def test_an_interrupted_folder_is_resumed_to_the_same_bytes(job, reference, monkeypatch, call):
    with monkeypatch.context() as patch:
        interrupt_at(patch, call)
        with pytest.raises(Interrupted, match=r"of 5 shards of .* are complete; run again"):
            prepare(job, progress=False)
    task = Preparation(job)
    complete = [shard for shard in range(5) if task.is_complete(shard)]
    assert complete == list(range((call - 1) // 2)), "two batches a shard; the unfinished one is dropped"
    assert not list(task.work.glob("*.tmp"))
    assert not task.manifest_path.exists()
    with monkeypatch.context() as patch:
        calls = interrupt_at(patch, -1)
        prepare(job, progress=False)
        assert len(calls) == 9 - 2 * len(complete), "complete shards are not read again"
    assert content(task.out) == content(reference)


def test_what_killed_processes_leave_is_made_again(job, reference, monkeypatch):
    """A half-written shard, and one that was renamed on one side and never recorded."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            prepare(job, progress=False)
    task = Preparation(job)
    (task.work / "00002.tmp" / "images").mkdir(parents=True)
    (task.work / "00002.tmp" / "images" / "img00000010.png").write_text("half")
    (task.out / "images" / "00003").mkdir()
    (task.out / "images" / "00003" / "img00000099.png").write_text("stray")
    shutil.rmtree(task.out / "vae-sd" / "00000")
    prepare(job, progress=False)
    assert content(task.out) == content(reference)


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(job, reference, monkeypatch, tmp_path):
    finished, begun = (replace(job, out=str(tmp_path / name)) for name in ("finished", "begun"))
    shutil.copytree(reference, finished.out)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "finished").rglob("*")}
    assert prepare(finished, progress=False).count == 23
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "finished").rglob("*")} == before
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            prepare(begun, progress=False)
    smaller = shutil.copytree(job.source, tmp_path / "source")
    next((smaller / "train" / "ant").iterdir()).unlink()
    other = save_vae(tmp_path / "vae", act_fn="relu", layers_per_block=2)
    for changes, message in (
        ({"size": 32}, r"image_size 16, now it is 32"),
        ({"shard_size": 6}, r"shard_size 5, now it is 6"),
        ({"vae": str(other)}, r"vae.fingerprint '[0-9a-f]+', now it is"),
        ({"source": str(smaller)}, r"count 23, now it is 22"),
    ):
        for there in (finished, begun):
            with pytest.raises(HasteError, match=message):
                prepare(replace(there, **changes), progress=False)


def test_unusable_jobs_are_an_error_of_one_line_and_leave_nothing(job, tmp_path):
    for changes, message in (
        ({"size": 0}, "--size 0"),
        ({"size": 15}, "--size 15; expected with VAE .*: a multiple of 2"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"shard_size": 0}, "--shard-size 0"),
        ({"split": "valid"}, "no split 'valid'; expected one of: train"),
        ({"source": str(tmp_path / "nothing")}, "does not exist"),
        ({"vae": str(tmp_path / "nothing")}, "is no folder"),
        ({"device": "toaster"}, "--device toaster"),
    ):
        with pytest.raises(HasteError, match=message):
            prepare(replace(job, **changes), progress=False)
    assert not Preparation(job).out.exists()
    write_folder(Preparation(job).out, 2)
    with pytest.raises(HasteError, match="holds other files"):
        prepare(job, progress=False)


def test_undecodable_images_and_a_full_disk_are_errors_of_one_line(job, tmp_path, monkeypatch):
    copy = shutil.copytree(job.source, tmp_path / "copy")
    (copy / "train" / "bee" / "004.png").write_bytes(b"no image")
    with pytest.raises(HasteError, match="image 9 cannot be decoded"):
        prepare(replace(job, source=str(copy), out=str(tmp_path / "other")), progress=False)

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding.Path, "write_bytes", full)
    with pytest.raises(HasteError, match="no room to write"):
        prepare(job, progress=False)
    assert not list(Preparation(job).work.glob("*.tmp"))


def relabel(folder, edit):
    for side in ("images", "vae-sd"):
        change(labels_file(folder, side), edit)


DAMAGE = {
    "image": (lambda f: Image.fromarray(picture(77)).save(f / "images/00001/img00000007.png"), r"images/00001\)"),
    "latent": (lambda f: np.save(f / "vae-sd/00002/img-mean-std-00000011.npy", posterior(0)), r"vae-sd/00002\)"),
    "stray": (lambda f: (f / "images/00003/note.txt").write_text("hello"), r"images/00003\)"),
    "missing": (lambda f: (f / "images/00004/img00000022.png").unlink(), r"images/00004\)"),
    "labels": (lambda f: relabel(f, lambda e: e[3].__setitem__(1, 2)), r"1 of its parts .* \(labels\)"),
    "count": (lambda f: relabel(f, lambda e: e.pop()), "counts 23 images, dataset.json names 22"),
    "manifest": (lambda f: (f / "manifest.json").unlink(), r"has no manifest\.json"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_checking_finds_what_changed(reference, tmp_path, how):
    folder = shutil.copytree(reference, tmp_path / "copy")
    assert check(folder, progress=False).count == 23
    damage, message = DAMAGE[how]
    damage(folder)
    with pytest.raises(HasteError, match=message):
        check(folder, progress=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"count": 1}'])
def test_a_damaged_manifest_is_one_line(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(HasteError, match=r"manifest\.json"):
        latents(folder)


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
def test_two_processes_make_the_same_folder_and_their_error_is_that_of_the_command(job, reference, tmp_path, capsys):
    assert command(job, "--processes", "2") == 0
    assert content(Preparation(job).out) == content(reference)
    assert "23 images of 16 pixels" in capsys.readouterr().out
    assert command(replace(job, out=str(tmp_path / "b"), source=str(tmp_path / "no")), "--processes", "2") == 2
    assert "does not exist" in capsys.readouterr().err.splitlines()[-1]


# ---- training ----


def test_a_tiny_model_trains_through_both_phases(reference, output, make_study):
    study = make_study(
        f"data={{kind: latents, path: {reference}, augment: {{shift: 0, rotation: 0, scale: 0}}}}",
        "arms.haste.termination.at=4", "train.steps=8", "train.keep=[4]", "train.batch_size=8",
        "teacher.kwargs={img_size: 16, patch_size: 4, in_chans: 3, embed_dim: 24, depth: 4, num_heads: 4}",
        "teacher.mean=[0.5, 0.5, 0.5]", "teacher.std=[0.5, 0.5, 0.5]", "model.patch=2", "claims.early=4",
    )  # fmt: skip
    seen = []
    run = Run(study, "haste", 0)
    fit(run, on_step=lambda state: seen.append((state.step, state.haste is None)), progress=False)
    assert seen == [(step, step > 4) for step in range(1, 9)]
    logged = run.metrics()
    assert [row["phase"] for row in logged] == [1, 1, 2, 2]
    assert all(row["loss"] == row["loss"] for row in logged)
    assert logged[0]["loss"] != logged[0]["denoising"]
    assert logged[-1]["loss"] == logged[-1]["denoising"]
    tensors, _ = run.load(8, prefixes=("ema.",))
    assert tensors["ema.x_embedder.proj.weight"].shape == (32, CHANNELS, 2, 2)
