"""Which ids begin, end and pad a text: what a tokenizer's own file says, then the files that libraries lay beside it.

In this order: what the user names, the file's own ids (SentencePiece), `tokenizer_config.json` and
`special_tokens_map.json`, what the file's post-processor puts around a text, `generation_config.json` and
`config.json`, and, where one such token alone is there, the names of the field. BERT's [CLS] and
[SEP] begin and end a text. Padding that is another mark, too, is no padding: a loss that leaves it out would leave out
that mark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megamug.errors import UserError

NAMED_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERED_BESIDE = ("generation_config.json", "config.json")
BESIDE = NAMED_BESIDE + NUMBERED_BESIDE
# By role: what a person calls it, the keys of the files, and the field's names.
ROLES = {
    "bos": ("begin", ("bos_token", "cls_token"), ("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|endoftext|>")),
    "eos": ("end", ("eos_token", "sep_token"), ("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>")),
    "pad": ("pad", ("pad_token",), ("<pad>", "[PAD]")),
    "unk": ("unknown", ("unk_token",), ("<unk>", "[UNK]")),
}
NEEDED = ("bos", "eos")


@dataclass(frozen=True)
class Marks:
    """Ids of a tokenizer. `bos` and `eos` may be one (GPT-2, OPT); `pad`, if there is one, is neither, nor `unk`."""

    bos: int
    eos: int
    pad: int | None
    unk: int | None = None


TRAINED_HERE = Marks(1, 2, 0, 3)


def alone(bos: int, eos: int, pad: int | None, unk: int | None) -> Marks:
    """The marks, without a padding that is another mark as well."""
    return Marks(bos, eos, None if pad in (bos, eos, unk) else pad, unk)


def find_marks(
    path: Path,
    own: Mapping[str, int],
    pieces: int,
    token_id: Callable[[str], int | None],
    special: Mapping[str, int],
    named: Mapping[str, str],
) -> Marks:
    """Of the tokenizer file `path` with `pieces` ids.

    `own`: ids that the file itself tells, by role; `special`: its added special tokens; `named`: tokens that the user
    names, by role. Raises `UserError` where a token is named that is not there, and where nothing tells how a text
    begins or ends.
    """
    beside = {name: _read(path.with_name(name)) for name in BESIDE}
    found: dict[str, int | None] = {}
    for role in ROLES:
        found[role] = _find(role, path, own, pieces, token_id, special, named, beside)
    for role in NEEDED:
        if found[role] is None:
            word, keys, _ = ROLES[role]
            lists = ", ".join(list(special)[:8]) or "none"
            raise UserError(
                f"{path}: which token is to {word} a text it does not tell, nor does a file beside it (its special "
                f'tokens: {lists}); name it: {{"{keys[0]}": "TOKEN"}} in {path.with_name(NAMED_BESIDE[1])}, or '
                f"--{word} TOKEN of megamug data vocabulary"
            )
    return alone(**found)


def _find(role, path, own, pieces, token_id, special, named, beside) -> int | None:
    word, keys, names = ROLES[role]
    if role in named:
        number = token_id(named[role])
        if number is None:
            raise UserError(f"{path} has no token {named[role]!r} to {word} a text; name another")
        return number
    if role in own and own[role] is not None:
        return own[role]
    for name in NAMED_BESIDE:
        for key in keys:
            text = beside[name].get(key)
            text = text.get("content") if isinstance(text, dict) else text
            if not isinstance(text, str):
                continue
            number = token_id(text)
            if number is not None:
                return number
            if role in NEEDED:
                raise UserError(f"{path.with_name(name)} says {key} {text!r}, and {path.name} has no such token; they"
                                " are of two tokenizers: copy both again")  # fmt: skip
    if f"{role} around" in own:
        return own[f"{role} around"]
    for name in NUMBERED_BESIDE:
        number = beside[name].get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < pieces:
            return number
    known = [special[name] for name in names if name in special]
    return known[0] if len(known) == 1 else None


def _read(path: Path) -> dict:
    """A JSON file beside a tokenizer; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, which lies beside a tokenizer, is no JSON ({error}); copy it again, or remove it"
                        ) from None  # fmt: skip
    return tree if isinstance(tree, dict) else {}
