"""Segmenters through the real command line: shards with maps, steps, validation, the same in two halves, another run's
encoder to start from; a made set is learned, and measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megamug import cli
from megamug.configuration.reading import load_config
from tests.evaluate.tiny_run import STEP, make_data, make_run, tiny_config
from tests.training.runs import tensors
from tests.training.segmentation.made import SIZES, make_shards, options

LEARNED = 0.9  # of mean IoU, on the made set


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = make_shards(tmp_path_factory.mktemp("data"), {"train": 64, "heldout": 10})
    return make_shards(folder, {"zero": 8}, reduce_zero=True)


def written(data: Path, run: Path, /, **sections) -> str:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(options(data, run, **sections)), encoding="utf-8")
    return str(path)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_made_set_is_learned_and_measured(data, tmp_path, capsys):
    run = tmp_path / "run"
    config = written(data, run, train={"steps": 120}, checkpoint={"every": 0},
                     segmenter={"scale": [1.0, 1.3], "dropout": 0.0}, optimizer={"warmup_steps": 10})  # fmt: skip
    assert cli.main(["train", config]) == 0
    told = capsys.readouterr().out
    assert "segmentation 1." in told and "auxiliary 1." in told and "mean iou 0.9" in told
    (held_out,) = [r["validation"] for r in records(run) if "validation" in r]
    assert held_out["samples"] == 10 and held_out["mean_iou"] > LEARNED and held_out["pixel_accuracy"] > LEARNED
    assert cli.main(["evaluate", str(run), "--task", "segmentation", "--predictions", "--json"]) == 0
    shown = capsys.readouterr()
    figures = json.loads(shown.out)
    assert figures["mean_iou"] > LEARNED and f"mean IoU            {figures['mean_iou']:>10.2%}" in shown.err
    # The predictions that were written, against the maps, by hand.
    hits, either, pixels, right = np.zeros(4), np.zeros(4), 0, 0
    from megamug.data.shards.sources import resolve_sources

    (source,) = resolve_sources(str(data / "heldout"))
    for index in range(len(source)):
        shard, i = source.locate(index)
        truth = shard.map(shard.record(i))
        guess = np.asarray(Image.open(Path(figures["predictions"]) / "heldout" / f"{shard.key(i)}.png"))
        assert guess.shape == truth.shape
        known = truth != 255
        pixels, right = pixels + known.sum(), right + (guess == truth)[known].sum()
        for number in range(4):
            one, other = (truth == number)[known], (guess == number)[known]
            hits[number] += (one & other).sum()
            either[number] += (one | other).sum()
    assert figures["pixels"] == pixels and figures["pixel_accuracy"] == right / pixels
    assert [one["iou"] for one in figures["per_class"]] == (hits / either).tolist()
    assert figures["mean_iou"] == pytest.approx((hits / either).mean(), rel=1e-12)
    assert [one["name"] for one in figures["per_class"]] == ["ground", "disc", "square", "triangle"]
    assert Image.open(figures["pictures"][0]).width > 3 * 32


def test_a_run_goes_on_to_the_bit_with_all_that_is_drawn(data, tmp_path, capsys):
    drawn = {"drop_path": 0.2, "layer_decay": 0.9, "distortion": True, "reduce_zero_label": True}
    sections = {"data": {"train": str(data / "zero"), "validation": str(data / "zero"), "validation_samples": 5},
                "segmenter": drawn, "optimizer": {"min_learning_rate": 4e-3}}  # fmt: skip
    configs = [written(data, tmp_path / name, train={"steps": 4}, **sections) for name in ("whole", "halves")]
    assert cli.main(["train", configs[0], "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "4 classes of pixels, UperNet of 24 channels on blocks 0, 1, 1, 2" in told
    assert not (tmp_path / "whole").exists()
    for config, steps in ((configs[0], 4), (configs[1], 2), (configs[1], 4)):
        assert cli.main(["train", config, f"train.steps={steps}"]) == 0
    one, other = ([r for r in records(tmp_path / name) if "grad_norm" in r] for name in ("whole", "halves"))
    keys = ("step", "loss", "segmentation_loss", "auxiliary_loss", "grad_norm", "samples_seen")
    assert [{k: r[k] for k in keys} for r in one] == [{k: r[k] for k in keys} for r in other]
    assert one[0]["loss"] == pytest.approx(one[0]["segmentation_loss"] + 0.4 * one[0]["auxiliary_loss"])
    found = [tensors(tmp_path / name / "checkpoints" / "step-00000004") for name in ("whole", "halves")]
    assert found[0].keys() == found[1].keys() and "head.decode.fusion.norm.running_var" in found[0]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    kept = load_config(tmp_path / "whole" / "config.yaml").segmenter
    assert (kept.classes, kept.blocks, kept.position_image_size) == (4, [0, 1, 1, 2], 32)
    for change, was in (("channels=16", "was 24 and is now 16"), ("position_image_size=24", "was 32 and is now 24"),
                        ("reduce_zero_label=false", "classes.txt names 4")):  # fmt: skip
        assert cli.main(["train", configs[0], f"segmenter.{change}"]) == 2
        assert was in capsys.readouterr().err


def test_it_starts_from_the_encoder_of_a_mug_and_its_positions(data, tmp_path, capsys):
    mug = make_data(tmp_path / "mug")
    weights = make_run(tiny_config(mug, mug / "run"))
    trained = load_config(mug / "run" / "config.yaml").data.image_size
    sizes = {key: getattr(load_config(mug / "run" / "config.yaml").model, key) for key in SIZES}
    start = {"initial": str(mug / "run"), "initial_parts": ["encoder"], **sizes}
    config = written(data, tmp_path / "run", model=start, train={"steps": 1}, optimizer={"learning_rate": 1e-15})
    assert cli.main(["train", config, "data.image_size=64"]) == 0
    assert f"the encoder of step {STEP} from" in capsys.readouterr().out
    found = tensors(tmp_path / "run" / "checkpoints" / "step-00000001")
    compared = [name for name in weights if name in found and name.startswith("encoder.")]
    assert len(compared) > 10
    for name in compared:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-6, atol=1e-12, msg=name)
    assert trained != 64
    assert load_config(tmp_path / "run" / "config.yaml").segmenter.position_image_size == trained
    from megamug.generation.loading import load_run
    from megamug.transfer.encoder import load_encoder

    encoder = load_encoder(mug / "run", image_size=64)
    with load_run(tmp_path / "run") as run:
        assert torch.equal(run.model.encoder.positions, encoder.positions)
    again = {"initial": str(tmp_path / "run"), "initial_parts": None}  # one starts another one, head and all
    config = written(data, tmp_path / "again", model={**sizes, **again}, train={"steps": 1})
    assert cli.main(["train", config, "data.image_size=64", "precision.dtype=bf16"]) == 0
    assert load_config(tmp_path / "again" / "config.yaml").segmenter.position_image_size == trained
