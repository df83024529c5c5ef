"""Figures on held-out data against plain numpy over the same pixels and logits; each pair counted once."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from megamug import evaluate
from megamug.data.dali import CropDecoder
from megamug.data.pairs.images import centre_squares
from megamug.data.random import random_masks
from megamug.data.shards.sources import resolve_sources
from megamug.errors import UserError
from megamug.evaluate import captioning
from megamug.generation.captions import reconstruct
from megamug.generation.loading import load_run
from megamug.generation.pictures import TrainingPictures, held_out
from megamug.models.mug.model import MugBatch, unpatchify
from tests.evaluate.tiny_run import HELD_OUT, MICRO_BATCH, STEP, make_data, make_run, tiny_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("evaluate"))
    make_run(tiny_config(folder, folder / "run"))
    return folder / "run"


def all_pairs(run) -> tuple[MugBatch, list[str]]:
    """All held-out pairs in one batch, read from the shards in their order of storage, and their captions."""
    config, plan = run.config, run.task.plan
    (source,) = resolve_sources(config.data.validation)
    assert len(source) == HELD_OUT
    decoder, images, captions = CropDecoder(config.data.image_size, 1, 1, torch.device("cpu")), [], []
    for index in range(HELD_OUT):
        shard, i = source.locate(index)
        shard.open()
        sizes = [[shard.samples[i][side]] for side in ("width", "height")]
        images.append(decoder([shard.image_bytes(i)], centre_squares(*sizes), np.zeros(1, bool)))
        captions.append(shard.caption(i))
        shard.close()
    numbers = np.arange(HELD_OUT)
    ids = [torch.from_numpy(x) for x in random_masks(config.seed, 0 * numbers, numbers, plan.patches, plan.visible)]
    tokens = run.task.tokenizer.encode_batch(captions, config.data.caption_length)
    return MugBatch(*ids, torch.cat(images), tokens), captions


def test_held_out_pairs_come_once_each(run_dir):
    with load_run(run_dir) as run:
        batches = list(held_out(run.task, run.world, 1000))
        some = list(held_out(run.task, run.world, 6))
        expected, captions = all_pairs(run)
    assert [len(b.images) for b, _ in batches] == [4, 4, 4, 1] and [len(c) for _, c in some] == [4, 2]
    got = sorted((tuple(b.images[i].flatten().tolist()), c[i]) for b, c in batches for i in range(len(c)))
    assert got == sorted((tuple(x.flatten().tolist()), c) for x, c in zip(expected.images, captions, strict=True))


def test_reconstruction_figures(run_dir, capsys):
    figures = evaluate.run_task(run_dir, "reconstruction")
    with load_run(run_dir) as run, torch.no_grad():
        batch, _ = all_pairs(run)
        model, plan = run.model, run.task.plan
        hidden = model.image_decoder(batch, model.encoder(batch, None), None)
        values = unpatchify(model.image_decoder.predict(hidden), plan.patch_size, 32).numpy()  # [b, 3, H, W]
    mean, std = (np.array(x).reshape(3, 1, 1) for x in (plan.mean, plan.std))
    errors, baselines, losses = [], [], []
    for image, value, masked in zip(batch.images.numpy() / 255, values, batch.masked_ids.numpy(), strict=True):
        grid = np.zeros(plan.patches, bool)
        grid[masked] = True
        side = plan.patch_size
        hidden_pixels = np.kron(grid.reshape(plan.grid), np.ones((side, side))).astype(bool)  # [H, W]
        truth = image[:, hidden_pixels]
        colour = image[:, ~hidden_pixels].mean(axis=1, keepdims=True)
        errors.append(np.square((value * std + mean)[:, hidden_pixels] - truth).mean())
        baselines.append(np.square(colour - truth).mean())
        losses.append(np.square(value[:, hidden_pixels] - ((image - mean) / std)[:, hidden_pixels]).mean())
    assert figures["samples"] == HELD_OUT and figures["masked_patches"] == 12
    assert figures["pixel_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert figures["baseline_error"] == pytest.approx(np.mean(baselines), rel=1e-6)
    assert figures["ratio"] == pytest.approx(np.mean(errors) / np.mean(baselines), rel=1e-5)
    assert figures["image_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert "note" not in figures
    folder = run_dir / "evaluate" / f"step-{STEP:08d}"
    assert json.loads((folder / "reconstruction.json").read_text()) == figures
    assert figures["pictures"] == [str(folder / "reconstruction.png")]
    with Image.open(folder / "reconstruction.png") as picture:
        assert picture.width * picture.height > 3 * 192 * 12 * 192 and picture.width > picture.height
    told = capsys.readouterr().err
    assert f"{figures['ratio']:.3f}" in told and str(folder / "reconstruction.json") in told


def caption_loss(model, batch, latent) -> tuple[float, int]:
    """Summed over tokens, by numpy from the logits."""
    decoder = model.text_decoder
    logits = decoder.logits(decoder(batch, latent, None))[..., : model.plan.vocabulary].double().numpy()  # [t, b, V]
    target = batch.tokens[:, 1:].numpy().T
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(chances, target[..., None], -1)[..., 0]
    return float(-np.log(picked)[target != 0].sum()), int((target != 0).sum())


def test_captioning_figures(run_dir, tmp_path, capsys):
    figures = evaluate.run_task(run_dir, "captioning", output=tmp_path / "out")
    with load_run(run_dir) as run, torch.no_grad():
        model, plan = run.model, run.task.plan
        batch = MugBatch(*(torch.cat(parts) for parts in zip(*(
            (b.visible_ids, b.masked_ids, b.images, b.tokens) for b, _ in held_out(run.task, run.world, 1000)
        ), strict=True)))  # fmt: skip
        rows = np.arange(HELD_OUT)  # the neighbour in batches of 4; the last pair, alone, takes the batch before it
        other = np.concatenate([np.roll(rows[i : i + MICRO_BATCH], 1) for i in range(0, HELD_OUT, MICRO_BATCH)])
        other[12] = 8
        everything = torch.arange(plan.patches).expand(HELD_OUT, -1)
        views = {"masked": batch, "all_visible": dataclasses.replace(batch, visible_ids=everything)}
        for name, view in views.items():
            latent = model.encoder(view, None)
            loss, tokens = caption_loss(model, batch, latent)
            other_loss, _ = caption_loss(model, batch, latent[:, other])
            got = figures[name]
            assert figures["tokens"] == tokens
            assert got["caption_loss"] == pytest.approx(loss / tokens, rel=1e-5)
            assert got["caption_loss_other_image"] == pytest.approx(other_loss / tokens, rel=1e-5)
            assert got["gap"] == pytest.approx((other_loss - loss) / tokens, abs=1e-5) and abs(got["gap"]) > 1e-3
    assert (figures["samples"], figures["masked"]["visible_patches"]) == (HELD_OUT, 4)
    assert figures["all_visible"]["visible_patches"] == 16 and len(figures["examples"]) == 12
    assert json.loads((tmp_path / "out" / "captioning.json").read_text()) == figures
    assert (tmp_path / "out" / "captioning.png").is_file()
    results = [json.loads(line) for line in (tmp_path / "out" / "captioning.jsonl").read_text().splitlines()]
    assert figures["compared"]["references"] == HELD_OUT and {r["image_id"] for r in results} == {None}
    assert all(result["references"] == [result["caption"]] for result in results)
    assert [result["sample"] for result in results] == list(range(figures["samples"]))
    for view in ("masked", "all_visible"):
        right = sum(result[view]["right_tokens"] for result in results) / sum(r["tokens"] for r in results)
        assert right == pytest.approx(figures[view]["token_accuracy"])
        assert np.mean([result[view]["exact"] for result in results]) == pytest.approx(figures[view]["exact_match"])
    assert [result["masked"]["caption"] for result in results][:12] == [e["masked"] for e in figures["examples"]]
    told = capsys.readouterr().err
    assert "captions exactly right" in told and "beside 1 true captions each" in told
    assert f"{figures['all_visible']['text']['cider_d']:10.3f}" in told.split("CIDEr-D")[1].split("\n")[0]


def test_exact_match_and_token_accuracy(run_dir, monkeypatch):
    with load_run(run_dir) as run, torch.no_grad():
        batch, _ = next(held_out(run.task, run.world, 4))
        written = batch.tokens[:, 1:].clone()
        lengths = (written != 0).sum(dim=1)
        written[1, 2] += 1  # one wrong token
        written[2, lengths[2] - 1] = 50  # no end: another token in its place, and another text
        monkeypatch.setattr(captioning, "generate_tokens", lambda *_: written[:, : int(lengths.max())])
        view = captioning.View(4)
        view.add(run.model, run.task.tokenizer, batch)
    figures = view.figures()
    assert figures["exact_match"] == 2 / 4
    assert figures["token_accuracy"] == pytest.approx(1 - 2 / int(lengths.sum()))


def test_true_statistics_are_used_and_told_with_norm_pix_loss(run_dir, tmp_path, monkeypatch, capsys):
    config = tiny_config(run_dir.parent, tmp_path / "run", caption_loss_weight=0.0)
    config.model.norm_pix_loss = True
    make_run(config)
    figures = evaluate.run_task(tmp_path / "run", "reconstruction", samples=5)
    assert figures["samples"] == 5 and figures["norm_pix_loss"]
    assert "the true ones" in figures["note"] and "the true ones" in capsys.readouterr().err
    with load_run(tmp_path / "run") as run, torch.no_grad():
        batch, _ = next(held_out(run.task, run.world, 4))
        patches = batch.images.double().numpy().reshape(4, 3, 4, 8, 4, 8).transpose(0, 2, 4, 3, 5, 1).reshape(4, 16, -1)
        truth = np.take_along_axis(patches / 255, batch.masked_ids.numpy()[..., None], 1)
        mean, std = (np.tile(x, 64) for x in (run.config.data.mean, run.config.data.std))
        units = (truth - mean) / std
        target = (units - units.mean(-1, keepdims=True)) / np.sqrt(units.var(-1, ddof=1, keepdims=True) + 1e-6)
        monkeypatch.setattr(run.model.image_decoder, "predict", lambda *_: torch.from_numpy(target))
        painted = reconstruct(run.model, batch, run.model.encoder(batch, None))
    assert np.abs(painted.numpy() - truth).max() < 1e-5
    with pytest.raises(UserError, match="caption_loss_weight=0"):
        evaluate.run_task(tmp_path / "run", "captioning")


def test_what_cannot_be_measured_is_told(run_dir, tmp_path):
    with pytest.raises(UserError, match="two held-out pairs"):
        evaluate.run_task(run_dir, "captioning", samples=1, output=tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        evaluate.run_task(run_dir, "captioning", data=str(tmp_path / "nothing"), output=tmp_path)
    with pytest.raises(UserError, match="there is no task"):
        evaluate.run_task(run_dir, "capitoning")
    assert evaluate.run_task(run_dir, "captioning", samples=3, data=str(run_dir.parent / "data" / "train"),
                             output=tmp_path)["samples"] == 3  # fmt: skip


def test_picture_while_training(run_dir, tmp_path, caplog):
    with load_run(run_dir) as run:
        pictures = TrainingPictures(run.task, tmp_path)
        run.config.data.global_batch_size = 512  # of which the picture needs a few
        run.model.train()
        second_of_two = dataclasses.replace(run.world, rank=1, dp_rank=1, dp_size=2)
        assert pictures.draw(run.model, second_of_two, 3) is None
        first_of_two = dataclasses.replace(run.world, dp_size=2)
        path = pictures.draw(run.model, first_of_two, 3)
        again = pictures.draw(run.model, run.world, 4)
        assert run.model.training
        assert path == tmp_path / "pictures" / "step-00000003.png"
        assert path.read_bytes() == again.read_bytes()
        split = dataclasses.replace(run.world, tp_size=2)
        with caplog.at_level(logging.INFO):
            assert pictures.draw(run.model, split, 5) is None
            assert pictures.draw(run.model, split, 6) is None
    told = [record.message for record in caplog.records if record.name == "megamug.generation.pictures"]
    assert len(told) == 1 and "parallel.tensor=2" in told[0]


def test_a_picture_of_fewer_pairs_is_made_of_eight_rows(run_dir, tmp_path, monkeypatch):
    """Under FP8 the products forward want rows in multiples of eight, however few pairs are held out."""
    from megamug.generation import pictures

    whole, sizes, drawn = pictures.held_out, [], []
    monkeypatch.setattr(pictures, "held_out", lambda task, world, most: whole(task, world, 3))
    encode = pictures.encode
    monkeypatch.setattr(pictures, "encode", lambda m, batch: sizes.append(len(batch.images)) or encode(m, batch))
    monkeypatch.setattr(pictures, "save_grid", lambda rows, *_: drawn.extend(rows))
    with load_run(run_dir) as run:
        pictures.TrainingPictures(run.task, tmp_path).draw(run.model, run.world, 3)
    assert set(sizes) == {8}
    assert len(drawn) == 3 and len({row.lines[0] for row in drawn}) == 3


def test_images_without_captions_are_reconstructed_as_those_with(run_dir, tmp_path, monkeypatch):
    """The same held-out images without their captions: the same figures; captioning refuses them before it begins."""
    import tarfile

    from megamug import cli
    from megamug.data.shards.indexing import index_paths

    (shard,) = (run_dir.parent / "data" / "heldout").glob("*.tar")
    with tarfile.open(shard) as whole, tarfile.open(tmp_path / shard.name, "w") as alone:
        for member in whole:
            if not member.name.endswith(".txt"):
                alone.addfile(member, whole.extractfile(member))
    assert index_paths([tmp_path / shard.name], processes=1)[0].captioned == 0
    figures = evaluate.run_task(run_dir, "reconstruction", data=str(tmp_path), output=tmp_path / "out")
    same = evaluate.run_task(run_dir, "reconstruction", output=tmp_path / "same")
    names = ("samples", "pixel_error", "baseline_error", "image_loss")
    assert [figures[name] for name in names] == [same[name] for name in names] and figures["samples"] == HELD_OUT
    monkeypatch.setattr("megamug.generation.loading.load_run", None)
    code = cli.main(["evaluate", str(run_dir), "--task", "captioning", "--data", str(tmp_path)])
    assert code == 2
