"""Kills a training run again and again, and compares what comes out with a run that nobody disturbed.

    python tools/chaos.py CONFIG.yaml --kills 50 --minutes 60 [--processes 8] [section.key=value ...]

First the configuration is trained undisturbed; then anew, and a random rank gets SIGKILL at a random moment: while the
run starts, in its steps, or in a save. It is started again until it is through; then the last checkpoints are compared
tensor by tensor. All that as often as it takes for the kills or the minutes. Ends with a table; exit code 1 where bits
differ, a start did not come through without a kill, or a process outlived its run.

`--launcher` replaces `torchrun --standalone --nproc-per-node PROCESSES`; of what it starts, ranks of this machine are
killed. The configuration should save often and end soon: what is undone by a kill is what `checkpoint.every` says.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megamug.command_line.arguments import Parser  # noqa: E402
from megamug.command_line.tool import run_tool  # noqa: E402
from megamug.configuration.reading import load_config, resolve  # noqa: E402
from megamug.durable import folder_problem  # noqa: E402
from megamug.errors import UserError  # noqa: E402

MARK = "MEGAMUG_CHAOS"  # in the environment of everything that is started, to find it again
GLANCE = 0.005  # seconds between two looks at the run
MOMENTS = ("start", "step", "save")


class Life:
    """One start of a run, until it ends or a rank is killed."""

    def __init__(self, words: list[str], launcher: list[str], console: Path):
        self.mark = uuid.uuid4().hex
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(console, "ab") as file:
            self.process = subprocess.Popen(
                [*launcher, "-m", "megamug", "train", *words], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                env={**os.environ, MARK: self.mark, "PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        self.launches = len(launcher) > 1  # the process itself is no rank

    def code(self) -> int | None:
        """The exit code, None while it lives."""
        return self.process.poll()

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.code()

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live on this machine."""
        if not self.launches:
            return [self.process.pid] if self.code() is None else []
        return [pid for pid, words in self._all() if b"\0RANK=" in words or b"\0SLURM_PROCID=" in words]

    def left(self) -> list[int]:
        """Process ids of all that it started and that still runs."""
        return [pid for pid, _ in self._all()]

    def _all(self) -> list[tuple[int, bytes]]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    words = b"\0" + (entry / "environ").read_bytes()
                    if f"{MARK}={self.mark}".encode() in words:
                        found.append((int(entry.name), words))
        return found


