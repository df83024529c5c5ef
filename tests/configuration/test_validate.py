"""Every impossible configuration ends in a sentence with both numbers and the fix; following the fix mends it."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from megamug.configuration import ranges, validate
from megamug.configuration.reading import keys, load_config, resolve, save_config
from megamug.configuration.sections import Config
from megamug.errors import UserError


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> dict[str, str]:
    """A folder with one indexed shard, a tokenizer of 300 pieces (384 padded), and a run folder that is not there."""
    from PIL import Image

    from megamug.data.pairs.text import train_tokenizer
    from megamug.data.shards.verify import index_shard

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "shards").mkdir()
    png = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(png, "PNG")
    with tarfile.open(folder / "shards" / "0.tar", "w") as shard:
        for name, content in (("a.png", png.getvalue()), ("a.txt", b"a red square")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    index_shard(folder / "shards" / "0.tar")
    captions = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("square", "disc", "star")]
    train_tokenizer(captions * 20, folder / "tokenizer.model", 300)
    return {
        "data.train": str(folder / "shards"), "data.tokenizer": str(folder / "tokenizer.model"),
        "run_dir": str(folder / "run"), "model.preset": "demo", "data.image_size": "64",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def configured(inputs: dict[str, str], *overrides: str) -> Config:
    return load_config(None, [f"{key}={value}" for key, value in inputs.items()] + list(overrides))


def refusal(inputs: dict[str, str], overrides: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        validate.validate(configured(inputs, *overrides.split()), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("key, value, said", [
    ("train.steps", 2**63, "train.steps(9223372036854775808) must be at most 2147483647"),
    ("train.steps", -5, "train.steps(-5) must be at least 1"),
    ("data.threads", 2**31, "data.threads(2147483648) must be at most"),
    ("run_dir", " ", "run_dir is empty; leave it out, or set run_dir=null where it may be unset"),
    ("data.tokenizer", "", "data.tokenizer is empty"),
    ("run_dir", "a\0b", "run_dir: 'a\\x00b' holds a control character"),
    ("data.train", [{"path": "a"}, {"path": ""}], "data.train is empty"),
    ("data.train", [{"path": "a\nb"}], "holds a control character"),
])  # fmt: skip
def test_values_that_no_key_can_hold(key, value, said):
    """Of the right type: the first and the last ones ended in tracebacks of C++ and of paths."""
    config, (section, _, name) = configured({}), key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(UserError) as caught:
        ranges.check_values(config)
    assert said in str(caught.value)


# overrides of the demo model at 64 pixels (64 patches, 16 visible), processes, what the message must hold
BAD = [
    ("parallel.tensor=2 parallel.pipeline=2 parallel.data=4", 8,
     ["parallel: tensor(2) x pipeline(2) x data(4) = 16 but WORLD_SIZE is 8", "set parallel.data=2"]),
    ("parallel.tensor=2", 1, ["tensor(2) x pipeline(1) = 2 but WORLD_SIZE is 1", "set parallel.tensor=1"]),
    ("parallel.tensor=2 parallel.pipeline=3", 4, ["= 6 but WORLD_SIZE is 4",
                                                  "set parallel.tensor=2 parallel.pipeline=1"]),
    ("data.global_batch_size=32 data.micro_batch_size=64", 1,
     ["data.micro_batch_size(64) is larger than data.global_batch_size(32)", "set data.micro_batch_size=32"]),
    ("data.global_batch_size=96 data.micro_batch_size=36", 2,
     ["global_batch_size(96)", "micro_batch_size(36) x data-parallel ranks(2) = 72", "set data.micro_batch_size=24"]),
    ("data.global_batch_size=100 data.micro_batch_size=8", 3,
     ["global_batch_size(100)", "= 24", "set data.global_batch_size=120"]),
    ("parallel.tensor=4", 4, ["model.heads(6) is not divisible by parallel.tensor(4)", "one of 1, 2"]),
    ("parallel.tensor=6 model.text_heads=6 model.decoder_heads=4", 6,
     ["model.decoder_heads(4) is not divisible by parallel.tensor(6)", "one of 1, 2"]),
    ("parallel.tensor=4 model.heads=4 model.decoder_heads=4", 4,
     ["model.text_heads(6) is not divisible by parallel.tensor(4)"]),
    ("parallel.tensor=2 model.ffn_width=769", 2, ["model.ffn_width(769)", "parallel.tensor(2)", "one of 1"]),
    ("parallel.tensor=9 model.heads=9 model.width=36 model.ffn_width=72 model.caption_loss_weight=0.1"
     " model.image_loss_weight=0 model.text_heads=9 model.text_width=36 data.global_batch_size=32", 9,
     ["padded to a multiple of 128 (384)", "parallel.tensor(9)", "one of 1, 3"]),
    ("parallel.tensor=2 parallel.sequence=true", 2,
     ["1 class + 0 register + 16 visible patches = 17", "parallel.tensor(2)", "set model.register_tokens=1"]),
    ("parallel.tensor=2 parallel.sequence=true model.register_tokens=1", 2,
     ["1 class + 0 register + 64 patches = 65", "set model.decoder_register_tokens=1"]),
    ("parallel.tensor=2 parallel.sequence=true model.register_tokens=1 model.decoder_register_tokens=1"
     " data.caption_length=15", 2, ["data.caption_length(15)", "parallel.tensor(2)", "set data.caption_length=16"]),
    ("parallel.sequence=true", 1, ["parallel.tensor is 1", "set parallel.sequence=false"]),
    ("parallel.overlap_param_gather=true", 1, ["set parallel.distributed_optimizer=true"]),
    ("data.image_size=60", 1, ["data.image_size(60) is not divisible by model.patch_size(8)", "data.image_size=64"]),
    ("model.mask_ratio=0.99", 1, ["model.mask_ratio(0.99) leaves 0 of 64 patches visible", "model.mask_ratio=0.984"]),
    ("model.mask_ratio=0", 1, ["model.mask_ratio(0.0) hides 0 of 64 patches", "set model.mask_ratio=0.75"]),
    ("model.text_mask_ratio=0.5", 1, ["model.text_mask_ratio(0.5)", "model.text_objective(autoregressive) hides none",
                                      "set model.text_objective=masked"]),
    ("model.text_objective=mask", 1, ["model.text_objective: 'mask' is none of autoregressive, masked", "=masked"]),
    ("data.image_size=8", 1, ["data.image_size(8) makes one patch", "set data.image_size=64"]),
    ("model.image_loss_weight=0 model.caption_loss_weight=0", 1, ["nothing to learn", "set one of them above 0"]),
    ("model.heads=7", 1, ["model.width(192) is not divisible by model.heads(7)", "set model.width=196"]),
    ("model.width=6 model.heads=6", 1, ["model.width(6) is not divisible by 4", "set model.width=12"]),
    ("model.decoder_heads=3", 1, ["model.decoder_width(128) is not divisible by model.decoder_heads(3)", "=132"]),
    ("model.text_heads=5", 1, ["model.text_width(192) is not divisible by model.text_heads(5)", "=195"]),
    ("parallel.pipeline=19 model.caption_loss_weight=0", 19,
     ["parallel.pipeline(19) is more than the model's blocks(11)", "at most 11"]),
    ("parallel.pipeline=2 parallel.virtual=6 model.caption_loss_weight=0", 2,
     ["parallel.pipeline(2) x parallel.virtual(6) = 12 is more than the model's blocks(11)", "set parallel.virtual=5"]),
    ("train.steps=10 optimizer.warmup_steps=20", 1, ["warmup_steps(20) is more than train.steps(10)", "steps=1"]),
    ("optimizer.min_learning_rate=1", 1, ["min_learning_rate(1) is above optimizer.learning_rate(0.00015)"]),
    ("data.train=null", 1, ["data.train is not set"]),
    ("data.train=/absent/shards", 1, ["data.train: /absent/shards: no such file or folder"]),
    ("data.train=/absent/*.tar", 1, ["data.train: /absent/*.tar: ", "matches"]),
    ("data.captions=shuffled", 1, ["data.captions: shuffled, but ", "has 1 sample; there is no other"]),
    ("data.captions=shuffled model.caption_loss_weight=0", 1, ["data.captions is shuffled, but", "no caption is read"]),
    ("data.train=[]", 1, ["data.train: data: an empty list"]),
    ("data.validation=/absent", 1, ["data.validation: /absent"]),
    ("data.tokenizer=null", 1, ["data.tokenizer is not set and model.caption_loss_weight is 0.1", "data tokenizer"]),
    ("data.tokenizer=/absent.model", 1, ["data.tokenizer: there is no file /absent.model", "megamug data tokenizer"]),
    ("data.tokenizer=" + __file__, 1, ["data.tokenizer: ", "not a SentencePiece model"]),
    ("model.kind=mugg", 1, ["model.kind: 'mugg'", "set model.kind=mug"]),
    ("model.preset=dem", 1, ["no preset 'dem'", "'demo'"]),
    ("precision.dtype=bf32", 1, ["precision.dtype: 'bf32'", "set precision.dtype="]),
    ("data.mean=[0.5]", 1, ["data.mean: 3 numbers wanted, found 1"]),
    ("data.crop_scale=[1,0.2]", 1, ["1.0 is above 0.2", "set data.crop_scale=[0.2, 1.0]"]),
    ("precision.layers=te", 1, ["precision.layers(te) needs", "set precision.layers=auto"]),
    ("precision.fp8=delayed", 1, ["precision.fp8(delayed) needs", "precision.fp8=none"]),
    ("precision.fp8=delayed precision.layers=local", 1, ["precision.fp8(delayed) needs", "precision.fp8=none"]),
]  # fmt: skip


def test_the_valid_configuration_passes(inputs):
    validate.validate(configured(inputs), 1)
    validate.validate(configured(inputs), 8)
    validate.validate(configured(inputs, "parallel.tensor=2", "parallel.pipeline=2", "parallel.data=2"), 8)
    validate.validate(configured(inputs, "model.caption_loss_weight=0", "data.tokenizer=null"), 1)
    validate.validate(configured(inputs, "model.image_loss_weight=0", "model.mask_ratio=0"), 1)
    assert not Path(inputs["run_dir"]).exists()  # looking changes nothing


def test_a_stage_may_be_one_block(inputs):
    blocks = "model.caption_loss_weight=0 model.layers=7 "  # 12 with the decoder's, two embeddings and a head
    for stages, processes in (("parallel.pipeline=2 parallel.virtual=6", 2), ("parallel.pipeline=12", 12)):
        validate.validate(configured(inputs, *(blocks + stages).split()), processes)
    with pytest.raises(UserError, match=r"13\) is more than the model's blocks\(12\)"):
        validate.validate(configured(inputs, *(blocks + "parallel.pipeline=13").split()), 13)


@pytest.mark.parametrize(("overrides", "world_size", "said"), BAD, ids=[overrides for overrides, _, _ in BAD])
def test_refusals(inputs, overrides, world_size, said):
    if "precision.layers=te" in overrides or "precision.fp8" in overrides:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU, where Transformer Engine may be right")
    message = refusal(inputs, overrides, world_size)
    for part in said:
        assert part in message

    # `set section.key=value` in a message can be pasted behind the command; of several ways out, each one works.
    for way_out in re.split(r",? or (?:set )?", message.rpartition("; ")[2]):
        fix = re.findall(r"\b[a-z]+\.[a-z0-9_]+=(?:\[.*?\]|[^\s;,]+)", way_out)
        if fix and "FILE" not in message:
            try:
                validate.validate(configured(inputs, *overrides.split(), *fix), world_size)
            except UserError as error:
                assert str(error).partition(")")[0] != message.partition(")")[0], f"{fix} does not mend: {error}"


@pytest.mark.parametrize("key", ranges.RANGES)
def test_every_range_is_enforced_at_both_ends(inputs, key):
    bounds = ranges.RANGES[key]
    number = int if keys()[key] in (int, int | None, list[int], list[int] | None) else float
    outside = [bounds.low if bounds.open_low else bounds.low - 1]
    if bounds.high != math.inf:
        outside.append(bounds.high if bounds.open_high else bounds.high + 1)
    for value in outside:
        is_list = key in ranges.LENGTHS or key == "segmenter.pool_scales"
        value = [number(value)] * ranges.LENGTHS.get(key, 1) if is_list else number(value)
        assert f"{key}(" in refusal(inputs, f"{key}={str(value).replace(' ', '')}")


def test_every_number_has_a_range_and_every_word_its_choices():
    words = {"run_dir", "model.preset", "model.initial", "model.initial_parts", "data.train", "data.validation",
             "data.tokenizer", "log.trackers", "classifier.rand_augment"}  # fmt: skip
    for key, kind in keys().items():
        if bool in (kind, *get_args(kind)) or key in words:
            continue
        assert key in (ranges.CHOICES if str in (kind, *get_args(kind)) else ranges.RANGES), key
    assert set(ranges.RANGES) | set(ranges.CHOICES) | set(ranges.LENGTHS) <= set(keys())


@pytest.mark.parametrize("side", range(2, 40))
def test_the_proposed_mask_ratio_leaves_a_patch_visible(inputs, side):
    config = resolve(configured(inputs, f"data.image_size={8 * side}", "model.mask_ratio=0.99999"))
    with pytest.raises(UserError) as caught:
        validate.image(config)
    config.model.mask_ratio = float(str(caught.value).rpartition("=")[2])
    assert 1 <= validate.visible_patches(config) <= 2


@pytest.mark.parametrize("preset", ["demo", "vit_b16", "vit_h14"])
@pytest.mark.parametrize("weights", [(1, 0.1), (1, 0), (0, 1)])
def test_token_and_block_counts_are_those_of_the_model(preset, weights):
    from megamug.models.mug.plan import MugPlan

    config = resolve(load_config(None, [f"model.preset={preset}", "model.register_tokens=3"]))
    config.model.decoder_register_tokens = 2
    config.model.image_loss_weight, config.model.caption_loss_weight = weights
    plan = MugPlan(config, vocabulary=1000)
    assert plan.visible == validate.visible_patches(config) and plan.patches == validate.patch_count(config)
    assert plan.latent_tokens == validate.visible_tokens(config)
    assert plan.decoder_tokens == validate.decoder_tokens(config)
    assert len(plan.blocks) == validate.block_count(config), Counter(block.part for block in plan.blocks)
    assert plan.padded_vocabulary == 1024 and plan.padded_vocabulary % validate.VOCABULARY_MULTIPLE == 0


def test_run_folder_that_is_a_file_or_lies_below_one(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is a file; set run_dir" in refusal(inputs, f"run_dir={tmp_path / 'file'}")
    assert "which is a file; set run_dir" in refusal(inputs, f"run_dir={tmp_path / 'file' / 'run'}")


def test_run_folder_that_is_not_writable(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert f"{tmp_path} is not writable" in refusal(inputs, f"run_dir={tmp_path / 'a' / 'b'}")


def test_run_folder_of_another_model(inputs, tmp_path):
    run = configured(inputs, f"run_dir={tmp_path}")
    save_config(resolve(run))
    here = f"run_dir={tmp_path} "
    validate.validate(configured(inputs, *(here + "model.layers=2").split()), 1)  # no checkpoint yet: nothing to lose
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert "model.layers was 6 and is now 2; set run_dir to a new folder" in refusal(inputs, here + "model.layers=2")
    assert "model.caption_loss_weight above 0 was True" in refusal(inputs, here + "model.caption_loss_weight=0")
    assert "data.image_size was 64 and is now 128" in refusal(inputs, here + "data.image_size=128")
    assert "model.text_objective was autoregressive and is now masked" in refusal(
        inputs, here + "model.text_objective=masked")  # fmt: skip
    longer = "train.steps=5 optimizer.learning_rate=1 model.caption_loss_weight=0.2 model.mask_ratio=0.5"
    validate.validate(configured(inputs, *(here + longer).split()), 1)  # the same model, trained otherwise
    validate.validate(configured(inputs, *(here + "parallel.tensor=2 parallel.pipeline=2").split()), 4)  # moved


@pytest.mark.parametrize(("change", "said"), [
    ("model.norm_pix_loss=false", "model.norm_pix_loss was True and is now False"),
    ("model.layer_norm_eps=1e-5", "model.layer_norm_eps was 1e-06 and is now 1e-05"),
    ("data.mean=[0.5,0.5,0.5]", "data.mean was [0.485, 0.456, 0.406] and is now [0.5, 0.5, 0.5]"),
    ("data.std=[0.5,0.5,0.5]", "data.std was [0.229, 0.224, 0.225] and is now [0.5, 0.5, 0.5]"),
    ("data.fraction=0.5", "data.fraction was 1.0 and is now 0.5"),
])  # fmt: skip
def test_run_folder_whose_weights_would_mean_something_else(inputs, tmp_path, change, said):
    save_config(resolve(configured(inputs, f"run_dir={tmp_path}")))
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    told = refusal(inputs, f"run_dir={tmp_path} {change}")
    assert f"holds checkpoints whose loss, optimizer or function is another: {said}; set" in told
    assert f"run_dir to a new folder and model.initial={tmp_path} to start from these weights" in told
    validate.validate(configured(inputs, f"run_dir={tmp_path / 'new'}", change), 1)


def test_more_processes_than_gpus(inputs, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "4 processes on this machine but 2 GPUs" in refusal(inputs, "", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    validate.validate(configured(inputs), 2)


def test_validation_does_not_change_its_argument(inputs):
    config = configured(inputs)
    before = dataclasses.asdict(config)
    validate.validate(config, 1)
    assert dataclasses.asdict(config) == before


def test_images_without_captions(inputs, tmp_path):
    from megamug.data.shards.indexing import index_paths

    with tarfile.open(Path(inputs["data.train"]) / "0.tar") as whole, tarfile.open(tmp_path / "x.tar", "w") as alone:
        member = whole.getmember("a.png")
        alone.addfile(member, whole.extractfile(member))
    index_paths([tmp_path / "x.tar"], processes=1)
    for key in ("data.train", "data.validation"):
        message = refusal(inputs, f"{key}={tmp_path}")
        assert message.startswith(f"{key}: {tmp_path}: none of 1 sample has a caption")
        assert "model.caption_loss_weight is 0.1; set model.caption_loss_weight=0" in message
    validate.validate(configured(inputs, f"data.train={tmp_path}", "model.caption_loss_weight=0"), 1)
