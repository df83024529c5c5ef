"""Contestants in processes of their own that take turns, so that a busy machine slows all of them alike.

A contestant's module has `build_NAME(options, dtype) -> (step, FLOPs of a step)`; `step()` may return the seconds that
it waited for data. The process answers each line that it reads; what else is going on in it (workers that read ahead)
is halted between its turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megamug.benchmarks import _profile, _steps
from megamug.benchmarks._report import Report
from megamug.command_line import console
from megamug.command_line.arguments import COUNT
from megamug.distributed import setup
from megamug.errors import UserError
from megamug.telemetry.peaks import peak_flops

DTYPES = ("fp32", "bf16", "fp8")
WARM_UP = 2  # steps
PEERS = {"eager": "transformers", "compiled": "transformers_compiled"}  # of a training step, as --peers names them
PACKAGES = dict.fromkeys((*PEERS.values(), "transformers_writer"), "transformers") | {"webdataset": "webdataset"}


def add_options(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    parser.add_argument("--dtypes", nargs=nargs, choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--steps", type=COUNT, default=5, help="that are measured, after two of warm-up (default 5)")


def add_peers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="*", choices=[*PEERS], metavar="eager|compiled", help="how transformers' model"
                        " runs: as it is, under torch.compile (default: eager; on a GPU both)")  # fmt: skip


def peers(options: argparse.Namespace) -> list[str]:
    """Names of the contestants that `--peers` asks for."""
    asked = options.peers
    if asked is None:
        asked = [*PEERS] if torch.cuda.is_available() else ["eager"]
    return [PEERS[how] for how in dict.fromkeys(asked)]


@dataclass
class Turn:
    """One step: how long it took, and how long of that it waited for data (None: there is nothing to wait for)."""

    seconds: float
    wait: float | None = None


def race(report: Report, module: str, names: tuple[str, ...], dtype: str, unit: str, units: int) -> dict[str, dict]:
    """One arithmetic: alternating steps of all contestants, and the product rate between them.

    A step has `units` of `unit` (images, tokens). The first contestant is megamug's, the others are compared with it.
    Prints a table, adds the figures to `report` and returns them by contestant.
    """
    options, names = report.options, that_can_run(report, names)
    rates: list[float] = []
    with contestants(module, names, dtype, options) as workers:
        turns = take_turns(workers, options.steps, between=lambda: rates.append(product_rate(dtype)))
        found = None
        if options.profile:
            of = "" if names[0] == "megamug" else f" {names[0]}"
            found = workers[names[0]].profile(options.profile, f"{report.content['benchmark']} {dtype}{of}")
        memory = {name: worker.close() for name, worker in workers.items()}
    rate = statistics.median(rates)
    report.say(f"\n{dtype}; 2048^3 product: {rate / 1e9:.0f} GFLOP/s")
    results = {}
    for name in names:
        results[name] = figures(turns[name], unit, units, workers[name].flops, rate, dtype)
        results[name] |= {"peak_gib": memory[name], **versus(turns[names[0]], turns[name], name != names[0])}
        if name == names[0]:
            report.say(f"  MFU: of {results[name]['mfu_denominator']}")
        report.say("  " + line(name, results[name], unit))
        report.add(f"{dtype} {name}", **results[name], profile=found if name == names[0] else None)
    if found:
        report.say(_profile.table(found))
    return results


def that_can_run(report: Report, names: Sequence[str]) -> list[str]:
    """The contestants without those whose package (see `PACKAGES`) is not installed, which is said."""
    missing = {package for package in map(PACKAGES.get, names) if package and importlib.util.find_spec(package) is None}
    for package in sorted(missing):
        report.say(f"# {package} is not installed here (pip install {package}): it is left out")
    return [name for name in names if PACKAGES.get(name) not in missing]


def take_turns(
    workers: dict[str, Worker], steps: int, between: Callable[[], object] = lambda: None
) -> dict[str, list[Turn]]:
    """`steps` rounds, in each of which every contestant takes a step, alone on the machine."""
    turns: dict[str, list[Turn]] = {name: [] for name in workers}
    for _ in range(steps):
        for name, worker in workers.items():
            turns[name].append(worker.step())
        between()
    return turns


def spread(values: list[float]) -> float:
    """(largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def figures(
    turns: list[Turn], unit: str, units: int, flops: float, rate: float, dtype: str, processes: int = 1
) -> dict[str, object]:
    """Of one contestant's turns. `rate`: FLOP/s of a large product, per process, measured in the same run."""
    seconds = [turn.seconds for turn in turns]
    median = statistics.median(seconds)
    achieved = flops / median / processes
    denominator, name = rate, "2048^3 product measured in this run"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        peak = peak_flops(device, dtype)
        if peak is not None:
            denominator, name = peak, f"dense {dtype} peak of {device}"
    waits = [turn.wait for turn in turns if turn.wait is not None]
    return {
        f"{unit}_per_second": units / median, "step_seconds": median, "spread": spread(seconds),
        "tflops_per_device": achieved / 1e12, "share_of_product_rate": achieved / rate,
        "product_tflops": rate / 1e12, "mfu": achieved / denominator,
        "mfu_denominator": f"{name}: {denominator / 1e12:.4g} TFLOP/s",
        "data_wait": statistics.median(waits) / median if waits else None,
    }  # fmt: skip


def versus(ours: list[Turn], theirs: list[Turn], another: bool = True) -> dict[str, float]:
    """How many times as long as ours their turns took: the median over the rounds, as both shared what the machine
    gave in a round, and the range."""
    if not another:
        return {}
    ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    return {
        "megamug_times": statistics.median(ratios), "megamug_times_low": min(ratios),
        "megamug_times_high": max(ratios),
    }  # fmt: skip


def line(name: str, found: dict, unit: str) -> str:
    """The figures of a training step for people."""
    wait = f"  data wait {found['data_wait']:.1%}" if found.get("data_wait") is not None else ""
    ratio = f"  megamug / it: {found['megamug_times']:.2f}" if "megamug_times" in found else ""
    return (
        f"{name:<22}{found[f'{unit}_per_second']:9.2f} {unit}/s (spread {found['spread']:.0%})"
        f"{found['tflops_per_device'] * 1e3:9.0f} GFLOP/s, MFU {found['mfu']:.0%}  peak {found['peak_gib']:.2f} GiB"
        f"{wait}{ratio}"
    )


class Worker:
    """A contestant's process, the head of a process group."""

    def __init__(self, module: str, name: str, dtype: str, options: argparse.Namespace):
        plain = {key: value for key, value in vars(options).items() if isinstance(value, int | str | list)}
        command = [sys.executable, "-c", "from megamug.benchmarks._contest import serve; serve()"]
        command += [module, name, dtype, json.dumps(plain)]
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self.name = name
        # A group of this session: if this process is killed, the system sends its halted members HUP and CONT.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, process_group=0
        )
        try:
            self.flops = float(self._answer()["flops"])
        except BaseException:
            self.kill()
            raise
        self._halt()

    def _halt(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _answer(self) -> dict:
        for text in self.process.stdout:
            if text.startswith("ANSWER "):
                return json.loads(text[7:])
        code = self.process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}, see above"
        raise RuntimeError(f"the contestant {self.name} of the benchmark {how}")

    def _ask(self, *words: str | None) -> dict:
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self._halt()
        return answer

    def step(self) -> Turn:
        return Turn(**self._ask("step"))

    def profile(self, folder: Path, name: str, ranges: str | None = None) -> dict:
        """See `_profile.profile`."""
        return self._ask("profile", str(folder), name, ranges)

    def close(self) -> float:
        """Peak memory in GiB, of the process and what its own processes hold at the end."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.close()
        memory = self._answer()["peak_gib"]
        self.process.wait()
        return memory

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of the group have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def contestants(
    module: str, names: Sequence[str], dtype: str, options: argparse.Namespace
) -> Iterator[dict[str, Worker]]:
    """Processes that have warmed up; none is left behind, whatever happens."""
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            workers[name] = Worker(module, name, dtype, options)
        yield workers
    finally:
        for worker in workers.values():
            worker.kill()


def serve() -> None:
    """A contestant (arguments: module, name, dtype, options): warms up, then one action for each line read."""
    console.take()
    module, name, dtype, options = sys.argv[1:]
    build = getattr(importlib.import_module(module), f"build_{name}")
    try:
        step, flops = build(argparse.Namespace(**json.loads(options)), dtype)
        for _ in range(WARM_UP):
            step()
        answer({"flops": flops})
        for text in sys.stdin:
            word, *rest = json.loads(text)
            if word == "step":
                answer(vars(timed(step)))
            else:
                answer(_profile.profile(step, Path(rest[0]), rest[1], synchronize, rest[2]))
        answer({"peak_gib": peak_gib()})
    finally:
        setup.stop()
    os._exit(0)  # the parent has all it wants; workers that read ahead need not be asked to end


def answer(content: dict) -> None:
    print(f"ANSWER {json.dumps(content)}", flush=True)


def timed(step: Callable[[], float | None]) -> Turn:
    start = time.perf_counter()
    wait = step()
    synchronize()
    return Turn(time.perf_counter() - start, wait)


def peak_gib() -> float:
    """Of a GPU what torch held at most; else of this process at most, and of its own processes now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory += sum(child.memory_full_info().pss for child in psutil.Process().children(recursive=True))
    return memory / 2**30


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(dtype: str, size: int = 2048) -> float:
    """FLOP/s of one size^3 product, the faster of torch.mm and, on a CPU, oneDNN as megamug's linears use it; each the
    median of three. FP8 is set against bf16."""
    from megamug.models.blocks import cpu_linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    a, b = torch.randn(size, size, dtype=kind, device=device), torch.randn(size, size, dtype=kind, device=device)
    products = [lambda: a @ b]
    if cpu_linear.AVAILABLE and device == "cpu":
        products.append(lambda: cpu_linear.linear(a, b, None))
    medians = []
    for product in products:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            product()
            synchronize()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times[1:]))
    return 2 * size**3 / min(medians)


