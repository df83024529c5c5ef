"""What the tools for data share: how progress is told where nobody sits at a terminal."""

from megamug.data.demo.documents import DemoDocuments, make_demo_documents
from megamug.data.tooling import Progress
from tests.test_bad_input import program


def test_progress_ends_in_one_line_whatever_the_amounts(capsys):
    progress = Progress("samples", 10)
    for _ in range(4):
        progress.update(3)  # the fourth goes beyond what was expected
    for _ in range(5):
        progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["samples 12/10"]
    assert lines[0].endswith("0 s left") and "-" not in lines[0]


def test_a_document_of_several_texts_is_one_sample(tmp_path):
    """Of a tokenizer's training: progress counts what the shards were said to hold."""
    parameters = DemoDocuments(text=20, instructions=20, heldout=1, size=32, tidy=True)
    make_demo_documents(tmp_path / "data", parameters, processes=1)
    shards = [tmp_path / "data" / kind / "train" for kind in ("text", "instructions")]
    made = program("tools/train_tokenizer.py", *shards, "--output", tmp_path / "t.model", "--vocab-size", 330)
    assert made.returncode == 0, made.stderr
    assert [line.split(" | ")[0] for line in made.stderr.splitlines()] == ["samples 40/40"]
    assert "from 80 texts" in made.stdout
