"""Documents in tar shards: text and images in turn, read by offset, with a reason for each that cannot be used.

Two kinds of shard. An indexed one (megamug data index) holds image-caption pairs: a document is the image and its
caption. One without an index holds documents; the members of one key (WebDataset: the name up to its first dot) are
  - `KEY.json` with `{"segments": [{"text": "..."}, {"image": "0.jpg"}, ...]}`, the images being members `KEY.0.jpg` of
    the same sample; a segment may have `"role": "prompt"` or `"role": "response"`;
  - `KEY.json` with `{"text": "..."}`, or `KEY.txt`: text alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megamug.command_line.console import counted
from megamug.data.random import uniform
from megamug.data.shards.captions import is_visible
from megamug.data.shards.index_file import find_index
from megamug.data.shards.reading import Shard
from megamug.data.shards.tar_members import IMAGE_EXTENSIONS, Member, problem, split_name, unusable, walk
from megamug.data.shards.verify import DEFAULT_LIMITS, Limits, Rejected, check_header
from megamug.durable import file_sha256
from megamug.errors import UserError

TEXT_LIMIT = 1 << 24  # bytes of a .txt or .json member
PAIR_ORDERS = ("random", "caption_first", "image_first")
ROLES = {None: False, "prompt": False, "response": True}


@dataclass
class Picture:
    member: str
    data: bytes  # encoded
    width: int
    height: int


@dataclass
class Segment:
    """Text, or an image."""

    text: str | None = None
    image: Picture | None = None
    response: bool = False


@dataclass
class Document:
    key: str
    segments: list[Segment]


@dataclass
class Sample:
    """The members of one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)  # by the name behind KEY and a dot, in lower case


@dataclass
class DocumentShard:
    """One shard, looked through but not read: its samples are taken in chunks."""

    path: Path
    sha256: str
    pairs: bool
    count: int
    samples: list[Sample]  # [] for pairs, whose index is read by chunk
    quarantine: list[dict]  # of members: {"key", "member", "reason"}


def open_shard(path: Path) -> DocumentShard:
    """Look through a shard. Raises `UserError` for one that cannot be read, or whose index is stale."""
    try:
        if find_index(path) is not None:
            header = Shard(path).header
            quarantine = list(header.quarantine)
            if alone := header.samples - header.captioned:
                reason = f"{counted(alone, 'image')} without a caption: no document is made of an image alone"
                quarantine.append(problem("", "", reason))
            return DocumentShard(path, header.shard_sha256, True, header.captioned, [], quarantine)
        quarantine = []
        samples = list(_scan(path, quarantine).values())
        return DocumentShard(path, file_sha256(path), False, len(samples), samples, quarantine)
    except OSError as error:
        raise UserError(f"{path}: the shard cannot be read: {error}") from error


def iterate_texts(shards: list[DocumentShard]) -> Iterator[list[str]]:
    """The texts of every document in the shards, of a pair its caption: what a tokenizer is trained on."""
    for shard in shards:
        if shard.pairs:
            pairs = Shard(shard.path)
            yield from ([pairs.caption(i)] for i in range(shard.count))
            pairs.close()
            continue
        for document in read_documents(shard.path, shard.samples, []):
            yield [segment.text for segment in document.segments if segment.text]


def _scan(path: Path, quarantine: list[dict]) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    total = os.path.getsize(path)
    for info in walk(path, quarantine):
        if info.isdir():
            continue
        key, extension = split_name(info.name)
        sample = samples.setdefault(key, Sample(key))
        duplicate = "duplicate name: the first one is used" if extension in sample.members else None
        if reason := unusable(info, total) or duplicate:
            quarantine.append(problem(key, info.name, reason))
        else:
            sample.members[extension] = Member(info.name, info.offset_data, info.size)
    return samples


def read_pairs(
    path: Path, first: int, count: int, sha256: str, pair_order: str, seed: int, quarantine: list[dict],
    caption_lines: str = "join",
) -> Iterator[Document]:
    """Pairs first .. first + count of an indexed shard as documents.

    `pair_order`: `caption_first`, `image_first`, or `random`; `caption_lines`: all lines `join`ed, the `first`, or a
    `random` one. What is random is a pure function of (seed, shard's content, number).
    """
    shard, numbers = Shard(path), np.arange(first, first + count)
    draws = uniform(seed, f"pair order/{sha256}", 0, numbers, 1)[:, 0]
    line_draws = uniform(seed, f"caption line/{sha256}", 0, numbers, 1)[:, 0]
    try:
        for i, draw, line in zip(range(first, first + count), draws, line_draws, strict=True):
            key = shard.key(i)
            try:
                image, caption, record = shard.read(i, lines=caption_lines, draw=float(line))
                picture = Picture(f"{key} (image)", image, int(record["width"]), int(record["height"]))
                segments = [Segment(text=caption), Segment(image=picture)]
            except (OSError, ValueError) as error:
                quarantine.append(problem(key, "", f"cannot be read: {error}"))
                continue
            if pair_order == "image_first" or pair_order == "random" and draw < 0.5:
                segments.reverse()
            yield Document(key, segments)
    finally:
        shard.close()


