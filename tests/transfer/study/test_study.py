"""Studies from the command to the report: what is done once, what goes on, what is refused; one with real trainings."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megamug import cli
from megamug.checkpoint.store import CheckpointStore
from megamug.distributed.lock import RunLock
from megamug.transfer.study import cells
from tests.distributed.launch import ROOT, environment
from tests.test_cli import no_launcher, told  # noqa: F401
from tests.transfer.study.common import inputs, study, trained, words  # noqa: F401

QUICK = ("--features", "mean", "--methods", "knn", "--k", "3", "--no-plot")
OBJECTIVES = ["pixels", "captions", "both", "shuffled"]


def results(output: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (output / "results").glob("*.json")}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):  # noqa: F811
    """A study that was trained: (folder, its report on stdout)."""
    output = tmp_path_factory.mktemp("whole") / "study"
    variants = "{pixels: [model.caption_loss_weight=0], both: ['data.captions=shuffled']}"
    (inputs / "v.yaml").write_text(f"variants: {variants}")
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        for name, value in environment().items():  # of the trainings, which are processes of their own
            patch.setenv(name, value)
        code = study(inputs, output, "custom", "--variants", inputs / "v.yaml", "--seeds", 1, "--k", 5)
    assert code == 0, "".join(path.read_text()[-3000:] for path in (output / "logs").glob("*"))
    return output, shown.getvalue()


def test_cells_are_ordinary_runs_and_figures_those_of_the_commands(whole, inputs, tmp_path):  # noqa: F811
    output, _ = whole
    for cell, decoders in {"pixels-seed1": {"image"}, "both-seed1": {"image", "caption"}}.items():
        assert CheckpointStore(output / "runs" / cell, keep=0).newest_complete().step == 2
        lines = [json.loads(line) for line in (output / "runs" / cell / "metrics.jsonl").read_text().splitlines()]
        assert {key.removesuffix("_loss") for key in lines[-1] if key.endswith("_loss")} == decoders
    found = results(output)
    assert found.keys() == {"pixels-seed1", "both-seed1", "untrained-seed1"}
    assert not list((output / "features").iterdir())
    for cell, more in {"both-seed1": [], "untrained-seed1": ["--untrained"]}.items():
        run = output / "runs" / cell.replace("untrained", "both")  # of one seed all begin alike
        for name in ("train", "test"):
            file = str(tmp_path / f"{cell}-{name}.npz")
            assert cli.main(["features", str(run), "--data", str(inputs / name), "--output", file, *more]) == 0
        train, test, figures = (str(tmp_path / f"{cell}{end}") for end in ("-train.npz", "-test.npz", ".json"))
        assert cli.main(["probe", train, "--test", test, "--k", "5", "--output", figures]) == 0
        probed = json.loads(Path(figures).read_text())
        assert probed["results"] == found[cell]["results"] and probed["images"] == found[cell]["images"] == [40, 20]
    runs = {name: found[f"{name}-seed1"]["results"] for name in ("pixels", "both", "untrained")}
    assert len({json.dumps(run) for run in runs.values()}) == 3  # another encoder each


def test_the_report_is_of_the_results(whole):
    output, shown = whole
    report = json.loads((output / "report.json").read_text())
    assert shown == (output / "report.md").read_text() and report["missing"] == []
    for row in report["rows"]:
        stored = results(output)[f"{row['variant']}-seed1"]["results"]
        assert row["columns"]["linear mean"]["mean"] == stored["mean"]["linear"]["top1"]
        assert row["columns"]["knn class_token"]["values"] == [stored["class_token"]["knn"]["5"]["top1"]]
        assert f"| {row['variant']} | 1 | {100 * stored['mean']['linear']['top1']:.1f} |" in shown
    assert "| both - pixels |" in shown and "(one seed)" in shown and "`data.captions=shuffled`" in shown
    picture = (output / "report.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 5000


def test_what_is_done_is_not_done_again(whole, inputs, capsys):  # noqa: F811
    output, shown = whole
    before = {path: path.stat().st_mtime_ns for path in output.rglob("results/*")}
    more = ("--variants", inputs / "v.yaml", "--seeds", 1, "--k", 5)
    assert study(inputs, output, "custom", *more) == 0
    out, err = capsys.readouterr()
    assert out == shown and err.count("done before") == 2 and "at work" not in err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("results/*")} == before


def test_a_study_that_was_stopped_goes_on(inputs, trained, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "study"
    trained.codes["captions-seed1"] = KeyboardInterrupt()
    assert study(inputs, output, "captions", "--seeds", 2, *QUICK) == 130
    assert results(output).keys() == {"pixels-seed1", "untrained-seed1"}
    assert trained == ["pixels-seed1", "captions-seed1"]
    trained.codes["captions-seed1"] = 0
    (output / "results" / "untrained-seed1.json").unlink()  # stopped between the encoder and its control
    kept = (output / "results" / "pixels-seed1.json").read_bytes()
    assert study(inputs, output, "captions", "--seeds", 2, *QUICK) == 0
    assert trained[2:] == [f"{name}-seed{seed}" for seed in (1, 2) for name in OBJECTIVES][1:]
    assert (output / "results" / "pixels-seed1.json").read_bytes() == kept
    assert len(results(output)) == 10
    shown = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (\w+) \| 2 \| ([\d.]+ \+- [\d.]+) \|$", shown, re.MULTILINE))
    for name in ("untrained", *OBJECTIVES):
        values = [100 * results(output)[f"{name}-seed{s}"]["results"]["mean"]["knn"]["3"]["top1"] for s in (1, 2)]
        assert rows[name] == f"{np.mean(values):.1f} +- {np.std(values, ddof=1) / 2**0.5:.1f}"
    assert study(inputs, output, "captions", "--seeds", 3, *QUICK) == 0  # more seeds are more cells
    assert trained[9:] == [f"{name}-seed3" for name in OBJECTIVES]


def test_a_cell_that_fails_leaves_the_others_alone(inputs, trained, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "study"
    trained.codes["captions-seed1"] = 1
    assert study(inputs, output, "captions", "--seeds", 1, *QUICK) == 1
    out, err = capsys.readouterr()
    log = output / "logs" / "captions-seed1.log"
    assert f"captions-seed1: failed: training ended with exit code 1; see {log}" in err and log.exists()
    assert "failed: captions-seed1; the same command tries them again" in err
    assert "Missing: captions-seed1." in out and results(output).keys() == {
        "pixels-seed1", "both-seed1", "shuffled-seed1", "untrained-seed1"
    }  # fmt: skip
    trained.codes.clear()
    assert study(inputs, output, "captions", "--seeds", 1, *QUICK) == 0 and trained[4:] == ["captions-seed1"]


def test_what_breaks_while_measuring_is_in_the_log(inputs, trained, tmp_path, capsys, monkeypatch):  # noqa: F811
    def broken(*_, **__):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("megamug.transfer.study.cells._measure", broken)
    assert study(inputs, tmp_path, "captions", "--seeds", 1, *QUICK) == 1
    assert capsys.readouterr().err.count("failed: the device is gone; see ") == 4
    assert "Traceback" in (tmp_path / "logs" / "both-seed1.log").read_text()


def test_another_study_is_refused(inputs, trained, tmp_path, capsys):  # noqa: F811
    assert study(inputs, tmp_path, "captions", "--seeds", 1, *QUICK) == 0
    capsys.readouterr()
    cases = [
        (("captions", *QUICK, "train.steps=3"), "train.steps was 2 and is now 3"),
        (("captions", *QUICK[:4], "--k", "4", "--no-plot"), "k was 3 and is now 4"),
        (("captions", *QUICK, "--probe", inputs / "other"), "other --probe"),
        (("captions", *QUICK, "--other-data", inputs / "other"), "other --other-data; other variants"),
        (("weights", *QUICK), "other variants"),
    ]
    for more, said in cases:
        assert said in told(capsys, *words(inputs, tmp_path, *more))
    tree = json.loads((tmp_path / "study.json").read_text())
    del tree["identity"]["model.mask_ratio"]  # of a version that did not have the key
    (tmp_path / "study.json").write_text(json.dumps(tree))
    command = words(inputs, tmp_path, "captions", *QUICK, "model.mask_ratio=0.5")
    assert "model.mask_ratio was 0.75 and is now 0.5" in told(capsys, *command)
    free = ("parallel.timeout_minutes=3", "log.every=5", "data.threads=2")  # of other machines, and other habits
    assert study(inputs, tmp_path, "captions", "--seeds", 1, *QUICK, *free) == 0 and len(trained) == 4


def test_jobs_share_the_cells(inputs, trained, tmp_path, capsys):  # noqa: F811
    assert study(inputs, tmp_path, "captions", "--seeds", 2, *QUICK, "--share", "1/3") == 0
    first = list(trained)
    assert first == ["pixels-seed1", "shuffled-seed1", "both-seed2"]
    assert "Missing: untrained-seed2, captions-seed1" in capsys.readouterr().out
    with RunLock(tmp_path / "locks" / "captions-seed1"), RunLock(tmp_path / "runs" / "captions-seed2"):
        assert study(inputs, tmp_path, "captions", "--seeds", 2, *QUICK) == 0
    err = capsys.readouterr().err
    assert trained[3:] == ["both-seed1", "pixels-seed2", "shuffled-seed2"]
    for cell in ("captions-seed1", "captions-seed2"):
        assert re.search(rf"{cell}: held: \S+ is in use by another run \(process \d+ on ", err)
    assert study(inputs, tmp_path, "captions", "--seeds", 2, *QUICK, "--share", "2/3") == 0
    assert trained[6:] == ["captions-seed1"]


def test_the_report_needs_nothing_but_the_folder(inputs, trained, tmp_path, capsys):  # noqa: F811
    trained.codes["captions-0.5-seed1"] = cells.Stopped()
    assert study(inputs, tmp_path, "scaling", "--seeds", 1, *QUICK, "--fractions", "0.5", "1") == 3
    told_then = capsys.readouterr().out
    (tmp_path / "results" / "both-1-seed1.json").write_text("{")
    assert cli.main(["study", "scaling", "--output", str(tmp_path), "--report"]) == 0
    told_now = capsys.readouterr().out
    assert "Missing: captions-0.5-seed1, both-0.5-seed1." in told_then and "| both-1 |" in told_then
    assert "Missing: both-1-seed1, captions-0.5-seed1, both-0.5-seed1." in told_now and "| both-1 | 1" not in told_now
    assert "| captions-1 - pixels-1 |" in told_now
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    command = ("study", "weights", "--output", tmp_path, "--report")
    assert "holds a study of scaling, not of weights" in told(capsys, *command)
    assert "holds no study" in told(capsys, "study", "weights", "--output", tmp_path / "x", "--report")


def test_a_request_to_stop_reaches_the_training(tmp_path):
    """SIGTERM to the study: its training is told, and what it then ends with is a stop and no failure."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        f"pathlib.Path({str(tmp_path / 'there')!r}).write_text(' '.join(sys.argv[1:]))\n"
        "time.sleep(60)\n"
    )

    def stop():
        while not (tmp_path / "there").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)  # to the process: its main thread waits for the training

    tools = cells.Tools([], [], [sys.executable, str(launcher)], "cpu", False)
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    with open(tmp_path / "log", "w") as log, pytest.raises(cells.Stopped):
        cells._command(tools, ["train", "c.yaml"], log)
    assert (tmp_path / "there").read_text() == "-m megamug train c.yaml"
    assert signal.getsignal(signal.SIGTERM) is before


