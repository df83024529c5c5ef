"""Writes that survive a crash: beside the target, fsync, rename, fsync of the folder. And what is read back:
the hash of a file, and records in JSON whose every value is of its type."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import BinaryIO

_asides: set[Path] = set()  # of `replacing`, not yet renamed


def folder_problem(path: Path) -> str | None:
    """Why nothing can be written into `path`, a folder that is there or shall be made; None where it can."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists() or p.is_symlink())
    if not there.exists():
        return f"{there} is a link to {os.readlink(there)}, which does not exist"
    if not there.is_dir():
        return f"{path} is a file" if there == path.absolute() else f"{path} lies below {there}, which is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not writable by this user"
    return None


def disk_words(error: Exception) -> str:
    """What went wrong as a file was written, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if isinstance(error.filename, (str, Path)) else "")
    lines = str(error).splitlines()
    # torch's zip writer finds out at its end that the system took less than it was given, and says this much.
    cut = any(word in str(error) for word in ("unexpected pos", "PytorchStreamWriter", "inline_container"))
    return "a file was cut short" if cut else (lines[0][:300] if lines else type(error).__name__)


def free_words(path: Path) -> str:
    """How much room there is where `path` lies or shall lie: `3.2 MB of 1.0 GB are free in runs/mug`."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    try:
        usage = shutil.disk_usage(there)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return f"{_bytes(usage.free)} of {_bytes(usage.total)} are free in {path} (a quota may leave less)"


def _bytes(number: int) -> str:
    """1234567 -> 1.2 MB"""
    for power, unit in enumerate(("B", "kB", "MB", "GB")):
        if number < 1000 ** (power + 1):
            return f"{number} B" if power == 0 else f"{number / 1000**power:.1f} {unit}"
    return f"{number / 1000**4:.1f} TB"


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room: of the disk, of a quota, or of what one file may hold."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_folder(path: Path) -> None:
    """Make the entries of folder `path` (names, renames, removals) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` at the end: a reader sees the old content or the new, even after a crash.

    Raises OSError where the disk is full or not writable; `path` is then unchanged, as where the block raises.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several processes may write the same file
    _asides.add(aside)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        _asides.discard(aside)
    fsync_folder(path.parent)


def remove_asides() -> None:
    """Removes what `replacing` is writing in this process: for one that ends at once, in a signal's handler."""
    for aside in list(_asides):
        aside.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace file `path` by `text` (UTF-8), see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def write_atomically(path: Path, *parts: bytes) -> None:
    """Replace file `path` by the parts one after another, see `replacing`; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for part in parts:
            file.write(part)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(text: str | bytes, kind: type) -> object:
    """The dataclass `kind` that JSON `text` holds; lists become tuples where the field is one.

    Raises ValueError, saying which value is wrong, for anything else: no mapping, a key that is missing or unknown, a
    value of another type than the field's, a whole number below zero or beyond 63 bits (none of our files has such).
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return as_record(values, kind)


def as_record(values: object, kind: type) -> object:
    """The dataclass `kind` of the mapping `values`. Raises ValueError, see `read_record`."""
    if not isinstance(values, dict):
        raise ValueError(f"a mapping wanted, found {_shown(values)}")
    hints, known = typing.get_type_hints(kind), {entry.name: entry for entry in fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown key {_shown(name)}")
    for name, entry in known.items():
        if name not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
    return kind(**{name: _typed(value, hints[name], name) for name, value in values.items()})


def _typed(value: object, hint: object, name: str) -> object:
    """`value` as `hint`: int, float, str, bool, dict, list[...], tuple[...], or a union of those and None."""
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    plain, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if plain is float and number:
        return float(value)
    if plain is int and number and isinstance(value, int) and 0 <= value < 2**63:
        return value
    if plain in (str, bool, dict) and isinstance(value, plain):
        return value
    if plain in (list, tuple) and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if plain is list or inner[-1:] == (...,) else inner
        if len(kinds) == len(value):
            return plain(_typed(value[i], kinds[i], f"{name}[{i}]") for i in range(len(value)))
    wanted = {int: "a whole number from 0 to 2^63", float: "a number", str: "text", bool: "true or false",
              dict: "a mapping"}.get(plain, str(hint))  # fmt: skip
    raise ValueError(f"{name}: {wanted} wanted, found {_shown(value)}")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
