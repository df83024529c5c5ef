"""Run folders that a command cannot use: weights alone, no vocabulary, another kind of model. One sentence, code 2."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from megamug import cli
from megamug.checkpoint.tensors import TensorReader, write_run
from megamug.configuration.reading import load_config, to_yaml
from megamug.models.image_tokenizer.vocabulary import make_vocabulary
from tests.data.language import some_documents, write_set
from tests.evaluate import tiny_run
from tests.generation import language_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data of both kinds, runs `mug` and `learned`, and `weights/mug`, `weights/learned`: the same without a cursor."""
    folder = tmp_path_factory.mktemp("runs")
    language_run.make_data(folder)
    language_run.make_run("learned", folder)
    tiny_run.make_data(folder)
    tiny_run.make_run(tiny_run.tiny_config(folder, folder / "mug"))
    for name in ("mug", "learned"):
        reader = TensorReader(folder / name)
        write_run(folder / "weights" / name, load_config(folder / name / "config.yaml"), reader.tensors(),
                  reader.state()["identity"])  # fmt: skip
    return folder


@pytest.fixture
def refused(capsys, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    joined = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: joined.append("joined"))

    def refused(*words: object) -> str:
        """The sentence that a command ends with, before any process group exists."""
        code = cli.main([str(word) for word in words])
        out, error = capsys.readouterr()
        out = [line for line in out.splitlines() if " passed over: " not in line]  # of the log, before the sentence
        assert (code, out, error.count("\n"), joined) == (2, [], 1, []), (code, out, error)
        assert error.startswith("megamug: error: ")
        return error

    return refused


@pytest.mark.parametrize("name", ["mug", "learned"])
@pytest.mark.parametrize("pointer", [True, False])
def test_weights_alone_are_not_gone_on_with(folder, tmp_path, name, pointer, refused):
    """Without a pointer there is a newer folder as well, of a save that was cut off before it had a state."""
    run = folder / "weights" / name
    (tmp_path / "recipe.yaml").write_text(to_yaml(load_config(run / "config.yaml")))
    latest = run / "checkpoints" / "latest"
    if not pointer:
        latest.unlink()
        (run / "checkpoints" / "step-00000007").mkdir()
    error = refused("train", tmp_path / "recipe.yaml", f"run_dir={run}")
    assert f"run_dir: {run} holds weights alone" in error
    assert f"set run_dir to a new folder and model.initial={run}" in error
    latest.write_text("step-00000000\n")
    if not pointer:
        (run / "checkpoints" / "step-00000007").rmdir()


def test_a_language_model_without_a_vocabulary(folder, tmp_path, refused):
    reader = TensorReader(folder / "learned")
    config = load_config(folder / "learned" / "config.yaml")
    config.data.tokenizer = None
    write_run(tmp_path / "converted", config, reader.tensors())
    for command in (["evaluate", "--task", "perplexity"], ["generate", "--prompt", "a"]):
        error = refused(command[0], tmp_path / "converted", *command[1:])
        assert f"data.tokenizer is not set in {tmp_path / 'converted' / 'config.yaml'}" in error


def test_damaged_documents_and_those_of_another_vocabulary(folder, tmp_path, refused):
    """Of the index, of the tokens, of held-out documents; `evaluate` looks at its own before it loads a model."""
    damaged, recipe = tmp_path / "damaged", tmp_path / "recipe.yaml"
    shutil.copytree(folder / "documents", damaged)
    config = load_config(folder / "learned" / "config.yaml")
    config.run_dir = str(tmp_path / "run")
    recipe.write_text(to_yaml(config))
    (damaged / "documents.idx").write_bytes(b"?" * 200)
    for key in ("data.train", "data.validation"):
        assert "documents.idx: not a whole index" in refused("train", recipe, f"{key}={damaged}")
    assert "not a whole index" in refused("evaluate", folder / "learned", "--task", "perplexity", "--data", damaged)
    other = make_vocabulary(folder / "t.model", folder / "vq", 9, tmp_path / "other")
    write_set(tmp_path / "documents", other, some_documents(other, 3))
    error = refused("evaluate", folder / "learned", "--task", "perplexity", "--data", tmp_path / "documents")
    assert "tokenised with another vocabulary" in error
    assert "leaves no room beside" in refused("train", recipe, "data.cm3_spans=500")
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written_are_found_before_the_work(folder, tmp_path, refused):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for run, words in (("learned", ["evaluate", "--task", "perplexity"]), ("learned", ["generate", "--prompt", "a"]),
                       ("mug", ["evaluate", "--task", "captioning"])):  # fmt: skip
        below = refused(words[0], folder / run, *words[1:], "--output", tmp_path / "file" / "x")
        assert f"--output: {tmp_path / 'file' / 'x'} lies below" in below and "name another folder" in below
        link = refused(words[0], folder / run, *words[1:], "--output", tmp_path / "link")
        assert f"--output: {tmp_path / 'link'} is a link to {tmp_path / 'nowhere'}, which does not exist" in link
    (tmp_path / "recipe.yaml").write_text(to_yaml(load_config(folder / "mug" / "config.yaml")))
    error = refused("train", tmp_path / "recipe.yaml", f"run_dir={tmp_path / 'link'}")
    assert "run_dir: " in error and "which does not exist; set run_dir to another folder" in error


def test_images_without_their_decoder(folder, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    (tmp_path / "recipe.yaml").write_text(to_yaml(load_config(folder / "mug" / "config.yaml")))
    error = refused("train", tmp_path / "recipe.yaml", f"run_dir={tmp_path / 'run'}")
    assert "images are decoded by NVIDIA DALI, which does not import" in error


def test_runs_of_another_kind(folder, refused):
    assert "is a run of mug, whose tasks are: reconstruction, captioning" in refused(
        "evaluate", folder / "mug", "--task", "perplexity"
    )
    assert "is a run of decoder_lm, whose tasks are: perplexity" in refused(
        "evaluate", folder / "learned", "--task", "captioning"
    )
    assert "--prompt is not for" in refused("generate", folder / "mug", "--prompt", "a")
    assert "--images is not for" in refused("generate", folder / "learned", "--images", folder)
