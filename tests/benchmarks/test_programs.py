"""Every benchmark runs, tiny, and writes its figures; what is asked wrongly is told in a sentence."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch

from megamug.benchmarks import _contest, checkpoint, jam, loader, losses, mug
from megamug.distributed import setup
from megamug.errors import UserError
from megamug.losses.ops import libraries
from megamug.models.blocks import cpu_linear, specs
from tests.data.conftest import good_members, write_tar
from tests.distributed.launch import ROOT, environment, launch_forked

PROGRAM = str(ROOT / "tools" / "benchmark.py")
TINY = (
    "--preset demo model.layers=2 model.width=32 model.heads=2 model.ffn_width=64 model.decoder_layers=1 "
    "model.decoder_width=32 model.decoder_heads=2 model.patch_size=8 data.image_size=32"
).split()
TINY_LM = "--layers 2 --width 32 --heads 2 --ffn-width 64 --vocabulary 128 --tokens 16".split()
MODULES = {"mug": mug, "jam": jam, "losses": losses, "loader": loader, "checkpoint": checkpoint}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch, tmp_path):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MEGAMUG_INDEX_DIRECTORY", str(tmp_path / "indexes"))


def ranks(tmp_path, processes: int, *words: str) -> dict:
    """Runs the program as so many ranks and returns its JSON."""
    results = launch_forked([PROGRAM, *words, "--json", str(tmp_path / "figures.json")], processes)
    assert [code for code, _ in results] == [0] * processes, results
    return json.loads((tmp_path / "figures.json").read_text())


def test_mug_under_tensor_parallelism(tmp_path):
    dtype = "bf16" if torch.bfloat16 in cpu_linear.TYPES else "fp32"  # elsewhere one large product takes minutes
    words = ["--batch", "4", "--steps", "2", "--dtypes", dtype, "data.micro_batch_size=2", "parallel.tensor=2"]
    content = ranks(tmp_path, 2, "mug", *TINY, *words, "--profile", str(tmp_path / "p"))
    assert content["layout"].items() >= {"processes": 2, "tensor": 2, "data": 1, "micro_batch_size": 2}.items()
    (result,) = content["results"]
    assert result["name"] == f"{dtype} megamug" and result["images_per_second"] > 0
    assert 0 < result["mfu"] < 1 and result["peak_gib"] > 0 and "data_wait" not in result
    assert {"matrix products", "communication", "optimizer", "norms"} <= {p["part"] for p in result["profile"]["parts"]}
    assert (tmp_path / "p" / f"mug-{dtype}.trace.json").stat().st_size > 1000


def test_jam_in_two_stages(tmp_path):
    words = ["--model", "jam_cross", "--batch", "4", "--steps", "1", "--dtypes", "fp32", "parallel.pipeline=2"]
    words += ["data.separate_documents=true"]
    content = ranks(tmp_path, 2, "jam", *TINY_LM, *words, "data.micro_batch_size=2")
    assert content["layout"]["pipeline"] == 2 and content["results"][0]["tokens_per_second"] > 0


@pytest.fixture
def alone():
    """A contestant is built in this process, whose groups are left behind it."""
    yield
    setup.stop()


def test_mug_with_captions_of_no_tokenizer(alone, monkeypatch, capsys):
    captions = ["model.caption_loss_weight=0.1", "model.text_unimodal_layers=1", "model.text_multimodal_layers=1",
                "model.text_width=32", "model.text_heads=2", "data.caption_length=8"]  # fmt: skip
    words = ["--batch", "2", "--steps", "1", "--dtypes", "fp32", "--vocabulary", "200", *captions]
    raced = []
    monkeypatch.setattr(_contest, "race", lambda report, module, names, *_: raced.append(names))
    mug.main([*TINY, *words])
    assert raced == [("megamug",)] and "ViTMAE writes no captions" in capsys.readouterr().out
    step, flops = mug.build_megamug(mug.parse([*TINY, *words]), "fp32")
    step()
    plain = mug.settings(mug.parse([*TINY, "--batch", "2"]), "fp32")
    assert flops > 2 * mug.task_of(plain, 0).flops_per_sample  # the captions' are in them
    task = mug.task_of(mug.settings(mug.parse([*TINY, *words]), "fp32"), 200)
    assert task.plan.vocabulary == 200 and task.loss_names == ["image", "caption"]
    with pytest.raises(UserError, match="its captions need a tokenizer; set data.tokenizer=FILE"):
        mug.task_of(mug.settings(mug.parse([*TINY, *words, "data.train=shards/"]), "fp32"), 200)


@pytest.mark.parametrize("build", [jam.build_writer, jam.build_jam_writer])
def test_writing_is_in_local_layers(build, alone, monkeypatch):
    """Also where `auto` takes Transformer Engine's for training, as on a GPU: those have no cache."""
    asked, choose = [], specs.choose
    monkeypatch.setattr(specs, "choose", lambda config: asked.append(config.precision.layers) or choose(config))
    step, flops = build(jam.parse([*TINY_LM, "--generate", "4"]), "fp32")
    step()  # which asserts that so many tokens were written
    assert set(asked) == {"local"} and flops > 0


