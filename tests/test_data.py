from __future__ import annotations

import hashlib
import math
import threading

import pytest
import torch
from torch.testing import assert_close

from haste_core.errors import HasteError
from haste_core.study import config
from haste_core.study.data import Batches, open_dataset
from haste_core.study.data.base import affine, split_indices
from haste_core.training import Batch

SPLITS = ("train", "validation", "test")
STRONG = config.Augment(shift=1.0, rotation=20, scale=0.2)


def digits(**changes):
    return open_dataset(config.Data(**changes))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(images):
    return {tuple(row) for row in images.flatten(1).tolist()}


def test_split_is_complete_disjoint_and_fixed():
    first, again, other = digits(), digits(), digits(split_seed=1)
    sizes = {split: len(first.images(split)[1]) for split in SPLITS}
    assert sizes == {"train": 1212, "validation": 135, "test": 450}
    assert len(first) == 1212
    pixels = [rows(first.images(split)[0]) for split in SPLITS]
    assert len(set.union(*pixels)) == sum(len(part) for part in pixels)
    for split in SPLITS:
        assert torch.equal(first.images(split)[0], again.images(split)[0])
        assert torch.equal(first.images(split)[1], again.images(split)[1])
        assert not torch.equal(first.images(split)[0][:100], other.images(split)[0][:100])


def test_the_test_images_do_not_depend_on_how_the_others_are_divided():
    few, many = (digits(validation_fraction=fraction).images("test") for fraction in (0.1, 0.5))
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[1], many[1])
    # SHA-256 over pixels and labels: the images that committed scores are of.
    found = hashlib.sha256(few[0].numpy().tobytes() + few[1].numpy().tobytes()).hexdigest()
    assert found == "f31afdd644c7ac78ba7b9c34816d71f802933b17f64ee1c7fe708cdc059310e0"


def test_splits_are_stratified():
    data = digits()
    counts = {split: torch.bincount(data.images(split)[1], minlength=10) for split in SPLITS}
    rest = counts["train"] + counts["validation"]
    assert (counts["test"] - (rest + counts["test"]) * 0.25).abs().max() <= 1
    assert (counts["validation"] - rest * 0.1).abs().max() <= 1


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_indices_of_splits_are_disjoint_and_complete_for_few_images_too(n):
    labels = torch.arange(n) % 3
    fractions = {"test_fraction": 0.25, "validation_fraction": 0.1}
    if n < 3:
        with pytest.raises(HasteError, match=r"the data, data.validation_fraction 0.1: 1 image cannot be divided"):
            split_indices(labels, config.Data(**fractions), "the data")
        return
    found = split_indices(labels, config.Data(**fractions), "the data")
    assert list(found) == list(SPLITS)
    assert sorted(torch.cat(list(found.values())).tolist()) == list(range(n))
    assert all(len(part) > 0 for part in found.values())


def test_a_fraction_that_leaves_nothing_is_an_error():
    with pytest.raises(HasteError, match=r"validation_fraction 0.999: 7 images cannot be divided.*smaller fraction"):
        split_indices(torch.zeros(10).long(), config.Data(validation_fraction=0.999), "the data")


def test_images_are_17_grey_levels_from_minus_one_to_one():
    x, y = digits().images("train")
    assert x.shape == (1212, 1, 8, 8)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.unique().tolist() == [level / 8 - 1 for level in range(17)]


def test_augmented_batches_stay_in_range_and_carry_their_labels():
    data = digits(augment=STRONG)
    indices = torch.arange(200)
    batch = data.batch(indices, generator())
    assert torch.equal(batch.y, data.images("train")[1][:200])
    assert torch.equal(batch.x, batch.images)
    assert float(batch.x.min()) >= -1 - 1e-6
    assert float(batch.x.max()) <= 1 + 1e-6
    assert not torch.allclose(batch.x, data.images("train")[0][:200], atol=0.1)


