"""Scaled crops: sizes, places and choice against what they are to be; the map lies over the image after all of it."""

from __future__ import annotations

import numpy as np
import pytest

from megamug.data.segmentation.crops import TRIES, placed, scaled_crops, varied, without_zero

WIDTHS, HEIGHTS = np.array([683, 512, 100, 4000]), np.array([512, 683, 130, 500])


def crops(seed: int = 1, count: int = 50, size: int = 512, scale=(0.5, 2.0)):
    """[count, 4 images, TRIES, 6] over epochs."""
    which = np.arange(4)
    return np.stack([scaled_crops(seed, np.full(4, e), which, WIDTHS, HEIGHTS, size, scale) for e in range(count)])


def test_regions_are_windows_of_the_resized_image():
    found = crops()
    top, left, height, width, rows, columns = np.moveaxis(found, -1, 0)
    sides = {"rows": (HEIGHTS, top, height, rows), "columns": (WIDTHS, left, width, columns)}
    for extent, start, length, target in sides.values():
        extent = extent[None, :, None]
        assert (start >= 0).all() and (length >= 1).all() and (start + length <= extent).all()
        assert ((target == 512) | (length == extent)).all() and (target <= 512).all()  # padding only where all is seen
    factor = np.maximum(rows / height, columns / width)
    shorter = factor * np.minimum(WIDTHS, HEIGHTS)[None, :, None] / 512
    assert shorter[:, :3].min() > 0.49 and shorter[:, :3].max() < 2.01  # the scale that was asked for
    assert shorter[:, :3].min() < 0.6 and shorter[:, :3].max() > 1.9
    assert shorter[:, 3].max() < 2.01 * 4 * 500 / 4000  # of the long one the longer side is 4 x 512 at scale 1
    # both sides of an image are scaled alike, to half a pixel of a region and of what it becomes
    assert (abs(rows / height - columns / width) <= (factor + 1) * (0.5 / height + 0.5 / width)).all()
    assert (found[:, :, :, 2:] == found[:, :, :1, 2:]).all() and len(np.unique(top[:, 0])) > 50


def test_they_are_a_function_of_seed_epoch_and_sample():
    one = scaled_crops(1, np.full(2, 3), np.array([2, 0]), WIDTHS[[2, 0]], HEIGHTS[[2, 0]], 512)
    assert (one == crops(count=4)[3, [2, 0]]).all()
    assert not (one == crops(seed=2, count=4)[3, [2, 0]]).all()


def test_a_crop_of_nearly_one_class_is_drawn_again():
    values = np.zeros((20, 40), np.uint8)
    values[:, 30:35], values[:, 35:] = 1, 255
    some = np.array([[0, left, 20, 10, 10, 10] for left in (0, 10, 23, 27, 30, 0)])
    assert varied(values, some, 0.71)[1] == 23  # 7 columns of 10 are 0
    assert varied(values, some, 0.69)[1] == 27  # 5 of 8 that have a class are 1
    assert varied(values, some, 1.0)[1] == 0
    assert varied(np.zeros((20, 40), np.uint8), some, 0.75)[1] == 0 and len(some) - 1 == 5  # the last one
    assert TRIES == 11


@pytest.mark.parametrize("flip", [False, True])
def test_a_map_is_resized_to_the_nearest_pixel_and_padded(flip):
    from PIL import Image

    values = np.random.RandomState(0).randint(0, 9, (30, 40)).astype(np.uint8)
    found = placed(values, np.array([3, 5, 20, 30, 8, 12]), flip, 16)
    expected = Image.fromarray(values[3:23, 5:35]).resize((12, 8), Image.Resampling.NEAREST)
    expected = np.asarray(expected)[:, ::-1] if flip else np.asarray(expected)
    assert (found[:8, :12] == expected).all() and (found[8:] == 255).all() and (found[:, 12:] == 255).all()


def test_zero_becomes_no_class():
    assert without_zero(np.array([[0, 1, 150, 254, 255]], np.uint8)).tolist() == [[255, 0, 149, 253, 255]]
