"""Wrong values on the command line of every tool: one sentence, exit code 2, before anything is read or written."""

from __future__ import annotations

import contextlib
import errno
import io
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from megamug.command_line.arguments import device, expand_home

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def called(tool: str, *words: object) -> tuple[int, str, str]:
    """tools/TOOL.py, or TOOL.py of the examples, in this process: (exit code, stdout, stderr)."""
    folder = TOOLS.parent / "examples" if "/" in tool else TOOLS
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [f"{tool}.py", *map(str, words)]),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        try:
            runpy.run_path(str(folder / f"{tool}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def refused(tool: str, *words: object) -> str:
    """The one sentence that a tool ends with."""
    code, out, err = called(tool, *words)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    return err


CASES = {
    "index_shards": ["DATA", "--processes", "0", "0 must be at least 1"],
    "make_demo_data": ["NEW", "--processes", "-2", "-2 must be at least 1"],
    "make_demo_documents": ["NEW", "--text", "none", "a whole number wanted, found 'none'"],
    "make_shards": ["DATA", "--output", "NEW", "--shard-size", "0", "0 must be at least 1"],
    "make_vocabulary": ["--text", "t", "--output", "NEW", "--sentinels", "-1", "-1 must be at least 1"],
    "tokenize_documents": ["DATA", "--vocabulary", "v", "--output", "NEW", "--workers", "0", "0 must be at least 1"],
    "train_tokenizer": ["DATA", "--output", "NEW", "--vocab-size", "0", "0 must be at least 1"],
    "train_image_tokenizer": ["DATA", "--output", "NEW", "--learning-rate", "inf", "inf must be above 0"],
    "fuse_towers": ["A", "B", "--kind", "cross", "--output", "NEW", "--cross-every", "0", "0 must be at least 1"],
}


@pytest.mark.parametrize("tool", CASES)
def test_a_number_out_of_range(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *words, said = CASES[tool]
    message = refused(tool, *words)
    assert f"argument {words[-2]}: {said}" in message and f"see `{tool}.py --help`" in message
    assert not (tmp_path / "NEW").exists()


def test_an_unknown_option_and_a_missing_one():
    assert "unrecognized arguments: --worker 3" in refused(
        "tokenize_documents", "DATA", "--vocabulary", "v", "--output", "o", "--worker", 3
    )
    assert "required: --from, --to" in refused("convert_checkpoint")
    assert "required: path" in refused("inspect_checkpoint")


@pytest.mark.parametrize("words", [("mug", "--steps", 0), ("mug", "--batch", 0), ("jam", "--batch", -1),
                                   ("losses", "--repeats", 0)])  # fmt: skip
def test_benchmarks(words):
    assert f"argument {words[1]}: {words[2]} must be at least 1" in refused("benchmark", *words)


def test_an_unknown_preset_is_told_before_any_contestant_starts():
    assert "there is no preset 'vit_b61'; the nearest is " in refused("benchmark", "mug", "--preset", "vit_b61")


def test_where_a_benchmark_writes_is_looked_at_first(tmp_path):
    assert "is not a file in a folder that exists" in refused("benchmark", "mug", "--json", tmp_path)
    assert "is not a file in a folder that exists" in refused("benchmark", "jam", "--json", tmp_path / "no" / "x")


@pytest.mark.parametrize("tool", ["make_shards", "make_vocabulary", "tokenize_documents", "train_image_tokenizer",
                                  "fuse_towers", "make_demo_data", "make_demo_documents", "convert_checkpoint",
                                  "train_tokenizer"])  # fmt: skip
def test_an_output_that_cannot_be_written(tool, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    words = {"convert_checkpoint": ["--from", "mae", "--to", "megamug", "source"], "make_demo_data": [],
             "make_demo_documents": []}.get(tool, ["source", "--output"])  # fmt: skip
    for path, said in (("file/x", "is a file"), ("link/x", "link is a link to")):
        message = refused(tool, *words, tmp_path / path)
        assert said in message and "name another" in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_full_is_told_in_a_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "shard.tar"))

    monkeypatch.setattr("megamug.commands.demo_data.make_demo_data", full)
    assert refused("make_demo_data", tmp_path / "new") == (
        f"error: {tmp_path / 'shard.tar'}: No space left on device; make room, then repeat the command\n"
    )


def test_the_demos(tmp_path):
    """Before anything is rendered."""
    folder = ["--folder", tmp_path / "new"]
    assert "override model.wdth=1: unknown key" in refused("mug/demo", *folder, "model.wdth=1")
    assert "section.key=value wanted" in refused("mug/demo", *folder, "photos")
    assert "argument --train: 0 must be at least 1" in refused("mug/demo", *folder, "--train", 0)
    (tmp_path / "file").write_text("")
    assert "is a file; name another folder" in refused("jam/demo", "--folder", tmp_path / "file")
    assert "unrecognized arguments: --qick" in refused("jam/demo", *folder, "--qick")
    assert not (tmp_path / "new").exists()


def test_devices(monkeypatch):
    words = ["DATA", "--vocabulary", "v", "--output", "o", "--device"]
    assert "'foo' is no device; give cpu, cuda or cuda:N" in refused("tokenize_documents", *words, "foo")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "cuda: torch sees no GPU on this machine" in refused("tokenize_documents", *words, "cuda")
    assert "torch sees no GPU" in refused("benchmark", "losses", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    assert "cuda:2: torch sees 2 GPUs" in refused("tokenize_documents", *words, "cuda:2")


def test_a_home_folder_in_quotes_is_written_out(tmp_path, monkeypatch):
    """`megamug ... '~/x'`: a shell would have done it. Else a folder of the name `~` is made, or nothing found."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert expand_home("~/runs/x") == f"{home}/runs/x" and expand_home("~") == str(home)
    assert [expand_home(text) for text in ("a~", "./~", "/~/x", "", "a/~/b")] == ["a~", "./~", "/~/x", "", "a/~/b"]
    code, _, error = called("make_demo_data", "~/demo", "--train", 2, "--heldout", 1, "--processes", 1)
    assert code == 0 and sorted(path.name for path in home.iterdir()) == ["demo"], error
    for words in (
        ["inspect_checkpoint", "~/demo/none"], ["make_shards", "~/none", "--output", "~/shards"],
        ["train_tokenizer", "~/none", "--output", "~/t", "--vocab-size", 300],
        ["make_vocabulary", "--text", "~/none", "--output", "~/v"],
        ["convert_checkpoint", "--from", "mae", "--to", "megamug", "~/none", "~/run"],
        ["fuse_towers", "~/none", "~/none", "--kind", "uniform", "--output", "~/fused"],
        ["benchmark", "checkpoint", "--folder", "~/none"], ["benchmark", "loader", "--data", "~/none"],
    ):
        assert f"{home}/" in refused(*words), words
    assert list(here.iterdir()) == []


def test_a_home_folder_of_nobody_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("make_demo_data", "~no-such-user/demo")
    assert "~no-such-user is the home folder of no user here; write ./~no-such-user/demo" in message
    (tmp_path / "~backup.tar").write_text("")
    assert expand_home("~backup.tar") == "~backup.tar"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["~backup.tar"]
