"""Writes that survive a crash: beside the target, fsync, rename, fsync of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)


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
