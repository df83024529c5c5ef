"""TensorBoard's text and table of runs, read back; Weights & Biases by a stand-in that records what it is told."""

from __future__ import annotations

import sys
import types

import numpy
import pytest

from megamug.configuration import validate
from megamug.configuration.reading import load_config
from megamug.configuration.sections import Config
from megamug.errors import UserError
from megamug.telemetry import environment, trackers
from tests.telemetry.test_metrics import lines, make, values

FIRST = types.SimpleNamespace(is_first=True, size=1)


@pytest.fixture
def wandb(monkeypatch):
    """In the place of the package: `told` is what its run was told."""

    class Run:
        def __init__(self):
            self.told, self.code = [], None

        def log(self, entry):
            self.told.append(entry)

        def define_metric(self, *names, **more):
            self.told.append((names, more))

        def finish(self, exit_code):
            self.code = exit_code

    module = types.ModuleType("wandb")
    module.runs, module.asked = [], []

    def init(**options):
        module.asked.append(options)
        module.runs.append(Run())
        return module.runs[-1]

    module.init, module.Image, module.Settings = init, lambda pixels: ("image", pixels.shape), dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tensorboard_tells_what_made_the_run(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    from tensorboard.plugins.hparams import plugin_data_pb2

    config = load_config(None, ["train.steps=3", "optimizer.learning_rate=0.5", "data.train=shards"])
    with environment.life(tmp_path, FIRST):
        metrics = make(tmp_path, trackers=["tensorboard"], settings=trackers.settings(config), log_every=1)
        metrics.record(1, values(1))
        metrics.record(2, values(2))
        metrics.validation(2, {"loss": 1.5})
        metrics.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("environment/text_summary")
    assert "started" in text.tensor_proto.string_val[0].decode() and "torch" in text.tensor_proto.string_val[0].decode()
    found = {tag: plugin_data_pb2.HParamsPluginData.FromString(data)
             for tag, data in events.PluginTagToContent("hparams").items()}  # fmt: skip
    start = found["_hparams_/session_start_info"].session_start_info.hparams
    assert start["optimizer.learning_rate"].number_value == 0.5 and start["data.train"].string_value == "shards"
    assert start["model.norm_pix_loss"].number_value == 1 and start["data.tokenizer"].string_value == "null"
    wanted = {info.name.tag for info in found["_hparams_/experiment"].experiment.metric_infos}
    assert wanted == {"train/loss", "validation/loss"}  # whose curves are in the same folder: the last value is shown
    assert events.Scalars("train/loss")[-1].value == 0.5 and events.Scalars("validation/loss")[-1].value == 1.5
    assert [path.is_dir() for path in (tmp_path / "tensorboard").iterdir()] == [False]  # no run beside the run


def test_weights_and_biases(tmp_path, wandb):
    def live(resume_step: int):
        with environment.life(tmp_path / "run", FIRST):
            metrics = make(tmp_path / "run", trackers=["wandb"], settings={"train.steps": 3}, log_every=1,
                           resume_step=resume_step)  # fmt: skip
            metrics.record(resume_step + 1, values(resume_step + 1))
            metrics.validation(resume_step + 1, {"loss": 1.5, "note": "x"})
            metrics.picture(resume_step + 1, numpy.zeros((2, 4, 3), numpy.uint8))
            metrics.close()

    live(0)
    live(1)
    one, two = wandb.asked
    assert one["id"] == two["id"] and one["resume"] == "allow" and one["name"] == "run"
    assert one["config"]["train.steps"] == 3 and one["config"]["environment"][0]["versions"]
    assert one["settings"] == {"console": "off", "silent": True}
    (run, _) = wandb.runs
    told = [entry for entry in run.told if isinstance(entry, dict)]
    assert told[0]["step"] == 1 and told[0]["train/loss"] == 1.0 and "perf/data_wait" in told[0]
    assert told[1] == {"step": 1, "validation/loss": 1.5} and told[2] == {"step": 1, "picture": ("image", (2, 4, 3))}
    assert (("*",), {"step_metric": "step"}) in run.told and run.code == 0


def test_a_tracker_that_fails_takes_nothing_with_it(tmp_path, wandb, caplog):
    metrics = make(tmp_path, trackers=["wandb"], log_every=1)

    def broken(_):
        raise ConnectionError("no route")

    wandb.runs[0].log = broken
    metrics.record(1, values(1))
    metrics.record(2, values(2))
    metrics.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert sum("log.trackers: wandb fails (no route)" in message for message in caplog.messages) == 1
    wandb.init = lambda **_: broken(None)
    make(tmp_path / "other", trackers=["wandb"]).close()
    assert "log.trackers: wandb cannot be used (no route)" in caplog.text


def test_how_the_keys_relate():
    def chosen(*overrides):
        return trackers.names(load_config(None, overrides))

    assert chosen() == ["tensorboard"] and chosen("log.tensorboard=false") == []
    assert chosen("log.trackers=[wandb]") == ["wandb"] and chosen("log.trackers=[]") == []
    assert chosen("log.trackers=[wandb, tensorboard, wandb]") == ["wandb", "tensorboard"]


def test_what_cannot_be_tracked_is_told_before_anything_starts(monkeypatch):
    config = Config()
    config.log.trackers = ["wandb"]
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="log.trackers: wandb is not installed here; pip install wandb"):
        validate.trackers(config)
    config.log.trackers, config.log.tensorboard = ["tensorboard"], False
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    with pytest.raises(UserError, match="log.tensorboard is false and log.trackers has tensorboard"):
        validate.trackers(config)
    with pytest.raises(UserError, match=r"'tensorbord' is none of tensorboard, wandb; set log.trackers="):
        validate.validate(load_config(None, ["log.trackers=[tensorbord]"]), 1)
