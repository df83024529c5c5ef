"""Attention of short sequences on a GPU by the kernels of `csrc/cuda/attention.cuh`, on the packed projection as it is.

The sequences of a masked autoencoder have 50 to 270 tokens: a head of one is whole in the shared memory of a
multiprocessor, so that forward reads query, key and value once and writes the context, and backward reads once what it
needs and writes the gradient of the packed projection, with nothing to concatenate. Operators
`megamug::packed_attention_forward` and `packed_attention_backward`; on a CPU the formula below stands behind them.

Axes: s tokens, b sequences, n heads, d width of a head. `mixed` [s, b, n, 3, d] is the packed projection as Megatron
lays it out where each head of queries has its own keys: a head's query, key and value side by side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megamug.losses import ops
from megamug.models import cpu_attention

LONGEST = {32: 288, 64: 256, 80: 128, 96: 128, 128: 128}  # width of a head: tokens of a sequence at most
_DTYPES = (torch.bfloat16, torch.float16)


def pays(mixed: Tensor, causal: bool) -> bool:
    """Whether the kernels take this packed projection [s, b, n, 3, d]; shapes and types decide, nothing is computed.

    A causal sequence of more than 128 tokens is left to torch, whose kernels skip what lies ahead in larger blocks.
    """
    if mixed.device.type != "cuda" or not ops.libraries().cuda or mixed.dtype not in _DTYPES:
        return False
    s, width = mixed.shape[0], mixed.shape[-1]
    if width not in LONGEST or not 0 < s <= (min(128, LONGEST[width]) if causal else LONGEST[width]):
        return False
    return mixed.is_contiguous() and _has_room(mixed.device.index)


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
    query, key, value = mixed.unbind(3)
    if cpu_attention.pays(query):
        return cpu_attention.attention(query, key, value, causal)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).permute(2, 0, 1, 3).flatten(2)


# ---- the formula: what the kernels are tested against, and what the operators do on a CPU ----


def forward_torch(mixed: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """[s, b, n, 3, d] -> context [s, b, n * d] in its dtype, logsumexp of the scores [b, n, s] float32."""
    _, _, value = _parts(mixed)
    scores = _scores(mixed, causal, scale)
    context = (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)
    return context.to(mixed.dtype).contiguous(), scores.logsumexp(-1).float()


def backward_torch(
    gradient: Tensor, mixed: Tensor, context: Tensor, logsumexp: Tensor, causal: bool, scale: float
) -> Tensor:
    """The gradient of `mixed`, from that of the context and what forward took and gave."""
    query, key, value = _parts(mixed)
    s, b, n, _, d = mixed.shape
    gradient, context = (x.view(s, b, n, d).permute(1, 2, 0, 3).to(query.dtype) for x in (gradient, context))
    probabilities = (_scores(mixed, causal, scale) - logsumexp.unsqueeze(-1)).exp()
    mean = (gradient * context).sum(-1, keepdim=True)  # of the probabilities' gradients, under the probabilities
    slopes = probabilities * (gradient @ value.transpose(2, 3) - mean) * scale
    parts = slopes @ key, slopes.transpose(2, 3) @ query, probabilities.transpose(2, 3) @ gradient
    return torch.stack([x.permute(2, 0, 1, 3) for x in parts], dim=3).to(mixed.dtype)


def _parts(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [b, n, s, d] in float32, or wider if they are."""
    return mixed.to(torch.promote_types(mixed.dtype, torch.float32)).permute(3, 1, 2, 0, 4).unbind(0)


def _scores(mixed: Tensor, causal: bool, scale: float) -> Tensor:
    query, key, _ = _parts(mixed)
    scores = query @ key.transpose(2, 3) * scale
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    return scores


# ---- registration ----


def _setup(ctx, inputs, output) -> None:
    mixed, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(mixed, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient: Tensor | None, _):
    if gradient is None:
        return None, None, None
    # Rows have to begin at multiples of 16 bytes; the gradient of a sum, say, is one number everywhere.
    steps = (gradient.storage_offset(), *gradient.stride()[:-1])
    if gradient.stride(-1) != 1 or any(step % 8 for step in steps):
        gradient = gradient.contiguous()
    backward = torch.ops.megamug.packed_attention_backward
    return backward(gradient, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


def _register() -> None:
    library = torch.library

    @library.register_fake("megamug::packed_attention_forward")
    def _(mixed, *_):
        s, b, n, _three, d = mixed.shape
        return mixed.new_empty((s, b, n * d)), mixed.new_empty((b, n, s), dtype=torch.float32)

    @library.register_fake("megamug::packed_attention_backward")
    def _(gradient, mixed, *_):
        return mixed.new_empty(mixed.shape)

    library.impl("megamug::packed_attention_forward", "cpu", forward_torch)
    library.impl("megamug::packed_attention_backward", "cpu", backward_torch)
    library.register_autograd("megamug::packed_attention_forward", _backward, setup_context=_setup)

    # What torch.utils.flop_counter counts, as it does for torch's own attention: two products, five in backward.
    @register_flop_formula(torch.ops.megamug.packed_attention_forward)
    def _(mixed_shape, *_, **__) -> int:
        s, b, n, _three, d = mixed_shape
        return 2 * 2 * s * s * b * n * d

    @register_flop_formula(torch.ops.megamug.packed_attention_backward)
    def _(_, mixed_shape, *__, **___) -> int:
        s, b, n, _three, d = mixed_shape
        return 5 * 2 * s * s * b * n * d


if ops.libraries().cpu:  # which has the schemas
    _register()
