"""The command line: exit codes, one sentence for a mistake, who speaks under torchrun."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import megamug
from megamug import cli
from megamug.command_line.launcher import world_size
from megamug.configuration import validate
from megamug.configuration.reading import save_config
from megamug.configuration.sections import Config
from megamug.errors import UserError
from tests.distributed.launch import python_path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module in the place of megamug.NAME whose functions record how they are called."""

    def put(name: str, function: str, answer: object) -> list:
        calls = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(answer, Exception):
                raise answer
            return answer

        module = types.SimpleNamespace(**{function: record})
        monkeypatch.setitem(sys.modules, f"megamug.{name}", module)
        room, _, file = f"megamug.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(room), file, module, raising=False)
        return calls

    return put


@pytest.fixture
def finished_run(tmp_path) -> Path:
    """A run folder with checkpoints of steps 10 and 20."""
    config = Config(run_dir=str(tmp_path / "run"))
    config.data.validation = "shards"
    save_config(config)
    for step in (10, 20):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "picture.png").write_bytes(b"")
    return tmp_path / "run"


def told(capsys, *argv: object) -> str:
    """The sentence with which a command line is refused."""
    assert cli.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("megamug: error: ")
    return captured.err


def shell(*argv: object, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return subprocess.run(
        [sys.executable, "-m", "megamug", *map(str, argv)], env=clean | {"PYTHONPATH": python_path()} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND; see `megamug --help`"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "CONFIG.yaml; see `megamug train --help`"),
        (["train", "/absent.yaml"], "configuration file /absent.yaml does not exist"),
        (["train", "/absent.yaml", "--dryrun"], "unrecognised argument --dryrun"),
        (["train", "/absent.yaml", "steps"], "/absent.yaml does not exist"),
        (["evaluate", "/absent"], "required: --task"),
        (["evaluate", "/absent", "--task", "painting"], "invalid choice: 'painting'"),
        (["evaluate", "/absent", "--task", "captioning"], "there is no run folder /absent"),
        (["evaluate", "/absent", "--task", "captioning", "--samples", "many"], "invalid int value: 'many'"),
        (["evaluate", "/absent", "--task", "captioning", "a=1"], "unrecognised argument a=1"),
        (["generate", "/absent"], "there is no run folder /absent"),
        (["doctor", "--jsn"], "unrecognised argument --jsn"),
    ],
)
def test_mistakes_in_the_command_line(capsys, argv, said):
    assert said in told(capsys, *argv)


def test_a_process_told_off_exits_with_2_and_has_not_imported_torch(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {stepz: 3}")
    script = (
        "import sys; from megamug.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "train", str(tmp_path / "c.yaml")], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": python_path()},
    )  # fmt: skip
    said = f"megamug: error: {tmp_path / 'c.yaml'}: unknown key train.stepz; the nearest is train.steps\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", said)


def test_python_dash_m_and_version():
    result = shell("--version")
    assert (result.returncode, result.stdout) == (0, f"megamug {megamug.__version__}\n")
    result = shell("train", "--help")
    assert result.returncode == 0 and "--dry-run" in result.stdout


def test_train_hands_the_resolved_configuration_to_the_trainer(tmp_path, monkeypatch, stand_in):
    (tmp_path / "c.yaml").write_text("model: {preset: vit_s16}")
    monkeypatch.setattr(validate, "validate", lambda config, size, here: None)
    for code in (0, 1, 3):
        calls = stand_in("training.trainer", "train", code)
        assert cli.main(["train", str(tmp_path / "c.yaml"), "train.steps=7", "seed=3"]) == code
        ((config,), _), = calls  # fmt: skip
        assert (config.train.steps, config.seed, config.model.width) == (7, 3, 384)


