"""Captions to tokens and back: SentencePiece (Kudo and Richardson 2018), with four fixed ids.

pad 0, begin of sequence 1, end of sequence 2, unknown 3. Bytes stand in for what no piece covers, so nothing becomes
unknown. A tokenizer that is trained here changes nothing of a text (no normalisation, white space as it is): decoding
gives back to the byte what was encoded. (One that was made elsewhere may normalise.)
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megamug.data.shards.sources import Source
from megamug.durable import write_atomically
from megamug.errors import UserError

if TYPE_CHECKING:
    import torch

PAD, BOS, EOS, UNKNOWN = range(4)
MAX_TRAINING_CAPTIONS = 2_000_000  # SentencePiece holds them in memory
LONGEST = 1 << 16  # bytes of a text that SentencePiece trains on; it drops longer ones
SPACE = "\u2581"  # what SentencePiece writes a space as; a text may hold the character itself


def _sentencepiece():
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f"captions need SentencePiece ({error}); run: pip install sentencepiece") from error
    return sentencepiece


class Tokenizer:
    """A trained SentencePiece model."""

    def __init__(self, path: str | Path) -> None:
        """Raises `UserError` where `path` is not a SentencePiece model with the ids above."""
        self.path = Path(path)
        if not self.path.is_file():
            command = f"megamug data tokenizer SHARDS --output {path} --vocab-size 8000"
            raise UserError(f"{path}: no such tokenizer; run: {command}")
        self._model = _sentencepiece().SentencePieceProcessor()
        try:
            read = self.path.read_bytes()
            self.sha256 = hashlib.sha256(read).hexdigest()  # of what is used, whatever becomes of the file
            self._model.LoadFromSerializedProto(read)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({error})") from error
        ids = (self._model.pad_id(), self._model.bos_id(), self._model.eos_id(), self._model.unk_id())
        if ids != (PAD, BOS, EOS, UNKNOWN):
            raise UserError(f"{path}: pad, bos, eos, unk have the ids {ids}; train it with ids (0, 1, 2, 3)")
        self._stand_in = self._find_stand_in()

    def _find_stand_in(self) -> tuple[str, list[int], list[int]] | None:
        """(a character that has no piece, the ids of its bytes, those of `SPACE`): text that holds `SPACE` itself is
        encoded with the character in its place. None for a model without bytes, where it becomes a space."""
        char = next(c for c in map(chr, range(0xE000, 0xF900)) if self._model.PieceToId(c) == UNKNOWN)
        own, wanted = ([self._model.PieceToId(f"<0x{byte:02X}>") for byte in x.encode()] for x in (char, SPACE))
        return None if UNKNOWN in own + wanted else (char, own, wanted)

    @property
    def vocab_size(self) -> int:
        return self._model.GetPieceSize()

    def encode(self, caption: str) -> list[int]:
        """Token ids of the caption alone, without begin and end."""
        if SPACE not in caption or self._stand_in is None or self._stand_in[0] in caption:
            return self._model.EncodeAsIds(caption)
        char, own, wanted = self._stand_in
        ids = self._model.EncodeAsIds(caption.replace(SPACE, char))
        for at in range(len(ids) - len(own) + 1):
            if ids[at : at + len(own)] == own:
                ids[at : at + len(own)] = wanted
        return ids

    def encode_batch(self, captions: list[str], caption_length: int) -> torch.Tensor:
        """Captions -> int64 [b, caption_length + 1]: begin, tokens, end, padding.

        The model reads [:, :-1] and predicts [:, 1:]. A caption with more than caption_length - 1 tokens is cut after
        caption_length tokens and has no end, so that the model does not learn to stop in the middle.
        """
        tokens = np.full((len(captions), caption_length + 1), PAD, np.int64)
        for row, ids in zip(tokens, map(self.encode, captions), strict=True):
            ids = [BOS, *ids, EOS][: caption_length + 1]
            row[: len(ids)] = ids
        import torch  # a tokenizer is looked at before torch is loaded

        return torch.from_numpy(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens up to the first end; begin and padding are left out."""
        ids = []
        for token in tokens:
            token = int(token)
            if token == EOS:
                break
            if token not in (PAD, BOS):
                ids.append(token)
        return self._model.DecodeIds(ids)


def iterate_captions(sources: list[Source], limit: int = MAX_TRAINING_CAPTIONS) -> Iterator[str]:
    """Captions of the sources in the order of the shards; every k-th where there are more than `limit`."""
    total = sum(len(source) for source in sources)
    stride = -(-total // limit)
    position = 0
    for source in sources:
        for shard, count in zip(source.shards, source.counts(), strict=True):
            for i in range(-position % stride, count, stride):
                yield shard.caption(i)
            position += count
            shard.close()


def train_tokenizer(
    captions: Iterable[str], output: str | Path, vocab_size: int, *, overwrite: bool = False
) -> int:
    """Train a byte-pair model on `captions`, write it to `output` atomically, return its size.

    Deterministic: the same captions give the same bytes. Few different words make fewer pieces than asked for. Texts
    may be of any length.
    Raises `UserError` where `vocab_size` does not hold the bytes and characters, and where `output` is another file
    that `overwrite` does not give up.
    """
    sentencepiece = _sentencepiece()
    if vocab_size < 4 + 256 + 1:
        raise UserError(f"--vocab-size is {vocab_size}; 4 control tokens, 256 bytes and the characters need 300 or so")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_pieces(captions), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            hard_vocab_limit=False, byte_fallback=True, character_coverage=0.9995, max_sentence_length=LONGEST,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNKNOWN, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"SentencePiece cannot train a vocabulary of {vocab_size}: {error}") from error
    output = Path(output)
    if not overwrite and output.exists() and output.read_bytes() != model.getvalue():
        raise UserError(
            f"{output} is there already and differs from what was trained now; checkpoints depend on their "
            "tokenizer: give another --output, or --overwrite"
        )
    write_atomically(output, model.getvalue())
    return Tokenizer(output).vocab_size


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts, those that SentencePiece would drop cut into pieces: behind a space, across which no piece of the
    vocabulary reaches, where there is one."""
    for text in texts:
        while len(text.encode()) > LONGEST:
            head = text.encode()[:LONGEST].decode(errors="ignore")  # no half character
            cut = head.rfind(" ") + 1 or len(head)
            yield text[:cut]
            text = text[cut:]
        yield text
