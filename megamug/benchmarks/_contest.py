"""What the benchmarks of training steps share: contestants in processes of their own, a step each in turns.

A contestant's module has `build_NAME(options, dtype) -> (step, FLOPs of a step)`. The process answers each line that
it reads with the seconds of one step, so that a busy machine slows all contestants alike.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from megamug.command_line import COUNT, new_file

DTYPES = ("fp32", "bf16")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=COUNT, default=5)
    parser.add_argument("--output", type=new_file, metavar="FILE.json")


def hardware() -> dict:
    """What figures have to be read with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads()}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(options: argparse.Namespace, results: list[dict]) -> None:
    if options.output:
        options.output.write_text(json.dumps({**hardware(), "results": results}, indent=1) + "\n")


def compare(
    module: str, names: tuple[str, ...], options: argparse.Namespace, dtype: str, unit: str, units: int
) -> dict:
    """One dtype: alternating steps of all contestants, and the product rate between them.

    A step has `units` of `unit` (images, tokens). Prints a table; returns the figures by contestant, and under `ratio`
    the throughput of the first over that of each other.
    """
    workers = {name: Worker(module, name, dtype, options) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for _ in range(options.steps):
        for name, worker in workers.items():
            seconds[name].append(worker.step())
        rates.append(product_rate(dtype))
    rate = statistics.median(rates)
    result: dict = {"dtype": dtype, "product_rate": rate}
    print(f"\n{dtype}; 2048^3 product: {rate / 1e9:.0f} GFLOP/s")
    for name, worker in workers.items():
        memory = worker.close()
        median = statistics.median(seconds[name])
        spread = (max(seconds[name]) - min(seconds[name])) / median
        speed, achieved = units / median, worker.flops / median
        result[name] = {
            f"{unit}_per_second": speed, "spread": spread, "flops_per_second": achieved,
            "share_of_product_rate": achieved / rate, "peak_gib": memory,
        }  # fmt: skip
        print(f"  {name:<13} {speed:8.2f} {unit}/s (spread {spread:.0%})  {achieved / 1e9:6.0f} GFLOP/s, "
              f"{achieved / rate:.0%} of the product rate  peak {memory:.2f} GiB")  # fmt: skip
    first, *others = names
    result["ratio"] = {name: statistics.median(seconds[name]) / statistics.median(seconds[first]) for name in others}
    for name, ratio in result["ratio"].items():
        print(f"  {first} / {name}: {ratio:.2f}")
    return result


class Worker:
    """A contestant's process."""

    def __init__(self, module: str, name: str, dtype: str, options: argparse.Namespace):
        plain = {key: value for key, value in vars(options).items() if isinstance(value, int | str)}
        command = [sys.executable, "-c", "from megamug.benchmarks._contest import serve; serve()"]
        command += [module, name, dtype, json.dumps(plain)]
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.flops = float(self._answer())

    def _answer(self) -> str:
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return line[7:]
        raise RuntimeError("a contestant of the benchmark ended with an error, see above")

    def step(self) -> float:
        """Seconds of one training step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> float:
        """Peak memory in GiB."""
        self.process.stdin.close()
        memory = float(self._answer())
        self.process.wait()
        return memory


def serve() -> None:
    """A contestant (arguments: module, name, dtype, options): warms up, then one step for each line read."""
    module, name, dtype, options = sys.argv[1:]
    build = getattr(importlib.import_module(module), f"build_{name}")
    step, flops = build(argparse.Namespace(**json.loads(options)), dtype)
    for _ in range(2):
        step()
    print(f"ANSWER {flops}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        synchronize()
        print(f"ANSWER {time.perf_counter() - start}", flush=True)
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"ANSWER {memory / 2**30}", flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(dtype: str, size: int = 2048) -> float:
    """FLOP/s of one size^3 product, median of three."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    a, b = torch.randn(size, size, dtype=kind, device=device), torch.randn(size, size, dtype=kind, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])
