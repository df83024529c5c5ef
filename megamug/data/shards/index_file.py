"""The file that an index is: `NAME.tar.index` beside its shard, or in the index folder (`index_path`).

Magic, length of the header (8 bytes, little-endian), its SHA-256, the header (JSON, padded to 64 bytes), one record of
`SAMPLE` per verified sample (those with a caption first), the keys one after another (UTF-8). Every byte is under a
checksum: the header under the one before it; records and keys under `body_sha256`, which is compared when an index is
opened, and each under one of its own, compared whenever it is read. Records are read one by one where they are needed
and not mapped into memory: an index of 10^9 samples costs no objects, and one that is cut off meanwhile is an error of
a sample and not the end of the process (SIGBUS).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megamug.command_line.arguments import expand_home
from megamug.durable import write_atomically

MAGIC = b"megamug-index-04"
FORMAT_VERSION = 4
SUFFIX = ".index"

SAMPLE = np.dtype([
    ("image_offset", "<u8"), ("image_size", "<u4"),  # bytes from the start of the tar
    ("caption_offset", "<u8"), ("caption_size", "<u4"), ("caption_is_json", "u1"),  # size 0: it has none
    ("label", "<i4"),  # its class, -1: it has none
    ("label_offset", "<u8"), ("label_size", "<u4"),  # the member that says so; size 0: none, or that of the caption
    ("map_offset", "<u8"), ("map_size", "<u4"),  # the member with a class for every pixel; size 0: none
    ("width", "<u4"), ("height", "<u4"),  # pixels as decoded, EXIF orientation applied
    ("caption_length", "<u4"),  # characters
    ("key_start", "<u4"), ("key_size", "<u4"), ("key_checksum", "<u4"),  # CRC-32 of the key
    ("sha256", "V32"),  # of the bytes of image, caption's member, label's member and map, one after another
    ("checksum", "<u4"),  # CRC-32 of the record's other bytes
])  # fmt: skip
_PLAIN = SAMPLE.itemsize - 4  # bytes of a record before its checksum
_START = len(MAGIC) + 8 + 32
_EDGE = 1 << 16  # bytes


@dataclass
class IndexHeader:
    """What an index says about its shard as a whole."""

    shard: str  # file name
    shard_size: int  # bytes
    shard_mtime_ns: int
    shard_sha256: str
    shard_edges_sha256: str  # see `edges_sha256`
    samples: int
    captioned: int  # of them: the first so many records have a caption, the others none
    labelled: int = 0  # of them have a class
    unlabelled: str = ""  # why the first of the others has none
    classes: int = 0  # the largest class, plus one
    classes_sha256: str = ""  # of the names in classes.txt that lay beside the shard, "" without one
    mapped: int = 0  # of the samples have a map of classes
    unmapped: str = ""  # why the first of the others has none
    map_values: int = 0  # the largest value of the maps but 255, plus one
    quarantine: list[dict] = field(default_factory=list)  # {"key": ..., "member": ..., "reason": ...}
    ignored: dict[str, int] = field(default_factory=dict)  # members of other kinds, by extension
    limits: dict = field(default_factory=dict)  # what the verification allowed
    decoder: str = ""
    key_bytes: int = 0  # of all keys together
    body_sha256: str = ""  # of the records and the keys
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
    folder = hashlib.sha256(os.fsencode(shard.resolve().parent)).hexdigest()[:16]
    return [shard.with_name(shard.name + SUFFIX), Path(expand_home(str(root))) / folder / (shard.name + SUFFIX)]


def index_path(shard: Path) -> Path:
    """Where to write the index of `shard`: beside it, or in the index folder where the shard's folder is read-only."""
    beside, elsewhere = index_candidates(shard)
    return beside if os.access(shard.parent, os.W_OK) else elsewhere


def find_index(shard: Path) -> Path | None:
    """The index of `shard`, or None. Of two (one beside a shard that became read-only may be older than the other) the
    one of the shard's size and time, else the newest: copying makes an old index new."""
    found = [path for path in index_candidates(shard) if path.is_file()]
    if len(found) > 1:
        found = [path for path in found if _fits(path, shard)] or found
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _fits(index: Path, shard: Path) -> bool:
    try:
        header, _ = read_header(index)
        stat = shard.stat()
    except (OSError, ValueError):
        return False
    return (stat.st_size, stat.st_mtime_ns) == (header.shard_size, header.shard_mtime_ns)


