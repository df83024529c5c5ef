"""The index of a tar shard: what it holds, where, and that it was verified.

`NAME.tar.index` lies beside the shard, or in the index folder where the shards are read-only (`index_path`). Layout:
magic, length of the header (8 bytes, little-endian), header (JSON, padded to 64 bytes), one record of `SAMPLE` per
verified sample, the keys one after another (UTF-8). Records are memory-mapped: an index of 10^9 samples costs the pages
that are touched, not Python objects. Tar members are read by offset and never extracted.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from megamug.durable import write_atomically
from megamug.errors import UserError

MAGIC = b"megamug-index-01"
FORMAT_VERSION = 1
SUFFIX = ".index"

SAMPLE = np.dtype([
    ("image_offset", "<u8"), ("image_size", "<u4"),  # bytes from the start of the tar
    ("caption_offset", "<u8"), ("caption_size", "<u4"), ("caption_is_json", "u1"),
    ("width", "<u4"), ("height", "<u4"),  # pixels as decoded, EXIF orientation applied
    ("caption_length", "<u4"),  # characters
    ("key_start", "<u4"), ("key_size", "<u4"),
    ("sha256", "V32"),  # of the image's bytes followed by the caption member's bytes
])  # fmt: skip


@dataclass
class IndexHeader:
    """What an index says about its shard as a whole."""

    shard: str  # file name
    shard_size: int  # bytes
    shard_mtime_ns: int
    shard_sha256: str
    samples: int
    quarantine: list[dict] = field(default_factory=list)  # {"key": ..., "member": ..., "reason": ...}
    ignored: dict[str, int] = field(default_factory=dict)  # members of other kinds, by extension
    limits: dict = field(default_factory=dict)  # what the verification allowed
    decoder: str = ""
    version: int = FORMAT_VERSION


def index_command(paths: list) -> str:
    return "megamug data index " + " ".join(str(p) for p in paths)


def index_candidates(shard: Path) -> list[Path]:
    """Where the index of `shard` may lie, in order of preference.

    Beside it, then in the index folder: $MEGAMUG_INDEX_DIRECTORY, or megamug/index in the user's cache; there under a
    name made from the shard's folder, as shards of two sets may share their names.
    """
    root = os.environ.get("MEGAMUG_INDEX_DIRECTORY")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megamug" / "index"
    folder = hashlib.sha256(str(shard.resolve().parent).encode()).hexdigest()[:16]
    return [shard.with_name(shard.name + SUFFIX), Path(root) / folder / (shard.name + SUFFIX)]


def index_path(shard: Path) -> Path:
    """Where to write the index of `shard`: beside it, or in the index folder where the shard's folder is read-only."""
    beside, elsewhere = index_candidates(shard)
    return beside if os.access(shard.parent, os.W_OK) else elsewhere


def find_index(shard: Path) -> Path | None:
    """The newest index of `shard`, or None: one beside a shard that became read-only may be older than the other."""
    found = [path for path in index_candidates(shard) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def write_index(path: Path, header: IndexHeader, samples: np.ndarray, keys: bytes) -> None:
    assert samples.dtype == SAMPLE and len(samples) == header.samples
    text = json.dumps(asdict(header), ensure_ascii=True, sort_keys=True).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % 64)
    write_atomically(path, MAGIC, len(text).to_bytes(8, "little"), text, samples.tobytes(), keys)


def read_header(path: Path) -> tuple[IndexHeader, int]:
    """The header of an index and the offset of its records. Raises `ValueError` where the file is not a whole index."""
    with open(path, "rb") as file:
        start = file.read(len(MAGIC) + 8)
        if len(start) < len(MAGIC) + 8 or start[: len(MAGIC)] != MAGIC:
            raise ValueError("not an index of this version")
        length = int.from_bytes(start[len(MAGIC) :], "little")
        total = os.fstat(file.fileno()).st_size
        if length > total:
            raise ValueError("cut off inside the header")
        header = IndexHeader(**json.loads(file.read(length)))
    offset = len(start) + length
    if total < offset + header.samples * SAMPLE.itemsize:
        raise ValueError("cut off inside the records")
    return header, offset


