"""`local` layers as functions of their module and hidden states: what training, evaluation and writing run, and what
torch.compile takes whole (`compiled.py`).

Megatron's forward asks at every call for all that a run may have on (offloading, packed sequences, fused communication,
profiling ranges, dropout); with one token at hand that takes as long as the products of a small model, and a compiler
stumbles over it. Here the same modules compute the same things in the same order, and nothing is asked. Tensor and
sequence parallelism are in the linears, caches are in the attention; there is no dropout, and a `local` linear adds its
own bias.

Axes: s tokens, t tokens of a context, b rows, h width, n heads on this rank, g heads of keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megamug.models.blocks.elementwise import rotate


def transformer_layer(
    layer: TransformerLayer, hidden: Tensor, mask: Tensor | None, table: Tensor | None, context: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A layer on hidden states [s, b, h]; `table` as in `elementwise.rotate`, `context` [t, b, h']. `scales` [2, b, 1]:
    what attention and feed-forward add is times this (stochastic depth)."""
    update = _normed_behind(layer.self_attn_bda, self_attention(
        layer.self_attention, layer.input_layernorm(hidden), mask, table
    ))  # fmt: skip
    hidden = hidden + (update if scales is None else update * scales[0])
    if not isinstance(layer.cross_attention, IdentityOp):
        normed = layer.pre_cross_attn_layernorm(hidden)
        hidden = hidden + cross_attention(layer.cross_attention, normed, None, context)
    update = _normed_behind(layer.mlp_bda, feed_forward(layer.mlp, layer.pre_mlp_layernorm(hidden)))
    return hidden + (update if scales is None else update * scales[1])


def _normed_behind(add: Callable | nn.Module, update: Tensor) -> Tensor:
    """By the norm of a `norms.NormedResidual`; Megatron's own sum of the residual, a function, has none."""
    return add.norm(update) if isinstance(add, nn.Module) else update


def self_attention(attention: SelfAttention, x: Tensor, mask: Tensor | None, table: Tensor | None) -> Tensor:
    """[s (/ tp), b, h] -> the same; a head of keys lies behind its heads of queries, one of values behind that."""
    heads = attention.num_query_groups_per_partition, -1, attention.hidden_size_per_attention_head
    mixed = attention.linear_qkv(x)[0]
    mixed = mixed.view(*mixed.shape[:2], *heads)
    queries = mixed.shape[3] - 2  # that share a key
    norms, core = attention.head_norms, attention.core_attention
    if norms is None and table is None and mask is None and core.takes_packed(mixed):
        return attention.linear_proj(core.packed(mixed))[0]
    # Splits, not slices: their gradients are put together in one pass.
    if norms is None and table is not None:
        turned, value = mixed.split([queries + 1, 1], dim=3)
        query, key = rotate(turned, table.unsqueeze(1)).split([queries, 1], dim=3)
    else:
        query, key, value = mixed.split([queries, 1, 1], dim=3)
    query, key, value = (part.flatten(2, 3) for part in (query, key, value))
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
    return attention.linear_proj(core(query, key, value, mask))[0]


def cross_attention(attention: CrossAttention, x: Tensor, mask: Tensor | None, context: Tensor) -> Tensor:
    """[s, b, h] reads a context [t, b, h'] -> [s, b, h]."""
    core = attention.core_attention
    if getattr(attention, "keep", False):  # keys and values of a latent, while a caption is written
        query, key, value = attention.get_query_key_value_tensors(x, context)
        return attention.linear_proj(core(query, key, value, mask))[0]
    heads, width = attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head
    query, mixed = attention.linear_q(x)[0], attention.linear_kv(context)[0]
    query = query.view(*query.shape[:2], heads, width)
    mixed = mixed.view(*mixed.shape[:2], heads, 2, width)
    if mask is None and core.takes_across(query, mixed):
        return attention.linear_proj(core.across(query, mixed))[0]
    key, value = (part.squeeze(3) for part in mixed.split(1, dim=3))
    return attention.linear_proj(core(query, key, value, mask))[0]


def feed_forward(mlp: MLP, x: Tensor) -> Tensor:
    """[s, b, h] -> [s, b, h]."""
    return mlp.linear_fc2(mlp.activation_func(mlp.linear_fc1(x)[0]))[0]
