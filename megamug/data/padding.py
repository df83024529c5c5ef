"""Rows of the tables (embedding, output) of a vocabulary: more than it has ids, the same in every layout."""

from __future__ import annotations

VOCABULARY_MULTIPLE = 128  # tables have rows for a multiple of it in every layout, so a checkpoint fits every layout


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of the tables for a vocabulary of this many ids."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
