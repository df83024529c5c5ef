"""Changes the code a little, at places drawn at random, and tells which changes the tests do not notice.

    python tools/mutation.py [FOLDER_OR_MODULE ...] [--sample 150] [--seed 1] [--only megamug/data] [--minutes 60]

The changes are cosmic-ray's: an operator, a comparison, a number, a condition. Of the places where one can be made
`--sample` are drawn, and one change for each: the same seed and code give the same ones. Left out are annotations and
what is only said: arguments of `raise`, of the log, of `print`, and the message of an `assert`.

Each change is made in a copy of the tree, where only the mirrored tests run: tests/data/test_order.py for
megamug/data/order.py; where there is no such file, those of the folder that import the module, or all of them. They
have to pass without a change first. Tests that take four times as long as without a change have noticed. Ends with the
number of changes that were noticed; the others are printed as diffs. Exit code 1 where the tests of a module do not
pass as it is. A change takes seconds: torch is loaded once, and each run of tests is a fork of the process that did.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from difflib import unified_diff
from itertools import groupby
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megamug.command_line.arguments import COUNT, Parser  # noqa: E402
from megamug.command_line.tool import run_tool  # noqa: E402
from megamug.errors import UserError  # noqa: E402

try:
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.mutating import use_mutation
    from cosmic_ray.plugins import get_operator, operator_names
    from cosmic_ray.work_item import MutationSpec
except ImportError as error:
    sys.exit(f"error: {error}; it is one of the tools of development: make venv, or pip install cosmic-ray")

ROOMS = [f"megamug/{room}" for room in ("data", "checkpoint", "configuration", "training", "generation")]
SPEAKERS = ("logger", "details", "print", "warnings")
LOADED = ["pytest", "hypothesis", "torch", "megatron.core", "megatron.core.transformer.transformer_layer",
          "megatron.core.optimizer", "megatron.core.pipeline_parallel.schedules"]  # fmt: skip
GRACE = 30  # seconds of a run of tests, at least: other work may be in its way


def mutants(module: Path) -> list[list[MutationSpec]]:
    """The changes that can be made in a file, by place, ascending."""
    nodes = list(ast_nodes(get_ast_from_path(module)))
    quiet = list(_spoken(nodes))
    places: dict[tuple, list[MutationSpec]] = {}
    for name in sorted(operator_names()):
        kind = get_operator(name)
        if kind.arguments() or name == "core/RemoveDecorator":  # what needs names; no small change
            continue
        operator = kind()
        found = (place for node in nodes for place in operator.mutation_positions(node))
        for number, (start, end) in enumerate(found):
            if not any(first <= start and end <= last for first, last in quiet):
                places.setdefault((start, end), []).append(MutationSpec(module, name, number, start, end))
    return [places[place] for place in sorted(places)]


def _spoken(nodes: list) -> Iterator[tuple[tuple, tuple]]:
    """Where nothing is computed: annotations, and words for a reader."""
    for node in nodes:
        children = getattr(node, "children", [])
        if node.type in ("annassign", "tfpdef"):  # : annotation = value, and name: annotation
            found = children[1 if node.type == "annassign" else 2]
        elif node.type == "funcdef" and node.annotation:
            found = node.annotation
        elif node.type == "raise_stmt":
            found = node
        elif node.type == "assert_stmt" and len(children) > 3:
            found = children[3]
        elif node.type in ("atom_expr", "power") and children[0].get_code().strip() in SPEAKERS:
            found = node
        else:
            continue
        yield found.start_pos, found.end_pos


def tests_of(module: Path) -> list[Path]:
    """The test file of the same place and name; where there is none, those of its folder and below that import it, or
    all of its folder's. Relative to the tree, which is the cwd."""
    folder = Path("tests", *module.parts[1:-1])
    mirror = folder / f"test_{module.name}"
    if mirror.exists():
        return [mirror]
    named = re.compile(rf"^\s*from {'.'.join(module.parts[:-1])}(\.{module.stem}\b| import .*\b{module.stem}\b)", re.M)
    return [path for path in sorted(folder.rglob("test_*.py")) if named.search(path.read_text())] or sorted(
        folder.glob("test_*.py")
    )


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("paths", nargs="*", default=ROOMS, help="folders or modules to draw from (default: five rooms)")
    parser.add_argument("--sample", type=COUNT, default=150, help="places that are drawn (default 150)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="of those drawn, run the ones whose path begins so")
    parser.add_argument("--minutes", type=COUNT, default=10**6, help="begin none after so many")
    parser.add_argument("--root", type=Path, default=ROOT, help="another tree, with its own tests/")
    options = parser.parse_args(argv)
    # CI: hypothesis draws the same examples each time, and remembers none from one change to the next.
    os.environ |= {"CI": "true", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1",
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    sys.dont_write_bytecode = True  # two changes in one second have one time stamp
    with tempfile.TemporaryDirectory(prefix="mutation-") as copy:
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis")
        tree = Path(shutil.copytree(options.root, Path(copy, "tree"), ignore=ignored))
        os.environ["PYTHONPATH"] = str(tree)
        os.chdir(tree)
        try:
            return _run(_sample(options.paths, options.sample, options.seed), options)
        finally:
            os.chdir(ROOT)


def _sample(paths: list[str], count: int, seed: int) -> list[MutationSpec]:
    """Drawn by place: a `+` can become eleven other operators, and would be drawn as often."""
    modules: set[Path] = set()
    for path in map(Path, paths):
        if path.is_absolute() or not path.exists():
            raise UserError(f"{path}: no such folder or module of the tree; name it from the root, as megamug/data")
        modules |= {path} if path.is_file() else set(path.rglob("*.py"))
    places = [place for module in sorted(modules) for place in mutants(module)]
    dice = random.Random(seed)
    drawn = dice.sample(range(len(places)), min(count, len(places)))
    chosen = {number: dice.choice(places[number]) for number in drawn}
    print(f"{len(drawn)} of {len(places)} places in {len(modules)} modules are drawn", flush=True)
    return [chosen[number] for number in sorted(chosen)]


def _run(sample: list[MutationSpec], options) -> int:
    for name in LOADED if options.root == ROOT else LOADED[:1]:
        importlib.import_module(name)
    end, survivors, broken, ran, late = time.monotonic() + 60 * options.minutes, [], False, 0, 0
    wanted = [mutant for mutant in sample if str(mutant.module_path).startswith(tuple(options.only))]
    for module, group in groupby(wanted, key=lambda mutant: mutant.module_path):
        if time.monotonic() > end:
            break
        began = time.monotonic()
        if passed(tests_of(module)) is not True:
            print(f"{module}: not tried, its tests do not pass as it is:", *tests_of(module), flush=True)
            broken = True
            continue
        limit = max(GRACE, 4 * (time.monotonic() - began))
        for mutant in group:
            if time.monotonic() > end:
                break
            with use_mutation(module, get_operator(mutant.operator_name)(), mutant.occurrence) as (before, after):
                lived = passed(tests_of(module), limit)
            ran, late = ran + 1, late + (lived is None)
            where = f"{module}:{mutant.start_pos[0]} {mutant.operator_name.removeprefix('core/')}"
            print(f"{'lived' if lived else 'noticed':8}{where}", flush=True)
            if lived:
                lines = (text.splitlines() for text in (before, after))
                survivors += ["", *unified_diff(*lines, str(module), mutant.operator_name, lineterm="")]
    print(*survivors, sep="\n")
    lived = survivors.count("")
    print(f"{ran - lived} of {ran} changes were noticed, {late} of them by the time that tests took;"
          f" {len(sample) - ran} of those drawn were not tried")  # fmt: skip
    return int(broken)


def passed(tests: list[Path], limit: float = 3600.0) -> bool | None:
    """Whether the tests of the tree, which is the cwd, pass; None: they took longer than `limit` seconds."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os._exit(_tests(tests))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)  # what the tests started, too
    os.waitpid(child, 0)
    return None


def _tests(tests: list[Path]) -> int:
    """In the fork: pytest's exit code. What came from this tree is imported anew, from the copy."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for name in [name for name in sys.modules if name.split(".")[0] in ("megamug", "tests", "tools")]:
        del sys.modules[name]
    sys.path[:] = [str(Path.cwd()), *(path for path in sys.path if path not in (str(ROOT), str(ROOT / "tools")))]
    sys.path_importer_cache.clear()
    sys.modules["__main__"] = ModuleType("__main__")  # or what tests spawn would load this file, and with it this tree
    try:
        return int(sys.modules["pytest"].main(["-x", "-q", "-p", "no:cacheprovider", *map(str, tests)]))
    except BaseException:  # whatever it is, it is not a success
        return 1


if __name__ == "__main__":
    run_tool(lambda: sys.exit(main(sys.argv[1:])))
