"""`tokenizer.json` of the `tokenizers` package: byte-level BPE (GPT-2, LLaMA 3), WordPiece (BERT), Unigram (T5, XLM-R).

Texts are data: `<|endoftext|>` in a caption is those thirteen characters, and no end. The library cuts and pads texts
where the file says so (a length that someone trained with); here it does neither.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from megamug.errors import UserError

VERSION = "1.0"


def library():
    """The one door to `tokenizers`. Raises `UserError` where it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"a tokenizer.json needs the package tokenizers ({error}); run: pip install tokenizers"
                        ) from error  # fmt: skip
    return tokenizers


class TokenizerJson:
    """Ids and text of one `tokenizer.json`."""

    name = "tokenizer.json"

    def __init__(self, path: Path, data: bytes) -> None:
        """Raises `UserError` where `data`, the bytes of `path`, are no such file, one of another version, or one whose
        ids the library does not keep."""
        tree = _checked(path, data)
        try:
            self._model = library().Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: the package tokenizers does not read it ({error}); copy it again, or upgrade the "
                            "package") from None  # fmt: skip
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{path}: its vocabulary is empty; copy it again")
        self.size = max(vocabulary.values()) + 1
        added = [entry for entry in tree.get("added_tokens") or () if isinstance(entry, dict)]
        for entry in added:
            if (number := vocabulary.get(entry.get("content"))) != entry.get("id"):
                raise UserError(f"{path} says that {entry.get('content')!r} is {entry.get('id')}, and the package "
                                f"tokenizers makes it {number}: ids would not be kept; copy it again")  # fmt: skip
        self.special = {entry["content"]: entry["id"] for entry in added if entry.get("special")}
        unknown = _unknown(tree["model"], vocabulary)
        self.own = self._around() | ({} if unknown is None else {"unk": unknown})
        self._never = set(self.special.values()) - {unknown}
        for token, number in self.special.items():
            if len(token) < 2 and number in self._never and number in self._model.encode(token).ids:
                raise UserError(f"{path}: the special token {token!r} is one character, so a text cannot be told from "
                                "it; give another tokenizer")  # fmt: skip

    def _around(self) -> dict[str, int]:
        """What the post-processor puts around a text, where it is one token before or behind."""
        plain, framed = (self._model.encode("a", add_special_tokens=add).ids for add in (False, True))
        at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), None) if plain else None
        if at is None:
            return {}
        before, behind = framed[:at], framed[at + len(plain) :]
        return {f"{role} around": ids[0] for role, ids in (("bos", before), ("eos", behind)) if len(ids) == 1}

    def token_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        ids = self._model.encode(text, add_special_tokens=False).ids
        return ids if self._never.isdisjoint(ids) else self._in_parts(text)

    def _in_parts(self, text: str) -> list[int]:
        """Of a text that spells a special token which is a piece of the model as well (Unigram): it is cut behind the
        token's first character and the parts are encoded apart, with what the model puts before a text."""
        tokens = sorted((token for token in self.special if len(token) > 1), key=len, reverse=True)
        found = re.finditer("|".join(map(re.escape, tokens)), text) if tokens else ()
        cuts = [0, *(match.start() + 1 for match in found), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        ids = [i for part in parts for i in self._model.encode(part, add_special_tokens=False).ids]
        if not self._never.isdisjoint(ids):  # a normaliser spells it, or tokens lie inside one another
            raise UserError(f"{text[:60]!r} becomes a special token of the tokenizer; leave the text out")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)


def _checked(path: Path, data: bytes) -> dict:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}), so no tokenizer.json; copy it again") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise UserError(f"{path} is no tokenizer.json of the package tokenizers (it holds no model); a folder with "
                        "vocab.json alone gets one by transformers: AutoTokenizer.from_pretrained(FOLDER)"
                        ".save_pretrained(OTHER)")  # fmt: skip
    if tree.get("version") != VERSION:
        raise UserError(f"{path} is a tokenizer.json of version {tree.get('version')!r}, this program reads {VERSION}; "
                        "save it again with the tokenizers package that is installed")  # fmt: skip
    return tree


def _unknown(model: dict, vocabulary: dict[str, int]) -> int | None:
    """The id of what the model has no piece for."""
    if isinstance(model.get("unk_token"), str):
        return vocabulary.get(model["unk_token"])
    number = model.get("unk_id")  # Unigram
    return number if type(number) is int else None