@dataclass
class Tally:
    """What happened so far."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    resumes: int = 0
    again: int = 0  # steps that were done twice
    runs: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return sum(self.kills.values())


class Storm:
    """`start(words, console)` begins a `Life` of `megamug train WORDS`."""

    def __init__(self, config: str, overrides: list[str], output: Path, start, seed: int = 0, patience: float = 3600.0):
        self.config, self.overrides, self.output, self.start = config, overrides, output, start
        self.random, self.patience = random.Random(seed), patience
        self.tally = Tally()
        self.saving = 0.05  # seconds that a save takes, at most; measured below
        self.starting = 1.0  # seconds until the first step

    def words(self, run: Path) -> list[str]:
        return [self.config, *self.overrides, f"run_dir={run}"]

    def undisturbed(self) -> Path:
        """The last checkpoint of a run that is left alone. Raises UserError where it does not come through."""
        run, began, seen = self.output / "undisturbed", time.monotonic(), None
        life = self.start(self.words(run), self.output / "undisturbed.log")
        try:
            while life.code() is None:
                if _saves(run):
                    seen = seen or time.monotonic()
                elif seen:
                    self.saving, seen = max(self.saving, time.monotonic() - seen), None
                if not (run / "metrics.jsonl").exists():
                    self.starting = time.monotonic() - began
                time.sleep(GLANCE)
        finally:
            _end(life)
        if life.code() != 0:
            raise UserError(f"the undisturbed run ended with exit code {life.code()}; {self.output}/undisturbed.log"
                            " says why")  # fmt: skip
        return newest(run)

    def run(self, kills: int, until: float) -> None:
        """Disturbed runs, each compared with the undisturbed one, up to so many kills or the time `until`."""
        expected = contents(self.undisturbed())
        while True:
            self._one(kills, until, expected)
            if self.tally.problems or self.tally.killed >= kills or time.monotonic() > until:
                return

    def _one(self, kills: int, until: float, expected: dict) -> None:
        tally = self.tally
        tally.runs += 1
        run, console = self.output / f"run-{tally.runs}", self.output / f"run-{tally.runs}.log"
        code = None
        while code != 0:
            life = self.start(self.words(run), console)
            try:
                spared = tally.killed >= kills or time.monotonic() > until
                moment = None if spared else self._disturb(life, run)
                code = life.wait(self.patience)
            finally:
                left = _end(life)
            if left:
                tally.problems.append(f"run {tally.runs}: processes {left} outlived it")
            if moment is not None and code != 0:
                tally.kills[moment] += 1
                print(f"kill {tally.killed} of {kills} | run {tally.runs} | in a {moment}", flush=True)
            elif code != 0:
                tally.problems.append(f"run {tally.runs}: exit code {code} without a kill; see {console}")
                return
        log = run / "log" / "rank-0.log"
        tally.resumes += log.read_text(errors="replace").count("resuming after step")
        abandoned = run / "metrics.abandoned.jsonl"
        if abandoned.exists():
            tally.again += sum('"validation"' not in line for line in abandoned.read_text().splitlines())
        tally.problems += [f"run {tally.runs}: {found}" for found in differences(expected, contents(newest(run)))]

    def _disturb(self, life: Life, run: Path) -> str | None:
        """Waits for a random moment and kills a random rank; the moment's name, None where it ended before."""
        moment = self.random.choices(MOMENTS, (1, 4, 5))[0]
        if moment == "start":
            due = time.monotonic() + self.random.uniform(0, self.starting)
        else:
            before = _size(run)
            if not _until(life, lambda: _size(run) > before):  # it has done a step
                return None
            due = time.monotonic() + self.random.expovariate(1 / (4 * self.saving))
        if moment == "save":
            if not _until(life, lambda: _saves(run)):
                return None
            due = time.monotonic() + self.random.uniform(0, 1.2 * self.saving)
        if not _until(life, lambda: time.monotonic() >= due):
            return None
        ranks = life.ranks()
        if not ranks:
            return self._disturb(life, run) if life.code() is None else None
        if moment != "start":
            moment = "save" if _saves(run) else "step"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(ranks), signal.SIGKILL)
        return moment


def _until(life: Life, happened) -> bool:
    """Whether it happened before the life's end."""
    while not happened():
        if life.code() is not None:
            return False
        time.sleep(GLANCE)
    return True


def _saves(run: Path) -> bool:
    """Whether a checkpoint is being written, or an old one removed, right now."""
    try:
        return any(name.startswith(".step-") for name in os.listdir(run / "checkpoints"))
    except OSError:
        return False


def _size(run: Path) -> int:
    """Bytes of figures of steps so far."""
    try:
        return (run / "metrics.jsonl").stat().st_size
    except OSError:
        return 0


