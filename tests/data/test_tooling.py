"""What the tools for data share: how progress is told where nobody sits at a terminal, and Ctrl-C where one does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megamug.command_line.tool import STOPPED
from megamug.data.demo.documents import DemoDocuments, make_demo_documents
from megamug.data.shards.indexing import index_paths
from megamug.data.shards.reading import Shard
from megamug.data.tooling import Progress
from tests.distributed.launch import ROOT, environment
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


PROGRAM = """
import sys
import time
from pathlib import Path
from megamug.command_line.tool import run_tool
from megamug.data.tooling import parallel_map
from megamug.durable import replacing


def slow(item):
    folder, number = item
    with replacing(folder / f"{number}.out") as file:
        file.write(b"half")
        file.flush()
        (folder / f"{number}.begun").touch()
        if number > 1:
            time.sleep(60)


if __name__ == "__main__":
    items = [(Path(sys.argv[1]), number) for number in range(8)]
    run_tool(lambda: [None for _ in parallel_map(slow, items, 2)])
"""


def test_ctrl_c_ends_all_processes_at_once_and_leaves_nothing_half_written(tmp_path):
    """SIGINT to the whole group, as from a terminal: while processes start, and while they are at work."""
    (tmp_path / "program.py").write_text(PROGRAM)
    for wanted in ("none", "3.begun"):
        out = tmp_path / wanted
        out.mkdir()
        process = subprocess.Popen(
            [sys.executable, tmp_path / "program.py", out], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment(), start_new_session=True, cwd=ROOT,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if (out / wanted).exists() or wanted == "none" and len(of_group(process.pid)) > 2:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=120)[0]
        assert (process.returncode, told.replace(STOPPED + "\n", "")) == (130, ""), told
        finished = {"0.out", "1.out"} if wanted == "3.begun" else set()
        assert {path.name for path in out.iterdir() if path.suffix != ".begun"} == finished
        deadline = time.monotonic() + 10
        while of_group(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert of_group(process.pid) == []


def of_group(group: int) -> list[int]:
    """Processes of a process group that run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(own) == group and state != "Z":
                    found.append(int(entry.name))
    return found


def test_an_index_that_is_interrupted(helpers, tmp_path):
    """The command itself: exit code 130, no traceback, whole indexes or none; the next call goes on."""
    for number in range(6):
        helpers.write_tar(tmp_path / f"{number}.tar", helpers.good_members(40, width=200, height=150))
    process = subprocess.Popen(
        [sys.executable, "-m", "megamug", "data", "index", tmp_path, "--processes", "2"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*.index")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "", (out, error)
    assert [line for line in error.splitlines() if not line.startswith("shards ")] == [STOPPED], error
    made = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".tar")
    assert 1 <= len(made) < 6 and all(name.endswith(".tar.index") for name in made), made
    assert "up to date" in {report.action for report in index_paths([tmp_path], processes=1)}
    assert sum(len(Shard(path)) for path in tmp_path.glob("*.tar")) == 240
