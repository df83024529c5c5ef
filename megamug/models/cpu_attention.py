"""Attention for bfloat16 on a CPU, from batched matrix products.

torch's fused CPU attention has a bfloat16 backward that takes 2 to 8 times the time of these products at the lengths
of an image encoder (17 to 197 tokens; docs/benchmarks/mug-cpu.md). As in the fused form, the probabilities are not
kept: backward computes them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 512  # keys; beyond, the probabilities of one layer are too large to hold even for a moment


def pays(query: Tensor, key: Tensor) -> bool:
    """Whether this form is the faster one: bfloat16 on a CPU, with a backward to come."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad and len(key) <= LONGEST


class BmmAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v. Arguments and result as `LocalAttention.forward`; `causal` hides later keys."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        s, b, n, d = query.shape
        # Products of strided bfloat16 batches are slow: one copy each to [b * n, s, d].
        query, key, value = (x.flatten(1, 2).transpose(0, 1).contiguous() for x in (query, key, value))
        ctx.save_for_backward(query, key, value)
        ctx.sizes, ctx.causal = (s, b, n, d), causal
        context = torch.bmm(_probabilities(query, key, causal), value)
        return context.transpose(0, 1).reshape(s, b, n * d)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        s, b, n, d = ctx.sizes
        gradient = gradient.reshape(s, b * n, d).transpose(0, 1).contiguous()
        probabilities = _probabilities(query, key, ctx.causal)
        of_value = torch.bmm(probabilities.transpose(1, 2), gradient)
        of_probabilities = torch.bmm(gradient, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
        of_scores.mul_(d**-0.5)
        of_query, of_key = torch.bmm(of_scores, key), torch.bmm(of_scores.transpose(1, 2), query)
        return *(x.transpose(0, 1).reshape(-1, b, n, d) for x in (of_query, of_key, of_value)), None


def _probabilities(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """[b * n, s, d], [b * n, t, d] -> [b * n, s, t]."""
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(query.shape[-1] ** -0.5)
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(dim=-1)
