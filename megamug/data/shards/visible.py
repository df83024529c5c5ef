"""Whether a text says anything."""

from __future__ import annotations

import unicodedata


def is_visible(text: str) -> bool:
    """Whether a person would see anything of it: more than white space, control and format characters (U+200B)."""
    return any(unicodedata.category(char)[0] not in "CZ" for char in text)
