"""What `data.train` and `data.validation` name: sets of indexed shards, with weights.

A value is a folder of shards, a glob, a shard, or a list of those; an item may be a string (see `find_shards`) or
`{path: ..., weight: ...}`. With weights, the sets are blended in their proportion; without, in that of their sizes.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamug.command_line.arguments import expand_home
from megamug.command_line.console import counted
from megamug.data.shards.index_file import find_index, index_command
from megamug.data.shards.labels import CLASSES, classes_sha256, read_classes
from megamug.data.shards.reading import Shard
from megamug.errors import UserError

TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".zip")  # what people also give
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")
_MOST = 1_000_000  # paths that braces may stand for
_DECOMPRESS = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd"}
_COMPRESSED = re.compile(r"\.(?:tar\.)?(tgz|(?<=tar\.)(?:gz|bz2|xz|zst))$", re.IGNORECASE)


@dataclass
class Source:
    """One set of shards. Samples are numbered through all shards, in the order of the shards' paths.

    With `captioned` only samples with a caption are of the set; those of a shard come first in its index. What is set
    last is `megamug.data.pairs.selection`'s.
    """

    name: str
    shards: list[Shard]
    weight: float | None
    starts: np.ndarray  # int64 [shards + 1]: number of the first sample of each shard, and the total
    captioned: bool = False
    part: np.ndarray | None = None  # int64 [len]: of all samples those that are seen, ascending
    given: np.ndarray | None = None  # int64 [len]: whose caption a sample is given, in place of its own
    remarks: tuple[str, ...] = ()  # what the fingerprint says of both

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.part is None else len(self.part)

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard that holds sample `index`, and its place in there."""
        index = index if self.part is None else self.part[index]
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.shards[shard], int(index - self.starts[shard])

    def locate_caption(self, index: int) -> tuple[Shard, int]:
        """The shard that holds the caption of sample `index`, and its place in there."""
        return self.locate(index if self.given is None else int(self.given[index]))

    def fingerprint(self) -> str:
        """SHA-256 over names, contents and numbers of samples of the shards, and over what is seen of them: another set
        is another order."""
        digest = hashlib.sha256()
        for shard, count in zip(self.shards, self.counts(), strict=True):
            digest.update(f"{shard.header.shard} {shard.header.shard_sha256} {count}\n".encode())
        for remark in self.remarks:
            digest.update(f"{remark}\n".encode())
        return digest.hexdigest()

    def counts(self) -> list[int]:
        """How many samples of each shard are of the set, before any selection: the first so many of its index."""
        return np.diff(self.starts).tolist()

    def without_caption(self) -> int:
        """How many samples of the shards have no caption; with `captioned` they are not of the set."""
        return sum(len(shard) - shard.header.captioned for shard in self.shards)

    def class_names(self) -> list[str] | None:
        """The names of the classes out of `classes.txt` beside the shards, by class; None where there is none.

        Raises `UserError` where the shards' folders have different ones, or one has another than when it was indexed.
        """
        folders: dict[Path, list[str] | None] = {}
        for shard in self.shards:
            folder, header = shard.path.parent, shard.header
            names = folders[folder] if folder in folders else folders.setdefault(folder, read_classes(folder))
            made = header.classes_sha256
            if made and made != classes_sha256(names) or names is not None and header.classes > len(names):
                raise UserError(f"{shard.path}: indexed with other names of classes than {CLASSES} beside it has now;"
                                f" restore that, or run: {index_command([shard.path])}")  # fmt: skip
        found = list(folders.values())
        if any(names != found[0] for names in found):
            raise UserError(f"{self.name}: the folders {', '.join(map(str, folders))} have different {CLASSES}; number"
                            " the classes of all in one way")  # fmt: skip
        return found[0]

    @property
    def classes(self) -> int:
        """The number of classes: of names where there are some, else the largest class plus one; 0 without labels."""
        names = self.class_names()
        return max(shard.header.classes for shard in self.shards) if names is None else len(names)

    def check_labels(self) -> None:
        """Raises `UserError` where samples have no class, or the names of the classes are in disorder."""
        labelled = sum(shard.header.labelled for shard in self.shards)
        reasons = (shard.header.unlabelled for shard in self.shards)
        self._check_all("label", labelled, reasons, "a KEY.cls with a number, or a `label` in KEY.json")

    @property
    def map_values(self) -> int:
        """The largest value of the maps but 255, plus one; 0 without maps."""
        return max(shard.header.map_values for shard in self.shards)

    def check_maps(self) -> None:
        """Raises `UserError` where samples have no map of classes, or the names of the classes are in disorder."""
        mapped = sum(shard.header.mapped for shard in self.shards)
        reasons = (shard.header.unmapped for shard in self.shards)
        self._check_all("map", mapped, reasons, "a KEY.seg.png of its size, a class a pixel")

    def _check_all(self, what: str, having: int, reasons: Iterable[str], give: str) -> None:
        """Raises `UserError` where not all samples are `having` a label or map; the first of `reasons` says why."""
        total = sum(len(shard) for shard in self.shards)
        if having < total:
            raise UserError(
                f"{self.name}: {total - having:,} of {counted(total, 'sample')} without a usable {what}"
                f" ({next(filter(None, reasons))}); give each {give}; `{index_command([self.name])} --{what}s` leaves"
                " out what has none"
            )
        self.class_names()