def test_what_is_said_of_writing(monkeypatch, capsys):
    raced = []
    found = dict.fromkeys(("writer", "jam_writer"), {"tflops_per_device": 1.0})
    monkeypatch.setattr(_contest, "race", lambda report, module, names, *_: raced.append(names) or found)
    jam.main([*TINY_LM, "--dtypes", "--generate", "4"])
    assert raced == [("writer", "transformers_writer", "jam_writer")]
    assert "(ours in local layers)" in capsys.readouterr().out


def test_checkpoint(tmp_path):
    words = ["--folder", str(tmp_path), "--repeats", "1", "--profile", str(tmp_path / "p")]
    content = ranks(tmp_path, 1, "checkpoint", *TINY, *words)
    found = {result["name"]: result for result in content["results"]}
    assert {*found} == {
        "disk, write", "disk, read", "save", "stall", "save behind", "verify", "load", "torch.save", "torch.load"
    }  # fmt: skip
    assert all(result["gb_per_second"] > 0 and result["gigabytes"] > 1e-5 for result in found.values())
    assert found["stall"]["seconds"] < found["save behind"]["seconds"]
    assert found["save behind"]["cpu_seconds"] >= found["stall"]["cpu_seconds"] >= 0 < found["save"]["cpu_seconds"]
    assert {"write", "hash, fsync, rename"} <= {part["part"] for part in found["save"]["profile"]["parts"]}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("megamug")] == []


