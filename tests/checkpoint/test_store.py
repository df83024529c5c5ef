"""Checkpoint folders: a save interrupted anywhere, damage of every kind, the pointer, retention."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys

import pytest

from megamug.checkpoint import store as store_module
from megamug.checkpoint.store import CheckpointStore


def save(store: CheckpointStore, step: int) -> None:
    partial = store.begin(step)
    (partial / "model" / "__0_0.distcp").write_bytes(os.urandom(1000))
    (partial / "model" / ".metadata").write_bytes(b"metadata of step %d" % step)
    (partial / "model" / "common.pt").write_bytes(b"common of step %d" % step)
    (partial / "state.json").write_text(json.dumps({"step": step}))
    store.commit(step)


def folders(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir() if path.is_dir())


def test_commit_gives_manifest_pointer_and_no_leftovers(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    assert store.newest_complete() is None
    save(store, 123)
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "step-00000123"]
    assert (store.root / "latest").read_text().strip() == "step-00000123"
    manifest = json.loads((store.path(123) / "manifest.json").read_text())
    assert manifest["step"] == 123
    assert set(manifest["files"]) == {"model/__0_0.distcp", "model/.metadata", "model/common.pt", "state.json"}
    assert manifest["files"]["model/__0_0.distcp"]["size"] == 1000
    step, path, reason = store.newest_complete()
    assert (step, path) == (123, store.path(123)) and "latest" in reason


@pytest.mark.parametrize("keep, left", [(0, [10, 20, 30, 40]), (1, [40]), (3, [20, 30, 40])])
def test_retention(tmp_path, keep, left):
    store = CheckpointStore(tmp_path, keep)
    for step in (10, 20, 30, 40):
        save(store, step)
    assert folders(store) == [f"step-{step:08d}" for step in left]


def test_retention_spares_the_pointed_and_does_not_count_the_damaged(tmp_path):
    store = CheckpointStore(tmp_path, keep=0)
    for step in (10, 20, 30):
        save(store, step)
    (store.path(30) / "state.json").unlink()  # damaged: neither counted nor removed
    store.keep = 1
    save(store, 15)  # older than 20, but the pointer names it
    assert folders(store) == ["step-00000015", "step-00000020", "step-00000030"]


FILES = ["model/__0_0.distcp", "model/.metadata", "model/common.pt", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["deleted", "empty", "halved", "flipped", "of another step", "link"])
def test_damage_is_found_and_the_previous_checkpoint_taken(tmp_path, caplog, name, damage):
    store = CheckpointStore(tmp_path, keep=0)
    for step in (10, 20):
        save(store, step)
    file = store.path(20) / name
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "halved":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        position = content.index(b"20") if b"20" in content else len(content) // 2
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    elif damage == "of another step":
        shutil.copy(store.path(10) / name, file)
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    assert store.verify(store.path(20))
    with caplog.at_level(logging.WARNING):
        step, path, reason = store.newest_complete()
    assert step == 10 and "step-00000020" in reason
    assert name in caplog.text and "step-00000020" in caplog.text  # names the folder and the file


def test_every_flipped_byte_of_the_manifest_is_found_or_harmless(tmp_path):
    store = CheckpointStore(tmp_path, keep=0)
    save(store, 10)
    file = store.path(10) / "manifest.json"
    content = file.read_bytes()
    for position in range(len(content)):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        if not store.verify(store.path(10)):
            changed = json.loads(file.read_text())
            assert changed == json.loads(content), f"byte {position} changed the manifest unseen"


def test_stray_file_in_model_is_a_problem_and_beside_it_is_not(tmp_path):
    store = CheckpointStore(tmp_path, keep=0)
    save(store, 10)
    (store.path(10) / "NOTES").write_text("the good one")
    assert store.verify(store.path(10)) == []
    (store.path(10) / "model" / "__9_0.distcp").write_bytes(b"x")
    assert store.verify(store.path(10)) == ["model/__9_0.distcp: not in the manifest"]


def test_manifest_may_not_name_files_outside(tmp_path):
    store = CheckpointStore(tmp_path, keep=0)
    save(store, 10)
    file = store.path(10) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"]["../../../secret"] = {"size": 1, "sha256": "0"}
    manifest["sha256"] = store_module._self_digest(manifest)
    file.write_text(json.dumps(manifest))
    assert "outside the checkpoint" in store.verify(store.path(10))[0]


@pytest.mark.parametrize("pointer", [None, "", "step-00000099", "../..", b"\xff\xfe"])
def test_a_broken_pointer_is_not_fatal(tmp_path, pointer):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        save(store, step)
    (store.root / "latest").unlink()
    if pointer is not None:
        (store.root / "latest").write_bytes(pointer if isinstance(pointer, bytes) else pointer.encode())
    found = store.newest_complete()
    assert found.step == 20 and found.reason.endswith("`latest` names none")
    (store.root / "latest").write_text("step-00000010")  # a kill came before it was moved
    found = store.newest_complete()
    assert found.step == 20 and found.reason.endswith("`latest` still names step-00000010")
    save(store, 30)
    assert (store.root / "latest").read_text().strip() == "step-00000030"


def test_same_step_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 10)
    first = (store.path(10) / "model" / "__0_0.distcp").read_bytes()
    save(store, 10)
    assert store.newest_complete().step == 10 and folders(store) == ["step-00000010"]
    assert (store.path(10) / "model" / "__0_0.distcp").read_bytes() != first


KILLED_SAVE = """
import os, signal, sys
import megamug.checkpoint.store as module
from pathlib import Path

