"""Batches of tokens for language models: rows of packed documents in the one global order.

As with pairs, the global batch at cursor c is rows c .. c + global_batch_size of the order, and data-parallel rank r of
D takes the r-th of D contiguous parts. A row is a pure function of (data, seed, epoch, its number), masked spans
included, so it is the same in every layout and after every resume. Rows are made when they are asked for.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from megamug.data.documents.indexed import DocumentSet
from megamug.data.documents.packing import RowMaker
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.order import Cursor, GlobalOrder
from megamug.data.pairs.loader import GlobalBatch
from megamug.errors import UserError

IGNORE = -100  # the label of a token that carries no loss
LOSS_ON = ("all", "response", "text", "image")


@dataclass
class TokenBatch:
    """One micro-batch: b rows of s = context_length tokens."""

    tokens: torch.Tensor  # int64 [b, s]
    labels: torch.Tensor  # int64 [b, s]: the token to predict at each place; IGNORE: no loss
    segments: torch.Tensor | None  # int32 [b, s]: document in the row, padding one of its own; None: not separated
    positions: torch.Tensor | None  # int64 [b, s]: place in the document; None with segments
    most_documents: int | None = None  # no fewer than there are in all rows, padding counted; None: not known


def no_fewer(documents: int) -> int:
    """`most_documents` of a batch with so many: the next power of two, 16 at least, so that few shapes occur."""
    return max(16, 1 << (documents - 1).bit_length())


def row_makers(
    documents: list[DocumentSet], vocabulary: Vocabulary, *, context_length: int, cm3_spans: float, loss_on: str,
    seed: int, hidden_text: float = 0.0,
) -> list[RowMaker]:  # fmt: skip
    """One for each set. Raises `UserError`, see `document_packing.pack`."""
    if loss_on not in LOSS_ON:
        raise UserError(f"data.loss_on is {loss_on!r}; it is one of {', '.join(LOSS_ON)}")
    made: list[RowMaker] = []
    for one in documents:
        number = sum(len(maker.packing.lengths) for maker in made)
        made.append(RowMaker(
            one, vocabulary, context_length=context_length, cm3_spans=cm3_spans, loss_on=loss_on, seed=seed,
            first_number=number, hidden_text=hidden_text,
        ))  # fmt: skip
    return made


def order_of_rows(makers: list[RowMaker], seed: int) -> GlobalOrder:
    """The one order of all rows; a set's weight is its share of the rows, so of the tokens."""
    weights = None if makers[0].documents.weight is None else [maker.documents.weight for maker in makers]
    fingerprints = [maker.fingerprint() for maker in makers]
    return GlobalOrder([len(maker) for maker in makers], weights=weights, seed=seed, fingerprints=fingerprints)


