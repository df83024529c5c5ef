"""Verify every pair of one shard, decoding each image in full with the decoder that training uses, and write its index.

Order of the checks on an image: its size in bytes, its header (format, width x height against the limit: a header that
claims 50,000 x 50,000 never reaches a decoder), then DALI. What fails is quarantined with a reason; nothing is changed
in the shard.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megamug.data.dali import DECODE_ERRORS, FullDecoder, decoder_version
from megamug.data.png import too_long
from megamug.data.shards.captions import parse_caption
from megamug.data.shards.index_file import (
    SAMPLE,
    IndexHeader,
    check_body,
    edges_sha256,
    find_index,
    index_path,
    read_header,
    write_index,
)
from megamug.data.shards.tar_members import Pair, problem, scan
from megamug.durable import file_sha256
from megamug.errors import UserError

_BATCH = 32  # images decoded at a time
LARGEST = 178_956_970  # pixels that Pillow, which reads the headers, opens at most
_SMALL = 1 << 20  # pixels that cost little, however few bytes they are made of
_BATCH_PIXELS = 1 << 25  # and their pixels together: 100 MB decoded


@dataclass(frozen=True)
class Limits:
    """What a sample may be at most. A change of limits makes an index stale."""

    pixels: int = 1 << 26  # width x height: 67 million
    # Pixels of a byte of the file, of images above `_SMALL`: photographs have 1 to 50, a blank page of a screen 300. A
    # file of 665 bytes that claims 64 million costs seconds each time it is drawn, and shows nothing.
    pixels_per_byte: int = 1000
    image_bytes: int = 1 << 26
    caption_bytes: int = 1 << 14
    json_bytes: int = 1 << 20  # of a whole .json member


DEFAULT_LIMITS = Limits()


@dataclass
class ShardReport:
    """What became of one shard."""

    shard: str
    samples: int
    quarantine: list[dict]
    ignored: dict[str, int]
    action: str  # "indexed" | "up to date" | "unchanged" (new time, same contents: the index was renewed)


class Rejected(Exception):
    """Why a sample is quarantined."""


def index_shard(path: Path, limits: Limits = DEFAULT_LIMITS) -> ShardReport:
    """Bring the index of one shard up to date: nothing where size and time agree, a hash where only the time differs.

    Raises `UserError` where the shard cannot be read or the index cannot be written.
    """
    path = Path(path)
    try:
        stat = path.stat()
        old = _current(path, limits)
        if old is not None and (old.shard_size, old.shard_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return ShardReport(str(path), old.samples, old.quarantine, old.ignored, "up to date")
        sha256 = file_sha256(path)
        if old is not None and (old.shard_size, old.shard_sha256) == (stat.st_size, sha256):
            _renew(path, old, stat.st_mtime_ns)
            return ShardReport(str(path), old.samples, old.quarantine, old.ignored, "unchanged")
        contents = scan(path)
        samples, keys = _verify(path, contents.pairs, contents.quarantine, limits)
        header = IndexHeader(
            shard=path.name, shard_size=stat.st_size, shard_mtime_ns=stat.st_mtime_ns, shard_sha256=sha256,
            shard_edges_sha256=edges_sha256(path), samples=len(samples), quarantine=contents.quarantine,
            ignored=dict(contents.ignored), limits=asdict(limits), decoder=decoder_version(),
        )  # fmt: skip
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            raise UserError(f"{path}: the shard changed while it was being indexed; index it again when it is complete")
        write_index(index_path(path), header, samples, keys)
        return ShardReport(str(path), len(samples), contents.quarantine, header.ignored, "indexed")
    except OSError as error:
        raise UserError(f"{path}: cannot index the shard: {error}") from error


def _current(path: Path, limits: Limits) -> IndexHeader | None:
    """The header of the index that is there, if it was made under the same limits by this version."""
    index = find_index(path)
    if index is None:
        return None
    try:
        header, offset = read_header(index)
        check_body(index, header, offset)
    except ValueError:
        return None
    return header if header.limits == asdict(limits) else None


def _renew(path: Path, header: IndexHeader, mtime_ns: int) -> None:
    index = find_index(path)
    _, offset = read_header(index)
    data = index.read_bytes()[offset:]
    records = header.samples * SAMPLE.itemsize
    header.shard_mtime_ns = mtime_ns
    write_index(index_path(path), header, np.frombuffer(data[:records], SAMPLE), data[records:])


def _verify(path: Path, pairs: list[Pair], quarantine: list[dict], limits: Limits) -> tuple[np.ndarray, bytes]:
    """Records and keys of the pairs that pass; the others go to `quarantine`."""
    records, keys, key_start = [], [], 0
    decoder = FullDecoder(_BATCH)
    with open(path, "rb") as file, _captured_stderr() as captured:
        for batch in _batches(file, pairs, quarantine, limits):
            sizes = _decode(decoder, [image for _, image, _, _ in batch], captured)
            for (pair, image, caption, length), size in zip(batch, sizes, strict=True):
                if isinstance(size, str):
                    quarantine.append(problem(pair.key, pair.image.name, size, pair.image.source))
                    continue
                key = pair.key.encode()
                digest = hashlib.sha256(image)
                digest.update(caption)
                records.append((
                    pair.image.offset, pair.image.size, pair.caption.offset, pair.caption.size, pair.caption_is_json,
                    size[1], size[0], length, key_start, len(key), zlib.crc32(key), digest.digest(), 0,
                ))  # fmt: skip
                keys.append(key)
                key_start += len(key)
    return np.array(records, SAMPLE), b"".join(keys)


def _batches(file, pairs: list[Pair], quarantine: list[dict], limits: Limits) -> Iterator[list[tuple]]:
    """Batches of (pair, image bytes, caption member bytes, caption length) whose headers and captions are in order."""
    batch, pixels = [], 0
    for pair in pairs:
        member = pair.caption
        try:
            caption = _read(file, pair.caption, limits.json_bytes if pair.caption_is_json else limits.caption_bytes)
            length = check_caption(caption, pair.caption_is_json, limits)
            member = pair.image
            image = _read(file, pair.image, limits.image_bytes)
            width, height = check_header(image, limits)
        except Rejected as reason:
            quarantine.append(problem(pair.key, member.name, str(reason), pair.image.source))
            continue
        if batch and (len(batch) == _BATCH or pixels + width * height > _BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append((pair, image, caption, length))
        pixels += width * height
    if batch:
        yield batch


def _read(file, member, limit: int) -> bytes:
    if member.size > limit:
        raise Rejected(f"{member.size:,} bytes, more than the limit of {limit:,}")
    if member.size == 0:
        raise Rejected("empty file")
    file.seek(member.offset)
    return file.read(member.size)


def check_caption(data: bytes, is_json: bool, limits: Limits) -> int:
    """Length of the caption in characters. Raises `Rejected`."""
    try:
        caption = parse_caption(data, is_json)
    except UnicodeError as error:
        raise Rejected(f"the caption is not UTF-8: {error}") from error
    except RecursionError as error:
        raise Rejected("the JSON is nested too deeply") from error
    except ValueError as error:
        raise Rejected(f"bad caption: {error}") from error
    size = len(caption.encode())
    if size > limits.caption_bytes:
        raise Rejected(f"the caption has {size:,} bytes, more than the limit of {limits.caption_bytes:,}")
    return len(caption)


def check_header(data: bytes, limits: Limits) -> tuple[int, int]:
    """(width, height) that the image's header claims; nothing is decoded. Raises `Rejected`.

    Then it costs at most what its pixels cost: too many of them, too many for the size of the file, or a PNG with more
    data behind them than they are, is rejected.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                width, height = image.size
                animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    except UnidentifiedImageError as error:
        raise Rejected(f"not a JPEG, PNG or WebP image; it begins with {data[:12]!r}") from error
    except Image.DecompressionBombError as error:
        raise Rejected(f"too many pixels: {error}") from error
    except Exception as error:  # the parsers of three formats, on any bytes: whatever they raise is the reason
        raise Rejected(f"unreadable image header: {type(error).__name__}: {error}") from error
    if width * height > limits.pixels:
        raise Rejected(f"{width} x {height} pixels, more than the limit of {limits.pixels:,}")
    if width * height > max(_SMALL, limits.pixels_per_byte * len(data)):
        raise Rejected(
            f"{width} x {height} pixels in {len(data):,} bytes: {width * height // len(data):,} for each byte, more "
            f"than the limit of {limits.pixels_per_byte:,}"
        )
    if animated:
        raise Rejected("an animated image")
    if excess := too_long(data):
        raise Rejected(f"its data inflate to more than the {excess:,} bytes of {width} x {height} pixels")
    return width, height


