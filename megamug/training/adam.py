"""Whose AdamW updates the parameters: Transformer Engine's, apex's or torch's. One kernel for many tensors, all three.

Megatron takes the first of them that it can import, also where there is no GPU to run it on. Here it takes the one
that was chosen: torch's, unless another is asked for. Theirs are as fast on the device, but they take the host longer
and want the norm of the gradients from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megamug.errors import UserError

MODULES = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}  # both have a FusedAdam
NAMES = {"te": "Transformer Engine's FusedAdam", "apex": "apex's FusedAdam", "torch": "torch's fused AdamW"}


def choose(requested: str) -> tuple[str, type | None, str]:
    """Resolves `optimizer.fused`: ("te" | "apex" | "torch", its class (None: torch's), reason).

    Raises UserError where one is named that cannot be had.
    """
    if requested == "torch":
        return "torch", None, "optimizer.fused=torch"
    if requested == "auto":
        return "torch", None, "clips and skips on the device, so that the host does not wait for the gradient norm"
    if not torch.cuda.is_available():
        raise UserError(f"optimizer.fused({requested}) needs a GPU and this machine has none that torch sees;"
                        f" set optimizer.fused=auto")
    module = MODULES[requested]
    try:
        found = importlib.import_module(module).FusedAdam
    except (ImportError, AttributeError) as error:
        raise UserError(f"optimizer.fused({requested}) cannot be imported from {module} ({error}); set"
                        f" optimizer.fused=auto") from error
    return requested, found, f"optimizer.fused={requested}"


@contextmanager
def used_by_megatron(adam: type | None) -> Iterator[None]:
    """Inside, Megatron builds its optimizers on the class `adam` (None: torch's AdamW)."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    before = optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam
    chosen = adam or torch.optim.AdamW
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam = chosen, adam is None, chosen
    try:
        yield
    finally:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam = before
