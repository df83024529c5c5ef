"""Building blocks under Megatron's TransformerLayer: norm, attention, linears, and a run of layers of a larger stack.

Axes: s sequence, b batch, h width, n heads, d head width. Hidden states are [s, b, h]; under sequence parallelism each
tensor-parallel rank holds s / tp of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from megamug.models.attention import cpu as cpu_attention
from megamug.models.attention import documents
from megamug.models.attention import gpu as gpu_attention
from megamug.models.blocks import cpu_linear, functional
from megamug.models.blocks.elementwise import rotated
from megamug.models.blocks.norms import HeadNorm
from megamug.models.blocks.run_config import config_of_run


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis.

    Under sequence parallelism every rank sees a part of the sequence, so the parameters are marked
    `sequence_parallel`: Megatron then sums their gradients over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps, self.kind = eps, config.normalization
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if self.kind == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "LayerNorm":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class KeyValueCache:
    """Keys and values [t, b, n, d] of the t tokens so far, in memory for `capacity` of them."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.stores: tuple[Tensor, ...] = ()

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Takes the next tokens' keys and values [s, b, n, d]; returns those of all tokens."""
        if not self.stores:
            self.stores = tuple(x.new_empty(self.capacity, *x.shape[1:]) for x in (key, value))
        first, self.length = self.length, self.length + len(key)
        assert self.length <= self.capacity, (self.length, self.capacity)
        for store, new in zip(self.stores, (key, value), strict=True):
            store[first : self.length] = new
        return tuple(store[: self.length] for store in self.stores)


class LocalAttention(nn.Module):
    """softmax(q k / sqrt(d)) v, no score matrix in memory: by the kernels of `csrc/` where they pay, or by torch."""

    cache: KeyValueCache | None = None  # while text is written token by token

    def __init__(self, config, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **_):
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **_) -> Tensor:
        """query [s, b, n, d], key and value [t, b, g, d] -> [s, b, n * d]; n / g queries share a key.

        `attention_mask` [b, 1, s, t] bool hides where it is True, as Megatron's masks do, and then has to hide what is
        later, too. Or it says which documents do not read each other (and nothing that is later) as
        `documents.for_attention` does: int32 [b, s], each a run of one number, or where they begin, int32 [N + 1].
        Cross-attention to a latent has none; its callers pass None.
        """
        dropped = self.dropout if self.training else 0.0
        if documents.are_starts(attention_mask):
            assert self.cache is None, "documents are kept apart in whole rows alone"
            return documents.attention(query, key, value, attention_mask, dropped)
        if self.cache is not None:
            key, value = self.cache.append(key, value)
        # One query against cached keys sees all of them: causality is in what the cache holds.
        causal = self.causal and len(query) > 1
        fits = attention_mask is not None or not causal or len(query) == len(key)
        assert fits, "several tokens at once only into an empty cache"
        numbers = attention_mask if attention_mask is not None and attention_mask.dtype == torch.int32 else None
        if attention_mask is numbers and not dropped and cpu_attention.pays(query):
            return cpu_attention.attention(query, key, value, causal or numbers is not None, numbers)
        if numbers is not None:
            attention_mask = document_mask(numbers)
        if attention_mask is not None:
            return self._attend(query, key, value, attn_mask=attention_mask.logical_not())
        return self._attend(query, key, value, is_causal=causal)

    @property
    def _plain(self) -> bool:
        return self.cache is None and not (self.dropout and self.training)

    def takes_packed(self, mixed: Tensor) -> bool:
        """Whether `packed` is there for a packed projection [s, b, g, queries + 2, d], and faster than `forward`."""
        return self._plain and mixed.shape[3] == 3 and gpu_attention.pays(mixed, self.causal)

    def packed(self, mixed: Tensor) -> Tensor:
        """The same of queries, keys and values side by side, [s, b, n, 3, d] -> [s, b, n * d]."""
        return gpu_attention.packed_attention(mixed, self.causal)

    def takes_across(self, query: Tensor, mixed: Tensor) -> bool:
        """Whether `across` is there for queries [s, b, n, d] and a packed context [t, b, n, 2, d]."""
        return self._plain and not self.causal and gpu_attention.pays_across(query, mixed)

    def across(self, query: Tensor, mixed: Tensor) -> Tensor:
        """The same of queries and a context's keys and values side by side -> [s, b, n * d]."""
        return gpu_attention.cross_attention(query, mixed)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask) -> Tensor:
        s, b, n, d = query.shape
        if s == 1 and not mask.get("is_causal") and "attn_mask" not in mask:
            # The queries that share a key stand in the place of the tokens: no key is copied for each of them.
            query = query.reshape(b, key.shape[2], -1, d)
        else:
            if key.shape[2] != n:
                key, value = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (key, value))
            query = query.permute(1, 2, 0, 3)
        dropout = self.dropout if self.training else 0.0
        key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        with kernel_order() if query.is_cuda and not torch.compiler.is_compiling() else nullcontext():
            context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, **mask)
        if s == 1:
            return context.reshape(1, b, n * d)
        return context.permute(2, 0, 1, 3).reshape(s, b, n * d)


