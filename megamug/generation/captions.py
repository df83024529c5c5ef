"""What a trained MUG makes of images: hidden patches painted, captions written token by token.

Axes: b images, N patches, V visible, M masked, t tokens, h width, p patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from megamug.data.pairs.text import Tokenizer
from megamug.data.random import uniform
from megamug.losses.masked_patch import VARIANCE_EPSILON
from megamug.models.blocks.layers import key_value_cache
from megamug.models.mug.model import Mug, MugBatch, patchify, take

TRUE_STATISTICS = (
    "model.norm_pix_loss is on: patch means and deviations are the true ones, the model paints what is in between"
)


def encode(model: Mug, batch: MugBatch) -> Tensor:
    """The latent of the visible patches, [1 + registers + V, b, h]."""
    return model.encoder(batch, None)


def all_visible(batch: MugBatch, patches: int) -> MugBatch:
    """The same images with no patch hidden."""
    ids = torch.arange(patches, device=batch.images.device).expand(len(batch.images), -1)
    return MugBatch(ids, ids[:, :0], batch.images, batch.tokens, text_mask=batch.text_mask)


def reconstruct(model: Mug, batch: MugBatch, latent: Tensor) -> Tensor:
    """Pixels that the image decoder paints into the masked patches, [b, M, p * p * 3] float32, black 0, white 1.

    Not clipped. A model trained with `norm_pix_loss` predicts each patch in units of its own mean and deviation, which
    no visible patch tells: those of the hidden patch itself are used then, as MAE's visualisation does.
    """
    plan, decoder = model.plan, model.image_decoder
    predicted = decoder.predict(decoder(batch, latent, None), batch.masked_ids).float()
    values = plan.patch_size**2
    mean, std = (torch.tensor(x, device=predicted.device).repeat(values) for x in (plan.mean, plan.std))
    if plan.norm_pix:
        truth = (true_patches(batch, plan.patch_size) - mean) / std
        variance, average = torch.var_mean(truth, dim=-1, keepdim=True, correction=1)
        predicted = predicted * (variance + VARIANCE_EPSILON).sqrt() + average
    return predicted * std + mean


def true_patches(batch: MugBatch, patch_size: int) -> Tensor:
    """Pixels of the masked patches, [b, M, p * p * 3] float32, black 0, white 1."""
    return take(patchify(batch.images, patch_size), batch.masked_ids).float() / 255


@torch.inference_mode()
def fill_in(model: Mug, batch: MugBatch, latent: Tensor) -> Tensor:
    """The captions of `batch` with the likeliest token in the place of each hidden one (`batch.text_mask`), int64
    [b, T], padding included: what a masked text decoder, in one process, makes of them with the images of `latent`."""
    decoder = model.text_decoder
    logits = decoder.logits(decoder(batch, latent, None))[..., : model.plan.vocabulary]  # [T, b, V]
    return batch.tokens[:, 1:].where(~batch.text_mask, logits.argmax(dim=-1).t())


@torch.inference_mode()
def generate_tokens(
    model: Mug,
    latent: Tensor,
    *,
    top_p: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    samples: Sequence[int] | np.ndarray | None = None,
    cache: bool = True,
) -> Tensor:
    """Writes a caption for each of the b images of `latent` [., b, h] -> int64 [b, t], t <= caption_length.

    A row is the caption's tokens, the end token where it was reached, then padding; writing stops when all rows ended.
    The batch is one for one process: no tensor or pipeline parallelism.

    Args:
        top_p: None: always the likeliest token. Else draw from the smallest set of tokens that holds this share of the
            probability (nucleus sampling, Holtzman et al., arXiv 1904.09751).
        temperature: divides the logits before drawing.
        seed, samples: a draw is a pure function of (seed, sample number, position), so a caption does not depend on
            the batch it is written in; `samples` (default 0, 1, ...) are the b sample numbers.
        cache: keep the keys and values of earlier tokens and of the latent (`local` layers only); the tokens are the
            same without, where every step runs all tokens so far.
    """
    plan, decoder, marks = model.plan, model.text_decoder, model.plan.marks
    assert not plan.masked_text, "a masked text decoder fills in (fill_in)"
    assert plan.tensor == plan.pipeline == 1, "one process holds the whole model"
    b, steps, device = latent.shape[1], plan.caption_length, latent.device
    draws = None
    if top_p is not None:
        numbers = np.arange(b) if samples is None else np.asarray(samples)
        draws = torch.from_numpy(uniform(seed, "caption", 0, numbers, steps)).to(device)
    tokens = torch.full((b, 1), marks.bos, dtype=torch.int64, device=device)
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    never = [marks.pad] if marks.bos == marks.eos else [marks.pad, marks.bos]
    with key_value_cache(decoder, steps) if cache else nullcontext():
        for position in range(steps):
            new, first = (tokens[:, -1:], position) if cache else (tokens, 0)
            hidden = decoder.stack(decoder.embed(new, first), attention_mask=None, context=latent)
            logits = decoder.logits(hidden[-1:])[0, :, : plan.vocabulary].float()
            logits[:, never] = -torch.inf  # no caption holds them
            if draws is None:
                chosen = logits.argmax(dim=-1)
            else:
                chosen = nucleus_choice(logits / temperature, top_p, draws[:, position])
            tokens = torch.cat([tokens, chosen.masked_fill(ended, marks.pad).unsqueeze(1)], dim=1)
            ended |= chosen == marks.eos
            if ended.all():
                break
    return tokens[:, 1:]


def nucleus_choice(logits: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """A token for each row of `logits` [b, V] from its nucleus of probability `top_p`, by `draws` [b] in [0, 1)."""
    probabilities = logits.double().softmax(dim=-1)
    falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
    inside = falling.cumsum(dim=-1) - falling < top_p  # the token that reaches top_p belongs to it
    # Drawn in the order of token ids: two tokens of almost the same probability do not change places by rounding.
    nucleus = probabilities * torch.zeros_like(inside).scatter(1, order, inside)
    total = nucleus.cumsum(dim=-1)
    place = torch.searchsorted(total, draws.unsqueeze(1) * total[:, -1:], right=True)
    last = total.argmax(dim=-1, keepdim=True)  # the first place that holds everything: rounding ends there
    return place.minimum(last).squeeze(1)


def generate_captions(model: Mug, tokenizer: Tokenizer, latent: Tensor, **sampling) -> list[str]:
    """`generate_tokens` as text."""
    return [tokenizer.decode(row) for row in generate_tokens(model, latent, **sampling).tolist()]
