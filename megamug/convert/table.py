"""What a conversion is made of: a table whose rows say where a parameter stands on either side, and how it is turned.

A row turns one of megamug's parameters into one or several foreign tensors and back (`parts.Piece`). Turning only moves
numbers about, so there and back is bitwise, and a table can be run on shapes alone (torch's `meta` device).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamug.configuration.sections import TowerConfig
from megamug.convert.parts import Piece, fused_qkv


@dataclass(frozen=True)
class Row:
    """One parameter: how it is turned, and our global shape."""

    piece: Piece
    shape: tuple[int, ...]

    @property
    def ours(self) -> str:
        return self.piece.name

    @property
    def theirs(self) -> list[str]:
        return self.piece.others

    def to_theirs(self, ours: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.theirs, self.piece.split(ours), strict=True))

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        parts = self.to_theirs(torch.empty(self.shape, device="meta"))
        return {name: tuple(part.shape) for name, part in parts.items()}


def same(ours: str, shape: tuple[int, ...], theirs: str) -> Row:
    return Row(Piece(ours, [theirs]), shape)


def batched(ours: str, shape: tuple[int, ...], theirs: str) -> Row:
    """Tokens: theirs [1, n, h], ours [n, h]."""
    return Row(Piece(ours, [theirs], lambda tokens: tokens[0], lambda tokens: [tokens[None]]), shape)


def convolution(ours: str, width: int, patch: int, theirs: str) -> Row:
    """Theirs: a convolution over patches [h, 3, p, p]; ours: the linear layer [h, p * p * 3] on values in (row, column,
    channel)."""

    def join(kernel: Tensor) -> Tensor:
        return kernel.permute(0, 2, 3, 1).flatten(1)

    def split(matrix: Tensor) -> list[Tensor]:
        return [matrix.view(width, patch, patch, 3).permute(0, 3, 1, 2)]

    return Row(Piece(ours, [theirs], join, split), (width, 3 * patch**2))


def qkv(ours: str, shape: tuple[int, ...], theirs: list[str], heads: int) -> Row:
    """Theirs: query, key and value matrices (or biases) apart, or one tensor of all queries, all keys, all values."""
    apart = fused_qkv(ours, theirs, TowerConfig(width=shape[0] // 3, heads=heads, query_groups=heads))
    if len(theirs) == 3:
        return Row(apart, shape)
    whole = Piece(ours, theirs, lambda fused: apart.join(*fused.chunk(3)), lambda own: [torch.cat(apart.split(own))])
    return Row(whole, shape)


def weight_and_bias(ours: str, shape: tuple[int, ...], theirs: str) -> list[Row]:
    """The two rows of a linear layer or norm whose parts are called alike on both sides; `shape` is the weight's."""
    return [
        same(f"{ours}.weight", shape, f"{theirs}.weight"),
        same(f"{ours}.bias", shape[:1], f"{theirs}.bias"),
    ]
