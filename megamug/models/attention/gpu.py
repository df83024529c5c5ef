"""Attention of short sequences on a GPU by the kernels of `csrc/cuda/attention.cuh`, on the packed projection as it is.

The sequences of a masked autoencoder have 50 to 270 tokens: a head of one is whole in the shared memory of a
multiprocessor, so that forward reads query, key and value once and writes the context, and backward reads once what it
needs and writes the gradient of the packed projection, with nothing to concatenate. Operators
`megamug::packed_attention_forward` and `packed_attention_backward`; on a CPU the formula below stands behind them.

Axes: s tokens, t tokens of a context that is read, b sequences, n heads, d width of a head. `mixed` [s, b, n, 3, d] is
the packed projection as Megatron lays it out where each head of queries has its own keys: a head's query, key and value
side by side; in cross-attention [t, b, n, 2, d], its key and value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megamug.losses import ops
from megamug.models.attention import cpu as cpu_attention

LONGEST = {32: 288, 64: 256, 80: 128, 96: 128, 128: 128}  # width of a head: tokens of a sequence at most
_DTYPES = (torch.bfloat16, torch.float16)
_used = True


@contextmanager
def torch_instead() -> Iterator[None]:
    """Inside, the kernels take nothing: what they compute can be held against torch's."""
    global _used
    before, _used = _used, False
    try:
        yield
    finally:
        _used = before


def give_up() -> None:
    """The kernels take nothing from now on."""
    global _used
    _used = False


def pays(mixed: Tensor, causal: bool) -> bool:
    """Whether the kernels take this packed projection [s, b, n, 3, d]; shapes and types decide, nothing is computed.

    A causal sequence of more than 128 tokens is left to torch, whose kernels skip what lies ahead in larger blocks.
    """
    return (not causal or mixed.shape[0] <= 128) and _taken(mixed)


def pays_across(query: Tensor, mixed: Tensor) -> bool:
    """The same of cross-attention: queries [s, b, n, d] that read the keys and values [t, b, n, 2, d]."""
    return _taken(query) and _taken(mixed) and query.dtype == mixed.dtype


def _taken(heads: Tensor) -> bool:
    """Whether tokens [s, ..., d] are on a GPU that has the kernels, and of a size and type that these take."""
    if heads.device.type != "cuda" or not _used or not ops.libraries().cuda or heads.dtype not in _DTYPES:
        return False
    s, width = heads.shape[0], heads.shape[-1]
    return 0 < s <= LONGEST.get(width, 0) and heads.is_contiguous() and _has_room(heads.device.index)


@torch.compiler.assume_constant_result
def _has_room(device: int) -> bool:
    """Whether a block of this GPU may have the 160 KB of shared memory that the longest sequences need."""
    major, minor = torch.cuda.get_device_capability(device)
    return major in (9, 10) or (major, minor) == (8, 0)


