"""Write tar shards: the same samples give the same bytes, and a shard appears only when it is complete."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from megamug.data.shards.tar_members import SOURCE
from megamug.durable import replacing


def write_shard(path: Path, samples: Iterable[tuple]) -> int:
    """Write samples (key, image extension, image bytes, caption in UTF-8) as `KEY.extension` and `KEY.txt`.

    A fifth entry is the name of the image's own file, kept with it (1 KB). Returns how many samples they are.
    """

    def members() -> Iterator[tuple]:
        for key, extension, image, caption, *source in samples:
            yield f"{key}.{extension}", image, *source
            yield f"{key}.txt", caption

    return write_members(path, members()) // 2


def write_members(path: Path, members: Iterable[tuple]) -> int:
    """Write (name, bytes) or (name, bytes, name of the file they are from) in their order; returns the count.

    Owners and times are zero; aside, fsynced, renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data, *source in members:
            info = tarfile.TarInfo(name)
            if source:
                info.pax_headers = {SOURCE: source[0]}
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            count += 1
    return count
