"""Pictures of documents to ids of a vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megamug.data.dali import DECODE_ERRORS, CropDecoder
from megamug.data.documents.reading import Picture
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.pairs.images import centre_squares, decode_or_none
from megamug.errors import UserError
from megamug.models.image_tokenizer.model import from_bytes
from megamug.models.image_tokenizer.vocabulary import load_image_tokenizer


class ImageEncoder:
    """Encoded images -> ids, through DALI (largest centred square, resized) and the vocabulary's image tokenizer."""

    def __init__(self, vocabulary: Vocabulary, device: str = "cpu", threads: int = 1, batch: int = 1) -> None:
        """`threads` decode; at most `batch` pictures are encoded in a call. Raises as `load_image_tokenizer`."""
        self.vocabulary, self.device = vocabulary, torch.device(device)
        self._tokenizer = load_image_tokenizer(vocabulary, device)
        background = self._tokenizer.config.background  # as it was trained
        self._decoder = CropDecoder(vocabulary.image_size, batch, threads, self.device, background)

    def __call__(self, pictures: list[Picture]) -> list[np.ndarray | str]:
        """Ids int64 [image_tokens] of each picture, or the reason why it does not decode; at most `batch` of them.

        Raises `UserError` where the image tokenizer gives other codes than the vocabulary says.
        """
        pixels, failed = self._decode(pictures)
        codes = self._tokenizer.encode(from_bytes(pixels)).cpu().numpy()
        if codes.shape[1:] != self.vocabulary.image_grid:
            raise UserError(
                f"{self.vocabulary.folder}: its image tokenizer makes {codes.shape[1]} x {codes.shape[2]} codes of an "
                f"image, the vocabulary says {self.vocabulary.image_grid}; make the vocabulary again"
            )
        ids = self.vocabulary.image_ids(codes).reshape(len(pictures), -1)
        return [failed.get(i, row) for i, row in enumerate(ids)]

    def _decode(self, pictures: list[Picture]) -> tuple[Tensor, dict[int, str]]:
        """Pixels uint8 [b, 3, S, S] and the reason for each picture that does not decode."""
        regions = centre_squares([p.width for p in pictures], [p.height for p in pictures])
        flips = np.zeros(len(pictures), bool)
        try:
            return self._decoder([p.data for p in pictures], regions, flips), {}
        except DECODE_ERRORS:
            pass  # the culprits are found below; pixels of theirs are zeros
        alone = [
            decode_or_none(self._decoder, [p.data], regions[i : i + 1], flips[i : i + 1])
            for i, p in enumerate(pictures)
        ]
        failed = {i: f"does not decode: {reasons[0][:300]}" for i, (_, reasons) in enumerate(alone) if reasons}
        return torch.cat([pixels for pixels, _ in alone]), failed
