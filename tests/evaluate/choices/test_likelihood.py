"""Likelihoods of continuations against plain passes over each pair, and figures of questions made of them."""

import json

import numpy as np
import pytest
import torch

from megamug import cli, evaluate
from megamug.errors import UserError
from megamug.evaluate.choices import share
from megamug.evaluate.choices.likelihood import encode_pair, log_likelihoods
from megamug.generation.loading import load_run
from tests.generation.language_run import CONTEXT, MODELS, make_data, make_run

QUESTIONS = [
    {"context": "a red circle left of", "choices": ["a blue square", "two triangles", "look"], "answer": 0},
    {"context": "first draw,", "choices": ["then look", "then a much longer answer than the other one"], "answer": 1},
    {"context": "", "choices": ["two", "a"], "answer": 0, "name": "mine"},
    {"context": "first draw,", "choices": ["look", "circle"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    make_data(folder)
    for name in MODELS:
        make_run(name, folder)
    (folder / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return folder


def plain(run, context: list[int], following: list[int]) -> tuple[float, bool]:
    """One pass, float64: the sum of log p, and whether each is the likeliest."""
    v = run.task.vocabulary
    ids = torch.tensor([[v.bos_id, *context, *following]])
    with torch.no_grad():
        logits = run.model.logits(run.model.run(run.model.embed(ids), ids))[:, 0, : v.size].double()
    places = range(len(context), len(context) + len(following))
    chances = logits.log_softmax(dim=-1)
    return (sum(float(chances[at, token]) for at, token in zip(places, following, strict=True)),
            all(int(logits[at].argmax()) == token for at, token in zip(places, following, strict=True)))  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_plain_passes(folder, name, capsys):
    path = str(folder / "q.jsonl")
    options = ["--task", "choices", "--suite", "file", "--data", path, "--json"]
    assert cli.main(["evaluate", str(folder / name), *options]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    results = [json.loads(line) for line in open(figures["results"])]
    right, normalised = [], []
    with load_run(folder / name) as run:
        for question, result in zip(QUESTIONS, results, strict=True):
            pairs = [encode_pair(run.task.vocabulary, question["context"], f" {c}") for c in question["choices"]]
            expected = [plain(run, *pair)[0] for pair in pairs]
            assert result["log_likelihoods"] == pytest.approx(expected, rel=1e-5)
            lengths = [len(choice) for choice in question["choices"]]
            right.append(np.argmax(expected) == question["answer"] == result["answer"])
            normalised.append(np.argmax(np.divide(expected, lengths)) == question["answer"])
            assert result["choice"] == np.argmax(expected)
    assert results[2]["question"] == "mine" and results[3]["question"] == "q.jsonl:4"
    assert figures["accuracy"] == np.mean(right) and figures["accuracy_normalised"] == np.mean(normalised)
    assert figures["accuracy_error"] == pytest.approx(np.std(right, ddof=1) / 2)
    assert figures["chance"] == pytest.approx((1 / 3 + 3 / 2) / 4) and figures["samples"] == 4
    assert f"{figures['accuracy']:.2%}" in captured.err and "choices.jsonl" in captured.err


def test_greedy_long_and_repeated(folder):
    with load_run(folder / "learned") as run:
        v = run.task.vocabulary
        context = v.encode_text("a red circle left of")
        greedy = []
        for _ in range(3):
            ids = torch.tensor([[v.bos_id, *context, *greedy]])
            with torch.no_grad():
                greedy.append(int(run.model.logits(run.model.run(run.model.embed(ids), ids))[-1, 0, : v.size].argmax()))
        other = [*greedy[:2], (greedy[2] + 1) % v.size]
        long = tuple(v.encode_text("a blue square, then look " * 20))
        following = tuple(v.encode_text("two triangles"))
        pairs = [(tuple(context), tuple(greedy)), (tuple(context), tuple(other)), (long, following),
                 (tuple(context), tuple(greedy))]  # fmt: skip
        found, cut = log_likelihoods(run, pairs)
        assert [likeliest for _, likeliest in found] == [True, False, False, True] and found[0] == found[3]
        assert cut == 1
        room = CONTEXT - len(following)
        for (score, _), (before, behind) in zip(found, [*pairs[:2], (long[-room:], following)], strict=False):
            assert score == pytest.approx(plain(run, list(before), list(behind))[0], rel=1e-5)
        with pytest.raises(UserError, match=f"a continuation of {len(long)} tokens is longer than the {CONTEXT}"):
            log_likelihoods(run, [((), long)])
        assert encode_pair(v, "first  ", "draw") == encode_pair(v, "first", "  draw")
        with pytest.raises(UserError, match="has no token of its own"):
            encode_pair(v, "first", "")


def test_samples_are_spread_evenly(folder):
    figures = evaluate.run_task(folder / "rotary", "choices", suite="file", data=folder / "q.jsonl", samples=2)
    assert [json.loads(line)["question"] for line in open(figures["results"])] == ["q.jsonl:1", "mine"]
    assert share([True]) == (1.0, None)


@pytest.mark.parametrize(("options", "said"), [
    ([], "--task choices wants --suite"),
    (["--suite", "piqa"], "--data FILE"),
    (["--suite", "file", "--data", "/absent"], "/absent cannot be read"),
])
def test_mistakes_are_told_before_the_model_is_read(folder, options, said, capsys):
    assert cli.main(["evaluate", str(folder / "learned"), "--task", "choices", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_suite_is_of_choices(folder, capsys):
    assert cli.main(["evaluate", str(folder / "learned"), "--task", "perplexity", "--suite", "piqa"]) == 2
    assert "--suite is of --task choices" in capsys.readouterr().err
