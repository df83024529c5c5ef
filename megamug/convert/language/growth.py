"""A published language model in a vocabulary that has more ids than its tables have rows: image codes and marks.

Old rows stay as they are, so the logits of old ids do. A new row is the mean of the old ones, so that at first no new
id is likelier than old ones are on average (Hewitt 2021, "Initializing new word embeddings for pretrained language
models"), with noise that tells new ids apart; or zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamug.checkpoint.tensors import LazyTensor
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.padding import padded_vocabulary
from megamug.errors import UserError
from megamug.models.random_numbers import Distribution, fill, key_of

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
KINDS = ("mean", "zeros")
NOISE = 0.01  # of the standard deviation of the old rows, column by column
# Rows that publishers add to round a table up: up to 2.3 % of it in models that are known (DeepSeek-LLM).
SPARE, LEAST_SPARE = 0.05, 128


@dataclass(frozen=True)
class NewRows:
    """How rows for new ids are made. `seed`: of the noise; unused by zeros."""

    kind: str = "mean"
    seed: int = 1


MEAN_ROWS = NewRows()


def rows_in(vocabulary: Vocabulary, rows: tuple[int, ...], view_config: dict) -> tuple[int, list[str]]:
    """(rows without padding that the tables are to have, remarks) for a model with tables of `rows` and this
    `config.json`. Raises `UserError` where the vocabulary's text tokenizer cannot be the model's."""
    if len(rows) != 1:
        raise UserError("--vocabulary is for language models with one table of tokens; leave it out")
    (old,), pieces, size = rows, vocabulary.text_pieces, vocabulary.size
    if pieces > old:
        raise UserError(f"{vocabulary.folder}: its tokenizer has {pieces} ids and the model's tables have {old} rows,"
                        " so it is another model's; make the vocabulary of the model's own tokenizer")  # fmt: skip
    if old - pieces > max(LEAST_SPARE, SPARE * old):
        raise UserError(f"{vocabulary.folder}: its tokenizer has {pieces} ids and the model's tables have {old} rows:"
                        f" {old - pieces} would have no text, more than publishers add; make the vocabulary of the"
                        " model's own tokenizer")  # fmt: skip
    remarks = []
    for key, word, own in (("bos_token_id", "begin", vocabulary.bos_id), ("eos_token_id", "end", vocabulary.eos_id)):
        said = view_config.get(key)
        if said is not None and own not in (said if isinstance(said, list) else [said]):
            remarks.append(f"the model's config.json says {key} {said}, and texts {word} with {own} in"
                           f" {vocabulary.folder}: is it the model's?")  # fmt: skip
    if size <= old and padded_vocabulary(size) == padded_vocabulary(old):
        return old, remarks
    if size < old:
        remarks.append(f"{old - size} of {old} rows of the tables, of no id of {vocabulary.folder}, are left out")
    return size, remarks


def fitted(tensor: LazyTensor, old: int, size: int, new: NewRows) -> LazyTensor:
    """A table of `old` rows and padding -> one of `size` rows and padding."""
    shape = (padded_vocabulary(size), tensor.shape[1])

    def read() -> Tensor:
        kept = tensor.read()[: min(old, size)]
        table = kept.new_zeros(shape)
        table[: len(kept)] = kept
        if size > old and new.kind == "mean":
            table[old:size] = _drawn(kept, tensor.name, size, new.seed)
        return table

    return LazyTensor(tensor.name, shape, tensor.dtype, read)


def _drawn(old: Tensor, name: str, size: int, seed: int) -> Tensor:
    """Rows [len(old), size) of a table: a pure function of the old rows, the seed and the place."""
    rows, width = old.shape
    noise = fill(torch.empty(size - rows, width), key_of(seed, f"new rows of {name}"),
                 Distribution(normal=True, scale=NOISE), (size, width), (rows, 0))  # fmt: skip
    variance, mean = torch.var_mean(old.float(), dim=0, correction=0)
    return (mean + noise * variance.sqrt()).to(old.dtype)


def remark(old: int, size: int, new: NewRows) -> list[str]:
    """What became of new ids, in a sentence; none where there are none."""
    if size <= old:
        return []
    made = "zero" if new.kind == "zeros" else (
        f"the mean of the old ones with {NOISE:.0%} of their deviation as noise, seed {new.seed}"
    )  # fmt: skip
    return [f"{size - old} new rows behind the {old} of the tables: {made}"]
