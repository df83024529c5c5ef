"""The class of a sample, a whole number from 0 on: out of `KEY.cls`, of `label` in `KEY.json`, of a list or of folders.

Names of classes stand in `classes.txt` beside the shards, that of class 0 in the first line. A label in JSON may be
one of these names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megamug.errors import UserError, printable

CLASSES = "classes.txt"
LARGEST_LABEL = 2**31 - 2
NO_LABEL = "no label (.cls, or `label` in .json) of this key"


def label_value(data: bytes, is_json: bool) -> int | str | None:
    """What the bytes of a member say: a number, a name, or None where a JSON says nothing. Raises `ValueError` with the
    reason where they say something else."""
    try:
        text = data.decode("utf-8", errors="strict").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"the label is not UTF-8: {error}") from error
    if not is_json:
        text = text.strip()
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the JSON cannot be read: {error}") from error
    value = value.get("label") if isinstance(value, dict) else None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise ValueError(f"the label {json.dumps(value)[:40]} is not an integer, and no name of a class")
    return value


def class_number(value: int | str, names: list[str] | None) -> int:
    """The class that a number or one of `names` (None: there are none) stands for. Raises `ValueError`: no such
    class."""
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"the label {value} is negative")
        if value > LARGEST_LABEL:
            raise ValueError(f"the label {value} is above {LARGEST_LABEL:,}")
        if names is not None and value >= len(names):
            raise ValueError(f"the label {value} is none of the {len(names):,} classes of {CLASSES}")
        return value
    shown = repr(value[:40])
    if names is None:
        raise ValueError(f"the label {shown} is not an integer, and there is no {CLASSES} that numbers names")
    if names.count(value) != 1:
        found = "stands more than once in" if value in names else "is not an integer, and not in"
        raise ValueError(f"the label {shown} {found} {CLASSES}")
    return names.index(value)


def read_classes(folder: Path) -> list[str] | None:
    """The names in `classes.txt` of `folder`, by class; None where there is none.

    Raises `UserError` for a file that cannot be read, is empty, or has an empty line between others.
    """
    path = folder / CLASSES
    try:
        names = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text in UTF-8: {error}") from error
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not all(names) or not names:
        line = names.index("") + 1 if names else 1
        raise UserError(f"{path}, line {line}: empty; every line names a class, the first one class 0")
    return names


def classes_bytes(names: list[str]) -> bytes:
    """What `classes.txt` holds of these names. Raises `UserError` for one that does not fit into a line."""
    for name in names:
        if not name or name != name.strip() or not name.isprintable():
            raise UserError(f"the class {printable(repr(name))} does not fit into a line of {CLASSES}; rename it")
    return "".join(f"{name}\n" for name in names).encode()


def classes_sha256(names: list[str] | None) -> str:
    """SHA-256 of the names, "" where there are none."""
    return "" if names is None else hashlib.sha256("\n".join(names).encode()).hexdigest()


Labels = tuple[dict[str, int], list[str] | None]  # class by an image's path below the source; names (None: numbers)


def labels_of_folders(root: Path, images: Iterable[str]) -> Labels:
    """Of `root/CLASS/.../image` (torchvision's ImageFolder): the folders of `root` in the order of their names.

    Images beside the folders have no class. Raises `UserError` where there is no folder, or one without an image.
    """
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise UserError(f"{root}: no folder in there; with --labels folders each folder is a class")
    numbers = {name: number for number, name in enumerate(names)}
    found = {image: numbers[image.split("/")[0]] for image in images if image.split("/")[0] in numbers}
    empty = sorted(set(range(len(names))) - set(found.values()))
    if empty:
        raise UserError(f"{root / names[empty[0]]}: no image in there, but with --labels folders each folder is a"
                        " class; remove the folder, or put images into it")  # fmt: skip
    return found, names


def read_label_list(path: Path, skipped: list[tuple[Path, str]]) -> Labels:
    """Of a list: `.json` as COCO and iNaturalist write it, or `.txt` with lines `path label` as Places365 writes it.

    Categories become classes in the order of their ids; names in a .txt in alphabetical order. What has no class of its
    own goes to `skipped` with the reason. Raises `UserError` for a list that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {path}: cannot be read as text in UTF-8: {error}") from error
    if path.suffix.lower() != ".json":
        return _lines(path, text)
    try:
        value = json.loads(text)
        files = {image["id"]: _relative(image["file_name"]) for image in value["images"]}
        categories = sorted((entry["id"], str(entry["name"])) for entry in value["categories"])
        pairs = {(entry["image_id"], entry["category_id"]) for entry in value["annotations"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--labels {path}: not a list as COCO and iNaturalist write it, with images (id, file_name), categories"
            f" (id, name) and annotations (image_id, category_id): {type(error).__name__}: {error}"
        ) from error
    numbers = {id: number for number, (id, _) in enumerate(categories)}
    if len(numbers) < len(categories) or len(set(files.values())) < len(value["images"]):
        raise UserError(f"--labels {path}: two categories or two images of the same id or name; mend the list")
    for image, category in pairs:
        if image not in files or category not in numbers:
            raise UserError(f"--labels {path}: an annotation of image {image!r} and category {category!r}, and the list"
                            " has no such image or category; mend the list")  # fmt: skip
    counts = Counter(image for image, _ in pairs)
    for id, file in files.items():
        if counts[id] > 1:
            skipped.append((Path(file), f"{counts[id]} categories, so no one class"))
    return {files[i]: numbers[c] for i, c in pairs if counts[i] == 1}, [name for _, name in categories]


def _lines(path: Path, text: str) -> Labels:
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.strip().rsplit(maxsplit=1)
        if not words:
            continue
        if len(words) != 2:
            raise UserError(f"--labels {path}, line {number}: not `path label`: {line[:80]!r}")
        name = _relative(words[0])
        if found.setdefault(name, words[1]) != words[1]:
            raise UserError(f"--labels {path}, line {number}: {name} has the label {found[name]} further up")
    if not found:
        raise UserError(f"--labels {path}: no line `path label` in there")
    numeric = {label: re.fullmatch(r"[+-]?[0-9]{1,20}", label) is not None for label in found.values()}
    if all(numeric.values()):
        try:
            return {name: class_number(int(label), None) for name, label in found.items()}, None
        except ValueError as error:
            raise UserError(f"--labels {path}: {error}; classes are numbers from 0 on") from error
    if any(numeric.values()):
        mixed = next(label for label, number in numeric.items() if not number)
        raise UserError(f"--labels {path}: some labels are numbers, and {mixed!r} is none; give numbers or names")
    names = sorted(numeric)
    numbers = {name: number for number, name in enumerate(names)}
    return {name: numbers[label] for name, label in found.items()}, names


def _relative(name: str) -> str:
    return name.lstrip("/").removeprefix("./")
