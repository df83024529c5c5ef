"""What an optimizer keeps of each parameter, in one way for all of Megatron's optimizers: a checkpoint of one can be
loaded by another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
BUFFER = ("momentum_buffer",)  # of SGD and LARS
AVERAGE = "average"  # of the weights, where a run keeps one


@dataclass
class MainState:
    """One parameter's fp32 main value and what is kept beside it, or this rank's part of them.

    `span` (None: all of it) is the part [start, end) of the flattened parameter that this rank holds.
    """

    name: str  # as in `torch.nn.ModuleList(chunks)`
    parameter: Tensor  # the model's
    main: Tensor  # fp32; the parameter itself in the plain optimizer
    span: tuple[int, int] | None
    optimizer: torch.optim.Optimizer

    @property
    def kept(self) -> tuple[str, ...]:
        """What the optimizer keeps of each parameter."""
        return kept_by(self.optimizer)

    def moment(self, which: str) -> Tensor:
        """One of `kept`, or the average, shaped as `main`; made (zero) where no step was done yet."""
        state = self.optimizer.state[self.main]
        if which not in state:
            if counts_per_parameter(self.optimizer) and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=self.main.device)
            for name in self.kept:
                state.setdefault(name, torch.zeros_like(self.main, dtype=torch.float32))
        return state[which]


def kept_by(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimizer keeps of each parameter, by the names of torch."""
    return BUFFER if "momentum" in optimizer.defaults else MOMENTS


def counts_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """torch's AdamW counts steps per parameter; of the others they are counted per group."""
    return isinstance(optimizer, torch.optim.Adam)


class SavedOptimizer(Protocol):
    """What saving and loading ask of an optimizer (`megamug.training.optim.Optimizer`)."""

    distributed: bool  # its states are sharded over the data-parallel ranks
    names: dict[Tensor, str]  # parameter -> its name in `torch.nn.ModuleList(chunks)`
    moments: tuple[str, ...]  # what is kept of each parameter

    def gather_parameters(self) -> None:
        """Makes this rank hold all updates of its parameters."""

    def main_states(self) -> Iterator[MainState]:
        """Every parameter that this rank updates, at least in part."""

    def round_parameters(self) -> None:
        """Makes FP8 parameters anew from their fp32 values."""

    def restore_step(self, step: int) -> None:
        """Sets the number of updates done."""
