"""From an image file to what an encoder takes: the transform of ImageNet's evaluation, by Pillow.

The shorter side becomes S / `share` pixels (bicubic, antialiased), the centre S x S is cut out, pixels are normalised.
timm's and torchvision's transforms of evaluation compute the same numbers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megamug.data.dali import WHITE, eight_bits, opaque
from megamug.data.pairs.images import SHARE
from megamug.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Preprocessor:
    """`size`: S in pixels. `mean`, `std`: of pixels in 0..1, by channel. `background`: behind transparent pixels."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    share: float = SHARE
    background: Sequence[int] = WHITE

    def __call__(self, images: Image | Tensor | str | Path | bytes | Sequence) -> Tensor:
        """float32 [b, 3, S, S], normalised, from one image or a list: Pillow's, paths, bytes of files, or uint8 tensors
        [3, H, W]. Raises UserError for what is none of these or does not decode."""
        single = not isinstance(images, list | tuple)
        if not single and not images:
            raise UserError("an empty list of images; give one at least")
        return self.normalised(torch.stack([self.pixels(image) for image in ([images] if single else images)]))

    def pixels(self, image: Image | Tensor | str | Path | bytes) -> Tensor:
        """uint8 [3, S, S] of one image."""
        from PIL import Image

        picture = self._opened(image)
        width, height = picture.size
        shorter, size = int(self.size / self.share), self.size
        # the longer side as torchvision and timm round it
        if width <= height:
            target = (shorter, int(shorter * height / width))
        else:
            target = (int(shorter * width / height), shorter)
        if picture.size != target:
            picture = picture.resize(target, Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2.0) for side in target)
        picture = picture.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 3, S, S] -> float32: (x / 255 - mean) / std"""
        mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def _opened(self, image) -> Image:
        """An RGB picture; transparency over `background`, EXIF orientation applied to files."""
        from PIL import Image, ImageOps

        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
                raise UserError(f"an image as a tensor: uint8 [3, H, W] wanted, not {image.dtype} {list(image.shape)}")
            return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        if isinstance(image, Image.Image):
            return self._flat(image)
        name = str(image) if isinstance(image, str | Path) else "an image"
        try:
            if isinstance(image, str | Path):
                image = Path(image).read_bytes()
            if not isinstance(image, bytes):
                raise UserError(f"an image: Pillow's, a path, bytes or a uint8 tensor, not {type(image).__name__}")
            with Image.open(io.BytesIO(opaque(image, self.background))) as opened:
                return self._flat(ImageOps.exif_transpose(opened))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{name} cannot be read: {error}") from None

    def _flat(self, picture: Image) -> Image:
        from PIL import Image

        if picture.mode == "F":
            raise UserError("an image of floating-point numbers: nothing tells what white is; give 8 bits a channel")
        picture = eight_bits(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            flat = Image.new("RGB", picture.size, tuple(self.background))
            flat.paste(picture, mask=picture.getchannel("A"))
            return flat
        return picture.convert("RGB")
