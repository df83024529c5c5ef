"""The caption of an image, out of a `.txt` or `.json` member that may hold several: one a line, or a list."""

from __future__ import annotations

import json
import unicodedata

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
