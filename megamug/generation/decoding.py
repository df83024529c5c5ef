"""Documents of text and images in turn, token by token.

A document is `<bos> text <break> codes of an image <break> text ... <eos>`. While text is written only text pieces,
`<break>` and `<eos>` can be drawn; behind a text's `<break>` stand exactly one image's codes, then `<break>` or
`<eos>`; a text begins with a text piece. What is drawn is renormalised over what is possible. Marks of masked spans are
never drawn: a document is written from left to right.

Guidance on image codes compares the model with itself on the same tokens with each text piece replaced by `<mask>`:

- Classifier-free guidance (Ho and Salimans, arXiv 2207.12598; on tokens: Gafni et al., arXiv 2203.13131):
  `logits = unconditional + alpha * (conditional - unconditional)`.
- Contrastive decoding with a top k (CD-K of CM3leon, arXiv 2309.02591, after Li et al., arXiv 2210.15097): of the codes
  `V = {t : p(t) >= alpha * k-th largest p}`, p conditional, drawn by the scores `log p(t) - log p_unconditional(t)`.
  k = 1 is Li et al.'s plausibility constraint.

Axes: b rows (guidance adds b more, the unconditional ones), t tokens of a row, V padded vocabulary, n possible tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.random import uniform
from megamug.generation.captions import nucleus_choice
from megamug.models.blocks.layers import key_value_cache

FIRST, TEXT, IMAGE, BEHIND = range(4)  # where a row is: before a text, inside one, inside an image, behind one


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. At most one of `guidance` and `contrastive` is set; both concern image codes alone."""

    temperature: float = 1.0  # divides logits or scores; 0: always the likeliest
    top_p: float = 1.0  # the smallest set of tokens that holds this share of the probability (arXiv 1904.09751)
    guidance: float | None = None  # alpha of classifier-free guidance; 1: none
    contrastive: float | None = None  # alpha of contrastive decoding, above 0 and at most 1
    contrastive_top_k: int = 1
    seed: int = 0

    @property
    def guided(self) -> bool:
        return self.guidance is not None or self.contrastive is not None


class Row:
    """One document being written: its tokens, and what may follow them."""

    def __init__(self, prompt: Sequence[int], vocabulary: Vocabulary, max_images: int | None, limit: int):
        """`prompt` begins with `<bos>`; at most `max_images` are written (None: any number), `limit` tokens in all."""
        assert prompt and prompt[0] == vocabulary.bos_id and len(prompt) <= limit, (len(prompt), limit)
        self.vocabulary, self.limit = vocabulary, limit
        self.tokens: list[int] = []
        self.place, self.codes_left, self.images = FIRST, 0, 0
        self.ended: str | None = None  # eos, images (one more was begun), or length (nothing more fits)
        self.images_left = math.inf
        for token in prompt:
            self.append(token)
        self.prompt = len(prompt)
        self.images_left = math.inf if max_images is None else max_images
        self._check_end()

    def append(self, token: int) -> None:
        """Takes the next token, of the prompt or drawn."""
        v = self.vocabulary
        self.tokens.append(token)
        if v.first_code <= token < v.break_id:
            self.codes_left = (self.codes_left or v.image_tokens) - 1
            self.place = IMAGE if self.codes_left else BEHIND
        elif token == v.break_id and self.place != BEHIND:
            self.place, self.codes_left = IMAGE, v.image_tokens
        elif token in (v.break_id, v.bos_id):
            self.place = FIRST
        else:
            self.place = TEXT
        if token == v.eos_id and len(self.tokens) > 1:  # one token may begin and end a document
            self.ended = "eos"

    def write(self, token: int) -> None:
        """Takes a drawn token and sees whether the document ends with it."""
        self.append(token)
        self._check_end()

    def _check_end(self) -> None:
        if self.ended:
            return
        if self.place == IMAGE and self.codes_left == self.vocabulary.image_tokens:  # an image is to begin
            if not self.images_left:
                self.ended = "images"
            elif self.codes_left > self.limit - len(self.tokens):
                self.ended = "length"
            self.images_left -= 1
        elif len(self.tokens) == self.limit:
            self.ended = "length"


def possible(vocabulary: Vocabulary, device: torch.device) -> list[Tensor]:
    """By place, the ids that may follow, int64 [n], ascending."""
    v = vocabulary
    pieces = [i for i in range(v.text_pieces) if i not in (v.pad_id, v.bos_id, v.eos_id)]
    marks = [v.break_id] if v.codes else []
    ids = {
        FIRST: pieces,
        TEXT: sorted([v.eos_id, *pieces, *marks]),
        IMAGE: range(v.first_code, v.first_code + v.codes),
        BEHIND: [v.eos_id, *marks],
    }
    return [torch.tensor(list(ids[place]), dtype=torch.int64, device=device) for place in (FIRST, TEXT, IMAGE, BEHIND)]


