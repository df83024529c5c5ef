"""Tokenizers of captions, trained here: SentencePiece (Kudo and Richardson 2018), with four fixed ids.

pad 0, begin of sequence 1, end of sequence 2, unknown 3. Bytes stand in for what no piece covers, so nothing becomes
unknown. A tokenizer that is trained here changes nothing of a text (no normalisation, white space as it is): decoding
gives back to the byte what was encoded. `Tokenizer` reads those of others, too: `megamug.data.text.tokenizer`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from megamug.data.shards.sources import Source
from megamug.data.text.marks import TRAINED_HERE
from megamug.data.text.sentencepiece_model import library
from megamug.data.text.tokenizer import Tokenizer
from megamug.durable import write_atomically
from megamug.errors import UserError

PAD, BOS, EOS, UNKNOWN = TRAINED_HERE.pad, TRAINED_HERE.bos, TRAINED_HERE.eos, TRAINED_HERE.unk
MAX_TRAINING_CAPTIONS = 2_000_000  # SentencePiece holds them in memory
LONGEST = 1 << 16  # bytes of a text that SentencePiece trains on; it drops longer ones


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
    sentencepiece = library()
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
