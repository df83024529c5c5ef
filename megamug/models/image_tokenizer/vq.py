"""Vector quantisation (van den Oord et al. 2017, "Neural discrete representation learning").

Axes: n latents, K codes, w width of a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DISTANCES = 1 << 25  # numbers held at a time while the nearest codes are looked for: 128 MiB


class Codebook(nn.Module):
    """K vectors; a latent is replaced by the nearest of them.

    `normalise`: latents and codes are put on the unit sphere first, so that nearest means the largest cosine (Yu et al.
    2022, "Vector-quantized image modeling with improved VQGAN", section 3.2; LlamaGen).
    """

    def __init__(self, codes: int, width: int, normalise: bool) -> None:
        super().__init__()
        self.normalise = normalise
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def prepare(self, latents: Tensor) -> Tensor:
        """Latents [..., w] as they are compared with codes: fp32, normalised where configured."""
        latents = latents.float()
        return F.normalize(latents, dim=-1) if self.normalise else latents

    def vectors(self) -> Tensor:
        """The codes, fp32 [K, w]."""
        return self.prepare(self.embedding.weight)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Prepared latents [n, w] -> the nearest code of each, int64 [n]; of equally near ones the first."""
        vectors = self.vectors()
        half_squares = vectors.square().sum(1) / 2  # |z - e|^2 / 2 = |e|^2 / 2 - z e + a constant
        rows = max(1, _DISTANCES // len(vectors))
        with torch.autocast(latents.device.type, enabled=False):  # bf16 distances would choose other codes
            parts = [torch.addmm(half_squares, part, vectors.T, alpha=-1).argmin(1) for part in latents.split(rows)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=latents.device)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes int64 [...] -> their vectors, fp32 [..., w]."""
        return self.prepare(F.embedding(codes, self.embedding.weight))
