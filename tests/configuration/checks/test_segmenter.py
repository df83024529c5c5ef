"""Segmenters: every impossible configuration ends in a sentence with both numbers and the fix."""

from __future__ import annotations

import pytest

from megamug.configuration import validate
from megamug.configuration.checks import segmenter
from megamug.configuration.counts import as_mug, segmenter_blocks, visible_tokens
from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config
from megamug.errors import UserError
from tests.data.conftest import good_members, write_tar
from tests.training.segmentation.made import make_shards


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = make_shards(tmp_path_factory.mktemp("inputs"), {"train": 6, "heldout": 4}, names=False)
    make_shards(folder, {"named": 4})
    make_shards(folder, {"zero": 8}, reduce_zero=True)
    return {
        "model.kind": "segmenter", "data.train": str(folder / "train"), "run_dir": str(folder / "run"),
        "data.global_batch_size": "32", "data.micro_batch_size": "4",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def configured(inputs: dict[str, str], overrides: str) -> Config:
    words = [word.replace("FOLDER", inputs["data.train"].removesuffix("/train")) for word in overrides.split()]
    return load_config(None, [f"{key}={value}" for key, value in inputs.items()] + words)


def test_a_good_one_passes_and_learns_what_is_null(inputs):
    config = configured(inputs, "data.validation=FOLDER/heldout")
    validate.validate(config, 1)
    own = segmenter.filled(resolve(config)).segmenter
    assert (own.classes, own.blocks, own.position_image_size) == (4, [3, 5, 7, 11], 224)
    config = resolve(configured(inputs, "data.train=FOLDER/zero segmenter.reduce_zero_label=true segmenter.classes=9"))
    validate.validate(config, 1)
    assert segmenter.filled(config).segmenter.classes == 9
    assert visible_tokens(config) == 197 and as_mug(config).model.kind == "mug" and validate.block_count(config) == 14


def test_blocks_are_those_of_published_recipes(inputs):
    for preset, blocks in {"vit_b16": (3, 5, 7, 11), "vit_l16": (7, 11, 15, 23)}.items():
        assert segmenter_blocks(resolve(configured(inputs, f"model.preset={preset}"))) == blocks


@pytest.mark.parametrize("overrides, processes, told", [
    ("segmenter.classes=3", 1, ["segmenter.classes(3)", "the data(4)", "set segmenter.classes=4"]),
    ("segmenter.classes=256", 1, ["segmenter.classes(256) must be"]),
    ("data.train=FOLDER/zero", 1, ["values up to 4, which are 5 classes", "classes.txt names 4",
                                   "set segmenter.reduce_zero_label=true"]),
    ("data.validation=FOLDER/named", 1, ["data.validation", "different classes.txt"]),
    ("segmenter.blocks=[3,5,7]", 1, ["segmenter.blocks: 4 numbers wanted"]),
    ("segmenter.blocks=[2,5,8,10]", 1, ["blocks([2, 5, 8, 10])", "(11)", "set segmenter.blocks=[3, 5, 7, 11]"]),
    ("segmenter.blocks=[5,3,7,11]", 1, ["segmenter.blocks([5, 3, 7, 11])", "in their order"]),
    ("segmenter.pool_scales=[]", 1, ["segmenter.pool_scales is empty"]),
    ("segmenter.scale=[2,1]", 1, ["segmenter.scale: 2.0 is above 1.0", "set segmenter.scale=[1.0, 2.0]"]),
    ("segmenter.position_image_size=100", 1, ["image_size(100)", "set segmenter.position_image_size=96"]),
    ("data.image_size=16", 1, ["data.image_size(16) makes one patch", "set data.image_size=128"]),
    ("data.crop_scale=[0.1,1]", 1, ["data.crop_scale is set", "model.kind is segmenter"]),
    ("classifier.classes=3", 1, ["classifier.classes is set to 3", "model.kind is segmenter"]),
    ("parallel.pipeline=2", 2, ["parallel.pipeline(2) does not go with", "set parallel.pipeline=1"]),
    ("parallel.cuda_graphs=true", 1, ["parallel.cuda_graphs(true)", "set parallel.cuda_graphs=false"]),
    ("precision.layers=te", 1, ["precision.layers(te) asks for them", "set precision.layers=local"]),
    ("precision.fp8=current precision.dtype=bf16", 1, ["precision.fp8(current) asks for them"]),
    ("parallel.tensor=2", 2, ["parallel.tensor(2)", "set precision.layers=local"]),
    ("data.micro_batch_size=1 data.global_batch_size=1", 1, ["micro_batch_size(1)", "set data.micro_batch_size=2"]),
    ("model.initial_parts=[text_decoder] model.initial=somewhere", 1, ["no text_decoder (it is a segmenter)"]),
])  # fmt: skip
def test_what_cannot_work_is_told(inputs, overrides, processes, told):
    with pytest.raises(UserError) as caught:
        validate.validate(configured(inputs, overrides), processes, here="fp8" not in overrides)
    assert all(text in str(caught.value) for text in told), str(caught.value)


def test_one_image_for_each_of_two_replicas_is_enough(inputs):
    validate.sizes(resolve(configured(inputs, "data.micro_batch_size=1 data.global_batch_size=2")), 2)


def test_images_without_a_map_are_refused(inputs, tmp_path):
    path = write_tar(tmp_path / "0.tar", good_members(3))
    from megamug.data.shards.indexing import index_paths

    index_paths([path], processes=1)
    with pytest.raises(UserError, match="data.train: .*3 of 3 samples without a usable map"):
        validate.validate(configured(inputs, f"data.train={path}"), 1)


def test_positions_are_those_of_the_run_it_starts_from_or_said(inputs, tmp_path):
    from megamug.configuration.reading import to_yaml

    run = tmp_path / "mug"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    wanted = f"data.image_size=512 segmenter.classes=4 model.initial={run}"
    with pytest.raises(UserError, match="has no config.yaml .* set segmenter.position_image_size"):
        segmenter.filled(resolve(configured(inputs, wanted)))
    (run / "config.yaml").write_text(to_yaml(load_config(None, ["data.image_size=192"])))
    for initial in (run, run / "checkpoints" / "step-00000001"):
        config = resolve(configured(inputs, f"{wanted} model.initial={initial}"))
        assert segmenter.filled(config).segmenter.position_image_size == 192
    config = resolve(configured(inputs, f"{wanted} segmenter.position_image_size=224"))
    assert segmenter.filled(config).segmenter.position_image_size == 224
    (run / "config.yaml").write_text(to_yaml(load_config(None, ["data.image_size=210", "model.preset=vit_h14"])))
    with pytest.raises(UserError, match=r"segmenter.position_image_size\(210\) is not divisible"):
        segmenter.filled(resolve(configured(inputs, wanted)))