def _end(life: Life, seconds: float = 5.0) -> list[int]:
    """Ends what is left of a life; returns what was still there `seconds` after its end."""
    if life.code() is None:  # only where the tool itself is ending
        seconds = 0.0
    deadline = time.monotonic() + seconds
    while (left := life.left()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def newest(run: Path) -> Path:
    """The newest complete checkpoint of a run."""
    from megamug.checkpoint.store import CheckpointStore

    found = CheckpointStore(run, keep=0).newest_complete()
    if found is None:
        raise UserError(f"{run} has no complete checkpoint; set checkpoint.every to some steps")
    return found.path


def contents(checkpoint: Path) -> dict[str, object]:
    """All that a checkpoint says: every tensor by name (read when asked for), and its `state.json`."""
    from megamug.checkpoint.tensors import TensorReader

    reader = TensorReader(checkpoint)
    names = [*reader.names, *reader.optimizer_names]
    state = json.loads((checkpoint / "state.json").read_text())
    return {"state.json": state} | {name: lambda name=name: reader.read(name) for name in names}


def differences(expected: dict, found: dict) -> list[str]:
    """A sentence for each difference to the bit."""
    import torch

    told = [f"{name} is in one of the checkpoints alone" for name in sorted(expected.keys() ^ found.keys())]
    if expected["state.json"] != found["state.json"]:
        told.append("state.json differs")
    for name in sorted((expected.keys() & found.keys()) - {"state.json"}):
        a, b = expected[name](), found[name]()
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
            told.append(f"{name} differs")
    return told


def _bits(tensor):
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)


def table(tally: Tally, seconds: float) -> str:
    rows = [
        ("kills", f"{tally.killed} (in starts {tally.kills['start']}, steps {tally.kills['step']}, saves"
                  f" {tally.kills['save']})"),
        ("resumes", str(tally.resumes)),
        ("steps lost and done again", str(tally.again)),
        ("runs compared", str(tally.runs)),
        ("minutes", f"{seconds / 60:.1f}"),
        ("bits equal", "no" if tally.problems else "yes"),
    ]  # fmt: skip
    return "\n".join([f"| {name} | {value} |" for name, value in rows] + tally.problems[:20])


def parser() -> Parser:
    made = Parser(prog="chaos", description=__doc__)
    made.add_argument("config", metavar="CONFIG.yaml")
    made.add_argument("overrides", metavar="section.key=value", nargs="*", default=[])
    made.add_argument("--kills", type=int, required=True, metavar="N", help="at most so many")
    made.add_argument("--minutes", type=float, required=True, metavar="M", help="after which nobody is killed any more")
    made.add_argument("--processes", type=int, default=1, metavar="P", help="under torchrun where above 1 (default: 1)")
    made.add_argument("--launcher", metavar="WORDS", help="in place of torchrun and its options")
    made.add_argument("--output", type=Path, metavar="DIR", help="a new folder (default: run_dir with -chaos behind)")
    made.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    return made


def main(argv: list[str], start=None) -> int:
    """`start`: another way to begin a life, for tests."""
    options, late = parser().parse_known_args(argv)
    if unknown := [word for word in late if "=" not in word or word.startswith("-")]:
        raise UserError(f"unrecognised argument {unknown[0]}")
    for name in ("kills", "minutes", "processes"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be above 0")
    overrides = [*options.overrides, *late]
    config = resolve(load_config(options.config, overrides))
    if config.checkpoint.every == 0:
        raise UserError("checkpoint.every(0) saves nothing before the end, so every kill would begin anew; set"
                        " checkpoint.every to some steps")  # fmt: skip
    output = options.output or Path(re.sub(r"/*$", "", config.run_dir) + "-chaos")
    if problem := folder_problem(output):
        raise UserError(f"--output: {problem}; name another folder")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty; remove it, or name another folder")
    output.mkdir(parents=True, exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                str(options.processes)]  # fmt: skip
    launcher = shlex.split(options.launcher) if options.launcher else torchrun
    if options.processes == 1 and not options.launcher:
        launcher = [sys.executable]
    began = time.monotonic()
    storm = Storm(options.config, overrides, output, start or (lambda words, log: Life(words, launcher, log)),
                  options.seed)  # fmt: skip
    storm.run(options.kills, began + 60 * options.minutes)
    print(table(storm.tally, time.monotonic() - began))
    return 1 if storm.tally.problems else 0


if __name__ == "__main__":
    run_tool(lambda: sys.exit(main(sys.argv[1:])))
