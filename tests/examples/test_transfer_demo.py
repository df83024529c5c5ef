"""`make demo-real` from shards to the table, small: every command of it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.data.conftest import write_tar
from tests.distributed.launch import environment
from tests.transfer.common import photograph

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.layers=1 model.width=32 model.heads=2 model.ffn_width=64 model.decoder_layers=1 model.decoder_width=32 "
    "model.decoder_heads=2 model.text_width=32 model.text_heads=2 model.text_multimodal_layers=1 train.steps=2 "
    "optimizer.warmup_steps=1 data.global_batch_size=8 data.micro_batch_size=8 data.threads=1"
).split()


def drawings(numbers: range) -> list[tuple[str, bytes]]:
    """Labelled pictures, of which each class has a colour of its own."""
    members = []
    for i in numbers:
        text = {"caption": f"a drawing of {'abcdefghijklmnop'[i % 16]} in class {i % 3}", "label": i % 3}
        members += [(f"{i}.png", photograph(64, 64, seed=i, kind="PNG")), (f"{i}.json", json.dumps(text).encode())]
    return members


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    write_tar(folder / "train-a.tar", drawings(range(40)))
    write_tar(folder / "heldout-a.tar", drawings(range(40, 60)))
    return folder


def demo(script: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples/transfer" / script), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)


def test_the_demo_runs_to_the_table(data, tmp_path):
    tokens = [sys.executable, "-m", "megamug", "data", "tokenizer", str(tmp_path / "data"), "--vocab-size", "300",
              "--output", str(tmp_path / "tokenizer.model")]  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes((data / "train-a.tar").read_bytes())
    subprocess.run([*tokens[:4], "index", tokens[5]], env=environment(), check=True, capture_output=True)
    subprocess.run(tokens, env=environment(), check=True, capture_output=True)
    (tmp_path / "data" / "a.tar").unlink()
    result = demo("demo.py", "--folder", str(tmp_path), "--data", str(data), "--seeds", "1", *TINY)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    rows = re.findall(r"^\| (\w+) \| 1 \| (\d+\.\d) \| (\d+\.\d) \|$", result.stdout, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["untrained", "pixels", "captions", "both"]
    for name, linear, knn in rows:
        found = json.loads((tmp_path / f"study/results/{name}-seed1.json").read_text())["results"]["mean"]
        assert abs(float(linear) - 100 * found["linear"]["top1"]) < 0.06
        assert abs(float(knn) - 100 * found["knn"]["20"]["top1"]) < 0.06
    assert len(re.findall(r"^\| \w+ - \w+ \| [+-]\d", result.stdout, flags=re.MULTILINE)) == 5
    pictures = re.findall(r"\S+\.png", result.stdout.split("Look at")[1])
    assert len(pictures) == 3 and all(Path(path).read_bytes()[:4] == b"\x89PNG" for path in pictures)


def test_what_is_missing_is_told(tmp_path):
    result = demo("demo.py", "--folder", str(tmp_path / "f"), "--data", str(tmp_path))
    assert result.returncode == 2 and "make them with examples/transfer/emoji.py" in result.stderr
    assert not (tmp_path / "f").exists()
    result = demo("emoji.py", str(tmp_path), str(tmp_path / "out"))
    assert result.returncode == 2 and "has no emojibase-data-*.tgz" in result.stderr


def packed(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_shards_of_emoji_are_made_of_the_three_packages(tmp_path):
    source, out = tmp_path / "packed", tmp_path / "out"
    source.mkdir()
    codes = [f"1F60{i}" for i in range(10)] + ["2764-FE0F"]
    entries = [{"hexcode": code, "label": f"face {code}", "tags": ["smile", "face"], "group": 3} for code in codes]
    entries += [{"hexcode": "1F3FB", "label": "skin", "group": 2}, {"hexcode": "1F1E6", "label": "letter"}]
    groups = {"groups": {str(i): f"group {i}" for i in range(10)}}
    packed(source / "emojibase-data-17.tgz", {
        "package/en/data.json": json.dumps(entries).encode(), "package/meta/groups.json": json.dumps(groups).encode(),
    })  # fmt: skip
    png = photograph(16, 16, kind="PNG")
    packed(source / "emoji-datasource-google-16.tgz", {
        f"package/img/google/64/{code.lower()}.png": png for code in [*codes, "1F3FB"]
    })  # fmt: skip
    packed(source / "lobehub-fluent-emoji-3d-1.tgz", {f"package/assets/{code.lower()}.webp": png for code in codes[:5]})
    result = demo("emoji.py", str(source), str(out))
    assert result.returncode == 0, result.stderr
    names = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as archive:
            names[path.stem] = archive.getnames()
            for member in archive.getnames():
                if member.endswith(".json"):
                    text = json.load(archive.extractfile(member))
                    assert text["label"] == 2 and text["caption"].endswith(": smile")
    assert names.keys() == {"train-noto", "heldout-noto", "train-fluent", "heldout-fluent"}
    assert sum(len(found) for found in names.values()) == 2 * (11 + 5)
    assert "2764-noto.png" in names["train-noto"] + names["heldout-noto"]
    held_out = {name.split("-")[0] for name in names["heldout-noto"]}
    assert held_out.isdisjoint(name.split("-")[0] for name in names["train-fluent"])
