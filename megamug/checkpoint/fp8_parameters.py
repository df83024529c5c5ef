"""Weights that live in FP8 (`precision.fp8_parameters`): how they get values, and what of them is worth keeping.

Transformer Engine makes such a weight under `fp8_model_init`; it is rounded to e4m3 and knows its scale. Updates go to
fp32 values that the distributed optimizer holds, and the weight is rounded from them anew. So a value that a weight is
given before the optimizer exists must be kept unrounded until then, or training would start from the rounded one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Entry = ShardedTensor | ShardedTensorFactory


def is_fp8(tensor: object) -> bool:
    """Whether it is one of Transformer Engine's FP8 tensors, of whatever recipe."""
    from megatron.core import fp8_utils

    return fp8_utils.is_float8tensor(tensor)


def set_value(parameter: Tensor, value: Tensor) -> None:
    """Gives a parameter a value; where it is FP8, the value is also kept as it is for the optimizer to come."""
    parameter.copy_(value)
    if is_fp8(parameter):
        # Where Transformer Engine keeps what a weight was initialised with, and Megatron's optimizer looks for it.
        parameter._high_precision_init_val = value.detach().to("cpu", parameter.dtype)


def unrounded(entry: Entry) -> Entry:
    """An entry of a sharded state whose tensor can be written by slices: itself, or with an empty bf16 tensor."""
    if not is_fp8(entry.data):
        return entry
    shape, dtype, device = entry.data.shape, entry.data.dtype, entry.data.device
    return dataclasses.replace(entry, data=torch.empty(shape, dtype=dtype, device=device))


@contextmanager
def filling(entry: Entry) -> Iterator[Entry]:
    """Inside, the tensor of the entry that is given is filled; after that the parameter of `entry` has its value."""
    open_entry = unrounded(entry)
    yield open_entry
    if open_entry is not entry:
        set_value(entry.data, open_entry.data)
