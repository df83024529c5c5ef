"""What is drawn to mix images and to leave parts of layers out: pure functions of the sample, of the right laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megamug.data.pairs.mixing import erased_boxes, erasing_noise, kept_shares, path_scales
from megamug.data.random import uniform

MANY = np.arange(4000)


@pytest.mark.parametrize("draw", [
    lambda epochs, indices: kept_shares(1, epochs, indices, 16, 0.8, 1.0),
    lambda epochs, indices: path_scales(1, epochs, indices, 3, 0.5).transpose(2, 0, 1, 3),
])  # fmt: skip
def test_draws_are_a_pure_function_of_each_sample(draw):
    indices, epochs = np.array([5, 2**40 + 5, 7, 5, 8, 9]), np.array([0, 0, 3, 1, 0, 0])
    together = draw(epochs, indices)
    for row in range(6):
        assert np.array_equal(together[row], draw(epochs[row : row + 1], indices[row : row + 1])[0])
    assert len({row.tobytes() for row in together}) > 3


def test_mixup_is_a_number_of_its_beta_distribution():
    kept = kept_shares(3, np.zeros_like(MANY), MANY, 4, 0.8, 0.0)
    assert kept.shape == (4000, 4, 4) and (kept == kept[:, :1, :1]).all()
    shares = kept[:, 0, 0]
    assert abs(shares.mean() - 0.5) < 0.02
    assert abs(shares.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.005  # of Beta(a, a): 1 / (4 (2 a + 1))


def test_cutmix_cuts_one_box_out():
    kept = kept_shares(3, np.zeros_like(MANY), MANY, 32, 0.0, 1.0)
    assert set(np.unique(kept)) == {0.0, 1.0}
    for one in kept[:200]:
        rows, columns = (np.flatnonzero((one == 0).any(axis=axis)) for axis in (1, 0))
        assert (one == 0).sum() == len(rows) * len(columns)
        assert all(len(found) == 0 or np.ptp(found) == len(found) - 1 for found in (rows, columns))
    # A box with the side s sqrt(u), u uniform, centred anywhere: of each axis it covers on average r - r^2 / 4, r its
    # share, so of both together the mean of (r - r^2 / 4)^2 over r^2 = u: 1/2 - 1/5 + 1/48.
    assert abs(1 - kept.mean() - (1 / 2 - 1 / 5 + 1 / 48)) < 0.02


def test_with_both_each_image_takes_one():
    kept = kept_shares(3, np.zeros_like(MANY), MANY, 32, 0.8, 1.0)
    boxes = np.array([(one == 0).any() for one in kept])
    assert 0.45 < boxes.mean() < 0.52  # of the boxes a few are smaller than a pixel


def test_parts_are_left_out_more_often_with_depth():
    scales = path_scales(3, np.zeros_like(MANY), MANY, 3, 0.4)
    assert scales.shape == (3, 2, 4000, 1) and scales.dtype == np.float32
    for layer, rate in enumerate((0.0, 0.2, 0.4)):
        for part in scales[layer]:
            assert set(np.unique(part)) <= {np.float32(0), np.float32(1 / (1 - rate))}
            assert abs((part == 0).mean() - rate) < 0.03 and abs(part.mean() - 1) < 0.05
    assert path_scales(3, np.zeros(1), np.zeros(1), 1, 0.4).max() == 1  # one layer: the first, which is never left out


def test_erased_boxes_are_those_of_timms_ranges():
    """Against a loop that reads the same draws one after another, as timm's does."""
    epochs, indices, size, chance = np.arange(400) % 2, np.arange(400), 64, 0.25
    boxes = erased_boxes(3, epochs, indices, size, chance)
    draws = uniform(3, "erasing", epochs, indices, 41)
    for row in range(400):
        expected, tried = (0, 0, 0, 0), draws[row, 1:].reshape(4, 10).T
        for share, ratio, top, left in tried if draws[row, 0] < chance else ():
            target, aspect = (0.02 + share * (1 / 3 - 0.02)) * size * size, math.exp(math.log(0.3) * (1 - 2 * ratio))
            height, width = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if height < size and width < size:
                expected = int(top * (size - height + 1)), int(left * (size - width + 1)), height, width
                break
        assert tuple(boxes[row]) == expected
    erased = boxes[boxes[:, 2] > 0]
    assert 0.18 < len(erased) / 400 < 0.32
    assert (erased[:, 0] + erased[:, 2] <= size).all() and (erased[:, 1] + erased[:, 3] <= size).all()
    areas = erased[:, 2] * erased[:, 3] / size**2
    assert 0.015 < areas.min() and areas.max() < 0.35
    assert not erased_boxes(3, epochs, indices, size, 0.0).any()
    noise = erasing_noise(3, 1, 7, 40, 50)
    assert noise.shape == (3, 40, 50) and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert np.array_equal(noise, erasing_noise(3, 1, 7, 40, 50))
    assert not np.array_equal(noise, erasing_noise(3, 1, 8, 40, 50))
