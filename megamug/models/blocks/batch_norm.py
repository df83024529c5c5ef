"""BatchNorm whose statistics are those of a micro-batch of all data-parallel replicas together (SyncBN).

So a model computes the same on any number of replicas that share a micro-batch, and with several micro-batches a step
the layout says which samples share them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Of [b, c, ...] over all axes but c, in float32; torch's BatchNorm to rounding, on one replica that itself.

    Running means and variances (momentum 0.1, variances unbiased) are for evaluation. Replicas hold equal numbers of
    samples, and more than one number of each channel together.
    """

    momentum = 0.1

    def __init__(self, plan, width: int, eps: float = 1e-5, affine: bool = True):
        """`plan.data_group`: the replicas' process group, None for one."""
        super().__init__()
        self.plan, self.eps = plan, eps
        self.weight = nn.Parameter(torch.ones(width, dtype=plan.dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width, dtype=plan.dtype)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        numbers, group = x.float(), self.plan.data_group
        if not self.training or group is None:
            y = nn.functional.batch_norm(
                numbers, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
            )
            return y.to(x.dtype)
        y, mean, var = _OverReplicas.apply(numbers, weight, bias, self.eps, group)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * group.size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return y.to(x.dtype)


class _OverReplicas(torch.autograd.Function):
    """Two messages of 2 c numbers: the replicas' statistics in forward, in backward the two sums over all samples that
    the gradient of an input needs. Gradients of weight and bias are this replica's share, as of any parameter."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group):
        own = torch.stack(torch.var_mean(x, _others(x), correction=0))  # [2, c]
        every = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(every, own, group=group)
        variances, means = torch.stack(every).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        scale = (var + eps).rsqrt()
        normed = (x - _wide(mean, x)) * _wide(scale, x)
        ctx.save_for_backward(normed, scale, weight)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var)
        y = normed if weight is None else normed * _wide(weight, x) + _wide(bias, x)
        return (y.clone() if weight is None else y), mean, var

    @staticmethod
    def backward(ctx, gradient: Tensor, *_):
        normed, scale, weight = ctx.saved_tensors
        axes = _others(gradient)
        sums = torch.stack([gradient.sum(axes), (gradient * normed).sum(axes)])
        shared = sums.clone()
        dist.all_reduce(shared, group=ctx.group)
        shared /= gradient.numel() // gradient.shape[1] * ctx.group.size()
        own = gradient - _wide(shared[0], gradient) - normed * _wide(shared[1], gradient)
        own = own * _wide(scale if weight is None else scale * weight, gradient)
        return own, None if weight is None else sums[1], None if weight is None else sums[0], None, None


def _others(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _wide(numbers: Tensor, x: Tensor) -> Tensor:
    """[c] -> [1, c, 1, ...], as many axes as `x` has."""
    return numbers.view(1, -1, *[1] * (x.dim() - 2))
