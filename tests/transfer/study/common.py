"""Labelled, captioned shards and a configuration that trains in a moment; trainings that are made up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megamug import cli
from megamug.configuration.reading import load_config
from megamug.data.pairs.text import train_tokenizer
from megamug.data.shards.indexing import index_paths
from tests.data.conftest import write_tar
from tests.transfer.common import photograph

CONFIG = """
model:
  patch_size: 8
  width: 32
  layers: 1
  heads: 2
  ffn_width: 64
  decoder_layers: 1
  decoder_width: 32
  decoder_heads: 2
  text_unimodal_layers: 1
  text_multimodal_layers: 1
  text_width: 32
  text_heads: 2
data: {image_size: 32, caption_length: 16, global_batch_size: 8, micro_batch_size: 8, threads: 1}
optimizer: {warmup_steps: 1}
train: {steps: 2, pictures_every: 0}
log: {trackers: []}
"""


def drawings(numbers: range) -> list[tuple[str, bytes]]:
    members = []
    for i in numbers:
        text = {"caption": f"a drawing of {'abcdefghijklmnop'[i % 16]} in class {i % 3}", "label": i % 3}
        members += [(f"{i}.png", photograph(32, 32, seed=i, kind="PNG")), (f"{i}.json", json.dumps(text).encode())]
    return members


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with train/, test/, other/ (shards), t.model and c.yaml."""
    folder = tmp_path_factory.mktemp("study")
    for name, numbers in {"train": range(40), "test": range(40, 60), "other": range(60, 80)}.items():
        (folder / name).mkdir()
        write_tar(folder / name / "a.tar", drawings(numbers))
        index_paths([folder / name / "a.tar"], processes=1)
    texts = [f"a drawing of {letter} in class 0" for letter in "abcdefghijklmnop"]
    train_tokenizer(texts * 20, folder / "t.model", 300)
    (folder / "c.yaml").write_text(CONFIG)
    return folder


def words(inputs: Path, output: Path, name: str, *more: object) -> list[str]:
    """`megamug study NAME ...` on these inputs."""
    return ["study", name, str(inputs / "c.yaml"), "--data", str(inputs / "train"), "--test", str(inputs / "test"),
            "--output", str(output), *map(str, more), f"data.tokenizer={inputs / 't.model'}"]  # fmt: skip


def study(inputs: Path, output: Path, name: str, *more: object) -> int:
    return cli.main(words(inputs, output, name, *more))


@pytest.fixture
def trained(monkeypatch):
    """Trainings and their figures are made up. Gives what was "trained", by cell; a cell in `.codes` ends with that
    exit code, or raises that."""

    class Trained(list):
        codes: dict = {}

    found = Trained()
    found.codes = {}

    def command(tools, words, log):
        assert words[0] == "train" and not tools.launcher
        config = load_config(words[1])
        cell = Path(config.run_dir).name
        found.append(cell)
        code = found.codes.get(cell, 0)
        if isinstance(code, BaseException):
            raise code
        if not code:
            Path(config.run_dir, "checkpoints").mkdir(parents=True, exist_ok=True)
        return code

    def measure(study, target, config, tools, untrained, log):
        assert Path(config.run_dir, "checkpoints").is_dir() and untrained == (target.variant == "untrained")
        share = int(hashlib.sha256(target.name.encode()).hexdigest()[:4], 16) / 2**16
        return {f: {"linear": {"top1": share}, "knn": {str(study.measure.k): {"top1": share / 2}}}
                for f in study.measure.features}, [40, 20]  # fmt: skip

    monkeypatch.setattr("megamug.transfer.study.cells._command", command)
    monkeypatch.setattr("megamug.transfer.study.cells._measure", measure)
    return found
