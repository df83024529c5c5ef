"""No line of another package stands on the console of an ordinary command: each goes to the log of the run, where there
is one. What others say is made up here, in every way that they have, and Megatron's own is there as well."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import warnings
from collections import deque

import pytest

from megamug.command_line import console
from tests.distributed.launch import ROOT, environment
from tests.evaluate.tiny_run import STEP, make_data, make_run, tiny_config

# Says something as a command begins its work, which is when it imports one of these; and its loudest at once.
NOISE = """
import logging, sys, warnings

own = logging.getLogger("noisy.own")
own.propagate = False
own.addHandler(logging.StreamHandler(sys.stderr))

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in (
            "megamug.planner.search", "megamug.planner.dry_run", "megamug.doctor", "megamug.training.trainer",
            "megamug.generation.loading", "megamug.benchmarks.losses", "megamug.benchmarks.mug",
            "megatron.core.tensor_parallel",
        ):
            warnings.warn("noisy warns")
            logging.getLogger("noisy").warning("noisy logs")
            own.warning("noisy has a handler")
            logging.warning("noisy at the root")
        if name == "megamug.planner.search":
            logging.getLogger("noisy").error("a mistake elsewhere")

sys.meta_path.insert(0, Watch())
"""
MANNERS = ("noisy warns", "noisy logs", "noisy has a handler", "noisy at the root")
SCRIPT = """
import contextlib, json, sys
words, routed = json.loads(sys.argv[1])
from megamug import cli
from megamug.command_line import console
if not routed:
    console.own = contextlib.nullcontext
for command in words:
    for stream in (sys.stdout, sys.stderr):
        print("=====", command[0], file=stream, flush=True)
    assert cli.main(command) == 0, command
"""
PROGRAM = ROOT / "tools" / "benchmark.py"
# What none of our lines holds, and those of Megatron, torch and the rest do.
FOREIGN = re.compile(r"noisy|[Ww]arning|site-packages|Apex is|ModuleSpec|full_param_layout|deprecated|CUDA runtime"
                     r"|process_group|libpng")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("console"))
    make_run(tiny_config(folder, folder / "run"))
    (folder / "noise").mkdir()
    (folder / "noise" / "sitecustomize.py").write_text(NOISE)
    return folder


def python(folder, *words, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of an interpreter in which others are noisy."""
    env = environment()
    env["PYTHONPATH"] = f"{folder / 'noise'}:{env['PYTHONPATH']}"
    del env["PYTHONWARNINGS"]
    words = [sys.executable, *map(str, words)]
    run = subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, timeout=400)
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout, run.stderr


def told(text: str) -> dict[str, list[str]]:
    """{command: its lines} of SCRIPT's output."""
    parts = re.split(r"^===== (\w+)\n", text, flags=re.MULTILINE)
    assert parts[0] == ""
    found: dict[str, list[str]] = {}
    for name, lines in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(name, []).extend(lines.splitlines())
    return found


def test_commands_that_look_at_things(folder):
    config, run = str(folder / "run" / "config.yaml"), str(folder / "run")
    picture = folder / "picture.png"
    from PIL import Image

    Image.new("RGB", (40, 40), (200, 30, 30)).save(picture)
    commands = [
        ["plan", config, "--gpus", "2", "--gpu", "h100", "--top", "1"],
        ["train", config, "--dry-run"],
        ["doctor"],
        ["evaluate", run, "--task", "reconstruction", "--samples", "2", "--output", str(folder / "out")],
        ["generate", run, "--images", str(picture), "--output", str(folder / "out")],
    ]
    out, err = python(folder, "-c", SCRIPT, json.dumps([commands, True]))
    out, err = told(out), told(err)
    assert not FOREIGN.search("\n".join(sum(out.values(), []))), out
    assert err["plan"] == ["a mistake elsewhere"]  # errors are shown
    assert err["train"][0] == "megamug train: loading torch and Megatron-core ..."  # by the first that wants them
    assert err["train"][1:] == err["doctor"] == []
    assert json.loads("\n".join(out["evaluate"]))["step"] == STEP
    written = json.loads("\n".join(out["generate"]))
    assert err["generate"] == [*written["pictures"], str(folder / "out" / "captions.json")]
    assert not FOREIGN.search("\n".join(err["evaluate"])), err


def test_training_keeps_it_in_the_log_of_the_run(folder):
    words = ["run_dir=trained", "train.steps=2", "train.validate_every=1", "log.every=1",
             "checkpoint.asynchronous=true", "parallel.distributed_optimizer=true"]  # fmt: skip
    out, err = python(folder, "-m", "megamug", "train", folder / "run" / "config.yaml", *words)
    log = (folder / "trained" / "log" / "rank-0.log").read_text()
    ours = re.findall(r"^\S+ \S+ (?:INFO|WARNING) megamug\S*: (.*)", log, flags=re.MULTILINE)
    assert err == "megamug train: loading torch and Megatron-core ...\n" and out.splitlines() == ours and len(ours) > 6
    for manner in MANNERS:
        assert manner in log


def test_a_benchmark(folder):
    sizes = ["model.layers=1", "model.width=32", "model.heads=4", "model.ffn_width=64", "model.decoder_layers=1",
             "model.decoder_width=32", "model.decoder_heads=4", "data.image_size=32"]  # fmt: skip
    words = ["mug", "--preset", "demo", "--batch", "2", "--steps", "1", "--dtypes", "fp32"]
    out, err = python(folder, PROGRAM, *words, *sizes)
    assert err == "" and not FOREIGN.search(out)
    assert all(re.match(r"# |fp32; |  (MFU|megamug|transformers)|$", line) for line in out.splitlines()), out


def test_without_the_routing_the_others_are_heard(folder):
    """So what the tests above look for is there to be found."""
    plan = ["plan", str(folder / "run" / "config.yaml"), "--gpus", "2", "--gpu", "h100", "--top", "1"]
    _, err = python(folder, "-c", SCRIPT, json.dumps([[plan], False]))
    for manner in MANNERS:
        assert manner in err


@pytest.fixture
def untaken(monkeypatch):
    """As in a process that has not called `console.take`, which tests of tools may have done in this one."""
    for name, value in {"_depth": 0, "_files": [], "_kept": deque()}.items():
        monkeypatch.setattr(console, name, value)
    monkeypatch.setattr(logging.Logger, "handle", console._handle)


def test_what_was_said_before_the_run_had_a_file(tmp_path, caplog, untaken):
    """Nested, and given back: in the end the standard library is as it was."""
    handle, show = logging.Logger.handle, warnings.showwarning
    file = logging.FileHandler(tmp_path / "log")
    with console.own():
        logging.getLogger("other").warning("early")
        with console.own():
            logging.getLogger("other").warning("nested")
        console.to_file(file)
        logging.getLogger("other").warning("late")
        logging.getLogger("other").error("wrong")
        logging.getLogger("megamug.here").warning("ours")
    file.close()
    assert (tmp_path / "log").read_text().split() == ["early", "nested", "late"]
    assert caplog.messages == ["wrong", "ours"]
    logging.getLogger("other").warning("as ever")
    assert caplog.messages[-1] == "as ever"
    assert logging.Logger.handle is handle and warnings.showwarning is show
