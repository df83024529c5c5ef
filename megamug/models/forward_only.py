"""Passes through `local` layers that no gradient follows: evaluation, and above all writing token by token.

Megatron's forward asks at every call for all that a training run may have on (offloading, recomputation, packed
sequences, fused communication, profiling ranges, dropout); with one token at hand that takes as long as the products of
a small model. Here the same modules compute the same things in the same order, and nothing is asked. Tensor parallelism
is in the linears, caches are in the attention; there is no dropout, and a `local` linear adds its own bias.

Axes: s tokens, t tokens of a context, b rows, h width, n heads on this rank, g heads of keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megamug.models.elementwise import rotate


def applies(module: nn.Module) -> bool:
    """Whether `module` is in evaluation mode and no gradients are recorded. (The first pass of a recomputation records
    none either, but it has to compute what the second will: the module is in training mode then.)"""
    return not (module.training or torch.is_grad_enabled())


def transformer_layer(
    layer: TransformerLayer, hidden: Tensor, mask: Tensor | None, table: Tensor | None, context: Tensor | None
) -> Tensor:
    """A layer on hidden states [s, b, h]; `table` as in `elementwise.rotate`, `context` [t, b, h']."""
    update = self_attention(layer.self_attention, layer.input_layernorm(hidden), mask, table)
    hidden = hidden + _normed_behind(layer.self_attn_bda, update)
    if not isinstance(layer.cross_attention, IdentityOp):
        normed = layer.pre_cross_attn_layernorm(hidden)
        hidden = hidden + cross_attention(layer.cross_attention, normed, None, context)
    return hidden + _normed_behind(layer.mlp_bda, feed_forward(layer.mlp, layer.pre_mlp_layernorm(hidden)))


def _normed_behind(add: Callable | nn.Module, update: Tensor) -> Tensor:
    """By the norm of a `norms.NormedResidual`; Megatron's own sum of the residual, a function, has none."""
    return add.norm(update) if isinstance(add, nn.Module) else update


def self_attention(attention: SelfAttention, x: Tensor, mask: Tensor | None, table: Tensor | None) -> Tensor:
    """[s, b, h] -> [s, b, h]; a head of keys lies behind its heads of queries, one of values behind that."""
    s, b, _ = x.shape
    heads = attention.num_query_groups_per_partition, -1, attention.hidden_size_per_attention_head
    mixed = attention.linear_qkv(x)[0].view(s, b, *heads)
    norms = attention.head_norms
    if norms is None and table is not None:
        turned = rotate(mixed[:, :, :, :-1], table.unsqueeze(1))  # of queries and keys at once
        query, key = turned[:, :, :, :-1].flatten(2, 3), turned[:, :, :, -1]
    else:
        query, key = mixed[:, :, :, :-2].flatten(2, 3), mixed[:, :, :, -2]
        if norms is not None:
            query, key = norms[0](query), norms[1](key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
    return attention.linear_proj(attention.core_attention(query, key, mixed[:, :, :, -1], mask))[0]


def cross_attention(attention: CrossAttention, x: Tensor, mask: Tensor | None, context: Tensor) -> Tensor:
    """[s, b, h] reads a context [t, b, h'] -> [s, b, h]."""
    query, key, value = attention.get_query_key_value_tensors(x, context)
    return attention.linear_proj(attention.core_attention(query, key, value, mask))[0]


def feed_forward(mlp: MLP, x: Tensor) -> Tensor:
    """[s, b, h] -> [s, b, h]."""
    return mlp.linear_fc2(mlp.activation_func(mlp.linear_fc1(x)[0]))[0]
