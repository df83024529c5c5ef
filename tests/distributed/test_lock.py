"""One run at a time in a folder; a lock of the dead is nobody's."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from megamug.distributed import lock
from megamug.errors import UserError
from tests.distributed.launch import environment

HOLD = """
import sys, time
from megamug.distributed.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=environment(), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_has_it(tmp_path, other):
    with pytest.raises(UserError, match=f"in use by another run .process {other.pid} on "):
        lock.RunLock(tmp_path).__enter__()
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == other.pid  # and keeps it
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]


def test_a_lock_of_a_killed_process_is_taken_at_once(tmp_path, other):
    other.kill()
    other.wait()
    began = time.monotonic()
    with lock.RunLock(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 5 and list(tmp_path.iterdir()) == []


def elsewhere(tmp_path, **more) -> None:
    held = {"host": "other", "pid": 7, "started": "1", "boot": "b", "token": "t", "heartbeat": 3, **more}
    (tmp_path / lock.FILE).write_text(json.dumps(held))


def test_a_lock_of_another_host_is_taken_when_its_heartbeat_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    elsewhere(tmp_path)
    with lock.RunLock(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_that_beats_is_respected(tmp_path, monkeypatch):
    elsewhere(tmp_path)
    monkeypatch.setattr(lock.time, "sleep", lambda _: elsewhere(tmp_path, heartbeat=4))
    with pytest.raises(UserError, match="process 7 on other"):
        lock.RunLock(tmp_path).__enter__()


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"host": "other", "pid": None})])
def test_a_damaged_lock_is_taken_after_a_while(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    (tmp_path / lock.FILE).write_text(text)
    with lock.RunLock(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()


def test_the_heartbeat_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with lock.RunLock(tmp_path):
        deadline = time.monotonic() + 20
        while json.loads((tmp_path / lock.FILE).read_text())["heartbeat"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_without_hard_links_it_holds_as_well(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", no_links)
    with lock.RunLock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} on "):
            lock.RunLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


TAKEN = """
import json, sys, time
from megamug.distributed import lock
lock.BEAT = 0.1
with lock.RunLock(sys.argv[1]) as held:
    other = json.loads(held.path.read_text()) | {"host": "other", "pid": 7, "token": "t"}
    held.path.write_text(json.dumps(other))
    time.sleep(20)
print("went on")
"""


def test_who_stood_still_and_lost_its_folder_ends_without_writing(tmp_path):
    """Its heartbeat would else go into the lock of the other, and its checkpoint among the other's."""
    result = subprocess.run([sys.executable, "-c", TAKEN, str(tmp_path)], env=environment(), capture_output=True,
                            text=True, timeout=60)  # fmt: skip
    assert (result.returncode, result.stdout) == (1, ""), result
    assert "was taken over by process 7 on other" in result.stderr
    assert json.loads((tmp_path / lock.FILE).read_text())["token"] == "t"