@pytest.mark.parametrize("flip", [False, True])
def test_parts_of_a_batch_make_up_the_whole_and_leave_the_stream_alike(flip):
    data, indices = digits(augment=STRONG.model_copy(update={"flip": flip})), torch.arange(30)
    streams = [generator() for _ in range(4)]
    whole, *parts = (
        data.batch(indices, stream, part=part)
        for stream, part in zip(streams, [slice(None), *(slice(i, i + 10) for i in (0, 10, 20))], strict=True)
    )
    assert_close(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
    assert all(torch.equal(stream.get_state(), streams[0].get_state()) for stream in streams)


def test_augmentation_is_the_identity_at_zero():
    x = digits().images("train")[0][:50]
    assert_close(affine(x, config.Augment(), generator()), x, atol=1e-5, rtol=0)


def test_augmentation_comes_from_its_generator_and_differs_per_image():
    x = digits().images("train")[0][:1].expand(8, -1, -1, -1)
    first, again, other = (affine(x, STRONG, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(rows(first)) == 8


@pytest.mark.parametrize("setting", [{"shift": 2.0}, {"rotation": 40.0}, {"scale": 0.5}], ids=str)
def test_augmentation_moves_mass_by_what_it_is_asked_for(setting):
    """A bright blob off the centre: where it lands tells shift (pixels), angle and scale of the map."""
    lines = torch.arange(33).float() - 16
    blob = torch.exp(-((lines[None] - 6) ** 2 + lines[:, None] ** 2) / 8)  # six pixels right of the centre
    x = (2 * blob - 1).expand(400, 1, 33, 33)
    mass = affine(x, config.Augment(**setting), generator()) + 1
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

    name, image_size, channels, classes = "counting", 1, 1, 10

    def __len__(self):
        return 10

    def batch(self, indices, generator, with_images=True, part=slice(None)):
        noise = torch.rand(len(indices), 1, 1, 1, generator=generator)[part]
        return Batch(noise, indices[part], noise)


def test_every_image_comes_once_per_pass_in_a_new_order():
    stream = Batches(Counting(), 5, seed=0)
    passes = [torch.cat([stream.next().y, stream.next().y]).tolist() for _ in range(3)]
    assert all(sorted(seen) == list(range(10)) for seen in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_short_last_batch_is_left_out():
    stream = Batches(Counting(), 4, seed=0)
    for _ in range(5):
        seen = torch.cat([stream.next().y, stream.next().y]).tolist()
        assert len(set(seen)) == 8


def test_streams_come_from_their_seed():
    first, again, other = (Batches(Counting(), 4, seed=seed) for seed in (3, 3, 4))
    drawn = [[stream.next() for _ in range(6)] for stream in (first, again, other)]
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not all(torch.equal(a.y, b.y) for a, b in zip(drawn[0], drawn[2], strict=True))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("before", [0, 1, 7, 11])
def test_a_stream_goes_on_from_its_state_to_the_bit(before, ahead):
    """1,212 images in batches of 200: six batches a pass, so 7 and 11 lie in the second pass."""
    data = digits(augment=STRONG)
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


def test_a_batch_knows_which_images_it_holds():
    stream = Batches(Counting(), 4, seed=0, part=slice(1, 3))
    for _ in range(3):
        batch = stream.next()
        assert batch.indices.tolist() == batch.y.tolist()
        assert len(batch.indices) == 2


class Waiting(Counting):
    """Tells when it is asked for a batch, and gives none before it may."""

    def __init__(self):
        self.asked, self.may = threading.Semaphore(0), threading.Semaphore(1)

    def batch(self, *given):
        self.asked.release()
        assert self.may.acquire(timeout=20)
        return super().batch(*given)


def test_the_next_batch_is_read_while_the_one_before_is_used():
    data = Waiting()
    stream = Batches(data, 4, seed=0, ahead=True)
    stream.next()
    assert data.asked.acquire(timeout=20)
    assert data.asked.acquire(timeout=20)  # the second, which nobody has asked the stream for
    data.may.release(2)
    assert len(stream.next().y) == 4


def test_what_cannot_be_read_ahead_is_an_error_of_the_batch_it_belongs_to():
    class Broken(Counting):
        read = 0

        def batch(self, *given):
            self.read += 1
            if self.read == 3:
                raise HasteError("image 7 cannot be read")
            return super().batch(*given)

    stream = Batches(Broken(), 4, seed=0, ahead=True)
    stream.next(), stream.next()
    with pytest.raises(HasteError, match="image 7"):
        stream.next()


def test_a_batch_larger_than_the_data_is_refused():
    Batches(Counting(), 10, seed=0)
    with pytest.raises(HasteError, match="11 exceeds the 10 training images"):
        Batches(Counting(), 11, seed=0)
