"""Which tokens of a caption a masked text decoder has to tell (`model.text_objective: masked`).

All of them are replaced by one mask token: BERT's 80/10/10 replacement (Devlin et al. 2019) serves tasks that read the
text decoder without masks, and MUG is trained for its image encoder. Shares above BERT's 15% make the image count: M3AE
(arXiv 2205.14204) found 50 to 90% best for text beside images.
"""

from __future__ import annotations

from torch import Tensor

from megamug.data.text.marks import Marks
from megamug.models.mug.model import MugBatch


def hidden_tokens(tokens: Tensor, noise: Tensor, marks: Marks, ratio: float) -> Tensor:
    """tokens int64 [b, T + 1] (begin, caption, end, padding) -> bool [b, T], True for those of tokens[:, 1:] to tell.

    Of a caption's n tokens (marks are none) those with the least `noise` [b, T], an integer below 2**32 each:
    `ratio` n of them, a half rounded up, at least one where n > 0. On the device of `tokens`, without waiting for it.
    """
    caption = tokens[:, 1:]
    words = (caption != marks.pad) & (caption != marks.eos) & (caption != marks.bos)
    noise = noise.to(tokens.device).masked_fill(~words, 1 << 32)
    place = noise.argsort(dim=1, stable=True).argsort(dim=1)
    count = words.sum(dim=1, keepdim=True)
    wanted = (count.double() * ratio + 0.5).floor().clamp(min=1)
    return (place < wanted) & words


def caption_terms(batch: MugBatch, pad: int) -> int:
    """Terms of the caption loss: tokens to tell."""
    told = batch.tokens[:, 1:] != pad if batch.text_mask is None else batch.text_mask
    return int(told.sum())
