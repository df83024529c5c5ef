"""T4, T13 and T14: damaged checkpoints, hostile data, hostile pickles."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from megamug.checkpoint import store as stores
from megamug.checkpoint.store import CheckpointStore
from megamug.configuration.reading import load_config, resolve
from megamug.errors import UserError
from megamug.models.tasks import make_task
from megamug.training import resuming
from tests.reliability.faulty import writes_common
from tests.reliability.recipe import STEPS

NEWEST, OLDER = STEPS, STEPS - 3


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory) -> Path:
    """A finished run of two ranks, with the checkpoints of steps 9 and 12."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert [code for code, _ in runs.ranks(run, 2)] == [0, 0]
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def task(recipe):
    return make_task(resolve(load_config(recipe)))


def chosen(recipe: Path, task, run: Path) -> list[int | None]:
    """The steps that process 0 and another one go on from."""
    config = resolve(load_config(recipe, [f"run_dir={run}"]))
    found = [resuming.choose(config, task, CheckpointStore(run, 2), first) for first in (True, False)]
    return [None if one is None else one.step for one in found]


def damage(path: Path, kind: str, other: Path) -> bool:
    """Whether the file differs afterwards."""
    before = path.read_bytes()
    if kind == "deleted":
        path.unlink()
        return True
    after = {
        "empty": b"", "halved": before[: len(before) // 2], "another step's": other.read_bytes(),
        "flipped": before[: len(before) // 3] + bytes([before[len(before) // 3] ^ 1]) + before[len(before) // 3 + 1 :],
    }[kind]  # fmt: skip
    path.write_bytes(after)
    return after != before


@pytest.mark.parametrize("kind", ["deleted", "empty", "halved", "flipped", "another step's"])
def test_t4_a_damaged_file_of_the_newest_checkpoint_leads_to_the_one_before(trained, recipe, task, tmp_path, kind):
    checkpoint = trained / "checkpoints" / f"step-{NEWEST:08d}"
    names = [path.relative_to(checkpoint) for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert len(names) >= 5 + writes_common()
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        shutil.copytree(trained, run)
        folders = run / "checkpoints"
        changed = damage(folders / checkpoint.name / name, kind, folders / f"step-{OLDER:08d}" / name)
        assert chosen(recipe, task, run)[0] == (OLDER if changed else NEWEST), name


@pytest.mark.parametrize("kind", ["deleted", "empty", "halved", "flipped", "another step's"])
def test_t4_the_pointer_is_a_hint(run, recipe, task, kind, tmp_path):
    (tmp_path / "other").write_text(f"step-{OLDER:08d}\n")
    damage(run / "checkpoints" / "latest", kind, tmp_path / "other")
    assert chosen(recipe, task, run) == [NEWEST, NEWEST]


def test_t4_the_run_goes_on_from_the_older_and_ends_with_the_same_bits(run, runs, undisturbed):
    from tests.training.runs import fingerprint

    largest = max((run / "checkpoints" / f"step-{NEWEST:08d}" / "model").iterdir(), key=lambda p: p.stat().st_size)
    damage(largest, "flipped", largest)
    results = runs.ranks(run, 2)
    assert [code for code, _ in results] == [0, 0], results
    assert "resuming after step 9 " in results[0][1] and "passed over as damaged: step-00000012" in results[0][1]
    assert fingerprint(run / "checkpoints" / f"step-{NEWEST:08d}") == undisturbed


def test_t4_a_flipped_bit_of_state_json_is_never_believed(run, recipe, task):
    """At 60 places: no wrong sentence, no traceback, but the checkpoint before."""
    path = run / "checkpoints" / f"step-{NEWEST:08d}" / "state.json"
    whole, drawn = path.read_bytes(), random.Random(0)
    for place in drawn.sample(range(8 * len(whole)), 60):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert chosen(recipe, task, run) == [OLDER, OLDER], place
    path.write_bytes(whole)
    assert chosen(recipe, task, run) == [NEWEST, NEWEST]


def test_t4_without_the_manifest_it_would_be_believed(run, recipe, task, monkeypatch):
    """The tests above can fail."""
    path = run / "checkpoints" / f"step-{NEWEST:08d}" / "state.json"
    contents = json.loads(path.read_text())
    contents["cursor"]["seed"] += 1
    path.write_text(json.dumps(contents))
    monkeypatch.setattr(CheckpointStore, "verify", lambda self, path, hashes=True: [])
    monkeypatch.setattr(CheckpointStore, "read_verified", lambda self, _, name: (self.path(NEWEST) / name).read_bytes())
    with pytest.raises(UserError, match="seed"):
        chosen(recipe, task, run)


# ------------------------------------------------------------------------------------------ T14


class Canary:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_t14_a_hostile_pickle_in_a_checkpoint_that_its_manifest_vouches_for(run, runs, tmp_path, name):
    """tests/checkpoint/test_guarded.py has every place and reader; this is the whole command."""
    for step in (OLDER, NEWEST):
        folder = run / "checkpoints" / f"step-{step:08d}"
        place, hostile = folder / "model" / name, Canary(tmp_path / "canary")
        torch.save(hostile, place) if name == "common.pt" else place.write_bytes(pickle.dumps(hostile))
        (folder / "manifest.json").unlink()
        stores._write_manifest(folder, step)
    [(code, output)] = runs.ranks(run, 1, f"train.steps={STEPS + 1}")
    assert code == 1 and "mkdir" in output, output
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))  # unguarded it would
    assert (tmp_path / "canary").exists()


# ------------------------------------------------------------------------------------------ T13


def test_t13_a_run_on_hostile_data_trains_on_what_is_sound(runs, recipe, tmp_path):
    """tests/data/shards/test_reading.py has each kind of member with its reason; this is the way to a trained run."""
    from megamug.data.shards.indexing import index_paths
    from tests.data.conftest import encoded, good_members, write_tar
    from tests.training.runs import metrics

    jpeg = encoded()
    members = [
        *good_members(24), ("html.jpg", b"<html>not found</html>"), ("html.txt", b"a page"), ("empty.jpg", b""),
        ("empty.txt", b"nothing"), ("half.jpg", jpeg[: len(jpeg) // 2]), ("half.txt", b"a half"), ("lone.jpg", jpeg),
        ("latin.jpg", jpeg), ("latin.txt", b"caf\xe9"), ("../up.jpg", jpeg), ("../up.txt", b"outside"),
        ("big.jpg", jpeg), ("big.txt", b"x" * 10_000_000),
    ]  # fmt: skip
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "a.tar", members)
    whole = tmp_path / "whole.tar"
    write_tar(whole, good_members(12, start=24))
    (shards / "b.tar").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    index_paths([str(shards)], processes=1)
    results = runs.ranks(tmp_path / "run", 2, f"data.train={shards}", "train.steps=6", "checkpoint.every=0")
    assert [code for code, _ in results] == [0, 0], results
    steps = metrics(tmp_path / "run")[0]
    assert len(steps) == 6 and all(step["data_failures"] == 0 for step in steps)
    assert not (tmp_path / "up.jpg").exists()
    # Changed under its index, it is not trained on.
    with open(shards / "a.tar", "ab") as file:
        file.write(b"x" * 512)
    [(code, output)] = runs.ranks(tmp_path / "other", 1, f"data.train={shards}")
    assert code == 2 and "stale index" in output, output
