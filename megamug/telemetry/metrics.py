"""One record a step: console, metrics.jsonl and trackers (TensorBoard, Weights & Biases).

    step   120/1600 | loss 1.234 | image 0.980 | caption 2.540 | grad norm 0.80 | lr 1.0e-3 | 312 images/s | ...

A training loop that asks a GPU for its loss at every step waits for it at every step. So `record` only keeps what it is
given; at every `log.every` steps one copy brings all kept values to the host. That is also when time is taken: rates
are those of the steps since the last such moment, and every line of them carries the same rates.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megamug.command_line import console
from megamug.durable import disk_words, free_words, replace_text
from megamug.telemetry.trackers import Trackers

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
ABANDONED = "metrics.abandoned.jsonl"
CONSOLE = (  # key, how the console line says it
    ("loss", "loss {:.4g}"),
    ("image_loss", "image {:.4g}"),
    ("caption_loss", "caption {:.4g}"),
    ("lm_loss", "language {:.4g}"),
    ("class_loss", "class {:.4g}"),
    ("segmentation_loss", "segmentation {:.4g}"),
    ("auxiliary_loss", "auxiliary {:.4g}"),
    ("grad_norm", "grad norm {:.3g}"),
)
# Keys of a record that trackers show under perf/, and their names there; all others are under train/.
PERF_TAGS = {"tflops_per_device": "tflops_per_gpu", "mfu": "mfu", "data_wait": "data_wait", "memory": "memory_gib"}
NOT_TRACKED = ("step", "samples_per_second")


class MetricsLogger:
    """Collects one record a step and writes them out in groups.

    Args:
        run_dir: the run folder.
        log_every: steps between two groups.
        trackers: where curves and pictures go as well, see `megamug.telemetry.trackers`; one without its package is
            said once and left out.
        settings: of the run, by key, which the trackers show.
        is_writer: whether this rank writes; on the others every method does nothing.
        total_steps: steps of the whole run, for the time left.
        world_size: devices that share the work.
        samples_per_step: global batch size.
        flops_per_sample: FLOPs of a training step per sample, over all devices (see `megamug.telemetry.flops`).
        peak_flops: peak FLOP/s of one device, or None where it is not known (see `megamug.telemetry.peaks`).
        resume_step: the last step already done; later lines of an earlier run are moved to metrics.abandoned.jsonl.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        log_every: int,
        trackers: Sequence[str],
        is_writer: bool,
        total_steps: int,
        world_size: int,
        samples_per_step: int,
        flops_per_sample: float,
        peak_flops: float | None = None,
        resume_step: int = 0,
        unit: tuple[str, int] = ("images", 1),
        settings: dict[str, object] | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.log_every = log_every
        self.is_writer = is_writer
        self.total_steps = total_steps
        self.world_size = world_size
        self.samples_per_step = samples_per_step
        self.flops_per_sample = flops_per_sample
        self.peak_flops = peak_flops
        self.unit = unit
        self._kept: list[tuple[int, dict[str, Any]]] = []
        self._trackers: Trackers | None = None  # where there is none to feed
        self._told_full = False
        if is_writer:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            truncate_metrics(self.run_dir, resume_step)
            self._file = open(self.run_dir / METRICS, "a", encoding="utf-8")
            if trackers:
                self._trackers = Trackers(trackers, self.run_dir, resume_step, settings or {})
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start measuring anew: before the first step, and after anything that is not training."""
        assert not self._kept, "flush before restarting the clock"
        self._since = time.perf_counter()

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Keep the values of one step; write the group out if `step` ends one. Waits for no device until then.

        `values`: numbers or 0-d tensors (copied) by name: loss, image_loss, caption_loss, grad_norm, learning_rate,
        samples_seen, and `data_seconds`, the time this step waited for its batch; further keys are written as they are.
        """
        if not self.is_writer:
            return
        copied = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        self._kept.append((step, copied))
        if step % self.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Write all kept records: lines to metrics.jsonl, the last one also to the console."""
        if not self._kept:
            return
        records = _to_host(self._kept)
        seconds = (time.perf_counter() - self._since) / len(records)  # a step; the copy above has waited for the device
        self._kept.clear()
        rates = self._rates(seconds, sum(record.pop("data_seconds", 0.0) for record in records) / len(records))
        for record in records:
            record.update(rates)
        self._to_file(*records)
        last = records[-1]
        logger.info(console_line(last, self.total_steps, self.world_size, seconds, self.unit))
        if self._trackers:
            self._track(records, rates)
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around validation, saving and the like: what was kept is on the disk before, and their time is not counted.

        A checkpoint must be saved inside: then metrics.jsonl holds every step that the checkpoint has done.
        """
        self.flush()
        if self.is_writer:
            self._to_file(durable=True)
        try:
            yield
        finally:
            self.restart_clock()

    def validation(self, step: int, values: dict[str, Any]) -> None:
        """Write the result of a validation: a line `{"step": ..., "validation": {...}}`, the console, the trackers."""
        if not self.is_writer:
            return
        self.flush()
        (host,) = _to_host([(step, values)])
        del host["step"]
        self._to_file({"step": step, "validation": host})
        shown = " | ".join(f"{k.replace('_', ' ')} {v:.4g}" if _is_number(v) else f"{k} {v}" for k, v in host.items())
        logger.info("validation after step %d | %s", step, shown)
        if self._trackers:
            self._trackers.scalars(step, {f"validation/{name}": v for name, v in host.items() if _is_number(v)})
            self._trackers.flush()
        self.restart_clock()

    def picture(self, step: int, picture: Any, tag: str = "picture") -> None:
        """Show a picture in the trackers: the path of an image file, or an array [height, width, 3] of uint8."""
        if not self._trackers:
            return
        if isinstance(picture, (str, Path)):
            import numpy
            from PIL import Image

            with Image.open(picture) as image:
                picture = numpy.asarray(image.convert("RGB"))
        self._trackers.picture(step, picture, tag)
        self._trackers.flush()

    def close(self) -> None:
        """Write what is left and close the files. May be called twice."""
        if not self.is_writer or self._file.closed:
            return
        self.flush()
        self._to_file(durable=True)
        with contextlib.suppress(OSError):  # told by then
            self._file.close()
        if self._trackers:
            self._trackers.close()

    def _to_file(self, *records: dict, durable: bool = False) -> None:
        """Appends the records, and fsyncs if `durable`. On a full disk they stay in the file's buffer, which the next
        call tries again: a line of figures is no reason to end a run whose next checkpoint may find room."""
        try:
            for record in records:
                self._file.write(_json_line(record))
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            if not self._told_full:
                logger.warning("%s: %s; %s. Its lines are kept until there is room", self.run_dir / METRICS,
                               disk_words(error), free_words(self.run_dir))  # fmt: skip
            self._told_full = True

    def _rates(self, seconds: float, data_seconds: float) -> dict[str, float | None]:
        """Rates of a step that took `seconds`, of which it waited `data_seconds` for its batch."""
        samples_per_second = self.samples_per_step / seconds
        flops = samples_per_second * self.flops_per_sample / self.world_size
        return {
            "samples_per_second": samples_per_second,
            "data_wait": min(1.0, data_seconds / seconds),
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak_flops if self.peak_flops else None,
            "memory": _memory_gib(),
        }

    def _track(self, records: list[dict], rates: dict) -> None:
        name, per_sample = self.unit
        perf = {f"perf/{name}_per_second_per_gpu": rates["samples_per_second"] * per_sample / self.world_size}
        perf |= {f"perf/{tag}": rates[name] for name, tag in PERF_TAGS.items() if rates[name] is not None}
        for record in records:
            shown = {
                f"train/{name}": value for name, value in record.items()
                if name not in rates and name not in NOT_TRACKED and _is_number(value)
            }  # fmt: skip
            self._trackers.scalars(record["step"], shown | (perf if record is records[-1] else {}))
        self._trackers.flush()


