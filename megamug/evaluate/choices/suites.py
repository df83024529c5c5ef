"""The files that suites of multiple choice are published as, and the words in which their questions are put.

Contexts and choices are those of lm-eval's tasks of the same names, so that figures compare:

- `piqa` (Bisk et al., arXiv 1911.11641): "Question: GOAL\\nAnswer:"; jsonl with goal, sol1, sol2 and label, or labels
  in a file beside it (`valid.jsonl`, `valid-labels.lst`).
- `arc` (Clark et al., arXiv 1803.05457), easy and challenge: "Question: STEM\\nAnswer:"; the published jsonl, or rows
  of its copy as a data set.
- `hellaswag` (Zellers et al., arXiv 1905.07830): "ACTIVITY: CONTEXT", without the marks of its wikiHow part.
- `winogrande` (Sakaguchi et al., arXiv 1907.10641): what stands behind the blank, given the sentence up to it with
  either option put in (partial evaluation, Trinh and Le, arXiv 1806.02847).
- `storycloze` (Mostafazadeh et al., arXiv 1604.01696): CSV or jsonl of four sentences and two endings.
- `file`: your own: jsonl of {"context": text, "choices": [text, ...], "answer": number from 0}, with "name" if wanted.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megamug.errors import UserError


@dataclass(frozen=True)
class Question:
    """One question: for each choice what is read and what is asked for, and the choice's own text."""

    name: str
    pairs: tuple[tuple[str, str], ...]  # (context, continuation)
    texts: tuple[str, ...]  # of the choices: their lengths normalise
    answer: int


@dataclass(frozen=True)
class Suite:
    files: str  # for messages
    question: Callable[[dict, str], Question]
    tabular: bool = False  # a CSV with a header is read, too


class _NoAnswer(Exception):
    """A question of a test set whose answers are not published."""


def read_questions(suite: str, paths: list[Path]) -> tuple[list[Question], int]:
    """(all questions of the files in their order, how many had no answer and were left out).

    Raises `UserError`: a file that cannot be read, a line that is no question of the suite (with its number), none
    with an answer.
    """
    questions, unanswered = [], 0
    for path in paths:
        for number, record in _records(path, SUITES[suite]):
            name = f"{path.name}:{number}"
            try:
                question = SUITES[suite].question(record, name)
                if not 0 <= question.answer < len(question.pairs):
                    raise ValueError(f"the answer is number {question.answer} of {len(question.pairs)} choices")
                if len(question.pairs) < 2:
                    raise ValueError("there are fewer than two choices")
            except _NoAnswer:
                unanswered += 1
                continue
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else error
                raise UserError(f"{path}, line {number}: no question of {suite} ({what}); expected: "
                                f"{SUITES[suite].files}") from error  # fmt: skip
            questions.append(question)
    if not questions:
        said = f"; {unanswered:,} have no answer: take the validation set" if unanswered else ""
        raise UserError(f"{', '.join(map(str, paths))}: no question to measure{said}")
    return questions, unanswered


def _records(path: Path, suite: Suite) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a jsonl or CSV file; empty lines are passed over."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--data: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {path} is no UTF-8 text (byte {error.start}); expected: {suite.files}") from error
    if suite.tabular and path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for record in reader:
                yield reader.line_num, record
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num + 1}: no CSV ({error})") from error
        return
    labels = _labels(path)
    lines = text.split("\n")
    if labels is not None and len(labels) != sum(1 for line in lines if line.strip()):
        raise UserError(f"{path} has {sum(1 for line in lines if line.strip())} lines and {_labels_path(path)}"
                        f" {len(labels)}; they have to be of one set")
    questions = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: no JSON ({error}); expected: {suite.files}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: no JSON object; expected: {suite.files}")
        if labels is not None:
            record.setdefault("label", labels[questions])
        questions += 1
        yield number, record


def _labels_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}-labels.lst")


def _labels(path: Path) -> list[str] | None:
    """PIQA's answers lie in a file of their own."""
    beside = _labels_path(path)
    return beside.read_text().split() if beside.is_file() else None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value


