"""Bad input from end to end, through the programs that a user starts: a sentence and exit code 2 with nothing touched,
or a quarantine entry with its reason and training on the rest."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megamug import cli
from megamug.configuration.reading import to_yaml
from megamug.data.shards.sources import resolve_sources
from tests.data.conftest import encoded, good_members, picture, write_tar
from tests.data.shards.test_reading import CASES, hostile
from tests.distributed.launch import ROOT, environment
from tests.evaluate.tiny_run import tiny_config
from tests.training.runs import consumed, hooked, metrics

LAUNCHER = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")


class Helpers:
    """What `hostile` makes its members with."""

    picture, encoded = staticmethod(picture), staticmethod(encoded)


def program(*words: object, timeout: float = 60, **more: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in environment(**more).items() if name not in LAUNCHER or name in more}
    return subprocess.run(
        [sys.executable, *map(str, words)], env=clean, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below `folder`, but logs, with its size and time of change."""
    found = (path for path in folder.rglob("*") if "log" not in path.relative_to(folder).parts and path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """One shard for each hostile member, three good pairs in each; one with odd but sound pictures; one cut off."""
    folder = tmp_path_factory.mktemp("hostile") / "shards"
    folder.mkdir()
    for number, name in enumerate(CASES):
        members, *_ = hostile(name, Helpers)
        members = good_members(2) + members + good_members(1, start=2)
        write_tar(folder / f"{number:02d}-{name.replace(' ', '-')}.tar", members)
    cmyk, grey = encoded(picture(3).convert("CMYK")), encoded(picture(4).convert("I;16"), "PNG")
    odd = [("cmyk.jpg", cmyk), ("cmyk.txt", b"four inks"), ("deep.png", grey), ("deep.txt", b"16 bits")]
    write_tar(folder / "90-odd.tar", odd)
    cut = write_tar(folder / "91-cut-off.tar", good_members(4))
    with tarfile.open(cut) as tar:
        end = tar.getmembers()[6].offset_data + 20
    cut.write_bytes(cut.read_bytes()[:end])
    return folder


@pytest.fixture(scope="module")
def indexed(shards) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """(what tools/index_shards.py said, its quarantine list)"""
    quarantine = shards.parent / "quarantine.jsonl"
    result = program("tools/index_shards.py", shards, "--quarantine", quarantine)
    return result, [json.loads(line) for line in quarantine.read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(shards, indexed) -> Path:
    """A sound configuration on what is left of the shards."""
    folder = shards.parent
    made = program("tools/train_tokenizer.py", shards, "--output", folder / "tokenizer.model", "--vocab-size", 300)
    assert made.returncode == 0, made.stderr
    config = tiny_config(folder, folder / "run")
    config.data.__dict__.update(train=str(shards), validation=None, crop_scale=[0.5, 1.0])
    config.train.steps = 12
    config.log.tensorboard = False
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return folder / "recipe.yaml"


def test_hostile_members_are_quarantined_with_their_reasons(shards, indexed):
    result, quarantine = indexed
    assert result.returncode == 0, result.stderr
    assert "quarantined" in result.stdout and "Traceback" not in result.stderr
    found = {}
    for entry in quarantine:
        found.setdefault(Path(entry["shard"]).name, {})[entry["member"]] = entry["reason"]
    for number, name in enumerate(CASES):
        _, reason, member = hostile(name, Helpers)
        assert reason in found.pop(f"{number:02d}-{name.replace(' ', '-')}.tar")[member], name
    assert any("truncated" in reason for reason in found.pop("91-cut-off.tar").values())
    assert found == {}  # the odd pictures are sound
    assert {path.suffix for path in shards.iterdir()} == {".tar", ".index"}  # nothing was extracted
    again = program("tools/index_shards.py", shards)
    assert again.returncode == 0 and f"({len(CASES) + 2} up to date)" in again.stdout


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> Path:
    """A folder with a finished run in `run`, and what it consumed in `ids`."""
    folder = tmp_path_factory.mktemp("trained")
    with hooked(ids=folder / "ids"):
        assert cli.main(["train", str(recipe), f"run_dir={folder / 'run'}"]) == 0
    return folder


def test_training_on_the_rest(trained):
    steps, _ = metrics(trained / "run")
    assert len(steps) == 12 and not any(step["skipped"] or step["data_failures"] for step in steps)
    samples = 3 * len(CASES) + 2 + 3
    seen = sum(consumed(trained / "ids").values(), [])
    assert {index for _, index in seen[:samples]} == set(range(samples))  # each good pair, the odd ones among them


BAD = [  # overrides, WORLD_SIZE, what the sentence must hold
    (["train.stepz=3"], 1, ["unknown key train.stepz", "the nearest is train.steps"]),
    (["modle.width=32"], 1, ["unknown key modle.width", "the nearest is model.width"]),
    (["train.steps=many"], 1, ["train.steps: a whole number wanted, found 'many'"]),
    (["parallel.tensor=2", "parallel.pipeline=2"], 2, ["tensor(2) x pipeline(2) = 4 but WORLD_SIZE is 2", "set "]),
    (["data.micro_batch_size=5"], 1, ["global_batch_size(8)", "micro_batch_size(5)", "set data.micro_batch_size=4"]),
    (["parallel.tensor=3"], 3, ["model.heads(4) is not divisible by parallel.tensor(3)", "set parallel.tensor"]),
    (["parallel.tensor=2", "parallel.sequence=true"], 2, ["= 5 is not divisible by parallel.tensor(2)", "tokens=1"]),
    (["data.train=/absent/shards"], 1, ["data.train: /absent/shards: no such file or folder"]),
    (["data.tokenizer=/absent.model"], 1, ["data.tokenizer: there is no file /absent.model", "megamug data tokenizer"]),
    (["data.tokenizer=pyproject.toml"], 1, ["data.tokenizer: ", "not a SentencePiece model"]),
]


@pytest.mark.parametrize(("overrides", "world_size", "said"), BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_a_mistake_in_the_configuration(recipe, tmp_path, overrides, world_size, said):
    """One process of `world_size` alone, without an address to meet the others at: so there was no process group."""
    launcher = {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"} if world_size > 1 else {}
    result = program("-m", "megamug", "train", recipe, f"run_dir={tmp_path / 'run'}", *overrides, **launcher)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("megamug: error: ") and result.stderr.count("\n") == 1 and result.stdout == ""
    for part in said:
        assert part in result.stderr
    assert not (tmp_path / "run").exists()


def test_shards_without_an_index_or_with_a_stale_one(recipe, tmp_path):
    """The sentence holds the command that mends it; the command mends it."""
    (tmp_path / "new").mkdir()
    shard = write_tar(tmp_path / "new" / "x.tar", good_members(8))
    command = ["-m", "megamug", "train", recipe, f"run_dir={tmp_path / 'run'}", f"data.train={shard.parent}"]

    def refused(said: str) -> None:
        result = program(*command)
        assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "run").exists()
        _, _, fix = result.stderr.strip().rpartition("run: ")
        name, *words = fix.split()
        assert name == "megamug" and program("-m", name, *words).returncode == 0
        assert len(resolve_sources(str(shard.parent))[0]) == 8

    refused(f"data.train: {shard.parent}: 1 of 1 shards have no index (the first is {shard})")
    with tarfile.open(shard, "a") as tar:
        more = tarfile.TarInfo("more.txt")
        tar.addfile(more, io.BytesIO())
    refused("stale index")


def test_a_shard_that_is_no_tar(recipe, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x.tar").write_bytes(b"<html>404</html>" * 100)
    indexing = program("tools/index_shards.py", tmp_path / "new")
    assert indexing.returncode == 2 and "0 samples" in indexing.stdout and "x.tar" in indexing.stdout
    assert "not one usable sample in 1 shard: the reasons stand above" in indexing.stderr
    result = program("-m", "megamug", "train", recipe, f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'new'}")
    assert result.returncode == 2 and "no usable sample in 1 shard;" in result.stderr
    missing = program("tools/index_shards.py", "/absent")
    assert missing.returncode == 2 and "/absent: no such file or folder" in missing.stderr


def test_a_run_of_other_data_is_not_gone_on_with(recipe, trained, capsys):
    """The mistakes that are found last, under one process and two: one sentence, and the run folder stays as it is."""
    run = trained / "run"
    before = contents(run)
    assert cli.main(["train", str(recipe), f"run_dir={run}", "seed=7"]) == 2
    error = capsys.readouterr().err
    assert error == "megamug: error: seed: the checkpoint's order has 1234, here 7; set seed=1234\n"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megamug", "train"]
    odd = recipe.parent / "shards" / "90-odd.tar"
    result = program(*launcher, recipe, f"run_dir={run}", f"data.train={odd}", timeout=120)
    assert result.returncode != 0 and "exitcode  : 2" in result.stderr
    assert result.stderr.count("megamug: error: data: the checkpoint was made with other data") == 1
    assert contents(run) == before
    assert os.listdir(run / "checkpoints")
