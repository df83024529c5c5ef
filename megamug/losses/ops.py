"""The one door to the compiled losses: loads the libraries built from `csrc/`."""

from __future__ import annotations

from torch import Tensor

from megamug.errors import UserError


def choose(impl: str, *tensors: Tensor | None) -> bool:
    """Whether the compiled kernels take this call."""
    if impl not in ("auto", "compiled", "torch"):
        raise UserError(f"losses: impl must be auto, compiled or torch, not {impl!r}")
    if impl == "compiled":
        raise UserError("losses: the compiled kernels are not built; run `pip install -e .`, or use impl='auto'")
    return False
