"""Write tar shards: the same samples give the same bytes, and a shard appears only when it is complete."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from megamug.durable import fsync_folder


def write_shard(path: Path, samples: Iterable[tuple[str, str, bytes, bytes]]) -> int:
    """Write (key, image extension, image bytes, caption in UTF-8) as `KEY.extension` and `KEY.txt`; returns how many.

    Times and owners are zero. Written aside, fsynced, renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for key, extension, image, caption in samples:
                    for name, data in ((f"{key}.{extension}", image), (f"{key}.txt", caption)):
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