run_dir, kill_at, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
calls = 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

store = module.CheckpointStore(run_dir, keep=1)
partial = store.begin(step)
(partial / "model" / "shard").write_bytes(b"x" * 100)
(partial / "state.json").write_text("{}")
for name in ("rename", "replace", "fsync", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
store.commit(step)
print(calls)
"""


@pytest.mark.parametrize("step", [20, 10])  # 10: replaces a checkpoint of the same step
def test_sigkill_at_every_durable_operation_leaves_a_complete_checkpoint(tmp_path, step):
    script = tmp_path / "save.py"
    script.write_text(KILLED_SAVE)

    def attempt(kill_at: int) -> subprocess.CompletedProcess:
        run_dir = tmp_path / f"run-{kill_at}"
        save(CheckpointStore(run_dir, keep=1), 10)
        command = [sys.executable, str(script), str(run_dir), str(kill_at), str(step)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    undisturbed = attempt(0)
    assert undisturbed.returncode == 0, undisturbed.stderr
    operations = int(undisturbed.stdout)
    assert operations >= 8
    for kill_at in range(1, operations + 1):
        result = attempt(kill_at)
        assert result.returncode == -9, (kill_at, result)
        store = CheckpointStore(tmp_path / f"run-{kill_at}", keep=1)
        store.recover()
        newest = store.newest_complete()
        assert newest is not None and newest.step in (10, step), kill_at
        assert not [name for name in folders(store) if name.startswith(".")], kill_at
        save(store, 30)  # and the run goes on
        assert store.newest_complete().step == 30


@pytest.mark.parametrize("limit", [100, 5])  # bytes a file may have: too few for the manifest, or for the pointer
def test_full_disk_leaves_the_old_checkpoint_and_pointer(tmp_path, monkeypatch, limit):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 10)
    partial = store.begin(20)
    (partial / "state.json").write_text("{}")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == 5:  # the manifest fits
        monkeypatch.setattr(store_module, "_write_manifest", lambda folder, step: None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.commit(20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        monkeypatch.undo()
    assert (store.root / "latest").read_text().strip() == "step-00000010"
    assert store.newest_complete().step == 10
    store.recover()
    save(store, 30)
    assert store.newest_complete().step == 30 and (store.root / "latest").read_text().strip() == "step-00000030"
