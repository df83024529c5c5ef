"""What a step is made of: torch's profiler, its trace for a viewer, and the shares of the parts.

Time is that of kernels on a GPU, and of operators without what they call (self time) on a CPU. A part is told by the
names of the kernel and of all operators around it, so that the multiplications inside the optimizer count there.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from megamug.data import spans

# The first part whose pattern a name matches. Those above the line are looked for in the whole chain of operators
# (an addition in the backward of a norm is the norm's), those below it in the innermost names first.
AROUND = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|\bsend\b|\brecv\b"),
    ("optimizer", r"adam|_foreach_|multi_tensor|vector_norm|l2norm|optimizer"),
    ("losses", r"cross_?entropy|nll_loss|log_softmax|masked_?patch|logsumexp"),
    ("attention", r"attention|flash|fmha|sdpa|(?<!log_)softmax"),
    ("norms", r"layer_?norm|rms_?norm|ln_(fwd|bwd)|rmsnorm"),
)
INNERMOST = (
    ("matrix products", r"gemm|cutlass|cublas|xmma|nvjet|wgmma|mm\b|matmul|linear|einsum|convolution|conv2d"),
    ("copies", r"copy|memcpy|memset|index|gather|scatter|zero_|fill_|FillFunctor|CatArray|embedding"
               r"|\b(clone|contiguous|cat|transpose|stack|to|pad|repeat|roll)\b"),
    ("elementwise", r"elementwise|gelu|silu|swiglu|relu|sigmoid|tanh|dropout|rotary|rotate|reduce_kernel"
                    r"|\b(add|mul|sub|div|neg|exp|sqrt|rsqrt|pow|where|clamp|sum|mean|var|lt|gt|eq|ne|bernoulli)_?\b"),
)  # fmt: skip
STEPS = 2  # that are profiled
OTHER, OUTSIDE = "other", "outside of operators"  # Python, launches, waiting


def part_of(names: Iterable[str]) -> str:
    """The part that a kernel or operator belongs to. `names`: its own first, then those around it, outwards."""
    names = list(names)
    for part, pattern in AROUND:
        if any(re.search(pattern, name, re.IGNORECASE) for name in names):
            return part
    for name in names:
        for part, pattern in INNERMOST:
            if re.search(pattern, name, re.IGNORECASE):
                return part
    return OTHER


def together(
    step: Callable[[], object], folder: Path, name: str, synchronize: Callable[[], None], ranges: str | None = None
) -> dict | None:
    """`profile` on rank 0, while the other processes take the same steps (None there)."""
    if torch.distributed.get_rank() == 0:
        return profile(step, folder, name, synchronize, ranges)
    for _ in range(1 + STEPS):
        step()
    return None


def profile(
    step: Callable[[], object], folder: Path, name: str, synchronize: Callable[[], None], ranges: str | None = None
) -> dict:
    """Runs `step` once to warm the profiler up and `STEPS` times under it; writes FOLDER/NAME.trace.json.

    `ranges`: the parts are the spans (`megamug.data.spans`, of all threads) whose names begin so, and not operators.

    Returns {"trace": path, "step_seconds": of one step while profiled, "parts": [{"part", "seconds" (of one step),
    "share", "largest": {operator or kernel: seconds}}, ...]}, largest part first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{name.replace(' ', '-')}.trace.json"
    if ranges:
        step()
        with spans.listen() as found:
            wall = _wall(step, synchronize)
        spans.write_trace(found, trace)
        parts = _ranges(found, ranges)
    else:
        on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=activities):
            step()
            synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            wall = _wall(step, synchronize)
        profiler.export_chrome_trace(str(trace))
        events = profiler.events()
        parts = _parts(events, on_gpu) or _parts(events, False)
    rest = wall - sum(sum(found.values()) for found in parts.values())
    if rest > 0:
        parts[OUTSIDE] = {OUTSIDE: rest}
    rows = [
        {
            "part": part, "seconds": (total := sum(found.values())), "share": total / wall,
            "largest": dict(sorted(found.items(), key=lambda item: -item[1])[:5]),
        }
        for part, found in parts.items()
    ]  # fmt: skip
    return {"trace": str(trace), "step_seconds": wall, "parts": sorted(rows, key=lambda row: -row["seconds"])}


def _wall(step: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Seconds of one of `STEPS` steps."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize()
    return (time.perf_counter() - start) / STEPS


def _parts(events, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Seconds of one step by part and by the name of the kernel or operator."""
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels are those of the operators that launched them
        around = list(_chain(event))
        if not on_gpu:
            parts[part_of(around)][event.name] += event.self_cpu_time_total / 1e6 / STEPS
        elif not event.is_user_annotation:
            for kernel in event.kernels:
                parts[part_of([kernel.name, *around])][kernel.name[:120]] += kernel.duration / 1e6 / STEPS
    return parts


def _ranges(found: list[spans.Span], prefix: str) -> dict[str, dict[str, float]]:
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, _, start, end in found:
        if name.startswith(prefix):
            parts[name.removeprefix(prefix)][name] += (end - start) / 1e9 / STEPS
    return parts


def _chain(event) -> Iterable[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def table(found: dict) -> str:
    """The parts in lines for people."""
    lines = [f"a step of {found['step_seconds'] * 1e3:,.1f} ms (while profiled); trace: {found['trace']}"]
    for row in found["parts"]:
        largest = ", ".join(f"{name[:40]} {seconds * 1e3:,.1f}" for name, seconds in list(row["largest"].items())[:3])
        lines.append(f"  {row['part']:<22}{row['seconds'] * 1e3:10,.1f} ms {row['share']:6.1%}   {largest}")
    return "\n".join(lines)
