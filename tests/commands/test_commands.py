"""The commands that were scripts alone: called as `megamug ...` and by their paths they are the same, and every message
and page names the one that works in any folder."""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from megamug import cli, commands
from megamug.command_line import console
from tests.command_line.test_arguments import called
from tests.distributed.launch import ROOT, environment
from tests.test_cli import no_launcher, told  # noqa: F401

DOORS = {path.stem: re.search(r"`megamug (.*) \.\.\.`", path.read_text())[1].split()
         for path in (ROOT / "tools").glob("*.py") if path.stem not in ("document_configuration", "chaos")}  # fmt: skip


def test_every_script_is_a_door_of_a_command():
    ours = [name for name, (module, _) in commands.COMMANDS.items() if not module.startswith("transfer.")]  # no scripts
    assert len(DOORS) == len(commands.DATA) + len(ours) == 12
    for tool, words in DOORS.items():
        module, prog, rest = commands.split([*words, "--x"])
        assert (prog, rest) == (" ".join(["megamug", *words]), ["--x"])
        assert f'door("{module}"' in (ROOT / "tools" / f"{tool}.py").read_text()
        assert len((ROOT / "tools" / f"{tool}.py").read_text().splitlines()) < 20


@pytest.mark.parametrize("tool", sorted(DOORS))
def test_the_help_of_both_is_one(tool, capsys):
    code, by_path, _ = called(tool, "--help")
    with pytest.raises(SystemExit) if tool != "benchmark" else pytest.MonkeyPatch.context():
        cli.main([*DOORS[tool], "--help"])
    by_name = capsys.readouterr().out
    words = [text.replace(f"{tool}.py", " ".join(["megamug", *DOORS[tool]])).split() for text in (by_path, by_name)]
    assert not code and len(words[0]) > 20 and words[0] == words[1]


def test_a_mistake_is_told_by_either_name(capsys, tmp_path):
    assert "0 must be at least 1; see `megamug data index --help`" in told(capsys, "data", "index", "--processes=0")
    assert "invalid choice: 'inde' (choose from " in told(capsys, "data", "inde")
    assert "COMMAND; see `megamug data --help`" in told(capsys, "data")
    assert "there is no benchmark 'x'; available: checkpoint, jam" in told(capsys, "benchmark", "x")
    assert "/absent: no such file or folder" in told(capsys, "data", "index", "/absent")
    assert cli.main(["data", "demo", str(tmp_path / "d"), "--train", "2", "--heldout", "1", "--no-index"]) == 0
    assert "2 scenes to train on" in capsys.readouterr().out


def test_a_full_disk_is_told_in_a_sentence(capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "shard.tar"))

    monkeypatch.setattr("megamug.commands.demo_data.make_demo_data", full)
    assert "shard.tar: No space left on device; make room" in told(capsys, "data", "demo", tmp_path / "new")


def test_no_message_and_no_page_names_a_script_that_is_not_there():
    """In a user's folder there is no tools/; and no package of the name `megamug` is ours to install extras from."""
    script = re.compile(rf"tools/({'|'.join(DOORS)})\b|\b({'|'.join(DOORS)})\.py")
    said = []
    for path in sorted((ROOT / "megamug").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append((path, node.value))
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    said += [(path, path.read_text()) for path in pages]
    for path, text in said:
        assert not script.search(text), (path, script.search(text)[0])
        assert not re.search(r"megamug\[\w", text), path
        assert "python megamug" not in text, path


SLOW_TORCH = "import sys, time\nprint('begun', flush=True)\ntime.sleep(60)\n"
TRAIN = """
import sys
from megamug import cli
from megamug.configuration import validate
validate.validate = lambda *_, **__: None
sys.exit(cli.main(["train", sys.argv[1]]))
"""


@pytest.mark.parametrize("words, name", [
    (["-c", TRAIN, "c.yaml"], "megamug train"), (["-m", "megamug", "inspect", "c.yaml"], "megamug inspect"),
])  # fmt: skip
def test_ctrl_c_while_torch_is_loaded(words, name, tmp_path):
    """It was forty lines of traceback, after ten seconds without a word."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(SLOW_TORCH)
    (tmp_path / "c.yaml").write_text("")
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    process = subprocess.Popen([sys.executable, *words], env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    try:
        while process.stdout.readline() != "begun\n":  # a warning of the interpreter may come first
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, f"{name}: loading torch and Megatron-core ...\n")


def test_ctrl_c_while_the_program_itself_is_loaded(tmp_path):
    (tmp_path / "yaml.py").write_text(SLOW_TORCH)
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    process = subprocess.Popen([sys.executable, "-m", "megamug", "doctor"], env=env, cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        while process.stdout.readline() != "begun\n":
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 130)
    finally:
        process.kill()


def test_ctrl_c_in_a_finalizer_is_not_dropped():
    """Python tells what `__del__` raises and goes on: a loader that is let go would have swallowed it."""
    class Closing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def work():
        Closing()
        time.sleep(30)

    with console.interruptible(), pytest.raises(KeyboardInterrupt):
        work()


def test_ctrl_c_in_the_work_of_a_command(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megamug.commands.demo_data.main", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["data", "demo", "x"]) == 130
    said = "stopped; what was finished is kept, run the same command to continue\n"
    assert capsys.readouterr() == ("", said) and signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def classes(tmp_path):
    """Two folders of two images each, without captions."""
    from PIL import Image

    for number, name in enumerate(("owl/0.png", "owl/1.png", "ant/0.png", "ant/1.png")):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * number, 9, 9)).save(tmp_path / "tree" / name)
    return tmp_path / "tree"


def test_images_alone_and_labels(capsys, classes, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["data", "shards", str(classes), "--output", str(out), "--labels", "folders"]) == 0
    printed = capsys.readouterr().out
    assert "1 shard; 0 images left out" in printed and "labels: 4 samples of classes 0 to 1" in printed
    assert "4 images without a caption: used where captions are not needed" in printed
    assert (out / "classes.txt").read_text() == "ant\nowl\n"
    assert cli.main(["data", "index", str(out), "--labels"]) == 0 and "0 quarantined" in capsys.readouterr().out
    assert "none of 4 samples has a caption" in told(
        capsys, "data", "tokenizer", out, "--output", tmp_path / "t.model", "--vocab-size", 300
    )
    (classes / "ant").rename(classes / "bee")
    assert "names other classes" in told(
        capsys, "data", "shards", classes, "--output", out, "--prefix", "x", "--labels", "folders"
    )
    assert "absent.json: cannot be read" in told(
        capsys, "data", "shards", classes, "--output", tmp_path / "new", "--labels", tmp_path / "absent.json"
    )
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_of_the_captions_that_there_are(capsys, classes, tmp_path):
    (classes / "owl" / "0.txt").write_text("an owl, an owl, an owl")
    out = str(tmp_path / "out")
    assert cli.main(["data", "shards", str(classes), "--output", out, "--images-alone"]) == 0
    assert "3 images without a caption: used" in capsys.readouterr().out
    assert cli.main(["data", "tokenizer", out, "--output", str(tmp_path / "t.model"), "--vocab-size", "270"]) == 0
    printed = capsys.readouterr().out
    assert "left out: 3 images without a caption" in printed and "from 1 texts" in printed
    assert cli.main(["data", "index", out]) == 0
    assert "3 images without a caption among captioned ones: quarantined" in capsys.readouterr().out