def test_nothing_is_trained_that_is_not_valid(tmp_path, capsys, stand_in):
    calls = stand_in("training.trainer", "train", 0)
    (tmp_path / "c.yaml").write_text("parallel: {tensor: 2}")
    assert "tensor(2) x pipeline(1) = 2 but WORLD_SIZE is 1" in told(capsys, "train", tmp_path / "c.yaml")
    assert calls == []


def test_a_dry_run_prints_the_layout_and_changes_nothing(tmp_path, capsys, monkeypatch, stand_in):
    calls = stand_in("training.trainer", "train", 1)
    monkeypatch.setattr(validate, "files", lambda config: None)
    monkeypatch.setattr(validate, "vocabulary", lambda config: None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "c.yaml").write_text("{parallel: {tensor: 2, pipeline: 2}, model: {caption_loss_weight: 0}}")
    assert cli.main(["train", str(tmp_path / "c.yaml"), "--dry-run", f"run_dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "8 = tensor(2) x pipeline(2) x data(2)" in out
    assert "256 = micro-batch(32) x 4 micro-batches x data(2)" in out
    assert "12 layers of 768, 12 heads; 50 tokens (49 of 196 patches visible)" in out
    assert calls == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        ({"WORLD_SIZE": "4", "RANK": "0x"}, None),
        ({"WORLD_SIZE": "4", "RANK": "4"}, None),
    ],
)
def test_nonsense_from_a_launcher(monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said or "RANK is"):
        world_size()


