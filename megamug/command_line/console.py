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
import signal
import sys
import threading
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


def counted(number: int, name: str) -> str:
    """1, shard -> 1 shard; 2, process -> 2 processes"""
    return f"{number:,} {name}" + ("" if number == 1 else "es" if name.endswith("s") else "s")


def take() -> None:
    """`own` until this process ends."""
    _begin()


def import_megatron() -> None:
    """Imports Megatron-core without its advice about packages that are optional here (`megamug doctor` names them)."""
    with own():
        importlib.import_module("megatron.core")


class _Torch:
    """A finder that finds nothing, first in line: when torch is asked for it says so, once, and leaves."""

    def __init__(self, line: str) -> None:
        self.line = line

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            print(self.line, file=sys.stderr, flush=True)


@contextmanager
def announcing(command: str) -> Iterator[None]:
    """Inside, the import of torch (with Megatron-core 10 s and more on a slow machine) is told on stderr as it begins;
    not where torch is there already, and not where a mistake is found before it is needed."""
    finder = _Torch(f"{command}: loading torch and Megatron-core ...")
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]


def _interrupted(_number: int, frame: object) -> None:
    """Ctrl-C. An import that is torn apart tells so in forty lines, or takes it for a package that is missing and goes
    on without: where one is under way, with nothing begun, the process ends here. Out of a `__del__` no exception
    comes, it is told and dropped: there it waits a moment."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + signal.SIGINT)
        if frame.f_code.co_name == "__del__":
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C during imports ends the process with exit code 130 and no traceback; else it is KeyboardInterrupt.
    Does nothing outside of the main thread, and where somebody else handles the signal."""
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