def _decode(decoder: FullDecoder, images: list[bytes], captured) -> list[tuple[int, int] | str]:
    """(height, width) of each image, or the reason why it cannot be decoded.

    One bad file fails a whole DALI batch and ends its pipeline: then each image is decoded alone.
    """
    try:
        sizes = decoder(images)
        captured.take()
        return list(sizes)
    except DECODE_ERRORS:
        captured.take()
    results: list[tuple[int, int] | str] = []
    for image in images:
        try:
            results.extend(decoder([image]))
            captured.take()
        except DECODE_ERRORS as error:
            results.append("does not decode: " + (captured.take() or _essence(str(error))))
    return results


def _essence(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if "rror" in line and "pipeline" not in line), lines[-1] if lines else "")[:200]


@contextmanager
def _captured_stderr() -> Iterator:
    """Codecs write their reasons to file descriptor 2: collect them, so that they stand in the quarantine list."""

    class Captured:
        def take(self) -> str:
            """The last line written since the last call, without colours."""
            os.lseek(target.fileno(), 0, os.SEEK_SET)
            lines = target.read().decode(errors="replace").replace("\x1b", "").split("\n")
            os.ftruncate(target.fileno(), 0)
            os.lseek(target.fileno(), 0, os.SEEK_SET)
            line = next((line for line in reversed(lines) if line.strip()), "")
            return line.split("] [0m")[-1].split("code stream - ")[-1].strip()[:200]

    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile(buffering=0) as target:
        os.dup2(target.fileno(), 2)
        try:
            yield Captured()
        finally:
            os.dup2(saved, 2)
            os.close(saved)
