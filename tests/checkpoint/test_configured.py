"""RUN/config.yaml is in no manifest: halved or changed it is another model's, and whoever reads the run notices."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from megamug.checkpoint import configured, initial
from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.commands import convert, inspect
from megamug.configuration.reading import load_config, resolve, to_yaml
from megamug.convert.conversion import from_megamug, read_configuration
from megamug.convert.registry import FORMATS
from megamug.errors import UserError
from megamug.generation.loading import load_run
from tests.checkpoint.test_tensors import remanifest

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.layers=1", "model.width=16", "model.heads=2", "model.ffn_width=32", "model.patch_size=8",
    "data.image_size=16", "model.image_loss_weight=0", "model.caption_loss_weight=0", "seed=7",
    "model.layer_norm_eps=1e-5",
]  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """An encoder, as conversion writes it."""
    from megamug.convert.vision.mae import encoder_rows
    from megamug.models.init import draw

    config = resolve(load_config(None, TINY))
    write_run(tmp_path / "run", config, [
        LazyTensor(row.ours, row.shape, torch.float32, lambda row=row: draw(row.ours, row.shape, 1))
        for row in encoder_rows(config)
    ])  # fmt: skip
    return tmp_path / "run"


def readers(run: Path, folder: Path):
    """Everything that reads a run."""
    def generate():
        with load_run(run):
            pass

    class Task:
        vocabulary = None

        def identity(self):
            return {"data.tokenizer": None}

    config = resolve(load_config(None, [*TINY, f"model.initial={run}"]))

    return {
        "export": lambda: from_megamug(FORMATS["hf_vit"], run, folder / "out"),
        "convert": lambda: convert.main(
            ["--from", "megamug", "--to", "megamug", str(run), str(folder / "copy")]),
        "generate, evaluate": generate,
        "model.initial": lambda: initial.check(config, Task()),
    }  # fmt: skip


def test_a_whole_configuration_is_read_without_a_word(run, tmp_path, capsys):
    assert read_configuration(TensorReader(run))[1] == []
    for name, read in readers(run, tmp_path).items():
        read()
        assert "config.yaml" not in capsys.readouterr().out, name
    assert inspect.main([str(run)]) == 0
    assert "configuration: as in config.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("damage, said", [
    (lambda text: text[: text.rindex("\n", 0, len(text) // 2) + 1],
     "config.yaml is cut short: .* more keys that step-00000000 was written with"),
    (lambda text: text[: text.index("  dtype:")], "config.yaml is cut short: precision.dtype and 0 more keys"),
    (lambda text: text.replace("layer_norm_eps: 1.0e-05", "layer_norm_eps: 1.0e-06"),
     "config.yaml is not the configuration of step-00000000: model.layer_norm_eps was 1e-05 and is 1e-06; put"),
    (lambda text: text.replace("- 0.485", "- 0.5"), "data.mean was .0.485, .* and is .0.5, "),
    (lambda text: text.replace("norm_pix_loss: true", "norm_pix_loss: false"), "model.norm_pix_loss was True"),
], ids=["half", "last section", "epsilon", "mean", "loss"])  # fmt: skip
def test_a_configuration_that_was_cut_or_changed_is_refused_wherever_a_run_is_read(run, tmp_path, capsys, damage, said):
    path = run / "config.yaml"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    for name, read in readers(run, tmp_path).items():
        with pytest.raises(UserError, match=said):
            read()
            pytest.fail(name)
    assert not (tmp_path / "out").exists() and not (tmp_path / "copy").exists()
    assert inspect.main([str(run)]) == 1
    assert "configuration: " in capsys.readouterr().out


def test_what_a_user_may_edit_is_read_and_what_reading_goes_by_is_told(run):
    path = run / "config.yaml"
    config = load_config(path)
    config.data.tokenizer, config.data.train, config.run_dir = "elsewhere", "other", "moved"
    path.write_text(to_yaml(config))
    assert read_configuration(TensorReader(run))[1] == []
    config.seed, config.model.mask_ratio = 8, 0.5
    path.write_text(to_yaml(config))
    [remark] = read_configuration(TensorReader(run))[1]
    assert remark == (f"{path} was changed since step-00000000 was written: seed was 7 and is 8; model.mask_ratio was"
                      " 0.75 and is 0.5")  # fmt: skip


def test_checkpoints_of_earlier_versions_load_with_a_remark(run, caplog):
    folder = TensorReader(run).folder
    state = json.loads((folder / "state.json").read_text())
    del state[configured.KEY]
    (folder / "state.json").write_text(json.dumps(state))
    remanifest(folder)
    [remark] = read_configuration(TensorReader(run))[1]
    assert remark.startswith(f"{folder} is of an earlier version, which kept no configuration in it: ")
    with caplog.at_level(logging.INFO), load_run(run):
        assert remark in caplog.text
    for value in (None, [], -5, {"model.layers": "many"}, {"model.layers": [1]}, {"seed": 2**63, "gone.key": 1}):
        (folder / "state.json").write_text(json.dumps(state | {configured.KEY: value}))
        remanifest(folder)
        try:
            read_configuration(TensorReader(run))
        except UserError as error:
            assert "\n" not in str(error)


def test_weights_that_start_a_run_of_another_function_are_told():
    """No shape tells: the same parameters with another epsilon."""
    config = resolve(load_config(None, TINY))
    other = resolve(load_config(None, [*TINY, "model.layer_norm_eps=1e-6", "data.image_size=32"]))
    assert configured.other_function(config, config) == []
    [remark] = configured.other_function(config, other)
    assert remark.endswith(": model.layer_norm_eps was 1e-05 and is 1e-06 here")
