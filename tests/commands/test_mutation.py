"""Small changes that the tests of a made module notice, and those that they do not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megamug.errors import UserError
from tests.distributed.launch import ROOT, environment

pytest.importorskip("cosmic_ray", reason="cosmic-ray is not installed (extra `dev`)")
from tools import mutation  # noqa: E402

MODULE = '''
def clipped(x: int | None, top: int) -> int:
    """At most `top`, not 1 + 1."""
    if x is None:
        raise ValueError("no number of " + "any kind")
    return min(x, top)

def seven_times(x):
    return x * 7
'''
TESTS = """
from made.room.numbers import clipped, seven_times

def test_clipped():
    assert clipped(5, 3) == 3 and clipped(2, 3) == 2 and {here}
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "made" / "room").mkdir(parents=True)
    (tmp_path / "tests" / "room").mkdir(parents=True)
    (tmp_path / "made" / "room" / "numbers.py").write_text(MODULE)
    return tmp_path


def mutated(tree, *words: str, here: str = "True") -> tuple[int, str, str]:
    (tree / "tests" / "room" / "test_numbers.py").write_text(TESTS.format(here=here))
    command = [sys.executable, str(ROOT / "tools" / "mutation.py"), "made", "--root", str(tree), *words]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (tree / "made" / "room" / "numbers.py").read_text() == MODULE, "changes are made in a copy"
    return result.returncode, result.stdout, result.stderr


def test_what_no_test_looks_at_is_listed(tree):
    """Of four places: no annotation, no words of an error."""
    code, said, error = mutated(tree)
    assert (code, error) == (0, "") and said.startswith("4 of 4 places in 1 modules are drawn\n")
    assert "2 of 4 changes were noticed, 0 of them by the time" in said and "; 0 of those drawn were not" in said
    diffs = said.partition("\n\n")[2]
    assert diffs.count("-    return x * 7") == 2 and diffs.count("+    return x * ") == 1 and "clipped" not in diffs
    assert "4 of 4 changes were noticed" in mutated(tree, here="[seven_times(2), seven_times(3)] == [14, 21]")[1]


def test_tests_that_fail_anyway_notice_nothing(tree):
    code, said, _ = mutated(tree, here="False")
    assert code == 1 and "made/room/numbers.py: not tried, its tests do not pass as it is" in said
    assert "0 of 0 changes were noticed" in said and "; 4 of those drawn were not tried" in said


def test_a_part_is_drawn_by_its_seed(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    drawn = [mutation._sample(["made"], 2, seed) for seed in (5, 5, 6, 7)]
    assert drawn[0] == drawn[1] and drawn[1:] != drawn[1:2] * 3 and {len(sample) for sample in drawn} == {2}
    assert capsys.readouterr().out.startswith("2 of 4 places in 1 modules are drawn\n")
    with pytest.raises(UserError, match="absent: no such folder or module of the tree; name it from the root"):
        mutation._sample(["absent"], 2, 5)
