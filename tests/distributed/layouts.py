"""What the tests of layouts share: jobs of `layout_worker` in one or more processes, and how their numbers compare."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.distributed.launch import launch_forked

WORKER = str(Path(__file__).with_name("cases") / "layout_worker.py")
TOLERANCE = 1e-5


def run(options: list[dict], processes: int) -> list[dict]:
    """Results of the jobs, which one launch does one after another; the same from every rank."""
    results = launch_forked([WORKER, json.dumps(options)], processes, timeout=300)
    for rank, (code, output) in enumerate(results):
        assert code == 0, f"rank {rank} of {processes} exits {code}:\n{output[-4000:]}"
    per_rank = [[json.loads(line[7:]) for line in out.splitlines() if line.startswith("RESULT ")] for _, out in results]
    for others in per_rank[1:]:
        assert others == per_rank[0], "the ranks report different losses"
    assert len(per_rank[0]) == len(options)
    return per_rank[0]


def references(jobs: dict[str, dict], cut: int, folder: Path) -> dict[str, dict]:
    """Of each job in one process: its curve (`records`), the gradients of its first step, and, of a run that ends after
    `cut` steps, the curve (`early`) and the checkpoint's folder."""
    both = []
    for name, job in jobs.items():
        both.append({**job, "gradients": str(folder / f"{name}.pt")})
        both.append({**job, "steps": cut, "save": str(folder / name)})
    results = run(both, 1)
    return {
        name: {
            "records": results[2 * i]["records"],
            "early": results[2 * i + 1]["records"],
            "gradients": torch.load(folder / f"{name}.pt"),
            "checkpoint": str(folder / name),
        }
        for i, name in enumerate(jobs)
    }


def worst(records: list, reference: list) -> float:
    """The largest relative difference of a loss or a gradient norm."""
    assert len(records) == len(reference) > 0
    pairs = [(a, b) for x, y in zip(records, reference, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def worst_gradient(file: Path, expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error of any parameter, relative to the largest number of its gradient, and that parameter."""
    found = torch.load(file)
    assert set(found) == set(expected)
    errors = {name: float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items()}
    assert not any(error != error for error in errors.values()), "a gradient is incomplete"
    return max((error, name) for name, error in errors.items())
