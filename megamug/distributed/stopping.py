"""Stopping on request: signals to any process, one answer on all ranks."""

from __future__ import annotations

import os
import signal
import sys

import torch


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request to stop after the current step, on all ranks at the same one.

    A context manager, entered in the main thread:

        with StopRequest() as stop:
            for step in ...:
                train_step()
                if stop.agreed(cpu_group):
                    save(); break

    Schedulers warn before they kill (SLURM: `--signal=USR1@300`; torchrun hands on SIGTERM and waits 30 s). Signals
    that come while the run is already stopping are ignored with a line.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.requested = False  # by a signal to this process
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if self.requested:
            line = f"{name}: already stopping; a checkpoint is being written, please wait\n"
        else:
            line = f"{name}: stopping after this step, with a checkpoint\n"
        self.requested = True
        os.write(sys.__stderr__.fileno(), line.encode())  # not logging: the handler may interrupt a write to the log

    def agreed(self, group: torch.distributed.ProcessGroup | None = None) -> bool:
        """Whether any rank of `group` was asked to stop. A collective: every rank calls it once a step.

        Use a gloo group: with NCCL the answer would wait for all work queued on the GPU. One process needs no group.
        """
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
            return self.requested
        on_gpu = torch.distributed.get_backend(group) == "nccl"
        flag = torch.tensor([int(self.requested)], dtype=torch.int32, device="cuda" if on_gpu else "cpu")
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
        return bool(flag.item())
