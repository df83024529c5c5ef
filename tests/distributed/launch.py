"""Starts real gloo processes for a test: torchrun without torchrun's second of start-up."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port below the range that the system hands out by itself: gloo's connections of a neighbouring test take those,
    even in the second before rank 0 listens."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port between 20000 and 32000")


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def launch(arguments: list[str], processes: int, timeout: float = 240.0, **more: str) -> list[tuple[int, str]]:
    """Runs `python ARGUMENTS` as `processes` ranks; (exit code, output) of each. A rank still alive at the end of
    `timeout` seconds is killed and fails the test."""
    shared = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    running = []
    for rank in range(processes):
        env = environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank), **more)
        running.append(
            subprocess.Popen(
                [sys.executable, *arguments], env=env, cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )
    results = []
    try:
        for process in running:
            output, _ = process.communicate(timeout=timeout)
            results.append((process.returncode, output))
    finally:
        for process in running:
            process.kill()
    return results
