"""Converted runs: nobody trained them here, so nothing but numbers tells whether a vocabulary is theirs."""

from __future__ import annotations

from megamug.data.padding import padded_vocabulary
from megamug.errors import UserError


def vocabulary_rows(state: dict) -> int | None:
    """Rows of the vocabulary's tables of a converted model, without padding; None of a run that was trained here or has
    no vocabulary. `state`: `state.json` of its checkpoint. Raises UserError where that is not what megamug writes."""
    origin = state.get("origin") or {}
    rows = (origin.get("vocabulary") if isinstance(origin, dict) else origin) or []
    rows = rows if isinstance(rows, list) else [rows]
    if not all(type(count) is int and 0 < count < 2**31 for count in rows):
        raise UserError(f"state.json says origin {origin!r:.200}, which megamug does not write; convert it again")
    return sum(rows) or None


def check_vocabulary(rows: int, size: int, folder: object) -> str | None:
    """Whether the vocabulary `folder` of `size` ids can be that of tables of `rows` rows. Returns a remark where rows
    are left over (published models round their tables up). Raises UserError: an id without a row, or more rows than
    rounding leaves."""
    if size > rows or padded_vocabulary(size) != padded_vocabulary(rows):
        raise UserError(
            f"data.tokenizer: {folder} has {size} ids and the model's tables have {rows} rows, so it is another's;"
            " give the vocabulary that this one was trained with, or convert it with --vocabulary, which adds rows"
        )
    return None if size == rows else f"{rows - size} of {rows} rows of the tables are of no id of {folder}"
