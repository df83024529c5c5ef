"""Published files become questions in lm-eval's words; what is no question of a suite is told with file and line."""

import json

import pytest

from megamug.errors import UserError
from megamug.evaluate.choices import check
from megamug.evaluate.choices.suites import read_questions

PIQA = {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Sing to it."}
HELLASWAG = {"activity_label": "Making tea", "ctx_a": "A man boils [step] water.", "ctx_b": "he then",
             "endings": ["pours  it.", "eats it [title] Done"], "label": "0"}  # fmt: skip
STORY = {"InputStoryid": "x", "InputSentence1": "One.", "InputSentence2": "Two.", "InputSentence3": "Three.",
         "InputSentence4": "Four.", "RandomFifthSentenceQuiz1": "Five.", "RandomFifthSentenceQuiz2": "Fish.",
         "AnswerRightEnding": "2"}  # fmt: skip
LINES = {
    "piqa": ({**PIQA, "label": 1}, [("Question: Open a jar.\nAnswer:", " Turn the lid."),
                                    ("Question: Open a jar.\nAnswer:", " Sing to it.")], 1),
    "arc": ({"question": {"stem": "Which?", "choices": [{"text": "this", "label": "A"}, {"text": "that", "label": "B"},
                                                        {"text": "both", "label": "C"}]}, "answerKey": "C"},
            [("Question: Which?\nAnswer:", f" {x}") for x in ("this", "that", "both")], 2),
    "hellaswag": (HELLASWAG, [("Making tea: A man boils water. He then", " pours it."),
                              ("Making tea: A man boils water. He then", " eats it. Done")], 0),
    "winogrande": ({"sentence": "The cup was put on the table as _ was full.", "option1": "the cup",
                    "option2": "the table", "answer": "1"},
                   [("The cup was put on the table as the cup", " was full."),
                    ("The cup was put on the table as the table", " was full.")], 0),
    "storycloze": (STORY, [("One. Two. Three. Four.", " Five."), ("One. Two. Three. Four.", " Fish.")], 1),
    "file": ({"context": "1, 2,", "choices": ["3", "4"], "answer": 0}, [("1, 2,", " 3"), ("1, 2,", " 4")], 0),
}  # fmt: skip


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suite", LINES)
def test_questions(tmp_path, suite):
    line, pairs, answer = LINES[suite]
    (question,), unanswered = read_questions(suite, [write(tmp_path / "x.jsonl", line)])
    assert (list(question.pairs), question.answer, unanswered) == (pairs, answer, 0)
    assert question.name == "x.jsonl:1"
    if suite != "winogrande":
        assert [f" {text}" for text in question.texts] == [following for _, following in pairs]


def test_other_forms_of_the_same_files(tmp_path):
    row = {"question": "Which?", "choices": {"text": ["this", "that"], "label": ["1", "2"]}, "answerKey": "2"}
    (question,), _ = read_questions("arc", [write(tmp_path / "rows.jsonl", row)])
    assert question.answer == 1 and question.pairs[0] == ("Question: Which?\nAnswer:", " this")
    write(tmp_path / "valid.jsonl", PIQA, "", PIQA)
    write(tmp_path / "valid-labels.lst", "1", "0")
    found, _ = read_questions("piqa", [tmp_path / "valid.jsonl"])
    assert [question.answer for question in found] == [1, 0] and found[1].name == "valid.jsonl:3"
    write(tmp_path / "test.csv", ",".join(STORY), ",".join(STORY.values()))
    own = {"input_sentence_1": "One.", "input_sentence_2": "Two.", "input_sentence_3": "Three.",
           "input_sentence_4": "Four.", "sentence_quiz1": "Five.", "sentence_quiz2": "Fish.",
           "answer_right_ending": 2}  # fmt: skip
    both, _ = read_questions("storycloze", [tmp_path / "test.csv", write(tmp_path / "copy.jsonl", own)])
    assert both[0].pairs == both[1].pairs and both[0].answer == both[1].answer == 1


def test_questions_without_an_answer_are_counted_not_measured(tmp_path):
    path = write(tmp_path / "x.jsonl", {**HELLASWAG, "label": ""}, HELLASWAG, {**HELLASWAG, "label": -1})
    questions, unanswered = read_questions("hellaswag", [path])
    assert (len(questions), unanswered) == (1, 2)
    with pytest.raises(UserError, match=r"x\.jsonl: no question to measure; 1 have no answer: take the validation set"):
        read_questions("hellaswag", [write(path, {**HELLASWAG, "label": ""})])


@pytest.mark.parametrize(("suite", "line", "said"), [
    ("piqa", "{", "line 2: no JSON"),
    ("piqa", "[1]", "line 2: no JSON object"),
    ("piqa", {"goal": "x", "sol1": "y", "label": 0}, r"no question of piqa \('sol2' is missing\); expected: jsonl"),
    ("piqa", {**PIQA, "label": 2}, r"the answer is number 2 of 2 choices"),
    ("piqa", {**PIQA, "sol1": None, "label": 0}, "None is no text"),
    ("piqa", {**PIQA, "label": True}, "True is no number of a choice"),
    ("piqa", {**PIQA, "label": [1]}, r"\[1\] is no number of a choice"),
    ("arc", {"question": 5, "answerKey": "A"}, "no question of arc"),
    ("arc", {"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}, "no question of arc"),
    ("winogrande", {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}, "has no blank, _"),
    ("file", {"context": "x", "choices": "ab", "answer": 0}, "choices a list of texts"),
    ("file", {"context": "x", "choices": ["a"], "answer": 0}, "fewer than two choices"),
    ("file", "[" * 10**5, "line 2: no JSON"),
])  # fmt: skip
def test_a_broken_line(tmp_path, suite, line, said):
    path = write(tmp_path / "x.jsonl", LINES[suite][0], line)
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2.*{said.removeprefix('line 2: ')}"):
        read_questions(suite, [path])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="absent cannot be read: No such file"):
        read_questions("piqa", [tmp_path / "absent"])
    (tmp_path / "x").write_bytes(b"{}\n\xff")
    with pytest.raises(UserError, match=r"x is no UTF-8 text \(byte 3\)"):
        read_questions("piqa", [tmp_path / "x"])
    write(tmp_path / "valid.jsonl", PIQA)
    write(tmp_path / "valid-labels.lst", "1", "0")
    with pytest.raises(UserError, match=r"valid\.jsonl has 1 lines and .*valid-labels\.lst 2"):
        read_questions("piqa", [tmp_path / "valid.jsonl"])
    write(tmp_path / "x.csv", 'a,"b"c')
    with pytest.raises(UserError, match=r"x\.csv, line 1: no CSV"):
        read_questions("storycloze", [tmp_path / "x.csv"])


@pytest.mark.parametrize(("suite", "data", "said"), [
    (None, None, "wants --suite: one of piqa, arc"),
    ("glue", None, "--suite glue: there is no such suite"),
    ("piqa", None, "wants the file it is published as: --data FILE"),
])
def test_what_is_asked(suite, data, said):
    with pytest.raises(UserError, match=said):
        check(suite, data)
