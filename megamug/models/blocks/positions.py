"""Fixed positions of patches."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(width: int, grid_height: int, grid_width: int, prefix: int) -> Tensor:
    """Fixed 2-D sin-cos positions [prefix + grid_height * grid_width, width], float32; the prefix rows are zero.

    As in MAE: the first half of the width encodes the column, the second the row; frequencies 10000^(-2i/width').
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {width}")
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(
        torch.arange(grid_height, dtype=torch.float64), torch.arange(grid_width, dtype=torch.float64), indexing="ij"
    )
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    table = torch.cat(halves, dim=1).float()
    return torch.cat([table.new_zeros(prefix, width), table])
