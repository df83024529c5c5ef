"""Rotary positions and SwiGLU in few passes over memory, forward and backward: on a CPU these passes cost as much as a
matrix product, and their plain forms keep each intermediate result for backward.

Axes: s tokens, b rows, n heads, d head width, f feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, by_rows: bool) -> Tensor:
        ctx.save_for_backward(table)
        return _turned(x, table, 1, by_rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return _turned(gradient, table, -1), None, None


def _turned(x: Tensor, table: Tensor, direction: int, by_rows: bool = False) -> Tensor:
    (first, second), (cos, sin) = x.chunk(2, dim=-1), table.chunk(2, dim=-1)
    if by_rows:
        s, b, *heads = x.shape
        result = torch.empty(b, s, *heads, dtype=x.dtype, device=x.device).transpose(0, 1)
    else:
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    of_first, of_second = result.chunk(2, dim=-1)
    torch.mul(first, cos, out=of_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=of_second).addcmul_(first, sin, value=direction)
    return result


def rotate(x: Tensor, table: Tensor, by_rows: bool = False) -> Tensor:
    """Heads x [s, b, n, d] turned by a `rotation_table` [s, 1, 1, d] of their type. Numbers i and i + d/2 of a head are
    one plane. Differentiable in x; backward turns the other way and keeps the table alone. `by_rows`: in memory the
    result is [b, s, n, d]."""
    if torch.compiler.is_compiling():  # a compiler makes one pass of it, and knows what backward needs
        (first, second), (cos, sin) = x.chunk(2, dim=-1), table.chunk(2, dim=-1)
        result = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return result.transpose(0, 1).contiguous().transpose(0, 1) if by_rows else result
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, table, by_rows)
    return _turned(x, table, 1, by_rows)


def rotated(_: None, x: Tensor, table: Tensor, by_rows: bool = False) -> Tensor:
    """`rotate` in the form of what `compiled` takes: a function of a module (there is none) and tensors."""
    return rotate(x, table, by_rows)


def rotation_table(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Angles in radians, float32 [s, d/2], one for each plane of a head -> [s, 1, 1, d]: their cosines, then their
    sines. Computed once for all layers."""
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)[:, None, None]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), gradient, out=of_up)
        of_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return result


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu(_: None, x: Tensor) -> Tensor:
    """silu(gate) * up of x [..., 2 f] = [gate; up] -> [..., f]; only x is kept for backward."""
    if torch.compiler.is_compiling():
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    if torch.is_grad_enabled() and x.requires_grad:
        return _SwiGLU.apply(x)
    return _swiglu(x)


class SwiGLU(torch.nn.Module):
    """`swiglu` (Shazeer 2020, arXiv 2002.05202) as a module. Megatron's MLP builds it from the configuration."""

    def __init__(self, config):
        super().__init__()
        assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
        self.elementwise_function: Callable[..., Tensor] = swiglu  # `compiled` replaces it

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled())
        return swiglu(None, x) if plain else self.elementwise_function(None, x)

    def sharded_state_dict(self, *_, **__) -> dict:
        """Nothing; Megatron's MLP asks each of its modules."""
        return {}
