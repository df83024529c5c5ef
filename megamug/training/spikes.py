"""Steps whose gradient norm is far above what it was lately are not applied (`optimizer.skip_spikes`).

As in OLMo: a batch that is damaged, or a bit that flipped in an activation, gives a gradient that clipping would still
apply, in a direction that means nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 128  # steps whose norms are remembered
LEAST = 32  # of them are needed to judge


class SpikeGuard:
    """`fine(norm)`: whether `norm` is at most the mean plus `sigmas` standard deviations of the last norms applied.

    All on the device of `norm`: nobody waits for it. All ranks decide alike, as their norms are the same.
    """

    def __init__(self, sigmas: float):
        self.sigmas = sigmas
        self.norms: Tensor | None = None  # [WINDOW] float64, the newest at `count` modulo WINDOW
        self.count: Tensor | None = None  # int64 scalar: norms remembered so far

    def fine(self, norm: Tensor) -> Tensor:
        """A bool scalar on the device of `norm`, a float scalar."""
        if self.norms is None:
            self.norms = torch.zeros(WINDOW, dtype=torch.float64, device=norm.device)
            self.count = torch.zeros((), dtype=torch.int64, device=norm.device)
        known = torch.arange(WINDOW, device=norm.device) < self.count
        number = known.sum().clamp(min=1)
        mean = (self.norms * known).sum() / number
        variance = ((self.norms - mean).square() * known).sum() / number
        return (self.count < LEAST) | (norm.double() <= mean + self.sigmas * variance.sqrt())

    def remember(self, norm: Tensor, applied: Tensor) -> None:
        """Counts `norm` in where `applied` (a bool scalar) is true."""
        place = self.count % WINDOW
        old = self.norms.index_select(0, place.view(1))
        self.norms.index_copy_(0, place.view(1), torch.where(applied, norm.double(), old[0]).view(1))
        self.count += applied

    def state(self) -> list[float]:
        """The norms remembered, oldest first, for a checkpoint."""
        if self.norms is None:
            return []
        count, norms = int(self.count), self.norms.tolist()
        return norms[:count] if count <= WINDOW else [*norms[count % WINDOW :], *norms[: count % WINDOW]]

    def restore(self, norms: list[float], device: torch.device) -> None:
        """Goes on from `state`."""
        self.norms = torch.zeros(WINDOW, dtype=torch.float64, device=device)
        self.norms[: len(norms)] = torch.tensor(norms, dtype=torch.float64, device=device)
        self.count = torch.tensor(len(norms), dtype=torch.int64, device=device)
