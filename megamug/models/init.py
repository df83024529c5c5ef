"""Initialisation that does not know the layout.

Each parameter is drawn over its *global* shape from a generator seeded by (seed, global name); every rank then keeps
its slice. `sharded_state_dict` tells name, global shape and offset, so initialising is like loading a checkpoint that
was never written: any tensor, pipeline or data layout starts from the same numbers.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

# The first rule whose pattern the global name contains decides. Linear weights: Xavier uniform, the fused qkv matrix
# taken as one (MAE); tokens, embeddings and learned positions: normal of standard deviation 0.02 (MAE, GPT-2).
RULES: list[tuple[str, str]] = [
    (r"(layer_norm_bias|\.bias)$", "zero"),
    (r"(layer_norm_weight|layernorm\.weight|norm\.weight)$", "one"),
    (r"(_token|_tokens|_positions|word_embeddings\.weight|output_layer\.weight)$", "normal"),
    (r"\.weight$", "xavier"),
]


def generator_of(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by SHA-256(seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The whole parameter `name` of global `shape`, float32."""
    rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
    assert rule is not None, f"no initialisation rule for parameter {name}"
    if rule == "zero":
        return torch.zeros(shape)
    if rule == "one":
        return torch.ones(shape)
    generator = generator_of(seed, name)
    if rule == "normal":
        return torch.randn(shape, generator=generator) * 0.02
    fan_out, fan_in = shape
    bound = math.sqrt(6.0 / (fan_in + fan_out))  # Glorot and Bengio 2010
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def initialise(sharded_state: dict, seed: int) -> None:
    """Fills every tensor of a model's `sharded_state_dict` in place."""
    with torch.no_grad():
        for entry in sharded_state.values():
            if not isinstance(entry, ShardedTensor):
                continue
            whole = draw(entry.key, tuple(entry.global_shape), seed)
            part = tuple(
                slice(offset, offset + size)
                for offset, size in zip(entry.global_offset, entry.local_shape, strict=True)
            )
            entry.data.copy_(whole[part].view(entry.data.shape))
