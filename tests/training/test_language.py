"""Language models through the real command line: tokenised documents, steps, validation, and the same in two halves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megamug import cli
from tests.data.language import image, tiny_vocabulary, write_set

TOWER = {"layers": 2, "width": 32, "heads": 4, "ffn_width": 64, "max_positions": 64, "init_std": 0.1}
MODELS = {
    "decoder_lm": {"model": {"kind": "decoder_lm", "preset": "lm_tiny"}, "lm": TOWER},
    "jam_cross": {
        "model": {"kind": "jam_cross", "preset": "jam_demo", "z_loss_weight": 1e-4}, "text_tower": TOWER,
        "image_tower": {**TOWER, "width": 48, "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu"},
        "data": {"separate_documents": True},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A vocabulary, and documents of text and images."""
    folder = tmp_path_factory.mktemp("language")
    vocabulary = tiny_vocabulary(folder)
    text = (vocabulary.encode_text("two triangles, then a red circle"), False, False)
    documents = [[text, (image(vocabulary, n), True, False)] for n in range(24)]
    write_set(folder / "documents", vocabulary, documents)
    return folder


def written(folder: Path, run: Path, kind: str) -> str:
    options = MODELS[kind]
    config = {
        **options, "run_dir": str(run),
        "data": {
            "train": str(folder / "documents"), "validation": str(folder / "documents"), "validation_samples": 6,
            "tokenizer": str(folder / "vocabulary"), "context_length": 48, "global_batch_size": 4,
            "micro_batch_size": 2, **options.get("data", {}),
        },
        "optimizer": {"learning_rate": 3e-3, "min_learning_rate": 3e-3},
        "train": {"steps": 8}, "checkpoint": {"every": 4},
        "log": {"every": 2, "tensorboard": False},
    }  # fmt: skip
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_learns_and_goes_on_to_the_bit(folder, tmp_path, kind, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli.main(["train", written(folder, whole, kind)]) == 0
    config = written(folder, halves, kind)
    assert cli.main(["train", config, "--dry-run"]) == 0
    assert "rows" in capsys.readouterr().out and not halves.exists()
    for steps in ("4", "8"):
        assert cli.main(["train", config, f"train.steps={steps}"]) == 0
    one = [r for r in records(whole) if "loss" in r and "grad_norm" in r]
    assert [r["step"] for r in one] == list(range(1, 9))
    assert one[-1]["lm_loss"] < one[0]["lm_loss"] - 0.1
    halved = [r for r in records(halves) if "grad_norm" in r]
    keys = {key for key in one[0] if key in ("loss", "lm_loss", "z_loss", "grad_norm", "samples_seen")}
    assert ("z_loss" in keys) == (kind == "jam_cross")
    assert [{k: r[k] for k in keys} for r in halved] == [{k: r[k] for k in keys} for r in one]


def test_rows_of_another_length_are_not_continued(folder, tmp_path, capsys):
    run = tmp_path / "run"
    config = written(folder, run, "decoder_lm")
    assert cli.main(["train", config, "train.steps=4"]) == 0
    capsys.readouterr()
    assert cli.main(["train", config, "data.context_length=40"]) == 2
    error = capsys.readouterr().err
    assert "data.context_length" in error and "48" in error and "40" in error and error.count("\n") == 1
