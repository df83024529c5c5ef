"""How well a language model predicts held-out documents, modality by modality.

Each document is read by itself, from left to right, without masked spans, and each token but `<bos>` is counted once.
A document longer than the run's data.context_length C is read in windows: the first begins with the document; each next
one begins so that the first token it counts, the first that no window counted yet, has C // 2 + 1 tokens before it.

A token belongs to the segment it stands in; the `<break>` or `<eos>` behind a text belongs to that text.

- `text`: of segments with no image before them in their document (documents of text alone are such segments);
- `caption_given_image`: of text segments with an image before them;
- `image_given_caption`: codes of images with text before them;
- `image_first`: codes of images with no text before them;
- `mark_behind_image`: the `<break>` or `<eos>` behind an image, which a trained model knows, kept apart so that it does
  not flatter the codes.

Figures of two models compare where their vocabulary and documents are the same: the same tokens are counted then, with
less context where C is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from megamug.data.documents.indexed import IMAGE, DocumentSet, open_documents
from megamug.data.documents.loader import IGNORE
from megamug.data.documents.vocabulary import Vocabulary
from megamug.losses.cross_entropy import forward_torch, make_terms

MODALITIES = ("text", "caption_given_image", "image_given_caption", "image_first", "mark_behind_image")
LOGITS_BYTES = 128 * 2**20  # of the logits that exist at once


def measure(run, samples: int) -> dict:
    """Figures of at most `samples` documents of data.validation, spread evenly over all of them in their order.

    By modality and for all together: `tokens`, `loss` (mean negative log-likelihood, nat a token), `perplexity` (its
    exponential); None where there is no token. `data_fingerprints` are of the whole sets. Raises `UserError`, see
    `open_documents`.
    """
    vocabulary, data = run.task.vocabulary, run.config.data
    sets = open_documents(data.validation, vocabulary, data.verify)
    total = sum(len(one) for one in sets)
    count = min(samples, total)
    chosen = np.arange(count) * total // count
    sums, counts = np.zeros(len(MODALITIES)), np.zeros(len(MODALITIES), np.int64)
    tokens_at_once = data.context_length * data.micro_batch_size
    for tokens, labels, modalities in batches(sets, chosen, vocabulary, data.context_length, tokens_at_once):
        losses = token_losses(run.model, torch.from_numpy(tokens), torch.from_numpy(labels), run.world)
        counted = labels != IGNORE
        sums += np.bincount(modalities[counted], losses[counted], len(MODALITIES))
        counts += np.bincount(modalities[counted], minlength=len(MODALITIES))
    return {
        "samples": count, "documents": total, "tokens": int(counts.sum()), "context_length": data.context_length,
        "vocabulary": vocabulary.fingerprint(), "data_fingerprints": [one.fingerprint() for one in sets],
        "units": "loss in nat a token, perplexity = exp(loss)",
        "all": _figures(sums.sum(), counts.sum()),
        "modalities": {name: _figures(*both) for name, *both in zip(MODALITIES, sums, counts, strict=True)},
    }  # fmt: skip


def _figures(loss: float, count: int) -> dict:
    mean = float(loss / count) if count else None
    return {"tokens": int(count), "loss": mean, "perplexity": None if mean is None else math.exp(mean)}


def modality_of(tokens: np.ndarray, modes: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Number in `MODALITIES` of each token of a document [n], by the modes of their segments [n]; that of `<bos>` means
    nothing."""
    in_image, code = modes & IMAGE > 0, vocabulary.is_image(tokens)
    after_image = np.logical_or.accumulate(code)
    after_text = np.logical_or.accumulate(~in_image & (tokens != vocabulary.bos_id))
    return np.select(
        [~in_image & ~after_image, ~in_image, code & after_text, code], [0, 1, 2, 3], default=4
    )


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """(start, end, first token counted) of the windows of a document of `length` tokens; end - start <= context + 1."""
    made, start, counted = [], 0, 1
    while counted < length:
        end = min(start + context + 1, length)
        made.append((start, end, counted))
        start, counted = end - 1 - context // 2, end
    return made


