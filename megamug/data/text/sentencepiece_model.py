"""SentencePiece models (Kudo and Richardson 2018), trained here or elsewhere."""

from __future__ import annotations

from pathlib import Path

from megamug.data.text.marks import TRAINED_HERE, Marks
from megamug.errors import UserError

SPACE = "\u2581"  # what SentencePiece writes a space as; a text may hold the character itself


def library():
    """The one door to `sentencepiece`. Raises `UserError` where it is not installed."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f"captions need SentencePiece ({error}); run: pip install sentencepiece") from error
    return sentencepiece


class SentencePieceModel:
    """Ids and text of one model. A text is never read as a control token, whatever it spells."""

    name = "tokenizer.model"

    def __init__(self, path: Path, data: bytes) -> None:
        """Raises `UserError` where `data`, the bytes of `path`, are not a SentencePiece model."""
        self._model = library().SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model ({error}); of a model folder whose tokenizer.model is "
                            "of another kind, as LLaMA 3's, give its tokenizer.json") from error  # fmt: skip
        self.size = self._model.GetPieceSize()
        ids = {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "pad": self._model.pad_id(),
               "unk": self._model.unk_id()}  # fmt: skip
        self.own = {role: number for role, number in ids.items() if number >= 0}
        self.special: dict[str, int] = {}  # control tokens tell their role themselves
        self._stand_in = self._find_stand_in() if Marks(**ids) == TRAINED_HERE else None

    def _find_stand_in(self) -> tuple[str, list[int], list[int]] | None:
        """(a character that has no piece, the ids of its bytes, those of `SPACE`): text that holds `SPACE` itself is
        encoded with the character in its place. None for a model without bytes, where it becomes a space."""
        unknown = self.own["unk"]
        char = next(c for c in map(chr, range(0xE000, 0xF900)) if self._model.PieceToId(c) == unknown)
        own, wanted = ([self._model.PieceToId(f"<0x{byte:02X}>") for byte in x.encode()] for x in (char, SPACE))
        return None if unknown in own + wanted else (char, own, wanted)

    def token_id(self, token: str) -> int | None:
        number = self._model.PieceToId(token)
        return number if 0 <= number < self.size and self._model.IdToPiece(number) == token else None

    def encode(self, text: str) -> list[int]:
        if SPACE not in text or self._stand_in is None or self._stand_in[0] in text:
            return self._model.EncodeAsIds(text)
        char, own, wanted = self._stand_in
        ids = self._model.EncodeAsIds(text.replace(SPACE, char))
        for at in range(len(ids) - len(own) + 1):
            if ids[at : at + len(own)] == own:
                ids[at : at + len(own)] = wanted
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._model.DecodeIds(ids)
