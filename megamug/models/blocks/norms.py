"""Norms of other kinds than `layers.Norm`: without parameters, of each head by itself, behind a block.

Axes: s tokens, b rows, n heads, d head width, h width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class PlainNorm(nn.Module):
    """LayerNorm without parameters, as CM3leon has it (arXiv 2309.02591)."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, None, None, self.eps)


class HeadNorm(nn.Module):
    """LayerNorm of every head [..., n, d] over d, with weights and biases [n, d]: each head has its own (Chameleon,
    arXiv 2405.09818, section 2.2, as published). A tensor-parallel rank holds those of its heads."""

    def __init__(self, config, heads: int):
        super().__init__()
        self.eps = config.layernorm_epsilon
        own, head = heads // config.tensor_model_parallel_size, config.hidden_size // config.num_attention_heads
        self.weight = nn.Parameter(torch.ones(own, head, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), self.weight)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class NormedResidual(nn.Module):
    """Residual sum with a norm of what is added: x + norm(block(x)), the res-post-norm of Swin V2 (arXiv 2111.09883,
    section 3.2) and Chameleon-34B. Stands where a Megatron layer has its bias-dropout-add; there is no dropout here."""

    def __init__(self, norm: type, config):
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple, Tensor, float], Tensor]:
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        return residual + self.norm(output if bias is None else output + bias)
