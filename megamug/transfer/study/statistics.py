"""Means over seeds, and whether two differ by more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CERTAIN = 2.0  # standard errors from which a difference is told


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error of the mean); the latter is infinite for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.mean(values), error


@dataclass(frozen=True)
class Difference:
    """Of two means, the seeds of each drawn for itself."""

    value: float
    error: float  # standard error; infinite where one has a single seed
    seeds: int | None  # of each, about as many as make a difference of this size certain; None where none do

    @property
    def told(self) -> bool:
        """Whether it is more than `CERTAIN` standard errors."""
        return abs(self.value) > CERTAIN * self.error

    def words(self) -> str:
        if not math.isfinite(self.error):
            return "one seed does not tell how much of that is chance"
        if self.told:
            return "better" if self.value > 0 else "worse"
        if self.seeds is None:
            return "no difference"
        return f"not told from chance; a difference of this size would take about {self.seeds} seeds"


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """`one` minus `other`. `seeds` is the least n with |value| >= CERTAIN sqrt((variance + variance) / n)."""
    (a, error_a), (b, error_b) = spread(one), spread(other)
    error = math.hypot(error_a, error_b)
    seeds = None
    if a != b and math.isfinite(error):
        variances = len(one) * error_a**2 + len(other) * error_b**2
        seeds = max(2, math.ceil(CERTAIN**2 * variances / (a - b) ** 2))
    return Difference(a - b, error, seeds)
