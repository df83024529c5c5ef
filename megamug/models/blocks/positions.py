"""Fixed positions of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def resampled_positions(width: int, trained: int, here: int) -> Tensor:
    """The sin-cos table of a grid of trained x trained patches, resampled (bicubic, antialias) to here x here.

    float32 [here^2, width]. As timm's `resample_abs_pos_embed`: patches keep their place in the picture.
    """
    table = sincos_positions(width, trained, trained, prefix=0)
    if here == trained:
        return table
    grid = table.view(1, trained, trained, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (here, here), mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).reshape(-1, width)
