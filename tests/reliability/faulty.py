"""A training run in which something goes wrong, once: the real command line, and a fault at a step of a rank.

    python tests/reliability/faulty.py '[{"kind": "segfault", "rank": 1, "step": 3}, ...]' train CONFIG.yaml ...

Kinds that end a process: `exception`, `segfault`, `abort`, `kill`, `stop`. Kinds that go on with wrong numbers, just
before the step: `nan_parameter`, `flip` (a bit of a parameter on this rank), `flip_whole` (of one that tensor-parallel
ranks hold alike); just before the update: `nan_gradient`, `spike` (gradients times 10^6). `attempt`: only in this start
under torchrun (TORCHELASTIC_RESTART_COUNT).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


def _end(kind: str) -> None:
    if kind == "exception":
        raise ZeroDivisionError("a fault on purpose")
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "abort":
        os.abort()
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])


def _spoil(kind: str, trainer) -> None:
    import torch

    parameters = [p for p in trainer.chunks[0].parameters() if p.requires_grad]
    with torch.no_grad():
        if kind == "nan_parameter":
            parameters[0].view(-1)[0] = float("nan")
        elif kind in ("flip", "flip_whole"):
            split = kind == "flip"
            chosen = next(p for p in parameters if getattr(p, "tensor_model_parallel", False) == split)
            chosen.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 10)
        elif kind == "nan_gradient":
            parameters[0].main_grad.view(-1)[0] = float("nan")
        else:
            assert kind == "spike", kind
            for parameter in parameters:
                parameter.main_grad.mul_(1e6)


ENDING = ("exception", "segfault", "abort", "kill", "stop")
IN_UPDATE = ("nan_gradient", "spike")


@contextmanager
def hooked(faults: list[dict]) -> Iterator[None]:
    """Inside, training runs of this process meet `faults`."""
    from megamug.training.optim import Optimizer
    from megamug.training.trainer import Trainer

    rank, attempt = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    own = [f for f in faults if f["rank"] in (rank, "all") and f.get("attempt", attempt) == attempt]
    step_of, prepare_of = Trainer._train_step, Optimizer.prepare

    def step(self):
        due = [f["kind"] for f in own if f["step"] == self.step]
        for kind in due:
            if kind in ENDING:
                _end(kind)
            elif kind not in IN_UPDATE:
                _spoil(kind, self)
        self.optimizer.prepare = partial(prepare, self, [kind for kind in due if kind in IN_UPDATE])
        return step_of(self)

    def prepare(trainer, due, number):
        for kind in due:
            _spoil(kind, trainer)
        return prepare_of(trainer.optimizer, number)

    Trainer._train_step = step
    try:
        yield
    finally:
        Trainer._train_step = step_of


def main() -> int:
    from megamug.cli import main

    with hooked(json.loads(sys.argv[1])):
        return main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
