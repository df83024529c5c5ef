"""`tools/chaos.py` with ranks forked from a process that has imported torch and Megatron: a start takes half a second.

    python -m tests.reliability.storm FOLDER --kills 50 --minutes 20 [--processes 2] [section.key=value ...]

Writes the tests' recipe (tests/reliability/conftest.py) and its data into FOLDER, and storms there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from tests.distributed import launch
from tests.reliability.recipe import make_recipe
from tools import chaos

TRAIN = str(launch.ROOT / "megamug" / "__main__.py")


class ForkedLife:
    """As `chaos.Life`. Where a rank ends badly, the others get SIGTERM and then SIGKILL, as torchrun does it."""

    def __init__(self, words: list[str], processes: int, console: Path):
        server = launch._server()
        shared = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(launch.free_port()))
        self.processes = []
        for rank in range(processes):
            env = launch.environment(**shared if processes > 1 else {})
            env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else env
            arguments = ([TRAIN, "train", *words], env, f"{console}.{rank}")
            self.processes.append(server.Process(target=launch._rank, args=arguments))
        for process in self.processes:
            process.start()
        self.ended: float | None = None

    def code(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        if any(code not in (None, 0) for code in codes):
            first, self.ended = self.ended is None, self.ended or time.monotonic()
            if first or time.monotonic() - self.ended > 30:
                for process in self.processes:
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGTERM if first else signal.SIGKILL)
        if None in codes:
            return None
        return next((code for code in codes if code != 0), 0)

    def wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while self.code() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.code()

    def ranks(self) -> list[int]:
        return [process.pid for process in self.processes if process.is_alive()]

    left = ranks


def main(argv: list[str]) -> int:
    folder, *rest = argv
    recipe = make_recipe(Path(folder))
    processes = int(rest[rest.index("--processes") + 1]) if "--processes" in rest else 1
    output = Path(folder) / f"storm-{processes}-{os.getpid()}"
    words = [str(recipe), "--output", str(output), *rest]
    return chaos.main(words, lambda words, console: ForkedLife(words, processes, console))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
