"""Every example configuration passes a dry run for its number of processes; its token counts are those that tensor
parallelism and FP8 want."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from megamug import cli
from megamug.configuration import validate
from megamug.configuration.counts import segmenter_blocks
from megamug.configuration.reading import load_config, resolve
from megamug.models.mug.plan import MugPlan
from megamug.models.tasks import model_of
from megamug.planner import parameters
from tests.data.language import some_documents, tiny_vocabulary, write_set
from tests.distributed.launch import ROOT
from tests.evaluate.tiny_run import make_data
from tests.training.classified import coloured, make_shards
from tests.training.segmentation import made

EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.parent.name != "studies")
CONFIGURATIONS = [path for path in EXAMPLES if path.parent.name != "cluster"]
CLASSIFIERS = [path for path in CONFIGURATIONS if path.stem.startswith(("finetune", "probe"))]
SEGMENTERS = [path for path in CONFIGURATIONS if path.stem == "segment_vit_b16"]
MUG = [path for path in CONFIGURATIONS if path.parent.name == "mug" and path not in CLASSIFIERS + SEGMENTERS]
LARGE_JAM = sorted((ROOT / "examples" / "jam").glob("jam_2x*.yaml"))
LAUNCHING = (ROOT / "docs" / "launching.md").read_text()
EXPECTED = {"vit_b16_1gpu", "vit_l16_1gpu", "vit_l16_8gpu", "vit_h14_8gpu", "vit_g14_64node", "vit_s16_cpu", "demo"}
# Published sizes of the encoders in millions (patch embedding, class token, layers, final norm).
ENCODERS = {"vit_s16": 21.6, "vit_b16": 85.6, "vit_l16": 303.1, "vit_h14": 630.8, "vit_g14": 1011.2}


def processes(path: Path) -> int:
    """As the file's name says: one without."""
    found = re.search(r"_(\d+)(gpu|node)$", path.stem)
    return int(found[1]) * (8 if found[2] == "node" else 1) if found else 1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shards and a tokenizer for pairs, labelled shards; documents and a vocabulary for language models."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    vocabulary = tiny_vocabulary(folder)
    write_set(folder / "documents", vocabulary, some_documents(vocabulary, 8))
    make_shards(folder / "labelled", {"train": 6})
    made.make_shards(folder / "mapped", {"train": 6}, reduce_zero=True, names=False)
    return folder


def overrides(path: Path, data: Path) -> list[str]:
    if path in CLASSIFIERS:
        without = [] if importlib.util.find_spec("timm") else ["classifier.rand_augment=null"]
        return [f"data.train={data / 'labelled' / 'train'}", "data.validation=null", "model.initial=somewhere",
                "classifier.classes=1000", f"run_dir={data / 'run'}", *without]  # fmt: skip
    if path in SEGMENTERS:
        return [f"data.train={data / 'mapped' / 'train'}", "model.initial=somewhere", "segmenter.classes=150",
                f"run_dir={data / 'run'}"]  # fmt: skip
    if path.parent.name in ("mug", "transfer"):
        sources, tokenizer = data / "data" / "train", data / "tokenizer.model"
    else:
        sources, tokenizer = data / "documents", data / "vocabulary"
    return [f"data.train={sources}", "data.validation=null", f"data.tokenizer={tokenizer}", f"run_dir={data / 'run'}"]


def dry_run(path: Path, data: Path, capsys, *more: str) -> str:
    words = ["train", str(path), *overrides(path, data), *more, "--dry-run", "--world-size", str(processes(path))]
    code = cli.main(words)
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out


def test_there_is_an_example_of_every_scale():
    assert {path.stem for path in MUG} == EXPECTED
    assert {path.stem for path in LARGE_JAM} == {"jam_2x350m_1gpu", "jam_2x350m_8gpu", "jam_2x7b_64node"}
    assert {processes(path) for path in MUG} == {processes(path) for path in LARGE_JAM} == {1, 8, 512}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_an_example_passes_a_dry_run_of_its_number_of_processes(path, data, capsys):
    told = dry_run(path, data, capsys)
    assert f"processes  {processes(path)} = " in told
    config = resolve(load_config(path))
    stage = re.search(r"stage 0  ([\d.]+) = .*; ([\d.]+) M parameters", told)
    assert 0 < float(stage[1]) < 70  # GiB that live as long as the run: an 80 GB GPU holds them
    if config.model.preset in ENCODERS:
        assert float(re.search(r"parameters ([\d.]+) M", told)[1]) > ENCODERS[config.model.preset]
    assert not (data / "run").exists()


