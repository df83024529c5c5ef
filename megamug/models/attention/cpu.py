"""Attention on a CPU by the compiled kernels of `csrc/` (operators `megamug::attention_forward`, `attention_backward`).

Scores and probabilities stay in the processor's cache, head by head; backward computes them again from each query's
logsumexp (Dao et al., arXiv 2205.14135). `LocalAttention` calls this where `pays` says so and torch's
scaled_dot_product_attention otherwise; docs/benchmarks/mug-cpu.md has the times of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamug.losses import ops

WIDEST = 256  # numbers in a head
FEW = 16  # float32 queries, below which torch reads the keys faster than the kernels pack them


def pays(query: Tensor) -> bool:
    """Whether the kernels take these queries [s, b, n, d], and faster than torch would."""
    if query.device.type != "cpu" or not ops.libraries().cpu or query.shape[-1] > WIDEST:
        return False
    return query.dtype == torch.bfloat16 or (query.dtype == torch.float32 and len(query) >= FEW)


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, segments: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, differentiable: query [s, b, n, d], key and value [t, b, m, d] -> [s, b, n * d].

    bfloat16 or float32, summed in float32. n is a multiple of m: query head i reads key head i // (n / m). Strides are
    free but for the last axis. `causal`: query i sees keys 0 to i. `segments` int32 [b, s] (causal only): a query sees
    only keys of its own document, documents being runs of one number along a row.
    Raises RuntimeError where the tensors do not fit.
    """
    context, _ = torch.ops.megamug.attention_forward(query, key, value, causal, query.shape[-1] ** -0.5, segments)
    return context.flatten(2)
