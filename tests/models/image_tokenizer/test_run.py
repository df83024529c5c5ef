"""tools/train_image_tokenizer.py as a user runs it: trained, stopped, continued, on two processes; mistakes."""

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from megamug.data.demo.scenes import DemoParameters, make_demo_data
from megamug.data.shards.indexing import index_paths
from megamug.models.image_tokenizer.model import ImageTokenizer
from megamug.models.image_tokenizer.training import ImageTokenizerTrainer
from tests.distributed.launch import launch

ROOT = Path(__file__).parents[3]
SIZES = "--image-size 32 --f 4 --channels 4 --residual-blocks 1 --latent-channels 4 --code-width 2 --codes 8"
LOOP = "--norm-groups 2 --batch-size 4 --steps 6 --log-every 1 --threads 1 --validation-samples 5"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    index_paths(make_demo_data(folder / "demo", DemoParameters(train=24, heldout=6, size=36), processes=1), processes=1)
    return folder / "demo"


def run(shards, output, more=""):
    """The tool, in this process: (exit code, what it printed, what it complained)."""
    tool = str(ROOT / "tools" / "train_image_tokenizer.py")
    data = [str(shards / "train"), "--validation", str(shards / "heldout"), "--output", str(output)]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [tool, *data, *SIZES.split(), *LOOP.split(), *more.split()]),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended,
    ):  # fmt: skip
        runpy.run_path(tool, run_name="__main__")
    return ended.value.code, out.getvalue(), err.getvalue()


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["total"]) for line in lines if "total" in line]


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A run that nothing interrupts; (folder, what it printed)."""
    output = tmp_path_factory.mktemp("whole") / "tokenizer"
    code, printed, error = run(shards, output)
    assert code == 0, error
    return output, printed


def test_it_writes_a_tokenizer_and_reports_its_error(trained):
    output, printed = trained
    tokenizer = ImageTokenizer.load(output)
    assert (tokenizer.config.grid, tokenizer.config.codes) == (8, 8)
    assert tokenizer.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 8)
    assert [step for step, _ in losses(output)] == [1, 2, 3, 4, 5, 6]
    assert "held-out: PSNR" in printed and "5 images" in printed and "perplexity" in printed
    assert (output / "round_trip.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_is_continued_to_the_same_bytes(shards, trained, tmp_path, monkeypatch):
    output, step = tmp_path / "tokenizer", ImageTokenizerTrainer.train_step

    def stopped(self, images):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, images)

    monkeypatch.setattr(ImageTokenizerTrainer, "train_step", stopped)
    code, printed, _ = run(shards, output)
    assert code == 3 and "stopped after step 3; the same command continues" in printed
    assert not (output / "config.json").exists() and [number for number, _ in losses(output)] == [1, 2, 3]
    with open(output / "metrics.jsonl", "a") as file:  # what a crash after the last state leaves
        file.write('{"step": 99, "total": 1.0}\n{"step": 1')
    code, printed, error = run(shards, output)
    assert code == 0, error
    assert "at step 3" in printed and losses(output) == losses(trained[0])
    assert (output / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


def test_a_finished_run_is_left_alone(shards, trained):
    before = (trained[0] / "model.safetensors").stat().st_mtime_ns
    code, printed, _ = run(shards, trained[0])
    assert code == 0 and "trained for 6 steps already" in printed
    assert (trained[0] / "model.safetensors").stat().st_mtime_ns == before


def test_mistakes_end_in_one_sentence(shards, trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained[0], copy)
    (tmp_path / "file").write_text("")
    state = copy / "training" / "state.pt"

    def refused(output, more, message):
        code, _, error = run(shards, output, more)
        assert code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1, error

    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": "0"}), mock.patch.object(
        torch.distributed, "init_process_group", side_effect=AssertionError("there was a process group")
    ):  # fmt: skip
        refused(tmp_path / "new", "--batch-size 3", "--batch-size 3 is not a multiple of 2 processes")
        refused(copy, "--seed 5", "made with seed 1, now 5")
        refused(tmp_path / "new", "--perceptual-weights /absent.pth", "/absent.pth: no such file")
        refused(copy, f"--validation {tmp_path}", "no .tar shards in there")
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "two"}):
        refused(copy, "", "WORLD_SIZE is 'two'")
    refused(copy, "--learning-rate 0.5", "made with learning_rate 0.001, now 0.5")
    refused(copy, "--codes 9", "other sizes")
    refused(tmp_path / "file", "", "is a file")
    refused(tmp_path / "new", "--multipliers 1 2", "--multipliers has 2 levels")
    refused(tmp_path / "new", "--adversarial-weight 1 --image-size 16", "too few for the discriminator")
    whole = state.read_bytes()
    with zipfile.ZipFile(state) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        largest = sorted(tensors, key=lambda info: info.file_size)[-3:]
        places = [whole.index(archive.read(info)) + info.file_size // 2 for info in largest]
    for place in places:  # numbers, in which torch notices nothing
        state.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        torch.load(state, weights_only=True)
        refused(copy, "", "state.pt: damaged (")
    state.write_bytes(whole[:1000])
    refused(copy, "", "state.pt: damaged")
    assert not (tmp_path / "new").exists()


def test_two_processes_are_one_to_rounding():
    worker = str(ROOT / "tests" / "models" / "image_tokenizer" / "worker.py")
    (alone,) = launch([worker, "3", "8"], 1)
    pair = launch([worker, "3", "8"], 2)
    assert all(code == 0 for code, _ in [alone, *pair]), (alone, pair)
    one, first, second = (json.loads(output.splitlines()[-1]) for _, output in [alone, *pair])
    assert first["fingerprint"] == second["fingerprint"]
    for found, wanted in zip(first["losses"], one["losses"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    for name in ("gradients", "codes"):
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(one[name]), atol=1e-6, rtol=1e-3)
    assert first["error"] == pytest.approx(one["error"], rel=1e-4)