@pytest.mark.parametrize("path", [path for path in MUG if processes(path) > 1 or "gpu" in path.stem],
                         ids=lambda path: path.stem)  # fmt: skip
@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise"])
def test_token_counts_fit_tensor_parallelism_and_fp8(path, recipe, data, capsys):
    config = resolve(load_config(path))
    for tokens in (validate.visible_tokens(config), validate.decoder_tokens(config)):
        assert tokens % 8 == 0 and tokens * config.data.micro_batch_size % 16 == 0
    more = (f"precision.fp8={recipe}",)
    if processes(path) > 1:
        more += ("parallel.tensor=4", "parallel.sequence=true")
    assert f"fp8 {recipe}" in dry_run(path, data, capsys, *more)


@pytest.mark.parametrize("path", MUG, ids=lambda path: path.stem)
def test_rates_follow_the_recipe_of_mug(path):
    """MAE's and MUG's base rate of 1.5e-4 for 256 pairs, up to the batch of 4096 that it was shown for."""
    config = load_config(path)
    if path.stem in ("demo", "vit_s16_cpu"):
        return  # small batches of small models
    scaled = 1.5e-4 * min(config.data.global_batch_size, 4096) / 256
    assert config.optimizer.learning_rate == pytest.approx(scaled)
    assert config.precision.dtype == "bf16" and config.checkpoint.every > 0


def test_classifiers_follow_the_recipes_of_mae_and_moco_v3():
    """Base rates are for 256 images, epochs of ImageNet-1k."""
    names = "finetune_vit_b16", "probe_vit_b16", "probe_sgd_vit_b16"
    recipes = [load_config(ROOT / "examples" / "mug" / f"{name}.yaml") for name in names]
    for config, batch, rate, epochs, warm_up in zip(
        recipes, (1024, 16384, 1024), (5e-4, 0.1, 3), (100, 90, 90), (5, 10, 0), strict=True
    ):
        assert config.data.global_batch_size == batch
        assert config.optimizer.learning_rate == pytest.approx(rate * batch / 256)
        epoch = 1_281_167 // batch
        assert (config.train.steps, config.optimizer.warmup_steps) == (epochs * epoch, warm_up * epoch)
        assert config.data.crop_scale == [0.08, 1.0] and config.optimizer.clip_grad == 0
    tuned, *probes = recipes
    assert tuned.optimizer.beta2 == 0.999 and tuned.optimizer.weight_decay == 0.05
    own = tuned.classifier
    assert own.rand_augment == "rand-m9-mstd0.5-inc1" and own.random_erasing == 0.25
    assert (own.drop_path, own.layer_decay, own.mixup, own.cutmix, own.label_smoothing) == (0.1, 0.65, 0.8, 1.0, 0.1)
    for probe, optimizer, norm in zip(probes, ("lars", "sgd"), (True, False), strict=True):
        assert probe.classifier.frozen and probe.classifier.pool == "class_token" and probe.optimizer.weight_decay == 0
        assert (probe.optimizer.name, probe.optimizer.momentum) == (optimizer, 0.9)
        assert probe.classifier.batch_norm == norm and probe.classifier.label_smoothing == 0


