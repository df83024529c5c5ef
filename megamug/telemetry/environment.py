"""What made a run: RUN/environment.json, which tells of every life of it (a start, and what came of it).

    {"id": ..., "lives": [{"started": ..., "ended": ..., "outcome": "finished", "from_step": 0, "to_step": 1000,
     "command": ..., "folder": ..., "git": {"commit": ..., "dirty": false}, "versions": {...}, "host": {...},
     "devices": [...], "processes": 8, "job": {...}}, ...]}

A life without `ended` is under way, or was killed. `id` is of the run, and stays with its folder. The same functions
say in benchmarks where figures were measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

import megamug
from megamug.command_line.arguments import typed_command
from megamug.durable import replace_text

logger = logging.getLogger(__name__)

FILE, DAMAGED = "environment.json", "environment.damaged.json"
PACKAGES = (
    "torch", "megatron-core", "nvidia-dali-cuda130", "numpy", "transformers", "transformer-engine", "pillow",
    "webdataset", "sentencepiece", "tokenizers", "timm",
)  # fmt: skip
JOB = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID",
       "TORCHELASTIC_RESTART_COUNT")  # fmt: skip
OUTCOMES = {0: "finished", 3: "stopped on request"}


def versions() -> dict[str, str]:
    """Of Python, megamug and those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version(), "megamug": megamug.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def devices() -> list[str]:
    """The GPUs that this process sees, by name."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def hardware() -> dict:
    """Processor, CPUs that this process may use, memory, GPUs."""
    return {
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "devices": devices(),
        "threads": torch.get_num_threads(),
    }


def git_state(folder: Path = Path(megamug.__file__).parent) -> dict | None:
    """{"commit", "dirty"} of the checkout that megamug is run from; None where it is installed without one, even if
    that lies inside a checkout of something else."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None or (commit := git("rev-parse", "HEAD")) is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": changed != ""}


def read(run_dir: str | Path) -> dict:
    """What RUN/environment.json holds; of one that is damaged, or not there, a new one without lives."""
    path = Path(run_dir, FILE)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found["id"], str) and all(isinstance(life, dict) for life in found["lives"]):
            return found
    except FileNotFoundError:
        return {"id": uuid.uuid4().hex[:16], "lives": []}
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    os.replace(path, path.with_name(DAMAGED))
    logger.warning("%s is damaged; it is now %s, and a new one is begun", path, DAMAGED)
    return {"id": uuid.uuid4().hex[:16], "lives": []}


class Life:
    """This start of a run, in its file from the beginning."""

    def __init__(self, run_dir: str | Path, processes: int) -> None:
        self.path = Path(run_dir, FILE)
        self.all = read(run_dir)
        machine = hardware()
        self.entry = {
            "started": _now(), "ended": None, "outcome": None, "from_step": None, "to_step": None,
            "command": typed_command(), "folder": os.getcwd(), "git": git_state(), "versions": versions(),
            "host": {"name": socket.gethostname(), "system": platform.platform()}
            | {key: machine[key] for key in ("processor", "cpus", "memory_gib", "threads")},
            "devices": machine["devices"], "processes": processes,
            "job": {name: os.environ[name] for name in JOB if name in os.environ},
        }  # fmt: skip
        self.all["lives"].append(self.entry)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(self.all, indent=1) + "\n")


@contextmanager
def life(run_dir: str | Path, world) -> Iterator[dict]:
    """Around a life of a run: its start is written, and at the end when that was and what came of it.

    Yields the entry, in which the caller sets `from_step`, `to_step` and `code` (the exit code). The first rank writes;
    the others get an entry that goes nowhere. An exception is the outcome, and passes on.
    """
    if not world.is_first:
        yield {}
        return
    lived = Life(run_dir, world.size)
    try:
        yield lived.entry
        lived.entry["outcome"] = OUTCOMES.get(lived.entry.get("code"), "ended")
    except BaseException as error:
        lived.entry["outcome"] = f"failed: {type(error).__name__}"
        raise
    finally:
        lived.entry.pop("code", None)
        lived.entry["ended"] = _now()
        try:
            lived.write()
        except OSError as error:  # the run's own end, or what ended it, counts more
            logger.warning("%s: %s", lived.path, error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
