import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from megamug.data.demo.scenes import (
    COLOURS,
    RADII,
    TIDY_GREYS,
    TIDY_RADII,
    DemoParameters,
    compose,
    make_demo_data,
    read_tidy,
    render,
    scenes,
)
from megamug.data.random import uniform
from megamug.errors import UserError


def some_scenes(count, tidy=False):
    layout = uniform(5, "demo/test/scene", 0, np.arange(count), 48)
    return [(compose(u, tidy), u) for u in layout]


@pytest.mark.parametrize("tidy", [False, True])
def test_captions_say_what_is_in_the_scene(tidy):
    for scene, _ in some_scenes(300, tidy):
        first, second = scene.first, scene.second
        words = scene.caption().split()
        assert sum(word in COLOURS for word in words) == 2 and first.colour != second.colour
        in_order = [first, second] if not scene.dark else [second, first]
        assert [word for word in words if word in COLOURS] == [thing.colour for thing in in_order]
        along, across = (second.x - first.x, second.y - first.y)[:: 1 if scene.horizontal else -1]
        assert along > 0 and abs(across) <= 0.41 * along  # the relation is not a matter of taste
        assert math.hypot(along, across) > first.radius + second.radius
        for thing in (first, second):
            assert min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) >= thing.radius
            if tidy:
                assert thing.radius == TIDY_RADII[thing.size] and thing.angle == 0
            else:
                assert RADII[thing.size][0] <= thing.radius <= RADII[thing.size][1]


def test_pictures_show_the_scene():
    for scene, u in some_scenes(60):
        picture = render(scene, u, np.full((7, 7), 0.5), 72)
        assert picture.shape == (72, 72, 3) and picture.dtype == np.uint8
        for thing in (scene.first, scene.second):
            pixel = picture[int(thing.y * 72), int(thing.x * 72)].astype(int)
            coloured = abs(pixel - COLOURS[thing.colour]).max() < 30
            assert coloured == (thing.shape != "ring"), (thing, pixel)  # through a ring one sees the background
            beside = picture[int(thing.y * 72), int((thing.x + 0.8 * thing.radius) * 72)].astype(int)
            assert abs(beside - COLOURS[thing.colour]).max() < 30, (thing, beside)
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edge.mean() < 125) == scene.dark


def test_tidy_scenes_are_made_of_few_different_cells():
    """A grey one, and one for each size, colour, shape and grey: what a tokenizer of factor 16 makes codes of."""
    cells, things = set(), set()
    for scene, u in some_scenes(1500, tidy=True):
        picture = render(scene, u, np.full((7, 7), 0.5), 32)
        assert (picture[0, 0] == TIDY_GREYS[scene.dark]).all()
        parts = picture.reshape(2, 16, 2, 16, 3).swapaxes(1, 2).reshape(4, -1)
        cells.update(part.tobytes() for part in parts)
        assert sum(len(set(part)) > 1 for part in parts) == 2  # the things; no cell has a part of both
        things.update((thing.words(), scene.dark) for thing in (scene.first, scene.second))
    assert len(things) == 2 * 6 * 3 * 2 and len(cells) == len(things) + 2


def test_a_tidy_picture_is_read_as_its_scene():
    """Through a JPEG too, and a blurred one; what shows no scene is not read as one."""
    for scene, u in some_scenes(150, tidy=True):
        image = Image.fromarray(render(scene, u, np.full((7, 7), 0.5), 32))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=92, subsampling=0)
        for shown in (image, Image.open(file), image.filter(ImageFilter.GaussianBlur(0.7))):
            read = read_tidy(np.asarray(shown))
            assert read is not None and read.caption() == scene.caption()
            assert (read.first.x, read.second.y) == pytest.approx((scene.first.x, scene.second.y))
        pixels = np.array(image)
        assert read_tidy(pixels[::-1, ::-1]).caption() != scene.caption()
        row, column = int(scene.first.y * 2) * 16, int(scene.first.x * 2) * 16
        pixels[row : row + 16, column : column + 16] = TIDY_GREYS[scene.dark]
        assert read_tidy(pixels) is None  # one thing alone


def test_scenes_are_pure_functions_of_their_number():
    whole = scenes(1, "train", 0, 12, 40)
    assert scenes(1, "train", 7, 3, 40) == whole[7:10]
    assert [s[3] for s in scenes(1, "heldout", 0, 12, 40)] != [s[3] for s in whole]
    for _, extension, data, _ in whole:
        assert Image.open(io.BytesIO(data)).format == {"jpg": "JPEG", "png": "PNG"}[extension]


def test_the_same_parameters_give_the_same_bytes(tmp_path):
    parameters = DemoParameters(train=30, heldout=5, seed=3, size=32)
    first = make_demo_data(tmp_path / "a", parameters, processes=1)
    second = make_demo_data(tmp_path / "b", parameters, processes=1)
    assert [p.relative_to(tmp_path / "a").as_posix() for p in first] == [
        "train/train-000000.tar", "heldout/heldout-000000.tar"]  # fmt: skip
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    contents = first[0].read_bytes()
    first[0].unlink()  # as after an interruption
    make_demo_data(tmp_path / "a", parameters, processes=1)
    assert first[0].read_bytes() == contents


def test_other_contents_are_not_touched(tmp_path):
    make_demo_data(tmp_path / "a", DemoParameters(train=2, heldout=2, size=32), processes=1)
    with pytest.raises(UserError, match="other parameters"):
        make_demo_data(tmp_path / "a", DemoParameters(train=3, heldout=2, size=32), processes=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    with pytest.raises(UserError, match="no folder of demo data"):
        make_demo_data(tmp_path / "b", DemoParameters(train=2, heldout=2, size=32), processes=1)
    with pytest.raises(UserError, match="at least 32 pixels"):
        make_demo_data(tmp_path / "c", DemoParameters(size=8))