@torch.inference_mode()
def write_documents(
    model: torch.nn.Module,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    limits: Sequence[int],
    max_images: int | None = None,
    samples: Sequence[int] | None = None,
    cache: bool = True,
) -> list[Row]:
    """Goes on with each of the b `prompts`, all in one batch, until each document ended.

    All rows are at the same position at each step: a row whose prompt is longer takes the prompt's tokens while others
    are written already, so no row has padding before or inside it, and what is written does not depend on the others.

    Args:
        model: a whole DecoderLM or JamCross, or one rank's share under tensor parallelism alone: then every rank of
            the group calls this, and the first one draws.
        prompts: ids, the first of them `<bos>`; at the end `<break>` behind a text stands before an image.
        limits: of each row, the most tokens, its prompt included. A text stops there; an image begins only if it fits.
        max_images: written in each document at most; one more that is begun ends it.
        samples: the b sample numbers (default 0, 1, ...): a draw is a pure function of (seed, sample number, position).
        cache: keep keys and values of earlier tokens (of `local` layers); without, each step runs all tokens so far.
    """
    device = next(model.parameters()).device
    rows = [Row(p, vocabulary, max_images, limit) for p, limit in zip(prompts, limits, strict=True)]
    b, total = len(rows), max(row.limit for row in rows)
    numbers = np.arange(b) if samples is None else np.asarray(samples)
    draws = torch.from_numpy(uniform(sampling.seed, "document", 0, numbers, total)).to(device)  # [b, t]
    ids = possible(vocabulary, device)
    tokens = torch.full((b, total), vocabulary.pad_id, dtype=torch.int64)
    for row, place in zip(rows, tokens, strict=True):
        place[: row.prompt] = torch.tensor(row.tokens)
    tokens = tokens.to(device)
    if sampling.guided:
        tokens = torch.cat([tokens, vocabulary.without_text(tokens)])
    group = _tensor_group(model)
    first, end = 0, min(row.prompt for row in rows)
    with key_value_cache(model, total) if cache else nullcontext():
        while not all(row.ended for row in rows):
            states = _run(model, tokens[:, first:end], first)
            active = [i for i, row in enumerate(rows) if not row.ended and len(row.tokens) == end]
            if active:
                logits = _last_logits(model, states, group)
                chosen = _choose(rows, active, logits, ids, sampling, draws[:, end])
                if group is not None:  # one rank draws: rounding may differ between machines
                    dist.broadcast(chosen, src=dist.get_global_rank(group, 0), group=group)
                tokens[active, end] = chosen
                if sampling.guided:
                    tokens[[b + i for i in active], end] = vocabulary.without_text(chosen)
                for i, token in zip(active, chosen.tolist(), strict=True):
                    rows[i].write(token)
            first, end = (end if cache else 0), end + 1
    return rows


def guide(conditional: Tensor, unconditional: Tensor, sampling: Sampling) -> Tensor:
    """Logits of the possible codes [b, n] with and without the text -> the logits to draw from (see above)."""
    if sampling.guidance is not None:
        return unconditional + sampling.guidance * (conditional - unconditional)
    expert, amateur = conditional.log_softmax(dim=-1), unconditional.log_softmax(dim=-1)
    largest = expert.topk(min(sampling.contrastive_top_k, expert.shape[1]), dim=-1).values
    implausible = expert < largest[:, -1:] + math.log(sampling.contrastive)
    return (expert - amateur).masked_fill(implausible, -torch.inf)


def _choose(
    rows: list[Row], active: list[int], logits: Tensor, ids: list[Tensor], sampling: Sampling, draws: Tensor
) -> Tensor:
    """The next token of each active row, int64; logits [b or 2 b, V], draws [b]."""
    chosen = torch.empty(len(active), dtype=torch.int64, device=logits.device)
    for place in {rows[i].place for i in active}:
        mine = [n for n, i in enumerate(active) if rows[i].place == place]
        numbers = torch.tensor([active[n] for n in mine], device=logits.device)
        scores = logits[numbers][:, ids[place]].float()
        if sampling.guided and place == IMAGE:
            scores = guide(scores, logits[numbers + len(rows)][:, ids[place]].float(), sampling)
        if sampling.temperature == 0:
            choice = scores.argmax(dim=-1)
        else:
            choice = nucleus_choice(scores / sampling.temperature, sampling.top_p, draws[numbers])
        chosen[mine] = ids[place][choice]
    return chosen


def _run(model, tokens: Tensor, first: int) -> Tensor | dict[str, Tensor]:
    """Final states of `tokens` [b, t] at places `first`, ...: [t, b, h], or one for each tower."""
    return model.run(model.embed(tokens, first=first), tokens, first=first)


def _last_logits(model, states: Tensor | dict[str, Tensor], group) -> Tensor:
    """Of the last position, over the whole vocabulary: [b, V]."""
    if isinstance(states, dict):
        logits = model.logits({name: x[-1:] for name, x in states.items()})[0]
    else:
        logits = model.logits(states[-1:])[0]
    if group is None:
        return logits
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    return gather_from_tensor_model_parallel_region(logits)


def _tensor_group(model):
    """The tensor-parallel group that holds the model, None where one process does."""
    plan = model.plan
    assert plan.pipeline == 1 and not plan.sequence_parallel, "whole layers in each process, each with all tokens"
    if plan.tensor == 1:
        return None
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()
