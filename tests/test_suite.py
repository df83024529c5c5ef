"""How the suite is run: GPUs hidden from it, the tests marked `gpu` in a process of their own that sees them."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import environment

ROOT = Path(__file__).resolve().parents[1]


def test_the_suite_and_what_it_starts_see_no_gpu():
    assert environment()["CUDA_VISIBLE_DEVICES"] == os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.device_count() == 0


def test_tests_of_gpus_are_in_their_folder():
    """Elsewhere the run that sees GPUs would not find them."""
    marked = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"mark\.gpu\b", path.read_text())]
    assert len(marked) > 5
    assert [path for path in marked if "gpu" not in path.parts and path != Path(__file__)] == []


# ---------------------------------------------------------------------------------------------- tests/conftest.py

SAMPLE = """
import os, pathlib, subprocess, sys
import pytest

def seen():
    words = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    assert told == os.environ["CUDA_VISIBLE_DEVICES"]
    return told

def test_plain():
    pathlib.Path("plain").write_text(seen())

@pytest.mark.gpu
@pytest.mark.parametrize("one", [1, 2])
def test_marked(one):
    pathlib.Path("marked").write_text(seen())
"""


@pytest.mark.parametrize(("option", "gpus", "workers"), [
    ("", True, "2"), ("", False, "0"), ("gpu", True, "2"), ("gpu", False, "0"), ("not gpu", True, "0"),
])  # fmt: skip
def test_only_the_run_of_marked_tests_sees_gpus(option, gpus, workers, tmp_path):
    """On a machine that stands in for one with seven GPUs, of which one is given, or for one without."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {gpus})\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-n", workers, "-p", "no:cacheprovider", "-m", option, "."],
        cwd=tmp_path, env={**environment(PYTHONPATH=str(tmp_path)), "CUDA_VISIBLE_DEVICES": "6"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    files = {name: (tmp_path / name).read_text() for name in ("plain", "marked") if (tmp_path / name).exists()}
    reasons = re.findall(r"SKIPPED \[2\] \S+:\d+: (.*)", result.stdout)
    if option == "gpu":
        assert files == ({"marked": "6"} if gpus else {})
        assert reasons == ([] if gpus else ["torch sees no CUDA device"])
    else:
        assert files == {"plain": ""}
        wanted = ["needs a GPU, and a run of its own: pytest -m gpu tests/gpu"]
        assert reasons == (wanted if option == "" else [])


# ---------------------------------------------------------------------------------------------- Makefile


@pytest.mark.parametrize(("gpu", "tests", "fails", "expected"), [
    (False, None, None, [["-n", "2", "--dist", "loadfile", "tests"]]),
    (False, "tests/data tests/gpu", None, [["-n", "2", "--dist", "loadfile", "tests/data", "tests/gpu"]]),
    (True, None, None, [["-n", "2", "--dist", "loadfile", "--ignore=tests/gpu", "tests"], ["-m", "gpu", "tests/gpu"]]),
    (True, "tests/data", None, [["-n", "2", "--dist", "loadfile", "--ignore=tests/gpu", "tests/data"]]),
    (True, "tests/gpu/kernels/test_losses.py", None, [["-m", "gpu", "tests/gpu/kernels/test_losses.py"]]),
    (True, None, "loadfile", [["-n", "2", "--dist", "loadfile", "--ignore=tests/gpu", "tests"],
                              ["-m", "gpu", "tests/gpu"]]),
    (True, None, "gpu", [["-n", "2", "--dist", "loadfile", "--ignore=tests/gpu", "tests"], ["-m", "gpu", "tests/gpu"]]),
])  # fmt: skip
def test_make_test_runs_both_where_there_is_a_gpu(gpu, tests, fails, expected, tmp_path):
    """`make test` with programs that stand in for nvidia-smi and the environment's Python. `fails`: the run with this
    word does, and so does the whole."""
    def program(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    smi = 'echo "GPU 0: NVIDIA H100 (UUID: x)"' if gpu else "echo NVIDIA-SMI has failed because; exit 9"
    program(tmp_path / "bin" / "nvidia-smi", smi)
    failing = f'case " $* " in *" {fails} "*) exit 1;; esac' if fails else ""
    program(tmp_path / "venv" / "bin" / "python", f'echo "$@" >> "{tmp_path}/calls"\n{failing}')
    (tmp_path / "venv" / ".installed").touch()
    words = ["make", "-C", str(ROOT), "test", f"VENV={tmp_path / 'venv'}"] + ([f"TESTS={tests}"] if tests else [])
    env = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    result = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode != 0) == bool(fails), result.stdout + result.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == [["-m", "pytest", "-q", *words] for words in expected]


# ---------------------------------------------------------------------------------------------- tests/gpu

COLLECT = """
import json, sys
import pytest

class Look:
    def pytest_collection_finish(self, session):
        known = {"request"}
        missing = [
            (item.nodeid, name) for item in session.items for name in item.fixturenames
            if name not in known and name not in item._fixtureinfo.name2fixturedefs
            and name not in getattr(getattr(item, "callspec", None), "params", {})
        ]
        print("FOUND " + json.dumps({"missing": missing, "files": sorted({i.path.name for i in session.items})}))

sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"], plugins=[Look()]))
"""


def test_the_tests_of_gpus_can_be_collected_and_their_fixtures_exist():
    words = [sys.executable, "-W", "ignore", "-c", COLLECT]
    result = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = json.loads(re.search(r"^FOUND (.*)$", result.stdout, re.MULTILINE)[1])
    assert found["missing"] == []
    assert found["files"] == sorted(path.name for path in (ROOT / "tests" / "gpu").rglob("test_*.py"))
