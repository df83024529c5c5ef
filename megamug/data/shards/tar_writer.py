"""Write tar shards: the same samples give the same bytes, and a shard appears only when it is complete."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from megamug.durable import replacing


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
    count = 0
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            count += 1
    return count
