"""One run at a time in a run folder: a lock that survives crashes and works on shared file systems.

    with RunLock("runs/mug"):
        train()

`RUN/run.lock` names host, process and its start, and its holder counts up a heartbeat in it. A lock whose process is
gone from this host is taken over at once. One of another host is watched: if its heartbeat does not move for `PATIENCE`
seconds (no two clocks are compared), its holder is gone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

from megamug.durable import replace_text
from megamug.errors import UserError

logger = logging.getLogger(__name__)

FILE = "run.lock"
BEAT = 5.0  # seconds between heartbeats
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
PATIENCE = 20.0  # a lock of another host whose heartbeat stands still for so long is nobody's


class RunLock:
    """Held inside the `with` block. Raises UserError on entering where another run holds it, and says who."""

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / FILE
        self._stopped = threading.Event()
        self._beats = 0

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._take_from_the_dead()
        self._stopped.clear()
        self._thread = threading.Thread(target=self._keep_beating, name="megamug-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self._thread.join()
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether the lock is ours now: the one who links its file under the name first has it, on NFS as well."""
        pid = os.getpid()
        self._token = f"{socket.gethostname()}-{pid}-{time.time_ns()}"
        own = self.path.with_name(f".{FILE}.{self._token}")
        own.write_text(self._text())
        try:
            os.link(own, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_without_links()
        finally:
            own.unlink()
        return True

    def _create_without_links(self) -> bool:
        """On a file system that has no hard links (many that show an object store): what it has for the purpose."""
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _text(self) -> str:
        return json.dumps({
            "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "boot": _boot(),
            "token": self._token, "heartbeat": self._beats,
        }) + "\n"  # fmt: skip

    def _take_from_the_dead(self) -> None:
        """Removes a lock whose holder is gone. Raises UserError where it lives."""
        held = _read(self.path)
        if not held:
            time.sleep(0.1)  # it went just now, or is damaged: seen again below
            held = _read(self.path)
        if held.get("host") == socket.gethostname() and held.get("boot") == _boot():
            gone = _started(held["pid"]) != held["started"]
        else:
            gone = self._stands_still(held)
        if not gone:
            held = _read(self.path) or held  # it may have been damaged, and taken by somebody while it was watched
            raise UserError(
                f"run_dir: {self.path.parent} is in use by another run (process {held.get('pid')} on"
                f" {held.get('host')}); wait for its end, stop it, or set run_dir to another folder"
            )
        aside = self.path.with_name(f".{FILE}.{os.getpid()}.gone")
        with contextlib.suppress(FileNotFoundError):  # another start was faster
            os.rename(self.path, aside)
            if held.get("token") not in (None, _read(aside).get("token")):  # and holds it already
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()
        if held:
            logger.warning("%s: took over from process %s on %s, which is gone", self.path, held["pid"], held["host"])

    def _stands_still(self, held: dict) -> bool:
        """Whether nobody counts up the heartbeat."""
        if held:
            logger.warning("%s is held by process %s on %s; seeing for %.0f s whether that lives",
                           self.path, held.get("pid"), held.get("host"), PATIENCE)  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(min(0.5, PATIENCE / 4))
            found = _read(self.path)
            if found != held:
                return not found
        return True

    def _end(self) -> None:
        """Another run has the folder: this process stood still for so long that it was taken for gone. Whatever it
        would write now, a checkpoint too, would lie among the other's."""
        held = _read(self.path)
        line = (
            f"run_dir: {self.path.parent} was taken over by process {held.get('pid')} on {held.get('host')} while this"
            " one stood still; this one ends, with nothing more written\n"
        )
        os.write(sys.__stderr__.fileno(), line.encode())
        os._exit(1)

    def _keep_beating(self) -> None:
        while not self._stopped.wait(BEAT):
            self._beats += 1
            if _read(self.path).get("token") not in (None, self._token):
                self._end()
            try:
                replace_text(self.path, self._text())
            except OSError as error:  # a full disk takes the heartbeat, not the run
                logger.warning("%s: no heartbeat (%s)", self.path, error.strerror)


def _read(path: Path) -> dict:
    """What a lock says; empty where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    wanted = {"host": str, "pid": int, "started": str, "boot": str, "token": str, "heartbeat": int}
    sound = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in wanted.items())
    return found if sound else {}


def _started(pid: int) -> str:
    """When process `pid` of this host began (in the kernel's ticks), so that a number used again is another's; empty
    where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]  # field 22 of proc(5); a zombie does nothing any more


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
