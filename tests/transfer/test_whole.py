"""`megamug.load`: what the command writes, to the token and the bit; nothing left behind; mistakes in a sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import megamug
from megamug import cli
from megamug.checkpoint.store import CheckpointStore
from megamug.errors import UserError
from megamug.generation.images import generate_from_images
from tests.distributed.launch import environment
from tests.evaluate.tiny_run import STEP, make_data, make_run, tiny_config
from tests.generation import language_run

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`run` of a MUG, `mae` without captions, `jam`, and five photos, more than a micro-batch."""
    folder = tmp_path_factory.mktemp("whole")
    make_data(folder)
    make_run(tiny_config(folder, folder / "run"))
    make_run(tiny_config(folder, folder / "mae", caption_loss_weight=0.0))
    (folder / "language").mkdir()
    language_run.make_data(folder / "language")
    language_run.make_run("jam", folder / "language")
    rng = np.random.default_rng(1)
    (folder / "photos").mkdir()
    for i, (width, height) in enumerate([(50, 40), (33, 60), (64, 64), (40, 44), (36, 35)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(folder):
    return sorted((folder / "photos").iterdir())


@pytest.fixture(scope="module")
def mug(folder):
    return megamug.load(folder / "run")


@pytest.mark.parametrize("drawn", [{}, {"top_p": 0.9, "temperature": 1.5}])
@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_captions_are_those_of_the_command(folder, photos, mug, tmp_path, ratio, drawn):
    figures = generate_from_images(folder / "run", photos, mask_ratio=ratio, output=tmp_path, **drawn)
    assert mug.caption(photos, mask_ratio=ratio, **drawn) == [entry["caption"] for entry in figures["captions"]]
    assert ratio or mug.caption(photos, **drawn) == mug.caption(photos, mask_ratio=0.0, **drawn)  # seen whole
    if drawn:
        assert mug.caption(photos, seed=mug.config.seed, **drawn) == mug.caption(photos, **drawn)
        assert mug.caption(photos, seed=77, **drawn) != mug.caption(photos, **drawn)


def test_pictures_are_those_of_the_command(folder, photos, mug, tmp_path):
    """The third column of the command's page is each picture, six times as large."""
    figures = generate_from_images(folder / "run", photos[:1], output=tmp_path)
    page = np.asarray(Image.open(figures["pictures"][0]).convert("RGB"))
    left = 8 + 2 * 200
    (painted,) = mug.reconstruct(photos[0])
    top = next(row for row in range(60) if np.ptp(page[row, left : left + 192]) > 0 and row > 20)
    assert painted.size == (32, 32)
    assert any(
        np.array_equal(np.asarray(painted), page[first : first + 192 : 6, left : left + 192 : 6])
        for first in range(top - 6, top + 20)
    )
    (whole,) = mug.reconstruct(photos[0], mask_ratio=0)
    other = np.asarray(whole) != np.asarray(painted)
    assert 0.5 < other.any(-1).mean() <= 0.76  # the visible quarter is the picture's own
    assert mug.reconstruct(photos)[0].tobytes() == painted.tobytes()


def test_images_of_every_form_are_one(photos, mug):
    opened = Image.open(photos[0])
    pixels = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
    forms = [photos[0], str(photos[0]), photos[0].read_bytes(), opened, pixels]
    assert len({text for form in forms for text in mug.caption(form, mask_ratio=0.0)}) == 1
    for wrong, said in [(pixels.float(), "uint8"), (3, "not int"), ("/absent.png", "does not exist"), ([], "empty"),
                        (b"no picture", "image 0 .* does not decode")]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            mug.caption(wrong)


def test_the_encoder_is_that_of_load_encoder(folder, photos, mug):
    own = megamug.load_encoder(folder / "run")
    images = own.preprocess(photos)
    assert torch.equal(mug.encoder(images).mean, own(images).mean) and mug.encoder is mug.encoder


@pytest.mark.parametrize("options", [
    {"max_tokens": 30, "samples": 2, "seed": 4, "guidance": 2.0, "image": True},
    {"max_tokens": 12, "temperature": 0.0, "max_images": 0},
])  # fmt: skip
def test_documents_are_those_of_the_command(folder, photos, tmp_path, capsys, options):
    model = megamug.load(folder / "language" / "jam")
    image = photos[0] if options.pop("image", False) else None
    prompts = [f"{PROMPT} <break>", "a blue square <break>"] if image else [PROMPT]
    written = model.generate(prompts, image=image, **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--image", str(image)] if image else []
    words += ["--output", str(tmp_path), "--prompt", *prompts]
    assert cli.main(["generate", str(folder / "language" / "jam"), *words]) == 0
    documents = json.loads(capsys.readouterr().out)["documents"]
    assert len(written) == len(documents) == options.get("samples", 1) * len(prompts)
    for one, other in zip(written, documents, strict=True):
        assert one.tokens == other["tokens"] and one.ended == other["ended"]
        assert len(one.segments) == len(other["segments"])
        for segment, told in zip(one.segments, other["segments"], strict=True):
            if "text" in told:
                assert segment == told["text"]
            else:
                assert segment.tobytes() == Image.open(tmp_path / told["image"]).tobytes()
        assert one.text == "\n".join(s["text"] for s in other["segments"] if "text" in s)
        assert one.written == "\n".join(
            s["text"][s["given"] :] for s in other["segments"] if s.get("text", "")[s.get("given", 0) :]
        )
    assert image is None or len(written[0].images) == 2  # the one before the prompt, and the one asked for


def test_precision_and_checkpoints(folder, photos, mug):
    half = megamug.load(folder / "run", dtype=torch.bfloat16)
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16} and half.caption(photos)
    assert half.encoder.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert not mug.module.training and not any(p.requires_grad for p in mug.module.parameters())
    same = megamug.load(CheckpointStore(folder / "run", keep=0).path(STEP))
    assert same.step == mug.step == STEP and same.caption(photos) == mug.caption(photos)
    assert "LoadedMug" in repr(mug) and f"step={STEP}" in repr(mug)


def test_nothing_is_left_behind(folder, photos, mug):
    before = torch.get_rng_state()
    megamug.load(folder / "run").caption(photos[0])
    assert not torch.distributed.is_initialized() and torch.equal(before, torch.get_rng_state())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert mug.caption(photos) and torch.distributed.is_initialized()  # the caller's own stays
        with pytest.raises(UserError, match="has a process group"):
            megamug.load(folder / "run")
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_wrong_is_told(folder, photos, mug, tmp_path, monkeypatch):
    def refused(match, path, **options):
        with pytest.raises(UserError, match=match):
            megamug.load(path, **options)

    refused("no such folder", tmp_path / "absent")
    refused("is not a run folder.*megamug.load_encoder", tmp_path)
    refused("no checkpoint of step 5", folder / "run", step=5)
    refused("is a checkpoint already", CheckpointStore(folder / "run", keep=0).path(STEP), step=5)
    refused("dtype is torch.float16", folder / "run", dtype=torch.float16)
    config = tiny_config(folder, tmp_path / "classifier")
    config.model.kind = "classifier"
    config.classifier.classes = 3
    from megamug.configuration.reading import save_config

    save_config(config)
    refused("model.kind=classifier, which writes nothing", tmp_path / "classifier")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("WORLD_SIZE is 2", folder / "run")
    monkeypatch.delenv("WORLD_SIZE")
    mae = megamug.load(folder / "mae")
    with pytest.raises(UserError, match="caption_loss_weight=0, so it has no text decoder"):
        mae.caption(photos)
    assert mae.reconstruct(photos[0])[0].size == (32, 32)
    make_run(tiny_config(folder, tmp_path / "masked", text_objective="masked"))
    with pytest.raises(UserError, match="text_objective=masked: its text decoder fills in"):
        megamug.load(tmp_path / "masked").caption(photos)
    for options, said in [
        ({"top_p": 0.0}, "top_p is 0; it must be above 0"), ({"temperature": 2.0}, "give top_p"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1"), ({"mask_ratio": 0.97}, "0 stay visible"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            mug.caption(photos, **options)
    jam = megamug.load(folder / "language" / "jam")
    for options, said in [
        ({"samples": 0}, "samples is 0"), ({"prompt": []}, "empty list of prompts"),
        ({"guidance": 2.0}, "the prompt has no text"), ({"max_tokens": 90000}, "tokens"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            jam.generate(**options)


def test_the_example_of_the_page_runs_and_says_nothing_else(folder, photos, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "vit_s16").symlink_to(folder / "run")
    (tmp_path / "runs" / "jam").symlink_to(folder / "language" / "jam")
    for name in ("cat.jpg", "dog.png"):
        Image.open(photos[0]).save(tmp_path / name)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL)
    (script,) = [block for block in blocks if "megamug.load(" in block]
    script = f"import megamug\n{script}\nimport torch\nassert not torch.distributed.is_initialized()\n"
    script += "print(len(captions), pictures[0].size, type(document.text).__name__)"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True,
                            text=True, timeout=300)  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("2 (32, 32) str\n")
