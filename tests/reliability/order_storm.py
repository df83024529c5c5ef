"""The order of samples under simulated faults: legs of few steps on changing numbers of replicas, most of them killed.

    python -m tests.reliability.order_storm --faults 1000000

Each replica takes its share of a global batch as the loaders do. What was taken since the last checkpoint counts when
the next one is saved and is forgotten in a kill. Every sample of an epoch must have come once.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import numpy as np

from megamug.data.order import Cursor, GlobalOrder

SIZES, BATCH, FRESH = [1009, 4001, 250], 24, 500  # faults after which a new process is simulated, order and all


def storm(faults: int, seed: int = 0) -> dict[str, int]:
    """Raises AssertionError where the ledger is not a start of the one order."""
    drawn, reference, order = random.Random(seed), GlobalOrder(SIZES, seed=3), GlobalOrder(SIZES, seed=3)
    counts = np.zeros(sum(SIZES), np.int64)
    saved, kills, rescales, before = order.cursor(0), 0, 0, 0
    pending: list[tuple] = []
    position = 0
    for fault in range(faults):
        if fault % FRESH == 0:
            order = GlobalOrder(SIZES, seed=3)
        replicas = drawn.choice((1, 2, 3, 4))
        rescales += replicas != before
        before, share = replicas, BATCH // replicas
        for _ in range(drawn.randrange(1, 3)):
            pending += [order.slice(position + rank * share, share) for rank in range(replicas)]
            position += BATCH
            if drawn.random() < 0.4:
                taken = [np.concatenate(column) for column in zip(*pending, strict=True)]
                expected = reference.slice(saved.samples, position - saved.samples)
                assert all(np.array_equal(a, b) for a, b in zip(taken, expected, strict=True)), fault
                np.add.at(counts, order.unique(taken[0], taken[2]), 1)
                saved, pending = order.cursor(position), []
        if drawn.random() < 0.8:
            saved = Cursor.from_dict(json.loads(json.dumps(saved.to_dict())))
            order.check(saved)
            position, pending, kills = saved.samples, [], kills + 1
    ends = np.cumsum([0, *SIZES])
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        own = counts[first:last]
        assert own.max() - own.min() <= 1, "a sample came twice in an epoch, or not at all"
    assert counts.sum() == saved.samples
    return {"faults": faults, "kills": kills, "rescales": rescales, "samples": saved.samples,
            "epochs": saved.samples // sum(SIZES)}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=1_000_000)
    began = time.monotonic()
    print(storm(parser.parse_args().faults), f"{time.monotonic() - began:.0f} s")
