"""What the tools for data share: progress, and spawned workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context

from megamug.command_line import console
from megamug.durable import remove_asides


class Progress:
    """A bar on a terminal, elsewhere a line every few seconds and one at the end."""

    def __init__(self, label: str, total: int, every_seconds: float = 5.0) -> None:
        self.label, self.total, self.every, self.done = label, total, every_seconds, 0
        self._started = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def update(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        last = self.done - amount < self.total <= self.done
        if not last and now - self._shown < (0.1 if self._terminal else self.every):
            return
        self._shown = now
        elapsed = now - self._started
        left = elapsed / self.done * max(self.total - self.done, 0) if self.done else 0.0
        text = f"{self.label} {self.done}/{self.total} | {elapsed:.0f} s, {left:.0f} s left" + (note and f" | {note}")
        if self._terminal:
            filled = 30 * self.done // max(self.total, 1)
            text = f"\r[{'#' * filled}{'.' * (30 - filled)}] {text}\x1b[K"
        print(text, file=sys.stderr, end="" if self._terminal and not last else "\n", flush=True)


def default_processes() -> int:
    return len(os.sched_getaffinity(0))


def parallel_map(function: Callable, items: Iterable, processes: int) -> Iterator[tuple[object, object]]:
    """(item, function(item)) as they finish, in spawned processes; in this one where one is enough.

    Few items are in flight at a time, so a million of them cost no memory. Raises what `function` raises, and
    `RuntimeError` naming the items in flight where a process died (a decoder crashed, or memory ran out). Where this
    process is interrupted the others end at once: what they were at work on is undone, what was finished stays.
    """
    items = list(items)
    if min(processes, len(items)) <= 1:
        for item in items:
            yield item, function(item)
        return
    waiting = iter(items)
    context = get_context("spawn")
    others = set(active_children())
    with ProcessPoolExecutor(min(processes, len(items)), context, initializer=_begin_worker) as pool:
        running = {}
        try:
            while True:
                while len(running) < 2 * processes and (item := next(waiting, None)) is not None:
                    with _interruption_held():  # of a process that starts, too: it inherits this
                        running[pool.submit(function, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool as error:
            names = ", ".join(str(item) for item in running.values())
            raise RuntimeError(f"a worker process died (crash or out of memory) while at work on: {names}") from error
        except BaseException as error:
            if isinstance(error, Exception):
                for future in running:
                    future.cancel()
            else:  # interrupted, or nobody asks for the rest
                for process in set(active_children()) - others:
                    process.terminate()
            raise


@contextmanager
def _interruption_held() -> Iterator[None]:
    """Inside, Ctrl-C waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """Ctrl-C goes to all processes of a terminal; the one that started the others ends them, and speaks."""
    console.take()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_worker)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end_worker(number: int, _frame: object) -> None:
    remove_asides()
    os._exit(128 + number)
