"""Initialisation that does not know the layout.

Each number of a parameter is a function of seed, global name and place in the *global* shape (`random_numbers`); every
rank draws its slice of it, on its device. `sharded_state_dict` tells name, global shape and offset, so initialising is
like loading a checkpoint that was never written: any tensor, pipeline or data layout starts from the same numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megamug.checkpoint.fp8_parameters import filling
from megamug.models.random_numbers import Distribution, fill, key_of

# The first rule whose pattern the global name contains decides. Linear weights: Xavier uniform, the fused qkv matrix
# taken as one (MAE); tokens, embeddings and learned positions: normal of standard deviation 0.02 (MAE, GPT-2). Where a
# model gives a standard deviation, both are normal with it, truncated (CM3leon). Gates of cross blocks start at 0.
RULES: list[tuple[str, str]] = [
    (r"(layer_norm_bias|\.bias|\.gate|\.running_mean)$", "zero"),
    (r"(layer_norm_weight|layernorm\.weight|norm\.weight|\.running_var)$", "one"),
    (r"(_token|_tokens|[_.]positions|word_embeddings\.weight|output_layer\.weight)$", "normal"),
    (r"\.weight$", "xavier"),
]
MASS_OF_3 = 0.49865010196836990  # Phi(3) - 1/2: normal numbers are truncated at 3 standard deviations


def distribution_of(name: str, shape: Sequence[int], std: float | None = None) -> Distribution | float:
    """What the parameter `name` of global `shape` is drawn from, or the one value it has. `std`: see `draw`."""
    rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
    assert rule is not None, f"no initialisation rule for parameter {name}"
    if rule in ("zero", "one"):
        return 1.0 if rule == "one" else 0.0
    if std is not None:
        return Distribution(normal=True, scale=std, mass=MASS_OF_3)
    if rule == "normal":
        return Distribution(normal=True, scale=0.02)
    fan_out, fan_in = shape
    return Distribution(normal=False, scale=math.sqrt(6.0 / (fan_in + fan_out)))  # Glorot and Bengio 2010


def draw(name: str, shape: Sequence[int], seed: int, std: float | None = None) -> Tensor:
    """The whole parameter `name` of global `shape`, float32, on the CPU: a pure function of the arguments.

    `std`: linear weights, embeddings and positions are normal with it, truncated at 3 standard deviations.
    """
    return _draw_into(torch.empty(tuple(shape)), name, shape, (0,) * len(shape), seed, std)


def initialise(sharded_state: dict, seed: int, std_of: Callable[[str], float | None] = lambda name: None) -> None:
    """Fills every tensor of a model's `sharded_state_dict` in place; `std_of` gives `draw`'s `std` by global name."""
    with torch.no_grad():
        for entry in sharded_state.values():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                with filling(entry) as open_entry:
                    _fill(open_entry, seed, std_of)


def _fill(entry: ShardedTensor | ShardedTensorFactory, seed: int, std_of: Callable[[str], float | None]) -> None:
    # A gated feed-forward keeps its two projections in one tensor, which a factory cuts into two shards.
    for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
        part = shard.data.view(shard.local_shape)
        _draw_into(part, shard.key, shard.global_shape, shard.global_offset, seed, std_of(shard.key))


def _draw_into(
    out: Tensor, name: str, shape: Sequence[int], offset: Sequence[int], seed: int, std: float | None
) -> Tensor:
    """Fills `out`, a slice at `offset` of the parameter `name` of global `shape`, and returns it."""
    what = distribution_of(name, shape, std)
    return fill(out, key_of(seed, name), what, shape, offset) if isinstance(what, Distribution) else out.fill_(what)
