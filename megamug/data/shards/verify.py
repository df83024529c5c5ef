"""Verify every sample of one shard, decoding each image in full with the decoder that training uses, and write its
index.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megamug.data.dali import DECODE_ERRORS, FullDecoder, decoder_version
from megamug.data.png import too_long
from megamug.data.shards.annotations import (
    DEFAULT_LIMITS,
    Annotations,
    Limits,
    Rejected,
    annotate,
    has_captions,
    read_member,
)
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
from megamug.data.shards.labels import classes_sha256, read_classes
from megamug.data.shards.maps import Map, find_map
from megamug.data.shards.tar_members import Member, Pair, problem, scan
from megamug.durable import file_sha256
from megamug.errors import UserError, printable

_BATCH = 32  # images decoded at a time
LARGEST = 178_956_970  # pixels that Pillow, which reads the headers, opens at most
_SMALL = 1 << 20  # pixels that cost little, however few bytes they are made of
_BATCH_PIXELS = 1 << 25  # and their pixels together: 100 MB decoded


@dataclass
class ShardReport:
    """What became of one shard."""

    shard: str
    samples: int
    quarantine: list[dict]
    ignored: dict[str, int]
    action: str  # "indexed" | "up to date" | "unchanged" (new time, same contents: the index was renewed)
    captioned: int = 0  # samples with a caption
    labelled: int = 0  # samples with a class
    unlabelled: str = ""  # why the first of the others has none
    classes: int = 0  # the largest class, plus one
    mapped: int = 0  # samples with a map of classes
    unmapped: str = ""  # why the first of the others has none
    map_values: int = 0  # the largest value of the maps but 255, plus one


def _report(path: Path, header: IndexHeader, action: str) -> ShardReport:
    return ShardReport(
        str(path), header.samples, header.quarantine, header.ignored, action, header.captioned, header.labelled,
        header.unlabelled, header.classes, header.mapped, header.unmapped, header.map_values,
    )  # fmt: skip


@dataclass
class _Found:
    """What became of the images of a shard: records with a caption, records without, and keys, in their order."""

    captioned: list[tuple] = field(default_factory=list)
    alone: list[tuple] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    key_bytes: int = 0
    unlabelled: str = ""
    unmapped: str = ""
    largest: int = -1  # value of a map


def index_shard(path: Path, limits: Limits = DEFAULT_LIMITS) -> ShardReport:
    """Bring the index of one shard up to date: nothing where size and time agree, a hash where only the time differs.

    Raises `UserError` where the shard cannot be read or the index cannot be written, and for a broken `classes.txt`
    beside the shard.
    """
    path = Path(path)
    try:
        stat = path.stat()
        names = read_classes(path.parent)
        old = _current(path, limits, classes_sha256(names))
        if old is not None and (old.shard_size, old.shard_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return _report(path, old, "up to date")
        sha256 = file_sha256(path)
        if old is not None and (old.shard_size, old.shard_sha256) == (stat.st_size, sha256):
            _renew(path, old, stat.st_mtime_ns)
            return _report(path, old, "unchanged")
        contents = scan(path)
        found = _verify(path, contents.pairs, contents.quarantine, names, limits)
        samples = np.array(found.captioned + found.alone, SAMPLE)
        header = IndexHeader(
            shard=path.name, shard_size=stat.st_size, shard_mtime_ns=stat.st_mtime_ns, shard_sha256=sha256,
            shard_edges_sha256=edges_sha256(path), samples=len(samples), captioned=len(found.captioned),
            labelled=int((samples["label"] >= 0).sum()), unlabelled=found.unlabelled,
            classes=int(samples["label"].max(initial=-1)) + 1, classes_sha256=classes_sha256(names),
            mapped=int((samples["map_size"] > 0).sum()), unmapped=found.unmapped, map_values=found.largest + 1,
            quarantine=contents.quarantine, ignored=dict(contents.ignored), limits=asdict(limits),
            decoder=decoder_version(),
        )  # fmt: skip
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            raise UserError(f"{path}: the shard changed while it was being indexed; index it again when it is complete")
        write_index(index_path(path), header, samples, b"".join(found.keys))
        return _report(path, header, "indexed")
    except OSError as error:
        raise UserError(f"{path}: cannot index the shard: {error}") from error


def _current(path: Path, limits: Limits, classes: str) -> IndexHeader | None:
    """The header of the index that is there, if this version made it under the same limits and names of classes."""
    index = find_index(path)
    if index is None:
        return None
    try:
        header, offset = read_header(index)
        check_body(index, header, offset)
    except ValueError:
        return None
    return header if (header.limits, header.classes_sha256) == (asdict(limits), classes) else None


def _renew(path: Path, header: IndexHeader, mtime_ns: int) -> None:
    index = find_index(path)
    _, offset = read_header(index)
    data = index.read_bytes()[offset:]
    records = header.samples * SAMPLE.itemsize
    header.shard_mtime_ns = mtime_ns
    write_index(index_path(path), header, np.frombuffer(data[:records], SAMPLE), data[records:])


def _verify(path: Path, pairs: list[Pair], quarantine: list[dict], names: list[str] | None, limits: Limits) -> _Found:
    """Records and keys of the samples that pass; the others go to `quarantine`."""
    found = _Found()
    decoder = FullDecoder(_BATCH)
    with open(path, "rb") as file, _captured_stderr() as captured:
        for batch in _batches(file, pairs, quarantine, names, limits):
            sizes = _decode(decoder, [image for _, image, _ in batch], captured)
            for (pair, image, annotations), size in zip(batch, sizes, strict=True):
                try:
                    if isinstance(size, str):
                        raise Rejected(size)
                    _keep(found, pair, image, annotations, find_map(file, pair, size, limits), size)
                except Rejected as reason:
                    member = reason.member or pair.image
                    quarantine.append(problem(pair.key, member.name, str(reason), pair.image.source))
    return found


def _keep(
    found: _Found, pair: Pair, image: bytes, annotations: Annotations, map_: Map, size: tuple[int, int]
) -> None:  # fmt: skip
    key, digest = pair.key.encode(), hashlib.sha256(image)
    digest.update(annotations.hashed() + map_.data)
    nothing = Member("", 0, 0)
    caption, label, classes = (x or nothing for x in (annotations.caption, annotations.label_member, map_.member))
    (found.captioned if annotations.caption else found.alone).append((
        pair.image.offset, pair.image.size, caption.offset, caption.size, annotations.caption_is_json,
        annotations.label, label.offset, label.size, classes.offset, classes.size,
        size[1], size[0], annotations.length, found.key_bytes, len(key), zlib.crc32(key), digest.digest(), 0,
    ))  # fmt: skip
    found.keys.append(key)
    found.key_bytes += len(key)
    if annotations.label < 0:
        found.unlabelled = found.unlabelled or printable(f"{pair.image.name}: {annotations.unlabelled}")
    if map_.unmapped:
        found.unmapped = found.unmapped or printable(f"{pair.image.name}: {map_.unmapped}")
    found.largest = max(found.largest, map_.largest)


def _batches(
    file, pairs: list[Pair], quarantine: list[dict], names: list[str] | None, limits: Limits
) -> Iterator[list[tuple]]:
    """Batches of (pair, image bytes, annotations) whose headers, captions and labels are in order."""
    alone = limits.images_alone or not has_captions(file, pairs, quarantine, limits)
    batch, pixels = [], 0
    for pair in pairs:
        try:
            annotations = annotate(file, pair, alone, names, limits)
            image = read_member(file, pair.image, limits.image_bytes)
            width, height = check_header(image, limits)
        except Rejected as reason:
            member = reason.member or pair.image
            quarantine.append(problem(pair.key, member.name, str(reason), pair.image.source))
            continue
        if batch and (len(batch) == _BATCH or pixels + width * height > _BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append((pair, image, annotations))
        pixels += width * height
    if batch:
        yield batch


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
