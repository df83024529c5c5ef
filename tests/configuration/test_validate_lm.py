"""Language models: every impossible configuration ends in a sentence with both numbers and the fix."""

from __future__ import annotations

import re

import pytest

from megamug.configuration import validate
from megamug.configuration.reading import load_config, resolve, save_config
from megamug.configuration.sections import Config
from megamug.errors import UserError
from tests.data.language import tiny_vocabulary, write_set

LM = "model.kind=decoder_lm model.preset=lm_tiny "
JAM = "model.kind=jam_cross model.preset=jam_demo "


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """A vocabulary of 384 padded ids and one set of tokenised documents of text."""
    folder = tmp_path_factory.mktemp("inputs")
    vocabulary = tiny_vocabulary(folder)
    text = [(vocabulary.encode_text("two triangles"), False, False)]
    write_set(folder / "documents", vocabulary, [text] * 4)
    return {
        "data.train": str(folder / "documents"), "data.tokenizer": str(vocabulary.folder),
        "run_dir": str(folder / "run"), "data.context_length": "64", "data.global_batch_size": "32",
        "data.micro_batch_size": "4",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def configured(inputs: dict[str, str], overrides: str) -> Config:
    return load_config(None, [f"{key}={value}" for key, value in inputs.items()] + overrides.split())


def refusal(inputs: dict[str, str], overrides: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        validate.validate(configured(inputs, overrides), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


GOOD = [
    (LM, 1), (JAM, 1), (LM + "parallel.tensor=2 parallel.sequence=true parallel.pipeline=2 parallel.virtual=2", 4),
    (JAM + "parallel.pipeline=2 parallel.virtual=3", 4), (LM + "parallel.pipeline=4", 4),
    (LM + "lm.positions=rotary data.context_length=8192", 1), (LM + "model.z_loss_weight=1e-4", 1),
    (LM + "lm.positions=rotary lm.rotary_scaling=[8,1,4,8192]", 1),
    (JAM + "image_tower.width=128 image_tower.heads=4 image_tower.layers=4 fusion.cross_every=4 fusion.freeze=text", 1),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "processes"), GOOD)
def test_what_can_work_passes(inputs, overrides, processes):
    validate.validate(configured(inputs, overrides), processes)


# overrides, processes, what the message must hold; the first `set KEY=VALUE` of the message mends it
BAD = [
    (LM + "lm.heads=7", 1, ["lm.width(64) is not divisible by lm.heads(7)", "set lm.width=70"]),
    (LM + "lm.query_groups=3", 1, ["lm.heads(4) is not divisible by lm.query_groups(3)", "one of 1, 2, 4"]),
    (LM + "lm.positions=rotary lm.width=68", 1, ["even head width", "lm.width(68) / lm.heads(4) = 17", "lm.width=72"]),
    (LM + "data.context_length=5000", 1, ["data.context_length(5000)", "lm.max_positions(4096)",
                                          "set data.context_length=4096"]),
    (JAM + "image_tower.max_positions=32", 1, ["data.context_length(64)", "image_tower.max_positions(32)",
                                               "set data.context_length=32"]),
    (JAM + "fusion.cross_every=7", 1, ["fusion.cross_every(7)", "layers(4)", "set fusion.cross_every=2"]),
    (JAM + "fusion.shared_embedding=true text_tower.width=96", 1,
     ["text_tower.width(96)", "image_tower.width(128)", "set fusion.shared_embedding=false"]),
    (LM + "lm.positions=rotary_grid", 1, ["lm.grid is 0", "set lm.grid=8 for 8 x 8 codes"]),
    (LM + "lm.positions=rotary_grid lm.grid=7", 1, ["data.context_length(64)", "50 positions of lm.grid(7)",
                                                    "set data.context_length=50"]),
    (LM + "lm.positions=rotary_grid lm.grid=8 lm.width=40 lm.heads=4", 1,
     ["head width divisible by 4", "lm.width(40) / lm.heads(4) = 10", "set lm.width=48"]),
    (LM + "lm.rotary_scaling=[8,1,4,8192]", 1, ["lm.rotary_scaling([8.0, 1.0", "set lm.rotary_scaling=[]"]),
    (LM + "lm.positions=rotary lm.rotary_scaling=[8,4,1,8192]", 1,
     ["lm.rotary_scaling([8.0, 4.0", "low and high frequency", "set lm.rotary_scaling=[]"]),
    (LM + "lm.positions=rotary lm.rotary_scaling=[8,1]", 1, ["lm.rotary_scaling: 4 numbers wanted, found 2"]),
    (LM + "lm.qk_norm_per_head=true", 1, ["lm.qk_norm_per_head(true)", "lm.qk_norm(false)", "set lm.qk_norm=true"]),
    (LM + "lm.query_groups=1 parallel.tensor=2", 2, ["lm.query_groups(1) is not divisible by parallel.tensor(2)",
                                                     "parallel.tensor to one of 1"]),
    (JAM + "text_tower.width=96 text_tower.heads=6 parallel.tensor=4", 4,
     ["text_tower.heads(6) is not divisible by parallel.tensor(4)", "one of 1, 2"]),
    (LM + "lm.ffn_width=255 parallel.tensor=2", 2, ["lm.ffn_width(255)", "parallel.tensor(2)", "one of 1"]),
    (LM + "data.context_length=63 parallel.tensor=2 parallel.sequence=true", 2,
     ["data.context_length(63) is not divisible by parallel.tensor(2)", "set data.context_length=62"]),
    (LM + "parallel.pipeline=5", 5, ["parallel.pipeline(5) is more than the model's blocks(4)", "at most 4"]),
    (LM + "parallel.virtual=2", 1, ["parallel.virtual(2)", "parallel.pipeline is 1", "set parallel.virtual=1"]),
    (LM + "parallel.pipeline=2 parallel.virtual=3", 2, ["parallel.virtual(3) = 6", "blocks(4)",
                                                        "set parallel.virtual=2"]),
    (LM + "parallel.pipeline=2 parallel.virtual=2 data.global_batch_size=12", 2,
     ["data.global_batch_size(12) / (data.micro_batch_size(4) x data-parallel ranks(1)) = 3",
      "parallel.pipeline(2)", "set data.global_batch_size=16"]),
    (LM + "data.tokenizer=null", 1, ["data.tokenizer is not set", "megamug data vocabulary"]),
    (LM + "data.tokenizer=/absent", 1, ["data.tokenizer: /absent", "megamug data vocabulary"]),
    (LM + "data.train=null", 1, ["data.train is not set", "megamug data documents"]),
    (LM + "data.train=/absent", 1, ["data.train: /absent", "megamug data documents"]),
    (LM + "data.validation=/absent", 1, ["data.validation: /absent"]),
    (LM + "data.loss_on=image", 1, ["data.loss_on(image)", "0 segments", "set data.loss_on=all"]),
    (LM + "data.loss_on=response", 1, ["data.loss_on(response)", "set data.loss_on=all"]),
    (LM + "data.image_size=64", 1, ["data.image_size is set to 64", "model.kind=mug", "leave data.image_size out"]),
    (LM + "model.layers=3", 1, ["model.layers is set to 3", "model.kind is decoder_lm"]),
    (LM + "text_tower.width=32", 1, ["text_tower.width is set to 32", "model.kind=jam_cross"]),
    (JAM + "lm.layers=3", 1, ["lm.layers is set to 3", "set model.kind=decoder_lm"]),
    ("data.loss_on=text", 1, ["data.loss_on is set to 'text'", "model.kind=decoder_lm or jam_cross"]),
    ("model.z_loss_weight=0.1", 1, ["model.z_loss_weight is set to 0.1", "model.kind is mug"]),
    (LM + "lm.norm=batchnorm", 1, ["lm.norm: 'batchnorm' is none of layernorm, layernorm_plain, rmsnorm"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "processes", "parts"), BAD)
def test_what_cannot_work_is_told(inputs, overrides, processes, parts):
    if "model.kind" not in overrides:  # of mug: the keys above are another kind's
        inputs = {key: value for key, value in inputs.items() if key != "data.context_length"}
    message = refusal(inputs, overrides, processes)
    for part in parts:
        assert part in message, message
    fix = re.search(r"set ((?:lm|data|fusion|parallel)\.\w+=[\w.]+)", message)
    if fix and "/absent" not in message and "parallel.tensor=" not in fix[1]:
        validate.validate(configured(inputs, f"{overrides} {fix[1]}"), processes)


def test_documents_of_another_vocabulary(inputs, tmp_path):
    other = tiny_vocabulary(tmp_path, sentinels=9)
    message = refusal(inputs, LM + f"data.tokenizer={other.folder}")
    assert "was tokenised with another vocabulary" in message and other.fingerprint()[:12] in message
    assert f"set data.tokenizer={inputs['data.tokenizer']}" in message


def test_a_run_of_another_model_is_not_continued(inputs, tmp_path):
    inputs = inputs | {"run_dir": str(tmp_path / "run")}
    save_config(resolve(configured(inputs, LM)))
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    validate.validate(configured(inputs, LM), 1)
    assert "lm.layers was 2 and is now 3" in refusal(inputs, LM + "lm.layers=3")
    assert "lm.bias was false and is now true" in refusal(inputs, LM + "lm.bias=true")
    assert "model.kind was decoder_lm and is now jam_cross" in refusal(inputs, JAM)


def test_block_counts_are_those_of_the_models():
    from megamug.models.jam.plan import JamPlan
    from megamug.models.language.plan import LmPlan

    for kind, plan in ((LM, LmPlan), (JAM + "image_tower.layers=9", JamPlan)):
        config = resolve(load_config(None, kind.split()))
        assert validate.block_count(config) == len(plan(config, 300).blocks)


@pytest.mark.parametrize(("model", "change", "said"), [
    (LM, "lm.norm_eps=1e-3", "lm.norm_eps was 1e-05 and is now 0.001"),
    (LM, "data.loss_on=text", "data.loss_on was all and is now text"),
    (JAM, "image_tower.norm_eps=1e-3", "image_tower.norm_eps was 1e-05 and is now 0.001"),
])  # fmt: skip
def test_run_folder_whose_weights_would_mean_something_else(inputs, tmp_path, model, change, said):
    save_config(resolve(configured(inputs, f"{model}run_dir={tmp_path}")))
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    told = refusal(inputs, f"{model}run_dir={tmp_path} {change}")
    assert f"holds checkpoints whose loss, optimizer or function is another: {said}; set" in told
