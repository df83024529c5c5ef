"""The SLURM script against stand-ins of srun and scontrol: a stop signal ends in a saved checkpoint, exit code 3 and a
requeue; the requeued job goes on at the saved step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamug.configuration.reading import to_yaml
from tests.distributed.launch import ROOT, environment, free_port
from tests.evaluate.tiny_run import make_data, tiny_config
from tests.training.runs import checkpoints, metrics

SCRIPT = ROOT / "examples" / "cluster" / "slurm.sh"
STEPS = 400

# As srun does: starts SLURM_NTASKS tasks, hands USR1 on, kills them at TERM, exits with the highest code.
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
tasks = [
    subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
with open(os.environ["CALLS"], "a") as file:
    print(*sys.argv[1:], file=file)
answers = {"hostnames": "127.0.0.1", "job": "JobId=1 JobState=" + os.environ.get("STATE", "RUNNING")}
print(answers.get(sys.argv[2], ""))
sys.exit(int(os.environ.get("REFUSES", "0")) if sys.argv[1] == "requeue" else 0)
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job on one node of two CPU processes; what scontrol is asked is written to `CALLS`."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    return environment(
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", CALLS=str(tmp_path / "calls"), PYTHON=sys.executable,
        SLURM_JOB_ID=str(free_port() - 20000 + 10000 * 7), SLURM_JOB_NODELIST="node[1]", SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip


def start(env: dict[str, str], *words: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", str(SCRIPT), *words], env=env, cwd=ROOT, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def end(job: subprocess.Popen) -> tuple[int, str]:
    """(exit code, output); a job that hangs is killed with all its processes."""
    try:
        output, _ = job.communicate(timeout=120)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    return job.returncode, output


def requeued(env: dict[str, str]) -> bool:
    return f"requeue {env['SLURM_JOB_ID']}" in Path(env["CALLS"]).read_text().splitlines()


def wait_for(condition, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_stopped_job_is_saved_and_requeued_and_goes_on(cluster, tmp_path):
    # One process: that several stop at the same step is the business of test_trainer_layouts.py.
    cluster.update(SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1")
    config = tiny_config(make_data(tmp_path), tmp_path / "run", caption_loss_weight=0.0)
    config.data.__dict__.update(validation=None, global_batch_size=2, micro_batch_size=2)
    config.train.steps, config.log.every, config.log.tensorboard = STEPS, 1, False
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    logged = tmp_path / "run" / "metrics.jsonl"

    job = start(cluster, str(tmp_path / "c.yaml"))
    wait_for(lambda: logged.exists() and logged.read_text().count("\n") >= 3, job)
    job.send_signal(signal.SIGUSR1)  # as SLURM does before the time limit, to the script alone
    code, told = end(job)
    assert code == 3, told
    saved = int(re.search(r"stopped on request after step (\d+)", told)[1])
    assert 3 <= saved < STEPS and checkpoints(tmp_path / "run") == [saved]
    assert requeued(cluster), told

    Path(cluster["CALLS"]).unlink()
    code, told = end(start({**cluster, "SLURM_RESTART_COUNT": "1"}, str(tmp_path / "c.yaml")))  # the same command
    assert code == 0, told
    assert f"resuming after step {saved}" in told and "start 2" in told
    assert not requeued(cluster)
    steps, _ = metrics(tmp_path / "run")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))  # each once


def fake_python(folder: Path, program: str) -> str:
    """A program in the place of the interpreter: what it is called with does not matter."""
    path = folder / "python"
    path.write_text(f"#!/usr/bin/env bash\n{program}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (3, True), (137, False), (143, False)])
def test_only_a_stop_on_request_is_requeued(cluster, tmp_path, code, again):
    cluster["PYTHON"] = fake_python(tmp_path, f"exit {code}")
    assert end(start(cluster, "c.yaml"))[0] == code
    assert requeued(cluster) == again


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_stopped_before_training_begins_is_requeued(cluster, tmp_path, number):
    cluster["PYTHON"] = fake_python(tmp_path, f"touch {tmp_path}/started; exec sleep 60")
    job = start(cluster, "c.yaml")
    wait_for((tmp_path / "started").exists, job)
    time.sleep(0.3)  # both tasks sleep, the script waits
    job.send_signal(number)
    code, told = end(job)
    assert code == 128 + signal.SIGUSR1 and requeued(cluster), told


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    cluster.update(PYTHON=fake_python(tmp_path, "exit 3"), STATE="CANCELLED")
    code, told = end(start(cluster, "c.yaml"))
    assert code == 3 and "was cancelled" in told and not requeued(cluster)


def test_a_refused_requeue_is_told(cluster, tmp_path):
    cluster.update(PYTHON=fake_python(tmp_path, "exit 3"), REFUSES="1")
    code, told = end(start(cluster, "c.yaml"))
    assert code == 3 and "could not be put back" in told


def test_every_process_learns_its_place(cluster, tmp_path):
    cluster["PYTHON"] = fake_python(
        tmp_path, f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $*" > {tmp_path}/told-$RANK'
    )
    assert end(start(cluster, "c.yaml", "train.steps=2"))[0] == 0
    for rank in (0, 1):
        told = (tmp_path / f"told-{rank}").read_text()
        assert told == f"{rank} {rank} 2 2 127.0.0.1 -m megamug train c.yaml train.steps=2\n"
    assert end(start(cluster))[0] == 2
