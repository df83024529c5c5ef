"""megamug benchmark losses [--device cpu|cuda] [--only cross-entropy|masked-patch|linear] [--json PATH] ...

Forward and gradient of each loss, against eager torch, torch.compile and (on CUDA, where importable) the kernels of
others. The contestants take turns in every repetition, so that a busy machine slows all of them; medians are printed.
Floors in bytes, e = bytes of an element:
  cross-entropy  rows x columns x 3 e: read for the statistics; read and overwritten with the gradient
  masked-patch   masked patches x D x (image + prediction) + all predictions x e for the gradient
Each line gives GB/s of its floor and the share of the copy rate (bytes read + written) measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from megamug.benchmarks import _profile, _report
from megamug.benchmarks._report import Report
from megamug.command_line.arguments import COUNT, device
from megamug.errors import UserError
from megamug.losses import linear_cross_entropy, masked_patch_loss, vocab_parallel_cross_entropy
from megamug.losses.ops import libraries

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Contestant:
    """One way to compute a loss. `step(input)` runs forward and backward; `input` is restored before each call."""

    name: str
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Machine:
    """Time and memory on the device of the run."""

    def __init__(self, device: str, repeats: int, log: Report):
        self.device, self.repeats, self.log = torch.device(device), repeats, log

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, step: Callable[[], None]) -> float:
        self.synchronize()
        start = time.perf_counter()
        step()
        self.synchronize()
        return time.perf_counter() - start

    def extra_bytes(self, step: Callable[[], None]) -> int:
        """Highest memory during the step above what was in use before it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        return peak_tensor_bytes(step)

    def copy_rate(self) -> float:
        """Bytes read and written per second by a copy of 512 MiB."""
        source = torch.zeros(2**27, device=self.device)
        target = torch.empty_like(source)
        return max(2 * source.nbytes / self.time(lambda: target.copy_(source)) for _ in range(self.repeats + 2))

    def race(self, contestants: list[Contestant], restore: Callable[[], None]) -> None:
        for contestant in contestants:  # warm-up, compilation and memory
            restore()
            contestant.step()
            restore()
            contestant.extra_bytes = self.extra_bytes(contestant.step)
        for _ in range(self.repeats):
            for contestant in contestants:
                restore()
                contestant.seconds.append(self.time(contestant.step))


def peak_tensor_bytes(step: Callable[[], None]) -> int:
    """Highest sum of CPU tensor memory that the step allocated and had not yet freed, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peak_resident_bytes(step: Callable[[], None]) -> int:
    """How far resident memory rose above its level before the step (Linux: the high-water mark is reset first)."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class _Produced(torch.autograd.Function):
    """Stands for the layer before the loss: a tensor inside the graph, whose memory the loss may overwrite."""

    @staticmethod
    def forward(ctx, handle, tensor):
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, None


def cross_entropy_race(machine: Machine, arguments) -> None:
    rows, columns = arguments.rows, arguments.columns
    for dtype in (DTYPES[name] for name in arguments.dtypes):
        generator = torch.Generator(machine.device).manual_seed(0)
        master = torch.randn(rows, columns, generator=generator, device=machine.device).mul_(3).to(dtype)
        logits, handle = master.clone(), torch.zeros((), device=machine.device, requires_grad=True)
        targets = torch.randint(columns, (rows,), generator=generator, device=machine.device)

        def run(loss, logits=logits, handle=handle, targets=targets):
            def step():
                loss(_Produced.apply(handle, logits), targets).backward()

            return step

        def eager(x, t):
            return F.cross_entropy(x, t, reduction="sum")

        def ours(x, t):
            return vocab_parallel_cross_entropy(x, t, impl="compiled")[0]

        contestants = [Contestant("megamug", run(ours)), Contestant("eager", run(eager))]
        if arguments.compile:
            contestants.append(Contestant("torch.compile", run(torch.compile(eager, dynamic=False))))
        contestants += [Contestant(name, run(loss)) for name, loss in _other_kernels(machine)]

        def restore(logits=logits, master=master):
            logits.copy_(master)

        machine.race(contestants, restore)
        floor = rows * columns * 3 * logits.element_size()
        report(f"cross-entropy {rows} x {columns} {_short(dtype)}", contestants, floor, machine, restore)


