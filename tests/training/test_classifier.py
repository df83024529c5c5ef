"""Classifiers through the real command line: labelled shards, steps, validation, the same in two halves, another
run's encoder to start from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml

import megamug
from megamug import cli
from megamug.configuration.reading import load_config
from tests.evaluate.tiny_run import STEP, make_data, make_run, tiny_config
from tests.training.classified import SIZES, make_shards, options
from tests.training.runs import tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"), {"train": 24, "heldout": 10})


def written(data: Path, run: Path, **sections) -> str:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(options(data, run, **sections)), encoding="utf-8")
    return str(path)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("mixes", [False, True])
def test_a_run_learns_and_goes_on_to_the_bit(data, tmp_path, capsys, mixes):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli.main(["train", written(data, whole, train={"steps": 24})]) == 0
    assert "class 1." in capsys.readouterr().out
    # With all that is drawn for a sample.
    drawn = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "layer_decay": 0.9, "random_erasing": 0.3,
             "ema": 0.8} if mixes else {}  # fmt: skip
    if mixes and importlib.util.find_spec("timm"):
        drawn["rand_augment"] = "rand-m3-mstd0.5-inc1"
    config = written(data, halves, train={"steps": 24}, classifier=drawn)
    assert cli.main(["train", config, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "3 classes, of the mean of the patches" in told and "17 tokens (16 of 16 patches visible)" in told
    assert not halves.exists()
    for steps in ("4", "24"):
        # The rate of a step depends on the last one, so the first half is told of it as well.
        assert cli.main(["train", config, f"train.steps={steps}", "optimizer.min_learning_rate=3e-3"]) == 0
    assert cli.main(["train", written(data, tmp_path / "flat", train={"steps": 24}, classifier=drawn),
                     "optimizer.min_learning_rate=3e-3"]) == 0  # fmt: skip
    one = [r for r in records(tmp_path / "flat") if "grad_norm" in r]
    assert [r["step"] for r in one] == list(range(1, 25))
    assert one[-1]["class_loss"] < one[0]["class_loss"] - (0.05 if mixes else 0.2)
    halved = [r for r in records(halves) if "grad_norm" in r]
    keys = ("loss", "class_loss", "grad_norm", "samples_seen", "learning_rate")
    assert [{k: r[k] for k in keys} for r in halved] == [{k: r[k] for k in keys} for r in one]
    checkpoints = [tensors(run / "checkpoints" / "step-00000024") for run in (halves, tmp_path / "flat")]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(torch.equal(value, checkpoints[1][name]) for name, value in checkpoints[0].items())
    (held_out,) = [r["validation"] for r in records(whole) if "validation" in r]
    assert held_out["samples"] == 10 and held_out["class_loss"] < 1
    assert load_config(whole / "config.yaml").classifier.classes == 3


def test_it_starts_from_the_encoder_of_a_mug(data, tmp_path, capsys):
    mug = make_data(tmp_path / "mug")
    weights = make_run(tiny_config(mug, mug / "run"))
    start = {"initial": str(mug / "run"), "initial_parts": ["encoder"]}
    config = written(data, tmp_path / "run", model=start, train={"steps": 1}, optimizer={"learning_rate": 1e-15})
    assert cli.main(["train", config]) == 0
    assert f"the encoder of step {STEP} from" in capsys.readouterr().out
    found = tensors(tmp_path / "run" / "checkpoints" / "step-00000001")
    compared = [name for name in weights if name in found and name.startswith("encoder.")]
    assert len(compared) > 10
    for name in compared:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-6, atol=1e-12, msg=name)
    assert 1e-5 < float(found["head.linear.weight"].std()) < 3e-5
    again = {"initial": str(tmp_path / "run"), "initial_parts": None}  # a classifier starts another one, head and all
    config = written(data, tmp_path / "again", model=again, train={"steps": 1})
    assert cli.main(["train", config]) == 0


@pytest.mark.parametrize("changes, told", [
    ({"initial_parts": None}, ["model.kind is mug there and classifier here", "set model.initial_parts=[encoder]"]),
    ({"width": 48, "heads": 8}, ["model.width is 32 there and 48 here, model.heads is 4 there and 8 here"]),
    ({"initial_parts": ["image_decoder"]}, ["this model has no image_decoder (it is a classifier)"]),
])  # fmt: skip
def test_what_does_not_fit_is_told_at_once(data, tmp_path, capsys, changes, told):
    mug = make_data(tmp_path / "mug")
    make_run(tiny_config(mug, mug / "run"))
    model = {**SIZES, "initial": str(mug / "run"), "initial_parts": ["encoder"], **changes}
    assert cli.main(["train", written(data, tmp_path / "run", model=model)]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in told), error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_number_of_classes_is_not_continued(data, tmp_path, capsys):
    config = written(data, tmp_path / "run", train={"steps": 1})
    assert cli.main(["train", config]) == 0
    capsys.readouterr()
    assert cli.main(["train", config, "classifier.classes=5", "train.steps=2"]) == 2
    assert "classifier.classes was 3 and is now 5" in capsys.readouterr().err
    assert cli.main(["train", config, "classifier.pool=class_token", "train.steps=2"]) == 2
    assert "classifier.pool was mean and is now class_token" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_a_probe_leaves_the_encoder_as_it_was_and_goes_on_to_the_bit(data, tmp_path, capsys, name):
    mug = make_data(tmp_path / "mug")
    weights = make_run(tiny_config(mug, mug / "run"))
    model = {"initial": str(mug / "run"), "initial_parts": ["encoder"]}
    probe = {"frozen": True, "pool": "class_token", "label_smoothing": 0.0, "batch_norm": name != "sgd"}
    with_it = {"name": name, **({} if name == "adamw" else {"beta2": 0.95, "momentum": 0.8})}
    runs = tmp_path / "whole", tmp_path / "halves"
    configs = [written(data, run, model=model, classifier=probe, optimizer=with_it, train={"steps": 6})
               for run in runs]  # fmt: skip
    rate = "optimizer.min_learning_rate=3e-3"
    assert cli.main(["train", configs[0], "--dry-run"]) == 0
    assert "the encoder is frozen" in capsys.readouterr().out
    for config, steps in ((configs[0], 6), (configs[1], 3), (configs[1], 6)):
        assert cli.main(["train", config, f"train.steps={steps}", rate]) == 0
    one, other = (tensors(run / "checkpoints" / "step-00000006") for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    compared = [name for name in weights if name in one and name.startswith("encoder.")]
    assert len(compared) > 10 and all(torch.equal(one[name], weights[name]) for name in compared)
    assert one["head.linear.weight"].any() and ("head.standardised.running_mean" in one) == (name != "sgd")
    assert name == "sgd" or one["head.standardised.running_mean"].any()
    kept = {"adamw": {"exp_avg", "exp_avg_sq"}}.get(name, {"momentum_buffer"})
    assert {key.split(".")[1] for key in one if key.startswith("optimizer.")} == kept
    assert not any(name.startswith("optimizer.") and ".encoder." in name for name in one)
    assert cli.main(["evaluate", str(runs[0]), "--task", "classification"]) == 0
    assert cli.main(["train", configs[0], "classifier.frozen=false"]) == 2
    expected = "classifier.frozen was true" if name != "sgd" else "classifier.batch_norm(false) is of a frozen encoder"
    assert expected in capsys.readouterr().err
    if name == "lars":
        assert cli.main(["train", configs[0], "optimizer.name=sgd"]) == 2
        assert "optimizer.name was lars and is now sgd; set optimizer.name as it was" in capsys.readouterr().err


def test_validation_evaluation_and_exports_read_averages(data, tmp_path, capsys):
    run = tmp_path / "run"
    path = written(data, run, train={"steps": 4}, classifier={"ema": 0.9, "pool": "class_token"})
    assert cli.main(["train", path]) == 0
    assert "held-out losses are those of averages of the weights (classifier.ema=0.9)" in capsys.readouterr().out
    told = records(run)[-1]["validation"]["class_loss"]
    assert cli.main(["evaluate", str(run), "--task", "classification"]) == 0
    assert "step 4 (averages of the weights)" in capsys.readouterr().err
    figures = json.loads((run / "evaluate" / "step-00000004" / "classification.json").read_text())
    assert figures["weights"] == "averages" and figures["loss"] == pytest.approx(told, rel=1e-6)
    stored = tensors(run / "checkpoints" / "step-00000004")
    average = stored["optimizer.average.encoder.stack.final_layernorm.bias"]
    assert not torch.equal(average, stored["encoder.stack.final_layernorm.bias"])
    assert torch.equal(megamug.load_encoder(run).norm.bias, average)
    assert cli.main(["convert", "--from", "megamug", "--to", "megamug", str(run), str(tmp_path / "alone")]) == 0
    assert "averages of the weights are taken where the run keeps them" in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path / "alone"), "--task", "classification"]) == 0
    figures = json.loads((tmp_path / "alone" / "evaluate" / "step-00000000" / "classification.json").read_text())
    assert figures["weights"] == "last" and figures["loss"] == pytest.approx(told, rel=1e-6)
    assert cli.main(["train", path, "train.steps=5", "classifier.ema=0"]) == 2
    assert "classifier.ema above 0 was True and is now False" in capsys.readouterr().err
