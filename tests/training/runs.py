"""Training runs for tests: the real command line, with what it consumes written down and a signal at a chosen step.

In one process: `with hooked(...): cli.main(["train", ...])`. In processes of their own, one for each rank:

    python tests/training/runs.py '{"ids": FOLDER, "stop_step": 3, "stop_rank": 1}' train CONFIG.yaml section.key=value
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

RATES = {"samples_per_second", "data_wait", "tflops_per_device", "mfu", "memory"}  # of a record; the rest is science


@contextmanager
def hooked(
    ids: str | Path | None = None, stop_step: int | None = None, stop_rank: int = 0, again: bool = False
) -> Iterator[None]:
    """Inside, a training run appends to `ids/rank-N.jsonl` a line [step, [[epoch, sample], ...]] for each batch that it
    trains on, and process `stop_rank` gets SIGTERM as it receives the batch of `stop_step`.

    `again`: it gets another one before and after each checkpoint is written.
    """
    from megamug.checkpoint.store import CheckpointStore
    from megamug.data.pairs.loader import PairLoader

    rank = int(os.environ.get("RANK", 0))
    originals = PairLoader.next, CheckpointStore.begin, CheckpointStore.commit

    def terminate() -> None:
        if rank == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def next_batch(self):
        batch = originals[0](self)
        step = batch.samples // self.global_batch_size
        if self.train and ids is not None:
            parts = [zip(m.epochs.tolist(), m.indices.tolist(), strict=True) for m in batch.micro_batches]
            Path(ids).mkdir(parents=True, exist_ok=True)
            with open(Path(ids) / f"rank-{rank}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps([step, list(chain(*parts))]) + "\n")
        if self.train and step == stop_step:
            terminate()
        return batch

    def begin(self, step):
        terminate()
        return originals[1](self, step)

    def commit(self, step):
        path = originals[2](self, step)
        terminate()
        return path

    PairLoader.next = next_batch
    if again:
        CheckpointStore.begin, CheckpointStore.commit = begin, commit
    try:
        yield
    finally:
        PairLoader.next, CheckpointStore.begin, CheckpointStore.commit = originals


def consumed(ids: Path, rank: int = 0) -> dict[int, list[tuple[int, int]]]:
    """What `hooked` wrote for one rank: step -> [(epoch, sample), ...]; each step must have been trained on once."""
    lines = [json.loads(line) for line in (ids / f"rank-{rank}.jsonl").read_text().splitlines()]
    steps = {step: [tuple(pair) for pair in pairs] for step, pairs in lines}
    assert len(steps) == len(lines), f"steps done twice: {[step for step, _ in lines]}"
    return steps


def metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """(records of steps without their rates, records of validations) of metrics.jsonl."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in r.items() if k not in RATES} for r in records if "validation" not in r]
    return steps, [r for r in records if "validation" in r]


def tensors(checkpoint: Path) -> dict:
    """All tensors of a checkpoint (parameters and optimizer state), read by torch's own reader of its format; beside
    them Megatron-core 0.19 keeps a list of its own."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict = {}
    reader = FileSystemReader(checkpoint / "model")
    _load_state_dict(found, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def fingerprint(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint by name, and of its `state.json`."""
    import torch

    hashes = {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors(checkpoint).items()
        if hasattr(tensor, "numpy")
    }
    assert len(hashes) > 100 and any(name.startswith("optimizer.exp_avg_sq.") for name in hashes)
    return {**hashes, "state.json": hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()}


def checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoint folders; there must be no other folder beside them."""
    folders = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert all(name.startswith("step-") for name in folders), folders
    return [int(name[5:]) for name in folders]


def main() -> int:
    from megamug.cli import main

    with hooked(**json.loads(sys.argv[1])):
        return main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
