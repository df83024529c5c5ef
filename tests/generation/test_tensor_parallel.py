"""Two processes that share a model's tensors write what one writes, and measure what one measures."""

import json

import pytest

from megamug import evaluate
from megamug.errors import UserError
from megamug.generation.documents import generate_documents
from megamug.generation.loading import load_run
from tests.distributed.launch import launch
from tests.generation.language_run import make_data, make_run

PROMPTS = ["first draw", "two triangles <break>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    make_data(folder)
    make_run("jam", folder)
    return folder


def test_generate(folder, tmp_path):
    options = ["--guidance", "2", "--max-tokens", "24", "--output", str(tmp_path / "two")]
    command = ["-m", "megamug", "generate", str(folder / "jam"), "--prompt", *PROMPTS, *options]
    results = launch(command, processes=2)
    assert [code for code, _ in results] == [0, 0], results
    alone = generate_documents(folder / "jam", PROMPTS, guidance=2.0, max_tokens=24, output=tmp_path / "one")
    told = json.loads((tmp_path / "two" / "document.json").read_text())
    assert told == alone
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1] and "sample-001-image-1.png" in names[0]
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names[0])
    assert "document.html" in results[0][1] and "document.html" not in results[1][1]


def test_perplexity(folder, tmp_path):
    command = ["evaluate", str(folder / "jam"), "--task", "perplexity", "--output", str(tmp_path)]
    results = launch(["-m", "megamug", *command], processes=2)
    assert [code for code, _ in results] == [0, 0], results
    alone = evaluate.run_task(folder / "jam", "perplexity")
    told = json.loads((tmp_path / "perplexity.json").read_text())
    assert told["tokens"] == alone["tokens"]
    for name, row in alone["modalities"].items():
        assert told["modalities"][name] == {key: pytest.approx(value, rel=1e-5) for key, value in row.items()}


def test_choices(folder, tmp_path):
    choices = ["draw", "two triangles", "a red circle"]
    rows = [{"context": "first", "choices": choices, "answer": answer} for answer in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", str(folder / "jam"), "--task", "choices", "--suite", "file"]
    command += ["--data", str(tmp_path / "q.jsonl"), "--output", str(tmp_path)]
    results = launch(["-m", "megamug", *command], processes=2)
    assert [code for code, _ in results] == [0, 0], results
    alone = evaluate.run_task(folder / "jam", "choices", suite="file", data=tmp_path / "q.jsonl")
    told = json.loads((tmp_path / "choices.json").read_text())
    assert told["accuracy"] == alone["accuracy"] == pytest.approx(1 / 3)
    one, two = ([json.loads(line) for line in open(figures["results"])] for figures in (alone, told))
    for mine, other in zip(one, two, strict=True):
        assert other["log_likelihoods"] == pytest.approx(mine["log_likelihoods"], rel=1e-5)


def test_more_processes_than_can_share(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE is 3, so many share the model's tensors: text_tower.heads"):
        with load_run(folder / "jam"):
            pass
