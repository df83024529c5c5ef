"""What a foreign format is to the converter. Each format is one `Format` in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megamug.configuration.sections import Config
from megamug.convert.described import Described
from megamug.convert.source import ForeignTensors
from megamug.convert.table import Row
from megamug.errors import UserError

VocabularyRows = tuple[int, ...]


class View:
    """A foreign checkpoint under the names that a format's table uses."""

    def __init__(self, source: ForeignTensors, canonical: Callable[[str], str]):
        self.source, self.config, self.preprocessor = source, source.config or {}, source.preprocessor or {}
        self.remarks: list[str] = list(source.remarks)  # a sentence each, for the user
        self.actual: dict[str, str] = {}
        for name in source.names:
            if (known := canonical(name)) in self.actual:
                raise UserError(f"{source.path} holds one tensor twice, as {self.actual[known]} and as {name}; which of"
                                " them is meant it does not tell; remove one")  # fmt: skip
            self.actual[known] = name

    def __contains__(self, name: str) -> bool:
        return name in self.actual

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self.actual[name])

    def dtype(self, name: str):
        return self.source.dtype(self.actual[name])

    def read(self, name: str) -> Tensor:
        return self.source.read(self.actual[name])


def as_it_is(name: str) -> str:
    return name


def is_count(value: object) -> bool:
    """Whether a value of JSON is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Format:
    """A foreign format.

    `described`: what it computes of a library's config.json, checked before anything of it is believed; None for a
    format without one. `settings(view)`: the configuration keys that the checkpoint tells, such as
    {"model.layers": 12}; raises UserError where it tells of a model that megamug does not have. `rows(config,
    vocabulary)`: the table, for a resolved configuration and the rows of the vocabulary's tables; raises UserError for
    a model that the format does not have. `fixed(config)`: tables that megamug computes and the format stores; compared
    when read, written when written. `files(config, vocabulary)`: JSON files to write beside the tensors.
    `vocabulary(view)`: rows of the tables that make up its vocabulary, in the order of their ids; none without one.
    `complete(config, view)`: sets what follows from what the user says, before the preset; raises UserError for what
    the user has to say.
    `parts`: beginnings of the megamug names that the format has a place for. `ignored`: a pattern of buffers that
    libraries store and compute anew. `apart`: the beginning of names that are another model's, and a sentence that says
    which; they are left out. `canonical` turns the names of the format's older spellings into the table's,
    `spelled` the table's names into those that are written. `of_classifiers`: what an encoder's format is with a head
    behind it, for a run of `kind: classifier` that is written.
    """

    name: str
    what: str  # for the help text
    kind: str  # model.kind
    parts: tuple[str, ...]
    settings: Callable[[View], dict[str, object]]
    rows: Callable[[Config, VocabularyRows], list[Row]]
    fixed: Callable[[Config], dict[str, Callable[[], Tensor]]] = lambda config: {}
    files: Callable[[Config, VocabularyRows], dict[str, dict]] = lambda config, vocabulary: {}
    vocabulary: Callable[[View], VocabularyRows] = lambda view: ()
    described: Described | None = None
    complete: Callable[[Config, View], None] = lambda config, view: None
    ignored: str = "(?!)"  # nothing
    apart: tuple[str, str] | None = None
    canonical: Callable[[str], str] = as_it_is
    spelled: Callable[[str], str] = as_it_is
    of_classifiers: Format | None = None