class TokenLoader:
    """Training: endless and shuffled. Validation (`train=False`): one pass, of at most `max_samples` rows.

    The interface of `PairLoader`. `failures` stays 0: no row is replaced by another one, a damaged file ends the run.
    """

    def __init__(
        self,
        documents: list[DocumentSet],
        vocabulary: Vocabulary,
        *,
        context_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        cm3_spans: float = 1.0,
        hidden_text: float = 0.0,
        separate_documents: bool = False,
        same_shapes: bool = False,
        loss_on: str = "all",
        dp_rank: int = 0,
        dp_size: int = 1,
        train: bool = True,
        device: torch.device | str = "cpu",
        state: dict | None = None,
        max_samples: int | None = None,
    ) -> None:
        """`state`: what `state()` gave, or None to start at the first row. `same_shapes`: all batches have the same
        `most_documents`, as captured graphs need it; otherwise it is the next power of two above the truth.

        Raises `UserError`: rows too short, a state of other data or of another seed.
        """
        assert global_batch_size % (dp_size * micro_batch_size) == 0, (global_batch_size, dp_size, micro_batch_size)
        assert 0 <= dp_rank < dp_size
        assert train or state is None, "a validation pass always starts at its first row"
        self.makers = row_makers(
            documents, vocabulary, context_length=context_length, cm3_spans=cm3_spans, loss_on=loss_on, seed=seed,
            hidden_text=hidden_text,
        )
        self.order = order_of_rows(self.makers, seed)
        self.context_length, self.separate_documents = context_length, separate_documents
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size, self.device = dp_rank, dp_size, torch.device(device)
        self.samples = 0  # rows consumed: the cursor of the next batch
        if state is not None:
            cursor = Cursor.from_dict(state)
            self.order.check(cursor)
            self.samples = cursor.samples
        self.most_documents: int | None = None  # of a micro-batch, the same for all
        if same_shapes:
            self.most_documents = micro_batch_size * max(maker.most_documents for maker in self.makers)
        self.total_samples: int | None = None  # of a validation pass
        if not train:
            first_pass = self.order.first_pass()
            self.total_samples = first_pass if max_samples is None else min(max_samples, first_pass)

    def next(self) -> GlobalBatch:
        """The next global batch. Raises `StopIteration` at the end of a validation pass.

        In the last batch of a pass rows are repeated to fill it up; their labels are all IGNORE.
        """
        started = time.perf_counter()
        if self.total_samples is not None and self.samples >= self.total_samples:
            raise StopIteration
        part = self.global_batch_size // self.dp_size
        first, end = self.samples + part * self.dp_rank, self.samples + self.global_batch_size
        valid = part
        if self.total_samples is not None:
            end = min(end, self.total_samples)
            valid = min(max(end - first, 0), part)
        tokens, labels, segments, positions = self._rows(min(first, end - 1), max(valid, 1))
        fill = np.minimum(np.arange(part), len(tokens) - 1)
        labels = np.where((np.arange(part) < valid)[:, None], labels[fill], IGNORE)
        documents = segments[fill, -1] + 1  # of each row: they are numbered from 0, padding last
        tensors = [torch.from_numpy(a).to(self.device) for a in (tokens[fill], labels, segments[fill], positions[fill])]
        micro_batches = []
        for i in range(0, part, self.micro_batch_size):
            rows = slice(i, i + self.micro_batch_size)
            tokens, labels, segments, positions = (tensor[rows] for tensor in tensors)
            most = self.most_documents or no_fewer(int(documents[rows].sum()))
            if not self.separate_documents:
                segments = positions = most = None
            micro_batches.append(TokenBatch(tokens, labels, segments, positions, most))
        self.samples = end
        return GlobalBatch(micro_batches, end, wait_seconds=time.perf_counter() - started)

    def __iter__(self) -> TokenLoader:
        return self

    __next__ = next

    def paused(self) -> AbstractContextManager:
        """As of `PairLoader`; nothing runs in the background here."""
        return nullcontext()

    def close(self) -> None:
        """Nothing runs in the background; the files are closed with the last reference to them."""

    def state(self) -> dict:
        """The cursor of the next batch, for a checkpoint: JSON."""
        return self.order.cursor(self.samples).to_dict()

    def _rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """tokens, labels, segments, positions of positions start .. start + count of the order, each [count, s]."""
        sources, epochs, numbers = self.order.slice(start, count)
        tokens = np.empty((count, self.context_length), np.int64)
        labels, positions = np.empty_like(tokens), np.empty_like(tokens)
        segments = np.empty(tokens.shape, np.int32)
        for source in np.unique(sources):
            mine = np.flatnonzero(sources == source)
            rows = self.makers[source].make(numbers[mine], epochs[mine])
            tokens[mine], segments[mine] = rows.tokens[:, :-1], rows.segments[:, :-1]
            positions[mine] = rows.positions[:, :-1]
            labels[mine] = np.where(rows.loss[:, 1:], rows.tokens[:, 1:], IGNORE)
        return tokens, labels, segments, positions
