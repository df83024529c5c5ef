"""Every command of the README is run, small: what a reader types works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import environment

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TINY = [
    "model.patch_size=8", "model.layers=1", "model.width=32", "model.heads=2", "model.ffn_width=64",
    "model.decoder_layers=1", "model.decoder_width=32", "model.decoder_heads=2", "model.text_unimodal_layers=1",
    "model.text_multimodal_layers=1", "model.text_width=32", "model.text_heads=2", "data.image_size=32",
    "data.global_batch_size=8", "data.micro_batch_size=4", "data.validation_samples=8", "data.threads=1",
    "optimizer.warmup_steps=1", "train.steps=2",
]  # fmt: skip


def commands() -> list[str]:
    """The lines of the README's `sh` blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(words: list[str], folder: Path) -> str:
    captured = dict(capture_output=True, text=True, timeout=300, check=False)
    result = subprocess.run(words, cwd=folder, env=environment(), **captured)
    told = result.stdout + result.stderr
    assert result.returncode == 0, f"{shlex.join(words)} exits {result.returncode}:\n{told[-4000:]}"
    return result.stdout


def python_words(command: str) -> list[str]:
    """A README command as this interpreter runs it from any folder: nothing of it is changed but where files are."""
    words = shlex.split(command)
    if words[0] == "megamug":
        words = ["python", "-m", "megamug", *words[1:]]
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
    assert words[0] == "python", f"the README has a command that no test knows how to run: {command}"
    words = [str(ROOT / w) if w.startswith(("tools/", "examples/")) else w for w in words]
    return [sys.executable, *words[1:]]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A folder as a reader's: pictures with captions, and held-out shards."""
    folder = tmp_path_factory.mktemp("reader")
    run([sys.executable, str(ROOT / "tools/make_demo_data.py"), "demo", "--train", "48", "--heldout", "16"], folder)
    (folder / "demo" / "heldout").rename(folder / "heldout")
    for shard in sorted((folder / "demo" / "train").glob("*.tar")):
        (folder / "photos").mkdir(exist_ok=True)
        subprocess.run(["tar", "xf", str(shard), "-C", str(folder / "photos")], check=True)
    return folder


def test_the_commands_of_the_readme_run_in_their_order(reader):
    seen = []
    for command in commands():
        seen.append(command)
        if command in ("make demo", "make demo-jam", "make demo-real", "make test", "megamug doctor"):
            continue  # below, tests/examples, and tests/test_doctor.py
        words = python_words(command)
        if "train" in words:  # as it stands, but small
            words = [w if w != "8" else "2" for w in words] + TINY
        run(words, reader)
    assert {"make demo", "make demo-jam", "make demo-real", "make test", "megamug doctor"} <= set(seen)
    metrics = [json.loads(line) for line in (reader / "runs/vit_s16/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2]
    assert (reader / "runs/vit_l16/checkpoints/latest").read_text().strip() == "step-00000002"
    assert list((reader / "runs/vit_s16/generate").rglob("*.png"))
    assert (reader / "train.jsonl").read_text().count("\n") == 48
    shutil.copy(next((reader / "photos").glob("*.jpg")), reader / "photos" / "cat.jpg")
    (script,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    told = run([sys.executable, "-c", f"import megamug\n{script}\nprint(*features.patches.shape)"], reader)
    assert told == "1 4 4 32\n"


def test_make_demo_runs_the_demo_script():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo: venv\n\t.*python examples/mug/demo\.py$", makefile, flags=re.MULTILINE)
    assert re.search(r"^demo-real: venv\n\t.*python examples/transfer/demo\.py$", makefile, flags=re.MULTILINE)
    assert re.search(r"^demo-jam: venv\n\t.*python examples/jam/demo\.py$", makefile, flags=re.MULTILINE)
    assert re.search(r"^test: venv\n(.*\n)*?\t\$\(PYTEST\) -n 2 .*\$\(TESTS\)$", makefile, flags=re.MULTILINE)
    assert re.search(r"^PYTEST = .*-m pytest", makefile, flags=re.MULTILINE)


def test_the_demo_ends_with_pictures_and_figures_and_goes_on_where_it_stopped(tmp_path):
    words = [sys.executable, str(ROOT / "examples/mug/demo.py"), "--folder", "demo", "--train", "96", "--heldout", "24"]
    small = ["train.steps=3", "optimizer.warmup_steps=1", "train.validate_every=0", "checkpoint.every=0"]
    told = run([*words, *small], tmp_path)
    picture = Path(re.search(r"Look at\s+(\S+)", told)[1])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for figure in ("pixel error on hidden patches", "captions exactly right", "nat a token"):
        assert figure in told
    assert "resuming after step 3" in run([*words, *small], tmp_path)


def test_the_picture_of_the_readme_is_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), f"the README links {link}, which does not exist"
