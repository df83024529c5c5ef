"""The file of an image tokenizer's weights: safetensors, with a checksum of itself in its header."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megamug.errors import UserError

WEIGHTS_FILE = "model.safetensors"
CHECKSUM = "sha256"  # key of the header's metadata


def packed(tensors: dict[str, Tensor]) -> bytes:
    """The content of the file for `tensors` (contiguous, on the CPU), by name."""
    from safetensors.torch import save

    return save(tensors, {CHECKSUM: _checksum(tensors)})


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of the file `path`, by name. Raises `UserError`: missing, damaged, or other numbers than were written
    (where it has a checksum: those of others and of earlier versions have none)."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; an image tokenizer is config.json and {WEIGHTS_FILE}")
    try:
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get(CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dictionary
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); copy it again") from None
    if known is not None and known != _checksum(tensors):
        raise UserError(f"{path}: its numbers do not agree with their checksum; copy it again")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