def kernel_order() -> AbstractContextManager:
    """Inside, torch's attention on a GPU takes cuDNN's kernels where they can be had: on Hopper they take half of the
    time of its FlashAttention-2 (docs/benchmarks/gpu.md), and leave the result as Megatron wants it, [s, b, n, d]."""
    kinds = SDPBackend
    order = [kinds.CUDNN_ATTENTION, kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.MATH]
    return sdpa_kernel(order, set_priority=True)


def document_mask(numbers: Tensor) -> Tensor:
    """Document numbers [b, s] -> bool [b, 1, s, s], True where a token may not look: at another document, or ahead."""
    s = numbers.shape[1]
    ahead = torch.ones(s, s, dtype=torch.bool, device=numbers.device).triu(1)
    return (numbers.unsqueeze(1) != numbers.unsqueeze(2)).logical_or_(ahead).unsqueeze(1)


def _alone(linear: ColumnParallelLinear | RowParallelLinear) -> bool:
    """Whether one rank has the whole weight, so that nothing is left of Megatron's linear but a product."""
    return linear.tp_group.size() == 1 and not linear.config.gradient_accumulation_fusion


class LocalColumnParallelLinear(ColumnParallelLinear):
    """ColumnParallelLinear that adds its bias itself, on one rank inside the matrix product (one pass less).

    Callers that ask for `skip_bias_add` get `None` for the bias and so have nothing left to add.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "skip_bias_add": False})
        self.alone = _alone(self)

    def forward(self, input_: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if not self.alone:
            return super().forward(input_, weight)
        return cpu_linear.linear(input_, self.weight if weight is None else weight, self.bias), None


class LocalRowParallelLinear(RowParallelLinear):
    """RowParallelLinear that adds its bias itself, on one rank inside the matrix product."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "skip_bias_add": False})
        self.alone = _alone(self)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.alone:
            return super().forward(input_)
        return cpu_linear.linear(input_, self.weight, self.bias), None


@cache
def context_linear(base: type, context_width: int) -> type:
    """A column-parallel linear class for keys and values whose input is a context of another width than the layer's:
    one for each width, since a compilation is made for classes."""

    class ContextColumnParallelLinear(base):
        def __init__(self, input_size: int, output_size: int, **kwargs):
            super().__init__(context_width, output_size, **kwargs)

    return ContextColumnParallelLinear


class RotarySelfAttention(SelfAttention):
    """Self-attention that turns queries and keys itself, by the table of `TowerPlan.rotary` that it gets under
    Megatron's name `rotary_pos_emb` (for Megatron's own these would be angles); without one it is Megatron's."""

    table: Tensor | None = None  # of the forward that runs
    by_rows = False  # whether its attention reads row after row (`documents`): turned heads are then written so

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.elementwise_function: Callable[..., Tensor] = rotated  # `compiled` replaces it

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, rotary_pos_emb=None, **more):
        self.table, self.by_rows = rotary_pos_emb, documents.are_starts(attention_mask)
        return super().forward(hidden_states, attention_mask, **more)

    def get_query_key_value_tensors(self, *args, **kwargs):
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self.head_norms is not None and self.q_layernorm is None:  # Megatron's own have been
            query, key = (norm(x) for norm, x in zip(self.head_norms, (query, key), strict=True))
        if self.table is not None:
            function = self.elementwise_function if self.training and torch.is_grad_enabled() else rotated
            query, key = (function(None, x, self.table, self.by_rows) for x in (query, key))
        return query, key, value

    @property
    def head_norms(self) -> tuple[nn.Module, nn.Module] | None:
        """Of queries and of keys, where there are some."""
        return None if self.q_layernorm is None else (self.q_layernorm, self.k_layernorm)


class HeadNormSelfAttention(RotarySelfAttention):
    """Self-attention with norms for each query head and key head.

    They are not Megatron's `q_layernorm` and `k_layernorm`: it takes those for the same on all tensor-parallel ranks
    and sums their gradients (`finalize_model_grads`), where each rank has norms of its own heads here."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.query_norm = HeadNorm(config, config.num_attention_heads)
        self.key_norm = HeadNorm(config, config.num_query_groups)

    @property
    def head_norms(self) -> tuple[nn.Module, nn.Module]:
        return self.query_norm, self.key_norm


class LatentCrossAttention(CrossAttention):
    """Cross-attention to a latent that does not change while a caption is written: its keys and values can be kept."""

    kept: tuple[Tensor, Tensor] | None = None  # keys and values [t, b, n, d] of the latent, while generating
    keep = False

    def get_query_key_value_tensors(self, hidden_states: Tensor, key_value_states: Tensor, *args, **kwargs):
        if not self.keep:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, *args, **kwargs)
        if self.kept is None:
            query, *self.kept = super().get_query_key_value_tensors(hidden_states, key_value_states, *args, **kwargs)
        else:
            query, _ = self.linear_q(hidden_states)
            query = query.view(*query.shape[:-1], -1, self.hidden_size_per_attention_head)
        return query, *self.kept


@contextmanager
def key_value_cache(model: nn.Module, capacity: int) -> Iterator[None]:
    """Inside, a forward of `model` takes only the tokens that follow those of the forwards before it: causal
    self-attention appends to what it has seen (`capacity` tokens at most), the latent is `kept_latent`. One batch and
    one latent per use; layers must be `local`."""
    own = [m for m in model.modules() if isinstance(m, LocalAttention) and m.causal]
    assert own and not any(m.cache for m in own), "no `local` causal attention, or a cache inside a cache"
    try:
        for attention in own:
            attention.cache = KeyValueCache(capacity)
        with kept_latent(model):
            yield
    finally:
        for attention in own:
            attention.cache = None


@contextmanager
def kept_latent(model: nn.Module) -> Iterator[None]:
    """Inside, cross-attention keeps the keys and values of the first forward's latent, the only one of this use."""
    cross = [m for m in model.modules() if isinstance(m, LatentCrossAttention)]
    try:
        for attention in cross:
            attention.keep = True
        yield
    finally:
        for attention in cross:
            attention.keep, attention.kept = False, None


