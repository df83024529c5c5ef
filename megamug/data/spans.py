"""Named stretches of time, on whatever thread they pass: what the loader and a save are made of.

torch's profiler shows those of the thread that it profiles. Of all threads it cannot be asked: it ends the process by a
segmentation fault where a thread is in a range while profiling stops (torch 2.13, one of about 250 profiles).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch.profiler import record_function


class Span(NamedTuple):
    """One stretch; `start` and `end` in nanoseconds of `time.perf_counter_ns`."""

    name: str
    thread: int
    start: int
    end: int


_listeners: list[list[Span]] = []


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A range of torch's profiler, told to all who `listen` too."""
    start = time.perf_counter_ns()
    with record_function(name):
        yield
    if _listeners:
        found = Span(name, threading.get_native_id(), start, time.perf_counter_ns())
        for spans in [*_listeners]:
            spans.append(found)


@contextlib.contextmanager
def listen() -> Iterator[list[Span]]:
    """The spans of all threads of this process that end inside the block."""
    spans: list[Span] = []
    _listeners.append(spans)
    try:
        yield spans
    finally:
        _listeners[:] = [other for other in _listeners if other is not spans]


def write_trace(spans: list[Span], path: Path) -> None:
    """In the Chrome trace event format (complete events, microseconds), for chrome://tracing or Perfetto."""
    events = [
        {"ph": "X", "name": name, "pid": os.getpid(), "tid": thread, "ts": start / 1e3, "dur": (end - start) / 1e3}
        for name, thread, start, end in spans
    ]
    path.write_text(json.dumps({"traceEvents": events}))