def packed_attention(mixed: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of a packed projection [s, b, n, 3, d] -> [s, b, n * d], differentiable.

    By the kernels where `pays` says so, by the CPU's kernels or torch's scaled_dot_product_attention elsewhere.
    bfloat16 and float16 are summed in float32. `causal`: query i sees keys 0 to i.
    """
    if pays(mixed, causal):
        return torch.ops.megamug.packed_attention_forward(mixed, causal, mixed.shape[-1] ** -0.5)[0]
    return _elsewhere(*mixed.unbind(3), causal)


def cross_attention(query: Tensor, mixed: Tensor) -> Tensor:
    """The same of queries [s, b, n, d] that read all of the keys and values [t, b, n, 2, d] -> [s, b, n * d]."""
    if pays_across(query, mixed):
        return torch.ops.megamug.cross_attention_forward(query, mixed, query.shape[-1] ** -0.5)[0]
    return _elsewhere(query, *mixed.unbind(3), False)


def _elsewhere(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    if cpu_attention.pays(query):
        return cpu_attention.attention(query, key, value, causal)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).permute(2, 0, 1, 3).flatten(2)


# ---- the formula: what the kernels are tested against, and what the operators do on a CPU ----


def forward_torch(mixed: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """[s, b, n, 3, d] -> context [s, b, n * d] in its dtype, logsumexp of the scores [b, n, s] float32."""
    return _forward_torch(*mixed.unbind(3), causal, scale)


def cross_forward_torch(query: Tensor, mixed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[s, b, n, d], [t, b, n, 2, d] -> context [s, b, n * d], logsumexp [b, n, s]."""
    return _forward_torch(query, *mixed.unbind(3), False, scale)


def backward_torch(
    gradient: Tensor, mixed: Tensor, context: Tensor, logsumexp: Tensor, causal: bool, scale: float
) -> Tensor:
    """The gradient of `mixed`, from that of the context and what forward took and gave."""
    return torch.stack(_backward_torch(gradient, *mixed.unbind(3), context, logsumexp, causal, scale), dim=3)


def cross_backward_torch(
    gradient: Tensor, query: Tensor, mixed: Tensor, context: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of `query` and `mixed`."""
    of_query, *others = _backward_torch(gradient, query, *mixed.unbind(3), context, logsumexp, False, scale)
    return of_query.contiguous(), torch.stack(others, dim=3)


def _forward_torch(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, causal, scale)
    context = (scores.softmax(-1) @ _by_heads(value)).permute(2, 0, 1, 3).flatten(2)
    return context.to(query.dtype).contiguous(), scores.logsumexp(-1).float()


def _backward_torch(gradient, query, key, value, context, logsumexp, causal, scale) -> list[Tensor]:
    """The gradients of query, key and value [s or t, b, n, d], in their dtype."""
    gradient, context = (_by_heads(x.view(query.shape)) for x in (gradient, context))
    probabilities = (_scores(query, key, causal, scale) - logsumexp.unsqueeze(-1)).exp()
    mean = (gradient * context).sum(-1, keepdim=True)  # of the probabilities' gradients, under the probabilities
    slopes = probabilities * (gradient @ _by_heads(value).transpose(2, 3) - mean) * scale
    of_query, of_key = slopes @ _by_heads(key), slopes.transpose(2, 3) @ _by_heads(query)
    of_value = probabilities.transpose(2, 3) @ gradient
    return [x.permute(2, 0, 1, 3).to(query.dtype) for x in (of_query, of_key, of_value)]


def _by_heads(x: Tensor) -> Tensor:
    """[s, b, n, d] -> [b, n, s, d] in float32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).permute(1, 2, 0, 3)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    scores = _by_heads(query) @ _by_heads(key).transpose(2, 3) * scale
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    return scores


# ---- registration ----


def _setup(ctx, inputs, output) -> None:
    mixed, ctx.causal, ctx.scale = inputs
    _save(ctx, mixed, *output)


def _cross_setup(ctx, inputs, output) -> None:
    query, mixed, ctx.scale = inputs
    _save(ctx, query, mixed, *output)


def _save(ctx, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(tensors[-1])  # the logsumexp
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient: Tensor | None, _):
    if gradient is None:
        return None, None, None
    backward = torch.ops.megamug.packed_attention_backward
    return backward(_with_rows(gradient), *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


def _cross_backward(ctx, gradient: Tensor | None, _):
    if gradient is None:
        return None, None, None
    backward = torch.ops.megamug.cross_attention_backward
    return *backward(_with_rows(gradient), *ctx.saved_tensors, ctx.scale), None


def _with_rows(gradient: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes, as the kernels read; the gradient of a sum, say, is one number."""
    steps = (gradient.storage_offset(), *gradient.stride()[:-1])
    if gradient.stride(-1) != 1 or any(step % 8 for step in steps):
        return gradient.contiguous()
    return gradient


def _register() -> None:
    library = torch.library

    @library.register_fake("megamug::packed_attention_forward")
    def _(mixed, *_):
        s, b, n, _three, d = mixed.shape
        return mixed.new_empty((s, b, n * d)), mixed.new_empty((b, n, s), dtype=torch.float32)

    @library.register_fake("megamug::packed_attention_backward")
    def _(gradient, mixed, *_):
        return mixed.new_empty(mixed.shape)

    @library.register_fake("megamug::cross_attention_forward")
    def _(query, *_):
        s, b, n, d = query.shape
        return query.new_empty((s, b, n * d)), query.new_empty((b, n, s), dtype=torch.float32)

    @library.register_fake("megamug::cross_attention_backward")
    def _(gradient, query, mixed, *_):
        return query.new_empty(query.shape), mixed.new_empty(mixed.shape)

    for name, function in (
        ("packed_attention_forward", forward_torch),
        ("packed_attention_backward", backward_torch),
        ("cross_attention_forward", cross_forward_torch),
        ("cross_attention_backward", cross_backward_torch),
    ):
        library.impl(f"megamug::{name}", "cpu", function)
    library.register_autograd("megamug::packed_attention_forward", _backward, setup_context=_setup)
    library.register_autograd("megamug::cross_attention_forward", _cross_backward, setup_context=_cross_setup)

    # What torch.utils.flop_counter counts, as it does for torch's own attention: two products, five in backward.
    def operations(queries: int, packed_shape) -> int:
        t, b, n, _parts, d = packed_shape
        return 2 * queries * t * b * n * d

    @register_flop_formula(torch.ops.megamug.packed_attention_forward)
    def _(mixed_shape, *_, **__) -> int:
        return 2 * operations(mixed_shape[0], mixed_shape)

    @register_flop_formula(torch.ops.megamug.packed_attention_backward)
    def _(_, mixed_shape, *__, **___) -> int:
        return 5 * operations(mixed_shape[0], mixed_shape)

    @register_flop_formula(torch.ops.megamug.cross_attention_forward)
    def _(query_shape, mixed_shape, *_, **__) -> int:
        return 2 * operations(query_shape[0], mixed_shape)

    @register_flop_formula(torch.ops.megamug.cross_attention_backward)
    def _(_, query_shape, mixed_shape, *__, **___) -> int:
        return 5 * operations(query_shape[0], mixed_shape)


if ops.libraries().cpu:  # which has the schemas
    _register()