def _time(nanoseconds: int) -> str:
    """As people read it; to the microsecond, as a copy may be that close."""
    return datetime.fromtimestamp(nanoseconds // 1000 / 1e6).isoformat(" ", "microseconds")


class Shard:
    """One indexed shard, opened on first use. `samples`: memory-mapped records [number of samples]."""

    def __init__(self, path: Path) -> None:
        """Raises `UserError` where the index is missing, broken or stale, with the command that makes it."""
        self.path = Path(path)
        command = index_command([self.path])
        self.index_file = find_index(self.path)
        if self.index_file is None:
            raise UserError(f"{self.path}: no index; run: {command}")
        try:
            self.header, self._records_at = read_header(self.index_file)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.index_file}: broken index ({error}); run: {command}") from error
        stat = self.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (self.header.shard_size, self.header.shard_mtime_ns):
            raise UserError(
                f"{self.index_file}: stale index: the shard has {stat.st_size:,} bytes and was changed on "
                f"{_time(stat.st_mtime_ns)}, the index is of {self.header.shard_size:,} bytes of "
                f"{_time(self.header.shard_mtime_ns)}; run: {command}"
            )
        self._samples: np.ndarray | None = None
        self._file: int | None = None

    def __len__(self) -> int:
        return self.header.samples

    def open(self) -> None:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
            if len(self):
                records = np.memmap(self.index_file, SAMPLE, "r", self._records_at, (len(self),))
                self._samples = records.view(np.ndarray)  # the same memory; a memmap is slow to take one record of
            else:
                self._samples = np.empty(0, SAMPLE)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = self._samples = None

    @property
    def samples(self) -> np.ndarray:
        self.open()
        return self._samples

    def _read(self, offset: int, size: int) -> bytes:
        # pread and not a mapping of the tar: a shard that shrinks or a file system that fails is then an error of one
        # sample, where a mapping would end the process with SIGBUS.
        self.open()
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise OSError(f"{self.path}: {len(data)} of {size} bytes at {offset}; was the shard changed?")
        return data

    def image_bytes(self, i: int) -> bytes:
        record = self.samples[i]
        return self._read(int(record["image_offset"]), int(record["image_size"]))

    def caption(self, i: int) -> str:
        record = self.samples[i]
        data = self._read(int(record["caption_offset"]), int(record["caption_size"]))
        return parse_caption(data, bool(record["caption_is_json"]))

    def caption_aside(self, i: int) -> str:
        """`caption`, but opening the files by itself: for other threads than the one that opens and closes shards."""
        shard = Shard(self.path)
        try:
            return shard.caption(i)
        finally:
            shard.close()

    def key(self, i: int) -> str:
        """Reads the index by itself, so that any thread may ask while another one opens and closes shards."""
        with open(self.index_file, "rb") as file:
            file.seek(self._records_at + i * SAMPLE.itemsize)
            record = np.frombuffer(file.read(SAMPLE.itemsize), SAMPLE)[0]
            file.seek(self._records_at + len(self) * SAMPLE.itemsize + int(record["key_start"]))
            return file.read(int(record["key_size"])).decode()


def parse_caption(data: bytes, is_json: bool) -> str:
    """The caption in the bytes of a `.txt` or `.json` member. Raises `ValueError` with the reason if there is none."""
    text = data.decode("utf-8", errors="strict").removeprefix("\ufeff")
    if is_json:
        value = json.loads(text)
        if not isinstance(value, dict) or not isinstance(value.get("caption"), str):
            raise ValueError("the JSON has no text under the key 'caption'")
        text = value["caption"]
        text.encode()  # a lone surrogate escape is not text: UnicodeEncodeError
    text = " ".join(text.split())
    if not text:
        raise ValueError("the caption is empty")
    return text


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
