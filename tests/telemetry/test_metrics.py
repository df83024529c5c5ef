"""metrics.jsonl, console and TensorBoard hold each step once, and nothing waits for the device before it must."""

import json
import logging
import sys
import time
import warnings

import numpy
import pytest
import torch
from PIL import Image

from megamug.telemetry import metrics as metrics_module
from megamug.telemetry.metrics import MetricsLogger, console_line, setup_logging


def make(run_dir, **changes) -> MetricsLogger:
    arguments = dict(
        log_every=5, trackers=[], is_writer=True, total_steps=20, world_size=1, samples_per_step=64,
        flops_per_sample=1e9,
    )  # fmt: skip
    return MetricsLogger(run_dir, **{**arguments, **changes})


def values(step: int) -> dict:
    return {
        "loss": torch.tensor(1.0 / step),
        "image_loss": torch.tensor(0.5, dtype=torch.bfloat16),
        "caption_loss": 2.5,
        "grad_norm": torch.tensor([0.75]),
        "learning_rate": 1e-3,
        "samples_seen": 64 * step,
        "data_seconds": 0.0,
    }


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


KEYS = (
    "step loss image_loss caption_loss grad_norm learning_rate samples_seen samples_per_second data_wait "
    "tflops_per_device mfu memory"
).split()


def test_one_line_a_step_written_in_groups(tmp_path, caplog):
    metrics = make(tmp_path)
    with caplog.at_level(logging.INFO):
        for step in range(1, 8):
            metrics.record(step, values(step))
            assert len(lines(tmp_path)) == step // 5 * 5
        assert sum("| loss" in message for message in caplog.messages) == 1  # one console line a group
    metrics.close()
    metrics.close()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 8))
    assert all(list(line) == KEYS for line in found)
    assert found[3]["loss"] == 0.25 and found[3]["image_loss"] == 0.5 and found[3]["grad_norm"] == 0.75
    assert found[3]["samples_seen"] == 256 and found[3]["mfu"] is None and found[3]["memory"] > 0.01