def _number(value: object) -> int:
    """An answer as it is written: 1, "1"; empty or -1 where it is not published."""
    if value in (None, "", -1, "-1"):
        raise _NoAnswer
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is no number of a choice")
    return int(value)


def _asked(name: str, context: str, choices: list, answer: int) -> Question:
    """One context, several continuations behind a blank."""
    texts = tuple(_text(choice) for choice in choices)
    return Question(name, tuple((context, f" {text}") for text in texts), texts, answer)


def _piqa(record: dict, name: str) -> Question:
    choices = [record["sol1"], record["sol2"]]
    return _asked(name, f"Question: {_text(record['goal'])}\nAnswer:", choices, _number(record.get("label")))


def _arc(record: dict, name: str) -> Question:
    question = record["question"]
    if isinstance(question, str):  # a data set's row: {"text": [...], "label": [...]}
        stem, texts, labels = question, record["choices"]["text"], record["choices"]["label"]
    else:
        stem = question["stem"]
        texts, labels = zip(*((choice["text"], choice["label"]) for choice in question["choices"]), strict=True)
    answer = record.get("answerKey")
    if not answer:
        raise _NoAnswer
    labels = [str(label) for label in labels]
    return _asked(name, f"Question: {_text(stem)}\nAnswer:", list(texts), labels.index(str(answer)))


def _hellaswag(record: dict, name: str) -> Question:
    context = f"{_text(record['ctx_a'])} {str(record['ctx_b']).capitalize()}"
    endings = [_without_marks(_text(ending)) for ending in record["endings"]]
    asked = _without_marks(f"{_text(record['activity_label'])}: {context}")
    return _asked(name, asked, endings, _number(record.get("label")))


def _without_marks(text: str) -> str:
    """HellaSwag's wikiHow part has [title], [step] and the like in its texts."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(record: dict, name: str) -> Question:
    before, blank, behind = _text(record["sentence"]).partition("_")
    if not blank:
        raise ValueError("the sentence has no blank, _")
    options = tuple(_text(record[key]) for key in ("option1", "option2"))
    following = f" {_text(behind).strip()}"
    pairs = tuple((before + option, following) for option in options)
    return Question(name, pairs, (following[1:],) * 2, _number(record.get("answer")) - 1)


_STORY = ("inputsentence1", "inputsentence2", "inputsentence3", "inputsentence4")


def _storycloze(record: dict, name: str) -> Question:
    # published as InputSentence1 and RandomFifthSentenceQuiz1, its copies as input_sentence_1 and sentence_quiz1
    known = {str(key).replace("_", "").lower().replace("randomfifthsentence", "sentence"): value
             for key, value in record.items()}  # fmt: skip
    context = " ".join(_text(known[key]) for key in _STORY)
    endings = [known["sentencequiz1"], known["sentencequiz2"]]
    return _asked(name, context, endings, _number(known.get("answerrightending")) - 1)


def _own(record: dict, name: str) -> Question:
    choices, context = record["choices"], record["context"]
    if not isinstance(choices, list) or not isinstance(context, str):
        raise ValueError("context has to be a text and choices a list of texts")
    given = record.get("name", name)
    return _asked(str(given), context, choices, _number(record["answer"]))


SUITES = {
    "piqa": Suite("jsonl with goal, sol1, sol2 and label, or NAME-labels.lst beside it", _piqa),
    "arc": Suite("jsonl with question {stem, choices [{text, label}]} and answerKey", _arc),
    "hellaswag": Suite("jsonl with activity_label, ctx_a, ctx_b, endings and label", _hellaswag),
    "winogrande": Suite("jsonl with sentence (with a blank _), option1, option2 and answer (1 or 2)", _winogrande),
    "storycloze": Suite("CSV or jsonl with InputSentence1 to 4, RandomFifthSentenceQuiz1 and 2 and AnswerRightEnding",
                        _storycloze, tabular=True),
    "file": Suite('jsonl of {"context": text, "choices": [text, ...], "answer": number from 0}', _own),
}  # fmt: skip
