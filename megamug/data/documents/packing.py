"""Documents packed into rows of context_length + 1 tokens: best-fit, so that few documents are cut.

After Ding et al. 2024, "Fewer truncations improve language modelling": the longest first, each into the row that it
fills best. A document longer than a row is cut into pieces behind a segment where that is possible, inside a long text
where it is not, never inside an image; a piece that goes on has no `<bos>`. For masked spans `reserve` tokens are kept
free for each piece; where a row's pieces draw more spans than its free tokens hold, the last spans are left out. So no
token is ever cut off: with `cm3_spans=1` fewer than 2 in 100 pieces that fill a row alone draw a span too many.

Packing depends on the lengths alone: the same documents, context and mean number of spans give the same rows.

Axes: D documents, P pieces, R rows, n rows asked for, C = context_length + 1 tokens of a row.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from megamug.data.documents.cm3 import GROWTH, draw_counts, draw_spans, mask_spans, maskable
from megamug.data.documents.indexed import IMAGE, RESPONSE, DocumentSet
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.random import uniform
from megamug.errors import UserError

PACKING_VERSION = 1
_WINDOW = 1 << 15  # pieces packed together: neighbours, so that a row is read from few places


def reserve(cm3_spans: float) -> int:
    """Tokens kept free for the masked spans of one piece: two standard deviations above the mean of their number."""
    return GROWTH * math.ceil(cm3_spans + 2 * math.sqrt(cm3_spans))


@dataclass
class Packing:
    """Rows of pieces. Pieces are numbered in the order of the documents, and ascend inside a row."""

    starts: np.ndarray  # int64 [P]: first token in the set
    lengths: np.ndarray  # int64 [P]: tokens
    documents: np.ndarray  # int64 [P]
    row_pieces: np.ndarray  # int64 [P]: numbers of the pieces, row by row
    row_starts: np.ndarray  # int64 [R + 1]: places in `row_pieces`

    def __len__(self) -> int:
        return len(self.row_starts) - 1


def pack(documents: DocumentSet, context_length: int, cm3_spans: float) -> Packing:
    """Raises `UserError` where a row is too short for an image, or for the spans."""
    free = reserve(cm3_spans)
    limit = context_length + 1 - free
    if limit < 2:
        raise UserError(
            f"data.context_length={context_length} leaves no room beside the {free} tokens kept free for masked spans; "
            "raise it, or lower data.cm3_spans"
        )
    starts, lengths, numbers = _pieces(documents, limit, context_length)
    rows = np.concatenate(list(_packed_windows(lengths + free, context_length + 1)))
    order = np.argsort(rows, kind="stable")
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Packing(starts, lengths, numbers, order, row_starts)


def _packed_windows(lengths: np.ndarray, capacity: int):
    """Row numbers of the pieces, window after window."""
    first = 0
    for start in range(0, len(lengths), _WINDOW):
        rows = best_fit(lengths[start : start + _WINDOW], capacity) + first
        first = int(rows.max()) + 1
        yield rows


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each piece, int64 [P]: best fit, decreasing; rows are numbered by their first piece.

    `rooms[n]` are the rows with n tokens free, and bit n of `mask` says that there are such: the row that a piece fills
    best is one shift and one lowest bit away.
    """
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]
    mask = count = 0
    rows = np.empty(len(lengths), np.int64)
    lengths_ = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = lengths_[piece]
        fitting = mask >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rooms[room].pop()
            if not rooms[room]:
                mask ^= 1 << room
        else:
            row, room, count = count, capacity, count + 1
        rooms[room - length].append(row)
        mask |= 1 << (room - length)
        rows[piece] = row
    _, first = np.unique(rows, return_index=True)
    names = np.empty(count, np.int64)
    names[np.argsort(first, kind="stable")] = np.arange(count)
    return names[rows]


