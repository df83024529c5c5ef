"""The doctor's report: complete, true to pyproject.toml, and with something to do for every problem."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest

from megamug import doctor

ROOT = Path(__file__).resolve().parents[1]


def found(report: doctor.Report, name: str) -> doctor.Finding:
    return next(finding for finding in report.findings if finding.name == name)


def test_the_report_names_everything(capsys):
    assert doctor.run(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_train"] is True
    names = [finding["name"] for finding in report["findings"]]
    for name in ["python", *(package.name for package in doctor.PACKAGES), "compiled losses", "GPUs", "driver", "NCCL",
                 "nvcc", "CPU", "disk", "shared memory", "open files"]:  # fmt: skip
        assert names.count(name) == 1, name
    for finding in report["findings"]:
        assert finding["status"] in ("ok", "absent", "problem", "fatal")
        if finding["name"] in ("torch", "megatron-core"):
            assert finding["found"] == importlib.metadata.version(finding["name"])


def test_the_table_says_what_to_do(capsys):
    assert doctor.run(as_json=False) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("Training can run here.")
    assert "NVIDIA/apex" in text or "ok      apex" in text


def test_dependencies_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("transformer-engine", "apex")
    wanted = {package.name + package.versions for package in doctor.PACKAGES if package.name not in extras}
    assert wanted == set(project["dependencies"])
    for package in doctor.PACKAGES:
        assert package.used_for and package.get
        assert package.name == "transformer-engine" or package.versions in package.get or package.name in package.get
    # What is installed by `pip install -e '.[te]'` fits every Megatron-core that the package takes.
    (engine,) = project["optional-dependencies"]["te"]
    lowest = engine.partition("]>=")[2]
    assert ".[te]" in doctor.TE and all(doctor._fits(lowest, pair.engine) for pair in doctor.PAIRS)
    for version in ("0.16.1", "0.17.0", "0.18.2", "0.19.2"):
        assert sum(doctor._fits(version, pair.megatron) for pair in doctor.PAIRS) == 1


def test_no_message_names_a_package_of_our_name():
    """On an index that name could be anybody's: what is installed is the checkout."""
    told = [path for folder in ("megamug", "tools", "docs", "examples") for path in (ROOT / folder).rglob("*.*")
            if path.suffix in (".py", ".md", ".yaml", ".sh")]  # fmt: skip
    assert len(told) > 100
    for path in [*told, ROOT / "README.md"]:
        assert not re.search(r"pip install (?:-\S+ )*['\"]?megamug\b", path.read_text()), path


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.10,<2.14", True), ("2.9.1", ">=2.10,<2.14", False), ("2.14.0", ">=2.10,<2.14", False),
        ("2.10", ">=2.10,<2.14", True), ("0.16.0", ">=0.16.1,<0.20", False), ("0.19.2rc1", ">=0.16.1,<0.20", True),
        ("12.1", ">=12.2", False), ("13.0.0", ">=12.2", True), ("1", "", True),
    ],
)  # fmt: skip
def test_version_ranges(version, wanted, fits):
    assert doctor._fits(version, wanted) is fits