class WithoutCaptions(UserError):
    """A set that was to have captions and has none."""


def find_shards(path: str | Path) -> list[Path]:
    """The tar files that `path` names: a folder, a glob or a file, `~` and braces (`x-{000..127}.tar`, `{a,b}.tar`)
    written out as a shell would, several joined by `::`. Those of a folder or glob are sorted.

    Raises `UserError` where there is none, where one of several is absent, and where one is a link that leads nowhere:
    nobody should train on fewer data than are named.
    """
    shards = [shard for part in expand(path) for shard in _named(part)]
    for shard in shards:
        if shard.is_symlink() and not shard.exists():
            raise UserError(f"{shard} is a link to {os.readlink(shard)}, which does not exist; restore that, or remove"
                            " the link")
    return list(dict.fromkeys(shards))


def expand(path: str | Path) -> list[str]:
    """The paths that `path` stands for: parts joined by `::`, braces and `~` written out. A path that is there as it is
    written is meant as it is written."""
    text = str(path)
    if os.path.lexists(text):
        return [text]
    parts = [expand_home(part) for part in text.split("::")]
    if not all(parts):
        raise UserError(f"data: {text!r} has an empty part beside `::`; give a path on both sides")
    paths = [one for part in parts for one in ([part] if os.path.lexists(part) else _braces(part))]
    if len(paths) > _MOST:
        raise UserError(f"data: {text} stands for more than {_MOST:,} paths; give a folder or a glob")
    return paths


def _braces(text: str) -> list[str]:
    """`{00..12}` (as many digits as are written), `{a,b}`, any number of them; anything else in braces stays."""
    for match in _BRACES.finditer(text):
        first, last, words = match.groups()
        if words is not None:
            choices = words.split(",")
        else:
            padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
            digits = max(len(first), len(last)) if padded else 0
            low, high = int(first), int(last)
            if abs(high - low) >= _MOST:
                raise UserError(f"data: {text} stands for more than {_MOST:,} paths; give a folder or a glob")
            step = 1 if high >= low else -1
            choices = [f"{number:0{digits}d}" for number in range(low, high + step, step)]
        rests = _braces(text[match.end() :])
        if len(choices) * len(rests) > _MOST:
            raise UserError(f"data: {text} stands for more than {_MOST:,} paths; give a folder or a glob")
        return [text[: match.start()] + choice + rest for choice in choices for rest in rests]
    return [text]


def _named(text: str) -> list[Path]:
    if Path(text).is_dir():
        shards = sorted(Path(text).glob("*.tar"))
        for path in sorted(Path(text).iterdir()):  # beside whole shards, too: nobody would miss what is in there
            if (problem := compressed(path)) and not path.with_name(_COMPRESSED.sub(".tar", path.name)).exists():
                raise UserError(problem)
        if not shards:
            raise UserError(f"{text}: no .tar shards in there; megamug data shards packs images into some")
        return shards
    if Path(text).is_file():
        if Path(text).suffix.lower() in TABLES:
            raise UserError(f"{text}: not a .tar shard; megamug data shards packs the images that a .tsv of paths and"
                            " captions names, or a folder of both")
        return [Path(text)]
    if any(character in text for character in "*?["):
        matches = map(Path, glob.glob(text, recursive=True))
        shards = sorted(match for match in matches if match.is_file() or match.is_symlink() and not match.exists())
        if not shards:
            raise UserError(f"{text}: no file matches; give a folder of .tar shards, a glob or a list of those")
        return shards
    raise UserError(f"{text}: no such file or folder; give a folder of .tar shards, a glob or a list of those")