def read_documents(
    path: Path, samples: list[Sample], quarantine: list[dict], limits: Limits = DEFAULT_LIMITS
) -> Iterator[Document]:
    """The documents of some samples of a shard without index; what is none goes to `quarantine` with its reason."""
    with open(path, "rb") as file:
        for sample in samples:
            try:
                document = _parse(file, sample, limits)
            except Rejected as reason:
                quarantine.append(problem(sample.key, "", str(reason)))
                continue
            yield document


def _parse(file, sample: Sample, limits: Limits) -> Document:
    if "json" in sample.members:
        value = _json(_read(file, sample.members["json"], TEXT_LIMIT))
        if "segments" in value:
            return _parse_segments(file, sample, value["segments"], limits)
        if not isinstance(value.get("text"), str):
            raise Rejected("the JSON has neither a list 'segments' nor a text 'text'")
        return Document(sample.key, [Segment(text=_text(value["text"]))])
    if "txt" in sample.members:
        if any(name.rpartition(".")[2] in IMAGE_EXTENSIONS for name in sample.members):
            raise Rejected("an image-caption pair in a shard without index; run megamug data index on it")
        data = _read(file, sample.members["txt"], TEXT_LIMIT)
        try:
            return Document(sample.key, [Segment(text=_text(data.decode("utf-8").removeprefix("\ufeff")))])
        except UnicodeDecodeError as error:
            raise Rejected(f"not UTF-8: {error}") from error
    raise Rejected("no .json and no .txt of this key")


def _parse_segments(file, sample: Sample, entries: object, limits: Limits) -> Document:
    if not isinstance(entries, list) or not entries:
        raise Rejected("'segments' is not a list with an entry or more")
    segments = []
    for number, entry in enumerate(entries):
        where = f"segment {number}"
        if not isinstance(entry, dict) or ("text" in entry) == ("image" in entry):
            raise Rejected(f"{where} has not exactly one of 'text' and 'image'")
        unknown = sorted(set(entry) - {"text", "image", "role"})
        if unknown:
            raise Rejected(f"{where} has an unknown key {unknown[0]!r}; the keys are text, image, role")
        role = entry.get("role")
        if not (role is None or isinstance(role, str)) or role not in ROLES:
            raise Rejected(f"{where} has the role {role!r}; it is prompt or response")
        if "text" in entry:
            if not isinstance(entry["text"], str):
                raise Rejected(f"{where}: its text is no string")
            segments.append(Segment(text=_text(entry["text"], where), response=ROLES[role]))
        else:
            segments.append(Segment(image=_image(file, sample, entry["image"], where, limits), response=ROLES[role]))
    return Document(sample.key, segments)


def _image(file, sample: Sample, name: object, where: str, limits: Limits) -> Picture:
    if not isinstance(name, str):
        raise Rejected(f"{where}: 'image' is not the name of a member")
    base = sample.key.rpartition("/")[2]
    extension = name.removeprefix(base + ".").lower()
    member = sample.members.get(extension)
    if member is None or extension.rpartition(".")[2] not in IMAGE_EXTENSIONS:
        raise Rejected(f"{where} names the image {name!r}, but the sample has no such member")
    data = _read(file, member, limits.image_bytes)
    try:
        width, height = check_header(data, limits)
    except Rejected as reason:
        raise Rejected(f"{member.name}: {reason}") from reason
    return Picture(member.name, data, width, height)


def _read(file, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise Rejected(f"{member.name}: {member.size:,} bytes, more than the limit of {limit:,}")
    file.seek(member.offset)
    return file.read(member.size)


def _json(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise Rejected("the JSON is nested too deeply") from error
    except ValueError as error:
        raise Rejected(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Rejected("the JSON is no object")
    return value


def _text(text: str, where: str = "the document") -> str:
    """`text` as it is: newlines and indents are part of code and lists."""
    if not is_visible(text):
        raise Rejected(f"{where}: the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate escape
        raise Rejected(f"{where}: not text: {error}") from error
    return text
