"""One cell of a study: train, extract, probe. Each step goes on where it was stopped."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from megamug.configuration.reading import to_yaml
from megamug.configuration.sections import Config
from megamug.data.shards.sources import resolve_sources
from megamug.distributed.lock import RunLock
from megamug.durable import replace_text
from megamug.errors import UserError
from megamug.transfer import probing, stored
from megamug.transfer.encoder import load_encoder
from megamug.transfer.extraction import extract
from megamug.transfer.study.folder import Cell, Study

DONE, HELD, FAILED, STOPPED = "done", "held", "failed", "stopped"
_TRAIN_STOPPED = 3  # exit code of `megamug train` with a checkpoint saved
_SETS = ("train", "test")


class CellFailed(Exception):
    """One line of what went wrong; the log has the rest."""


class Stopped(Exception):
    """Training was asked to stop, and has."""


@dataclass(frozen=True)
class Tools:
    """How cells are run; decides no figure."""

    probe: list[str]  # labelled images that probes learn from
    test: list[str]  # and are measured on
    launcher: list[str]  # what starts `-m megamug ...`; empty: this Python, and features in this process
    device: str
    keep_features: bool


def run(study: Study, cell: Cell, config: Config, tools: Tools) -> tuple[str, str]:
    """(outcome, a line about it). A cell that another process is at work on is left to it.

    Args:
        config: of the cell; its `run_dir` is the cell's.

    Whatever goes wrong in it is told in its log and here, so that other cells can go on.
    """
    log_path = study.path("logs", cell, ".log")
    try:
        with _held(study, cell), _log(log_path) as log:
            if study.is_done(cell):  # by another process, meanwhile
                return DONE, "was done meanwhile"
            return DONE, _run(study, cell, config, tools, log)
    except _Held as error:
        return HELD, str(error)
    except Stopped:
        return STOPPED, "stopped on request, with a checkpoint"
    except CellFailed as error:
        return FAILED, f"{error}; see {log_path}"
    except Exception as error:  # of one cell among many: the others are not concerned
        with _log(log_path) as log:
            traceback.print_exception(error, file=log)
        return FAILED, f"{' '.join(str(error).split())[:300] or type(error).__name__}; see {log_path}"


def _run(study: Study, cell: Cell, config: Config, tools: Tools, log: IO[str]) -> str:
    seconds, told = {}, ""
    if study.result(cell) is None or not Path(config.run_dir, "checkpoints").is_dir():
        started = time.monotonic()
        path = study.path("configs", cell, ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, to_yaml(config))
        code = _command(tools, ["train", str(path)], log)
        if code:
            raise CellFailed(f"training ended with exit code {code}")
        seconds["train"] = round(time.monotonic() - started, 1)
    for target in (cell, study.control_of(cell)):
        if target is None or study.result(target) is not None:
            continue
        started = time.monotonic()
        results, images = _measure(study, target, config, tools, untrained=target is not cell, log=log)
        seconds["measure"] = round(time.monotonic() - started, 1)
        study.write_result(target, {"run": config.run_dir, "images": images, "seconds": seconds, "results": results})
        figures = [f"{method} of {feature} {study.value(study.result(target), method, feature):.1%}"
                   for method, feature in study.measure.columns()]  # fmt: skip
        told += (f"; {target.variant}: " if told else "") + ", ".join(figures)
    return told


def _measure(
    study: Study, target: Cell, config: Config, tools: Tools, untrained: bool, log: IO[str]
) -> tuple[dict, list[int]]:
    """(figures, images to learn from and to be measured on) of a run's encoder, or of that which it began with."""
    features = {name: study.path("features", target, f"-{name}.safetensors") for name in _SETS}
    features["train"].parent.mkdir(parents=True, exist_ok=True)
    for name, data in zip(_SETS, (tools.probe, tools.test), strict=True):
        if tools.launcher:
            words = ["features", config.run_dir, "--data", *data, "--output", str(features[name]),
                     "--share", repr(study.measure.view), *(["--untrained"] if untrained else [])]  # fmt: skip
            if code := _command(tools, words, log):
                raise CellFailed(f"extracting features ended with exit code {code}")
        else:
            with contextlib.redirect_stderr(log):
                encoder = load_encoder(config.run_dir, device=tools.device, untrained=untrained)
                extract(encoder, resolve_sources(data), features[name], share=study.measure.view,
                        threads=config.data.threads)  # fmt: skip
    train, test = (stored.read(features[name]) for name in _SETS)
    measure = study.measure
    results = probing.probe(train, test, measure.methods, measure.features, [measure.k], device=tools.device)
    if tools.device != "cpu":
        torch.cuda.empty_cache()  # the next training is another process on this GPU
    if not tools.keep_features:
        for path in features.values():
            path.unlink()
            path.with_suffix(".jsonl").unlink()
    return results, [len(train), len(test)]


def _command(tools: Tools, words: list[str], log: IO[str]) -> int:
    """Exit code of `megamug WORDS` in processes of its own. SIGTERM, SIGUSR1 and Ctrl-C are handed on as SIGTERM, upon
    which training saves a checkpoint. Raises Stopped when it has."""
    command = [*(tools.launcher or [sys.executable]), "-m", "megamug", *words]
    print(f"\n$ {shlex.join(command)}", file=log, flush=True)
    requested = []
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def hand_on(_number: int, _frame: object) -> None:
        requested.append(True)
        process.terminate()

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if requested or code == _TRAIN_STOPPED:
        raise Stopped
    return code


class _Held(Exception):
    pass


@contextlib.contextmanager
def _held(study: Study, cell: Cell) -> Iterator[None]:
    """The cell is ours inside. Raises _Held where another process works on it, or trains in its run folder (a training
    may outlive the study that started it)."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(RunLock(study.path("locks", cell)))
            with RunLock(study.path("runs", cell)):
                pass
        except UserError as error:
            raise _Held(str(error).partition(": ")[2].partition(";")[0]) from None
        yield


@contextlib.contextmanager
def _log(path: Path) -> Iterator[IO[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        yield file


def devices() -> str:
    """Where features and probes are computed: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
