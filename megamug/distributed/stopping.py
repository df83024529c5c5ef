"""Stopping on request: signals to any process, one answer on all ranks."""

from __future__ import annotations

import math
import os
import signal
import sys
import time

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
    that come while the run is already stopping are ignored with a line, but for a person's patience: the third Ctrl-C
    ends the process at once with exit code 130. What was last saved is whole, as after any kill. A process that was
    started with one of them blocked (the mask is inherited) would never hear it: inside they are not.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ENOUGH = 3  # Ctrl-C
    ONE_PRESS = 0.3  # seconds: a launcher hands on what the terminal has sent to all processes, too

    def __init__(self):
        self.requested = False  # by a signal to this process
        self._presses, self._pressed = 0, -math.inf
        self._previous: dict[int, object] = {}
        self._mask: set[int] = set()

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(self, *_) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGINT and now - self._pressed > self.ONE_PRESS:
            self._presses, self._pressed = self._presses + 1, now
        if self._presses >= self.ENOUGH:
            line = f"{name}: ending at once; the same command goes on from what was last saved\n"
        elif self.requested:
            line = f"{name}: already stopping; a checkpoint is being written, please wait"
            line += " (Ctrl-C three times ends at once)\n" if number == signal.SIGINT else "\n"
        else:
            line = f"{name}: stopping after this step, with a checkpoint\n"
        self.requested = True
        os.write(sys.__stderr__.fileno(), line.encode())  # not logging: the handler may interrupt a write to the log
        if self._presses >= self.ENOUGH:
            os._exit(128 + signal.SIGINT)  # no exception: it would wait for ranks and threads that may not answer

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
