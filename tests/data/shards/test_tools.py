"""The tools as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import python_path

ROOT = Path(__file__).parents[3]


def tool(name, *arguments):
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip


def test_from_nothing_to_a_tokenizer(tmp_path):
    made = tool("make_demo_data.py", tmp_path / "demo", "--train", 40, "--heldout", 4, "--size", 32, "--processes", 1)
    assert made.returncode == 0, made.stderr
    assert "44 samples, 0 quarantined" in made.stdout and "scenes 44/44" in made.stderr
    again = tool("index_shards.py", tmp_path / "demo" / "train", tmp_path / "demo" / "heldout")
    assert again.returncode == 0 and "2 shards (2 up to date)" in again.stdout
    arguments = [tmp_path / "demo" / "train", "--output", tmp_path / "t.model", "--vocab-size", 320]
    trained = tool("train_tokenizer.py", *arguments)
    assert trained.returncode == 0 and "pieces" in trained.stdout, trained.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("index_shards.py", ["/nowhere"], "/nowhere: no such file or folder"),
        ("train_tokenizer.py", ["/nowhere", "--output", "x", "--vocab-size", "300"], "no such file or folder"),
        ("make_shards.py", ["/nowhere", "--output", "x"], "neither a folder"),
        ("make_demo_data.py", ["x", "--train", "0"], "argument --train: 0 must be at least 1"),
    ],
)
def test_mistakes_end_in_one_sentence(name, arguments, message):
    done = tool(name, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
