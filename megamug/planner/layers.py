"""Layers as the planner sees them: parameters, matrix products, what backward keeps, what ranks send.

Everything is per sample (a pair or a row) and for no layout yet. What is kept is what autograd holds on to in our
`local` and `te` layers; tests compare it with what it really holds.

Axes: s tokens, h width, f feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamug.planner.parameters import Count, column_linear, row_linear

# How tensor-parallel ranks share something.
TENSOR = "tensor"  # always
SEQUENCE = "sequence"  # along the tokens, under sequence parallelism
WHOLE = "whole"  # never

# Kinds of elementwise work: norms, residual sums, biases, embeddings and losses; activations; rotary positions and
# norms of heads. How many passes over memory each takes is the execution's (`execution`).
STREAM, GELU, SWIGLU, ROTARY = "stream", "gelu", "swiglu", "rotary"


@dataclass(frozen=True)
class Product:
    """A linear: [rows, inputs] x [inputs, outputs] for a sample. Under tensor parallelism its `split` ("columns",
    "rows", SEQUENCE or WHOLE) is divided. `fp8`: computed in FP8 where that is on."""

    rows: int
    inputs: int
    outputs: int
    split: str
    trained: bool = True
    fp8: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class Attention:
    """Scores and weighted sum, counted as the full square (`megamug.telemetry.flops`)."""

    queries: int
    keys: int
    width: int
    heads: int
    causal: bool

    @property
    def flops(self) -> int:
        return 4 * self.queries * self.keys * self.width


@dataclass(frozen=True)
class Kept:
    """Numbers of a sample that backward needs. `size`: "act" (the run's dtype), "fp8" (a byte where FP8 is on),
    "fp8_copy" (a byte there, else nothing), or bytes. `logits`: belongs to the loss. `constant`: not per sample.
    `not_te`: Transformer Engine does not keep it."""

    numbers: int
    share: str
    size: str | int = "act"
    logits: bool = False
    constant: bool = False
    not_te: bool = False

    def bytes(self, tensor: int, sequence: bool, dtype: int, fp8: bool) -> float:
        """Of one sample on one rank."""
        sizes = {"act": dtype, "fp8": 1 if fp8 else dtype, "fp8_copy": 1 if fp8 else 0}
        size = self.size if isinstance(self.size, int) else sizes[self.size]
        return self.numbers * size / shared(self.share, tensor, sequence)


@dataclass(frozen=True)
class Unit:
    """A layer, embedding, final norm or head. `tensors`: parameters, each a tensor. `moved`: numbers that elementwise
    work reads and writes if each step of it is one pass, as (share, forward, backward, kind). `messages`: numbers
    gathered or scattered forward. `input`: hidden numbers that enter."""

    count: Count
    tensors: int
    trained: bool = True
    products: tuple[Product, ...] = ()
    attentions: tuple[Attention, ...] = ()
    kept: tuple[Kept, ...] = ()
    moved: tuple[tuple[str, int, int, str], ...] = ()
    messages: int = 0
    input: int = 0
    layer: bool = False  # `parallel.recompute=full` computes it again in backward
    chunked_logits: int = 0  # columns whose logits exist for a chunk of tokens at a time


def shared(share: str, tensor: int, sequence: bool) -> int:
    """Among how many ranks."""
    return tensor if share == TENSOR or (share == SEQUENCE and sequence) else 1


@dataclass(frozen=True)
class Shape:
    """Of a transformer layer."""

    width: int
    ffn_width: int
    heads: int
    groups: int
    norm_parameters: int = 2  # of a norm, as a multiple of the width
    head_norm_parameters: int = 0  # of the norms of query and key heads
    per_head: bool = False  # each head has its own of them
    bias: bool = True
    activation: str = "gelu"
    rotary: bool = False

    @property
    def key_value(self) -> int:
        return self.width // self.heads * self.groups

    @property
    def first_width(self) -> int:
        return self.ffn_width * (2 if self.activation == "swiglu" else 1)

    def norm(self, width: int) -> Count:
        return Count(0, self.norm_parameters * width)

    @property
    def head_norm_tensors(self) -> int:
        """Of the norms of queries and keys: weights and, but for RMSNorm, biases."""
        return 2 * (1 if self.norm_parameters == 1 and not self.per_head else 2) * (self.head_norm_parameters > 0)

    def tensors(self, linears: int, norms: int = 1) -> int:
        """Parameters of so many linears and norms."""
        return linears * (1 + self.bias) + norms * self.norm_parameters


def norm_kept(tokens: int, width: int, share: str = SEQUENCE) -> tuple[Kept, ...]:
    """Its input, and mean and deviation of each token in fp32."""
    return Kept(tokens * width, share), Kept(2 * tokens, share, 4)


def _attention(tokens: int, shape: Shape, causal: bool, trained: bool) -> Unit:
    """Norm, self-attention, residual sum."""
    h, kv, kept = shape.width, shape.key_value, [*norm_kept(tokens, shape.width)]
    count = shape.norm(h) + column_linear(h, h + 2 * kv, shape.bias) + row_linear(h, h, shape.bias)
    count += Count(shape.head_norm_parameters) if shape.per_head else Count(0, shape.head_norm_parameters)
    turned = shape.rotary or shape.head_norm_parameters > 0
    # What the first linear gave: where queries and keys are made anew of it, all of it is kept for the values; but
    # Transformer Engine copies those.
    kept += [Kept(tokens * (h + kv), TENSOR, not_te=turned), Kept(tokens * kv, TENSOR)]
    kept += [Kept(tokens * h, TENSOR), Kept(tokens * shape.heads, TENSOR, 4)]
    if turned:
        kept.append(Kept(tokens * (h + kv), TENSOR))
    if shape.groups < shape.heads and (shape.head_norm_parameters or not shape.rotary):
        kept.append(Kept(tokens * h, TENSOR))  # queries lie apart from one another, so they are copied
    if shape.head_norm_parameters:
        kept.append(Kept(2 * tokens * (shape.heads + shape.groups), TENSOR, 4))
    if shape.per_head:  # what their weights multiply
        kept.append(Kept(tokens * (h + kv), TENSOR))
    if trained:
        kept += [Kept(tokens * h, SEQUENCE, "fp8"), Kept(tokens * h, TENSOR, "fp8_copy")]
    passed = tokens * (h + kv) * (2 * shape.rotary + 2 * (shape.head_norm_parameters > 0) + 2 * shape.per_head)
    return Unit(
        count, shape.tensors(2) + shape.head_norm_tensors, trained,
        products=(Product(tokens, h, h + 2 * kv, "columns", trained), Product(tokens, h, h, "rows", trained)),
        attentions=(Attention(tokens, tokens, h, shape.heads, causal),), kept=tuple(kept),
        moved=((SEQUENCE, 5 * tokens * h, 5 * tokens * h, STREAM), (TENSOR, passed, passed, ROTARY)),
        messages=2 * tokens * h,
        input=tokens * h, layer=True,
    )  # fmt: skip


def cross_attention(tokens: int, shape: Shape, context_tokens: int, context_width: int, causal: bool) -> Unit:
    """Norm, cross-attention to a context that somebody else keeps, residual sum."""
    h = shape.width
    count = shape.norm(h) + column_linear(h, h, shape.bias) + column_linear(context_width, 2 * h, shape.bias)
    return Unit(
        count + row_linear(h, h, shape.bias), shape.tensors(3),
        products=(Product(tokens, h, h, "columns"), Product(context_tokens, context_width, 2 * h, "columns"),
                  Product(tokens, h, h, "rows")),
        attentions=(Attention(tokens, context_tokens, h, shape.heads, causal),),
        kept=(*norm_kept(tokens, h), Kept(tokens * h, SEQUENCE, "fp8"), Kept(tokens * h, TENSOR),
              Kept(2 * context_tokens * h, TENSOR), Kept(tokens * h, TENSOR), Kept(tokens * h, TENSOR, "fp8_copy"),
              Kept(tokens * shape.heads, TENSOR, 4)),
        moved=((SEQUENCE, 5 * tokens * h, 5 * tokens * h, STREAM),),
        messages=2 * tokens * h + context_tokens * context_width, input=tokens * h, layer=True,
    )  # fmt: skip


def mlp(tokens: int, shape: Shape, trained: bool) -> Unit:
    """Norm, feed-forward, residual sum. ReLU keeps its result alone, the others their input; the second linear keeps
    its own, the result."""
    h, f, first = shape.width, shape.ffn_width, shape.first_width
    kept = [*norm_kept(tokens, h)]
    if shape.activation == "relu":
        kept += [Kept(tokens * f, TENSOR)] + [Kept(tokens * f, TENSOR, "fp8_copy")] * trained
    else:
        kept += [Kept(tokens * first, TENSOR)] + [Kept(tokens * f, TENSOR, "fp8")] * trained
    kept += [Kept(tokens * h, SEQUENCE, "fp8")] * trained
    return Unit(
        shape.norm(h) + column_linear(h, first, shape.bias) + row_linear(f, h, shape.bias), shape.tensors(2), trained,
        products=(Product(tokens, h, first, "columns", trained), Product(tokens, f, h, "rows", trained)),
        kept=tuple(kept),
        moved=((SEQUENCE, 5 * tokens * h, 5 * tokens * h, STREAM),
               (TENSOR, tokens * (first + f), tokens * (2 * first + f), SWIGLU if first > f else GELU)),
        messages=2 * tokens * h, input=tokens * h, layer=True,
    )  # fmt: skip


def joined(units: list[Unit]) -> Unit:
    """Several as one, which is recomputed as one: its input is that of the first."""
    first = units[0]
    return Unit(
        sum((u.count for u in units), Count()), sum(u.tensors for u in units), first.trained,
        sum((u.products for u in units), ()),
        sum((u.attentions for u in units), ()), sum((u.kept for u in units), ()), sum((u.moved for u in units), ()),
        sum(u.messages for u in units), first.input, first.layer,
    )  # fmt: skip


def layer(tokens: int, shape: Shape, causal: bool, trained: bool = True, context: tuple[int, int] | None = None):
    cross = [cross_attention(tokens, shape, *context, causal=False)] if context else []
    return joined([_attention(tokens, shape, causal, trained), *cross, mlp(tokens, shape, trained)])