class Unsynchronised(torch.Tensor):
    """Fails when it is brought to the host."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__format__", "__repr__"):
            raise AssertionError(f"{function.__name__}: synchronises")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_record_does_not_read_tensors_and_keeps_their_value(tmp_path):
    metrics = make(tmp_path)
    loss = torch.tensor(3.0).as_subclass(Unsynchronised)
    with pytest.raises(AssertionError, match="synchronises"):
        loss.item()
    for step in range(1, 5):
        metrics.record(step, {"loss": loss})
        loss.mul_(2.0)  # the trainer may use the buffer again
    with pytest.raises(AssertionError, match="tolist: synchronises"):
        metrics.flush()  # here it must
    metrics._kept = [(step, {k: v.as_subclass(torch.Tensor) for k, v in kept.items()}) for step, kept in metrics._kept]
    metrics.flush()
    assert [line["loss"] for line in lines(tmp_path)] == [3.0, 6.0, 12.0, 24.0]


def test_rates(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now[0])
    metrics = make(tmp_path, world_size=4, flops_per_sample=2e12, peak_flops=100e12)
    for step in range(1, 6):
        now[0] += 2.0
        metrics.record(step, {**values(step), "data_seconds": 0.5})
    with metrics.paused():
        now[0] += 1000.0  # a validation: nobody's step
    for step in range(6, 8):
        now[0] += 4.0
        metrics.record(step, {**values(step), "data_seconds": 1.0})
    metrics.validation(7, {"loss": torch.tensor(2.0)})
    first, last, validation = lines(tmp_path)[0], lines(tmp_path)[6], lines(tmp_path)[7]
    assert first["samples_per_second"] == 32.0 and first["data_wait"] == 0.25
    assert first["tflops_per_device"] == 16.0 and first["mfu"] == 0.16
    assert last["samples_per_second"] == 16.0 and last["data_wait"] == 0.25
    assert validation == {"step": 7, "validation": {"loss": 2.0}}


def test_paused_writes_first(tmp_path):
    metrics = make(tmp_path)
    metrics.record(1, values(1))
    with metrics.paused():
        assert [line["step"] for line in lines(tmp_path)] == [1]


def test_resume_leaves_each_step_once(tmp_path):
    metrics = make(tmp_path, log_every=1)
    for step in range(1, 11):
        metrics.record(step, values(step))
    metrics.validation(8, {"loss": 1.0})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # killed here
    metrics = make(tmp_path, log_every=1, resume_step=6)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    for step in range(7, 13):
        metrics.record(step, values(step))
    metrics.close()
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    abandoned = (tmp_path / "metrics.abandoned.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in abandoned[:-1]] == [7, 8, 9, 10, 8]  # nothing is lost
    assert abandoned[-1] == '{"step": 11, "lo'


def test_a_line_cut_within_the_kept_steps_goes_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n{"step": 3}')
    make(tmp_path, resume_step=5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_not_finite_is_null(tmp_path):
    metrics = make(tmp_path, log_every=1)
    metrics.record(1, {"loss": torch.tensor(float("nan")), "grad_norm": float("inf"), "skipped": True})
    line = lines(tmp_path)[0]
    assert line["loss"] is None and line["grad_norm"] is None and line["skipped"] is True


def test_other_ranks_write_nothing(tmp_path):
    metrics = make(tmp_path, is_writer=False, trackers=["tensorboard"], log_every=1)
    metrics.record(1, values(1))
    metrics.validation(1, {"loss": 1.0})
    metrics.picture(1, numpy.zeros((2, 2, 3), dtype=numpy.uint8))
    with metrics.paused():
        metrics.flush()
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_console_line():
    record = dict(
        step=120, loss=1.234, image_loss=0.98, caption_loss=2.54, grad_norm=0.8, learning_rate=1e-3,
        samples_per_second=312.4, tflops_per_device=0.4, mfu=None, data_wait=0.011,
    )  # fmt: skip
    assert console_line(record, total_steps=1600, world_size=1, seconds_per_step=80 / 1480) == (
        "step   120/1600 | loss 1.234 | image 0.98 | caption 2.54 | grad norm 0.8 | lr 1.0e-3 | 312 images/s | "
        "0.4 TFLOP/s | data wait 1% | 1m 20s left"
    )
    line = console_line({**record, "mfu": 0.412, "skipped": True}, 1600, world_size=8, seconds_per_step=3600.0)
    assert "0.4 TFLOP/s per device (MFU 41.2%)" in line and "SKIPPED" in line and line.endswith("61d 16h left")


def test_tensorboard(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    metrics = make(tmp_path, trackers=["tensorboard"], world_size=2, peak_flops=1e15)
    for step in range(1, 8):
        metrics.record(step, values(step))
    metrics.validation(7, {"loss": 1.5, "note": "x"})
    metrics.picture(7, numpy.full((4, 6, 3), 255, dtype=numpy.uint8))
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    metrics.picture(7, tmp_path / "a.png", tag="from file")
    metrics.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("validation/loss")[0].value == 1.5
    assert set(events.Tags()["images"]) == {"picture", "from file"}
    time.sleep(1.1)  # event files are named by the second
    metrics = make(tmp_path, trackers=["tensorboard"], resume_step=5, log_every=1)
    metrics.record(6, values(6))
    metrics.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/image_loss", "train/caption_loss", "train/grad_norm", "train/learning_rate"} <= tags
    assert {"perf/images_per_second_per_gpu", "perf/tflops_per_gpu", "perf/mfu", "perf/data_wait"} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]  # 6 and 7 purged, 6 again
    assert events.Scalars("train/loss")[3].value == 0.25


def test_tensorboard_absent_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    metrics = make(tmp_path, trackers=["tensorboard"], log_every=1)
    for step in (1, 2):
        metrics.record(step, values(step))
    metrics.picture(2, numpy.zeros((2, 2, 3), dtype=numpy.uint8))
    metrics.close()
    assert sum("no TensorBoard" in message for message in caplog.messages) == 1
    assert len(lines(tmp_path)) == 2


def test_logging_of_ranks(tmp_path, capsys):
    root = logging.getLogger()
    before, level = list(root.handlers), logging.getLogger("megamug").level
    try:
        for rank in (0, 0, 1):  # the second call replaces the first
            path = setup_logging(tmp_path, rank)
            logging.getLogger("megamug.training.trainer").info("hello from %d", rank)
            logging.getLogger("elsewhere").warning("careful")
            logging.getLogger("elsewhere").error("on fire")
            logging.getLogger("megamug.training.trainer").error("broken on %d", rank)
            warnings.warn(f"a warning on {rank}", stacklevel=1)
        console = capsys.readouterr().out
        assert console.count("hello from 0") == 2 and "hello from 1" not in console
        assert "careful" not in console and console.count("on fire") == 3 and "rank 1: broken on 1" in console
        text = path.read_text()
        assert path == tmp_path / "log" / "rank-1.log" and "hello from 1" in text and "a warning on 1" in text
        assert "careful" in text and "a warning" not in console
        assert (tmp_path / "log" / "rank-0.log").read_text().count("hello from 0") == 2
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)
            handler.close()
        logging.getLogger("megamug").setLevel(level)
        logging.captureWarnings(False)


def test_throughput_is_told_in_the_model_s_own_unit():
    record = {"step": 3, "samples_per_second": 8.0, "tflops_per_device": 0.25, "mfu": None, "data_wait": 0.0}
    assert "| 8 images/s |" in console_line(record, 10, 1, 0.1)
    assert "| 3,072 tokens/s |" in console_line(record, 10, 1, 0.1, ("tokens", 384))
