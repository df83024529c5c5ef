"""Linear layers on a CPU by oneDNN, which torch brings along but uses for float32 only when it compiles a graph.

In float32 its products took 4/5 of the time of those behind torch.mm on the machine of docs/benchmarks/mug-cpu.md, but
for the gradient of the weight; with one to fifteen rows, as in writing token by token, half to two thirds (on two
threads). In bfloat16 it adds the bias without a pass over the result. The choice depends on types alone, so a run that
is repeated gives the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# oneDNN multiplies bfloat16 only where the processor has AVX-512 (or what came after it).
TYPES = [torch.float32]
if AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    TYPES.append(torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., k], weight [n, k], bias [n] -> [..., n], differentiable; it is torch's anywhere but on a CPU, and in what
    torch compiles."""
    on_cpu = AVAILABLE and x.device.type == "cpu" and x.dtype == weight.dtype and not torch.compiler.is_compiling()
    if on_cpu and x.dtype in TYPES and x.numel():
        return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _forward(x, weight, bias)
    return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [m, k], weight [n, k] of any strides -> [m, n]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight needs no input
        ctx.shape = x.shape
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            of_x = _product(rows, weight.t()) if rows.dtype == torch.float32 else rows @ weight
            of_x = of_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            of_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


if AVAILABLE:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *_, **__) -> int:
        """What torch.utils.flop_counter counts, as for torch.mm."""
        return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]
