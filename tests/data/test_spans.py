"""Spans of all threads, and their trace."""

import json
import threading

import torch

from megamug.data.spans import listen, span, write_trace


def test_spans_of_all_threads_and_of_nobody_else(tmp_path):
    with span("before"):
        pass
    with listen() as found:
        with span("here"):
            pass
        thread = threading.Thread(target=_in_span, args=("there",))
        thread.start()
        thread.join()
    with span("after"):
        pass
    assert [s.name for s in found] == ["here", "there"]
    assert found[0].thread != found[1].thread and found[0].start <= found[0].end <= found[1].start
    write_trace(found, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(e["name"], e["dur"]) for e in events] == [(s.name, (s.end - s.start) / 1e3) for s in found]


def _in_span(name: str) -> None:
    with span(name):
        pass


def test_the_profiler_sees_those_of_its_thread():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _in_span("in a profile")
    assert "in a profile" in {event.name for event in profiler.events()}
