"""Pack a folder of images, with or without captions and labels, or a table of paths and captions, into shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamug.command_line.console import counted
from megamug.data.shards.captions import CaptionedImage, parse_captions, read_coco_captions
from megamug.data.shards.index_file import SUFFIX
from megamug.data.shards.labels import CLASSES, classes_bytes, labels_of_folders, read_classes, read_label_list
from megamug.data.shards.tar_members import IMAGE_EXTENSIONS, MAP_EXTENSION
from megamug.data.shards.tar_writer import write_members
from megamug.data.tooling import Progress
from megamug.durable import write_atomically
from megamug.errors import UserError, printable

_NO_CAPTION = "no .txt or .json of the same name beside it"


@dataclass
class Entry:
    """One image to pack."""

    image: Path
    caption: bytes | Path | CaptionedImage | None  # or the file that holds it; None: it has none
    label: int | None = None
    map: Path | None = None


def make_shards(
    source: str | Path, output: str | Path, *, prefix: str = "shard", shard_size: int = 10_000, overwrite: bool = False,
    images_alone: bool = False, labels: str | None = None, captions: str | Path | None = None,
    maps: Path | None = None,
) -> tuple[list[Path], list[tuple[Path, str]]]:  # fmt: skip
    """Pack `source` (a folder or a .tsv file) into `output/PREFIX-000000.tar`, ...; keys are running numbers.

    Where no image of a folder has a caption, they are packed alone; where some have, the others are left out, unless
    `images_alone`. `labels`: `folders` (root/CLASS/image) or a list (see `labels.read_label_list`); every image that
    is packed then has a `KEY.cls`, and `classes.txt` in `output` names the classes. `captions`: a list as COCO writes
    it (see `captions.read_coco_captions`), in the place of files beside the images; an image keeps all of its own.
    `maps`: a folder that holds, for each `a/b.jpg` of `source`, the map of its classes `a/b.png` (ADE20K's
    annotations); every image that is packed then has a `KEY.seg.png`.

    Returns the shards and (image, reason) of what was left out: no caption, label or map, an unreadable file. A shard
    appears whole; with each image it keeps the name of its file below `source`, so that the quarantine can name it.
    Images are taken in the order of their paths, or of the table. Raises `UserError` where nothing is found, and where
    shards of this prefix are there already and `overwrite` is not set.
    """
    source, output = Path(source), Path(output)
    if shard_size < 1:
        raise UserError(f"--shard-size is {shard_size}; it must be 1 or more")
    if Path(prefix).name != prefix or not prefix.isprintable():
        raise UserError(f"--prefix is {prefix!r}; it must be a plain name without folders")
    skipped: list[tuple[Path, str]] = []
    names = None
    if source.is_dir():
        entries = _folder_entries(source, images_alone, skipped, captions and Path(captions))
        if labels is not None:
            entries, names = _labelled(entries, source, labels, skipped)
        if maps is not None:
            entries = _mapped(entries, source, maps, skipped)
    elif options := [name for name, given in (("labels", labels), ("captions", captions), ("maps", maps)) if given]:
        option = f"--{options[0]}"
        raise UserError(f"{option} is for a folder of images, and {source} is none")
    elif source.is_file() and source.suffix == ".tsv":
        entries = list(_table_entries(source))
    else:
        raise UserError(f"{source}: neither a folder of images nor a .tsv file of paths and captions")
    if not entries:
        kinds = ", ".join("." + extension for extension in IMAGE_EXTENSIONS)
        raise UserError(f"{source}: no image ({kinds}) to pack; {counted(len(skipped), 'image')} left out"
                        + (f", the first {skipped[0][0]}: {skipped[0][1]}" if skipped else ""))  # fmt: skip
    existing = sorted(output.glob(f"{prefix}-*.tar"))
    if existing and not overwrite:
        raise UserError(f"{existing[0]} is there already; give another --output or --prefix, or --overwrite")
    _write_classes(output, names, overwrite)

    progress = Progress("images", len(entries))
    shards: list[Path] = []
    samples = _read(entries, source if source.is_dir() else source.parent, skipped, progress)
    first = next(samples, None)
    while first is not None:
        path = output / f"{prefix}-{len(shards):06d}.tar"
        write_members(path, _members(_take(first, samples, shard_size - 1)))
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


def _write_classes(output: Path, names: list[str] | None, overwrite: bool) -> None:
    """`classes.txt` beside the shards, where there are `names`. Raises `UserError` where another one is there."""
    if names is None or (there := read_classes(output)) == names:
        return
    if there is not None and not overwrite:
        raise UserError(f"{output / CLASSES} names other classes; give another --output, or --overwrite")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / CLASSES, classes_bytes(names))


def _members(samples: Iterator[tuple]) -> Iterator[tuple]:
    """The members of samples (key, extension, image, what stands beside it by extension, name of the image's file)."""
    for key, extension, image, beside, source in samples:
        yield f"{key}.{extension}", image, source
        for name, data in beside.items():
            yield f"{key}.{name}", data


def _read(
    entries: list[Entry], root: Path, skipped: list[tuple[Path, str]], progress: Progress
) -> Iterator[tuple]:  # fmt: skip
    """(key, extension, image bytes, what stands beside it by extension, name below `root`) of each entry that can be
    read."""
    number = 0
    for entry in entries:
        image, caption = entry.image, entry.caption
        beside = {}
        try:
            data = image.read_bytes()
            if isinstance(caption, Path):
                lines = parse_captions(caption.read_bytes(), caption.suffix.lower() == ".json")
                beside["txt"] = "\n".join(lines).encode()  # as many as there are: `data.caption_lines` chooses
            elif isinstance(caption, CaptionedImage):
                told = {"caption": caption.captions, "image_id": caption.id, "file_name": caption.file}
                beside["json"] = json.dumps(told, ensure_ascii=False).encode()
            elif caption is not None:
                beside["txt"] = caption
            if entry.label is not None:
                beside["cls"] = str(entry.label).encode()
            if entry.map is not None:
                beside[MAP_EXTENSION] = entry.map.read_bytes()
        except (OSError, ValueError) as error:
            skipped.append((image, str(error)))
        else:
            name = image.relative_to(root) if image.is_relative_to(root) else image
            yield f"{number:09d}", image.suffix.lower()[1:], data, beside, printable(name)
            number += 1
        progress.update()


def _folder_entries(
    folder: Path, images_alone: bool, skipped: list[tuple[Path, str]], captions: Path | None
) -> list[Entry]:
    listed = None
    if captions is not None:
        listed = {folder / image.file: image for image in read_coco_captions(captions, "--captions") if image.file}
        if not listed:
            raise UserError(f"--captions {captions}: no images (id, file_name) in there, so nothing says which image"
                            " a caption is of")  # fmt: skip
    entries = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        present = set(names)
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower()[1:] in IMAGE_EXTENSIONS:
                beside = [name[: -len(path.suffix)] + extension for extension in (".txt", ".json")]
                caption = next((Path(parent, other) for other in beside if other in present), None)
                if listed is not None:
                    image = listed.pop(path, None)
                    caption = image if image is not None and image.captions else None
                entries.append(Entry(path, caption))
    if listed is not None:
        skipped += [(path, f"named in {captions}, but there is no such image") for path in sorted(listed)]
        if not images_alone:
            skipped += [(entry.image, f"no caption in {captions}") for entry in entries if entry.caption is None]
            return [entry for entry in entries if entry.caption is not None]
    if images_alone or all(entry.caption is None for entry in entries):
        return entries
    skipped += [(entry.image, _NO_CAPTION) for entry in entries if entry.caption is None]
    return [entry for entry in entries if entry.caption is not None]


def _labelled(
    entries: list[Entry], root: Path, labels: str, skipped: list[tuple[Path, str]]
) -> tuple[list[Entry], list[str] | None]:
    """The entries that have a class, with it, and the names of the classes; the others go to `skipped`."""
    names = {entry.image.relative_to(root).as_posix(): entry for entry in entries}
    if labels == "folders":
        found, classes = labels_of_folders(root, names)
        reason = "in no folder of a class"
    else:
        told = len(skipped)
        found, classes = read_label_list(Path(labels), skipped)
        reason = f"no label in {labels}"
        explained = {str(path) for path, _ in skipped[told:]}
        skipped[told:] = [(root / path, why) for path, why in skipped[told:]]
        skipped += [(root / name, f"named in {labels}, but there is no such image") for name in found
                    if not (root / name).is_file()]  # fmt: skip
        names = {name: entry for name, entry in names.items() if name not in explained}
    for name, entry in names.items():
        entry.label = found.get(name)
        if entry.label is None:
            skipped.append((entry.image, reason))
    return [entry for entry in names.values() if entry.label is not None], classes


def _mapped(entries: list[Entry], root: Path, maps: Path, skipped: list[tuple[Path, str]]) -> list[Entry]:
    """The entries that have a map in the folder `maps`, with it; the others go to `skipped`."""
    if not maps.is_dir():
        raise UserError(f"--maps {maps}: no such folder; give the one that holds, for each image a/b.jpg of {root}, its"
                        " map a/b.png")  # fmt: skip
    for entry in entries:
        entry.map = (maps / entry.image.relative_to(root)).with_suffix(".png")
        if not entry.map.is_file():
            skipped.append((entry.image, f"no map {entry.map}"))
    return [entry for entry in entries if entry.map.is_file()]


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
        yield Entry(path, caption.strip().encode())