def test_the_first_process_of_a_machine_speaks_and_all_exit_with_2(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    waited = []

    def launcher(signals, seconds):
        waited.append(seconds)
        return answers.pop()

    answers = [None, object()]  # rank 1 is ended by the launcher, rank 3 is not
    monkeypatch.setattr(signal, "sigtimedwait", launcher)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, signals: None)
    for rank, local_rank, expected in (  # rank 2 is the first of a second machine
        (0, 0, "megamug: error: "), (1, 1, ""), (2, 0, "[rank 2] megamug: error: "), (3, 1, "[rank 3] megamug: error: ")
    ):  # fmt: skip
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert cli.main(["train", "/absent.yaml"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(expected) and bool(error) == bool(expected)
    assert waited == [cli.PATIENCE_SECONDS] * 2


def test_one_that_waited_to_be_ended_hears_sigterm_again(capsys, monkeypatch):
    """What it starts afterwards inherits its mask: with SIGTERM blocked, a run would never stop on request."""
    monkeypatch.setattr(cli, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    assert cli.main(["train", "/absent.yaml"]) == 2 and capsys.readouterr().err.startswith("[rank 1] megamug: error: ")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before


def test_a_rank_that_is_no_number_is_told_at_once(capsys, monkeypatch):
    monkeypatch.setattr(signal, "sigtimedwait", lambda signals, seconds: pytest.fail("it waits"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "x")
    assert cli.main(["train", "/absent.yaml"]) == 2 and "megamug: error: " in capsys.readouterr().err


def test_under_torchrun_one_sentence_and_no_process_group(tmp_path):
    (tmp_path / "c.yaml").write_text("parallel: {tensor: 4}")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megamug",
         "train", str(tmp_path / "c.yaml")],
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode != 0
    said = "megamug: error: parallel: tensor(4) x pipeline(1) = 4 but WORLD_SIZE is 2"
    assert result.stderr.count(said) == 1
    assert "exitcode  : 2" in result.stderr and f'File "{ROOT}/megamug' not in result.stderr


def test_a_mistake_that_only_the_trainer_finds(tmp_path, capsys, monkeypatch, stand_in):
    stand_in("training.trainer", "train", UserError("the checkpoint is of another seed; set seed=5"))
    monkeypatch.setattr(validate, "validate", lambda config, size, here: None)
    (tmp_path / "c.yaml").write_text("")
    assert "set seed=5" in told(capsys, "train", tmp_path / "c.yaml")


def test_a_real_bug_keeps_its_traceback(tmp_path, monkeypatch, stand_in):
    stand_in("training.trainer", "train", ZeroDivisionError("a bug"))
    monkeypatch.setattr(validate, "validate", lambda config, size, here: None)
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(tmp_path / "c.yaml")])


def test_evaluate_calls_the_task_and_prints_its_figures(finished_run, capsys, stand_in):
    calls = stand_in("evaluate", "run_task", {"exact_match": 0.5})
    options = ["--task", "captioning", "--checkpoint", "10", "--samples", "9"]
    assert cli.main(["evaluate", str(finished_run), *options]) == 0
    named = {"step": 10, "samples": 9, "data": None, "output": None, "references": None, "suite": None,
             "predictions": False}  # fmt: skip
    assert calls == [((finished_run, "captioning"), named)]
    assert capsys.readouterr().out == '{\n  "exact_match": 0.5\n}\n'


def test_generate_calls_the_generator(finished_run, capsys, stand_in):
    calls = stand_in("generation.images", "generate_from_images", {"captions": ["a red square"]})
    picture = finished_run.parent / "picture.png"
    assert cli.main(["generate", str(finished_run), "--images", str(picture), "--mask-ratio", "0.5"]) == 0
    named = {"mask_ratio": 0.5, "top_p": None, "temperature": 1.0, "output": None, "step": None}
    assert calls == [((finished_run, [picture]), named)]
    assert "a red square" in capsys.readouterr().out


def test_figures_in_json_are_for_programs(finished_run, capsys, stand_in, monkeypatch):
    """On a terminal, 60 to 80 lines of them hid the table."""
    stand_in("evaluate", "run_task", {"exact_match": 0.5})
    words = ["evaluate", str(finished_run), "--task", "captioning"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(words) == 0 and capsys.readouterr().out == ""
    assert cli.main([*words, "--json"]) == 0 and "exact_match" in capsys.readouterr().out


def test_what_evaluate_and_generate_refuse(finished_run, tmp_path, capsys):
    task = ["--task", "reconstruction"]
    images = ["--images", finished_run.parent / "picture.png"]
    assert "no checkpoint of step 13; the nearest is --checkpoint 10" in told(
        capsys, "evaluate", finished_run, *task, "--checkpoint", 13)  # fmt: skip
    assert "--samples is 0" in told(capsys, "evaluate", finished_run, *task, "--samples", 0)
    assert "--data: /absent" in told(capsys, "evaluate", finished_run, *task, "--data", "/absent")
    assert "picture.png is a file" in told(capsys, "evaluate", finished_run, *task, "--output", images[1])
    assert "/absent.png does not exist" in told(capsys, "generate", finished_run, "--images", "/absent.png")
    for option, value in (("--mask-ratio", "1"), ("--top-p", "0"), ("--top-p", "nan"), ("--temperature", "-1")):
        said = told(capsys, "generate", finished_run, *images, f"{option}={value}")
        assert f"{option} is {value}; it must be" in said
    (tmp_path / "empty").mkdir()
    assert "has no config.yaml" in told(capsys, "evaluate", tmp_path / "empty", *task)
    mae = Config(run_dir=str(tmp_path / "empty"))
    mae.model.caption_loss_weight = 0.0
    save_config(mae)
    assert "has no checkpoint yet" in told(capsys, "evaluate", tmp_path / "empty", *task)
    (tmp_path / "empty" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert "without data.validation" in told(capsys, "evaluate", tmp_path / "empty", *task)
    for more in ([], ["--data", "/absent"]):  # what the run is comes before what it is measured on
        assert "is a run of mug, whose tasks are: reconstruction, captioning" in told(
            capsys, "evaluate", tmp_path / "empty", "--task", "classification", *more)  # fmt: skip
    assert "model.caption_loss_weight=0, so it has no such decoder" in told(
        capsys, "evaluate", tmp_path / "empty", "--task", "captioning", "--data", "x")  # fmt: skip
