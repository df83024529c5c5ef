"""How well a masked text decoder fills in the hidden tokens of captions, and whether the image is used for it.

As in `captioning`, the loss is taken with the right image's latent and with another image's. Which tokens are hidden is
a pure function of seed and sample: the same at every step of a run, and in runs of one seed.
"""

from __future__ import annotations

from pathlib import Path

from megamug.evaluate.captioning import EXAMPLES, View, measure_views
from megamug.generation.captions import fill_in
from megamug.models.mug.model import MugBatch


class HiddenTokens(View):
    """Sums over the hidden tokens."""

    counted = "hidden_tokens"

    def add(self, model, tokenizer, batch: MugBatch) -> list[dict]:
        """Counts the pairs of `batch`; returns what was filled in of each."""
        filled = fill_in(model, batch, self.losses(model, batch))
        right = ((filled == batch.tokens[:, 1:]) & batch.text_mask).sum(dim=1).tolist()
        self.right_tokens += sum(right)
        self.tokens += sum(self.terms(model, batch))
        self.pairs += len(right)
        texts = [tokenizer.decode(row) for row in filled.tolist()]
        self.written += texts[: EXAMPLES - len(self.written)]
        return [{"caption": text, "right_tokens": n} for text, n in zip(texts, right, strict=True)]

    def terms(self, model, batch: MugBatch) -> list[int]:
        """Of each pair, the hidden tokens."""
        return batch.text_mask.sum(dim=1).tolist()

    def figures(self) -> dict:
        count = max(self.tokens, 1)  # captions may have no token but their end
        loss, other = self.loss / count, self.other_loss / count
        return {
            "visible_patches": self.visible_patches, "masked_token_loss": loss, "masked_token_loss_other_image": other,
            "gap": other - loss, "masked_token_accuracy": self.right_tokens / count,
        }  # fmt: skip


def measure(run, samples: int, folder: Path) -> dict:
    """Figures of at most `samples` held-out pairs, examples, and a picture of them; FOLDER/masked_text.jsonl has all.

    `masked`: with the patches hidden that training hides; `all_visible`: with none hidden. In each, of the
    `hidden_tokens` (a share `text_mask_ratio` of every caption's): `masked_token_loss` and
    `masked_token_loss_other_image` in nat a token, `gap` between them, and `masked_token_accuracy`, the share whose
    likeliest token is the true one.
    """
    figures, _ = measure_views(run, samples, folder, "masked_text", HiddenTokens)
    return {"text_mask_ratio": run.config.model.text_mask_ratio, **figures}
