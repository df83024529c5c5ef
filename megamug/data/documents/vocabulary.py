"""One vocabulary for text and images: a text tokenizer's pieces, the image tokenizer's codes, and what joins them.

Ids: text pieces [0, T) as their tokenizer numbers them, image codes [T, T + K), then `<break>` (between text and
image), `<eoss>` (end of a masked span), `<mask>` (stands for text in unconditional guidance), the sentinels of masked
spans and, where the tokenizer has no padding, `<pad>`. Begin and end of a document are the tokenizer's (padding is 0,
begin 1, end 2 in one that was trained here). A vocabulary is a folder: `vocabulary.json`, `text.model` (SentencePiece)
or `text.json` (a tokenizer.json) and, where it knows images, `image_tokenizer/`. Made by
megamug data vocabulary (`megamug.models.image_tokenizer.vocabulary`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from megamug.data.padding import padded_vocabulary
from megamug.data.pairs.text import Tokenizer
from megamug.data.text.marks import TRAINED_HERE, Marks
from megamug.durable import read_record
from megamug.errors import UserError

VOCABULARY_VERSION = 1
FILE, IMAGE_TOKENIZER = "vocabulary.json", "image_tokenizer"
TEXT_FILES = {"tokenizer.model": "text.model", "tokenizer.json": "text.json"}  # by kind of tokenizer
_SPECIALS = 3  # <break>, <eoss>, <mask>


@dataclass(frozen=True)
class VocabularySpec:
    """What `vocabulary.json` holds. The fingerprint is a hash of it."""

    text_pieces: int
    text_sha256: str
    codes: int  # of the image tokenizer's codebook; 0: text alone
    image_grid: tuple[int, int]  # codes of an image: rows, columns; (0, 0): text alone
    image_size: int  # pixels a side
    image_tokenizer: str  # its fingerprint; "": text alone
    sentinels: int
    version: int = VOCABULARY_VERSION
    # Of the text tokenizer. Left out of the file and the fingerprint where they are those of one that was trained here.
    text_file: str = TEXT_FILES["tokenizer.model"]
    begin: int = TRAINED_HERE.bos
    end: int = TRAINED_HERE.eos
    pad: int = TRAINED_HERE.pad  # the last id of all where the tokenizer has none

    def record(self) -> dict:
        """What is written, and hashed."""
        defaults = {field.name: field.default for field in fields(self)}
        new = ("text_file", "begin", "end", "pad")
        return {key: value for key, value in asdict(self).items() if key not in new or value != defaults[key]}

    @property
    def own_pad(self) -> bool:
        """Whether padding is a piece of the tokenizer."""
        return self.pad < self.text_pieces

    @property
    def size(self) -> int:
        """Ids in all."""
        return self.text_pieces + self.codes + _SPECIALS + self.sentinels + (not self.own_pad)

    @property
    def marks(self) -> Marks:
        return Marks(self.begin, self.end, self.pad if self.own_pad else None)


class Vocabulary:
    """A vocabulary folder, opened. Nothing of the image tokenizer is loaded but what the JSON says of it."""

    def __init__(self, spec: VocabularySpec, text: Tokenizer, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self._text = text
        self.text_pieces, self.codes = spec.text_pieces, spec.codes
        self.first_code = spec.text_pieces
        self.break_id = self.first_code + spec.codes
        self.eoss_id, self.mask_id = self.break_id + 1, self.break_id + 2
        first_sentinel = self.break_id + _SPECIALS
        self.sentinels = range(first_sentinel, first_sentinel + spec.sentinels)
        self.size = spec.size
        self.pad_id, self.bos_id, self.eos_id = spec.pad, spec.begin, spec.end
        self.image_size, self.image_grid = spec.image_size, spec.image_grid
        self.image_tokens = spec.image_grid[0] * spec.image_grid[1]  # of one image, row by row

    @staticmethod
    def load(folder: str | Path | None) -> Vocabulary:
        """Open a vocabulary folder. Raises `UserError` where it is none, is incomplete, or its files were changed."""
        remedy = "run: megamug data vocabulary --text TOKENIZER.model --image-tokenizer FOLDER --output FOLDER"
        if folder is None:
            raise UserError(f"data.tokenizer is not set; set it to the vocabulary folder of the model, or {remedy}")
        folder = Path(folder)
        if folder.is_file():
            raise UserError(f"{folder} is a file; data.tokenizer of a language model is a vocabulary folder; {remedy}")
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: no vocabulary in there ({FILE} is missing); {remedy}")
        try:
            spec = read_record((folder / FILE).read_bytes(), VocabularySpec)
        except ValueError as error:
            raise UserError(f"{folder / FILE}: not a vocabulary ({error}); {remedy}") from error
        if spec.version != VOCABULARY_VERSION:
            raise UserError(f"{folder / FILE}: version {spec.version}, this program reads {VOCABULARY_VERSION}")
        wrong = [spec.begin, spec.end] if max(spec.begin, spec.end) >= spec.text_pieces else []
        wrong += [spec.pad] if not spec.own_pad and spec.pad != spec.size - 1 else []
        if wrong or spec.text_file not in TEXT_FILES.values():
            said = f"a mark {wrong[0]}" if wrong else f"text_file {spec.text_file!r}"
            raise UserError(f"{folder / FILE} says {said}, which no vocabulary has; restore the file, or make the"
                            " vocabulary again")  # fmt: skip
        path = folder / spec.text_file
        if not path.is_file():
            raise UserError(f"{path} is missing; restore the file, or make the vocabulary again")
        text = Tokenizer(path, marks=spec.marks)
        found = text.sha256
        if (text.pieces, found) != (spec.text_pieces, spec.text_sha256):
            raise UserError(
                f"{path}: another model (SHA-256 {found[:12]}) than the vocabulary was made of "
                f"({spec.text_sha256[:12]}); restore the file, or make the vocabulary again"
            )
        return Vocabulary(spec, text, folder)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding: the size, rounded up to a multiple of 128."""
        return padded_vocabulary(self.size)

    def fingerprint(self) -> str:
        """SHA-256 over the specification: equal where every id means the same."""
        return hashlib.sha256(json.dumps(self.spec.record(), sort_keys=True).encode()).hexdigest()

    def encode_text(self, text: str) -> list[int]:
        """Ids of the text alone, without begin and end."""
        return self._text.encode(text)

    def decode_text(self, tokens: Iterable[int]) -> str:
        """The text of the pieces among `tokens`; image codes, `<break>` and other marks are left out."""
        return self._text.decode([int(t) for t in tokens if int(t) < self.text_pieces and int(t) != self.eos_id])

    def image_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes of the image tokenizer [...] -> ids, int64 [...]. Raises `UserError` for one outside the codebook."""
        codes = np.asarray(codes, np.int64)
        outside = (codes < 0) | (codes >= self.codes)
        if outside.any():
            raise UserError(
                f"image code {int(codes[outside].flat[0])} is outside the codebook of {self.codes} codes of "
                f"{self.folder}; is the image tokenizer the one that the vocabulary was made of?"
            )
        return codes + self.first_code

    def image_codes(self, tokens: np.ndarray) -> np.ndarray:
        """The inverse of `image_ids`, for one image: [image_tokens] -> codes int64 [rows, columns].

        Raises `UserError` where the tokens are not exactly one image's codes.
        """
        tokens = np.asarray(tokens, np.int64)
        if tokens.shape != (self.image_tokens,):
            raise UserError(f"{tokens.size} tokens where an image has {self.image_tokens}")
        codes = tokens - self.first_code
        if ((codes < 0) | (codes >= self.codes)).any():
            raise UserError(f"token {int(tokens[(codes < 0) | (codes >= self.codes)][0])} is no image code")
        return codes.reshape(self.image_grid)

    def is_image(self, tokens: np.ndarray) -> np.ndarray:
        """Which of `tokens` (array or tensor) are image codes: bool of the same shape."""
        return (tokens >= self.first_code) & (tokens < self.first_code + self.codes)

    def without_text(self, tokens: np.ndarray) -> np.ndarray:
        """`tokens` (array or tensor), int64, with `<mask>` in the place of each text piece; codes and marks stay."""
        text = tokens < self.text_pieces
        for mark in (self.pad_id, self.bos_id, self.eos_id):
            text = text & (tokens != mark)
        return tokens * ~text + self.mask_id * text  # what arrays and tensors both have

    def name(self, token: int) -> str:
        """How a person reads one id: the text of a piece, `<image 17>`, `<break>`, `<sentinel 0>`, ..."""
        if token < self.text_pieces:
            marks = {self.eos_id: "<eos>", self.bos_id: "<bos>", self.pad_id: "<pad>"}
            return marks.get(token) or self._text.decode([token])
        if token < self.break_id:
            return f"<image {token - self.first_code}>"
        if token >= self.size:
            return f"<unused {token}>"
        marks = {self.break_id: "<break>", self.eoss_id: "<eoss>", self.mask_id: "<mask>"}
        marks |= {} if self.spec.own_pad else {self.pad_id: "<pad>"}
        return marks.get(token) or f"<sentinel {token - self.sentinels.start}>"
