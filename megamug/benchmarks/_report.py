"""What all benchmarks share: options, figures with what they have to be read with, JSON, and comparison of two runs.

A benchmark's JSON:

    benchmark, command, date (UTC)
    hardware   processor, cpus, memory_gib, devices (GPUs by name), threads
    versions   python, megamug, and the packages that figures depend on
    settings   the options
    layout     processes, tensor, pipeline, virtual, data (1 each where nothing is distributed)
    results    a list of {"name": ..., figure: number, ...}; the names of figures say their units
    compared   with --compare: the stored run, what differs, ratios of figures by the results' names
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from megamug.command_line.arguments import Parser, any_path, new_file, typed_command
from megamug.durable import replace_text
from megamug.errors import UserError
from megamug.telemetry.environment import hardware, versions

PLACES = ("json", "compare", "profile")  # options that say where something lies: no settings
UNCERTAINTY = ("spread", "megamug_times_low", "megamug_times_high")  # of figures: not compared themselves
ONE_PROCESS = {"processes": 1, "tensor": 1, "pipeline": 1, "virtual": 1, "data": 1}


def parser(name: str, description: str) -> Parser:
    """A parser with the options of every benchmark."""
    made = Parser(f"megamug benchmark {name}", description=description)
    made.add_argument("--json", type=new_file, metavar="PATH", help="write figures, hardware and versions")
    made.add_argument("--compare", type=_run_of(name), metavar="PATH.json", help="print ratios to that run's figures")
    made.add_argument("--profile", type=_folder, metavar="FOLDER",
                      help="write a trace of megamug's part, and print what it is made of")  # fmt: skip
    return made


def _run_of(name: str):
    """A `type` for argparse: the JSON of a run of this benchmark, read."""

    def stored_run(text: str) -> dict:
        try:
            run = json.loads(any_path(text).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{text} cannot be read: {error}") from None
        if not isinstance(run, dict) or run.get("benchmark") != name or not isinstance(run.get("results"), list):
            raise argparse.ArgumentTypeError(f"{text} was not written by `megamug benchmark {name} --json`")
        return {**run, "path": text}

    return stored_run


def _folder(text: str) -> Path:
    path = any_path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: no folder can be made there: {error.strerror}") from None
    return path


class Report:
    """The figures of one run, on the process that reports (rank 0); on the others nothing is printed or written."""

    def __init__(self, benchmark: str, options: argparse.Namespace, layout: dict | None = None, speaks: bool = True):
        self.options, self.speaks = options, speaks
        settings = {key: value for key, value in vars(options).items() if key not in PLACES}
        self.content = {
            "benchmark": benchmark,
            "command": typed_command(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "versions": versions(),
            "settings": json.loads(json.dumps(settings, default=str)),
            "layout": layout or ONE_PROCESS,
            "results": [],
        }
        told = self.content["hardware"]
        where = ", ".join(told["devices"]) or f"{told['processor']}, {told['threads']} threads"
        self.say(f"# {where}; {', '.join(f'{name} {version}' for name, version in self.content['versions'].items())}")
        self.say("# " + ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, [])))

    def say(self, line: str) -> None:
        if self.speaks:
            print(line, flush=True)

    def add(self, name: str, **figures: object) -> None:
        """Keeps the figures of `name`; those that are None were not measured and are left out."""
        self.content["results"].append({"name": name, **{k: v for k, v in figures.items() if v is not None}})

    def finish(self) -> None:
        """Compares with the stored run, if one is named, and writes the JSON, if a place is named."""
        if not self.speaks:
            return
        if self.options.compare:
            self.content["compared"] = compared(self.options.compare, self.content)
            self.say(told(self.content["compared"]))
        if self.options.json:
            replace_text(self.options.json, json.dumps(self.content, indent=1) + "\n")


def compared(then: dict, now: dict) -> dict:
    """Ratios now / then of all figures that both runs have, and what else differs between the two."""
    differences = []
    for part in ("hardware", "versions", "settings", "layout"):
        old, new = then.get(part, {}), now[part]
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                differences.append(f"{part}.{key}: {old.get(key)} -> {new.get(key)}")
    before, ratios = {result["name"]: result for result in then["results"]}, {}
    for result in now["results"]:
        old = before.get(result["name"], {})
        ratios[result["name"]] = {
            key: value / old[key]
            for key, value in result.items()
            if key not in UNCERTAINTY and _is_number(value) and _is_number(old.get(key)) and old[key]
        }
    missing = sorted({*before} ^ {*ratios})
    if not {*before} & {*ratios}:
        raise UserError(f"--compare {then['path']}: no result of this run is in there; it has {', '.join(before)}")
    return {
        "with": then["path"], "date": then.get("date"), "differences": differences, "only_in_one": missing,
        "ratios": {name: found for name, found in ratios.items() if found},
    }  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def told(comparison: dict) -> str:
    """A comparison in lines for people."""
    lines = [f"\nthis run / {comparison['with']} ({comparison['date']})"]
    lines += [f"  differs: {difference}" for difference in comparison["differences"]]
    lines += [f"  only in one of them: {name}" for name in comparison["only_in_one"]]
    for name, ratios in comparison["ratios"].items():
        lines.append(f"  {name}: " + ", ".join(f"{key} {ratio:.2f}x" for key, ratio in ratios.items()))
    return "\n".join(lines)
