"""Checkpoint folders: written aside, verified by a manifest, renamed, then pointed to.

    RUN/checkpoints/.step-00000123.partial/    while it is being written
    RUN/checkpoints/step-00000123/             complete
        model/          torch_dist files (parameters and optimizer state)
        state.json      step, cursor into the data, configuration, schedule
        manifest.json   step, megamug version, size and SHA-256 of every other file
    RUN/checkpoints/latest                     text: the name of the newest complete folder

A save on many ranks: rank 0 calls `begin`, all ranks meet at a barrier and write into `partial_path(step)`, meet again,
and rank 0 calls `commit`. At every moment of that sequence a killed process leaves the previous checkpoint loadable.

The manifest finds damage, not malice: whoever can replace a file can replace the manifest. Loading what came from
outside is the business of `megamug.checkpoint.guarded`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import megamug
from megamug.durable import fsync_folder, replace_text

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
POINTER = "latest"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
ASIDE_FOLDER = re.compile(r"\.step-(\d{8,})\.(partial|removing|replaced)")
HASH_THREADS = 8  # hashlib releases the GIL
BLOCK_BYTES = 4 << 20


class NotSaved(RuntimeError):
    """A checkpoint could not be written: a full disk, most often. One sentence, the same on all ranks."""


class CompleteCheckpoint(NamedTuple):
    """The checkpoint to resume from, and a sentence that says why this one."""

    step: int
    path: Path
    reason: str


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        run_dir: the run folder; checkpoints live in `run_dir/checkpoints`.
        keep: newest complete checkpoints kept by `commit`; 0 keeps all.
    """

    def __init__(self, run_dir: str | Path, keep: int):
        assert keep >= 0, f"keep={keep}"
        self.root = Path(run_dir) / "checkpoints"
        self.keep = keep

    def path(self, step: int) -> Path:
        """The folder of a complete checkpoint."""
        return self.root / f"step-{step:08d}"

    def partial_path(self, step: int) -> Path:
        """The folder that all ranks write into between `begin` and `commit`."""
        return self._aside(step, "partial")

    def recover(self) -> None:
        """Clear what a killed process left behind. Rank 0 of a *training* run calls this once, before resuming.

        Half-written and half-removed folders go; a complete folder that had been moved aside to be replaced, and whose
        replacement never arrived, comes back.
        """
        if not self.root.is_dir():
            return
        for entry in sorted(self.root.iterdir()):
            match = ASIDE_FOLDER.fullmatch(entry.name)
            if not match:
                continue
            target = self.path(int(match[1]))
            if match[2] == "replaced" and not target.exists():
                os.rename(entry, target)
                logger.warning("checkpoint %s restored: its replacement was never completed", target)
            else:
                shutil.rmtree(entry)
                logger.warning("removed %s, left behind by an interrupted run", entry)
        fsync_folder(self.root)

    def begin(self, step: int) -> Path:
        """Create the empty temporary folder of `step` (rank 0 only; the others wait at a barrier) and return it."""
        partial = self.partial_path(step)
        if partial.exists():
            shutil.rmtree(partial)
            logger.warning("removed %s, left behind by an earlier attempt at this step", partial)
        partial.mkdir(parents=True)
        (partial / "model").mkdir()
        return partial

    def commit(self, step: int) -> Path:
        """Make the temporary folder of `step` the newest checkpoint (rank 0 only, after all ranks have written).

        Manifest, fsync of every file and folder, rename, pointer, retention: in this order. An existing folder of the
        same step is replaced. Returns the final folder. Raises OSError if the disk fails; the pointer then still names
        the previous checkpoint.
        """
        partial, final, replaced = self.partial_path(step), self.path(step), self._aside(step, "replaced")
        _write_manifest(partial, step)
        if final.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.rename(final, replaced)
        os.rename(partial, final)
        fsync_folder(self.root)
        replace_text(self.root / POINTER, final.name + "\n")
        if replaced.exists():
            shutil.rmtree(replaced)
        self._retain()
        return final

    def abandon(self, step: int) -> None:
        """Gives back the room of a temporary folder that could not be filled (rank 0 only)."""
        shutil.rmtree(self.partial_path(step), ignore_errors=True)

    def newest_complete(self) -> CompleteCheckpoint | None:
        """The newest checkpoint whose every byte agrees with its manifest, or None where there is none.

        Reads each file of the candidate once to hash it, so on many ranks rank 0 calls it and broadcasts the step.
        Damaged checkpoints are named in the log with what is wrong, and passed over.
        """
        pointed = self._pointed()
        passed_over = []
        for step in self.steps():
            path = self.path(step)
            problems = self.verify(path)
            if not problems:
                return CompleteCheckpoint(step, path, _reason(path.name, pointed, passed_over))
            passed_over.append(path.name)
            logger.warning("checkpoint %s passed over: %s", path, _shortened(problems))
        if passed_over:
            logger.warning("no complete checkpoint in %s (%d damaged)", self.root, len(passed_over))
        return None

    def verify(self, path: str | Path, hashes: bool = True) -> list[str]:
        """What is wrong with the checkpoint folder `path`, a sentence each; empty if it is complete.

        Nothing is unpickled. `hashes=False` looks at names and sizes only.
        """
        path = Path(path)
        try:
            manifest = _read_manifest(path)
        except (OSError, ValueError) as error:
            return [f"{MANIFEST}: {error}"]
        match = STEP_FOLDER.fullmatch(path.name)
        if match and manifest["step"] != int(match[1]):
            return [f"{MANIFEST}: belongs to step {manifest['step']}"]
        files: dict[str, dict] = manifest["files"]
        problems = [f"{name}: not in the manifest" for name in _files(path) if name not in files and _is_data(name)]
        sound = []
        for name, entry in files.items():
            problem = _size_problem(path / name, entry["size"])
            if problem:
                problems.append(f"{name}: {problem}")
            else:
                sound.append(name)
        if hashes and not problems:
            try:
                digests = _sha256_of(path, sound)
            except OSError as error:
                return [f"cannot be read: {error}"]
            for name, digest in digests:
                if digest != files[name]["sha256"]:
                    problems.append(f"{name}: SHA-256 differs from the manifest's")
        return problems

    def read_verified(self, step: int, name: str) -> bytes | None:
        """The content of one file of a checkpoint, as the manifest vouches for it; None where it does not."""
        path = self.path(step)
        try:
            manifest = _read_manifest(path)
            content = (path / name).read_bytes()
        except (OSError, ValueError):
            return None
        entry = manifest["files"].get(name)
        known = manifest["step"] == step and entry is not None
        return content if known and hashlib.sha256(content).hexdigest() == entry["sha256"] else None

    def set_aside(self, step: int) -> Path:
        """Renames a checkpoint so that it is neither resumed from, counted nor removed; returns where it lies now."""
        target = self.root / f"aside-{self.path(step).name}"
        number = 2
        while target.exists():
            target, number = self.root / f"aside-{self.path(step).name}-{number}", number + 1
        os.rename(self.path(step), target)
        fsync_folder(self.root)
        return target

    def _aside(self, step: int, kind: str) -> Path:
        return self.root / f".step-{step:08d}.{kind}"

    def steps(self) -> list[int]:
        """Steps that have a folder, complete or not, newest first."""
        if not self.root.is_dir():
            return []
        matches = (STEP_FOLDER.fullmatch(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def _pointed(self) -> str | None:
        """The folder that `latest` names; None (with a log line) if the pointer is missing, empty or dangling."""
        pointer = self.root / POINTER
        try:
            name = pointer.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("%s cannot be read (%s); the folders are searched instead", pointer, error)
            return None
        if not STEP_FOLDER.fullmatch(name) or not (self.root / name).is_dir():
            logger.warning("%s names %r, which is no checkpoint here; the folders are searched instead", pointer, name)
            return None
        return name

    def _retain(self) -> None:
        """Remove complete checkpoints beyond the `keep` newest; damaged ones are not counted, and left to be looked at.

        Only names and sizes are checked here.
        """
        if self.keep == 0:
            return
        pointed = self._pointed()
        complete = [step for step in self.steps() if not self.verify(self.path(step), hashes=False)]
        for step in complete[self.keep :]:
            if self.path(step).name == pointed:
                continue
            removing = self._aside(step, "removing")  # renamed first: a kill in the middle leaves no half checkpoint
            if removing.exists():
                shutil.rmtree(removing)
            os.rename(self.path(step), removing)
            fsync_folder(self.root)
            shutil.rmtree(removing)
            logger.info("removed checkpoint %s (checkpoint.keep=%d)", self.path(step).name, self.keep)


def _reason(name: str, pointed: str | None, passed_over: list[str]) -> str:
    if passed_over:
        return f"newest complete checkpoint; passed over as damaged: {', '.join(passed_over)}"
    if pointed == name:
        return "newest complete checkpoint, and `latest` names it"
    if pointed is None:
        return "newest complete checkpoint; `latest` names none"
    return f"newest complete checkpoint; `latest` still names {pointed}"


def _shortened(problems: list[str], shown: int = 3) -> str:
    more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + more


def _is_data(name: str) -> bool:
    """A stray note beside `model/` is harmless; a stray file inside it could be loaded."""
    return name.startswith("model/")


def _files(folder: Path) -> list[str]:
    """All files under `folder` but the manifest, as sorted POSIX paths relative to it."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path != folder / MANIFEST
    )


def _size_problem(path: Path, size: int) -> str | None:
    if path.is_symlink():
        return "is a link"
    if not path.is_file():
        return "missing"
    found = path.stat().st_size
    return None if found == size else f"{found} bytes where the manifest says {size}"


def _sha256_of(folder: Path, names: Iterable[str], durable: bool = False) -> list[tuple[str, str]]:
    """(name, hexadecimal SHA-256) of each file, hashed in parallel; `durable` also fsyncs it."""

    def one(name: str) -> tuple[str, str]:
        digest = hashlib.sha256()
        with open(folder / name, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
            if durable:
                os.fsync(file.fileno())
        return name, digest.hexdigest()

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(one, names))


def _self_digest(manifest: dict) -> str:
    """SHA-256 of the manifest's own content, so that a flipped byte in it is found as well."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, step: int) -> None:
    names = _files(folder)
    links = [name for name in names if (folder / name).is_symlink()]
    assert names and not links, f"{folder} holds {len(names)} files, links: {links}"
    digests = dict(_sha256_of(folder, names, durable=True))
    manifest = {
        "step": step,
        "megamug": megamug.__version__,
        "files": {name: {"size": (folder / name).stat().st_size, "sha256": digests[name]} for name in names},
    }
    manifest["sha256"] = _self_digest(manifest)
    for parent in sorted({(folder / name).parent for name in names}):
        fsync_folder(parent)
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _read_manifest(folder: Path) -> dict:
    """The manifest of `folder`. Raises OSError if it cannot be read, ValueError if it is not a sound manifest."""
    path = folder / MANIFEST
    if path.is_symlink():
        raise ValueError("is a link")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or not manifest["files"]:
        raise ValueError("not a manifest")
    if manifest.get("sha256") != _self_digest(manifest):
        raise ValueError("its own SHA-256 does not match")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise ValueError(f"no size and SHA-256 of {name!r}")
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError(f"names a file outside the checkpoint: {name!r}")
    return manifest
