"""Initialisation that does not know the layout.

Each parameter is drawn over its *global* shape from a generator seeded by (seed, global name); every rank then keeps
its slice. `sharded_state_dict` tells name, global shape and offset, so initialising is like loading a checkpoint that
was never written: any tensor, pipeline or data layout starts from the same numbers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megamug.models.fp8_parameters import filling

# The first rule whose pattern the global name contains decides. Linear weights: Xavier uniform, the fused qkv matrix
# taken as one (MAE); tokens, embeddings and learned positions: normal of standard deviation 0.02 (MAE, GPT-2). Where a
# model gives a standard deviation, both are normal with it, truncated (CM3leon). Gates of cross blocks start at 0.
RULES: list[tuple[str, str]] = [
    (r"(layer_norm_bias|\.bias|\.gate)$", "zero"),
    (r"(layer_norm_weight|layernorm\.weight|norm\.weight)$", "one"),
    (r"(_token|_tokens|[_.]positions|word_embeddings\.weight|output_layer\.weight)$", "normal"),
    (r"\.weight$", "xavier"),
]


def generator_of(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by SHA-256(seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


TRUNCATION = 3  # standard deviations


def draw(name: str, shape: tuple[int, ...], seed: int, std: float | None = None) -> Tensor:
    """The whole parameter `name` of global `shape`, float32: a pure function of the arguments.

    `std`: linear weights, embeddings and positions are normal with it, truncated at 3 standard deviations.
    """
    rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
    assert rule is not None, f"no initialisation rule for parameter {name}"
    if rule == "zero":
        return torch.zeros(shape)
    if rule == "one":
        return torch.ones(shape)
    generator = generator_of(seed, name)
    if std is not None:
        edge = TRUNCATION * std
        return torch.nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -edge, edge, generator=generator)
    if rule == "normal":
        return torch.randn(shape, generator=generator) * 0.02
    fan_out, fan_in = shape
    bound = math.sqrt(6.0 / (fan_in + fan_out))  # Glorot and Bengio 2010
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def initialise(sharded_state: dict, seed: int, std_of: Callable[[str], float | None] = lambda name: None) -> None:
    """Fills every tensor of a model's `sharded_state_dict` in place; `std_of` gives `draw`'s `std` by global name."""
    with torch.no_grad():
        for entry in sharded_state.values():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                with filling(entry) as open_entry:
                    _fill(open_entry, seed, std_of)


def _fill(entry: ShardedTensor | ShardedTensorFactory, seed: int, std_of: Callable[[str], float | None]) -> None:
    # A gated feed-forward keeps its two projections in one tensor, which a factory cuts into two shards.
    shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    whole = draw(shards[0].key, tuple(shards[0].global_shape), seed, std_of(shards[0].key))
    for shard in shards:
        assert shard.key == shards[0].key, (shard.key, shards[0].key)
        part = tuple(
            slice(offset, offset + size) for offset, size in zip(shard.global_offset, shard.local_shape, strict=True)
        )
        shard.data.copy_(whole[part].view(shard.data.shape))