def batches(
    sets: list[DocumentSet], chosen: np.ndarray, vocabulary: Vocabulary, context: int, tokens_at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Windows of the documents `chosen` (numbered through all sets), those of similar length together, padded behind.

    (tokens, labels, modalities), int64 [b, s] each, b * s <= `tokens_at_once` or b = 1; labels and modalities are of
    the token that follows, IGNORE where none is counted.
    """
    ends = np.cumsum([len(one) for one in sets])
    places = []
    for number in chosen.tolist():
        which = int(np.searchsorted(ends, number, side="right"))
        own = number - int(ends[which - 1] if which else 0)
        starts = sets[which].starts[own : own + 2]
        places += [(end - start, which, own, start, end, first)
                   for start, end, first in windows(int(starts[1] - starts[0]), context)]  # fmt: skip
    places.sort(key=lambda place: place[0])
    while places:
        size = min(len(places), max(1, tokens_at_once // (places[-1][0] - 1)))
        part, places = places[-size:], places[:-size]
        shape = (size, part[-1][0] - 1)
        tokens, labels = np.full(shape, vocabulary.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        modalities = np.zeros(shape, np.int64)
        for i, (length, which, own, start, end, first) in enumerate(part):
            document, modes = sets[which].document(own)
            kinds = modality_of(document, modes, vocabulary)
            tokens[i, : length - 1] = document[start : end - 1]
            modalities[i, : length - 1] = kinds[start + 1 : end]
            labels[i, first - start - 1 : length - 1] = document[first:end]
        yield tokens, labels, modalities


@torch.inference_mode()
def token_losses(
    model, tokens: torch.Tensor, labels: torch.Tensor, world, likeliest: bool = False
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each label, nat, float64 [b, s]; 0 where it is IGNORE. Padded ids take no part.

    `tokens`, `labels` [b, s]; each row is a document, or a window of one, by itself. `likeliest`: also whether no other
    token of the vocabulary is likelier, bool [b, s]; True where the label is IGNORE.
    """
    tokens, labels = tokens.to(world.device), labels.to(world.device)
    states = model.run(model.embed(tokens), tokens)
    group = world.tp_group if world.tp_size > 1 else None
    columns = model.plan.padded_vocabulary // world.tp_size
    terms = make_terms(columns, model.plan.vocabulary, group, 0.0, 0.0, IGNORE)
    rows, length = tokens.shape
    step = max(1, LOGITS_BYTES // (4 * rows * columns))
    losses, first_of_all = [], []
    for first in range(0, length, step):
        part = slice(first, first + step)
        some = {k: x[part] for k, x in states.items()} if isinstance(states, dict) else states[part]
        logits = model.logits(some)  # [s, b, V / tp]
        targets = labels[:, part].transpose(0, 1)
        loss, (maximum, _) = forward_torch(logits.flatten(0, 1), targets.reshape(-1), None, terms)
        losses.append(loss.view(targets.shape))
        if likeliest:
            first_of_all.append(_reached(logits, targets, maximum.view(targets.shape), terms))
    found = torch.cat(losses).transpose(0, 1).double().cpu().numpy()
    return (found, torch.cat(first_of_all).transpose(0, 1).cpu().numpy()) if likeliest else found


def _reached(logits: torch.Tensor, targets: torch.Tensor, maximum: torch.Tensor, terms) -> torch.Tensor:
    """Whether the target's logit is the row's maximum; bool [s, b]. The rank that owns it knows, and tells."""
    column = targets - terms.first_column
    owned = (column >= 0) & (column < terms.valid_columns)
    own = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1).to(maximum.dtype)
    right = ((own == maximum) & owned).to(torch.int32)
    if terms.group is not None:
        torch.distributed.all_reduce(right, group=terms.group)
    return (right > 0) | (targets == IGNORE)
