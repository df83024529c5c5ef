"""What is read back of JSON files: every value of another type is told in a sentence that names it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import pytest

from megamug.data.documents.indexed import MARKER, DocumentsHeader, read_header
from megamug.data.documents.vocabulary import FILE, Vocabulary, VocabularySpec
from megamug.durable import read_record
from megamug.errors import UserError
from megamug.models.image_tokenizer.model import ImageTokenizerConfig, read_config

WRONG = {str: [None, [], -5, {}], int: [None, [], -5, 2**63, "3", 1.5, True], bool: [None, 1, "yes"],
         dict: [None, [], 3], tuple: [None, 3, [1], ["a", "b"], [-1, 2]]}  # fmt: skip


@dataclass
class Record:
    name: str
    size: int
    share: float = 0.5
    sides: tuple[int, int] = (0, 0)
    marks: list[str] = field(default_factory=list)
    limit: int | None = None


def test_a_record_is_read_as_its_types():
    text = '{"name": "a", "size": 3, "share": 1, "sides": [1, 2], "marks": ["x"], "limit": null}'
    assert read_record(text, Record) == Record("a", 3, 1.0, (1, 2), ["x"], None)
    assert read_record('{"name": "a", "size": 0, "limit": 4}', Record) == Record("a", 0, limit=4)


@pytest.mark.parametrize("text, said", [
    ("[1]", "a mapping wanted, found \\[1\\]"), ("null", "a mapping wanted"), ("{", "Expecting"),
    ("[" * 5000, "too deeply"),
    ('{"name": "a"}', "size is missing"), ('{"name": "a", "size": 1, "sise": 2}', 'unknown key "sise"'),
    ('{"name": "a", "size": 9223372036854775808}', "size: a whole number from 0 to 2\\^63 wanted"),
    ('{"name": "a", "size": 1, "sides": [1]}', "sides: "), ('{"name": "a", "size": 1, "marks": [1]}', "marks\\[0\\]"),
    ('{"name": "a", "size": 1, "limit": -5}', "limit: a whole number"), ('{"name": 1, "size": 1}', "name: text wanted"),
])  # fmt: skip
def test_what_is_no_such_record(text, said):
    with pytest.raises(ValueError, match=said):
        read_record(text, Record)


def broken(made: object, kinds: dict[str, type]):
    """Texts of `made` in JSON with one value of another type, each with the value's name."""
    for name, kind in kinds.items():
        for value in WRONG[kind]:
            yield name, json.dumps(asdict(made) | {name: value})


def test_every_value_of_documents_json(tmp_path):
    """Each was a traceback, or was believed."""
    header = DocumentsHeader("f" * 64, "v", 3, 3, 0, 0, 30, 0, 60, "a" * 64, {"shards": [{"path": "s.tar"}]},
                             version=1)  # without the checksum, which finds it first  # fmt: skip
    (tmp_path / MARKER).write_text(json.dumps(asdict(header)))
    assert read_header(tmp_path) == header
    kinds = {name: str for name in ("vocabulary", "vocabulary_folder", "sha256")} | {"request": dict}
    kinds |= dict.fromkeys(("documents", "text_segments", "images", "responses", "tokens", "bytes"), int)
    texts = [*broken(header, kinds), ("request", json.dumps(asdict(header) | {"request": {"shards": 3}})),
             ("request", json.dumps(asdict(header) | {"request": {"shards": [None]}}))]  # fmt: skip
    for name, text in texts:
        (tmp_path / MARKER).write_text(text)
        with pytest.raises(UserError, match=rf"{MARKER}: broken \({name}: .*; tokenise the documents again"):
            read_header(tmp_path)


def test_every_value_of_a_vocabulary(tmp_path):
    spec = VocabularySpec(300, "a" * 64, 16, (2, 2), 16, "f", 4)
    kinds = {"text_pieces": int, "text_sha256": str, "image_grid": tuple, "sentinels": int, "image_tokenizer": str}
    for name, text in broken(spec, kinds):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=rf"{FILE}: not a vocabulary \({name}"):
            Vocabulary.load(tmp_path)


def test_every_value_of_an_image_tokenizer(tmp_path):
    made = asdict(ImageTokenizerConfig()) | {"format": "megamug-image-tokenizer-1"}
    (tmp_path / "config.json").write_text(json.dumps(made))
    read_config(tmp_path)
    for name, kind in {"image_size": int, "codes": int, "normalise_codes": bool, "channel_multipliers": tuple}.items():
        for value in [v for v in WRONG[kind] if v != [1]]:  # one level of one multiplier is a tokenizer
            (tmp_path / "config.json").write_text(json.dumps(made | {name: value}))
            with pytest.raises(UserError, match=rf"config.json: {name}"):
                read_config(tmp_path)
