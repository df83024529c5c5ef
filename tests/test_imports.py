"""Importing megamug is light: nothing heavy or optional comes in, and no CUDA is touched."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import megamug
from tests.distributed.launch import python_path

OPTIONAL = ["transformer_engine", "apex", "nvidia.dali"]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(megamug.__path__, "megamug.")
    if module.name != "megamug.__main__"  # runs the command line
)

# Megatron-core itself looks for Transformer Engine and apex when imported: what counts is who asks. The finder notes
# the first module on the stack that is not the import system, whether or not the package is installed.
SCRIPT = """
import importlib, json, sys
asked = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(package + ".") for package in OPTIONAL):
            frame = sys._getframe(1)
            while frame and frame.f_globals.get("__name__", "").startswith(("importlib", "_frozen_importlib")):
                frame = frame.f_back
            importer = frame.f_globals.get("__name__", "") if frame else ""
            if importer.split(".")[0] == "megamug":
                asked.append([importer, name])
        return None

OPTIONAL, modules = json.loads(sys.argv[1])
sys.meta_path.insert(0, Watch())
for module in modules:
    importlib.import_module(module)
torch = sys.modules.get("torch")
print(json.dumps({
    "asked": asked, "torch": torch is not None, "dali": "nvidia.dali" in sys.modules,
    "cuda": torch is not None and torch.cuda.is_initialized(),
    "distributed": torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized(),
}))
"""


def imported(modules: list[str], path: list[Path] = ()) -> dict:
    folders = os.pathsep.join([*map(str, path), python_path()])
    environment = os.environ | {"PYTHONPATH": folders, "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, json.dumps([OPTIONAL, modules])],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_command_line_imports_not_even_torch():
    configuration = ["megamug.configuration.reading", "megamug.configuration.validate"]
    names = ["megamug", "megamug.cli", *configuration, "megamug.doctor", "megamug.errors"]
    assert imported(names) == {"asked": [], "torch": False, "dali": False, "cuda": False, "distributed": False}


def test_no_module_imports_an_optional_package_or_touches_cuda():
    assert "megamug.models.mug.model" in MODULES
    result = imported(MODULES)
    assert result["torch"]
    assert (result["asked"], result["dali"], result["cuda"], result["distributed"]) == ([], False, False, False)


@pytest.mark.parametrize("package", OPTIONAL)
def test_the_watch_sees_an_import(tmp_path, package):
    """The guard can fail: a module of this name that does import the package is found out."""
    (tmp_path / "megamug").mkdir()
    # OSError: without torch, Transformer Engine lacks libraries
    tried = f"try:\n    import {package}\nexcept (ImportError, OSError):\n    pass\n"
    (tmp_path / "megamug" / "__init__.py").write_text(tried)
    assert ["megamug", package] in imported(["megamug"], [tmp_path])["asked"]
