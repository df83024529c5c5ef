"""Pixels of evaluation: the shorter side, the centre, and what is behind transparency."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megamug.errors import UserError
from megamug.transfer.preprocessing import Preprocessor
from tests.transfer.common import photograph

PREPARE = Preprocessor(32, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))


@pytest.mark.parametrize(("width", "height"), [(60, 36), (36, 60), (36, 36), (20, 31), (33, 500)])
def test_the_centre_of_the_shorter_side(width, height):
    """As it is written: shorter side 32 / 0.875 = 36, the other in proportion, then the middle."""
    data = photograph(width, height)
    shorter = 36
    target = (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)
    picture = Image.open(io.BytesIO(data)).resize(target, Image.Resampling.BICUBIC)
    left, top = round((target[0] - 32) / 2), round((target[1] - 32) / 2)
    expected = np.asarray(picture)[top : top + 32, left : left + 32].transpose(2, 0, 1)
    assert np.array_equal(PREPARE.pixels(data).numpy(), expected)


def test_all_forms_of_one_image_are_the_same(tmp_path):
    data = photograph(50, 40)
    (tmp_path / "a.jpg").write_bytes(data)
    picture = Image.open(io.BytesIO(data))
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    expected = PREPARE(data)
    for image in (picture, tensor, tmp_path / "a.jpg", str(tmp_path / "a.jpg")):
        assert torch.equal(PREPARE(image), expected)
    batch = PREPARE([data, picture])
    assert batch.shape == (2, 3, 32, 32) and torch.equal(batch[1:], expected)
    plain = PREPARE.pixels(data).double() / 255
    by_hand = torch.stack([(plain[0] - 0.5) / 0.5, (plain[1] - 0.25) / 0.25, plain[2]])
    assert (expected[0] - by_hand).abs().max() < 1e-6


def test_transparency_is_over_the_background():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    file = io.BytesIO()
    clear.save(file, "PNG")
    for image in (clear, file.getvalue()):
        assert (PREPARE.pixels(image) == 255).all()
    blue = Preprocessor(32, (0, 0, 0), (1, 1, 1), background=(0, 0, 255))
    assert blue.pixels(clear)[:, 0, 0].tolist() == [0, 0, 255]
    assert PREPARE.pixels(Image.new("L", (40, 40), 7)).unique().tolist() == [7]


def test_16_bit_grey_is_scaled():
    """Pillow's own conversion makes white of all but the darkest."""
    grey = np.linspace(0, 65535, 36 * 36).reshape(36, 36).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    expected = PREPARE.pixels(Image.fromarray((grey >> 8).astype(np.uint8)))
    assert 100 < expected.unique().numel()
    for image in (file.getvalue(), Image.fromarray(grey)):
        assert torch.equal(PREPARE.pixels(image), expected)


def test_orientation_of_files_is_applied():
    picture = Image.new("RGB", (36, 36))
    picture.paste((255, 255, 255), (0, 0, 36, 18))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    pixels = PREPARE.pixels(file.getvalue())
    assert pixels[:, :, :10].min() < 10 and pixels[:, :, -10:].min() > 245


@pytest.mark.parametrize(("image", "match"), [
    (b"no picture", "an image cannot be read"), ("/nowhere/a.jpg", "/nowhere/a.jpg cannot be read"),
    (3, "not int"), ([], "an empty list"), (Image.new("F", (40, 40)), "floating-point"),
    (torch.zeros(3, 4, 4), "uint8"), (photograph(50, 40)[:200], "an image cannot be read"),
])  # fmt: skip
def test_what_is_no_image_is_told(image, match):
    with pytest.raises(UserError, match=match):
        PREPARE(image)
