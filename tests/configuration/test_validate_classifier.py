"""Classifiers: every impossible configuration ends in a sentence with both numbers and the fix."""

from __future__ import annotations

import pytest

from megamug.configuration import validate, validate_classifier
from megamug.configuration.counts import as_mug, visible_tokens
from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config
from megamug.errors import UserError
from tests.data.conftest import good_members, write_tar
from tests.training.classified import make_shards

PROBE = "classifier.frozen=true model.initial=somewhere "


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = make_shards(tmp_path_factory.mktemp("inputs"), {"train": 6, "heldout": 4})
    make_shards(folder, {"numbers": 6}, names=None)
    make_shards(folder, {"more": 4}, names=("red", "green", "blue", "grey"))
    return {
        "model.kind": "classifier", "data.train": str(folder / "train"), "run_dir": str(folder / "run"),
        "data.global_batch_size": "32", "data.micro_batch_size": "4",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def configured(inputs: dict[str, str], overrides: str) -> Config:
    words = [word.replace("FOLDER", inputs["data.train"].removesuffix("/train")) for word in overrides.split()]
    return load_config(None, [f"{key}={value}" for key, value in inputs.items()] + words)


def test_a_good_one_passes_and_learns_its_number_of_classes(inputs):
    config = configured(inputs, "data.validation=FOLDER/heldout")
    validate.validate(config, 1)
    assert config.classifier.classes is None
    assert validate_classifier.with_classes(config).classifier.classes == 3
    config = configured(inputs, "data.train=FOLDER/numbers classifier.classes=10")
    validate.validate(config, 1)
    assert validate_classifier.with_classes(config).classifier.classes == 10


def test_its_encoder_is_that_of_a_mug_that_sees_everything(inputs):
    config = resolve(configured(inputs, ""))
    assert visible_tokens(config) == 197 and config.model.decoder_layers is None
    assert as_mug(config).model.kind == "mug" and config.model.kind == "classifier"
    assert validate.block_count(config) == 14


@pytest.mark.parametrize("overrides, processes, told", [
    ("classifier.classes=2", 1, ["classifier.classes(2)", "the data(3)", "set classifier.classes=3"]),
    ("classifier.classes=1", 1, ["classifier.classes(1) must be"]),
    ("classifier.pool=max", 1, ["classifier.pool: 'max'", "mean, class_token, attention"]),
    ("classifier.label_smoothing=1", 1, ["classifier.label_smoothing(1"]),
    ("data.validation=FOLDER/more", 1, ["data.validation", "different classes.txt"]),
    ("data.train=FOLDER/nowhere", 1, ["data.train", "no such file or folder"]),
    ("data.image_size=100", 1, ["data.image_size(100)", "model.patch_size(16)", "set data.image_size=96"]),
    ("model.mask_ratio=0.5", 1, ["model.mask_ratio is set to 0.5", "model.kind=mug"]),
    ("data.caption_length=5", 1, ["data.caption_length is set to 5", "model.kind is classifier"]),
    ("model.kind=mug classifier.classes=3", 1, ["classifier.classes is set to 3", "model.kind is mug"]),
    ("model.heads=7 model.width=770", 1, ["model.width(770)"]),
    ("parallel.tensor=5", 5, ["model.heads(12)", "parallel.tensor(5)"]),
    ("parallel.tensor=2 parallel.sequence=true", 2, ["197", "set model.register_tokens=1"]),
    ("parallel.pipeline=16 data.global_batch_size=64", 16, ["parallel.pipeline(16)", "blocks(14)"]),
    ("precision.fp8=current precision.dtype=bf16 model.layers=2", 1, ["visible tokens(197)"]),
    ("classifier.frozen=true", 1, ["classifier.frozen(true)", "model.initial=RUN model.initial_parts=[encoder]"]),
    ("classifier.drop_path=0.1 precision.layers=te", 1, ["classifier.drop_path(0.1)", "set precision.layers=local"]),
    ("classifier.drop_path=0.1 parallel.tensor=2", 2, ["parallel.tensor(2)", "set precision.layers=local"]),
    ("classifier.mixup=0.8 data.micro_batch_size=1", 1, ["classifier.mixup(0.8)", "set data.micro_batch_size=2"]),
    ("classifier.drop_path=1", 1, ["classifier.drop_path(1"]),
    ("classifier.batch_norm=false", 1, ["classifier.batch_norm(false)", "or classifier.frozen=true"]),
    ("optimizer.name=adam", 1, ["optimizer.name: 'adam'", "set optimizer.name=adamw"]),
    ("optimizer.name=lars optimizer.beta2=0.999", 1, ["optimizer.beta2 is set to 0.999", "optimizer.name is lars"]),
    ("optimizer.name=sgd optimizer.trust_coefficient=0.1", 1, ["of optimizer.name=lars and optimizer.name is sgd"]),
    ("optimizer.momentum=0.8", 1, ["optimizer.momentum is set to 0.8", "of optimizer.name=sgd or lars"]),
    ("optimizer.name=lars optimizer.momentum=1", 1, ["optimizer.momentum(1"]),
    ("optimizer.name=lars optimizer.trust_coefficient=0", 1, ["optimizer.trust_coefficient(0"]),
    ("optimizer.name=lars parallel.distributed_optimizer=true", 1, ["is lars", "or optimizer.name=adamw"]),
    ("classifier.rand_augment=augmix-m5", 1, ["classifier.rand_augment(augmix-m5)", "rand-m9-mstd0.5-inc1"]),
    ("classifier.pool=attention", 1, ["classifier.pool(attention)", "set classifier.frozen=true"]),
    ("classifier.ema=1", 1, ["classifier.ema(1"]),
    ("classifier.ema=0.9 precision.fp8=current precision.dtype=bf16", 1, ["ema(0.9)", "fp8(current)"]),
    ("classifier.random_erasing=1.5", 1, ["classifier.random_erasing(1.5"]),
    (PROBE + "classifier.drop_path=0.1", 1, ["classifier.drop_path(0.1)", "set classifier.drop_path=0.0"]),
    (PROBE + "classifier.layer_decay=0.5", 1, ["classifier.layer_decay(0.5)", "set classifier.layer_decay=1.0"]),
    (PROBE + "parallel.pipeline=2", 2, ["parallel.pipeline(2)", "set parallel.pipeline=1"]),
    (PROBE + "parallel.cuda_graphs=true", 1, ["parallel.cuda_graphs(true)", "set parallel.cuda_graphs=false"]),
])  # fmt: skip
def test_what_cannot_work_is_told(inputs, overrides, processes, told):
    with pytest.raises(UserError) as caught:
        validate.validate(configured(inputs, overrides), processes, here="fp8" not in overrides)
    assert all(text in str(caught.value) for text in told), str(caught.value)


def test_images_without_a_class_are_refused(inputs, tmp_path):
    path = write_tar(tmp_path / "0.tar", good_members(3))
    from megamug.data.shards.indexing import index_paths

    index_paths([path], processes=1)
    with pytest.raises(UserError, match="data.train: .*3 of 3 samples without a usable label"):
        validate.validate(configured(inputs, f"data.train={path}"), 1)
