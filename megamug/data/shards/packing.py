"""Pack a folder, or a table of paths and captions, into shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megamug.data.shards.captions import parse_captions
from megamug.data.shards.index_file import SUFFIX
from megamug.data.shards.tar_members import IMAGE_EXTENSIONS
from megamug.data.shards.tar_writer import write_shard
from megamug.data.tooling import Progress
from megamug.errors import UserError, printable

Entry = tuple[Path, bytes | Path]  # image; caption, or the file that holds it


def make_shards(
    source: str | Path, output: str | Path, *, prefix: str = "shard", shard_size: int = 10_000, overwrite: bool = False
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Pack `source` (a folder or a .tsv file) into `output/PREFIX-000000.tar`, ...; keys are running numbers.

    Returns the shards and (image, reason) of what was left out: no caption, an unreadable file. A shard appears whole;
    with each image it keeps the name of its file below `source`, so that the quarantine can name it.
    Images are taken in the order of their paths, or of the table. Raises `UserError` where nothing is found, and where
    shards of this prefix are there already and `overwrite` is not set.
    """
    source, output = Path(source), Path(output)
    if shard_size < 1:
        raise UserError(f"--shard-size is {shard_size}; it must be 1 or more")
    if Path(prefix).name != prefix or not prefix.isprintable():
        raise UserError(f"--prefix is {prefix!r}; it must be a plain name without folders")
    skipped: list[tuple[Path, str]] = []
    if source.is_dir():
        entries = list(_folder_entries(source, skipped))
    elif source.is_file() and source.suffix == ".tsv":
        entries = list(_table_entries(source))
    else:
        raise UserError(f"{source}: neither a folder of images nor a .tsv file of paths and captions")
    if not entries:
        kinds = ", ".join("." + extension for extension in IMAGE_EXTENSIONS)
        raise UserError(f"{source}: no image ({kinds}) with a caption beside it; {len(skipped)} images have none")
    existing = sorted(output.glob(f"{prefix}-*.tar"))
    if existing and not overwrite:
        raise UserError(f"{existing[0]} is there already; give another --output or --prefix, or --overwrite")

    progress = Progress("images", len(entries))
    shards: list[Path] = []
    samples = _read(entries, source if source.is_dir() else source.parent, skipped, progress)
    first = next(samples, None)
    while first is not None:
        path = output / f"{prefix}-{len(shards):06d}.tar"
        write_shard(path, _take(first, samples, shard_size - 1))
        shards.append(path)
        first = next(samples, None)
    for path in existing:  # of an earlier, longer packing
        if path not in shards:
            path.with_name(path.name + SUFFIX).unlink(missing_ok=True)
            path.unlink()
    return shards, skipped


def _take(first: tuple, samples: Iterator[tuple], more: int) -> Iterator[tuple]:
    yield first
    for _ in range(more):
        sample = next(samples, None)
        if sample is None:
            return
        yield sample


def _read(
    entries: list[Entry], root: Path, skipped: list[tuple[Path, str]], progress: Progress
) -> Iterator[tuple]:  # fmt: skip
    """(key, extension, image bytes, caption in UTF-8, name below `root`) of each entry that can be read."""
    number = 0
    for image, caption in entries:
        try:
            data = image.read_bytes()
            if isinstance(caption, Path):
                lines = parse_captions(caption.read_bytes(), caption.suffix.lower() == ".json")
                caption = "\n".join(lines).encode()  # as many as there are: `data.caption_lines` chooses
        except (OSError, ValueError) as error:
            skipped.append((image, str(error)))
        else:
            name = image.relative_to(root) if image.is_relative_to(root) else image
            yield f"{number:09d}", image.suffix.lower()[1:], data, caption, printable(name)
            number += 1
        progress.update()


def _folder_entries(folder: Path, skipped: list[tuple[Path, str]]) -> Iterator[Entry]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        present = set(names)
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower()[1:] not in IMAGE_EXTENSIONS:
                continue
            beside = [name[: -len(path.suffix)] + extension for extension in (".txt", ".json")]
            caption = next((Path(parent, other) for other in beside if other in present), None)
            if caption is None:
                skipped.append((path, "no .txt or .json of the same name beside it"))
            else:
                yield path, caption


def _table_entries(table: Path) -> Iterator[Entry]:
    try:
        # -sig: a mark at the start of the file (spreadsheets write one) is not part of the first path. Lines end at
        # line breaks alone: `splitlines` would also end them at U+2028, U+0085 and form feeds, which captions hold.
        lines = table.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: not UTF-8 ({error}); save the table as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or not name.strip() or not caption.strip():
            raise UserError(f"{table}, line {number}: not `path<TAB>caption`: {line[:80]!r}")
        path = table.parent / name.strip()
        if path.suffix.lower()[1:] not in IMAGE_EXTENSIONS:
            raise UserError(f"{table}, line {number}: {name.strip()} is not a {', '.join(IMAGE_EXTENSIONS)} file")
        yield path, caption.strip().encode()
