"""Text out of foreign files, as a terminal may have it."""

from __future__ import annotations


def shown(text: str) -> str:
    """`text` with what is not printed (escape sequences, line ends, marks that turn the direction of writing) as
    Python spells it: `\\x1b`, `\\n`, `\\u202e`. A backslash stays: what was shown once may be shown again."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
