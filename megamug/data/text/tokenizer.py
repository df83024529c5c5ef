"""Text to tokens and back, by a SentencePiece model or a `tokenizer.json`, trained here or published by others.

Ids are the file's own. A text is framed by the file's tokens for begin and end, see `megamug.data.text.marks`; one that
has no padding gets an id behind its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megamug.data.text.marks import BESIDE, Marks, alone, find_marks
from megamug.data.text.sentencepiece_model import SentencePieceModel
from megamug.data.text.tokenizer_json import TokenizerJson
from megamug.errors import UserError

if TYPE_CHECKING:
    import torch

KINDS = (TokenizerJson, SentencePieceModel)  # the first of them that a folder holds is read, as transformers does


def tokenizer_file(path: str | Path) -> Path:
    """The file that `path`, a file or a folder of a published model, means. Raises `UserError` where there is none."""
    path = Path(path)
    if path.is_dir():
        found = next((path / kind.name for kind in KINDS if (path / kind.name).is_file()), None)
        if found is None:
            raise UserError(f"{path}: a folder without {' or '.join(kind.name for kind in KINDS)}; give the file")
        return found
    if not path.is_file():
        command = f"megamug data tokenizer SHARDS --output {path} --vocab-size 8000"
        raise UserError(f"{path}: no such tokenizer; run: {command}")
    return path


def files_beside(path: Path) -> list[Path]:
    """The files beside the tokenizer file `path` that say what its tokens are for."""
    return [found for name in BESIDE if (found := path.with_name(name)).is_file()]


class Tokenizer:
    """A tokenizer file, opened: `data` are its bytes, `sha256` its identity. `pieces` ids are its own; with padding of
    ours there are `vocab_size`."""

    def __init__(
        self, path: str | Path, *, named: Mapping[str, str] | None = None, marks: Marks | None = None
    ) -> None:
        """`path`: a SentencePiece model, a tokenizer.json, or a folder with one. `named`: tokens that the user names,
        by role (`bos`, `eos`, `pad`); `marks`: ids that were found before. Raises `UserError`: no such file, not one of
        the two kinds, an unknown token, none to begin or end a text."""
        self.path = tokenizer_file(path)
        try:
            self.data = data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        # A SentencePiece model begins with a tag of protobuf, never with a brace.
        kind = TokenizerJson if self.path.suffix == ".json" or data[:1] == b"{" else SentencePieceModel
        self.name = kind.name
        self._model = model = kind(self.path, data)
        self.pieces = model.size
        if marks is None:
            marks = find_marks(self.path, model.own, model.size, model.token_id, model.special, named or {})
        self.marks = marks
        self.bos_id, self.eos_id = marks.bos, marks.eos
        self.pad_id = self.pieces if marks.pad is None else marks.pad
        self.framing = replace(marks, pad=self.pad_id)
        self.sha256 = hashlib.sha256(data + self._other_marks()).hexdigest()  # of what is used, whatever becomes of it

    def _other_marks(self) -> bytes:
        """The marks, where the file does not tell them by itself: they make it another tokenizer."""
        own, marks = self._model.own, self.marks
        if "bos" in own and "eos" in own:
            told = alone(own["bos"], own["eos"], own.get("pad"), own.get("unk"))
            if (told.bos, told.eos, told.pad) == (marks.bos, marks.eos, marks.pad):
                return b""
        return repr((marks.bos, marks.eos, marks.pad)).encode()

    @property
    def vocab_size(self) -> int:
        return self.pieces + (self.marks.pad is None)

    def token(self, text: str) -> int | None:
        """The id of a token by its spelling."""
        return self._model.token_id(text)

    def encode(self, caption: str) -> list[int]:
        """Token ids of the caption alone, without begin and end."""
        return self._model.encode(caption)

    def encode_batch(self, captions: list[str], caption_length: int) -> torch.Tensor:
        """Captions -> int64 [b, caption_length + 1]: begin, tokens, end, padding.

        The model reads [:, :-1] and predicts [:, 1:]. A caption with more than caption_length - 1 tokens is cut after
        caption_length tokens and has no end, so that the model does not learn to stop in the middle.
        """
        tokens = np.full((len(captions), caption_length + 1), self.pad_id, np.int64)
        for row, ids in zip(tokens, map(self.encode, captions), strict=True):
            ids = [self.bos_id, *ids, self.eos_id][: caption_length + 1]
            row[: len(ids)] = ids
        import torch  # a tokenizer is looked at before torch is loaded

        return torch.from_numpy(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens up to the first end; a begin in front and padding are left out."""
        ids = []
        for place, token in enumerate(map(int, tokens)):
            if token == self.bos_id and (place == 0 or self.bos_id != self.eos_id):
                continue
            if token == self.eos_id:
                break
            if token != self.pad_id:
                ids.append(token)
        return self._model.decode(ids)