def test_a_missing_dependency_is_fatal_and_an_extra_is_not(monkeypatch):
    def version(name):
        if name in ("psutil", "apex"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    report = doctor.examine()
    assert found(report, "psutil").status == "fatal" and found(report, "psutil").do == "pip install psutil"
    apex = found(report, "apex")
    assert apex.status == "absent" and "--no-build-isolation ." in apex.do and apex.stands_in
    assert not report.can_train
    assert doctor.table(report).endswith("Training cannot run here until mended: psutil.")


def test_a_package_that_cannot_be_imported_and_one_of_the_wrong_version(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text("raise OSError('libcudart.so.13:\\n cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.5")
    package = doctor.Package("breaks", "breaks", "", "nothing", "plain torch", "pip install breaks")
    finding = doctor.examine_package(package)
    assert finding.status == "problem" and "cannot be imported: libcudart.so.13: cannot open" in finding.found
    finding = doctor.examine_package(doctor.Package("os", "os", ">=2", "nothing", "", "pip install os"))
    assert finding.status == "fatal" and finding.found == "1.5, but >=2 is needed"


def test_without_torch_the_rest_is_still_told(monkeypatch):
    broken = doctor.Package("torch-that-is-absent", "torch_that_is_absent", "", "tensors", "", "pip install torch")
    monkeypatch.setattr(doctor, "PACKAGES", (broken, *doctor.PACKAGES[1:]))
    report = doctor.examine()
    assert not report.can_train and found(report, "disk")
    assert not [finding for finding in report.findings if finding.name in ("GPUs", "NCCL", "compiled losses")]


def test_scarce_space_and_files_are_problems_with_a_remedy(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**26))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    report = doctor.examine()
    remedies = {"disk": "checkpoint.keep", "shared memory": "--shm-size", "open files": "ulimit -n 4096"}
    for name, remedy in remedies.items():
        finding = found(report, name)
        assert finding.status == "problem" and remedy in finding.do
    assert report.can_train  # warnings, not obstacles


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    gpus = doctor._gpus()[0]
    assert gpus.status == "problem" and "install a CUDA build of torch" in gpus.do
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    gpus = doctor._gpus()[0]
    assert gpus.status == "problem" and "CUDA_VISIBLE_DEVICES" in gpus.do


def test_nvcc_is_found_on_the_path_or_under_cuda_home(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    if shutil.which("nvcc") is None:
        assert doctor._nvcc().status == "absent" and "CUDA_HOME" in doctor._nvcc().do
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    os.environ["PATH"] = f"{tmp_path / 'bin'}:/bin"
    assert doctor._nvcc().status == "ok" and doctor._nvcc().found == f"13.0 ({nvcc})"


@pytest.mark.parametrize(
    ("megatron", "engine", "status"),
    [("0.16.1", "2.9.0", "ok"), ("0.16.1", "2.20.2", "ok"), ("0.16.1", "2.8.0", "problem"),
     ("0.19.2", "2.11.0", "problem"), ("0.17.1", "2.13.0", "problem"), ("0.19.2", "2.14.0", "ok"),
     ("0.19.2", "2.20.2+abc", "ok"), ("0.15.0", "2.14.0", None), ("0.19.2", None, None)],
)  # fmt: skip
def test_pairs_of_megatron_and_transformer_engine(megatron, engine, status, monkeypatch):
    def version(name):
        if found := {"megatron-core": megatron, "transformer-engine": engine}[name]:
            return found
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    told = doctor._pair()
    assert [finding.status for finding in told] == ([status] if status else [])
    if status == "problem":
        assert megatron in told[0].found and engine in told[0].found and ".[te]" in told[0].do
    if (megatron, engine) == ("0.19.2", "2.11.0"):
        assert "multi_tensor_scale_tensor" in told[0].found and ">=2.14 has it" in told[0].found


DRIVERS = {
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159  Release Build  (dvs@U22)  Thu": "580.159",
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023": "535.104.05",
    "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  575.57.08  Release Build": "575.57.08",
    "NVRM version: something else\n": None,
    None: None,
}


class Nvml:
    """A stand-in for the driver's library."""

    def __init__(self, version: bytes, init: int = 0):
        self.version, self.init, self.open = version, init, 0

    def nvmlInit_v2(self) -> int:
        self.open += self.init == 0
        return self.init

    def nvmlSystemGetDriverVersion(self, text, length) -> int:
        assert len(text) == length.value == 80
        text.value = self.version
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0


@pytest.mark.parametrize("told", DRIVERS)
def test_the_version_of_the_driver(told, tmp_path, monkeypatch):
    def load(name: str):
        assert name == "libnvidia-ml.so.1"
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor.ctypes, "CDLL", load)
    if told is not None:
        doctor.DRIVER.write_text(told + "\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n")
    library = None
    assert doctor._driver() == (DRIVERS[told] or (None if told is None else "of unknown version"))
    library = Nvml(b"580.159.04")
    assert doctor._driver() == (DRIVERS[told] or "580.159.04") and library.open == 0
    library = Nvml(b"580.159.04", init=9)  # NVML_ERROR_DRIVER_NOT_LOADED
    assert doctor._driver() == (DRIVERS[told] or (None if told is None else "of unknown version"))
