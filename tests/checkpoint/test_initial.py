"""`model.initial`: another run's weights, whatever its layout; what does not fit is told before any process group."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamug import cli
from megamug.checkpoint import initial
from megamug.checkpoint.saver import read_state
from megamug.configuration import validate
from megamug.configuration.reading import resolve, to_yaml
from megamug.errors import UserError
from megamug.models.tasks import make_task
from tests.evaluate.tiny_run import STEP, make_data, make_run, tiny_config
from tests.training.runs import tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """(data, run folder, its weights)."""
    data = make_data(tmp_path_factory.mktemp("data"))
    return data, data / "run", make_run(tiny_config(data, data / "run"))


def new_config(source, run: Path, **model):
    config = resolve(tiny_config(source[0], run, initial=str(source[1]), **model))
    config.train.steps, config.log.tensorboard, config.data.validation = 1, False, None
    # So small a step that it changes no weight of float32 by more than its last digit.
    config.optimizer.learning_rate = 1e-15
    return config


def train(config, folder: Path, caplog) -> str:
    (folder / "recipe.yaml").write_text(to_yaml(config))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert cli.main(["train", str(folder / "recipe.yaml")]) == 0
    return caplog.text


def test_training_starts_from_the_weights_with_a_fresh_optimizer(source, tmp_path, caplog):
    _, run, weights = source
    config = new_config(source, tmp_path / "run")
    log = train(config, tmp_path, caplog)
    assert f"weights of step {STEP} from {run / 'checkpoints'}/step-{STEP:08d} start this run" in log
    assert "trained for another function" not in log
    state = read_state(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert state["configuration"]["model.width"] == config.model.width
    assert state["configuration"]["data.mean"] == config.data.mean
    found = tensors(tmp_path / "run" / "checkpoints" / "step-00000001")
    compared = [name for name in weights if name in found]  # norms have other names in a checkpoint
    assert len(compared) > 40
    for name in compared:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-6, atol=1e-12, msg=name)
    # It goes on from its own checkpoint; where the weights came from may be gone by then.
    config.train.steps, config.model.initial = 2, str(tmp_path / "gone")
    log = train(config, tmp_path, caplog)
    assert "is not read: the run has a checkpoint of its own" in log and "resuming after step 1" in log


@pytest.mark.parametrize("sizes, message", [
    ({"heads": 8}, "model.heads is 4 there and 8 here"),
    ({"layers": 3}, "model.layers is 2 there and 3 here"),
    ({"text_objective": "masked"}, "model.text_objective is autoregressive there and masked here"),
    ({"tie_vocabulary": False, "text_heads": 8}, "model.text_heads is 4 there and 8 here"),
])  # fmt: skip
def test_another_models_weights_are_refused_before_any_process_group(source, tmp_path, sizes, message):
    config = new_config(source, tmp_path / "run")
    config.model.__dict__.update(sizes)
    refused(config, message)


def test_a_part_that_is_not_needed_may_be_there(source, tmp_path):
    config = new_config(source, tmp_path / "run", caption_loss_weight=0.0)
    initial.check(config, make_task(config))


def refused(config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        initial.check(config, make_task(config))
    assert not torch.distributed.is_initialized()


def test_what_is_missing_or_damaged_is_told(source, tmp_path):
    config = new_config(source, tmp_path / "run")
    config.model.initial = str(tmp_path / "nowhere")
    refused(config, "neither a run folder .* nor a checkpoint")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    config.model.initial = str(tmp_path / "empty")
    refused(config, "has no complete checkpoint")
    shutil.copytree(source[1], tmp_path / "damaged")
    checkpoint = tmp_path / "damaged" / "checkpoints" / f"step-{STEP:08d}"
    with open(next(checkpoint.glob("model/*.distcp")), "r+b") as file:
        file.write(b"?")
    config.model.initial = str(checkpoint)
    refused(config, "is damaged")


def test_a_checkpoint_without_its_run_is_compared_parameter_by_parameter(source, tmp_path, capsys):
    """Then nobody knows the configuration: the shapes in the checkpoint decide."""
    checkpoint = tmp_path / "lone" / f"step-{STEP:08d}"
    shutil.copytree(source[1] / "checkpoints" / checkpoint.name, checkpoint)
    config = new_config(source, tmp_path / "run")
    config.model.initial, config.model.ffn_width = str(checkpoint), 128
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 1  # the groups exist by then, so not 2
    assert "encoder.stack.layers.0.mlp.linear_fc1." in capsys.readouterr().out


def test_an_encoder_alone_starts_a_run_whose_decoders_are_new(source, tmp_path, caplog):
    config = new_config(source, tmp_path / "run", initial_parts=["encoder"])
    config.model.decoder_layers, config.model.text_multimodal_layers = 2, 1  # other decoders than there
    log = train(config, tmp_path, caplog)
    assert f"the encoder of step {STEP} from" in log
    found = tensors(tmp_path / "run" / "checkpoints" / "step-00000001")
    fresh = new_config(source, tmp_path / "fresh")
    fresh.model = replace(config.model, initial=None, initial_parts=None)
    train(fresh, tmp_path, caplog)
    drawn = tensors(tmp_path / "fresh" / "checkpoints" / "step-00000001")
    for name, value in found.items():
        if name in source[2] or name.startswith(("image_decoder.", "text_decoder.")):
            expected = source[2][name] if name.startswith("encoder.") else drawn[name]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12, msg=name)
    assert sum(name.startswith("encoder.") and name in found for name in source[2]) > 10


def test_of_a_part_all_that_differs_is_told_at_once(source, tmp_path):
    config = new_config(source, tmp_path / "run", initial_parts=["encoder"])
    config.model.heads, config.model.layers = 8, 3
    refused(config, "model.layers is 2 there and 3 here, model.heads is 4 there and 8 here")
    for parts, message in [
        (["encoder", "x"], "there is no part 'x'; there are encoder, image_decoder, text_decoder"),
        ([], "at least one"), (["encoder", "encoder"], "each part once"),
    ]:  # fmt: skip
        config.model.initial_parts = parts
        refused(config, message)
    none = new_config(source, tmp_path / "run", initial_parts=["text_decoder"], caption_loss_weight=0.0)
    refused(none, "this model has no text_decoder")
    none.model.initial, none.model.initial_parts = None, ["encoder"]
    with pytest.raises(UserError, match="model.initial_parts is set and model.initial is not"):
        validate.sizes(none, 1)
