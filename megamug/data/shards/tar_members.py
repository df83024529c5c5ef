"""Walk a tar shard without extracting anything: which members make a sample, and what is wrong with the others.

WebDataset's naming: `folder/KEY.EXTENSION`, KEY up to the first dot of the file name, which image, caption, label and
map share.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megamug.errors import printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json")  # a .txt wins over a .json of the same key
LABEL_EXTENSION = "cls"  # a number as text; it wins over `label` in a .json
MAP_EXTENSION = "seg.png"  # a class for every pixel, see `maps`
SOURCE = "MEGAMUG.source"  # PAX key of a member: the user's own file that it was packed from
COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"), (b"BZh", "bzip2", "bunzip2"), (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
)  # fmt: skip
_BLOCK = 512


@dataclass
class Member:
    name: str
    offset: int
    size: int
    source: str | None = None  # what the user calls it, where `megamug data shards` packed it


@dataclass
class Pair:
    """An image and what lies beside it under the same key, not yet looked into."""

    key: str
    image: Member
    beside: dict[str, Member] = field(default_factory=dict)  # by extension: txt, json, cls, seg.png


@dataclass
class TarContents:
    pairs: list[Pair] = field(default_factory=list)
    quarantine: list[dict] = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)  # by extension


def problem(key: str, member: str, reason: str, source: str | None = None) -> dict:
    """An entry of the quarantine. Names and reasons come from others' files: they are made fit for a terminal."""
    entry = {"key": printable(key), "member": printable(member), "reason": printable(reason)}
    return entry if source is None else {**entry, "source": printable(source)}


def described(entry: dict) -> str:
    """A quarantined member as its user knows it: name (and the file that it was packed from), reason."""
    name = entry["member"] or entry["key"] or "shard"
    source = f" (made of {_short(entry['source'])})" if entry.get("source") else ""
    return f"{_short(name)}{source}: {entry['reason']}"


def _short(name: str, most: int = 200) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}...{name[-most // 2 :]}"


def split_name(name: str) -> tuple[str, str]:
    """`a/b/KEY.seg.png` -> (`a/b/KEY`, `seg.png`)."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def walk(path: Path, quarantine: list[dict]) -> Iterator[tarfile.TarInfo]:
    """Every member of a tar; what cannot be reached goes to `quarantine`. Raises OSError where it cannot be read.

    Several tars one after another (`cat a.tar b.tar`) are read to the end of the last: the end mark of the first ends
    the members for most programs, and what is behind it would be lost without a word.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        for magic, name, command in COMPRESSED:
            if start.startswith(magic):
                reason = f"compressed by {name}: members are read by their place in the file, so decompress it first"
                quarantine.append(problem("", "", f"{reason} ({command})"))
                return
        position: int | None = 0
        while position is not None:
            try:
                file.seek(position)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for info in tar:
                        yield info
                        tar.members.clear()  # tarfile would keep an object for each member
                    end = tar.offset
            except (tarfile.TarError, UnicodeError, ValueError) as error:
                quarantine.append(problem("", "", f"not a readable tar from here on ({error}); truncated?"))
                return
            position = _behind(file, end, quarantine)


def _behind(file: BinaryIO, end: int, quarantine: list[dict]) -> int | None:
    """Where another tar begins behind the one that ends at byte `end`; None where the file ends, too, or all else."""
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        quarantine.append(problem("", "", "the tar ends without its end mark: truncated? The members before are used"))
        return None
    if block.strip(b"\0"):
        reason = f"no valid tar header at byte {end}: the members behind it cannot be reached"
        quarantine.append(problem("", "", reason))
        return None
    position = end + _BLOCK
    while chunk := file.read(1 << 20):
        rest = chunk.lstrip(b"\0")
        if not rest:
            position += len(chunk)
            continue
        position += (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        file.seek(position)
        try:
            tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.TarError:
            reason = f"what lies behind the end mark of the tar, from byte {position}, is no tar and is not used"
            quarantine.append(problem("", "", reason))
            return None
        return position
    return None


def unusable(info: tarfile.TarInfo, total: int) -> str | None:
    """Why a member of a file of `total` bytes must not or cannot be read, whatever it is; None where it can."""
    if info.name.startswith("/") or ".." in info.name.split("/") or not info.name.isprintable():
        return "unsafe name"
    if not info.isreg() or info.issparse():
        return "a link, device or sparse file, not a plain one"
    if info.offset_data + info.size > total:
        return "truncated: its bytes go beyond the end of the shard"
    return None


def scan(path: Path) -> TarContents:
    """All images of the shard at `path` in the tar's order, each with what lies beside it, and a reason for each member
    that cannot be used."""
    contents = TarContents()
    images: dict[str, Member] = {}
    beside: dict[str, dict[str, Member]] = {}
    dotted: list[tuple[str, str, str]] = []
    total = os.path.getsize(path)
    for info in walk(path, contents.quarantine):
        _sort_member(info, total, images, beside, dotted, contents)
    for key, name, extension in dotted:
        if key in images:  # WebDataset's way: another picture or text of the same sample
            contents.ignored[extension] += 1
            continue
        reason = (
            f"a key ends at the first dot of the file name, so this is {extension!r} of the key "
            f"{key.rpartition('/')[2]!r}; give it a name with one dot (megamug data shards does)"
        )
        contents.quarantine.append(problem(key, name, reason))
    contents.pairs = [Pair(key, image, beside.pop(key, {})) for key, image in images.items()]
    for key, found in beside.items():
        extension = next(e for e in (*CAPTION_EXTENSIONS, LABEL_EXTENSION, MAP_EXTENSION) if e in found)
        what = {LABEL_EXTENSION: "label", MAP_EXTENSION: "map"}.get(extension, "caption")
        contents.quarantine.append(problem(key, found[extension].name, f"a {what} without a usable image of this key"))
    return contents


def _sort_member(
    info: tarfile.TarInfo, total: int, images: dict[str, Member], beside: dict[str, dict[str, Member]],
    dotted: list[tuple[str, str, str]], contents: TarContents,
) -> None:  # fmt: skip
    name, source = info.name, info.pax_headers.get(SOURCE)
    key, extension = split_name(name)
    is_image = extension in IMAGE_EXTENSIONS
    is_beside = extension in (*CAPTION_EXTENSIONS, LABEL_EXTENSION, MAP_EXTENSION)
    if info.isdir():
        return
    reason = unusable(info, total)
    unsafe = reason is not None and not reason.startswith("truncated")
    if not unsafe and name.rpartition("/")[2].startswith("._"):
        contents.ignored["_*"] += 1  # what macOS puts beside each file: no picture, whatever its name says
    elif not unsafe and not (is_image or is_beside):
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS:
            dotted.append((key, name, extension))
        else:
            contents.ignored[extension] += 1
    elif reason:
        contents.quarantine.append(problem(key, name, reason, source))
    elif is_image and key in images or is_beside and extension in beside.get(key, {}):
        contents.quarantine.append(problem(key, name, "duplicate key: the first one is used", source))
    elif is_image:
        images[key] = Member(name, info.offset_data, info.size, source)
    else:
        beside.setdefault(key, {})[extension] = Member(name, info.offset_data, info.size, source)
