"""Perplexity by modality against plain passes over each document; every token counted once; documents in windows."""

import json
import shutil

import numpy as np
import pytest
import torch

from megamug import cli, evaluate
from megamug.configuration.reading import load_config, to_yaml
from megamug.data.documents.indexed import DocumentSet
from megamug.data.documents.vocabulary import Vocabulary
from megamug.errors import UserError
from megamug.evaluate.perplexity import MODALITIES, modality_of, windows
from megamug.generation.loading import load_run
from tests.data.language import image, write_set
from tests.generation.language_run import CONTEXT, MODELS, STEP, make_data, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    v = make_data(folder)
    text = (v.encode_text("a red circle left of a blue square, then look"), False, False)
    picture = [(image(v, n), True, False) for n in range(3)]
    write_set(folder / "long", v, [[text, picture[0], text, picture[1], picture[2], text, text], [picture[1]], [text]])
    for name in MODELS:
        make_run(name, folder)
    return folder


def plain_losses(run, documents) -> dict[str, list[float]]:
    """By modality, -log p of each token by one pass over its document, the rules in words."""
    v, found = run.task.vocabulary, {name: [] for name in MODALITIES}
    for number in range(len(documents)):
        tokens, modes = documents.document(number)
        batch = torch.from_numpy(tokens).unsqueeze(0)
        with torch.no_grad():
            logits = run.model.logits(run.model.run(run.model.embed(batch), batch))[:, 0, : v.size]
        chances = logits.double().log_softmax(dim=-1)
        images = texts = 0
        for t in range(len(tokens)):
            token, in_image = int(tokens[t]), bool(modes[t] & 1)
            code = v.first_code <= token < v.break_id
            if in_image and not code:
                name = "mark_behind_image"
            elif in_image:
                name = "image_given_caption" if texts else "image_first"
            else:
                name = "caption_given_image" if images else "text"
            if t:
                found[name].append(-float(chances[t - 1, token]))
                texts, images = texts + (not in_image), images + code
    return found


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_plain_passes(folder, name, capsys):
    figures = evaluate.run_task(folder / name, "perplexity")
    with load_run(folder / name) as run:
        documents = DocumentSet(folder / "documents", run.task.vocabulary)
        assert np.diff(documents.starts).max() <= CONTEXT, "one window each"
        expected = plain_losses(run, documents)
    assert figures["samples"] == figures["documents"] == 20
    assert figures["tokens"] == documents.header.tokens - 20 == figures["all"]["tokens"]
    for modality, losses in expected.items():
        row = figures["modalities"][modality]
        assert row["tokens"] == len(losses) > 0
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert row["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    everything = sum(expected.values(), [])
    assert figures["all"]["loss"] == pytest.approx(np.mean(everything), rel=1e-5)
    path = folder / name / "evaluate" / f"step-{STEP:08d}" / "perplexity.json"
    assert json.loads(path.read_text()) == figures
    assert f"{figures['modalities']['text']['perplexity']:.3f}" in capsys.readouterr().err


def test_a_document_in_windows(folder):
    """Learned positions reach 96; the long document has more tokens than the 64 of a window."""
    figures = evaluate.run_task(folder / "rotary", "perplexity", data=[str(folder / "long")])
    with load_run(folder / "rotary") as run:
        v = run.task.vocabulary
        documents = DocumentSet(folder / "long", v)
        tokens, modes = documents.document(0)
        assert CONTEXT + 1 < len(tokens)
        sums = dict.fromkeys(MODALITIES, 0.0)
        counts = dict.fromkeys(MODALITIES, 0)
        kinds = modality_of(tokens, modes, v)
        for start, end, first in windows(len(tokens), CONTEXT):
            batch = torch.from_numpy(tokens[start : end - 1]).unsqueeze(0)
            with torch.no_grad():
                logits = run.model.logits(run.model.run(run.model.embed(batch), batch))[:, 0, : v.size]
            chances = logits.double().log_softmax(dim=-1)
            for t in range(first, end):
                sums[MODALITIES[kinds[t]]] -= float(chances[t - 1 - start, tokens[t]])
                counts[MODALITIES[kinds[t]]] += 1
        short = write_set(folder / "short", v, [[(image(v, 1), True, False)], [
            (v.encode_text("a red circle left of a blue square, then look"), False, False)]])  # fmt: skip
        for name, losses in plain_losses(run, DocumentSet(short, v)).items():
            sums[name], counts[name] = sums[name] + sum(losses), counts[name] + len(losses)
    for name in MODALITIES:
        row = figures["modalities"][name]
        assert row["tokens"] == counts[name] > 0
        assert row["tokens"] * row["loss"] == pytest.approx(sums[name], rel=1e-5)


@pytest.mark.parametrize("context", [1, 2, 7, 8])
def test_windows_count_each_token_once(context):
    for length in range(1, 40):
        made = windows(length, context)
        assert [t for _, end, first in made for t in range(first, end)] == list(range(1, length))
        for number, (start, end, first) in enumerate(made):
            assert 0 <= start < first < end <= length and end - start <= context + 1
            assert first - start == (context // 2 + 1 if number else 1)


def test_some_documents_are_spread_over_all(folder):
    figures = evaluate.run_task(folder / "learned", "perplexity", samples=5, output=folder / "some")
    with load_run(folder / "learned") as run:
        documents = DocumentSet(folder / "documents", run.task.vocabulary)
    lengths = np.diff(documents.starts)[[0, 4, 8, 12, 16]]
    assert figures["samples"] == 5 and figures["tokens"] == lengths.sum() - 5


def test_what_is_refused(folder, tmp_path):
    for task in ("captioning", "reconstruction"):
        with pytest.raises(UserError, match="is a run of jam_cross, whose tasks are: perplexity"):
            evaluate.run_task(folder / "jam", task)
    from tests.data.language import tiny_vocabulary

    other = tiny_vocabulary(tmp_path, sentinels=3)
    write_set(tmp_path / "set", other, [[(other.encode_text("two"), False, False)]])
    with pytest.raises(UserError, match="tokenised with another vocabulary"):
        evaluate.run_task(folder / "jam", "perplexity", data=str(tmp_path / "set"))
    assert Vocabulary.load(folder / "vocabulary").size != other.size


def test_data_is_named_as_for_training(folder, tmp_path, monkeypatch, capsys):
    """`--data` of the command: braces, `::`, globs, `~` and several, as data.train takes them."""
    monkeypatch.setenv("HOME", str(folder))

    def measured(*words):
        out = tmp_path / "out"
        assert cli.main(["evaluate", str(folder / "learned"), "--task", "perplexity", "--output", str(out),
                         "--data", *map(str, words)]) == 0  # fmt: skip
        capsys.readouterr()
        return json.loads((out / "perplexity.json").read_text())["data_fingerprints"]

    expected = measured(folder / "documents", folder / "long")
    assert len(expected) == 2
    for words in (f"{folder}/{{documents,long}}", f"{folder}/documents::{folder}/long", f"{folder}/[dl]o[cn]*",
                  "~/{documents,long}"):  # fmt: skip
        assert measured(words) == expected, words
    assert cli.main(["evaluate", str(folder / "learned"), "--task", "perplexity", "--data", f"{folder}/nothing-*"]) == 2
    assert "nothing-*: no folder matches" in capsys.readouterr().err


def test_tokens_are_compared_where_the_run_asks_for_it(folder, tmp_path):
    """data.verify: a flipped bit of a token is another figure, and nothing else would tell."""
    run = shutil.copytree(folder / "learned", tmp_path / "run")
    damaged = shutil.copytree(folder / "long", tmp_path / "damaged")
    data = bytearray((damaged / "documents.bin").read_bytes())
    data[4] ^= 1
    (damaged / "documents.bin").write_bytes(data)
    assert evaluate.run_task(run, "perplexity", data=str(damaged))["all"]["tokens"] > 0
    config = load_config(run / "config.yaml")
    config.data.verify = True
    (run / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match="the tokens are not those that were written"):
        evaluate.run_task(run, "perplexity", data=str(damaged))
    config.data.validation = str(damaged)
    (run / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match="the tokens are not those that were written"):
        evaluate.run_task(run, "perplexity")