def setup_logging(run_dir: str | Path, rank: int) -> Path:
    """Send this process's log to `RUN/log/rank-N.log` (appended), and to the console what a reader there wants.

    The console shows megamug's own lines from rank 0, and errors of anybody from every rank; what else other packages
    log or warn of goes to the file only, see `megamug.command_line.console`. May be called again: the handlers of the
    earlier call are replaced. Returns the path of the log file.
    """
    path = Path(run_dir) / "log" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    screen.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    screen.addFilter(console.belongs)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if getattr(handler, "of_megamug", False)]:
        root.removeHandler(handler)
        handler.close()
    for handler in (file, screen):
        handler.of_megamug = True
        root.addHandler(handler)
    logging.getLogger("megamug").setLevel(logging.INFO)
    logging.captureWarnings(False)  # whoever replaced `warnings.showwarning` since an earlier call would keep it
    logging.captureWarnings(True)
    console.to_file(file)
    return path


class _LogFile(logging.FileHandler):
    """That a line could not be written is said once, and not with a traceback for each."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            folder = Path(self.baseFilename).parent
            sys.stderr.write(f"{self.baseFilename}: {disk_words(error)}; {free_words(folder)}\n")


def truncate_metrics(run_dir: Path, step: int) -> None:
    """Leave in metrics.jsonl only whole lines of steps up to `step`; the others go to metrics.abandoned.jsonl.

    A run that resumes from `step` does the later steps again: so the file holds each step once.
    """
    path = run_dir / METRICS
    if not path.exists():
        return
    kept, abandoned = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        (kept if _is_whole(line) and json.loads(line)["step"] <= step else abandoned).append(line)
    if not abandoned:
        return
    with open(run_dir / ABANDONED, "a", encoding="utf-8") as file:
        file.writelines(line if line.endswith("\n") else line + "\n" for line in abandoned)
        file.flush()
        os.fsync(file.fileno())
    replace_text(path, "".join(kept))
    logger.info("moved %d lines of steps after %d from %s to %s", len(abandoned), step, METRICS, ABANDONED)


def _is_whole(line: str) -> bool:
    """Whether the line was written to its end (a killed process may leave half of one)."""
    try:
        return line.endswith("\n") and isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False


def console_line(
    record: dict, total_steps: int, world_size: int, seconds_per_step: float, unit: tuple[str, int] = ("images", 1)
) -> str:
    """The line of one step. `record` holds what metrics.jsonl holds; `unit`: what is counted, and how many a sample."""
    width = len(str(total_steps))
    parts = [f"step {record['step']:>{width + 1}}/{total_steps}"]
    parts += [text.format(record[key]) for key, text in CONSOLE if record.get(key) is not None]
    if "learning_rate" in record:
        parts.append(f"lr {_scientific(record['learning_rate'])}")
    per_device = " per device" if world_size > 1 else ""
    mfu = f" (MFU {record['mfu']:.1%})" if record["mfu"] is not None else ""
    rate = record["samples_per_second"] * unit[1]
    parts.append(f"{rate:,.0f} {unit[0]}/s" if rate >= 1000 else f"{rate:.3g} {unit[0]}/s")
    parts.append(f"{record['tflops_per_device']:.3g} TFLOP/s{per_device}{mfu}")
    parts.append(f"data wait {record['data_wait']:.0%}")
    if record.get("skipped"):
        parts.append("SKIPPED")
    parts.append(f"{_duration((total_steps - record['step']) * seconds_per_step)} left")
    return " | ".join(parts)


def _scientific(value: float) -> str:
    """0.001 -> 1.0e-3"""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _duration(seconds: float) -> str:
    """80 -> 1m 20s, in the two largest units."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {seconds}s" if minutes else f"{seconds}s"


def _to_host(kept: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records with their tensors as floats: one copy from the device, hence one wait, for all of them."""
    tensors = [value for _, values in kept for value in values.values() if isinstance(value, torch.Tensor)]
    assert all(tensor.numel() == 1 for tensor in tensors), [tuple(tensor.shape) for tensor in tensors]
    devices = {tensor.device for tensor in tensors}
    numbers: dict[int, float] = {}
    for device in devices:
        here = [tensor for tensor in tensors if tensor.device == device]
        stacked = torch.stack([tensor.detach().reshape(()).double() for tensor in here])
        numbers.update(zip(map(id, here), stacked.tolist(), strict=True))
    return [
        {"step": step, **{k: numbers[id(v)] if isinstance(v, torch.Tensor) else v for k, v in values.items()}}
        for step, values in kept
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _json_line(record: dict) -> str:
    """JSON has no NaN and no infinity: they become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(record), allow_nan=False) + "\n"


def _memory_gib() -> float:
    """Peak memory in GiB: allocated on this rank's GPU, or resident in this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
