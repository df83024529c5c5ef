"""Walk a tar shard without extracting anything: pair image and caption members, say what is wrong with the others.

WebDataset's naming: `folder/KEY.EXTENSION`, KEY up to the first dot of the file name, shared by image and caption.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json")  # a .txt wins over a .json of the same key
_BLOCK = 512


@dataclass
class Member:
    name: str
    offset: int
    size: int


@dataclass
class Pair:
    """An image and a caption of one key, not yet looked into."""

    key: str
    image: Member
    caption: Member
    caption_is_json: bool


@dataclass
class TarContents:
    pairs: list[Pair] = field(default_factory=list)
    quarantine: list[dict] = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)  # by extension


def problem(key: str, member: str, reason: str) -> dict:
    return {"key": key, "member": member, "reason": reason}


def split_name(name: str) -> tuple[str, str]:
    """`a/b/KEY.seg.png` -> (`a/b/KEY`, `seg.png`)."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def scan(path: Path) -> TarContents:
    """All pairs of the shard at `path` in the tar's order, and a reason for each member that cannot be used."""
    contents = TarContents()
    images: dict[str, Member] = {}
    captions: dict[str, dict[str, Member]] = {}
    total = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    _sort_member(info, total, images, captions, contents)
                    tar.members.clear()  # tarfile would keep an object for each member
                end = tar.offset
        except (tarfile.TarError, UnicodeError, ValueError) as error:
            contents.quarantine.append(problem("", "", f"not a readable tar from here on ({error}); truncated?"))
        else:
            file.seek(end)
            block = file.read(_BLOCK)
            if len(block) < _BLOCK:
                reason = "the tar ends without its end mark: truncated? The members before are used"
                contents.quarantine.append(problem("", "", reason))
            elif block.strip(b"\0"):
                reason = f"no valid tar header at byte {end}: the members behind it cannot be reached"
                contents.quarantine.append(problem("", "", reason))
    for key, image in images.items():
        found = captions.pop(key, None)
        if found is None:
            contents.quarantine.append(problem(key, image.name, "no caption (.txt or .json) of this key"))
        else:
            extension = next(e for e in CAPTION_EXTENSIONS if e in found)
            contents.pairs.append(Pair(key, image, found[extension], extension == "json"))
    for key, found in captions.items():
        name = next(iter(found.values())).name
        contents.quarantine.append(problem(key, name, "a caption without a usable image of this key"))
    return contents


def _sort_member(
    info: tarfile.TarInfo, total: int, images: dict[str, Member], captions: dict[str, dict[str, Member]],
    contents: TarContents,
) -> None:  # fmt: skip
    name = info.name
    key, extension = split_name(name)
    is_image, is_caption = extension in IMAGE_EXTENSIONS, extension in CAPTION_EXTENSIONS
    if info.isdir():
        return
    if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        contents.quarantine.append(problem(key, name, "unsafe name"))
    elif not info.isreg() or info.issparse():
        contents.quarantine.append(problem(key, name, "a link, device or sparse file, not a plain one"))
    elif not (is_image or is_caption):
        contents.ignored[extension] += 1
    elif info.offset_data + info.size > total:
        contents.quarantine.append(problem(key, name, "truncated: its bytes go beyond the end of the shard"))
    elif is_image and key in images or is_caption and extension in captions.get(key, {}):
        contents.quarantine.append(problem(key, name, "duplicate key: the first one is used"))
    elif is_image:
        images[key] = Member(name, info.offset_data, info.size)
    else:
        captions.setdefault(key, {})[extension] = Member(name, info.offset_data, info.size)