def in_layout(benchmark: str, options: argparse.Namespace, config, build: Callable, unit: str, units: int) -> None:
    """Under torchrun: all processes take the steps of megamug's own training together; rank 0 reports.

    `build(options, dtype)` has joined the process group when it returns. A step's time is that of rank 0 between two
    barriers, the product rate that of all processes computing at once (mean), the memory that of the fullest process.
    """
    if len(options.dtypes) != 1:
        raise UserError("under torchrun one type a run, such as --dtypes bf16")
    (dtype,) = options.dtypes
    report = Report(benchmark, options, _steps.layout(config), speaks=os.environ.get("RANK", "0") == "0")
    try:
        step, flops = build(options, dtype)
        for _ in range(WARM_UP):
            step()
        turns, rates = [], []
        for _ in range(options.steps):
            dist.barrier()
            turn = timed(step)
            start = time.perf_counter()
            dist.barrier()
            turns.append(Turn(turn.seconds + time.perf_counter() - start, turn.wait))
            rates.append(product_rate(dtype))
        found, name = None, f"{benchmark} {dtype}"
        if options.profile:
            found = _profile.together(step, options.profile, name, synchronize)
        size = dist.get_world_size()
        everyone: list = [None] * size
        dist.all_gather_object(everyone, (statistics.median(rates), peak_gib()))
        rate = statistics.mean(rate for rate, _ in everyone)
        results = figures(turns, unit, units, flops, rate, dtype, size) | {"peak_gib": max(m for _, m in everyone)}
        report.say(f"\n{dtype}; 2048^3 product on all processes at once: {rate / 1e9:.0f} GFLOP/s each")
        report.say(f"  MFU: of {results['mfu_denominator']}\n  " + line("megamug", results, unit))
        report.add(f"{dtype} megamug", **results, profile=found)
        if found:
            report.say(_profile.table(found))
        report.finish()
    finally:
        setup.stop()