def edges_sha256(shard: Path) -> str:
    """SHA-256 of the first and the last 64 KiB of a shard: what is appended, or packed anew, shows there.

    It costs little where a whole hash is too much: a copy has another time, and the same contents.
    """
    with open(shard, "rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(max(os.fstat(file.fileno()).st_size - _EDGE, 0))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()


def write_index(path: Path, header: IndexHeader, samples: np.ndarray, keys: bytes) -> None:
    """Write an index whole or not at all; the checksums of `header` and `samples` are set here.

    `samples`: records of `SAMPLE` [header.samples]; `keys`: one after another, as the records say.
    """
    assert samples.dtype == SAMPLE and len(samples) == header.samples
    samples = samples.copy()
    for i, plain in enumerate(samples.view(f"V{SAMPLE.itemsize}")):
        samples["checksum"][i] = zlib.crc32(plain.tobytes()[:_PLAIN])
    body = samples.tobytes() + keys
    header.key_bytes, header.body_sha256 = len(keys), hashlib.sha256(body).hexdigest()
    text = json.dumps(asdict(header), ensure_ascii=True, sort_keys=True).encode()
    text += b" " * (-(_START + len(text)) % 64)
    write_atomically(path, MAGIC, len(text).to_bytes(8, "little"), hashlib.sha256(text).digest(), text, body)


def read_header(path: Path) -> tuple[IndexHeader, int]:
    """The header of an index and the offset of its records. Raises `ValueError` where the file is not a whole index of
    this version; records and keys are not read."""
    with open(path, "rb") as file:
        start = file.read(_START)
        name, version = MAGIC[:-2], start[len(MAGIC) - 2 : len(MAGIC)]
        if start[: len(name)] == name and version.isdigit() and version != MAGIC[-2:]:
            raise ValueError(f"of version {int(version)}, and this program reads version {FORMAT_VERSION}")
        if len(start) < _START or start[: len(MAGIC)] != MAGIC:
            raise ValueError("not an index")
        length = int.from_bytes(start[len(MAGIC) : len(MAGIC) + 8], "little")
        total = os.fstat(file.fileno()).st_size
        if length > total:
            raise ValueError("cut off inside the header")
        text = file.read(length)
    if hashlib.sha256(text).digest() != start[len(MAGIC) + 8 :]:
        raise ValueError("its header does not agree with its checksum")
    try:
        header = IndexHeader(**json.loads(text))
    except TypeError as error:
        raise ValueError(f"its header is of another version: {error}") from error
    if header.version != FORMAT_VERSION:
        raise ValueError(f"of version {header.version}, and this program reads version {FORMAT_VERSION}")
    offset = _START + length
    wanted = offset + header.samples * SAMPLE.itemsize + header.key_bytes
    if total != wanted:
        raise ValueError(f"{total:,} bytes instead of {wanted:,}")
    return header, offset


def check_body(path: Path, header: IndexHeader, offset: int) -> None:
    """Raises `ValueError` where the records or keys are not those that were written."""
    stat = path.stat()
    if _body_sha256(path, offset, stat.st_ino, stat.st_size, stat.st_mtime_ns) != header.body_sha256:
        raise ValueError("its records do not agree with their checksum")


@functools.lru_cache(maxsize=1 << 16)  # a run opens its data more than once
def _body_sha256(path: Path, offset: int, inode: int, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        file.seek(offset)
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_record(data: bytes, where: str) -> np.void:
    """One record of `SAMPLE`. Raises OSError where `data` is too short, or does not agree with its checksum."""
    if len(data) != SAMPLE.itemsize:
        raise OSError(f"{where}: {len(data)} of {SAMPLE.itemsize} bytes of the record; was the index changed?")
    record = np.frombuffer(data, SAMPLE)[0]
    if zlib.crc32(data[:_PLAIN]) != int(record["checksum"]):
        raise OSError(f"{where}: the record does not agree with its checksum; was the index changed?")
    return record