def _pieces(documents: DocumentSet, limit: int, context_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, lengths, documents) of the pieces, in the order of the documents; no piece has more than `limit`."""
    lengths = np.diff(documents.starts)
    long = np.flatnonzero(lengths > limit)
    cut = {int(number): _cut(documents, int(number), limit, context_length) for number in long}
    counts = np.ones(len(lengths), np.int64)
    counts[long] = [len(pieces) for pieces in cut.values()]
    numbers = np.repeat(np.arange(len(lengths)), counts)
    starts, sizes = documents.starts[numbers], lengths[numbers]
    places = np.concatenate([[0], np.cumsum(counts)])
    for number, pieces in cut.items():
        for i, (start, end) in enumerate(pieces, start=int(places[number])):
            starts[i], sizes[i] = start, end - start
    return starts, sizes, numbers


def _cut(documents: DocumentSet, number: int, limit: int, context_length: int) -> list[tuple[int, int]]:
    """(start, end) in tokens of the pieces of a long document: whole segments while they fit; a text that no piece
    holds fills the piece that is open and goes on in the next."""
    first, last = documents.first_segments[number : number + 2]
    pieces, start = [], int(documents.segment_starts[first])
    for segment in range(first, last):
        begin, end = documents.segment_starts[segment : segment + 2].tolist()
        if end - start <= limit:
            continue
        if end - begin <= limit:
            pieces.append((start, begin))
            start = begin
            continue
        if documents.modes[segment] & IMAGE:
            raise UserError(
                f"data.context_length={context_length} is too short for an image of {documents.folder}: it has "
                f"{end - begin} tokens with its marks, and a row holds {limit} beside what masked spans need; raise "
                "data.context_length"
            )
        while end - start > limit:
            stop = start + limit - (end - start == limit + 1)  # a single token that is left predicts nothing
            pieces.append((start, stop))
            start = stop
    return [*pieces, (start, int(documents.starts[number + 1]))]


@dataclass
class Rows:
    """n rows of C tokens."""

    tokens: np.ndarray  # int64 [n, C], padded
    loss: np.ndarray  # bool [n, C]: which tokens are to be predicted
    segments: np.ndarray  # int32 [n, C]: number of the piece in its row; padding is one of its own
    positions: np.ndarray  # int64 [n, C]: place in the piece


class RowMaker:
    """Makes the rows of one set of documents.

    `loss_on`: `all`; `response`, the segments that are responses, with their closing mark, but all tokens of a document
    without any (so pre-training data can be blended in); `text`, all but image codes; `image`, image codes alone.
    The first token of a piece is never predicted: a document's is `<bos>`, and before another piece's stands a token
    that it does not follow.
    """

    def __init__(
        self, documents: DocumentSet, vocabulary: Vocabulary, *, context_length: int, cm3_spans: float, loss_on: str,
        seed: int, first_number: int = 0, hidden_text: float = 0.0,
    ) -> None:  # fmt: skip
        """`first_number`: added to a piece's number where randomness is drawn, so that no two sets share theirs.

        `hidden_text`: the share of pieces with images that are read with `<mask>` for each text piece, unpredicted and
        without spans: so a model learns the codes that classifier-free guidance calls unconditional.
        """
        self.documents, self.vocabulary, self.loss_on = documents, vocabulary, loss_on
        self.columns, self.cm3_spans, self.seed, self.first_number = context_length + 1, cm3_spans, seed, first_number
        self.hidden_text = hidden_text
        self.packing = pack(documents, context_length, cm3_spans)

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def most_documents(self) -> int:
        """No fewer than the pieces of any row, padding counted as one."""
        return int(np.diff(self.packing.row_starts).max()) + 1

    def fingerprint(self) -> str:
        """Of the documents and of how they are packed: other rows are another order."""
        description = [PACKING_VERSION, _WINDOW, self.documents.fingerprint(), self.columns, self.cm3_spans]
        description += [self.hidden_text] if self.hidden_text else []
        return hashlib.sha256(repr(description).encode()).hexdigest()

    def make(self, rows: np.ndarray, epochs: np.ndarray) -> Rows:
        """Rows of the numbers `rows` [n] in their epochs [n]. Raises `UserError` for ids beyond the vocabulary."""
        made = Rows(
            np.full((len(rows), self.columns), self.vocabulary.pad_id, np.int64),
            np.zeros((len(rows), self.columns), bool), np.zeros((len(rows), self.columns), np.int32),
            np.zeros((len(rows), self.columns), np.int64),
        )  # fmt: skip
        starts, ends = self.packing.row_starts[rows], self.packing.row_starts[rows + 1]
        places = np.concatenate([np.arange(s, e) for s, e in zip(starts, ends, strict=True)])
        pieces = self.packing.row_pieces[places]
        of_row = np.repeat(np.arange(len(rows)), ends - starts)
        counts = draw_counts(self.seed, epochs[of_row], pieces + self.first_number, self.cm3_spans)
        counts = np.minimum(counts, len(self.vocabulary.sentinels))
        hidden = np.zeros(len(pieces), bool)
        if self.hidden_text:
            draws = uniform(self.seed, "hidden text", epochs[of_row], pieces + self.first_number, 1)
            hidden = draws[:, 0] < self.hidden_text
        at = 0
        for i, count in enumerate((ends - starts).tolist()):
            here = slice(at, at + count)
            self._fill(made, i, pieces[here], counts[here], hidden[here], int(epochs[i]))
            at += count
        if int(made.tokens.max()) >= self.vocabulary.size:
            raise UserError(
                f"{self.documents.folder}: token {int(made.tokens.max())} is beyond the {self.vocabulary.size} ids of "
                f"{self.vocabulary.folder}: the file is damaged; tokenise the documents again"
            )
        if self.loss_on in ("text", "image"):
            made.loss &= self.vocabulary.is_image(made.tokens) == (self.loss_on == "image")
        return made

    def _fill(self, made: Rows, i: int, pieces: np.ndarray, counts: np.ndarray, hidden: np.ndarray, epoch: int) -> None:
        """Write row i; spans come first to the pieces that come first, while the row has room."""
        room = (self.columns - int(self.packing.lengths[pieces].sum())) // GROWTH
        at = 0
        for number, (piece, count, hide) in enumerate(zip(pieces.tolist(), counts.tolist(), hidden, strict=True)):
            start, length = int(self.packing.starts[piece]), int(self.packing.lengths[piece])
            tokens, loss = self.documents.tokens[start : start + length], True
            if self.loss_on == "response":
                loss = self._responses(piece, start, length)
            if hide and self.vocabulary.is_image(tokens).any():
                tokens = self.vocabulary.without_text(tokens)
                loss, count = loss & (tokens != self.vocabulary.mask_id), 0
            if min(count, room):
                tokens = tokens.astype(np.int64)
                stretches = maskable(tokens, self._borders(piece, start, length), self.vocabulary)
                spans = draw_spans(self.seed, epoch, piece + self.first_number, min(count, room), stretches)
                tokens, origins = mask_spans(tokens, spans, self.vocabulary)
                loss = loss if loss is True else loss[origins]
                room -= len(spans)
            end = at + len(tokens)
            made.tokens[i, at:end], made.loss[i, at:end] = tokens, loss
            made.loss[i, at] = False
            made.segments[i, at:end], made.positions[i, at:end] = number, np.arange(len(tokens))
            at = end
        made.segments[i, at:], made.positions[i, at:] = len(pieces), np.arange(self.columns - at)

    def _borders(self, piece: int, start: int, length: int) -> np.ndarray:
        """Where the segments of a piece begin, and its length, in tokens from its start."""
        first, last = self.documents.first_segments[self.packing.documents[piece] + np.arange(2)]
        starts = self.documents.segment_starts[first : last + 1] - start
        inside = starts[(starts > 0) & (starts < length)]
        return np.concatenate([[0], inside, [length]])

    def _responses(self, piece: int, start: int, length: int) -> np.ndarray | bool:
        """Which tokens of a piece belong to a response, bool [length]; True: the document has none, so all count."""
        document = int(self.packing.documents[piece])
        if not self.documents.has_response[document]:
            return True
        first, last = self.documents.first_segments[document : document + 2]
        sizes = np.diff(self.documents.segment_starts[first : last + 1])
        response = np.repeat(self.documents.modes[first:last] & RESPONSE > 0, sizes)
        offset = start - int(self.documents.starts[document])
        return response[offset : offset + length]
