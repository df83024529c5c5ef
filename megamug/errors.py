"""The one exception that means "the user can mend this", and text that may be shown to him.

The command line turns a `UserError` into one sentence on stderr and exit code 2, before any process group exists.
"""

import unicodedata


def printable(text: object) -> str:
    """`text` as one line that does nothing to a terminal: what is no plain character becomes its escape (`\\x1b`).

    Names of files and of members of a tar come from others: an escape sequence would clear the screen, a line break
    pretend to be a message of its own, half a surrogate (a name that is not UTF-8) could not be written at all.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class UserError(ValueError):
    """A mistake in configuration, data or arguments. The message says what is wrong, where, and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))  # it names files
