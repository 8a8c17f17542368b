"""Labelled images that `datasets` reads: folders, parquet files, what is kept of them and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from haste_core.errors import HasteError
from haste_core.sampling import to_uint8
from haste_core.study import config
from haste_core.study.data import Batches, images, open_dataset

SIZE, NAMES = 16, ("ant", "bee", "cat")
SPLITS = ("train", "validation", "test")
SHARED = [Path(__file__).parents[up] / "shared" / "data" for up in (2, 3)]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Nothing is left in the home directory or in the project."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HASTE_OUTPUT", str(tmp_path / "output"))


def picture(index, size=SIZE):
    return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def write_images(folder, numbers, size=SIZE):
    """Image i goes to the sub-folder of class i mod 3, as i.png."""
    for i in numbers:
        place = folder / NAMES[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03d}.png").write_bytes(png(picture(i, size)))
    return folder


def write_parquet(path, numbers, image="img", label="label", labels=None):
    """The layout of many hub data sets: an image column of {bytes, path} and one of int64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [{"bytes": png(picture(i)), "path": f"{i}.png"} for i in numbers]
    labels = [i % 3 for i in numbers] if labels is None else labels
    pq.write_table(pa.table({image: contents, label: pa.array(labels, pa.int64())}), path)
    return path


def opened(path, **changes):
    return open_dataset(config.Data(kind="images", path=str(path), **{"image_size": SIZE, **changes}))


def numbers(x, known=60):
    """Which pictures these are; an unknown one is an error."""
    table = {picture(i).tobytes(): i for i in range(known)}
    return [table[pixels.permute(1, 2, 0).numpy().tobytes()] for pixels in to_uint8(x)]


def contents(data):
    """Numbers and labels of all splits."""
    parts = {split: data.images(split) for split in SPLITS}
    return {split: (numbers(x), y.tolist()) for split, (x, y) in parts.items()}


def together(found, *splits):
    """Numbers of the images of some splits, by default all, ascending."""
    return sorted(i for split in splits or SPLITS for i in found[split][0])


def check_labels(data):
    for shown, labels in contents(data).values():
        assert labels == [i % 3 for i in shown]


# ---- sources ----


def test_a_folder_with_train_and_test(tmp_path):
    write_images(tmp_path / "pets" / "train", range(12))
    write_images(tmp_path / "pets" / "test", range(12, 18))
    data = opened(tmp_path / "pets")
    assert (data.name, data.channels, data.image_size, data.classes, len(data)) == ("pets", 3, SIZE, 3, 10)
    check_labels(data)
    found = contents(data)
    assert together(found, "train", "validation") == list(range(12))
    assert found["test"][0] == [12, 15, 13, 16, 14, 17], "files in the order of their folders"
    assert len(found["validation"][0]) == 2


def test_a_folder_without_a_test_split_is_divided(tmp_path):
    folder = write_images(tmp_path / "pets", range(36))
    data = opened(folder)
    check_labels(data)
    found = contents(data)
    assert together(found) == list(range(36))
    assert torch.bincount(torch.tensor(found["test"][1])).tolist() == [3, 3, 3]
    assert torch.bincount(torch.tensor(found["validation"][1])).tolist() == [1, 1, 1]
    assert contents(opened(folder)) == found
    assert set(contents(opened(folder, split_seed=1))["test"][0]) != set(found["test"][0])
    assert set(contents(opened(folder, split_seed=1))["validation"][0]) != set(found["validation"][0])
    assert len(opened(folder, test_fraction=0.5)) == 16
    other = contents(opened(folder, validation_fraction=0.5))
    assert len(other["validation"][0]) == 14
    assert other["test"] == found["test"], "the test images do not depend on the validation images"


def test_another_name_for_the_test_split(tmp_path):
    write_images(tmp_path / "pets" / "train", range(12))
    write_images(tmp_path / "pets" / "validation", range(12, 18))
    assert sorted(contents(opened(tmp_path / "pets", test_split="validation"))["test"][0]) == list(range(12, 18))
    assert len(opened(tmp_path / "pets")) == 8, "without a split of that name part of train is held out"
    with pytest.raises(HasteError, match="no split 'training'; possible: train, validation"):
        opened(tmp_path / "pets", train_split="training")


