"""Reading, resolving and writing the configuration."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from megamug.configuration.presets import BY_KIND, DEFAULT, PRESETS, TOWERS
from megamug.configuration.reading import keys, load_config, resolve, save_config, to_yaml, towers
from megamug.configuration.sections import Config, ModelConfig, TowerConfig
from megamug.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_then_overrides_then_preset(tmp_path):
    path = written(tmp_path, "seed: 7\nmodel:\n  preset: vit_s16\n  heads: 12\ntrain: {steps: 5}\n")
    config = resolve(load_config(path, ["train.steps=9", "train.steps=11", "model.mask_ratio=0.5"]))
    assert (config.seed, config.train.steps, config.model.mask_ratio) == (7, 11, 0.5)
    assert (config.model.width, config.model.heads) == (384, 12)  # the preset's width; the file's heads (MoCo v3)
    assert config.data == Config().data


def test_the_fixed_keys_exist():
    fixed = """seed run_dir model.kind model.preset model.image_loss_weight model.caption_loss_weight model.mask_ratio
        data.train data.validation data.tokenizer data.image_size data.global_batch_size data.micro_batch_size
        parallel.tensor parallel.pipeline parallel.sequence parallel.distributed_optimizer precision.dtype precision.fp8
        train.steps train.validate_every checkpoint.every checkpoint.keep log.every""".split()
    assert set(fixed) <= set(keys())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fills_every_size(preset):
    model = resolve(load_config(None, [f"model.preset={preset}"])).model
    set_by_none = {"preset", "initial", "initial_parts"}
    empty = {f.name for f in dataclasses.fields(ModelConfig) if f.default is None} - set_by_none
    assert [name for name, value in dataclasses.asdict(model).items() if value is None] == ["initial", "initial_parts"]
    assert set(PRESETS[preset]) == empty


@pytest.mark.parametrize("kind", ["decoder_lm", "jam_cross"])
def test_every_preset_fills_every_tower(kind):
    for preset in BY_KIND[kind]:
        config = resolve(load_config(None, [f"model.kind={kind}", f"model.preset={preset}"]))
        assert len(towers(config)) == {"decoder_lm": 1, "jam_cross": 2}[kind]
        for tower in towers(config).values():
            assert None not in dataclasses.asdict(tower).values()
            assert tower.query_groups == tower.heads
        assert resolve(config) == config
    for sizes in TOWERS.values():
        assert set(sizes) == {f.name for f in dataclasses.fields(TowerConfig)} - {"query_groups"}


def test_the_preset_depends_on_the_kind():
    for kind, preset in DEFAULT.items():
        assert resolve(load_config(None, [f"model.kind={kind}"])).model.preset == preset
    config = load_config(None, ["model.kind=decoder_lm", "model.preset=vit_b16"])
    with pytest.raises(UserError, match="vit_b16 is of kind mug and model.kind is decoder_lm; set model.preset=cm3"):
        resolve(config)
    told = "none of mug, decoder_lm, jam_cross, classifier, segmenter; set model.kind=decoder_lm"
    with pytest.raises(UserError, match=told):
        resolve(load_config(None, ["model.kind=decoder"]))


def test_a_tower_keeps_what_is_set_beside_its_preset():
    overrides = ["model.kind=jam_cross", "model.preset=jam_demo", "text_tower.heads=8", "image_tower.norm=rmsnorm",
                 "image_tower.query_groups=2", "text_tower.bias=true"]  # fmt: skip
    config = resolve(load_config(None, overrides))
    assert (config.text_tower.heads, config.text_tower.query_groups, config.text_tower.bias) == (8, 8, True)
    assert (config.image_tower.heads, config.image_tower.query_groups, config.image_tower.norm) == (4, 2, "rmsnorm")


def test_resolving_leaves_its_argument_alone():
    config = Config()
    resolve(config)
    assert config == Config()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {learning_rate: 1e-3}", "optimizer.learning_rate", 1e-3),  # text to YAML 1.1
        ("optimizer: {clip_grad: 1}", "optimizer.clip_grad", 1.0),
        ("data: {tokenizer: null}", "data.tokenizer", None),
        ("data: {train: shards/*.tar}", "data.train", "shards/*.tar"),
        ("data: {train: '010'}", "data.train", "010"),
        ("data: {threads: 0x10}", "data.threads", 16),
        ("optimizer: {weight_decay: 00.5}", "optimizer.weight_decay", 0.5),
        ("data: {crop_scale: [1, 1e0]}", "data.crop_scale", [1.0, 1.0]),
        ("data: {train: [a, {path: b, weight: 3}]}", "data.train",
         [{"path": "a"}, {"path": "b", "weight": 3.0}]),
        ("parallel: {sequence: yes}", "parallel.sequence", True),
        ("model:\ntrain: {steps: 3}", "train.steps", 3),  # a section whose keys are all commented out
    ],
)  # fmt: skip
def test_values_are_read_as_their_type(tmp_path, text, key, value):
    section, name = key.split(".")
    found = getattr(getattr(load_config(written(tmp_path, text)), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "value"),
    [("*.tar", "*.tar"), ("2024", "2024"), ("a: b", "a: b"), ("'null'", "null"), ("null", None), ("[x]", None)],
)
def test_text_overrides_stand_as_they_are(override, value):
    config = load_config(None, [f"data.train={override}"])
    assert config.data.train == ([{"path": "x"}] if override == "[x]" else value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {step: 4}", "unknown key train.step; the nearest is train.steps"),
        ("trian: {steps: 4}", "unknown key trian; the nearest is train"),
        ("train: {learning_rate: 1}", "the nearest is optimizer.learning_rate"),  # the right key, another section
        ("steps: 4", "the nearest is train.steps"),
        ("seed: 1\nseed: 2", "line 2: key 'seed' is given twice, first on line 1; keep one"),
        ("train:\n  steps: 1\ntrain:\n  steps: 2", "line 3: key 'train' is given twice"),
        ("train: {steps: 1, steps: 2}", "'steps' is given twice"),
        ("train: {steps: 1.5}", "train.steps: a whole number wanted, found 1.5 (a number)"),
        ("train: {steps: '10'}", "train.steps: a whole number wanted, found '10' (text)"),
        ("train: {steps: true}", "a whole number wanted, found True"),
        ("train: {steps: null}", "a whole number wanted, found nothing"),
        ("parallel: {sequence: 1}", "true or false wanted, found 1"),
        ("precision: {dtype: off}", "text wanted, found False"),
        ("optimizer: {learning_rate: fast}", "a number wanted, found 'fast'"),
        ("optimizer: {learning_rate: .nan}", "a number wanted"),
        ("optimizer: {learning_rate: .inf}", "a number wanted"),
        ("data: {crop_scale: 0.5}", "a list of numbers wanted"),
        ("data: {crop_scale: [0.5, a]}", "data.crop_scale[1]: a number wanted"),
        ("data: {train: 3}", "text or a list of {path, weight} or null wanted, found 3"),
        ("data: {train: [{weight: 1}]}", "data.train[0]"),
        ("data: {train: [{path: a, weigth: 1}]}", "unknown key weigth; the nearest is weight"),
        ("train: 5", "train: a section with keys wanted, such as train.steps; found 5"),
        ("- a", "sections such as `model:` wanted at the top level"),
        ("model: [", "line 1"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("? [a]\n: 1", "a key must be a name"),
        ("seed: 2024-99-99", "not YAML"),
        ("seed: \x07", "not YAML"),
        # each was taken for another number than it says, or for one where none stands
        ("train:\n  steps: 010", "line 2: 010 is 8 to YAML; write 8, or \"010\" in quotes"),
        ("train: {steps: -010}", "-010 is -8 to YAML"),
        ("train: {steps: 1:30}", "1:30 is 90 to YAML; write 90"),
        ("optimizer: {clip_grad: 1:30.5}", "1:30.5 is 90.5 to YAML"),
        ("data: {tokenizer: 10:20}", "10:20 is 620 to YAML; write 620, or \"10:20\" in quotes"),
        ("train: {steps: 1_000}", "1_000 is 1000 to YAML; write 1000"),
        ("data: {crop_scale: [0_1, 1]}", "0_1 is 1 to YAML"),
        ("optimizer: {clip_grad: 1_0.5}", "1_0.5 is 10.5 to YAML"),
        ("optimizer: {clip_grad: 1_0e3}", "a number wanted, found '1_0e3' (text)"),
        ("optimizer: {clip_grad: '١'}", "a number wanted"),
        ("data: {tokenizer: no}", "text or null wanted, found False (true or false); YAML takes words such as yes, no"),
        ("data: {tokenizer: 2024-01-01}", "text or null wanted, found datetime.date(2024, 1, 1) (date); YAML takes"),
    ],
)
def test_refused_files(tmp_path, text, said):
    message = refusal(written(tmp_path, text))
    assert said in message and str(tmp_path / "config.yaml") in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "section.key=value wanted"),
        ("=3", "section.key=value wanted"),
        ("train=3", "train is a section; set one of its keys, such as train.steps"),
        ("train.stesp=3", "the nearest is train.steps"),
        ("run_dir=", "text wanted, found nothing"),
        ("train.steps=[", "train.steps"),
        ("train.steps=many", "a whole number wanted, found 'many'"),
        ("data.train={a: 1}", "found {'a': 1} (a mapping)"),
    ],
)
def test_refused_overrides(override, said):
    message = refusal(None, override)
    assert said in message and message.startswith(f"override {override}: ")


def test_a_value_that_aliases_made_endless_is_told_in_a_line(tmp_path):
    """A billion laughs: a few lines whose whole text would be of 9^9 words."""
    lines = ["a: &a [x]"] + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghij")]
    laughs = "model:\n  preset:\n" + "".join(f"    {line}\n" for line in lines)
    assert len(refusal(written(tmp_path, laughs))) < 400


def test_unreadable_files(tmp_path):
    assert "does not exist" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "not UTF-8" in refusal(tmp_path / "image.yaml")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="no preset 'vit_b_16'; the nearest is 'vit_b16'"):
        resolve(load_config(None, ["model.preset=vit_b_16"]))


def test_what_is_written_is_what_is_read(tmp_path):
    overrides = [f"run_dir={tmp_path / 'run'}", "data.train=[{path: /é, weight: 1e-7}]", "optimizer.eps=1e-20"]
    config = resolve(load_config(None, overrides))
    path = save_config(config)
    assert path == tmp_path / "run" / "config.yaml"
    assert load_config(path) == config == resolve(load_config(path))
    assert os.listdir(path.parent) == ["config.yaml"]  # nothing left aside


def test_yaml_text_of_any_number_and_text_is_read_back(tmp_path):
    hypothesis = pytest.importorskip("hypothesis", reason="property test; in the dev extra")
    from hypothesis import strategies

    finite = strategies.floats(allow_nan=False, allow_infinity=False)
    texts = strategies.text(strategies.characters(codec="utf-8")).filter(lambda text: not text.startswith("~"))  # homes

    @hypothesis.settings(deadline=None, max_examples=100)
    @hypothesis.given(number=finite, text=texts, seed=strategies.integers())
    def check(number, text, seed):
        config = Config(seed=seed, run_dir=text)
        config.optimizer.learning_rate = number
        assert load_config(written(tmp_path, to_yaml(config))) == config

    check()


def test_the_documentation_is_what_the_code_says():
    path = ROOT / "tools" / "document_configuration.py"
    spec = importlib.util.spec_from_file_location("document_configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == module.document(), f"docs/configuration.md is out of date; run `python {path.relative_to(ROOT)}`"
    for key in keys():
        assert f"| `{key}` |" in text
    assert yaml.safe_dump(Config().optimizer.beta2).split()[0] in text


def test_paths_begin_at_home_where_they_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    path = written(tmp_path, "run_dir: ~/runs/a\ndata: {tokenizer: ~/t.model}\nmodel: {initial: \"~/runs/b\"}\n")
    config = load_config(path)
    assert (config.run_dir, config.data.tokenizer, config.model.initial) == (
        "/home/somebody/runs/a", "/home/somebody/t.model", "/home/somebody/runs/b"
    )  # fmt: skip
    assert load_config(None, ["run_dir=~/c", "data.tokenizer='~/d'"]).run_dir == "/home/somebody/c"
    assert load_config(None, ["data.tokenizer=~"]).data.tokenizer is None  # YAML's null, as before
    assert "run_dir: ~no-such-user/x: ~no-such-user is the home folder of no user" in refusal(
        None, "run_dir=~no-such-user/x"
    )
