"""Prepared latents: pairing by name, what a batch holds, encoding in shards, and training on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
from haste_core.study.data.pairs import read_pairs
from haste_core.study.data.resize import center_crop, to_signed, to_tensor
from haste_core.study.latents.workspace import Job, Workspace
from PIL import Image
from test_vae import save_vae
from torch.testing import assert_close

from haste_core import training
from haste_core.errors import HasteError, Interrupted
from haste_core.files import locked
from haste_core.sampling import to_uint8
from haste_core.state import create
from haste_core.study import config
from haste_core.study.data import Batches, open_dataset
from haste_core.study.data.images import Split
from haste_core.study.data.latents import Folder
from haste_core.study.latents import encode, shards
from haste_core.study.runs import Run

pytestmark = pytest.mark.xdist_group("vae")
SIZE, CHANNELS, SIDE, CLASSES = 16, 4, 8, 3
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def progress_bars():
    """A helper in this process would leave them off for the tests after it."""
    yield
    datasets.enable_progress_bars()


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
    return open_dataset(config.Data(kind="latents", path=str(folder), **changes))


def labels_file(folder, side="vae-sd"):
    return folder / side / "dataset.json"


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content["labels"])
    path.write_text(json.dumps(content))


# ---- reading ----


def test_what_a_folder_without_manifest_holds(folder):
    data = latents(folder)
    assert (data.name, data.channels, data.image_size, data.classes) == ("prepared", CHANNELS, SIDE, CLASSES)
    assert (data.scale, data.shift, data.pixel_size, data.manifest) == (0.18215, 0.0, SIZE, None)
    assert len(data) == 16
    assert {split: len(data.images(split)[1]) for split in SPLITS} == {"train": 16, "validation": 2, "test": 6}


def numbers(images):
    """Which pictures these are."""
    known = {picture(i).tobytes(): i for i in range(24)}
    return [known[pixels.permute(1, 2, 0).numpy().tobytes()] for pixels in to_uint8(images)]


def test_image_latent_and_label_belong_together(folder):
    data = latents(folder)
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


def test_too_few_pairs_to_be_divided_are_an_error(tmp_path):
    with pytest.raises(HasteError, match=r"validation_fraction 0\.1: 1 image cannot be divided"):
        latents(write_folder(tmp_path / "pair", 2))


def test_classes_of_one_image_do_not_prevent_a_split(folder):
    for side in ("images", "vae-sd"):
        change(labels_file(folder, side), lambda entries: entries[0].__setitem__(1, 7))
    data = latents(folder)
    assert data.classes == 8
    assert len(data) == 16


def test_counts_limit_what_is_read(folder):
    data = latents(folder)
    assert torch.equal(data.examples("train", 3).x, data.examples("train").x[:3])
    # Of many, their images would not fit into memory; whoever looks at latents alone leaves them out.
    without = data.examples("train", 3, with_images=False)
    assert without.images.shape[0] == 0
    assert torch.equal(without.x, data.examples("train", 3).x)
    assert len(data.images("test", 2)[1]) == 2


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


def test_without_images_no_image_is_opened_and_the_latents_stay_the_same(folder, monkeypatch):
    data, indices = latents(folder), torch.arange(5)
    whole = data.batch(indices, torch.Generator().manual_seed(3))
    monkeypatch.setattr(data.folder, "pixels", lambda indices: pytest.fail("an image was read"))
    alone = data.batch(indices, torch.Generator().manual_seed(3), with_images=False)
    assert alone.x.equal(whole.x)
    assert alone.images.shape == (0, *whole.images.shape[1:])


def test_parts_of_a_batch_make_up_the_whole(folder):
    data, indices = latents(folder), torch.arange(6)
    whole = data.batch(indices, torch.Generator().manual_seed(3))
    parts = [data.batch(indices, torch.Generator().manual_seed(3), part=slice(i, i + 3)) for i in (0, 3)]
    for together, separate in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.cat(separate).equal(together)


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
    state = create(run, 0, training.find_teacher(study, run.teacher))
    for _ in range(12):
        training.train_step(state)
    assert len(counted) == reads


def test_batches_come_from_their_generator(folder):
    data = latents(folder)
    first, again, other = (data.batch(torch.arange(5), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert torch.equal(first.images, other.images)
    stream = Batches(data, 8, seed=0)
    assert len({i for _ in range(2) for i in numbers(stream.next().images)}) == 16


@pytest.mark.parametrize("augment", [{"flip": True}, {"shift": 1.0}, {"rotation": 3.0}])
def test_augmentation_is_refused(folder, augment):
    with pytest.raises(HasteError, match="no augmentation"):
        latents(folder, augment=augment)


def test_image_size_must_be_that_of_the_images(folder):
    assert latents(folder, image_size=SIZE).pixel_size == SIZE
    with pytest.raises(HasteError, match=r"data.image_size 32, the images .* have 16"):
        latents(folder, image_size=32)


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
    (folder / "dataset.json").unlink()
    with pytest.raises(HasteError, match=r"has no dataset\.json"):
        read_pairs(folder)


def test_the_order_of_a_list_changes_nothing(folder):
    expected = read_pairs(folder)
    change(labels_file(folder), lambda entries: entries.reverse())
    assert same(read_pairs(folder), expected)


def test_null_labels_mean_one_class(folder):
    for side in ("images", "vae-sd"):
        labels_file(folder, side).write_text('{"labels": null}')
    data = latents(folder)
    assert data.classes == 1
    assert sorted(i for split in SPLITS for i in numbers(data.images(split)[0])) == list(range(24))


def test_null_labels_on_one_side_are_those_of_the_other(folder):
    expected = read_pairs(folder)
    labels_file(folder, "images").write_text('{"labels": null}')
    assert same(read_pairs(folder), expected)
    (folder / "vae-sd" / "00000" / "img-mean-std-00000003.npy").unlink()
    assert same(read_pairs(folder), expected), "a labelled list is taken at its word"
    (folder / "images" / "00000" / "img00000003.png").unlink()
    with pytest.raises(HasteError, match="1 without an image"):
        read_pairs(folder)


def test_partners_are_missed_by_name(folder):
    change(labels_file(folder), lambda entries: entries.pop(5))
    with pytest.raises(HasteError, match=r"1 without a latent \(00000/img00000005.png\)"):
        read_pairs(folder)
    change(labels_file(folder, "images"), lambda entries: entries.pop(20))
    with pytest.raises(HasteError, match=r"without a latent .*; 1 without an image \(00001/img-mean-std-0+20.npy\)"):
        read_pairs(folder)
    change(labels_file(folder, "images"), lambda entries: entries.__delitem__(slice(10, 16)))
    with pytest.raises(HasteError, match=r"7 without an image \(.*10.npy, .*11.npy, .*12.npy, \.\.\.\)"):
        read_pairs(folder)


def test_labels_must_agree(folder):
    change(labels_file(folder), lambda entries: entries[4].__setitem__(1, 0))
    with pytest.raises(HasteError, match=r"1 with another label than its latent \(00000/img00000004.png\)"):
        read_pairs(folder)


def test_the_same_number_in_another_folder_is_no_partner(folder):
    change(labels_file(folder), lambda entries: entries[0].__setitem__(0, "00001/img-mean-std-00000000.npy"))
    with pytest.raises(HasteError, match=r"1 without a latent .*; 1 without an image"):
        read_pairs(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../00000/img01.png",
        "/etc/img01.png",
        "00000/../../img01.png",
        "00000\\img01.png",
        "./img01.png",
        "a//img01.png",
    ],
)
@pytest.mark.parametrize("at_top", [True, False])
def test_names_that_lead_outside_are_refused(folder, name, at_top):
    path = folder / "dataset.json" if at_top else labels_file(folder, "images")
    path.write_text(json.dumps({"labels": [[name, 0]]}))
    with pytest.raises(HasteError, match="leads outside of the folder"):
        read_pairs(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no list of labels"),
        ("{}", "is no list of labels"),
        ('{"labels": {"a": 1}}', "is no list of labels"),
        ("{", "is no valid JSON"),
        ('{"labels": []}', "without a latent"),
        ('{"labels": [["00000/img-mean-std-00000000.npy"]]}', "has the entry"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", [0, 1]]]}', "has the entry"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", -1]]}', "has the entry"),
        ('{"labels": [["00000/img-mean-std-00000000.npy", true]]}', "has the entry"),
        ('{"labels": [["00000/img00000000.png", 1]]}', "names like"),
        ('{"labels": [["00000/cat.npy", 1]]}', "names like"),
        ('{"labels": [["a/img-mean-std-1.npy", 1], ["a/img-mean-std-1.npy", 1]]}', "twice"),
    ],
)
def test_other_lists_are_refused_in_one_line(folder, content, message):
    labels_file(folder).write_text(content)
    with pytest.raises(HasteError, match=message) as caught:
        read_pairs(folder)
    assert "\n" not in str(caught.value)


def test_a_list_at_the_top_must_not_contradict(folder):
    entries = json.loads(labels_file(folder, "images").read_text())["labels"]
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    read_pairs(folder)
    (folder / "dataset.json").write_text(json.dumps({"labels": entries[:-1]}))
    with pytest.raises(HasteError, match="disagree"):
        read_pairs(folder)


# ---- files ----


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(HasteError, match="is no folder"):
        latents(tmp_path / "nothing")


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def archived(path):
    with path.open("wb") as stream:
        np.savez(stream, a=posterior(0))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:200])


IMAGE, LATENT = "images/00001/img00000015.png", "vae-sd/00001/img-mean-std-00000015.npy"
BREAKING = {
    "image missing": (IMAGE, lambda path: path.unlink()),
    "latent missing": (LATENT, lambda path: path.unlink()),
    "image cut short": (IMAGE, cut_short),
    "latent cut short": (LATENT, cut_short),
    "text for an image": (IMAGE, lambda path: path.write_text("hello")),
    "pickle": (LATENT, pickled),
    "archive": (LATENT, archived),
    "other size": (IMAGE, lambda path: Image.fromarray(picture(15, 32)).save(path)),
    "not square": (IMAGE, lambda path: Image.fromarray(picture(15)[:8]).save(path)),
    "other shape": (LATENT, lambda path: np.save(path, posterior(15)[:4])),
    "float64": (LATENT, lambda path: np.save(path, posterior(15).astype(np.float64))),
}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("image missing", "img00000015.png cannot be read: it is missing"),
        ("latent missing", "img-mean-std-00000015.npy cannot be read: it is missing"),
        ("image cut short", "cannot be read"),
        ("latent cut short", "cannot be read"),
        ("text for an image", "cannot be read"),
        ("pickle", "cannot be read: Object arrays cannot be loaded"),
        ("archive", "possible: one array of float32"),
        ("other size", "is 32x32; possible: 16x16"),
        ("not square", "is 16x8; possible: a square"),
        ("other shape", r"has shape \(4, 8, 8\)"),
        ("float64", "holds float64"),
    ],
)
def test_broken_files_are_one_line_when_they_are_read(folder, how, message):
    name, broken = BREAKING[how]
    broken(folder / name)
    data = latents(folder)
    with pytest.raises(HasteError, match=message) as caught:
        [data.examples(split) for split in SPLITS]
    assert "\n" not in str(caught.value)


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


# ---- encoding ----


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """23 photographs-to-be of odd sizes in three classes."""
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
        encode.prepare(Job(str(source), str(out), str(vae_folder), SIZE, batch_size=3, shard_size=5), progress=False)
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


def test_every_pair_is_the_encoded_crop_of_one_source_image(reference, source, vae_folder):
    from haste_core.study.latents import vae

    model = vae.load(str(vae_folder))
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


def test_reading_back(reference):
    data = latents(reference)
    assert (data.classes, data.channels, data.image_size, data.pixel_size) == (3, CHANNELS, SIDE, SIZE)
    assert data.manifest.vae.fingerprint
    batch = data.batch(torch.arange(4), torch.Generator().manual_seed(0))
    assert batch.x.shape == (4, CHANNELS, SIDE, SIDE)
    assert batch.images.shape == (4, 3, SIZE, SIZE)


def test_scale_and_shift_of_the_manifest_are_used(reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "other")
    plain = latents(folder).examples("train").x
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["vae"] |= {"scale": 2.0, "shift": 0.5}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_close(latents(folder).examples("train").x, (plain / 0.18215 - 0.5) * 2)


def test_two_processes_make_the_same_folder(job, reference, monkeypatch):
    """This process keeps its first shard until the other one has made some."""
    space, mine, encode_shard = Workspace(job), [], shards.Encoder.encode

    def waiting(self, shard, *rest):
        mine.append(shard)
        while len(mine) == 1 and not any(map(space.is_whole, range(5))):
            time.sleep(0.05)
        encode_shard(self, shard, *rest)

    monkeypatch.setattr(shards.Encoder, "encode", waiting)
    encode.prepare(job, processes=2, progress=False)
    assert 1 <= len(mine) < 5
    assert content(space.out) == content(reference)


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


@pytest.mark.parametrize("call", [1, 4, 9])
def test_an_interrupted_folder_goes_on_to_the_same_bytes(job, reference, monkeypatch, call):
    with monkeypatch.context() as patch:
        interrupt_at(patch, call)
        with pytest.raises(Interrupted, match=r"of 5 shards of .* are whole; run again"):
            encode.prepare(job, progress=False)
    space = Workspace(job)
    whole = [shard for shard in range(5) if space.is_whole(shard)]
    assert whole == list(range((call - 1) // 2)), "two batches a shard; the one that was begun is dropped"
    assert not list(space.work.glob("*.tmp"))
    assert not space.manifest_path.exists()
    with monkeypatch.context() as patch:
        calls = interrupt_at(patch, -1)
        encode.prepare(job, progress=False)
        assert len(calls) == 9 - 2 * len(whole), "whole shards are not read again"
    assert content(space.out) == content(reference)


def test_what_killed_processes_leave_is_made_again(job, reference, monkeypatch):
    """A half-written shard, and one that was renamed on one side and never recorded."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            encode.prepare(job, progress=False)
    space = Workspace(job)
    (space.work / "00002.tmp" / "images").mkdir(parents=True)
    (space.work / "00002.tmp" / "images" / "img00000010.png").write_text("half")
    (space.out / "images" / "00003").mkdir()
    (space.out / "images" / "00003" / "img00000099.png").write_text("stray")
    shutil.rmtree(space.out / "vae-sd" / "00000")
    encode.prepare(job, progress=False)
    assert content(space.out) == content(reference)


