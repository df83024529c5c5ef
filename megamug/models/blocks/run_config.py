"""Megatron's configuration of a part of a stack."""

from __future__ import annotations

import copy

from megatron.core.transformer import TransformerConfig


def config_of_run(config: TransformerConfig, first: int, last: int) -> TransformerConfig:
    """The configuration of layers [first, last) of a stack, which to Megatron are a stack of their own.

    Megatron counts a run's layers from 1. So of the layers that FP8 leaves in bf16, at both ends of the *whole* stack,
    it is told those that lie in the run; the same for "first" and "last" wherever else it asks.
    """
    if first == last:
        return config
    run, count = copy.copy(config), last - first
    run.num_layers = count
    if config.first_last_layers_bf16:
        end = config.num_layers - config.num_layers_at_end_in_bf16  # the first layer of those at the end
        run.num_layers_at_start_in_bf16 = min(max(config.num_layers_at_start_in_bf16 - first, 0), count)
        run.num_layers_at_end_in_bf16 = min(max(last - end, 0), count)
    return run
