"""FLOPs of transformer layers, counting matrix products only (a multiply and an add are two).

All functions give forward FLOPs per sequence. Backward needs two products for each of forward, hence `TRAINING` = 3
(Kaplan et al. 2020, section 2.1); recomputed activations are not counted, as MFU is defined (Chowdhery et al. 2022,
appendix B). Attention is counted as the full square also where it is causal, as torch's counter does.
"""

from __future__ import annotations

TRAINING = 3  # forward + backward, as a multiple of forward


def linear_flops(tokens: int, in_width: int, out_width: int) -> int:
    """FLOPs of a linear layer [tokens, in_width] -> [tokens, out_width]; a patch embedding is one, too."""
    return 2 * tokens * in_width * out_width


def attention_flops(
    tokens: int,
    width: int,
    context_tokens: int | None = None,
    context_width: int | None = None,
    key_value_width: int | None = None,
) -> int:
    """FLOPs of an attention block: projections of queries, keys, values and output; scores; weighted sum of values.

    Args:
        tokens: length of the sequence that asks.
        width: its width; also heads x head width.
        context_tokens: length of what it attends to; None: itself.
        context_width: width of what it attends to; None: `width`.
        key_value_width: query groups x head width, where queries share keys; None: `width`.
    """
    context_tokens = tokens if context_tokens is None else context_tokens
    context_width = width if context_width is None else context_width
    key_value_width = width if key_value_width is None else key_value_width
    projections = 2 * linear_flops(tokens, width, width)
    projections += 2 * linear_flops(context_tokens, context_width, key_value_width)
    scores_and_values = 2 * (2 * tokens * context_tokens * width)
    return projections + scores_and_values


def mlp_flops(tokens: int, width: int, ffn_width: int, gated: bool = False) -> int:
    """FLOPs of the feed-forward block; `gated` (SwiGLU) has a second input projection."""
    return (3 if gated else 2) * linear_flops(tokens, width, ffn_width)


def layer_flops(
    tokens: int,
    width: int,
    ffn_width: int,
    context_tokens: int | None = None,
    context_width: int | None = None,
    gated: bool = False,
    key_value_width: int | None = None,
) -> int:
    """FLOPs of a transformer layer: self-attention, cross-attention if there are `context_tokens`, feed-forward.

    `key_value_width` is that of the self-attention.
    """
    flops = attention_flops(tokens, width, key_value_width=key_value_width) + mlp_flops(tokens, width, ffn_width, gated)
    if context_tokens is not None:
        flops += attention_flops(tokens, width, context_tokens, context_width)
    return flops
