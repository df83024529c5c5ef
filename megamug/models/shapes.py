"""Sizes that follow from a configuration alone, whatever the layout. Nothing here imports torch."""

from __future__ import annotations

from megamug.sections import TowerConfig

GRID_PREFIX = 1  # tokens before a `rotary_grid`: the condition
VOCABULARY_MULTIPLE = 128  # tables have rows for a multiple of it in every layout, so a checkpoint fits every layout


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of the tables for a vocabulary of this many ids."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def positions_of(tower: TowerConfig) -> int | None:
    """How many positions a tower knows: rows of a learned table, or the cells of a grid and what is before it; None
    for any number."""
    if tower.positions == "rotary_grid":
        return GRID_PREFIX + tower.grid**2
    return tower.max_positions if tower.positions == "learned" else None
