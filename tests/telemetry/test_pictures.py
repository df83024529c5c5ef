"""The grid of pictures: every pixel of an image where it belongs, text that fits."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from megamug.telemetry import pictures
from megamug.telemetry.pictures import MARGIN, PictureRow, draw_grid, save_grid, wrap


def noise(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("size", "factor"), [(64, 3), (100, 2), (224, 1)])
def test_images_stand_in_their_places_enlarged_by_whole_pixels(size, factor):
    rows = [PictureRow([noise(10 * r + c, size) for c in range(3)], ["a line"] * r) for r in range(3)]
    page = np.asarray(draw_grid(rows, ["one", "two", "three"]))
    side = size * factor
    assert page.shape[1] == MARGIN + 3 * (side + MARGIN)
    tops = []
    for row in rows:
        for column, image in enumerate(row.images):
            large = image.repeat(factor, 0).repeat(factor, 1)
            left = MARGIN + column * (side + MARGIN)
            strip = page[:, left : left + side]
            found = [t for t in range(page.shape[0] - side + 1) if np.array_equal(strip[t : t + side], large)]
            assert len(found) == 1
            tops += found
    tops = np.array(tops).reshape(3, 3)
    assert (tops == tops[:, :1]).all()
    line = (tops[2, 0] - tops[1, 0]) - (tops[1, 0] - tops[0, 0])
    assert 14 < line < 30  # one line of text more
    assert page.shape[0] - (tops[2, 0] + side) >= 2 * line
    text = page[tops[1, 0] + side : tops[2, 0]]
    assert (text < 100).all(-1).any() and (page[tops[0, 0] + side : tops[1, 0]] == 255).all()


def test_text_is_cut_to_the_width():
    font = ImageFont.load_default(pictures.TEXT_SIZE)
    text = "a large red ring above a small blue star " + "x" * 200 + " end"
    lines = wrap(text, font, 150)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert lines[0].startswith("a large") and not any(line != line.strip() for line in lines)
    assert wrap("short", font, 150) == ["short"] and wrap("", font, 150) == [""]
    assert wrap("ab", font, 1) == ["a", "b"]


def test_a_picture_is_written_whole(tmp_path):
    path = save_grid([PictureRow([noise(0, 32)], ["ring"])], ["original"], tmp_path / "new" / "grid.png")
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    with Image.open(path) as image:
        assert (image.format, image.mode, image.width) == ("PNG", "RGB", MARGIN + 192 + MARGIN)


def test_a_page_is_as_large_on_a_screen_as_it_can_be(tmp_path):
    """Twelve samples stood below one another: 704 x 3,710 pixels, of which a screen shows a third."""
    rows = [PictureRow([noise(3 * r + c, 224) for c in range(3)], ["a ring", "a star"]) for r in range(12)]
    with Image.open(save_grid(rows, ["original", "visible", "reconstruction"], tmp_path / "grid.png")) as image:
        page = np.asarray(image)
    one = draw_grid(rows, ["original", "visible", "reconstruction"])
    assert page.shape[1] == 3 * one.width and page.shape[0] < 1300 and page.shape[1] / page.shape[0] < 2
    for number, row in enumerate(rows):  # each once, downwards and then across
        left = number // 4 * one.width + MARGIN
        strip = page[:, left : left + 224]
        found = [t for t in range(page.shape[0] - 223) if np.array_equal(strip[t : t + 224], row.images[0])]
        assert len(found) == 1 and abs(found[0] - number % 4 * page.shape[0] / 4) < 60