def test_a_finished_folder_is_left_alone(reference, job):
    shutil.copytree(reference, job.out)
    before = {p: p.stat().st_mtime_ns for p in Workspace(job).out.rglob("*")}
    manifest = encode.prepare(job, progress=False)
    assert manifest.count == 23
    assert {p: p.stat().st_mtime_ns for p in Workspace(job).out.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 32}, r"image_size 16, now it is 32"),
        ({"shard_size": 6}, r"shard_size 5, now it is 6"),
        ({"vae": "other"}, r"vae.fingerprint '[0-9a-f]+', now it is"),
        ({"source": "other"}, r"count 23, now it is 22"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(job, reference, monkeypatch, tmp_path, changes, message, finished):
    if finished:
        shutil.copytree(reference, job.out)
    else:
        with monkeypatch.context() as patch:
            interrupt_at(patch, 4)
            with pytest.raises(Interrupted):
                encode.prepare(job, progress=False)
    if "vae" in changes:
        changes = {"vae": str(save_vae(tmp_path / "vae", act_fn="relu", layers_per_block=2))}
    if "source" in changes:
        changes = {"source": str(shutil.copytree(job.source, tmp_path / "source"))}
        next((tmp_path / "source" / "train" / "ant").iterdir()).unlink()
    with pytest.raises(HasteError, match=message):
        encode.prepare(Job(**{**vars(job), **changes}), progress=False)


def test_batch_size_is_free(job, reference):
    """Another batch size may move the last bits of a latent, nothing else."""
    encode.prepare(Job(**{**vars(job), "batch_size": 64}), progress=False)
    mine, other = (latents(path).examples("train") for path in (job.out, reference))
    assert torch.equal(mine.images, other.images)
    assert_close(mine.x, other.x, atol=1e-5, rtol=1e-5)


def test_bad_jobs_are_one_line(job, tmp_path):
    for changes, message in (
        ({"size": 0}, "--size 0"),
        ({"size": 15}, "--size 15; possible with VAE .*: multiples of 2"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"shard_size": 0}, "--shard-size 0"),
        ({"split": "valid"}, "no split 'valid'; possible: train"),
        ({"source": str(tmp_path / "nothing")}, "does not exist"),
        ({"vae": str(tmp_path / "nothing")}, "is no folder"),
        ({"device": "toaster"}, "--device toaster"),
    ):
        with pytest.raises(HasteError, match=message):
            encode.prepare(Job(**{**vars(job), **changes}), progress=False)
    with pytest.raises(HasteError, match="--processes 0"):
        encode.prepare(job, processes=0)
    assert not Workspace(job).out.exists()


