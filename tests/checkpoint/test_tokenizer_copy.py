"""A run folder brings its tokenizer with it, and its configuration says where the data are from any folder."""

from __future__ import annotations

import shutil

import pytest

from megamug.checkpoint import tokenizer_copy
from megamug.configuration.reading import absolute, check_own_folder, load_config, save_config
from megamug.configuration.sections import Config
from megamug.errors import UserError
from megamug.generation.loading import read_config


def configured(tmp_path, tokenizer) -> Config:
    config = Config(run_dir=str(tmp_path / "run"))
    config.data.tokenizer = str(tokenizer)
    save_config(config)
    return config


def test_a_file_and_a_folder_are_kept(tmp_path):
    (tmp_path / "t.model").write_bytes(b"pieces")
    config = configured(tmp_path, tmp_path / "t.model")
    assert tokenizer_copy.kept(tmp_path / "run") is None
    assert read_config(tmp_path / "run").data.tokenizer.endswith("t.model")
    tokenizer_copy.keep(config)
    (tmp_path / "t.model").unlink()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    found = read_config(tmp_path / "elsewhere").data.tokenizer
    assert found == str(tmp_path / "elsewhere" / "tokenizer.model") and open(found, "rb").read() == b"pieces"

    (tmp_path / "v" / "image_tokenizer").mkdir(parents=True)
    (tmp_path / "v" / "vocabulary.json").write_text("{}")
    (tmp_path / "v" / "image_tokenizer" / "config.json").write_text("1")
    config = configured(tmp_path, tmp_path / "v")
    tokenizer_copy.keep(config)
    copy = tmp_path / "run" / "vocabulary"
    inode = copy.stat().st_ino
    tokenizer_copy.keep(config)  # the same: nothing is written
    assert copy.stat().st_ino == inode and (copy / "image_tokenizer" / "config.json").read_text() == "1"
    (copy / "image_tokenizer" / "config.json").write_text("2")  # damaged: made whole
    tokenizer_copy.keep(config)
    assert (copy / "image_tokenizer" / "config.json").read_text() == "1"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "vocabulary"]
    assert read_config(tmp_path / "run").data.tokenizer == str(copy)


def test_what_tokens_are_for_is_kept_beside_a_tokenizer(tmp_path):
    from megamug.data.text.tokenizer import Tokenizer
    from tests.data.text.foreign import tokenizer_json

    folder = tmp_path / "model"
    tokenizer_json("bpe_llama3", folder / "tokenizer.json")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|eot_id|>"}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.model").write_bytes(b"another tokenizer, of before")
    before = Tokenizer(folder)
    config = configured(tmp_path, folder)
    tokenizer_copy.keep(config)
    copy = tmp_path / "run" / "tokenizer"
    assert sorted(p.name for p in copy.iterdir()) == ["special_tokens_map.json", "tokenizer.json"]
    assert not (tmp_path / "run" / "tokenizer.model").exists()
    inode = copy.stat().st_ino
    tokenizer_copy.keep(config)
    assert copy.stat().st_ino == inode
    shutil.rmtree(folder)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    found = Tokenizer(read_config(tmp_path / "elsewhere").data.tokenizer)
    assert (found.sha256, found.eos_id) == (before.sha256, 2)

    config = configured(tmp_path, tokenizer_json("bpe_llama3", tmp_path / "other.json"))  # of another name, alone
    tokenizer_copy.keep(config)
    kept = tokenizer_copy.kept(tmp_path / "run")
    assert [p.name for p in kept.iterdir()] == ["tokenizer.json"] and Tokenizer(kept).eos_id == 1


def test_paths_of_data_hold_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/her")
    config = load_config(None, ["data.train=[{path: a, weight: 1}, {path: /b, weight: 2}]", "run_dir=run",
                                "data.validation=held/*.tar", "data.tokenizer=~/t.model"])  # fmt: skip
    found = load_config(save_config(config))
    assert found.data.train == [{"path": f"{tmp_path}/a", "weight": 1.0}, {"path": "/b", "weight": 2.0}]
    assert (found.data.validation, found.data.tokenizer) == (f"{tmp_path}/held/*.tar", "/home/her/t.model")
    assert found.run_dir == "run" and config.data.validation == "held/*.tar"
    assert absolute(found) == found
    config.data.train = "a::b"
    assert absolute(config).data.train == f"{tmp_path}/a::{tmp_path}/b"


def test_a_moved_run_is_not_begun_anew_at_its_old_place(tmp_path):
    config = configured(tmp_path, tmp_path / "t.model")
    path = tmp_path / "moved" / "config.yaml"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    check_own_folder(path, config, [])  # no checkpoints: a configuration as any other
    (tmp_path / "moved" / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"to go on with that run set run_dir={tmp_path / 'moved'}, to begin"):
        check_own_folder(path, config, ["train.steps=3"])
    check_own_folder(path, config, [f"run_dir={tmp_path / 'moved'}"])
    config.run_dir = str(tmp_path / "moved")
    check_own_folder(path, config, [])
