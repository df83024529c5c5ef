"""Which process of how many: from torchrun's variables, SLURM's, or a sentence."""

from __future__ import annotations

import os

import pytest

from megamug.command_line import launcher
from megamug.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = {
    "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "1234567", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    # Set first, so that what `adopt` sets is taken back, too.
    for name in [*NAMES, *(name for name in os.environ if name.startswith(("SLURM_", "OMPI_")))]:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def put(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_one_process_needs_nothing(monkeypatch):
    put(monkeypatch, SLURM_NTASKS="1", SLURM_PROCID="0")
    launcher.adopt()
    assert launcher.world_size() == 1 and "RANK" not in os.environ


def test_a_process_that_srun_started_knows_its_place(monkeypatch):
    put(monkeypatch, **STEP)
    launcher.adopt()
    assert launcher.world_size() == 16
    found = [os.environ[name] for name in NAMES]
    assert found == ["9", "16", "1", "8", "gpu003", str(20000 + 1234567 % 10000)]


def test_what_torchrun_set_is_left(monkeypatch):
    put(monkeypatch, **STEP, RANK="1", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1")
    launcher.adopt()
    assert (os.environ["RANK"], launcher.world_size()) == ("1", 2)


@pytest.mark.parametrize(("variables", "said"), [
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "SLURM_NTASKS is 8 but this process was not started by srun"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4 but RANK is not set"),
])  # fmt: skip
def test_processes_that_would_train_alone_are_refused(monkeypatch, variables, said):
    put(monkeypatch, **variables)
    with pytest.raises(UserError, match=said):
        launcher.adopt()


@pytest.mark.parametrize(("variables", "said"), [
    ({"RANK": "0"}, "RANK is set but MASTER_ADDR is not"),
    ({"RANK": "0", "MASTER_ADDR": "a"}, "RANK is set but MASTER_PORT is not"),
    ({"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT is '70000', not a port"),
])  # fmt: skip
def test_a_rank_without_an_address_is_a_sentence(monkeypatch, variables, said):
    put(monkeypatch, **variables)
    with pytest.raises(UserError, match=said):
        launcher.check_address()


@pytest.mark.parametrize(("nodes", "first"), [
    ("a", "a"), ("a,b", "a"), ("gpu[003-004,9]", "gpu003"), ("n[7]-ib,m", "n7-ib"), ("a-b[1-2],c[3]", "a-b1"),
])  # fmt: skip
def test_the_first_host_of_a_list(nodes, first):
    assert launcher.first_host(nodes) == first
