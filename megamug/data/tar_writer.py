"""Write tar shards: the same samples give the same bytes, and a shard appears only when it is complete."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from megamug.durable import fsync_folder


def write_shard(path: Path, samples: Iterable[tuple[str, str, bytes, bytes]]) -> int:
    """Write samples (key, image extension, image bytes, caption in UTF-8) as `KEY.extension` and `KEY.txt`.

    Returns how many samples they are.
    """

    def members() -> Iterator[tuple[str, bytes]]:
        for key, extension, image, caption in samples:
            yield f"{key}.{extension}", image
            yield f"{key}.txt", caption

    return write_members(path, members()) // 2


def write_members(path: Path, members: Iterable[tuple[str, bytes]]) -> int:
    """Write (name, bytes) in their order; returns the count. Owners and times are zero; aside, fsynced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for name, data in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return count
