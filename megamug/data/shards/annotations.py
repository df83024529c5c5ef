"""What lies beside an image in its shard: which caption it has, and which class; and what a sample may be at most.

A shard in which no image has a caption holds images alone: nothing in it was lost. In a shard of captions an image
without one was meant to have it: it is quarantined, unless `Limits.images_alone` says that it is wanted as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megamug.data.shards.captions import parse_caption
from megamug.data.shards.labels import CLASSES, NO_LABEL, class_number, classes_bytes, label_value, read_classes
from megamug.data.shards.tar_members import CAPTION_EXTENSIONS, LABEL_EXTENSION, Member, Pair, scan, split_name
from megamug.durable import write_atomically
from megamug.errors import UserError, printable

NO_CAPTION = "no caption (.txt or .json) of this key"
_LABEL_BYTES = 1 << 10  # of a .cls member


@dataclass(frozen=True)
class Limits:
    """What a sample may be at most, and what it must have. A change of limits makes an index stale."""

    pixels: int = 1 << 26  # width x height: 67 million
    # Pixels of a byte of the file, of images above a million: photographs have 1 to 50, a blank page of a screen 300. A
    # file of 665 bytes that claims 64 million costs seconds each time it is drawn, and shows nothing.
    pixels_per_byte: int = 1000
    image_bytes: int = 1 << 26
    caption_bytes: int = 1 << 14
    json_bytes: int = 1 << 20  # of a whole .json member
    images_alone: bool = False  # keep images without a caption in shards where others have one
    labels: bool = False  # quarantine what has no class
    maps: bool = False  # quarantine what has no map of classes


DEFAULT_LIMITS = Limits()


class Rejected(Exception):
    """Why a sample is quarantined, and the member that is at fault (None: the image)."""

    def __init__(self, reason: str, member: Member | None = None) -> None:
        super().__init__(reason)
        self.member = member


@dataclass
class Annotations:
    """Of one image."""

    caption: Member | None
    caption_data: bytes
    caption_is_json: bool
    length: int  # of the caption, characters
    label: int  # -1: none
    label_member: Member | None  # None: no label, or one that the caption's member says
    label_data: bytes
    unlabelled: str  # why there is no label

    def hashed(self) -> bytes:
        return self.caption_data + self.label_data


def read_member(file: BinaryIO, member: Member, limit: int) -> bytes:
    """Raises `Rejected` for an empty member, and one of more than `limit` bytes."""
    if member.size > limit:
        raise Rejected(f"{member.size:,} bytes, more than the limit of {limit:,}", member)
    if member.size == 0:
        raise Rejected("empty file", member)
    file.seek(member.offset)
    return file.read(member.size)


def has_captions(file: BinaryIO, pairs: list[Pair], quarantine: list[dict], limits: Limits) -> bool:
    """Whether any of these samples has a caption, or something that may have been meant to hold one: a link, or what is
    cut off, is in `quarantine`."""
    lost = {entry["key"] for entry in quarantine if split_name(entry["member"])[1] in CAPTION_EXTENSIONS}
    if any("txt" in pair.beside or printable(pair.key) in lost for pair in pairs):
        return True
    found = (pair.beside["json"] for pair in pairs if "json" in pair.beside)
    return any(not _lacks_caption(file, member, limits) for member in found)


def _lacks_caption(file: BinaryIO, member: Member, limits: Limits) -> bool:
    """Whether a .json is an object that says something else than a caption."""
    try:
        value = json.loads(read_member(file, member, limits.json_bytes).decode("utf-8").removeprefix("\ufeff"))
    except (Rejected, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("caption") is None


def annotate(file: BinaryIO, pair: Pair, alone: bool, names: list[str] | None, limits: Limits) -> Annotations:
    """The caption and the class of a sample. `alone`: it needs no caption; `names`: of the classes, None without.

    Raises `Rejected`: no caption or a bad one, and with `limits.labels` no class or a bad one.
    """
    member = next((pair.beside[e] for e in CAPTION_EXTENSIONS if e in pair.beside), None)
    is_json = member is not None and member is pair.beside.get("json")
    if alone and (member is None or is_json and _lacks_caption(file, member, limits)):
        member, data, is_json, length = None, b"", False, 0
    elif member is None:
        raise Rejected(NO_CAPTION)
    else:
        data = read_member(file, member, limits.json_bytes if is_json else limits.caption_bytes)
        length = check_caption(data, is_json, limits, member)
    label, source, label_data, reason = _label(file, pair, names, limits)
    if label < 0 and limits.labels:
        raise Rejected(reason, source)
    if source is member or label < 0:
        source, label_data = None, b""
    return Annotations(member, data, is_json, length, label, source, label_data, reason)


def _label(
    file: BinaryIO, pair: Pair, names: list[str] | None, limits: Limits
) -> tuple[int, Member | None, bytes, str]:
    """(class or -1, the member that should say it, its bytes, why there is none)."""
    is_json = LABEL_EXTENSION not in pair.beside
    member = pair.beside.get("json" if is_json else LABEL_EXTENSION)
    if member is None:
        return -1, None, b"", NO_LABEL
    try:
        data = read_member(file, member, limits.json_bytes if is_json else _LABEL_BYTES)
        value = label_value(data, is_json)
        if value is None:
            return -1, None, b"", NO_LABEL
        return class_number(value, names), member, data, ""
    except (Rejected, ValueError) as error:
        return -1, member, b"", str(error)


def check_caption(data: bytes, is_json: bool, limits: Limits, member: Member | None = None) -> int:
    """Length of the caption in characters. Raises `Rejected`."""
    try:
        caption = parse_caption(data, is_json)
    except UnicodeError as error:
        raise Rejected(f"the caption is not UTF-8: {error}", member) from error
    except RecursionError as error:
        raise Rejected("the JSON is nested too deeply", member) from error
    except ValueError as error:
        raise Rejected(f"bad caption: {error}", member) from error
    size = len(caption.encode())
    if size > limits.caption_bytes:
        raise Rejected(f"the caption has {size:,} bytes, more than the limit of {limits.caption_bytes:,}", member)
    return len(caption)


def number_names(shards: list[Path], limits: Limits) -> None:
    """Write `classes.txt` beside these shards where their labels are names and nothing numbers them: the names of all
    of them in alphabetical order, so that the sets of one call have one numbering. A folder that has the file keeps it,
    and the others get the same.

    Raises `UserError` where folders have different ones, some labels are numbers, or the file cannot be written.
    """
    folders = {folder: read_classes(folder) for folder in dict.fromkeys(shard.parent for shard in shards)}
    missing = [folder for folder, names in folders.items() if names is None]
    if not missing or not any(_are_names(shard, limits) for shard in shards if shard.parent in missing):
        return
    present = {tuple(names): folder for folder, names in folders.items() if names is not None}
    if len(present) > 1:
        raise UserError(f"{' and '.join(map(str, present.values()))} have different {CLASSES}; give one of them to"
                        f" {missing[0]}, or index them apart")  # fmt: skip
    if present:
        names = list(next(iter(present)))
    else:
        values = {value for shard in shards for value in _values(shard, limits)}
        if numbers := [value for value in values if isinstance(value, int)]:
            raise UserError(f"{shards[0]}: some labels are names, and others numbers ({numbers[0]}); number the names"
                            f" in a {CLASSES} beside the shards, the first line class 0")  # fmt: skip
        names = sorted(values)
    for folder in missing:
        try:
            write_atomically(folder / CLASSES, classes_bytes(names))
        except OSError as error:
            raise UserError(f"{folder / CLASSES}: cannot be written: {error}") from error


def _are_names(shard: Path, limits: Limits) -> bool:
    return isinstance(next(_values(shard, limits), None), str)


def _values(shard: Path, limits: Limits) -> Iterator[int | str]:
    """What the labels of a shard say, as they stand there."""
    with open(shard, "rb") as file:
        for pair in scan(shard).pairs:
            is_json = LABEL_EXTENSION not in pair.beside
            member = pair.beside.get("json" if is_json else LABEL_EXTENSION)
            try:
                value = member and label_value(read_member(file, member, limits.json_bytes), is_json)
            except (Rejected, ValueError):
                continue  # told where the shard is indexed
            if value is not None:
                yield value
