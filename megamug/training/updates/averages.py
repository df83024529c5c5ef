"""Exponential moving averages of the weights (Polyak & Juditsky 1992, as timm's `ModelEma` keeps them), beside what the
optimizer keeps of each parameter: fp32, sharded and saved as its moments are, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megamug.checkpoint import state
from megamug.checkpoint.optimizer_state import AVERAGE, MainState


class Averages:
    """average = decay * average + (1 - decay) * weight after each update; at first the weights that the run begins
    with."""

    def __init__(self, states: list[MainState], decay: float):
        """`states` of all that this rank updates; weights that they start from are loaded."""
        self.decay, self.states = decay, states
        for one in states:
            for which in one.kept:  # a state that is not empty is taken for a whole one
                one.moment(which)
            one.optimizer.state[one.main][AVERAGE] = one.main.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def update(self, fine: Tensor) -> None:
        """Once an update was done; `fine` (a scalar, not waited for): whether it was."""
        averages = [one.moment(AVERAGE) for one in self.states if one.main.numel()]
        if not averages:
            return
        steps = torch._foreach_sub([one.main for one in self.states if one.main.numel()], averages)
        torch._foreach_mul_(steps, (1 - self.decay) * fine.float())
        torch._foreach_add_(averages, steps)


@contextmanager
def in_place(chunks: list[torch.nn.Module], optimizer, world) -> Iterator[None]:
    """Inside, the parameters of `chunks` are their averages, where the optimizer keeps some; behind, what they were, to
    the bit. A collective."""
    if optimizer.averages is None:
        yield
        return
    optimizer.gather_parameters()
    parameters = {name: parameter for parameter, name in optimizer.names.items()}
    states = {one.name: one for one in optimizer.main_states()}
    kept = {}
    with torch.no_grad():
        for name in sorted(parameters):
            parameter = parameters[name]
            kept[name] = parameter.detach().clone()
            parameter.copy_(state.whole(states.get(name), AVERAGE, parameter, optimizer, world))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
