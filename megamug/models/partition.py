"""How a model's blocks are cut into stages, and how two towers are matched by depth. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


def cut(flops: list[float], stages: int) -> list[range]:
    """Splits blocks of this work into contiguous stages with the smallest possible heaviest one (dynamic programming).

    Raises ValueError when there are fewer blocks than stages. Ties go to the earliest cut: every rank finds the same.
    """
    count, before = len(flops), [0]
    if stages > count:
        raise ValueError(f"{count} blocks cannot fill {stages} pipeline stages")
    for number in flops:
        before.append(before[-1] + number)
    heaviest: list[float | None] = [0] + [None] * count  # of the stages so far, by blocks used
    starts: list[list[int]] = []  # by stage and blocks used, where the stage starts
    for stage in range(1, stages + 1):
        row: list[float | None] = [None] * (count + 1)
        start_of = [0] * (count + 1)
        for end in range(stage, count - (stages - stage) + 1):
            for start in range(end - 1, stage - 2, -1):
                so_far, last = heaviest[start], before[end] - before[start]
                if so_far is not None and (row[end] is None or max(so_far, last) <= row[end]):
                    row[end], start_of[end] = max(so_far, last), start
        heaviest = row
        starts.append(start_of)
    ranges, end = [], count
    for start_of in reversed(starts):
        ranges.append(range(start_of[end], end))
        end = start_of[end]
    return ranges[::-1]


@dataclass(frozen=True)
class Slot:
    """What runs between two possible stage boundaries: layers [first, last) of each tower, a cross block or none."""

    text: tuple[int, int]
    image: tuple[int, int]
    cross: int | None


def depth_slots(text_layers: int, image_layers: int, cross_every: int) -> list[Slot]:
    """The slots of towers of these depths, in order.

    The deeper tower, S layers, gives S slots; layer i of the other, L layers, sits in slot ceil((i + 1) S / L) - 1: it
    runs when as large a part of the deeper tower has run. A cross block follows every `cross_every` layers of the
    shallower tower, spread evenly where L is no multiple of it: block m of n = L // cross_every stands at the end of
    the slot of that tower's layer round((m + 1) L / n). For equal depths that is after every `cross_every` layers of
    both.
    """
    deep, shallow = max(text_layers, image_layers), min(text_layers, image_layers)
    ends = [_ends(layers, deep) for layers in (text_layers, image_layers)]
    blocks = shallow // cross_every
    done = _ends(shallow, deep)
    places = {}
    for m in range(blocks):
        layers = (2 * (m + 1) * shallow + blocks) // (2 * blocks)  # round((m + 1) L / n), halves up
        places[done.index(layers, 1) - 1] = m
    return [
        Slot((ends[0][s], ends[0][s + 1]), (ends[1][s], ends[1][s + 1]), places.get(s)) for s in range(deep)
    ]


def _ends(layers: int, slots: int) -> list[int]:
    """How many of `layers` layers have run before slot 0, 1, ... `slots`."""
    return [s * layers // slots for s in range(slots + 1)]
