"""A table of pieces says how another library's parameters and ours correspond; both directions follow from it.

Ours keeps queries, keys and values in one matrix (Megatron's order: for each query group its queries, its key, its
value), both input projections of a gated feed-forward in one ([gate; up]), and pads the vocabulary.

Axes: n heads, g query groups, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megamug.configuration.sections import TowerConfig
from megamug.data.padding import padded_vocabulary


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


@dataclass(frozen=True)
class Piece:
    """Our parameter `name` is `join` of the parameters `others`; `split` takes it apart again."""

    name: str
    others: list[str]
    join: Callable[..., Tensor] = _same
    split: Callable[[Tensor], list[Tensor]] = _alone


def fused_qkv(name: str, others: list[str], tower: TowerConfig) -> Piece:
    """Three projections (weights [n d, h], [g d, h], [g d, h], or their biases) and ours [(n + 2 g) d, h]."""
    groups, head = tower.query_groups, tower.width // tower.heads
    rows = [tower.heads // groups * head, head, head]  # of one group

    def join(*parts: Tensor) -> Tensor:
        grouped = [x.view(groups, size, *x.shape[1:]) for x, size in zip(parts, rows, strict=True)]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(fused: Tensor) -> list[Tensor]:
        grouped = fused.view(groups, sum(rows), *fused.shape[1:])
        return [x.reshape(-1, *fused.shape[1:]) for x in grouped.split(rows, dim=1)]

    return Piece(name, others, join, split)


def stacked(name: str, others: list[str]) -> Piece:
    """Matrices of equal shapes, one above the other."""
    return Piece(name, others, lambda *parts: torch.cat(parts), lambda whole: list(whole.chunk(len(others))))


def linears(ours: str, tower: TowerConfig, qkv: list[str], proj: str, fc1: list[str], fc2: str) -> list[Piece]:
    """The four linears of our layer `ours`, of others' linears: three projections, the output, one or both input
    projections of the feed-forward ([gate, up]), its output. With biases where the tower has them."""
    found = []
    for kind in ("weight", "bias") if tower.bias else ("weight",):
        found += [
            fused_qkv(f"{ours}.self_attention.linear_qkv.{kind}", [f"{name}.{kind}" for name in qkv], tower),
            Piece(f"{ours}.self_attention.linear_proj.{kind}", [f"{proj}.{kind}"]),
            stacked(f"{ours}.mlp.linear_fc1.{kind}", [f"{name}.{kind}" for name in fc1]),
            Piece(f"{ours}.mlp.linear_fc2.{kind}", [f"{fc2}.{kind}"]),
        ]
    return found


def vocabulary_rows(name: str, other: str, vocabulary: int) -> Piece:
    """A table [vocabulary, h]; ours has zero rows behind, see `padded_vocabulary`."""

    def pad(table: Tensor) -> Tensor:
        return torch.nn.functional.pad(table, (0, 0, 0, padded_vocabulary(len(table)) - len(table)))

    return Piece(name, [other], pad, lambda table: [table[:vocabulary]])
