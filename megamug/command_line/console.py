"""The console is for this program's own lines. What other packages log or warn of goes to the log file of the run.

    with console.own():
        ...                 # imports as well: what is said before the run has its file is kept for it

Records of other packages below ERROR are taken where every one passes, `logging.Logger.handle`: some packages (torch,
transformers, Transformer Engine) put handlers of their own on their loggers, now and then in the middle of a step.
Errors are shown. C++ code of torch writes to stderr past Python; of that, too, errors alone are shown (by
TORCH_CPP_LOG_LEVEL, where nobody set it).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

OURS = "megamug"
MOST = 1000  # records kept for a run's file

_handle = logging.Logger.handle
_kept: deque[logging.LogRecord] = deque(maxlen=MOST)
_files: list[logging.Handler] = []
_depth = 0
_stderr = logging.StreamHandler()  # until a run has handlers of its own, see `megamug.telemetry.metrics.setup_logging`
_stderr.setLevel(logging.WARNING)
_stderr.setFormatter(logging.Formatter("%(message)s"))
_stderr.of_megamug = True


def belongs(record: logging.LogRecord) -> bool:
    """Whether a console shows this record: our own, or an error of anybody."""
    return record.name.partition(".")[0] == OURS or record.levelno >= logging.ERROR


def to_file(file: logging.Handler) -> None:
    """From now on what others say goes to `file`, and first what they have said so far; replaces an earlier file."""
    _files[:] = [file]
    while _kept:
        file.handle(_kept.popleft())


def _route(logger: logging.Logger, record: logging.LogRecord) -> None:
    """In place of `logging.Logger.handle`."""
    if belongs(record):
        _handle(logger, record)
    elif not logger.disabled:
        if not _files:
            _kept.append(record)
        for file in _files:
            file.handle(record)


def _begin() -> None:
    global _depth
    _depth += 1
    if _depth > 1:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.Logger.handle = _route
    logging.captureWarnings(False)  # whoever replaced `warnings.showwarning` since an earlier call would keep it
    logging.captureWarnings(True)
    if not logging.getLogger().handlers:  # `logging.warning` of another package would make one, of a format of its own
        _stderr.setStream(sys.stderr)
        logging.getLogger().addHandler(_stderr)


def _end() -> None:
    global _depth
    _depth -= 1
    if _depth > 0:
        return
    logging.Logger.handle = _handle
    logging.captureWarnings(False)
    logging.getLogger().removeHandler(_stderr)
    _kept.clear()
    _files.clear()


@contextmanager
def own() -> Iterator[None]:
    """Inside, the console is ours. May be nested; at the end of the outermost all is as it was."""
    _begin()
    try:
        yield
    finally:
        _end()


def take() -> None:
    """`own` until this process ends."""
    _begin()


def import_megatron() -> None:
    """Imports Megatron-core without its advice about packages that are optional here (`megamug doctor` names them)."""
    with own():
        importlib.import_module("megatron.core")
