"""Labelled images that `datasets` reads: folders, parquet files, what is kept of them and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from haste_core.errors import HasteError
from haste_core.sampling import to_uint8
from haste_core.study import config
from haste_core.study.cli import main
from haste_core.study.data import Batches, check_same, check_unchanged, images, open_dataset
from haste_core.study.images import FolderImages

pytestmark = pytest.mark.usefixtures("caches")
SIZE, NAMES = 16, ("ant", "bee", "cat")
SPLITS = ("train", "validation", "test")


def picture(index, size=SIZE):
    return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def write_images(folder, numbers, size=SIZE, shift=0):
    """Picture i + shift goes to the sub-folder of class i mod 3, as i.png."""
    for i in numbers:
        place = folder / NAMES[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03d}.png").write_bytes(png(picture(i + shift, size)))
    return folder


def write_parquet(path, numbers, image="img", label="label", labels=None):
    """The layout of many hub data sets: an image column of {bytes, path} and one of int64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [{"bytes": png(picture(i)), "path": f"{i}.png"} for i in numbers]
    labels = [i % 3 for i in numbers] if labels is None else labels
    pq.write_table(pa.table({image: contents, label: pa.array(labels, pa.int64())}), path)
    return path


def opened(path, **changes):
    return open_dataset(config.DataSettings(kind="images", path=str(path), **{"image_size": SIZE, **changes}))


def numbers(x, known=60):
    """Names of these pictures; an unknown one is an error."""
    table = {picture(i).tobytes(): i for i in range(known)}
    return [table[pixels.permute(1, 2, 0).numpy().tobytes()] for pixels in to_uint8(x)]


def contents(data):
    """Numbers of the images of each split, after checking their labels."""
    found = {}
    for split in SPLITS:
        x, y = data.images(split)
        found[split] = numbers(x)
        assert y.tolist() == [i % 3 for i in found[split]]
    return found


def together(found, *splits):
    """Numbers of the images of some splits, by default all, ascending."""
    return sorted(i for split in splits or SPLITS for i in found[split])


# ---- sources ----


def test_a_folder_with_train_and_test(tmp_path):
    write_images(tmp_path / "pets" / "train", range(12))
    write_images(tmp_path / "pets" / "validation", range(12, 18))
    data = opened(tmp_path / "pets")
    assert (data.name, data.channels, data.image_size, data.classes, len(data)) == ("pets", 3, SIZE, 3, 10)
    found = contents(data)
    assert together(found, "train", "validation") == list(range(12))
    assert found["test"] == [12, 15, 13, 16, 14, 17], "files in the order of their folders"
    assert contents(opened(tmp_path / "pets", test_split="validation")) == found
    assert contents(opened(tmp_path / "pets", train_split="training")) == found, "another word for the same"
    with pytest.raises(HasteError, match="no split 'big'; expected one of: train, validation"):
        opened(tmp_path / "pets", train_split="big")
    with pytest.raises(HasteError, match="no split 'nothere'; expected one of: train, validation"):
        opened(tmp_path / "pets", test_split="nothere")
    with pytest.raises(HasteError, match="name the same split; expected two of: train, validation"):
        opened(tmp_path / "pets", train_split="val", test_split="val")
    write_images(tmp_path / "pets" / "test", range(18, 24))
    whole = contents(opened(tmp_path / "pets"))
    assert [sorted(whole[split]) for split in SPLITS] == [[*range(12)], [*range(12, 18)], [*range(18, 24)]]


def test_a_folder_without_a_test_split_is_divided(tmp_path):
    folder = write_images(tmp_path / "pets", range(36))
    found = contents(opened(folder))
    assert together(found) == list(range(36))
    assert torch.bincount(torch.tensor(found["test"]) % 3).tolist() == [3, 3, 3]
    assert torch.bincount(torch.tensor(found["validation"]) % 3).tolist() == [1, 1, 1]
    assert contents(opened(folder)) == found
    other = contents(opened(folder, split_seed=1))
    assert all(set(other[split]) != set(found[split]) for split in ("test", "validation"))
    assert len(opened(folder, test_fraction=0.5)) == 16


