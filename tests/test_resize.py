"""Cropping and resizing, against a derivation that knows nothing of Pillow's calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from haste_core.study.data.resize import center_crop, to_signed, to_tensor
from PIL import Image

from haste_core.sampling import to_uint8


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def flat(width, height, colour=(10, 200, 77)):
    return Image.new("RGB", (width, height), colour)


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


@pytest.mark.parametrize("size", [8, 32, 33])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 200), (31, 32), (64, 64), (65, 127), (500, 37), (257, 129)])
def test_any_image_becomes_a_square_of_the_size(width, height, size):
    assert center_crop(noise(width, height), size).size == (size, size)
    assert center_crop(noise(width, height), size).mode == "RGB"


@pytest.mark.parametrize("size", [1, 8, 32])
def test_an_image_of_the_size_stays_as_it_is(size):
    image = noise(size, size)
    assert center_crop(image, size).tobytes() == image.tobytes()


@pytest.mark.parametrize(("width", "height"), [(16, 40), (40, 16), (17, 16)])
def test_where_the_short_side_fits_only_the_middle_is_cut_out(width, height):
    pixels = np.asarray(noise(width, height))
    top, left = (height - 16) // 2, (width - 16) // 2
    assert np.array_equal(center_crop(noise(width, height), 16), pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize(
    ("width", "height", "size"), [(32, 32, 16), (64, 96, 16), (40, 40, 16), (12, 20, 16), (96, 80, 20)]
)
def test_box_and_bicubic_steps_give_the_derived_pixels(width, height, size):
    image = noise(width, height)
    difference = np.abs(np.asarray(center_crop(image, size)).astype(float) - derived(np.asarray(image), size))
    assert difference.max() <= 1, "fixed-point weights may move a pixel by one level"
    assert difference.mean() < 0.05


def test_exactly_twice_the_size_is_one_box_step():
    pixels = np.asarray(noise(64, 64)).astype(float)
    blocks = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(noise(64, 64), 32)) - blocks).max() <= 1  # rounded twice


def test_just_below_twice_the_size_there_is_no_box_step():
    image = noise(63, 63)
    bicubic = image.resize((32, 32), Image.Resampling.BICUBIC)
    assert center_crop(image, 32).tobytes() == bicubic.tobytes()


def test_colour_and_centre_are_kept():
    image = flat(150, 120, (0, 0, 0))
    image.paste((255, 0, 0), (55, 40, 95, 80))  # a square around the middle (75, 60); 40 columns leave 4 on each side
    found = np.asarray(center_crop(image, 32))[..., 0].astype(float)
    lines = np.arange(32) - 15.5
    assert abs((found * lines[None]).sum() / found.sum()) < 0.02
    assert abs((found * lines[:, None]).sum() / found.sum()) < 0.02
    assert np.unique(np.asarray(center_crop(flat(77, 150), 32)).reshape(-1, 3), axis=0).tolist() == [[10, 200, 77]]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode):
    image = flat(40, 50, (255, 255, 255)).convert(mode)
    found = np.asarray(center_crop(image, 16))
    assert found.shape == (16, 16, 3)
    assert found.min() >= 254


def test_all_levels_survive_the_way_to_signed_numbers_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    signed = to_signed(pixels)
    assert (signed.min().item(), signed.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(signed), pixels)


def test_tensors_are_channels_first():
    image = flat(4, 6, (1, 2, 3))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 6, 4)
    assert tensor[:, 0, 0].tolist() == [1, 2, 3]
