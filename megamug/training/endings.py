"""How a run ends that does not get to its last step: in a sentence where it is known what happened."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamug.checkpoint.store import NotSaved
from megamug.durable import disk_words, free_words, is_full
from megamug.errors import UserError

details = logging.getLogger("details.training")  # to the log file alone

# What gloo and NCCL say where the process at the other end is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@contextmanager
def before_the_start(run_dir: str) -> Iterator[None]:
    """Inside, a full disk is a UserError: nothing has been begun."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(f"run_dir: {disk_words(error)}; {free_words(Path(run_dir))}; make room, or set run_dir to"
                        " another folder") from error  # fmt: skip


def in_a_sentence(error: Exception, run_dir: str, log_path: Path) -> str | None:
    """What a reader of the console is told of `error`; None for what nobody foresaw, which wants its traceback."""
    if isinstance(error, UserError | NotSaved):
        return str(error)
    if is_full(error):
        return f"{disk_words(error)}; {free_words(Path(run_dir))}. Make room, then start the same command again"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE):
        return f"another rank is gone; what it said last is in {log_path.parent}, by rank"
    return None


def keep_traceback(error: Exception) -> None:
    """In the log file of this rank."""
    details.warning("the run ends with an error", exc_info=error)
