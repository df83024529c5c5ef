"""What made a run is told by its folder: every life of it, with its end."""

from __future__ import annotations

import json
import subprocess
import types
from datetime import datetime

import pytest

from megamug.telemetry import environment

FIRST = types.SimpleNamespace(is_first=True, size=2)


def lives(run_dir) -> list[dict]:
    return json.loads((run_dir / "environment.json").read_text())["lives"]


def test_every_life_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/megamug", "train", "c.yaml", "run_dir=a b"])
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with environment.life(tmp_path / "run", FIRST) as life:
        begun = lives(tmp_path / "run")  # at once: a killed run tells of itself, too
        life.update(from_step=0, to_step=10, code=3)
    with pytest.raises(ZeroDivisionError), environment.life(tmp_path / "run", FIRST) as life:
        life.update(from_step=10, to_step=12)
        raise ZeroDivisionError
    with environment.life(tmp_path / "run", types.SimpleNamespace(is_first=False, size=2)) as life:
        life["from_step"] = 12
    with environment.life(tmp_path / "run", FIRST) as life:
        life.update(from_step=10, to_step=20, code=0)
    one, two, three = lives(tmp_path / "run")
    assert len(begun) == 1 and begun[0]["ended"] is None and begun[0]["command"] == one["command"]
    assert [life["outcome"] for life in (one, two, three)] == [
        "stopped on request", "failed: ZeroDivisionError", "finished"]  # fmt: skip
    assert [(life["from_step"], life["to_step"]) for life in (one, two, three)] == [(0, 10), (10, 12), (10, 20)]
    assert one["command"] == "megamug train c.yaml 'run_dir=a b'" and one["job"] == {"SLURM_JOB_ID": "17"}
    assert one["processes"] == 2 and one["versions"]["torch"] and one["host"]["cpus"] > 0 and one["devices"] == []
    for life in (one, two, three):
        assert datetime.fromisoformat(life["started"]) <= datetime.fromisoformat(life["ended"])


def test_the_id_stays_and_a_damaged_file_is_put_aside(tmp_path, caplog):
    with environment.life(tmp_path, FIRST):
        made = environment.read(tmp_path)["id"]
    assert environment.read(tmp_path)["id"] == made
    for text in ("{", "[]", '{"id": "a", "lives": 3}', '{"id": "a", "lives": [null]}', "\x00"):
        (tmp_path / "environment.json").write_text(text)
        assert environment.read(tmp_path)["lives"] == [] and not (tmp_path / "environment.json").exists()
        assert (tmp_path / "environment.damaged.json").read_text() == text
    assert "environment.json is damaged" in caplog.text


def test_the_commit_is_that_of_the_code(tmp_path):
    """And none where the package was installed into a folder below a checkout of something else."""
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                       capture_output=True)  # fmt: skip

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "more.py").write_text("")
    assert environment.git_state(package) is None
    git("init")
    assert environment.git_state(package) is None  # lies there, is not of it
    git("add", ".")
    git("commit", "-m", "one")
    state = environment.git_state(package)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (package / "more.py").write_text("x = 1")
    assert environment.git_state(package) == state | {"dirty": True}
