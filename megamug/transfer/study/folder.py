"""A study on disk.

    STUDY/study.json           the question, the seeds, and what was asked of what: another one is refused
    STUDY/configs/CELL.yaml    what `megamug train` is given
    STUDY/runs/CELL/           an ordinary run folder
    STUDY/features/            of the cell at hand (kept on request)
    STUDY/results/CELL.json    what its probes found; there once the cell is done
    STUDY/logs/CELL.log        what its commands said
    STUDY/report.md .json .png

A cell is a variant with a seed: VARIANT-seedN.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.data.pairs.text import Tokenizer
from megamug.data.shards.sources import Source
from megamug.durable import replace_text
from megamug.errors import UserError
from megamug.transfer.study import questions
from megamug.transfer.study.questions import UNTRAINED, Question

VERSION = 1
# What decides no figure, or is told by the data's fingerprints.
_FREE_SECTIONS = ("parallel", "log", "checkpoint")
_FREE = ("seed", "run_dir", "data.train", "data.validation", "data.validation_samples", "data.verify", "data.threads",
         "data.prefetch", "data.tokenizer", "train.validate_every", "train.pictures_every",
         "train.compare_replicas_every")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True)
class Measure:
    """What is asked of an encoder."""

    methods: tuple[str, ...] = ("linear", "knn")
    features: tuple[str, ...] = ("mean", "class_token")
    k: int = 20  # neighbours
    view: float = 0.875  # of an image's shorter side that is seen

    def columns(self) -> list[tuple[str, str]]:
        """(method, feature) of each figure; the first is the one that counts."""
        return [(method, feature) for feature in self.features for method in self.methods]


class Study:
    """The folder of a study that is there, or was begun by `begin`."""

    def __init__(self, folder: Path):
        """Raises UserError where there is none, or one that cannot be read."""
        self.folder = Path(folder)
        path = self.folder / "study.json"
        try:
            tree = json.loads(path.read_text())
            if tree["version"] != VERSION:
                raise UserError(f"{path} is of version {tree['version']}, and {VERSION} is read here; name another"
                                " --output")  # fmt: skip
            self.question: Question = questions.from_tree(tree["question"])
            self.seeds, self.identity, self.controlled = int(tree["seeds"]), tree["identity"], bool(tree["controlled"])
            measure = tree["measure"]
            self.measure = Measure(tuple(measure["methods"]), tuple(measure["features"]), measure["k"], measure["view"])
        except FileNotFoundError:
            raise UserError(f"{self.folder} holds no study: there is no {path}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error!r}); put it back, or name another --output") from None

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a study that is under way compares variants early."""
        return [Cell(v.name, seed) for seed in range(1, self.seeds + 1) for v in self.question.variants]

    def controls(self) -> list[Cell]:
        """The untrained encoders. Each is measured with the first variant of its seed, whose run knows it."""
        return [Cell(UNTRAINED, seed) for seed in range(1, self.seeds + 1)] if self.controlled else []

    def control_of(self, cell: Cell) -> Cell | None:
        first = self.question.variants[0].name
        return Cell(UNTRAINED, cell.seed) if self.controlled and cell.variant == first else None

    def is_done(self, cell: Cell) -> bool:
        control = self.control_of(cell)
        return self.result(cell) is not None and (control is None or self.result(control) is not None)

    def result(self, cell: Cell) -> dict | None:
        """{feature: {"knn": ..., "linear": ...}}; None where it is not there, or damaged."""
        try:
            results = json.loads(self.path("results", cell, ".json").read_text())["results"]
            for method, feature in self.measure.columns():
                self.value(results, method, feature)
            return results
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def value(self, results: dict, method: str, feature: str) -> float:
        """The share of right answers."""
        found = results[feature][method]
        return float((found[str(self.measure.k)] if method == "knn" else found)["top1"])

    def write_result(self, cell: Cell, found: dict) -> None:
        path = self.path("results", cell, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"variant": cell.variant, "seed": cell.seed, **found}, indent=1) + "\n")

    def path(self, kind: str, cell: Cell, ending: str = "") -> Path:
        return self.folder / kind / (cell.name + ending)


def begin(
    folder: Path, question: Question, seeds: int, measure: Measure, identity: dict[str, object], controlled: bool
) -> Study:
    """Writes `study.json`, or finds the same study there; its seeds may grow.

    Raises UserError where the folder holds another study, and says in what it differs.
    """
    path = Path(folder) / "study.json"
    tree = {
        "version": VERSION, "question": question.as_tree(), "seeds": seeds, "measure": asdict(measure),
        "controlled": controlled, "identity": identity,
    }  # fmt: skip
    tree = json.loads(json.dumps(tree))  # lists for tuples, as they are read back
    if path.exists():
        there = Study(folder)
        before = there.identity | {"variants": there.question.as_tree()} | asdict(there.measure)
        now = tree["identity"] | {"variants": question.as_tree()} | asdict(measure)
        known = _flat(Config())  # a key that one of two versions has not is what the other has by default
        before, now = ({**known, **values} for values in (before, now))
        other = [key for key in now if _plain(before.get(key)) != _plain(now[key])]
        if other:
            raise UserError(
                f"{folder} holds another study: {_differences(other, before, now)}; name another --output, or go on"
                " with what it was begun with"
            )
        if there.seeds >= seeds:
            return there
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(tree, indent=1) + "\n")
    return Study(folder)


def identity(config: Config, data: dict[str, Sequence[Source]]) -> dict[str, object]:
    """What the figures depend on, by name: keys of the configuration that CONFIG and overrides give, the data behind
    each option, the tokenizer."""
    found = _flat(resolve(config))
    tokenizer = config.data.tokenizer
    found["data.tokenizer"] = None if tokenizer is None else Tokenizer(tokenizer).sha256[:16]
    for option, sources in data.items():
        found[option] = [source.fingerprint()[:16] for source in sources]
    return found


def _flat(config: Config) -> dict[str, object]:
    """The keys that figures depend on, as `section.key`."""
    found: dict[str, object] = {}
    for name, values in asdict(config).items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            full = f"{name}.{key}" if key else name
            if name not in _FREE_SECTIONS and full not in _FREE:
                found[full] = value
    return found


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))


def _differences(keys: Sequence[str], before: dict, now: dict) -> str:
    told = []
    for key in keys[:3]:
        both = [_plain(values.get(key)) for values in (before, now)]
        simple = all(isinstance(value, bool | int | float | str | type(None)) for value in both)
        told.append(f"{key} was {both[0]} and is now {both[1]}" if simple else f"other {key}")
    return "; ".join(told) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")
