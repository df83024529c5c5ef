"""log p(continuation | context) of pairs of texts, many at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from megamug.data.documents.loader import IGNORE
from megamug.data.documents.vocabulary import Vocabulary
from megamug.errors import UserError
from megamug.evaluate.perplexity import token_losses

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids of the context, without <bos>, and of what follows


def encode_pair(vocabulary: Vocabulary, context: str, continuation: str) -> Pair:
    """Ids of both, cut where the context's own ids end.

    As lm-eval does it: the two are encoded together, blanks at the end of the context belong to the continuation, and
    the first so many ids as the context alone has are the context's. Raises `UserError` where nothing follows.
    """
    whole, start = vocabulary.encode_text(context + continuation), vocabulary.encode_text(context.rstrip())
    if len(whole) <= len(start):
        raise UserError(f"{continuation!r} behind {context[-40:]!r} has no token of its own in {vocabulary.folder}; "
                        "its likelihood cannot be asked for")
    return tuple(whole[: len(start)]), tuple(whole[len(start) :])


def log_likelihoods(run, pairs: Sequence[Pair]) -> tuple[list[tuple[float, bool]], int]:
    """For each pair (sum of log p over its continuation in nat, whether each of its tokens is the likeliest), and how
    many contexts were longer than the run reads.

    Each is read behind `<bos>`, by itself. Of a context that does not fit data.context_length its end is read. The
    same pair is asked for once. Under tensor parallelism every rank calls this. Raises `UserError` for a continuation
    of more tokens than data.context_length, and for likelihoods that are not finite.
    """
    vocabulary, data = run.task.vocabulary, run.config.data
    most = data.context_length
    rows, cut = {}, 0
    for context, following in pairs:
        if len(following) > most:
            raise UserError(f"a continuation of {len(following)} tokens is longer than the {most} that the run reads "
                            f"(data.context_length): {vocabulary.decode_text(following)[:60]!r}")
        room = most - len(following)  # of the context: <bos> and all but the last token are read
        cut += len(context) > room
        rows[context, following] = [vocabulary.bos_id, *context[max(0, len(context) - room) :], *following]
    waiting = sorted(rows.items(), key=lambda row: len(row[1]))
    found: dict[Pair, tuple[float, bool]] = {}
    while waiting:
        size = min(len(waiting), max(1, most * data.micro_batch_size // (len(waiting[-1][1]) - 1)))
        part, waiting = waiting[-size:], waiting[:-size]
        shape = (size, len(part[-1][1]) - 1)
        tokens, labels = np.full(shape, vocabulary.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        for i, ((_, following), ids) in enumerate(part):
            tokens[i, : len(ids) - 1] = ids[:-1]
            labels[i, len(ids) - 1 - len(following) : len(ids) - 1] = following
        losses, likeliest = token_losses(
            run.model, torch.from_numpy(tokens), torch.from_numpy(labels), run.world, likeliest=True
        )
        for i, (pair, _) in enumerate(part):
            found[pair] = (-float(losses[i].sum()), bool(likeliest[i].all()))
    if lost := [pair for pair, (score, _) in found.items() if not math.isfinite(score)]:
        raise UserError(f"step {run.step}: the likelihoods of {len(lost):,} of {len(found):,} texts are not finite;"
                        " name another --checkpoint")  # fmt: skip
    return [found[context, following] for context, following in pairs], cut
