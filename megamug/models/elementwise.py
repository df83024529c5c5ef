"""Rotary positions and SwiGLU in few passes over memory, forward and backward: on a CPU these passes cost as much as a
matrix product, and their plain forms keep each intermediate result for backward.

Axes: s tokens, b rows, n heads, d head width, f feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rotate(torch.autograd.Function):
    """`Rotate.apply(x, angles)`: x [s, b, n, d] turned by angles [s, 1 or b, 1, d] (radians, float32, both halves
    alike): numbers i and i + d/2 of a head are one plane. Backward turns the other way and keeps the angles alone."""

    @staticmethod
    def forward(ctx, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _turned(x, angles, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        return _turned(gradient, angles, -1.0), None


def _turned(x: Tensor, angles: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = angles[..., :half].cos().to(x.dtype), (sign * angles[..., :half].sin()).to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=result[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=result[..., half:]).addcmul_(first, sin)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

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


class SwiGLU(torch.nn.Module):
    """silu(gate) * up of [..., 2 f] = [gate; up] -> [..., f] (Shazeer 2020, arXiv 2002.05202). Megatron's MLP builds it
    from the configuration; only its input is kept for backward."""

    def __init__(self, config):
        super().__init__()
        assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu

    def forward(self, x: Tensor) -> Tensor:
        return _SwiGLU.apply(x)

    def sharded_state_dict(self, *_, **__) -> dict:
        """Nothing; Megatron's MLP asks each of its modules."""
        return {}