def test_loader(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", good_members(12))
    words = ["--data", str(tmp_path / "shards"), "--batch", "4", "--batches", "2", "--repeats", "1", "--workers", "1"]
    words += ["--image-size", "32", "--caption-length", "8", "--json", str(tmp_path / "figures.json")]
    loader.main([*words, "--profile", str(tmp_path / "p")])
    results = {result["name"]: result for result in json.loads((tmp_path / "figures.json").read_text())["results"]}
    assert {"megamug", "pillow"} <= {*results}
    if importlib.util.find_spec("webdataset"):
        assert results["webdataset"]["megamug_times"] > 0
    else:
        assert "webdataset is not installed" in capsys.readouterr().out
    assert all(result["images_per_second"] > 0 and result["peak_gib"] > 0 for result in results.values())
    assert {"decode and resize", "bytes (ahead)"} <= {p["part"] for p in results["megamug"]["profile"]["parts"]}
    assert not (tmp_path / "shards" / "a.tar.index").exists()


@pytest.mark.skipif(not libraries().cpu, reason="the compiled losses are not built")
def test_losses(tmp_path):
    threads = torch.get_num_threads()
    words = ["--no-compile", "--threads", "1", "--rows", "8", "--columns", "64", "--batch", "1", "--tokens", "16"]
    words += ["--width", "16", "--vocabulary", "64", "--repeats", "2", "--json", str(tmp_path / "figures.json")]
    losses.main([*words, "--profile", str(tmp_path / "p")])
    torch.set_num_threads(threads)
    results = {result["name"]: result for result in json.loads((tmp_path / "figures.json").read_text())["results"]}
    ours = results["cross-entropy 8 x 64 bfloat16: megamug"]
    assert ours["gb_per_second"] > 0 and ours["profile"]["parts"][0]["share"] > 0
    assert results["masked-patch 1 x 224/16 float32: eager"]["times_megamug"] > 0
    assert "linear + cross-entropy 16 x 16 x 64 bfloat16: product + eager cross-entropy" in results


def test_the_peers_of_training_steps_step():
    pytest.importorskip("transformers")
    step, flops = mug.build_transformers(mug.parse([*TINY, "--batch", "2"]), "bf16")
    assert step() is None and flops > 0
    step, flops = jam.build_transformers(jam.parse([*TINY_LM, "--batch", "1"]), "fp32")
    assert step() is None and flops > 0


def test_compiled_peers(monkeypatch):
    """The same steps on what torch.compile makes of the model; the compiler itself is not what is looked at here."""
    pytest.importorskip("transformers")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(type(model).__name__) or model)
    assert mug.build_transformers_compiled(mug.parse([*TINY, "--batch", "2"]), "fp32")[0]() is None
    assert jam.build_transformers_compiled(jam.parse([*TINY_LM, "--batch", "1"]), "bf16")[0]() is None
    assert compiled == ["ViTMAEForPreTraining", "LlamaForCausalLM"]


def test_which_peers_run(monkeypatch):
    peers = lambda *words: _contest.peers(mug.parse([*TINY, *words]))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers() == ["transformers"] and peers("--peers") == []
    assert peers("--peers", "eager", "compiled") == ["transformers", "transformers_compiled"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peers() == ["transformers", "transformers_compiled"] and peers("--peers", "compiled") == peers()[1:]
    for module in (mug, jam):
        assert all(callable(getattr(module, f"build_{name}")) for name in _contest.PEERS.values())


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("mug", ["parallel.tensor=2"], "WORLD_SIZE is 1"),
        ("mug", ["--batch", "0"], "0 must be"),
        ("mug", ["--steps", "x"], "a whole number wanted"),
        ("mug", ["--dtypes", "fp8"], "needs (a GPU|Transformer Engine)"),
        ("mug", ["data.global_batch_size=8"], "give the size of a step by --batch"),
        ("jam", ["model.nothing=1"], "unknown key model.nothing"),
        ("jam", ["--compare", "nowhere.json"], "nowhere.json cannot be read"),
        ("jam", ["--width", "30", "--heads", "4"], "not divisible"),
        ("loader", ["--data", "/nowhere"], "there is nothing at /nowhere"),
        ("loader", ["--repeats", "-1"], "-1 must be"),
        ("losses", ["--json", "/nowhere/x.json"], "not a file in a folder that exists"),
        ("checkpoint", ["--folder", "/nowhere"], "not a folder that this user can write to"),
        ("checkpoint", ["--profile", "/proc/x"], "no folder can be made there"),
    ],
)
def test_what_is_asked_wrongly_is_told(name, words, message):
    with pytest.raises(UserError, match=message):
        MODULES[name].main(words)


def test_help():
    words = [sys.executable, PROGRAM, "--help"]
    run = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stderr == ""
    listed = re.findall(r"^    (\w+) ", run.stdout, flags=re.MULTILINE)
    assert listed == ["mug", "jam", "losses", "loader", "checkpoint"]


def test_the_program_exits_with_two():
    run = subprocess.run(
        [sys.executable, PROGRAM, "loading"], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == (
        "benchmark: there is no benchmark 'loading'; available: checkpoint, jam, loader, losses, mug\n"
    )
