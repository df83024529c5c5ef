"""Starts real gloo processes for a test: torchrun without torchrun's second of start-up."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
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


def python_path() -> str:
    """The project's folder before what this process was given, where its packages may lie."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


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


def launch_forked(arguments: list[str], processes: int, timeout: float = 240.0, **more: str) -> list[tuple[int, str]]:
    """As `launch`, for a SCRIPT that needs no interpreter of its own: its ranks are forked from a server that has
    imported torch and Megatron, which takes an interpreter five seconds."""
    shared = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(processes)]
        running = []
        for rank, output in enumerate(outputs):
            env = environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank), **more)
            running.append(server.Process(target=_rank, args=([str(a) for a in arguments], env, str(output))))
        try:
            deadline = time.monotonic() + timeout
            for process in running:
                process.start()
            for process in running:
                process.join(max(0.0, deadline - time.monotonic()))
            late = [rank for rank, process in enumerate(running) if process.exitcode is None]
            told = [output.read_text() for output in outputs]
            assert not late, f"ranks {late} still run after {timeout} s:\n{told[late[0]][-4000:]}"
            return [(process.exitcode, text) for process, text in zip(running, told, strict=True)]
        finally:
            for process in running:
                if process.is_alive():
                    process.kill()


def _server():
    """The server of this test process; it starts with the first rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    if not getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None):
        os.environ.update(environment())  # what an interpreter reads as it starts
    return context


def _rank(arguments: list[str], env: dict[str, str], output: str) -> None:
    """One process of `launch_forked`: runs SCRIPT with its arguments."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code, sys.argv = 0, arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