def _other_kernels(machine: Machine) -> list[tuple[str, Callable]]:
    """Kernels of others that import here; they need a GPU."""
    if machine.device.type != "cuda":
        return []
    found = []
    for name, module, build in (
        ("Liger", "liger_kernel.transformers.functional",
         lambda m: lambda x, t: m.liger_cross_entropy(x, t, reduction="sum")),
        ("flash-attn", "flash_attn.ops.triton.cross_entropy",
         lambda m: lambda x, t: m.cross_entropy_loss(x, t, inplace_backward=True)[0].sum()),
        ("Transformer Engine", "transformer_engine.pytorch.cross_entropy",
         lambda m: lambda x, t: m.parallel_cross_entropy(x.unsqueeze(0), t.unsqueeze(0)).sum()),
    ):
        try:
            found.append((name, build(importlib.import_module(module))))
        except ImportError:
            print(f"# {name} is not installed here")
    return found


def masked_patch_race(machine: Machine, arguments) -> None:
    batch, size, p = arguments.batch, 224, 16
    patches, masked, values = (size // p) ** 2, int((size // p) ** 2 * 0.75), 3 * p * p
    for dtype in (DTYPES[name] for name in arguments.dtypes):
        generator = torch.Generator(machine.device).manual_seed(0)
        pixels = torch.randint(256, (batch, 3, size, size), generator=generator, device=machine.device)
        normalised = ((pixels / 255 - 0.45) / 0.225).to(dtype)
        predictions = torch.randn(batch, patches, values, generator=generator, device=machine.device).to(dtype)
        handle = torch.zeros((), device=machine.device, requires_grad=True)
        order = torch.rand(batch, patches, generator=generator, device=machine.device).argsort(dim=1)
        ids = order[:, :masked].contiguous()
        mask = torch.zeros(batch, patches, device=machine.device).scatter_(1, ids, 1.0)

        def eager(images, predictions, mask=mask):
            """As in the public MAE code: the target of every patch, the mask as a factor."""
            b, n, _ = predictions.shape
            grid = size // p
            target = images.reshape(b, 3, grid, p, grid, p).permute(0, 2, 4, 3, 5, 1).reshape(b, n, -1)
            mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
            return (((predictions - target) ** 2).mean(dim=-1) * mask).sum()

        def ours(images, predictions, ids=ids):
            kind = {"mean": MEAN, "std": STD} if images.dtype == torch.uint8 else {}
            return masked_patch_loss(images, predictions, ids, patch_size=p, impl="compiled", **kind)[0]

        def run(loss, images, predictions=predictions, handle=handle):
            def step():
                loss(images, _Produced.apply(handle, predictions)).backward()

            return step

        contestants = [Contestant("megamug", run(ours, normalised)), Contestant("eager", run(eager, normalised))]
        if arguments.compile:
            contestants.append(Contestant("torch.compile", run(torch.compile(eager, dynamic=False), normalised)))
        contestants.append(Contestant("megamug, uint8 images", run(ours, pixels.to(torch.uint8))))

        machine.race(contestants, lambda: None)
        e = dtype.itemsize
        floor = batch * values * (masked * 2 * e + patches * e)
        report(f"masked-patch {batch} x {size}/{p} {_short(dtype)}", contestants, floor, machine, lambda: None)
        machine.log.say(f"#   the gradient alone: {predictions.nbytes / 2**20:.0f} MiB")


def linear_race(machine: Machine, arguments) -> None:
    tokens, width, columns = arguments.tokens, arguments.width, arguments.vocabulary
    for dtype in (DTYPES[name] for name in arguments.linear_dtypes):
        generator = torch.Generator(machine.device).manual_seed(0)
        hidden = torch.randn(tokens, width, generator=generator, device=machine.device).to(dtype).requires_grad_()
        weight = torch.randn(columns, width, generator=generator, device=machine.device).mul_(0.05).to(dtype)
        weight.requires_grad_()
        targets = torch.randint(columns, (tokens,), generator=generator, device=machine.device)

        def run(loss, hidden=hidden, weight=weight, targets=targets):
            def step():
                loss(hidden, weight, targets).backward()

            return step

        def ours(hidden, weight, targets):
            return linear_cross_entropy(hidden, weight, targets, impl="compiled")[0]

        def unfused(hidden, weight, targets):
            return vocab_parallel_cross_entropy(F.linear(hidden, weight), targets, impl="compiled")[0]

        def eager(hidden, weight, targets):
            return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")

        contestants = [
            Contestant("megamug", run(ours)),
            Contestant("product + megamug cross-entropy", run(unfused)),
            Contestant("product + eager cross-entropy", run(eager)),
        ]

        def restore(hidden=hidden, weight=weight):
            hidden.grad = weight.grad = None

        machine.race(contestants, restore)
        if machine.device.type == "cpu":  # here the scratch of the matrix products counts too
            for c in contestants:
                restore()
                c.extra_bytes = max(c.extra_bytes, peak_resident_bytes(c.step))
        title = f"linear + cross-entropy {tokens} x {width} x {columns} {_short(dtype)}"
        report(title, contestants, None, machine, restore)
        machine.log.say(f"#   the gradients alone: {(hidden.nbytes + weight.nbytes) / 2**20:.0f} MiB")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def report(
    title: str, contestants: list[Contestant], floor: int | None, machine: Machine, restore: Callable[[], None]
) -> None:
    """Prints the figures of a race and adds them to the report; profiles megamug's step where that is asked for."""
    ours, log = contestants[0], machine.log
    copy = machine.copy_rate()
    log.say(f"\n{title}" + (f"   floor {floor / 1e6:,.1f} MB, copy {copy / 1e9:.1f} GB/s" if floor else ""))
    log.say(f"{'':34}{'ms':>10}{'spread':>8}{'vs megamug':>12}{'GB/s':>8}{'of copy':>9}{'extra MiB':>11}")
    found = None
    if log.options.profile:
        restore()

        def step() -> None:
            restore()
            ours.step()

        found = _profile.profile(step, log.options.profile, title.replace("/", "-"), machine.synchronize)
    for c in contestants:
        # the median of the ratios within a repetition: both ran side by side, whatever else the machine did
        ratio = statistics.median(theirs / mine for theirs, mine in zip(c.seconds, ours.seconds, strict=True))
        moved = floor / c.median if floor else None
        spread = (max(c.seconds) - min(c.seconds)) / c.median
        rate = f"{moved / 1e9:8.1f}{moved / copy:9.0%}" if moved else " " * 17
        log.say(f"  {c.name:32}{c.median * 1e3:10.1f}{spread:8.0%}{ratio:11.2f}x{rate}{c.extra_bytes / 2**20:11.1f}")
        log.add(
            f"{title}: {c.name}", milliseconds=c.median * 1e3, spread=spread, times_megamug=ratio,
            gb_per_second=moved / 1e9 if moved else None, share_of_copy=moved / copy if moved else None,
            extra_mib=c.extra_bytes / 2**20, profile=found if c is ours else None,
        )  # fmt: skip
    if found:
        log.say(_profile.table(found))


RACES = {"cross-entropy": cross_entropy_race, "masked-patch": masked_patch_race, "linear": linear_race}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _report.parser("losses", __doc__)
    parser.add_argument("--device", type=device, default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=COUNT, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=COUNT, default=5)
    parser.add_argument("--only", choices=RACES, action="append", help="default: all three")
    parser.add_argument("--rows", type=COUNT, default=4096)
    parser.add_argument("--columns", type=COUNT, default=32768)
    parser.add_argument("--batch", type=COUNT, default=64, help="images of the masked-patch loss")
    parser.add_argument("--tokens", type=COUNT, default=8192)
    parser.add_argument("--width", type=COUNT, default=1024)
    parser.add_argument("--vocabulary", type=COUNT, default=65536)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--linear-dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if not getattr(libraries(), arguments.device):
        raise UserError(f"losses: {libraries().reason}")
    torch.set_num_threads(arguments.threads)
    log = Report("losses", arguments)
    log.say(f"# {libraries().reason}")
    for race in arguments.only or RACES:
        RACES[race](Machine(arguments.device, arguments.repeats, log), arguments)
    log.finish()