def test_folders_with_other_files_are_refused(job):
    write_folder(Workspace(job).out, 2)
    with pytest.raises(HasteError, match="holds other files"):
        encode.prepare(job, progress=False)


def test_a_folder_in_use_is_refused(job):
    with locked(Workspace(job).work / "lock", "x"), pytest.raises(HasteError, match="is in use by process"):
        encode.prepare(job, progress=False)


def test_a_failing_helper_is_one_line(job, monkeypatch):
    """The second process dies at once; nothing whole is lost and the next call finishes."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: start([sys.executable, "-c", "raise SystemExit(3)"]))
    with pytest.raises(HasteError, match="ended with status 3"):
        encode.prepare(job, processes=2, progress=False)
    monkeypatch.undo()
    assert encode.prepare(job, progress=False).count == 23


def test_a_helper_stops_when_nobody_waits_for_it(job):
    space, ours = Workspace(job), os.getppid()
    assert encode.worker(job.write(), parent=ours + 1) == 143
    assert not any(map(space.is_whole, range(5)))
    assert encode.worker(job.write(), parent=ours) == 0
    assert all(map(space.is_whole, range(5)))
    assert not space.manifest_path.exists(), "the first process finishes the folder"


def test_a_helper_reports_errors_in_one_line(job, tmp_path, capsys):
    missing = Job(**{**vars(job), "source": str(tmp_path / "nothing")})
    assert encode.worker(missing.write(), parent=os.getppid()) == 2
    assert "does not exist" in capsys.readouterr().err


def test_an_undecodable_image_is_named(job, tmp_path):
    copy = shutil.copytree(job.source, tmp_path / "copy")
    (copy / "train" / "bee" / "004.png").write_bytes(b"no image")
    with pytest.raises(HasteError, match="image 9 cannot be decoded"):
        encode.prepare(Job(**{**vars(job), "source": str(copy)}), progress=False)


def test_no_room_is_one_line(job, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.Path, "write_bytes", full)
    with pytest.raises(HasteError, match="no room to write"):
        encode.prepare(job, progress=False)
    assert not list(Workspace(job).work.glob("*.tmp"))


def damage(folder, how):
    if how == "image":
        Image.fromarray(picture(77)).save(folder / "images/00001/img00000007.png")
    elif how == "latent":
        np.save(folder / "vae-sd/00002/img-mean-std-00000011.npy", posterior(0))
    elif how == "stray":
        (folder / "images/00003/note.txt").write_text("hello")
    elif how == "missing":
        (folder / "images/00004/img00000022.png").unlink()
    elif how == "labels":
        for side in ("images", "vae-sd"):
            change(labels_file(folder, side), lambda entries: entries[3].__setitem__(1, 2))
    elif how == "count":
        for side in ("images", "vae-sd"):
            change(labels_file(folder, side), lambda entries: entries.pop())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("image", r"images/00001\)"),
        ("latent", r"vae-sd/00002\)"),
        ("stray", r"images/00003\)"),
        ("missing", r"images/00004\)"),
        ("labels", r"1 of its parts .* \(labels\)"),
        ("count", "counts 23 images, dataset.json names 22"),
    ],
)
def test_checking_finds_what_changed(reference, tmp_path, how, message):
    folder = shutil.copytree(reference, tmp_path / "copy")
    assert encode.check(folder, progress=False).count == 23
    damage(folder, how)
    with pytest.raises(HasteError, match=message):
        encode.check(folder, progress=False)


def test_a_folder_without_manifest_cannot_be_checked(folder):
    with pytest.raises(HasteError, match=r"has no manifest\.json"):
        encode.check(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"count": 1}'])
def test_a_damaged_manifest_is_one_line(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(HasteError, match=r"manifest\.json"):
        latents(folder)


def parsed(words):
    from haste_core.study.cli import parser

    return parser().parse_args(["latents", *words])


def test_the_command(job, reference, capsys):
    words = [job.source, job.out, "--vae", job.vae, "--size", "16", "--device", "cpu"]
    words += ["--batch-size", "3", "--shard-size", "5"]
    arguments = parsed(words)
    arguments.action(arguments)
    assert content(Workspace(job).out) == content(reference)
    assert "23 images of 16 pixels in 3 classes, latents 4x8x8 of" in capsys.readouterr().out
    arguments = parsed(["--check", job.out])
    arguments.action(arguments)
    assert job.out in capsys.readouterr().out
    for words in ([], [job.source], [job.source, job.out, "--check", job.out]):
        with pytest.raises(HasteError, match="possible: haste latents"):
            parsed(words).action(parsed(words))


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
    training.fit(run, on_step=lambda state: seen.append((state.step, state.alignment is None)), progress=False)
    assert seen == [(step, step > 4) for step in range(1, 9)]
    logged = run.metrics()
    assert [row["phase"] for row in logged] == [1, 1, 2, 2]
    assert all(row["loss"] == row["loss"] for row in logged)
    assert logged[0]["loss"] != logged[0]["denoising"]
    assert logged[-1]["loss"] == logged[-1]["denoising"]
    tensors, _ = run.load(8, prefixes=("ema.",))
    assert tensors["ema.x_embedder.proj.weight"].shape == (32, CHANNELS, 2, 2)
