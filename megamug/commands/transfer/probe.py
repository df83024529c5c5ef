"""What can be read from features: megamug probe TRAIN --test TEST [--methods knn linear] [--features mean ...]

TRAIN and TEST are files that `megamug features` wrote of labelled images. `knn` is DINO's weighted k-NN, `linear` an
L2-regularised logistic regression whose strength is chosen on a held-out part of TRAIN. `information` bounds from below
how many nats the features tell of labels, captions or other features. See docs/transfer.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megamug.command_line.arguments import COUNT, Parser, Range, device, number, output_file
from megamug.commands.transfer import METHODS
from megamug.errors import UserError

ABOUT = ("labels", "captions")  # as `megamug.transfer.information` has it, which brings torch
POSITIVE = number(float, Range(0, open_low=True))


def main(argv: list[str], prog: str | None = None) -> None:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("train", metavar="TRAIN", type=Path)
    parser.add_argument("--test", metavar="TEST", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "information"), default=list(METHODS),
                        help=f"default: {' '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--features", nargs="+", metavar="NAME", help="which of the file's (default: all of them)")
    parser.add_argument("--k", type=COUNT, nargs="+", help="neighbours (default: 10 20 100 200, as far as TRAIN has"
                        " so many)")  # fmt: skip
    parser.add_argument("--temperature", type=POSITIVE, help="of the neighbours' votes (default 0.07)")
    parser.add_argument("--strengths", type=POSITIVE, nargs="+", metavar="C", help="of the linear probe, inverse"
                        " regularisation as scikit-learn's C (default: 1e-4 to 100 by tens)")  # fmt: skip
    parser.add_argument("--about", nargs="+", choices=ABOUT, help="information: of what (default: what both files"
                        " have)")  # fmt: skip
    parser.add_argument("--paired", nargs=2, type=Path, metavar=("TRAIN", "TEST"), help="information: also of these"
                        " other features of the same images")  # fmt: skip
    parser.add_argument("--candidates", type=number(int, Range(2)), metavar="K", help="information: pairs of an"
                        " InfoNCE batch, whose bound is at most log K (default: an eighth of TEST, at most 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out part (default %(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="where it is computed (default %(default)s)")
    parser.add_argument("--output", type=output_file, metavar="FILE.json", help="the figures as JSON")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    options = parser.parse_args(argv)

    given = [name for name in ("about", "paired", "candidates") if getattr(options, name) is not None]
    if given and "information" not in options.methods:
        raise UserError(f"--{given[0]} is for --methods information, which is not asked for")

    from megamug.transfer import knn, logistic, probing, stored

    train, test = stored.read(options.train), stored.read(options.test)
    strengths, more = options.strengths or logistic.STRENGTHS, {"seed": options.seed, "device": options.device}
    results: dict[str, dict] = {}
    if set(METHODS) & set(options.methods):
        results = probing.probe(
            train, test, options.methods, options.features, options.k, options.temperature or knn.TEMPERATURE,
            strengths, **more,
        )  # fmt: skip
    if "information" in options.methods:
        others = options.paired and tuple(stored.read(path) for path in options.paired)
        bounds = probing.bounds(
            train, test, options.features, options.about, others, options.candidates, strengths, **more
        )  # fmt: skip
        for name, found in bounds.items():
            results.setdefault(name, {})["information"] = found
    figures = {
        "train": str(train.path), "test": str(test.path), "images": [len(train), len(test)], "results": results,
        "settings": train.settings,
    }  # fmt: skip
    if options.paired:
        figures["paired"] = [str(path) for path in options.paired]
    if options.output:
        from megamug.durable import replace_text

        options.output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.output, json.dumps(figures, indent=1) + "\n")
    print("\n".join(table(figures)), file=sys.stderr)
    if options.json or not sys.stdout.isatty():
        print(json.dumps(figures, indent=1))


def table(figures: dict) -> list[str]:
    """The figures in lines for people."""
    learned, measured = figures["images"]
    lines = [f"{learned:,} images to learn from, {measured:,} to be measured on"]
    if any(set(METHODS) & set(found) for found in figures["results"].values()):
        lines.append(f"{'':34}{'top-1':>8}{'top-5':>8}")
    for name, found in figures["results"].items():
        rows = {f"k-NN, k {k}": row for k, row in found.get("knn", {}).items()}
        if "linear" in found:
            rows[f"linear, C {found['linear']['strength']:g}"] = found["linear"]
        for title, row in rows.items():
            lines.append(f"  {name:<14}{title:<18}{row['top1']:>8.1%}{row['top5']:>8.1%}")
        if not found.get("linear", {}).get("converged", True):
            lines.append("    (the linear probe had not reached its minimum after 1,000 steps)")
    told = [(name, target, bound) for name, found in figures["results"].items()
            for target, bound in found.get("information", {}).items()]  # fmt: skip
    if told:
        lines.append(f"  {'information, at least':<34}{'nats':>8}{'error':>8}{'at most':>9}")
    for name, target, bound in told:
        numbers = f"{bound['nats']:>8.3f}{bound['standard_error']:>8.3f}{bound['at_most']:>9.3f}"
        lines.append(f"  {name:<14}{'the other features' if target == 'paired' else target:<20}{numbers}")
    return lines
