"""An indexed tar shard: its samples are read by offset, never extracted, and compared with what was indexed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megamug.data.shards.captions import choose, parse_captions
from megamug.data.shards.index_file import (
    SAMPLE,
    check_body,
    edges_sha256,
    find_index,
    index_command,
    parse_record,
    read_header,
)
from megamug.data.shards.maps import decode_map
from megamug.errors import UserError


class Shard:
    """One indexed shard, opened on first use.

    Its size must be that of the index. Its time need not, as copying changes it: then, and where the file changes while
    it is in use, hashes decide: its ends are compared when it is opened, and every sample with its SHA-256 as it is
    read. With `verify` samples always are. One that does not agree is an OSError of that sample.
    """

    def __init__(self, path: Path, verify: bool = False) -> None:
        """Raises `UserError` where the index is missing, broken or stale, with the command that makes it."""
        self.path, self.verify = Path(path), verify
        self._file: int | None = None
        self._index: int | None = None
        command = index_command([self.path])
        self.index_file = find_index(self.path)
        if self.index_file is None:
            raise UserError(f"{self.path}: no index; run: {command}")
        try:
            self._identity = _identity(os.stat(self.index_file))
            self.header, self._records_at = read_header(self.index_file)
            check_body(self.index_file, self.header, self._records_at)
        except ValueError as error:
            raise UserError(f"{self.index_file}: broken index ({error}); run: {command}") from error
        stat = self.path.stat()
        if stat.st_size != self.header.shard_size:
            raise UserError(
                f"{self.index_file}: stale index: the shard has {stat.st_size:,} bytes, the index is of "
                f"{self.header.shard_size:,}; run: {command}"
            )
        if stat.st_mtime_ns != self.header.shard_mtime_ns and edges_sha256(self.path) != self.header.shard_edges_sha256:
            raise UserError(f"{self.index_file}: stale index: the shard was changed since; run: {command}")

    def __len__(self) -> int:
        return self.header.samples

    def open(self) -> None:
        """Raises OSError where a file is gone, or the index is no longer the one that the order was made from."""
        if self._file is not None:
            return
        file, index = os.open(self.path, os.O_RDONLY), None
        try:
            index = os.open(self.index_file, os.O_RDONLY)
            if _identity(os.fstat(index)) != self._identity:
                self._look_again()
        except BaseException:
            os.close(file)
            if index is not None:
                os.close(index)
            raise
        self._file, self._index = file, index

    def _look_again(self) -> None:
        """The index was written anew since it was read: its records must be the same."""
        try:
            identity = _identity(os.stat(self.index_file))
            header, records_at = read_header(self.index_file)
            check_body(self.index_file, header, records_at)
        except ValueError as error:
            raise OSError(f"{self.index_file}: the index was changed while it is in use ({error})") from error
        if (header.shard_sha256, header.body_sha256) != (self.header.shard_sha256, self.header.body_sha256):
            raise OSError(f"{self.index_file}: the index was replaced by that of another shard while it is in use")
        self.header, self._records_at, self._identity = header, records_at, identity

    def close(self) -> None:
        for descriptor in (self._file, self._index):
            if descriptor is not None:
                os.close(descriptor)
        self._file = self._index = None

    @contextmanager
    def _aside(self) -> Iterator[Shard]:
        """The same shard with files of its own: for other threads than the one that opens and closes shards."""
        shard = copy.copy(self)
        shard._file = shard._index = None
        try:
            yield shard
        finally:
            shard.close()

    @property
    def samples(self) -> np.ndarray:
        """All records [number of samples], read into memory: for tools; training reads one by one."""
        return np.array([self.record(i) for i in range(len(self))], SAMPLE)

    def record(self, i: int) -> np.void:
        """The record of sample `i` (`SAMPLE`). Raises OSError where the index is cut off or damaged."""
        self.open()
        data = os.pread(self._index, SAMPLE.itemsize, self._records_at + int(i) * SAMPLE.itemsize)
        return parse_record(data, f"{self.index_file}, sample {i}")

    def read(
        self, i: int, *, image: bool = True, caption: bool = True, lines: str = "join", draw: float = 0.0
    ) -> tuple[bytes, str, np.void]:
        """(image bytes, caption, record) of sample `i`; what is not asked for is empty. `lines`, `draw`: which caption
        of several, see `captions.choose`.

        Raises OSError where the bytes are not there, or are compared (see above) and are others; `ValueError` where the
        caption is none.
        """
        picture, text, record = self._members(i, image, caption)
        parsed = choose(parse_captions(text, bool(record["caption_is_json"])), lines, draw) if caption else ""
        return picture, parsed, record

    def _members(self, i: int, image: bool, caption: bool) -> tuple[bytes, bytes, np.void]:
        """(bytes of the image, of the caption's member, record), checked as `read` says."""
        record = self.record(i)
        stat = os.fstat(self._file)
        compared = self.verify or (stat.st_size, stat.st_mtime_ns) != (
            self.header.shard_size, self.header.shard_mtime_ns
        )  # fmt: skip
        picture = text = b""
        if image or compared:
            picture = self._read(int(record["image_offset"]), int(record["image_size"]))
        if caption or compared:
            text = self._read(int(record["caption_offset"]), int(record["caption_size"]))
        if compared:
            label = self._read(int(record["label_offset"]), int(record["label_size"]))
            classes = self._read(int(record["map_offset"]), int(record["map_size"]))
            digest = hashlib.sha256(picture + text + label + classes)
            if digest.digest() != record["sha256"].tobytes():
                raise OSError(f"{self.path}: sample {i} is not what was indexed (its SHA-256 differs)")
        if caption and not record["caption_size"]:
            raise ValueError(f"{self.path}: sample {i} has no caption")
        return picture if image else b"", text, record

    def map(self, record: np.void) -> np.ndarray:
        """The map of the sample of a record that `read` gave, uint8 [height, width]. Raises OSError where the bytes are
        not there; `ValueError` where it has none, or it does not decode."""
        if not record["map_size"]:
            raise ValueError(f"{self.path}: a sample has no map")
        data = self._read(int(record["map_offset"]), int(record["map_size"]))
        return decode_map(data, (int(record["height"]), int(record["width"])))

    def _read(self, offset: int, size: int) -> bytes:
        # pread and not a mapping of the tar: a shard that shrinks or a file system that fails is then an error of one
        # sample, where a mapping would end the process with SIGBUS.
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise OSError(f"{self.path}: {len(data)} of {size} bytes at {offset}; was the shard changed?")
        return data

    def image_bytes(self, i: int) -> bytes:
        return self.read(i, caption=False)[0]

    def caption(self, i: int, lines: str = "join", draw: float = 0.0) -> str:
        return self.read(i, image=False, lines=lines, draw=draw)[1]

    def caption_aside(self, i: int, lines: str = "join", draw: float = 0.0) -> str:
        """`caption`, or "" where there is none, opening the files by itself: for other threads than the one that opens
        and closes shards."""
        with self._aside() as shard:
            return shard.caption(i, lines, draw) if shard.record(i)["caption_size"] else ""

    def captions_aside(self, i: int, lines: str = "join") -> list[str]:
        """Each caption of sample `i` as a text of its own, [] where there is none. Those of a list in JSON are apart
        always, lines of a text unless `lines` is `join`. Opens the files as `caption_aside`."""
        with self._aside() as shard:
            if not shard.record(i)["caption_size"]:
                return []
            _, text, record = shard._members(i, image=False, caption=True)
        is_json = bool(record["caption_is_json"])
        captions = parse_captions(text, is_json)
        listed = is_json and isinstance(json.loads(text.decode("utf-8-sig"))["caption"], list)
        return captions if listed or lines != "join" else [choose(captions)]

    def label(self, i: int) -> int:
        """The class of sample `i`, -1 where it has none."""
        return int(self.record(i)["label"])

    def key(self, i: int) -> str:
        """Opens the files by itself, as `caption_aside`. Raises OSError where the index is cut off or damaged."""
        with self._aside() as shard:
            record = shard.record(i)
            start = shard._records_at + len(shard) * SAMPLE.itemsize + int(record["key_start"])
            key = os.pread(shard._index, int(record["key_size"]), start)
        if zlib.crc32(key) != int(record["key_checksum"]):
            raise OSError(f"{self.index_file}: the key of sample {i} does not agree with its checksum")
        return key.decode()


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class OpenShards:
    """Keeps at most `limit` shards open, closing the least recently used.

    Where several threads read, each holds `lock` from `use` until it has read.
    """

    def __init__(self, limit: int = 128) -> None:
        self.limit = limit
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self.lock = threading.RLock()

    def use(self, shard: Shard) -> Shard:
        with self.lock:
            self._open[id(shard)] = shard
            self._open.move_to_end(id(shard))
            while len(self._open) > self.limit:
                self._open.popitem(last=False)[1].close()
            shard.open()
        return shard

    def close(self) -> None:
        with self.lock:
            for shard in self._open.values():
                shard.close()
            self._open.clear()