def test_a_folder_of_parquet_files(tmp_path):
    folder = tmp_path / "pets" / "data"
    write_parquet(folder / "pets-train-00000-of-00002.parquet", range(12))
    write_parquet(folder / "pets-train-00001-of-00002.parquet", range(12, 24))
    write_parquet(folder / "pets-test.parquet", range(24, 30))
    found = contents(opened(folder))
    assert together(found, "train", "validation") == list(range(24))
    assert found["test"] == list(range(24, 30)), "rows keep their order"
    assert contents(opened(folder.parent)) == found, "the clone of a hub data set"


def test_parquet_written_by_datasets_itself(tmp_path):
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=[*NAMES, "dog"])})
    rows = {"picture": [Image.fromarray(picture(i)) for i in range(12)], "label": [i % 3 for i in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pets.parquet")
    data = opened(tmp_path / "pets.parquet")
    assert together(contents(data)) == list(range(12))
    assert (data.name, data.classes) == ("pets.parquet", 4), "a class without images counts"


# ---- no image is lost in silence ----


def write(folder, *names):
    """Images by relative path, each of another content."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(picture(len(list(folder.rglob("*.*"))))))
    return folder


def seen(data):
    """Number of images of all splits by class name."""
    labels = torch.cat([data.images(split)[1] for split in SPLITS])
    names = data._splits["train"].class_names
    return {name: int((labels == i).sum()) for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        # Words of splits in names of files say nothing.
        ([f"{c}/{kind}_{i}.png" for c in NAMES[:2] for kind in ("test", "train", "val", "img") for i in range(5)],
         {"ant": 20, "bee": 20}),
        ([f"{c}/{name}.png" for c in NAMES[:2] for name in ("test_1", *range(29))],
         {"ant": 30, "bee": 30}),
        ([f"{c}/ILSVRC2012_val_{i:04d}.png" for c in NAMES for i in range(4)], dict.fromkeys(NAMES, 4)),
        # Nor do those of class folders, unless all are such words and hold class folders.
        ([f"{c}/{i}.png" for c in ("train", "car", "bus") for i in range(10)], {"bus": 10, "car": 10, "train": 10}),
        ([f"{c}/{i}.png" for c in ("train", "test") for i in range(10)], {"test": 10, "train": 10}),
        ([f"{c}/{i}.png" for c in ("latest", "greatest", "my-test-class", "dev") for i in range(5)],
         {"dev": 5, "greatest": 5, "latest": 5, "my-test-class": 5}),
        ([f"{split}/{c}/{i}.png" for split in ("Train", "VAL") for c in NAMES[:2] for i in range(6)],
         {"ant": 12, "bee": 12}),
        # Nested folders keep their way.
        ([f"{c}/{i}.png" for c in ("animals/cat", "plants/cat", "plants/oak") for i in range(4)],
         {"animals/cat": 4, "plants/cat": 4, "plants/oak": 4}),
        ([f"{c}/{suffix}.{suffix}" for c in NAMES[:2] for suffix in ("png", "PNG", "jpeg", "Jpg", "webp", "bmp")],
         {"ant": 6, "bee": 6}),
    ],
)  # fmt: skip
def test_the_class_of_an_image_is_its_folder(tmp_path, names, classes):
    assert seen(opened(write(tmp_path / "pets", *names))) == classes


def test_what_is_not_read_is_said(tmp_path, capfd):
    folder = write_images(tmp_path / "pets", range(12))
    (folder / "metadata.csv").write_text("file_name,text\nant/000.png,an ant\nbee/001.png,a bee\n")
    (folder / "ant" / "notes.txt").write_text("hello")
    (folder / "ant" / ".DS_Store").write_text("")
    (folder / "bee" / "README").write_text("")
    data = opened(folder)
    assert together(contents(data)) == list(range(12))
    told = "pets: 12 images (8 train, 1 validation, 3 test), 3 classes of 4 to 4 images, 3x16x16; not read: 1 .csv, "
    assert data.summary == told + "1 .txt, 1 hidden, 1 without a suffix"
    assert capfd.readouterr().err.count(data.summary) == 1
    opened(folder)
    assert data.summary not in capfd.readouterr().err, "said once"
    alone = write(tmp_path / "alone", *[f"ant/{i}.png" for i in range(3)])
    assert opened(alone).summary.startswith(
        "alone: 3 images (1 train, 1 validation, 1 test), 1 class of 3 to 3 images,"
    )
    FolderImages(write(tmp_path / "one", "ant/0.png"))
    assert "/one: 1 image\n" in capfd.readouterr().err


def test_links_are_followed_and_bad_ones_named(tmp_path):
    folder = write_images(tmp_path / "pets", range(12))
    (folder / "cat").rename(tmp_path / "elsewhere")
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    assert together(contents(opened(folder))) == list(range(12))
    (folder / "ant" / "again").symlink_to(folder)
    with pytest.raises(HasteError, match=r"/ant/again is a link to a folder that holds it"):
        opened(folder)
    (folder / "ant" / "again").unlink()
    (folder / "bee" / "gone.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(HasteError, match=r"/bee/gone.png is a broken link"):
        opened(folder)
    (folder / "bee" / "gone.png").unlink()
    (folder / "bee" / "itself").symlink_to("itself")
    for read in (opened, FolderImages):
        with pytest.raises(HasteError, match=r"/bee/itself is a broken link"):
            read(folder)
    (folder / "bee" / "itself").unlink()
    os.mkfifo(folder / "bee" / "pipe.png")
    with pytest.raises(HasteError, match=r"/bee/pipe.png is neither of the two; expected a file or a folder"):
        opened(folder)


def test_parquet_is_read_where_a_folder_holds_no_images_of_its_own(tmp_path):
    folder = write_images(tmp_path / "pets", range(12))
    table(folder / "ant" / "vectors.parquet", embedding=[1.0, 2.0])
    write_parquet(folder / "data" / "train.parquet", range(12, 24))
    data = opened(folder)
    assert together(contents(data)) == list(range(12))
    assert data.summary.endswith("; not read: 2 .parquet")
    clone = tmp_path / "clone"
    write_parquet(clone / "data" / "train.PARQUET", range(12, 24))
    write(clone, "logo.png", "assets/figure.jpg", "README.md", "data/old/train.parquet")
    data = opened(clone)
    assert together(contents(data)) == list(range(12, 24))
    assert data.summary.endswith("; not read: 1 .jpg, 1 .md, 1 .parquet, 1 .png")


@pytest.mark.parametrize(
    "names", [["0.png", "1.png"], ["ant/0.png", "2.png"], ["train/ant/0.png", "train/1.png", "0.png"]]
)
def test_images_in_no_class_folder_are_an_error(tmp_path, names):
    with pytest.raises(HasteError, match=r"holds (1 image|[2-9] images) in no class folder \("):
        opened(write(tmp_path / "pets", *names))


def test_files_changed_at_the_same_place_are_read_anew(tmp_path):
    folder = write_images(tmp_path / "pets", range(12))
    before = contents(opened(folder))
    write_images(folder, range(12), shift=12)
    after = contents(opened(folder))
    assert together(after) == list(range(12, 24))
    assert {split: [i + 12 for i in before[split]] for split in SPLITS} == after


def columns(path, **kinds):
    """A parquet file of 24 rows; "picture" stands for image i, other columns are given as a function of i."""
    made = {
        name: [{"bytes": png(picture(i)), "path": f"{i}.png"} for i in range(24)]
        if of == "picture"
        else list(map(of, range(24)))
        for name, of in kinds.items()
    }
    return table(path, **made)


def third(i):
    return i % 3


def test_columns_are_asked_for_where_more_than_one_could_be_meant(tmp_path):
    path = tmp_path / "pets.parquet"
    columns(path, id=int, image="picture", category=third)
    with pytest.raises(HasteError, match=r"there are 2 columns of classes or integers; the columns are: id \(integers, "
                       r"24 distinct values\), image \(images\), category \(integers, 3 distinct values\); expected "
                       r"data.label_column to name a column of labels"):  # fmt: skip
        opened(path)
    assert together(contents(opened(path, label_column="category"))) == list(range(24))
    columns(path, image="picture", width=lambda i: 16, height=lambda i: 16, label_id=third)
    with pytest.raises(HasteError, match=r"width \(integers, 1 distinct value\), height .*, label_id \("):
        opened(path)
    columns(path, first="picture", second="picture", label=third)
    with pytest.raises(HasteError, match=r"are 2 columns of images; .*data.image_column to name a column of images"):
        opened(path)
    assert together(contents(opened(path, image_column="second"))) == list(range(24))
    columns(path, mask="picture", image="picture", id=int, label=third)
    assert together(contents(opened(path))) == list(range(24)), "columns named image and label are meant"
    with pytest.raises(HasteError, match=r"data.label_column=nothing is no column of classes or integers; the columns"):
        opened(path, label_column="nothing")
    columns(path, image="picture", kind=lambda i: NAMES[i % 3])
    with pytest.raises(
        HasteError, match=r"there is no column of classes or integers; .*, kind \(text, 3 distinct values\)"
    ):
        opened(path)
    data = opened(path, label_column="kind")
    assert together(contents(data)) == list(range(24))
    assert data._splits["test"].class_names == [*NAMES]


# ---- pixels ----


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


def test_sixteen_bits_are_scaled_and_pixels_without_a_range_refused(tmp_path):
    levels = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE)
    for name in NAMES[:2]:
        (tmp_path / "deep" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "deep" / name / f"{i}.png")
            Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "deep" / name / f"{i}.pgm")
    for channel in torch.cat([to_uint8(opened(tmp_path / "deep").images(split)[0]) for split in SPLITS]).flatten(0, 1):
        assert np.abs(channel.numpy() - levels / 257).max() <= 0.5
    for kind, mode in ((np.int32, "I"), (np.float32, "F")):
        Image.fromarray(levels.astype(kind)).save(tmp_path / "deep" / "ant" / "1.tif")
        with pytest.raises(HasteError, match=rf"/ant/1.tif cannot be decoded \(pixels of mode {mode}, 32 bits"):
            seen(opened(tmp_path / "deep"))


def test_small_and_long_images_are_said(tmp_path):
    folder = write_images(tmp_path / "pets", range(9))
    assert "looked at" not in opened(folder).summary
    for i, size in enumerate(((3, 3), (5, 200), (200, 8), (20, 90))):
        for name in NAMES:  # so that some are in the training split
            Image.new("RGB", size).save(folder / name / f"odd{i}.png")
    told = opened(folder, test_fraction=0.05, validation_fraction=0.05).summary
    assert "looked at are enlarged to 16 (such as 3x3); " in told
    assert "looked at are cropped to a small part (such as 5x200)" in told


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


def test_half_of_the_images_are_mirrored_and_the_seed_says_which(folder):
    data, plain = opened(folder, augment={"flip": True}), opened(folder)
    indices = torch.arange(27).repeat(44)
    original = plain.batch(indices, torch.Generator()).x
    first, again, other = (data.batch(indices, torch.Generator().manual_seed(s)).x for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    same = (first == original).flatten(1).all(1)
    turned = (first == original.flip(-1)).flatten(1).all(1)
    assert bool((same ^ turned).all()), "every image is there as it is or mirrored left to right"
    assert abs(float(turned.float().mean()) - 0.5) < 4 * 0.5 / 1200**0.5
    assert torch.equal(data.images("train")[0], plain.images("train")[0]), "only training batches are mirrored"


# ---- what is kept ----


def kept_files(tmp_path):
    return sorted((tmp_path / "output" / "runs" / "decoded").glob("*"))


def test_decoded_pixels_are_kept_by_size_and_used_again(folder, tmp_path, monkeypatch):
    data = opened(folder)
    first = contents(data)
    assert sorted(np.load(path).shape for path in kept_files(tmp_path)) == [(n, 3, SIZE, SIZE) for n in (3, 6, 27)]
    data._splits["train"].pixels(torch.arange(3)).zero_()
    assert contents(data) == first, "the file is mapped copy-on-write"
    assert opened(folder, image_size=8).images("train")[0].shape == (27, 3, 8, 8)
    monkeypatch.setattr(images.Split, "decode", lambda self, indices: pytest.fail("decoded again"))
    assert contents(opened(folder)) == first
    damaged, other = [path for path in kept_files(tmp_path) if len(np.load(path, mmap_mode="r")) == 27]
    damaged.write_bytes(b"damaged")
    np.save(other, np.zeros((2, 3, SIZE, SIZE), np.uint8))
    for size in (8, SIZE):
        with pytest.raises(HasteError, match=r"is truncated or damaged .*; expected 27 images .* delete it"):
            opened(folder, image_size=size).images("train")


def test_parquet_that_changed_behind_its_time_and_size_is_read_anew(tmp_path):
    def bmp(i):
        stream = io.BytesIO()
        Image.fromarray(picture(i)).save(stream, format="BMP")
        return {"bytes": stream.getvalue(), "path": ""}

    def changed(first):
        rows = {"img": [bmp(first + i) for i in range(24)], "label": [i % 3 for i in range(24)]}
        pq.write_table(pa.table(rows), tmp_path / "pets.parquet", compression="none", use_dictionary=False,
                       write_statistics=False)  # fmt: skip
        os.utime(tmp_path / "pets.parquet", (0, 0))
        data = opened(tmp_path / "pets.parquet")
        return (tmp_path / "pets.parquet").stat().st_size, data.identity()["content"], together(contents(data))

    (size, content, before), (same_size, other_content, after) = changed(0), changed(30)
    assert size == same_size
    assert content != other_content
    assert (before, after) == (list(range(24)), list(range(30, 54)))


def test_large_data_give_the_same_batches_and_keep_nothing(folder, tmp_path, monkeypatch):
    stream = Batches(opened(folder), 7, seed=3)
    expected = [stream.next() for _ in range(5)]
    for path in kept_files(tmp_path):
        path.unlink()
    monkeypatch.setattr(images, "KEPT_DECODED", 0)
    stream = Batches(opened(folder), 7, seed=3)
    for batch in expected:
        assert all(map(torch.equal, batch, stream.next()))
    assert kept_files(tmp_path) == []


# ---- errors ----


def text_file(path):
    path.write_text("hello")
    return path


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def labelled(path, *labels):
    return write_parquet(path, range(len(labels)), labels=list(labels))


REFUSED = {
    "missing": (lambda path: path, "does not exist; expected a folder"),
    "hub name without network": (lambda path: "nobody/no-such-data", "cannot be read: .*; expected a folder"),
    "text for parquet": (text_file, "cannot be read: Parquet file size is 5 bytes"),
    "empty folder": (lambda path: path.mkdir() or path, "holds no images; expected a folder"),
    "no labels": (lambda path: table(path, img=[{"bytes": png(picture(0)), "path": "0.png"}]),
                  r"is no column of classes or integers; the columns are: img \(images\); expected data.label_column"),
    "no images": (lambda path: table(path, text=["a", "b"], label=[0, 1]),
                  r"is no column of images; the columns are: text \(text, 2 distinct values\), .*; expected data."),
    "text for an image": (lambda path: table(path, img=[{"bytes": b"no" if i == 5 else png(picture(i)), "path": None}
                                                        for i in range(24)], label=[i % 3 for i in range(24)]),
                          "image 5 cannot be decoded"),
    "no rows": (lambda path: pq.write_table(pq.read_table(labelled(path, 0)).slice(0, 0), path) or path,
                "cannot be read"),
    "negative label": (lambda path: labelled(path, 0, -1, 0, 1), "image 1 has label -1; expected"),
    "absurd label": (lambda path: labelled(path, 0, 10**12, 1), "image 1 has label 1000000000000; expected .* 999,999"),
    "missing image": (lambda path: table(path, img=[{"bytes": png(picture(0)), "path": "a"}, None], label=[0, 1]),
                      "image 1 of column 'img' is empty; expected"),
    "empty image": (lambda path: table(path, img=[{"bytes": png(picture(0)), "path": "a"}, {"bytes": None}],
                                        label=[0, 1]), "image 1 of column 'img' is empty; expected"),
    "missing label": (lambda path: labelled(path, 0, None, 1), "image 1 has label None; expected"),
    "one image": (lambda path: labelled(path, 0), "data.test_fraction 0.25: 1 image cannot be divided"),
    "two images": (lambda path: labelled(path, 0, 1), "data.validation_fraction 0.1: 1 image cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_unusable_data_are_an_error_of_one_line(tmp_path, what):
    make, message = REFUSED[what]
    with pytest.raises(HasteError, match=message) as caught:
        contents(opened(make(tmp_path / "pets.parquet")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("large", [False, True])
def test_an_undecodable_image_is_named_when_it_is_read(folder, monkeypatch, large):
    if large:
        monkeypatch.setattr(images, "KEPT_DECODED", 0)
    (folder / "train" / "bee" / "004.png").write_bytes(b"no image")
    data = opened(folder)
    with pytest.raises(
        HasteError, match=r"/train/bee/004.png cannot be decoded .*; mend, shrink or remove it"
    ) as caught:
        contents(data)
    assert "\n" not in str(caught.value)
    assert len(data.images("test")[1]) == 6


def test_an_image_of_too_many_pixels_is_named(folder, monkeypatch):
    (folder / "train" / "bee" / "004.png").write_bytes(png(picture(4, 3 * SIZE)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE**2)
    named = (
        r"/train/bee/004.png cannot be decoded \(Image size \(2304 pixels\) exceeds limit .*; mend, shrink or remove"
    )
    with pytest.raises(HasteError, match=named):
        contents(opened(folder))
    with pytest.raises(HasteError, match=named):
        FolderImages(folder)


# ---- data that change under a run ----


def test_data_that_changed_since_a_run_began_are_refused(tmp_path, capsys):
    folder = write_images(tmp_path / "pets", range(24))
    small = ["teacher.kwargs={img_size: 16, patch_size: 8, in_chans: 3, depth: 2, embed_dim: 16, num_heads: 2}",
             "data={kind: images, image_size: 16, augment: {shift: 0, rotation: 0, scale: 0}}", f"data.path={folder}",
             "teacher.mean=null", "teacher.std=null", "train.batch_size=4", "alignment.layer_pairs=[[1, 1]]",
             "teacher.fitting.augment=null", "teacher.fitting.batch_size=4"]  # fmt: skip
    words = [word for override in small for word in ("--set", override)]

    def act(command, *given, steps=8):
        return main([command, "digits", *given, "--profile", "smoke", *words, "--set", f"train.steps={steps}"])

    def train(steps):
        return act("train", "haste", steps=steps)

    assert train(8) == 0
    write_images(folder, range(24), shift=24)
    capsys.readouterr()
    assert train(12) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "changed since" in line
    assert "24 images in 3 classes before, 24 images in 3 classes now, of other content" in line
    write(folder, "dog/0.png")
    reads = [("evaluate", "haste"), ("sample", "haste", "--out", str(tmp_path / "one.png"), "--n", "1"),
             ("train", "haste", "--dry-run"), ("study", "--dry-run")]  # fmt: skip
    kept = sorted(tmp_path.joinpath("output").rglob("*"))
    for given in reads:
        assert act(*given) == 2
        assert "24 images in 3 classes before, 25 images in 4 classes now" in "".join(capsys.readouterr())
    assert sorted(tmp_path.joinpath("output").rglob("*")) == kept, "nothing is trained on the new images"
    shutil.rmtree(folder / "dog")
    write_images(folder, range(24))
    for path in (folder / "cat").iterdir():
        path.unlink()
    assert train(12) == 2
    assert "24 images in 3 classes before, 16 images in 2 classes now" in capsys.readouterr().err
    write_images(folder, range(24))
    assert train(12) == 0, "the same images written again are the same data"


def test_names_and_sizes_belong_to_the_identity_and_older_ones_are_compared_without(tmp_path):
    folder = write_images(tmp_path / "pets", range(300))
    settings = config.DataSettings(kind="images", path=str(folder), image_size=SIZE)
    check_unchanged(tmp_path, settings, begun=False)
    before = json.loads((tmp_path / "data.json").read_text())

    def check():
        check_same(tmp_path, settings, opened(folder).identity())

    def refuse():
        with pytest.raises(
            HasteError, match=r"300 images in 3 classes now, of other content or names; expected the same"
        ):
            check()

    check()
    one = folder / "ant" / "150.png"
    one.write_bytes(one.read_bytes() + b"longer")
    assert opened(folder).identity()["content"] == before["content"], "not among those that are looked at"
    refuse()
    one.write_bytes(png(picture(150)))
    check()
    (folder / "cat").rename(folder / "dog")
    refuse()
    del before["files"]
    (tmp_path / "data.json").write_text(json.dumps(before))
    check()
    check_unchanged(tmp_path, settings, begun=True)
    assert "files" in json.loads((tmp_path / "data.json").read_text())