class ResPostNormLayer(TransformerLayer):
    """A layer whose residual sums are `norms.NormedResidual`. Megatron runs them with gradients on, also where the
    caller has switched them off: with parameters in them, that would keep a graph of all layers while nothing is
    trained."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = nullcontext


class LayerRun(TransformerBlock):
    """Layers [first, last) of a stack of `config.num_layers`, as one pipeline stage holds them.

    Checkpoint and initialisation names carry a layer's number in the whole stack, so they do not depend on the stage.
    `final_norm` stands after the last layer.
    """

    def __init__(self, config, layer_specs: list, norm, first: int, last: int, final_norm: bool = True):
        self.first_layer = first
        super().__init__(
            config=config_of_run(config, first, last),
            spec=TransformerBlockSubmodules(layer_specs=layer_specs[first:last], layer_norm=norm),
            post_layer_norm=final_norm,
            pre_process=True,
            post_process=final_norm and first < last == config.num_layers,
        )
        self.local = all(isinstance(layer.self_attention.core_attention, LocalAttention) for layer in self.layers)
        self.layer_function: Callable[..., Tensor] = functional.transformer_layer  # `compiled` replaces it

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, context: Tensor | None = None, rotary_pos_emb=None,
        scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[s (/ tp), b, h] -> the same; what the layers need besides is that of `functional.transformer_layer`, and
        `scales` [layers of the whole stack, 2, b, 1] for each of them."""
        if not self.local:
            assert scales is None, "only `local` layers have stochastic depth"
            return super().forward(hidden_states, attention_mask, context=context, rotary_pos_emb=rotary_pos_emb)
        for state in self.states(hidden_states, attention_mask, context, rotary_pos_emb, scales):
            hidden_states = state
        return hidden_states if self.final_layernorm is None else self.final_layernorm(hidden_states)

    def states(
        self, hidden_states: Tensor, attention_mask=None, context=None, rotary_pos_emb=None, scales=None
    ) -> Iterator[Tensor]:
        """What stands behind each of the layers, which are `local`, before any norm. Arguments as `forward`."""
        training = self.training and torch.is_grad_enabled()
        again = training and self.config.recompute_granularity == "full"
        function = self.layer_function if training else functional.transformer_layer
        for number, layer in enumerate(self.layers, start=self.first_layer):
            arguments = layer, hidden_states, attention_mask, rotary_pos_emb, context
            if scales is not None:
                arguments = *arguments, scales[number]
            yield (hidden_states := recomputed(function, *arguments) if again else function(*arguments))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
        from megatron.core.transformer.utils import sharded_state_dict_default

        state: dict = {}
        for index, layer in enumerate(self.layers):
            local, name = f"{prefix}layers.{index}.", f"{prefix}layers.{self.first_layer + index}."
            shards = layer.sharded_state_dict(local, (), metadata)
            replace_prefix_for_sharding(shards, local, name)
            state.update(shards)
        if self.final_layernorm is not None:
            # Without the group Megatron takes every rank for the first, and each would write the replicated tensor.
            norm = sharded_state_dict_default(
                self.final_layernorm, f"{prefix}final_layernorm.", (), metadata, tp_group=self.tp_group
            )
            state.update(norm)
        return state


def recomputed(function: Callable[..., Tensor], *arguments) -> Tensor:
    """What `function` returns; backward computes it once more instead of keeping what it needs. Nothing here is random,
    so no generator's state is kept either."""
    taken = getattr(function, "taken", None)  # of `compiled`: which one it is has to be settled before
    function = function if taken is None else taken(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def replicated(module: nn.Module, partial_gradient: bool) -> nn.Module:
    """Marks a module that every tensor-parallel rank holds whole.

    `partial_gradient`: each rank feeds it another part of the sequence, so its gradients are summed over the ranks.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = partial_gradient
    return module