def test_cells_are_listed_with_what_they_cost(inputs, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "study"
    assert study(inputs, output, "captions", "--dry-run", "--gpu", "h100", "--seeds", 2) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 trainings: 4 variants x 2 seeds") and not output.exists()
    rows = {name: (float(flops), float(hours)) for name, flops, hours in
            re.findall(r"^  (\w+) +(\S+) PFLOP +(\S+) h", out, re.MULTILINE)}  # fmt: skip
    assert rows["both"][0] == rows["shuffled"][0] > rows["pixels"][0] > 0
    for place in (0, 1):
        assert rows["all"][place] == pytest.approx(2 * sum(rows[name][place] for name in OBJECTIVES), rel=0.02)


@pytest.mark.parametrize(("more", "said"), [
    (("captions", "--grid", "1:1"), "--grid is of `study weights`, not of `study captions`"),
    (("captions", "--launcher", "torchrunn -n 2"), "--launcher: there is no command 'torchrunn'"),
    (("captions", "--share", "0/2"), "1/N to N/N wanted, found '0/2'"),
    (("weights", "--grid", "1"), "IMAGE:CAPTION wanted, such as 1:0.1, found '1'"),
    (("captions", "--k", "41"), "--k is 41, but --probe has 40 labelled images"),
    (("captions", "data.image_size=33"), "variant pixels: data.image_size(33) is not divisible"),
    (("captions", "model.caption_loss_weight=0"), "model.caption_loss_weight is 0 in "),
    (("custom",), "study custom: --variants FILE.yaml wanted"),
    (("captions", "--gpus", "2"), "--gpu and --gpus go with --dry-run"),
    (("captions", "--launcher", "python --nproc-per-node 3"), "micro_batch_size(8) x data-parallel ranks(3) = 24"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_made(inputs, tmp_path, capsys, more, said):  # noqa: F811
    output = tmp_path / "study"
    assert said in told(capsys, *words(inputs, output, *more))
    assert not output.exists()


def test_images_that_are_trained_on_measure_nothing(inputs, tmp_path, capsys, monkeypatch):  # noqa: F811
    command = words(inputs, tmp_path / "s", "captions")
    command[command.index("--test") + 1] = str(inputs / "train")
    assert "--data and --test are of the same images" in told(capsys, *command)
    command = words(inputs, tmp_path / "s", "captions", "--probe", inputs / "test")
    assert "--probe and --test are of the same images" in told(capsys, *command)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "megamug study is one process" in told(capsys, *words(inputs, tmp_path / "s", "captions"))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib, or give --no-plot" in told(capsys, *words(inputs, tmp_path / "s", "captions"))


def test_the_commands_of_the_page_are_dry_runs(inputs, tmp_path, capsys, monkeypatch):  # noqa: F811
    """As they stand there, on small shards under their names."""
    page = (ROOT / "docs" / "transfer.md").read_text()
    commands = re.findall(r"^megamug (study .*)$", page, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["captions", "weights", "captions", "scaling", "custom"]
    (tmp_path / "imagenet").mkdir()
    for name, where in {"cc3m": "train", "laion": "other", "imagenet/train": "other", "imagenet/val": "test",
                        "shards": "train", "heldout": "test"}.items():  # fmt: skip
        (tmp_path / name).symlink_to(inputs / where)
    for name, where in {"tokenizer.model": inputs / "t.model", "run.yaml": inputs / "c.yaml",
                        "examples": ROOT / "examples"}.items():  # fmt: skip
        (tmp_path / name).symlink_to(where)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for command in commands:
        assert cli.main([*shlex.split(command), "--dry-run"]) == 0
        assert re.search(r"^  all +\S+ PFLOP$", capsys.readouterr().out, re.MULTILINE)