def compressed(path: Path) -> str | None:
    """What to tell of a tar that its name calls compressed; None for any other path."""
    found = _COMPRESSED.search(path.name)
    if found is None:
        return None
    command = _DECOMPRESS[found[1].lower()]
    return (f"{path}: a compressed tar; members are read by their place in the file, so decompress it first: "
            f"{command} {path}")  # fmt: skip


def resolve_sources(value: object, verify: bool = False, captions: bool = False) -> list[Source]:
    """Open the sets that a configuration value names (see above). `verify`: compare every sample with its SHA-256.
    `captions`: only samples that have one.

    Raises `UserError`: nothing there, no index or a stale one, weights for some sets only, a set without samples
    (`WithoutCaptions` where `captions` are wanted and no sample has one).
    """
    return [_open_source(path, weight, verify, captions) for path, weight in parse_sets(value)]


def check_labels(sources: list[Source]) -> None:
    """Raises `UserError` where a sample of these sets has no class, or where they name their classes differently."""
    for source in sources:
        source.check_labels()
    _check_names(sources)


def check_maps(sources: list[Source]) -> None:
    """Raises `UserError` where a sample of these sets has no map, or where they name their classes differently."""
    for source in sources:
        source.check_maps()
    _check_names(sources)


def _check_names(sources: list[Source]) -> None:
    for source in sources:
        if source.class_names() != sources[0].class_names():
            raise UserError(f"{sources[0].name} and {source.name} have different {CLASSES}; number the classes of all"
                            " in one way")  # fmt: skip


def parse_sets(value: object) -> list[tuple[str, float | None]]:
    """(path, weight or None) of each set that a configuration value names; weights for all sets, or for none."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise UserError("data: an empty list of data sets; give a path or a list of paths")
    parsed = [_parse_item(item) for item in items]
    weighted = [weight is not None for _, weight in parsed]
    if any(weighted) and not all(weighted):
        missing = next(path for path, weight in parsed if weight is None)
        raise UserError(f"data: {missing} has no weight but other sets have one; give each set a weight, or none")
    return parsed


def _parse_item(item: object) -> tuple[str, float | None]:
    if isinstance(item, str | Path):
        return str(item), None
    if not isinstance(item, dict) or not isinstance(item.get("path"), str | Path):
        raise UserError(f"data: {item!r} names no data set; give a path, or {{path: ..., weight: ...}}")
    unknown = sorted(set(item) - {"path", "weight"})
    if unknown:
        raise UserError(f"data: unknown key {unknown[0]!r} beside path {item['path']}; the keys are path and weight")
    weight = item.get("weight")
    if weight is None:
        return str(item["path"]), None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"data: the weight of {item['path']} is {weight!r}; it must be a number above 0")
    return str(item["path"]), float(weight)


def _open_source(path: str, weight: float | None, verify: bool, captions: bool) -> Source:
    paths = find_shards(path)
    for shard in paths:
        if problem := compressed(shard):
            raise UserError(problem)
    missing = [shard for shard in paths if find_index(shard) is None]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(paths)} shards have no index (the first is {missing[0]}); "
            f"run: {index_command([path])}"
        )
    shards = [Shard(shard, verify) for shard in paths]
    total = sum(len(shard) for shard in shards)
    if total == 0:
        held = counted(len(shards), "shard")
        raise UserError(f"{path}: no usable sample in {held}; {index_command([path])} lists the reasons")
    sizes = [shard.header.captioned if captions else len(shard) for shard in shards]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    if starts[-1] == 0:
        raise WithoutCaptions(f"{path}: none of {counted(total, 'sample')} has a caption (KEY.txt, or `caption` in"
                              " KEY.json)")  # fmt: skip
    return Source(path, shards, weight, starts, captions)
