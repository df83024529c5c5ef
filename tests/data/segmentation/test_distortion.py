"""Photometric distortion: hue, saturation and value as Python's colorsys has them; what is drawn changes what it is to
change."""

from __future__ import annotations

import colorsys

import numpy as np
import torch

from megamug.data.segmentation.distortion import _one, distorted, hsv, rgb

NOTHING = [1.0, 0.5, 0.0, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5]


def test_hues_are_colorsys_and_come_back():
    image = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3, 40)))
    image[:, :4] = torch.tensor([[0, 255, 7, 255], [0, 255, 7, 0], [0, 255, 7, 0]])
    hue, saturation, value = hsv(image.float())
    for i in range(40):
        expected = colorsys.rgb_to_hsv(*(image[:, i] / 255).tolist())
        found = hue[i] / 360, saturation[i], value[i] / 255
        np.testing.assert_allclose([float(x) for x in found], expected, atol=1e-5)
    torch.testing.assert_close(rgb(hue, saturation, value), image.float(), atol=1e-3, rtol=1e-5)


def test_each_change_is_what_it_is_called():
    image = torch.from_numpy(np.random.RandomState(1).randint(40, 200, (3, 8, 8)).astype(np.uint8))

    def changed(**draws):
        row = list(NOTHING)
        for place, draw in draws.items():
            row[int(place[1:])] = draw
        return _one(image, row).int() - image.int()

    assert not changed().any()
    assert (changed(_0=0.0, _1=1.0) == 32).all() and (changed(_0=0.0, _1=0.0) == -32).all()
    for first in (0.0, 1.0):  # contrast before or behind, alone the same
        assert (changed(_2=first, _3=0.0, _4=0.0) + image.int() == image.int() // 2).all()
    grey = _one(image, [*NOTHING[:5], 0.0, 0.0, 1.0, 0.5])  # half of the saturation
    spread = [(x.amax(0) - x.amin(0)).float() for x in (image.int(), grey.int())]
    assert ((spread[1] - spread[0] / 2).abs() <= 1).all() and torch.equal(grey.amax(0), image.amax(0))
    turned = hsv(_one(image, [*NOTHING[:7], 0.0, 1.0]).float())[0] - hsv(image.float())[0]
    assert ((turned % 360 - 18).abs() < 12).float().mean() > 0.95


def test_it_is_a_function_of_seed_epoch_and_sample():
    images = torch.from_numpy(np.random.RandomState(2).randint(0, 256, (4, 3, 6, 6)).astype(np.uint8))
    all_of_them = distorted(images, 5, np.zeros(4, int), np.arange(4))
    alone = distorted(images[2:3], 5, np.zeros(1, int), np.array([2]))
    assert torch.equal(all_of_them[2:3], alone) and not torch.equal(all_of_them, images)
    assert not torch.equal(all_of_them, distorted(images, 5, np.ones(4, int), np.arange(4)))
