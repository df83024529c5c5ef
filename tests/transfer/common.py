"""Runs of small random encoders, and photographs as files have them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megamug.checkpoint.tensors import LazyTensor, write_run
from megamug.configuration.reading import load_config, resolve
from megamug.transfer.encoder import VisionEncoder, global_names

SIZE, PATCH, WIDTH, LAYERS = 32, 8, 32, 3
SIZES = (
    f"data.image_size={SIZE} model.patch_size={PATCH} model.width={WIDTH} model.layers={LAYERS} model.heads=4 "
    "model.ffn_width=64 model.image_loss_weight=0 model.caption_loss_weight=0"
).split()


def write_encoder(folder: Path, *overrides: str, seed: int = 3) -> Path:
    """A run folder whose encoder is random everywhere, norms and biases included."""
    config = resolve(load_config(None, [*SIZES, *overrides]))
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in VisionEncoder(config).named_parameters()}
    tensors = []
    for mine, name in global_names(config.model).items():
        noise = torch.randn(shapes[mine], generator=generator)
        if mine.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
            value = 1 + 0.1 * noise
        else:
            value = (0.1 if noise.dim() == 1 else noise[0].numel() ** -0.5) * noise
        tensors.append(LazyTensor(name, tuple(value.shape), value.dtype, lambda value=value: value))
    write_run(folder, config, tensors)
    return folder


def photograph(width: int, height: int, seed: int = 0, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """A smooth random picture as the bytes of a file."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (5, 5, len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small, mode).resize((width, height), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()
