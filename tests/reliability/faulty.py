"""A training run in which something goes wrong, once: the real command line, and a fault at a step of a rank.

    python tests/reliability/faulty.py '[{"kind": "segfault", "rank": 1, "step": 3}, ...]' train CONFIG.yaml ...

Kinds that end a process: `exception`, `segfault`, `abort`, `kill`, `stop`. Kinds that go on with wrong numbers, just
before the step: `nan_parameter`, `flip` (a bit of a parameter on this rank), `flip_whole` (of one that tensor-parallel
ranks hold alike); just before the update: `nan_gradient`, `spike` (gradients times 10^6). `attempt`: only in this start
under torchrun (TORCHELASTIC_RESTART_COUNT).

Further kinds: `terminate` (SIGTERM to itself), `full` (no file may grow beyond `bytes`, as on a full disk), `room`
(there is again), `no_space` (the system says that the disk is full), `full_lock` (no room for the lock of the run
folder), `sleep` (for `seconds`), `pause` (SIGSTOP, and SIGCONT after `seconds`), `absent` (this rank ends before it
meets the others), `held_out` (held-out data cannot be read from now on, on this rank), `remove` (the file `path`),
`replace` (the file `path` by the file `with`), `children` (writes this process's children into the file `path`).

With `at`, it happens not before a step but at a point of the save of `step`: `begin`, `shards` (before this rank's part
is written), `written` (after it), `metadata` (before what describes all parts), `commit`, `pointer` (before it moves),
`retention` (an old checkpoint is half gone); and of what rank 0 alone writes inside Megatron `common`, `metadata_file`.

The first line that a rank prints is `faulty PID PORT`. It leads a process group of its own.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path


def _act(fault: dict, trainer=None) -> None:
    kind = fault["kind"]
    if kind in ENDING:
        _end(kind)
    elif kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    elif kind == "sleep":
        time.sleep(fault["seconds"])
    elif kind == "pause":
        subprocess.Popen(["sh", "-c", f"sleep {fault['seconds']}; kill -CONT {os.getpid()}"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "held_out":
        loader_of = trainer.task.loader

        def loader(world, train, **options):
            if not train:
                raise OSError(errno.EIO, "Input/output error", "held-out")
            return loader_of(world, train, **options)

        trainer.task.loader = loader
    elif kind == "room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    elif kind == "no_space":
        raise OSError(errno.ENOSPC, "No space left on device", "a file")
    elif kind == "remove":
        os.unlink(fault["path"])
    elif kind == "replace":
        os.replace(fault["with"], fault["path"])
    elif kind == "children":
        own = [task.read_text() for task in Path("/proc/self/task").glob("*/children")]
        with open(fault["path"], "a") as file:
            file.write(f"{fault['at']}:{''.join(own).strip()}\n")
    elif kind not in IN_UPDATE:
        _spoil(kind, trainer)


def _end(kind: str) -> None:
    if kind == "exception":
        raise ZeroDivisionError("a fault on purpose")
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "abort":
        os.abort()
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])


def _spoil(kind: str, trainer) -> None:
    import torch

    parameters = [p for p in trainer.chunks[0].parameters() if p.requires_grad]
    with torch.no_grad():
        if kind == "nan_parameter":
            parameters[0].view(-1)[0] = float("nan")
        elif kind in ("flip", "flip_whole"):
            split = kind == "flip"
            chosen = next(p for p in parameters if getattr(p, "tensor_model_parallel", False) == split)
            chosen.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 10)
        elif kind == "nan_gradient":
            parameters[0].main_grad.view(-1)[0] = float("nan")
        else:
            assert kind == "spike", kind
            for parameter in parameters:
                parameter.main_grad.mul_(1e6)


ENDING = ("exception", "segfault", "abort", "kill", "stop")
IN_UPDATE = ("nan_gradient", "spike")


@contextmanager
def hooked(faults: list[dict]) -> Iterator[None]:
    """Inside, training runs of this process meet `faults`."""
    from megamug.distributed.lock import RunLock
    from megamug.training.optim import Optimizer
    from megamug.training.trainer import Trainer

    rank, attempt = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    own = [f for f in faults if f["rank"] in (rank, "all") and f.get("attempt", attempt) == attempt]
    in_steps = [fault for fault in own if "at" not in fault]
    step_of, prepare_of = Trainer._train_step, Optimizer.prepare

    def step(self):
        due = [fault for fault in in_steps if fault["step"] == self.step]
        for fault in due:
            _act(fault, self)
        self.optimizer.prepare = partial(prepare, self, [f["kind"] for f in due if f["kind"] in IN_UPDATE])
        return step_of(self)

    def prepare(trainer, due, number):
        for kind in due:
            _spoil(kind, trainer)
        return prepare_of(trainer.optimizer, number)

    def no_lock(self):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    Trainer._train_step, create_of = step, RunLock._create
    if any(fault["kind"] == "full_lock" for fault in own):
        RunLock._create = no_lock
    try:
        with _save_hooked([fault for fault in own if "at" in fault]):
            yield
    finally:
        Trainer._train_step, RunLock._create = step_of, create_of


def writes_common() -> bool:
    """Whether Megatron-core keeps what is no tensor in a file of its own, common.pt: to 0.16; later the tensors' files
    hold it."""
    from megatron.core.dist_checkpointing.strategies import common

    return hasattr(common, "TorchCommonSaveStrategy")


@contextmanager
def _save_hooked(faults: list[dict]) -> Iterator[None]:
    from megatron.core.dist_checkpointing.strategies import common as megatrons
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megamug.checkpoint import store
    from megamug.checkpoint.state import TensorWrite

    committed = written = 0
    places = [(TensorWrite, "__init__"), (TensorWrite, "write"), (TensorWrite, "finish"),
              (store.CheckpointStore, "begin"), (store.CheckpointStore, "commit"), (store, "replace_text"),
              (store.shutil, "rmtree"), (FileSystemWriterAsync, "finish")]  # fmt: skip
    if writes_common():
        places.append((megatrons.TorchCommonSaveStrategy, "save_common"))
    else:
        assert all(fault["at"] != "common" for fault in faults), "this Megatron-core writes no common.pt"
    originals = [getattr(owner, name) for owner, name in places]
    init_of, write_of, finish_of, begin_of, commit_of, replace_of, remove_of, describe_of, *common_of = originals

    def reached(at: str, step: int) -> None:
        for fault in faults:
            if (fault["at"], fault["step"]) == (at, step):
                _act(fault)

    def init(self, state, folder):
        nonlocal written
        self.of = written = int(folder.parent.name.split(".")[1][5:])
        init_of(self, state, folder)

    def write(self):
        reached("shards", self.of)
        write_of(self)
        reached("written", self.of)

    def finish(self):
        reached("metadata", self.of)
        finish_of(self)

    def begin(self, step):
        reached("begin", step)
        return begin_of(self, step)

    def commit(self, step):
        nonlocal committed
        committed = step
        reached("commit", step)
        return commit_of(self, step)

    def replace(path, text):
        if path.name == store.POINTER:
            reached("pointer", committed)
        replace_of(path, text)

    def remove(path, *arguments, **options):
        if str(path).endswith(".removing"):
            next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
            reached("retention", committed)
        remove_of(path, *arguments, **options)

    def common(*arguments, **options):
        reached("common", written)
        return common_of[0](*arguments, **options)

    def describe(*arguments, **options):
        reached("metadata_file", written)
        return describe_of(*arguments, **options)

    def put(functions) -> None:
        for (owner, name), function in zip(places, functions, strict=False):
            setattr(owner, name, function)

    put([init, write, finish, begin, commit, replace, remove, describe, common])
    try:
        yield
    finally:
        put(originals)


def main() -> int:
    from megamug.cli import main

    if os.getsid(0) != os.getpid():  # torchrun has made each rank the leader of a session
        os.setpgid(0, 0)
    print("faulty", os.getpid(), os.environ.get("MASTER_PORT", ""), flush=True)
    faults = json.loads(sys.argv[1])
    if any(f["kind"] == "absent" and f["rank"] == int(os.environ.get("RANK", 0)) for f in faults):
        return 9
    with hooked(faults):
        return main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
