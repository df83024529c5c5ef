"""The generate command: pictures of any size in, a grid and captions out, or a sentence."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from megamug.errors import UserError
from megamug.generation.images import generate_from_images, image_sizes
from tests.data.shards.test_reading import jpeg_claiming
from tests.evaluate.tiny_run import STEP, make_data, make_run, tiny_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("generate"))
    make_run(tiny_config(folder, folder / "run"))
    return folder / "run"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for name, size, mode in [("a.jpg", (50, 40), "RGB"), ("b.png", (33, 60), "RGBA"), ("c.webp", (64, 64), "RGB")]:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8), mode).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_pictures_and_captions(run_dir, photos, capsys):
    figures = generate_from_images(run_dir, [photos, photos / "a.jpg"])
    folder = run_dir / "generate" / f"step-{STEP:08d}"
    names = [str(photos / name) for name in ("a.jpg", "b.png", "c.webp", "a.jpg")]
    assert [entry["image"] for entry in figures["captions"]] == names
    assert all(isinstance(entry["caption"], str) for entry in figures["captions"])
    assert (figures["mask_ratio"], figures["visible_patches"], figures["patches"]) == (0.75, 4, 16)
    assert figures["pictures"] == [str(folder / "pictures-001.png")] and (folder / "pictures-001.png").is_file()
    assert json.loads((folder / "captions.json").read_text()) == figures
    assert str(folder / "captions.json") in capsys.readouterr().err
    again = generate_from_images(run_dir, [photos, photos / "a.jpg"])
    assert again["captions"] == figures["captions"]
    assert again["pictures"] == [str(folder.with_name(f"{folder.name}-2") / "pictures-001.png")]  # both are kept


def test_the_mask_ratio_is_free(run_dir, photos, tmp_path):
    def columns_of(figures):
        page = np.asarray(Image.open(figures["pictures"][0])).astype(int)
        return [page[40 : 40 + 192, 8 + i * 200 : 200 + i * 200] for i in range(3)]

    whole = generate_from_images(run_dir, [photos / "a.jpg"], mask_ratio=0.0, output=tmp_path / "0")
    assert whole["visible_patches"] == 16
    original, visible, painted = columns_of(whole)
    assert np.array_equal(original, visible) and np.array_equal(original, painted)
    most = generate_from_images(run_dir, [photos / "a.jpg"], mask_ratio=0.9, output=tmp_path / "9", top_p=0.9)
    assert most["visible_patches"] == 1
    original, visible, painted = columns_of(most)
    assert 15 / 16 - 0.02 < (visible == 128).all(-1).mean() < 15 / 16 + 0.02
    shown = (original == visible).all(-1)
    assert np.array_equal(painted[shown], original[shown]) and not np.array_equal(painted, original)
    with pytest.raises(UserError, match="of 16 patches 0 stay visible"):
        generate_from_images(run_dir, [photos / "a.jpg"], mask_ratio=0.95, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_many_pictures_fill_several_files(run_dir, photos, tmp_path):
    for i in range(15):
        shutil.copy(photos / "a.jpg", photos / f"d{i:02d}.jpg")
    figures = generate_from_images(run_dir, [photos], output=tmp_path / "out")
    assert [p.rsplit("/", 1)[1] for p in figures["pictures"]] == ["pictures-001.png", "pictures-002.png"]
    assert len(figures["captions"]) == 18


def test_without_a_text_decoder(run_dir, photos, tmp_path):
    config = tiny_config(run_dir.parent, tmp_path / "run", caption_loss_weight=0.0)
    config.model.norm_pix_loss = True
    make_run(config)
    figures = generate_from_images(tmp_path / "run", [photos / "c.webp"])
    assert figures["captions"] == [{"image": str(photos / "c.webp"), "caption": None}]
    assert "the true ones" in figures["note"]


def test_what_is_wrong_is_told(run_dir, photos, tmp_path):
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    (photos / "text.png").write_text("no picture")
    output = tmp_path / "out"
    for name in ("broken.jpg", "text.png"):
        with pytest.raises(UserError, match=f"{name} .* does not decode"):
            generate_from_images(run_dir, [photos / "a.jpg", photos / name], output=output)
    (photos / "claims.jpg").write_bytes(jpeg_claiming((photos / "a.jpg").read_bytes(), 60_000, 60_000))
    with pytest.raises(UserError, match=r"claims.jpg .* pixels"):  # the limits of indexing
        generate_from_images(run_dir, [photos / "claims.jpg"], output=output)
    with pytest.raises(UserError, match="no .jpg.* file in folder"):
        generate_from_images(run_dir, [tmp_path], output=output)
    with pytest.raises(UserError, match="does not exist"):
        generate_from_images(run_dir, [tmp_path / "none.png"], output=output)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        image_sizes([photos])
    with pytest.raises(UserError, match="give --top-p"):
        generate_from_images(run_dir, [photos / "a.jpg"], temperature=0.5, output=output)
    assert not output.exists()
