"""Skipping bad steps, ending a run that hangs, and what is said of one that ends before its last step."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megamug.checkpoint.store import NotSaved
from megamug.durable import disk_words, free_words, is_full
from megamug.errors import UserError

logger = logging.getLogger(__name__)
details = logging.getLogger("details.training")  # to the log file alone

# What gloo and NCCL say where the process at the other end is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class TooManyBadSteps(RuntimeError):
    """Too many steps in a row were skipped."""


class BadStepGuard:
    """Counts steps that were skipped, and ends the run after `limit` of them in a row.

    That a step is skipped all ranks have agreed on before (`Optimizer.apply`).
    """

    def __init__(self, limit: int = 10):
        assert limit >= 1, f"limit={limit}"
        self.limit = limit
        self.in_a_row = 0
        self.skipped = 0  # since the start of this process

    def is_bad(
        self, step: int, loss: float, grad_norm: float, updated: bool = True, advice: Callable[[], str] = str
    ) -> bool:
        """Whether the step was skipped. Raises TooManyBadSteps, with what `advice` says, at the `limit`-th one.

        Args:
            loss: summed over micro-batches and data-parallel ranks and known to all ranks (all pipeline stages, too).
            grad_norm: of the whole model, before clipping.
            updated: whether the optimizer applied it; it may have refused a step whose numbers are finite here, for
                another rank's or for a spike of the norm.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and updated:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.skipped += 1
        why = "" if not finite else ", a spike, or not finite on another rank"
        logger.warning(
            "step %d skipped: loss %s, gradient norm %s%s (%d of at most %d in a row)",
            step, loss, grad_norm, why, self.in_a_row, self.limit,
        )  # fmt: skip
        if self.in_a_row >= self.limit:
            raise TooManyBadSteps(
                f"loss or gradient norm was a spike or not finite in {self.limit} steps in a row, the last being step "
                f"{step} (loss {loss}, gradient norm {grad_norm}). The parameters are those of step "
                f"{step - self.limit}. Lower optimizer.learning_rate or lengthen optimizer.warmup_steps. {advice()}"
            )
        return True


class Watchdog:
    """Ends the process, with the stacks of all its threads in the log, if nobody calls `beat` for `limit_seconds`.

    A rank that waits in a collective for a rank that died waits for ever, unless somebody ends it. A context manager;
    exit code 1. Works while the main thread hangs in a collective or in C code; if that code holds the GIL, the
    watchdog's own thread cannot run either, and faulthandler's timer, which needs no GIL, does the same a little later.

    Args:
        limit_seconds: must exceed the longest step, validation interval or save between two beats.
        log_path: file that the stacks are appended to (they also go to stderr).
    """

    EXIT_CODE = 1

    def __init__(self, limit_seconds: float, log_path: str | Path):
        assert limit_seconds > 0, f"limit_seconds={limit_seconds}"
        self.limit = limit_seconds
        self.period = min(1.0, limit_seconds / 4)
        self.log_path = Path(log_path)
        self._stopped = threading.Event()
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._log = open(self.log_path, "a", encoding="utf-8")
        self._stopped.clear()
        self.beat()
        self._arm_timer()
        self._thread = threading.Thread(target=self._watch, name="megamug-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._log.close()

    def beat(self) -> None:
        """Say that the process gets on. Cheap; call it at least once a step."""
        self._last = time.monotonic()

    def _arm_timer(self) -> None:
        # exit=True ends the process by _exit(1)
        faulthandler.dump_traceback_later(self.limit + 4 * self.period, exit=True, file=self._log)

    def _watch(self) -> None:
        while not self._stopped.wait(self.period):
            silent = time.monotonic() - self._last
            if silent > self.limit:
                self._end(silent)
            self._arm_timer()

    def _end(self, silent: float) -> None:
        line = (
            f"watchdog: no step was finished for {silent:.0f} s (limit {self.limit:.0f} s); ending this process with "
            f"exit code {self.EXIT_CODE}. Stacks of all threads, also in {self.log_path}:\n"
        )
        for file in (self._log, sys.__stderr__):
            file.write(line)
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        os._exit(self.EXIT_CODE)


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
