"""The caption of an image, out of a `.txt` or `.json` member that may hold several: one a line, or a list; and lists of
captions as COCO has them (Chen et al., arXiv 1504.00325)."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from megamug.errors import UserError

LINES = ("join", "first", "random")  # data.caption_lines


def is_visible(text: str) -> bool:
    """Whether a person would see anything of it: more than white space, control and format characters (U+200B)."""
    return any(unicodedata.category(char)[0] not in "CZ" for char in text)


def parse_captions(data: bytes, is_json: bool) -> list[str]:
    """The captions in the bytes of a member: the lines of a `.txt`; in JSON the text under `caption`, by lines, or the
    texts of the list there. White space is folded, what says nothing is left out.

    Raises `ValueError` with the reason if there is none (`UnicodeError`, `RecursionError` of what is no text, no JSON).
    """
    text = data.decode("utf-8", errors="strict").removeprefix("\ufeff")
    found = [text]
    if is_json:
        value = json.loads(text)
        value = value.get("caption") if isinstance(value, dict) else None
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
            raise ValueError("the JSON has no text, and no list of texts, under the key 'caption'")
        for entry in found:
            entry.encode()  # a lone surrogate escape is not text: UnicodeEncodeError
    lines = found if len(found) > 1 else [line for entry in found for line in entry.splitlines()]
    captions = [" ".join(line.split()) for line in lines if is_visible(line)]
    if not captions:
        raise ValueError("the caption is empty")
    return captions


def choose(captions: list[str], how: str = "join", draw: float = 0.0) -> str:
    """One of them: all `join`ed by a space, the `first`, or a `random` one, by `draw` in [0, 1)."""
    assert how in LINES, how
    if how == "join":
        return " ".join(captions)
    return captions[0 if how == "first" else int(draw * len(captions))]


def parse_caption(data: bytes, is_json: bool) -> str:
    """All captions of a member as one text. Raises as `parse_captions`."""
    return choose(parse_captions(data, is_json))


@dataclass(frozen=True)
class CaptionedImage:
    """An image of a COCO list."""

    id: int | str
    file: str | None  # None: the list names no files
    captions: list[str]  # [] where it has none


def read_coco_captions(path: Path, option: str) -> list[CaptionedImage]:
    """The images of a list as COCO's `captions_val2014.json`: `annotations` (image_id, caption) and `images` (id,
    file_name), which may be left out as a whole. In the order of the list; white space of captions is folded, what says
    nothing is left out. `option` is what messages call the file.

    Raises `UserError`: no such list, an image twice, an annotation of an image that `images` does not have.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{option} {path}: cannot be read as JSON: {error}") from error
    try:
        files = None
        if "images" in value:
            files = {image["id"]: image["file_name"].lstrip("/").removeprefix("./") for image in value["images"]}
            if len(set(files.values())) < len(value["images"]):
                raise UserError(f"{option} {path}: two images of the same id or file_name; mend the list")
        captions: dict[int | str, list[str]] = {id: [] for id in files or ()}
        for entry in value["annotations"]:
            id, text = entry["image_id"], entry["caption"]
            if files is not None and id not in files:
                raise UserError(f"{option} {path}: an annotation of image {id!r}, and the list has no such image; mend"
                                " the list")  # fmt: skip
            texts = captions.setdefault(id, [])
            if is_visible(text):
                texts.append(" ".join(text.split()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{option} {path}: not a list of captions as COCO writes it, with annotations (image_id, caption) and"
            f" images (id, file_name): {type(error).__name__}: {error}"
        ) from error
    return [CaptionedImage(id, None if files is None else files[id], texts) for id, texts in captions.items()]
