"""megamug benchmark checkpoint [section.key=value ...] [--preset vit_b16] [--dtype bf16] [--folder DIR] ...

GB/s of saving and resuming parameters and optimizer state of MUG, in turns with the disk itself and with torch.save:

  disk         one file of as many bytes written and fsynced, and read again
  save         the synchronous checkpoint: training stands still until it is written, hashed, fsynced and pointed to
  stall        what an asynchronous one keeps training waiting: a copy of the tensors on the host
  save behind  the asynchronous one until it is complete, with nothing else to do
  verify       hashing every byte, as before a run resumes; then `load`: tensors into model and optimizer
  torch.save   the same tensors in one file, fsynced; and torch.load of it (one process only)

Before something is read its files are dropped from the page cache (the system may keep them: then memory is measured).
Under torchrun all processes save and load together, in the layout that is asked for, and rank 0 reports.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from megamug.benchmarks import _contest, _profile, _report, _steps, mug
from megamug.checkpoint.store import CheckpointStore
from megamug.command_line.arguments import COUNT
from megamug.command_line.launcher import world_size
from megamug.distributed import cpu_backend, setup
from megamug.durable import fsync_folder
from megamug.errors import UserError

BLOCK = 1 << 24


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _report.parser("checkpoint", __doc__)
    parser.add_argument("--preset", default="vit_b16")
    mug.add_vocabulary(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--folder", type=Path, default=".", metavar="DIR",
                        help="on the disk to measure (default: this folder)")  # fmt: skip
    parser.add_argument("--repeats", type=COUNT, default=3)
    return _steps.parse(parser, argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    own = [f"model.preset={options.preset}", "model.caption_loss_weight=0"]
    config = _steps.settings(own, world_size(), options.dtype, options.overrides)
    parent = options.folder
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--folder {parent}: not a folder that this user can write to; name another one")
    speaks = os.environ.get("RANK", "0") == "0"
    report = _report.Report("checkpoint", options, _steps.layout(config), speaks)
    cpu_backend.apply()
    from megamug.checkpoint.saver import on_first

    world, chunks, _, optimizer = _steps.built(mug.task_of(config, options.vocabulary), config)
    held = tempfile.TemporaryDirectory(prefix="megamug-checkpoint-", dir=parent) if speaks else None
    try:
        folder = Path(on_first(world, lambda: held.name))
        measure(report, world, chunks, optimizer, folder)
        report.finish()
    finally:
        setup.stop()
        if held is not None:
            held.cleanup()


def measure(report: _report.Report, world, chunks: list, optimizer, folder: Path) -> None:
    """Turns of everything; figures go to the report."""
    from megamug.checkpoint import saver, state

    store = CheckpointStore(folder, keep=1)
    together, behind = saver.Saver(store, world, False), saver.Saver(store, world, True)
    contents, step = {"step": 0, "updates": 0}, 0

    def save(by: saver.Saver) -> None:
        nonlocal step
        step += 1
        by.save(step, chunks, optimizer, contents)

    save(together)  # the optimizer makes its state, Megatron its plan
    size = sum(path.stat().st_size for path in store.path(step).rglob("*") if path.is_file())
    report.say(f"# a checkpoint of {size / 1e9:.3f} GB")
    seconds: dict[str, list[float]] = defaultdict(list)
    processor: dict[str, list[float]] = defaultdict(list)  # seconds of this process and those it started, all cores

    def timed(name: str, action: Callable[[], object]) -> None:
        torch.distributed.barrier()
        start, used = time.perf_counter(), sum(os.times()[:4])
        action()
        torch.distributed.barrier()
        seconds[name].append(time.perf_counter() - start)
        processor[name].append(sum(os.times()[:4]) - used)

    for _ in range(report.options.repeats):
        if world.is_first:
            write_seconds, read_seconds = disk(folder / "disk", size)
            seconds["disk, write"].append(write_seconds)
            seconds["disk, read"].append(read_seconds)
        timed("save", lambda: save(together))
        timed("stall", lambda: save(behind))
        stalled = seconds["stall"][-1]
        timed("save behind", behind.wait)
        seconds["save behind"][-1] += stalled
        processor["save behind"][-1] += processor["stall"][-1]
        path = store.path(step)
        evict(path)
        timed("verify", store.newest_complete)
        evict(path)
        timed("load", lambda: state.load_tensors(chunks, optimizer, world, path / "model", 0))  # noqa: B023
        if world.size == 1:
            peer(optimizer, chunks, folder / "torch.pt", seconds)
    found = None
    if report.options.profile:
        action = (lambda: save(together), report.options.profile, "checkpoint save", _contest.synchronize)
        found = _profile.together(*action, ranges="checkpoint: ")
    rates = {name: size / statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        floor = rates.get("disk, read" if name in ("verify", "load", "torch.load") else "disk, write")
        share = rates[name] / floor if floor and not name.startswith("disk") else None
        median, spread = statistics.median(taken), _contest.spread(taken)
        report.add(
            name, gb_per_second=rates[name] / 1e9, seconds=median, spread=spread, share_of_disk=share,
            cpu_seconds=statistics.median(processor[name]) if name in processor else None,
            gigabytes=size / 1e9, peak_gib=_contest.peak_gib(), profile=found if name == "save" else None,
        )  # fmt: skip
        told = f"  {share:.2f} of the disk's rate" if share else ""
        report.say(f"  {name:<12}{median:8.2f} s (spread {spread:.0%}) {rates[name] / 1e9:7.2f} GB/s{told}")
    if found:
        report.say(_profile.table(found))


def peer(optimizer, chunks: list, path: Path, seconds: dict[str, list[float]]) -> None:
    """torch.save of what the checkpoint holds, and torch.load of it into the same tensors."""
    tensors = {f"model.{name}": p.detach() for name, p in torch.nn.ModuleList(chunks).named_parameters()}
    for one in optimizer.main_states():
        if one.main is not one.parameter:
            tensors[f"main.{one.name}"] = one.main.detach()
        tensors |= {f"{kind}.{one.name}": one.moment(kind) for kind in ("exp_avg", "exp_avg_sq")}
    start = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(path.parent)
    seconds["torch.save"].append(time.perf_counter() - start)
    evict(path)
    start = time.perf_counter()
    with torch.no_grad():
        for name, tensor in torch.load(path, weights_only=True).items():
            tensors[name].copy_(tensor)
    seconds["torch.load"].append(time.perf_counter() - start)
    path.unlink()


def disk(path: Path, size: int) -> tuple[float, float]:
    """Seconds to write a file of `size` bytes and fsync it, and to read it again."""
    block = os.urandom(BLOCK)
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for first in range(0, size, BLOCK):
            file.write(block[: size - first])
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    evict(path)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        target = bytearray(BLOCK)
        while file.readinto(target):
            pass
    read = time.perf_counter() - start
    path.unlink()
    return written, read


def evict(path: Path) -> None:
    """Asks the system to forget the cached bytes of the files."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