def test_a_class_of_one_image_does_not_prevent_a_split(tmp_path):
    folder = write_images(tmp_path / "pets", [*range(0, 36, 3), 1])
    data = opened(folder)
    assert data.classes == 2
    assert len(data) == 8
    assert together(contents(data)) == sorted([*range(0, 36, 3), 1])


def test_one_parquet_file(tmp_path):
    data = opened(write_parquet(tmp_path / "pets.parquet", range(24)))
    check_labels(data)
    assert (data.name, data.classes, len(data)) == ("pets.parquet", 3, 16)


@pytest.mark.parametrize("column", ["img", "image"])
def test_a_folder_of_parquet_files(tmp_path, column):
    folder = tmp_path / "pets"
    write_parquet(folder / "pets-train-00000-of-00002.parquet", range(12), column)
    write_parquet(folder / "pets-train-00001-of-00002.parquet", range(12, 24), column)
    write_parquet(folder / "pets-test.parquet", range(24, 30), column)
    data = opened(folder)
    check_labels(data)
    assert together(contents(data), "train", "validation") == list(range(24))
    assert contents(data)["test"][0] == list(range(24, 30)), "rows keep their order"


def test_parquet_written_by_datasets_itself(tmp_path):
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=[*NAMES, "dog"])})
    rows = {"picture": [Image.fromarray(picture(i)) for i in range(12)], "label": [i % 3 for i in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pets.parquet")
    data = opened(tmp_path / "pets.parquet")
    check_labels(data)
    assert data.classes == 4, "a class without images counts"


def test_the_column_named_label_is_taken_among_several(tmp_path):
    path = write_parquet(tmp_path / "pets.parquet", range(12))
    table = pq.read_table(path)
    pq.write_table(table.add_column(0, "width", pa.array([99] * 12)), path)
    check_labels(opened(path))


@pytest.mark.skipif(not any(folder.is_dir() for folder in SHARED), reason="no shared CIFAR-10 here")
def test_the_shared_photographs():
    folder = next(folder for folder in SHARED if folder.is_dir())
    data = opened(folder, image_size=32)
    assert (len(data), data.classes, data.channels) == (45_000, 10, 3)
    x, y = data.images("test", 64)
    assert x.shape == (64, 3, 32, 32)
    assert y.unique().numel() > 5
    assert -1 <= float(x.min()) < -0.9
    assert 0.9 < float(x.max()) <= 1


# ---- pixels ----


def test_all_levels_come_back_exactly(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for i in range(8):
        place = tmp_path / "ramps" / NAMES[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(ramp))
    x, _ = opened(tmp_path / "ramps").images("train")
    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x)[0], torch.from_numpy(ramp).permute(2, 0, 1))


def test_every_kind_of_picture_becomes_rgb_of_the_size(tmp_path):
    red = Image.new("RGB", (50, 30), (255, 0, 0))
    kinds = {
        "grey": red.convert("L"),
        "alpha": red.convert("RGBA"),
        "palette": red.convert("P"),
        "odd": red.resize((17, 301)),
        "small": red.resize((3, 5)),
        "bits": red.convert("1"),
    }
    for folder in NAMES[:2]:
        (tmp_path / "mix" / folder).mkdir(parents=True)
        for name, made in kinds.items():
            made.save(tmp_path / "mix" / folder / f"{name}.png")
    red.save(tmp_path / "mix" / "ant" / "photo.jpg")
    data = opened(tmp_path / "mix")
    x = torch.cat([data.images(split)[0] for split in SPLITS])
    assert x.shape == (13, 3, SIZE, SIZE)
    red_ones = ((x[:, 0] > 0.95) & (x[:, 1:].amax(1) < -0.95)).flatten(1).all(1)
    assert int(red_ones.sum()) == 9, "two of each but grey and bits, and the photo"


def test_turned_photographs_are_set_upright(tmp_path):
    """A camera's EXIF orientation 6: the stored left edge is the top of the scene."""
    scene = np.zeros((SIZE, SIZE, 3), np.uint8)
    scene[: SIZE // 2] = 255
    stored = Image.fromarray(np.rot90(scene).copy())
    tag = Image.Exif()
    tag[0x0112] = 6
    for name in NAMES[:2]:
        (tmp_path / "turned" / name).mkdir(parents=True)
        for i in range(3):
            stored.save(tmp_path / "turned" / name / f"{i}.png", exif=tag)
    x, _ = opened(tmp_path / "turned").images("train", 1)
    assert float(x[0, :, : SIZE // 2].mean()) == 1.0
    assert float(x[0, :, SIZE // 2 :].mean()) == -1.0


# ---- batches ----


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "pets" / "train", range(30))
    return write_images(tmp_path / "pets" / "test", range(30, 36)).parent


def test_batches_and_examples(folder):
    data = opened(folder)
    indices = torch.tensor([5, 0, 5])
    batch = data.batch(indices, torch.Generator())
    assert torch.equal(batch.x, data.images("train")[0][indices])
    assert torch.equal(batch.y, data.images("train")[1][indices])
    assert torch.equal(batch.images, batch.x)
    example = data.examples("test", 4)
    assert torch.equal(example.x, data.images("test")[0][:4])
    assert len(example.y) == 4


def test_half_of_the_images_are_mirrored_and_the_seed_says_which(folder):
    data, plain = opened(folder, augment={"flip": True}), opened(folder)
    indices = torch.arange(27).repeat(44)
    original = plain.batch(indices, torch.Generator()).x
    first, again, other = (data.batch(indices, torch.Generator().manual_seed(s)).x for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    part = data.batch(indices, torch.Generator().manual_seed(0), part=slice(500, 700))
    assert torch.equal(part.x, first[500:700])
    same = (first == original).flatten(1).all(1)
    turned = (first == original.flip(-1)).flatten(1).all(1)
    assert bool((same ^ turned).all()), "every image is there as it is or mirrored left to right"
    assert abs(float(turned.float().mean()) - 0.5) < 4 * 0.5 / 1200**0.5
    assert torch.equal(data.images("train")[0], plain.images("train")[0]), "only training batches are mirrored"


# ---- what is kept ----


def kept_files(tmp_path):
    return sorted((tmp_path / "output" / "runs" / "decoded").glob("*"))


def test_decoded_pixels_are_kept_and_used_again(folder, tmp_path, monkeypatch):
    first = contents(opened(folder))
    assert [path.suffix for path in kept_files(tmp_path)] == [".npy"] * 3
    assert sorted(len(np.load(path)) for path in kept_files(tmp_path)) == [3, 6, 27]

    def never(self, indices):
        raise AssertionError("decoded again")

    monkeypatch.setattr(images.Split, "decode", never)
    assert contents(opened(folder)) == first


def test_batches_cannot_change_what_is_kept(folder):
    data = opened(folder)
    before = contents(data)
    data.images("train")[0].zero_()
    data._splits["train"].pixels(torch.arange(3)).zero_()
    assert contents(data) == before
    assert contents(opened(folder)) == before


def test_another_size_has_its_own_file(folder, tmp_path):
    before = contents(opened(folder))
    small = opened(folder, image_size=8)
    assert small.images("train")[0].shape == (27, 3, 8, 8)
    small.images("test")
    assert len(kept_files(tmp_path)) == 5
    for path in kept_files(tmp_path):
        if path.stem.endswith("-8"):
            path.write_bytes(b"damaged")
    assert contents(opened(folder)) == before
    with pytest.raises(HasteError, match=r"is damaged .* delete it"):
        opened(folder, image_size=8).images("train")


def test_a_kept_file_of_another_shape_is_refused(folder, tmp_path):
    opened(folder).images("train")
    for path in kept_files(tmp_path):
        np.save(path, np.zeros((2, 3, SIZE, SIZE), np.uint8))
    with pytest.raises(HasteError, match=r"holds something else, \(2, 3, 16, 16\)"):
        opened(folder).images("train")


def test_changed_files_are_decoded_anew(tmp_path):
    path = write_parquet(tmp_path / "pets.parquet", range(24))
    before = contents(opened(path))
    write_parquet(path, range(30, 54))
    after = contents(opened(path))
    assert together(after) == list(range(30, 54))
    assert after != before


def test_large_data_give_the_same_batches_and_keep_nothing(folder, tmp_path, monkeypatch):
    small = [batch for stream in [Batches(opened(folder), 7, seed=3)] for batch in [stream.next() for _ in range(9)]]
    expected = contents(opened(folder))
    for path in kept_files(tmp_path):
        path.unlink()
    monkeypatch.setattr(images, "KEPT_DECODED", 0)
    stream = Batches(opened(folder), 7, seed=3)
    for batch in small:
        for one, other in zip(batch, stream.next(), strict=True):
            assert_close(one, other, atol=0, rtol=0)
    assert contents(opened(folder)) == expected
    assert kept_files(tmp_path) == []


# ---- refusals ----


def test_a_path_that_is_not_there_is_refused_at_once(tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "nothing.parquet", "./nothing", "a/b/c"):
        with pytest.raises(HasteError, match="does not exist; possible: a folder"):
            opened(path)


def test_a_hub_name_without_network_is_one_line():
    with pytest.raises(HasteError, match=r"data.path 'nobody/no-such-data' cannot be read: .*; possible: ") as caught:
        opened("nobody/no-such-data")
    assert "\n" not in str(caught.value)


def text_file(tmp_path):
    path = tmp_path / "pets.parquet"
    path.write_text("hello")
    return path


def empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def no_labels(tmp_path):
    path = tmp_path / "pets.parquet"
    pq.write_table(pa.table({"img": [{"bytes": png(picture(0)), "path": "0.png"}]}), path)
    return path


def no_images(tmp_path):
    path = tmp_path / "pets.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), path)
    return path


def no_rows(tmp_path):
    path = write_parquet(tmp_path / "pets.parquet", range(2))
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    return path


REFUSED = {
    "text for parquet": (text_file, "cannot be read: Parquet file size is 5 bytes"),
    "empty folder": (empty_folder, "cannot be read"),
    "no labels": (no_labels, "has columns img; possible: one of images and one of whole numbers"),
    "no images": (no_images, "has columns text, label; possible"),
    "no rows": (no_rows, "cannot be read"),
    "negative label": (lambda t: write_parquet(t / "a.parquet", range(4), labels=[0, -1, 0, 1]), "label -1; possible"),
    "missing label": (lambda t: write_parquet(t / "a.parquet", range(3), labels=[0, None, 1]), "image 1 has no label"),
    "one image": (lambda t: write_parquet(t / "a.parquet", [0]), "data.test_fraction 0.25: 1 image cannot be divided"),
    "two images": (lambda t: write_parquet(t / "a.parquet", [0, 1]), "data.validation_fraction 0.1: 1 image cannot be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unusable_data_are_one_line(tmp_path, what):
    make, message = REFUSED[what]
    with pytest.raises(HasteError, match=message) as caught:
        opened(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("large", [False, True])
def test_an_undecodable_image_is_named_when_it_is_read(folder, monkeypatch, large):
    if large:
        monkeypatch.setattr(images, "KEPT_DECODED", 0)
    (folder / "train" / "bee" / "004.png").write_bytes(b"no image")
    data = opened(folder)
    named = {name: data._splits[name].rows.cast_column("image", datasets.Image(decode=False)) for name in SPLITS}
    split, index = next(
        (name, i)
        for name, rows in named.items()
        for i, row in enumerate(rows["image"])
        if row["path"].endswith("004.png")
    )
    with pytest.raises(HasteError, match=f"image {index} cannot be decoded") as caught:
        data.images(split)
    assert "\n" not in str(caught.value)
    assert len(data.images("test")[1]) == 6
