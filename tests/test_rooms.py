"""The package lies as docs/architecture.md says: imports run downwards, files and folders keep a size one can read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOOSE = {"__init__", "__main__", "cli", "doctor", "durable", "errors"}
SOURCES = (".py", ".cpp", ".h", ".inl", ".cu", ".cuh", ".sh")
LONGEST = 400  # lines of a file
DOZEN = 12
# tools/ is named by the scripts of others, and stays flat.
FLAT = {"tools"}


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    found = sorted(set(listed.stdout.splitlines()))
    return [Path(line) for line in found if line.endswith(SOURCES) and (ROOT / line).exists()]


def contracts(folder: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", "import importlinter.cli as c; c.lint_imports_command()", "--no-logo", "--no-cache"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(folder)})  # fmt: skip


def test_imports_run_downwards_and_in_no_circle():
    pytest.importorskip("importlinter")
    result = contracts(ROOT)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "Contracts: 2 kept, 0 broken." in result.stdout


@pytest.mark.parametrize(("file", "line", "broken"), [
    ("data/order.py", "from megamug.models import task", "imports run downwards"),
    ("checkpoint/state.py", "from megamug.training.optim import Optimizer", "imports run downwards"),
    ("training/optim.py", "from megamug.training import trainer", "no circles"),
])  # fmt: skip
def test_one_import_turned_round_is_found_out(file, line, broken, tmp_path):
    pytest.importorskip("importlinter")
    shutil.copytree(ROOT / "megamug", tmp_path / "megamug", ignore=shutil.ignore_patterns("_lib", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "megamug" / file
    path.write_text(path.read_text().replace("import annotations\n", f"import annotations\n{line}\n", 1))
    result = contracts(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(rf"^{broken}.* BROKEN$", result.stdout, re.MULTILINE), result.stdout


def test_files_and_folders_keep_a_size_that_one_can_read():
    long = {str(path): count for path in sources() if (count := len((ROOT / path).read_text().splitlines())) > LONGEST}
    assert long == {}
    folders: dict[str, int] = {}
    for path in sources():
        if path.name != "__init__.py":
            folders[str(path.parent)] = folders.get(str(path.parent), 0) + 1
    assert {name: count for name, count in folders.items() if count > DOZEN and name not in FLAT} == {}


def test_nothing_lies_loose_in_the_package():
    assert {path.stem for path in (ROOT / "megamug").glob("*.py")} == LOOSE


def test_every_room_and_every_file_that_the_map_names_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.name for path in (ROOT / "megamug").iterdir() if (path / "__init__.py").exists()}
    assert {name for name in rooms if f"`{name}/`" not in page} == set()
    named = set(re.findall(r"`((?:megamug|tests|tools|docs|examples|csrc)/[\w./-]+)`", page))
    assert len(named) > 20
    assert {name for name in named if not (ROOT / name).exists()} == set()
