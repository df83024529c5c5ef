"""The kill storm, on the tests' recipe: as a user runs it, and with ranks that start quickly."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT, environment
from tests.reliability.storm import ForkedLife
from tools import chaos


def test_a_storm_over_two_ranks_ends_with_a_table(recipe, tmp_path, capsys):
    arguments = [str(recipe), "--kills", "3", "--minutes", "1", "--processes", "2", "--output", str(tmp_path / "out"),
                 "checkpoint.asynchronous=true"]  # fmt: skip
    code = chaos.main(arguments, lambda words, console: ForkedLife(words, 2, console))
    told = capsys.readouterr().out
    assert code == 0, told
    assert re.search(r"^\| kills \| \d \(in starts \d, steps \d, saves \d\) \|$", told, re.MULTILINE), told
    assert "| bits equal | yes |" in told and re.search(r"\| resumes \| \d+ \|", told)


def test_the_program_itself_kills_and_starts_again(recipe, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "chaos.py"), str(recipe), "--kills", "1", "--minutes", "3",
         "--output", str(tmp_path / "out"), "train.steps=4", "checkpoint.every=2"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| kills | 1 (" in result.stdout and "| bits equal | yes |" in result.stdout


def test_bits_that_differ_are_found(recipe, runs, tmp_path, capsys):
    """Another seed in the disturbed runs: the comparison can fail."""
    def start(words, console):
        seed = [] if str(tmp_path / "out" / "undisturbed") in words[-1] else ["seed=7"]
        return ForkedLife([*words, *seed], 1, console)

    arguments = [str(recipe), "--kills", "1", "--minutes", "0.0001", "--output", str(tmp_path / "out"), "train.steps=3"]
    assert chaos.main(arguments, start) == 1
    told = capsys.readouterr().out
    assert "| bits equal | no |" in told and "run 1: state.json differs" in told
    assert "optimizer.exp_avg." in told or "encoder" in told


@pytest.mark.parametrize(("words", "said"), [
    (["--kills", "0", "--minutes", "1"], "--kills is 0"),
    (["--kills", "1", "--minutes", "1", "checkpoint.every=0"], "checkpoint.every"),
    (["--kills", "1", "--minutes", "1", "--frobnicate"], "frobnicate"),
])  # fmt: skip
def test_mistakes_are_sentences(recipe, tmp_path, words, said):
    result = subprocess.run([sys.executable, str(ROOT / "tools" / "chaos.py"), str(recipe), *words],
                            env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_every_tensor_is_compared(tmp_path):
    import torch

    state = {"state.json": json.loads("{}")}
    same = {**state, "a": lambda: torch.tensor([float("nan"), 0.0])}
    other = {**state, "a": lambda: torch.tensor([float("nan"), -0.0])}
    assert chaos.differences(same, same) == []
    assert chaos.differences(same, other) == ["a differs"]
    assert chaos.differences(same, state) == ["a is in one of the checkpoints alone"]