def test_fine_grained_data_become_classes_and_have_epochs_of_the_recipe(data, capsys, tmp_path):
    """The table of docs/transfer.md, and its commands on a made list of the kind that iNaturalist publishes."""
    page = (ROOT / "docs" / "transfer.md").read_text()
    rows = re.findall(r"^\| [\w -]+ \| ([\d,]+), ([\d,]+) \| `([\w.]+)` \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for images, _, _, steps, warm_up in rows:
        epoch = int(images.replace(",", "")) // 1024
        assert (int(steps), int(warm_up)) == (100 * epoch, 5 * epoch)
    names = [f"train_val2018/Aves/{species}/{n}.png" for species in (2761, 3099) for n in range(3)]
    for n, name in enumerate(names):
        (tmp_path / "inat" / name).parent.mkdir(parents=True, exist_ok=True)
        coloured(n % 3, n).save(tmp_path / "inat" / name)
    published = {
        "info": {"year": 2018}, "licenses": [{"id": 0, "name": "CC"}],
        "images": [{"id": 7 + n, "file_name": name, "license": 0, "width": 40, "height": 40, "rights_holder": "x"}
                   for n, name in enumerate(names)],
        "categories": [{"id": 3099, "name": "Larus", "supercategory": "Aves"}, {"id": 2761, "name": "Corvus",
                                                                                "supercategory": "Aves"}],
        "annotations": [{"id": n, "image_id": 7 + n, "category_id": int(name.split("/")[2])}
                        for n, name in enumerate(names)],
    }  # fmt: skip
    (tmp_path / "train2018.json").write_text(json.dumps(published))
    shards = tmp_path / "shards"
    words = ["data", "shards", str(tmp_path / "inat"), "--output", str(shards), "--labels"]
    assert cli.main([*words, str(tmp_path / "train2018.json")]) == 0
    assert (shards / "classes.txt").read_text().split() == ["Corvus", "Larus"]
    command = re.search(r"megamug train (examples/mug/finetune_vit_b16.yaml) .*?\\\n(.*run_dir.*)\n", page)
    changes = [word for word in command[2].split() if not word.startswith("run_dir")]
    told = dry_run(ROOT / command[1], data, capsys, *changes, f"data.train={shards}", "classifier.classes=null")
    assert "42700 steps of 1024" in told and "2 classes" in told


def test_the_segmenter_follows_the_recipe_of_beit_and_mae():
    (path,) = SEGMENTERS
    config = load_config(path)
    own, optimizer = config.segmenter, config.optimizer
    assert (config.data.image_size, config.data.global_batch_size, config.train.steps) == (512, 16, 160_000)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.warmup_steps) == (1e-4, 0.05, 1500)
    assert optimizer.schedule == "linear" and optimizer.beta2 == 0.999
    assert own.blocks == [3, 5, 7, 11] == list(segmenter_blocks(resolve(load_config(None, ["model.kind=segmenter"]))))
    assert (own.drop_path, own.layer_decay, own.auxiliary_weight, own.channels) == (0.1, 0.65, 0.4, 768)
    assert own.pool_scales == [1, 2, 3, 6] and own.scale == [0.5, 2.0] and own.most_of_one_class == 0.75


@pytest.mark.parametrize("path", LARGE_JAM, ids=lambda path: path.stem)
def test_tokens_of_a_fused_run_are_below_a_hundredth_of_the_parents(path):
    """2.4 T + 1.4 T tokens of the 7B parents, 1.4 T of a 350M one (continued pre-training of JAM)."""
    config = load_config(path)
    tokens = config.train.steps * config.data.global_batch_size * config.data.context_length
    assert 1e10 < tokens < 0.01 * (3.8e12 if "7b" in path.stem else 1.4e12)


def test_the_table_of_the_guide_holds_what_a_dry_run_tells():
    rows = re.findall(r"^\| `(\w+/\w+\.yaml)` \|[^|]+\| ([\d.,]+) (M|G) \| ([\d.]+) GiB \|$", LAUNCHING, re.MULTILINE)
    assert {ROOT / "examples" / row[0] for row in rows} >= {*LARGE_JAM, *MUG} - {ROOT / "examples/mug/demo.yaml"}
    for name, number, unit, told in rows:
        config = resolve(load_config(ROOT / "examples" / name))
        kind = config.model.kind
        plan = MugPlan(config, 32000) if kind == "mug" else model_of(kind)[0](config, 56320)
        (held,) = (parameters.stage_counts(plan, stage)[0].on_rank(plan.tensor) for stage in range(len(plan.stages)))
        ranks = validate.data_parallel(config, processes(ROOT / "examples" / name))
        share = config.parallel.distributed_optimizer
        state = parameters.state_memory(held, held, config.precision.dtype, ranks, share)
        assert told == f"{state.total / 2**30:.1f}", name
        wanted = f"{parameters.total(plan) / 1e9:.1f}" if unit == "G" else f"{parameters.total(plan) / 1e6:,.0f}"
        assert number == wanted, name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_commands_in_the_comments_name_files_that_exist(path):
    for named in re.findall(r"examples/[\w/]+\.(?:yaml|sh)", path.read_text()):
        assert (ROOT / named).exists(), f"{path} names {named}"
