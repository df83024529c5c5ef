"""The CPU backend: what it replaces, where, and that what it assumes of Megatron-core still holds.

Patching is for the life of a process, so each test runs in one of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import environment

CHECKED = json.loads(Path(__file__).with_name("megatron_sources.json").read_text())
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the backend changes nothing")


def run(script: str) -> dict:
    """The JSON object that `script` prints last, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


NOTE = """
import json, torch
from megamug.command_line import console
from megamug.distributed import cpu_backend
console.import_megatron()
def current():
    return [getattr(*cpu_backend._attribute(module, path)) for module, path, _, _ in cpu_backend.PATCHES]
names = [f"{module}.{path}" for module, path, _, _ in cpu_backend.PATCHES]
"""


@without_cuda
def test_every_patch_is_applied_by_apply_alone_and_once():
    found = run(NOTE + """
before = current()
import megamug.distributed.setup, megamug.training.pipeline, megamug.training.optim, megamug.models.mug.model
imported = current()
assert cpu_backend.apply() is True
first = current()
assert cpu_backend.apply() is True
print(json.dumps({
    "by importing": [n for n, a, b in zip(names, before, imported) if a is not b],
    "not": [n for n, a, b in zip(names, before, first) if a is b],
    "twice": [n for n, a, b in zip(names, first, current()) if a is not b],
    "listed twice": sorted({n for n in names if names.count(n) > 1}),
}))
""")
    assert found == {"by importing": [], "not": [], "twice": [], "listed twice": []}


def test_nothing_changes_where_there_is_cuda():
    found = run(NOTE + """
before = current()
torch.cuda.is_available = lambda: True
applied = cpu_backend.apply()
print(json.dumps({"applied": applied, "changed": [n for n, a, b in zip(names, before, current()) if a is not b]}))
""")
    assert found == {"applied": False, "changed": []}


def test_every_patch_says_why():
    from megamug.distributed.cpu_backend import PATCHES

    assert all(why for *_, why in PATCHES)


# ---------------------------------------------------------------------------------------------- sources


def compare(version: str, installed: dict[str, str], assumptions: dict[str, str]) -> list[str]:
    """What to re-check, one line per function; empty where all is as it was when it was checked."""
    if version not in CHECKED:
        return [
            f"megatron-core {version} was never checked (only {', '.join(CHECKED)}). Read each of these, run "
            "tests/distributed, then add its hashes to tests/distributed/megatron_sources.json:",
            *(f"  {name}: {assumption}" for name, assumption in assumptions.items()),
        ]
    known = CHECKED[version]
    return [
        f"megatron-core {version} {name} is not the code that was checked; re-check that it still: {assumption}"
        for name, assumption in assumptions.items()
        if installed.get(name) != known.get(name)
    ]


def test_megatron_is_a_version_that_was_checked():
    found = run("""
import json
from megamug.distributed import cpu_backend
from megamug.command_line import console
console.import_megatron()
import megatron.core
sources = cpu_backend.MEGATRON_SOURCES
print(json.dumps({
    "version": megatron.core.__version__.split("+")[0], "installed": cpu_backend.source_hashes(),
    "assumptions": {f"{module}.{path}": what for module, paths in sources.items() for path, what in paths.items()},
}))
""")
    assert found["installed"].keys() == found["assumptions"].keys()
    problems = compare(**found)
    assert not problems, "\n".join(problems)


def test_the_comparison_names_what_to_check():
    assumptions = {"a.f": "adds", "a.g": "multiplies"}
    (version, known), *_ = CHECKED.items()
    problems = compare("99.0", {}, assumptions)
    assert "99.0 was never checked" in problems[0] and "  a.g: multiplies" in problems
    name = next(iter(known))
    assert compare(version, known, {name: "holds"}) == []
    (problem,) = compare(version, {**known, name: "0" * 16}, {name: "holds"})
    assert name in problem and "still: holds" in problem


def test_both_supported_versions_were_checked():
    assert {version.rsplit(".", 1)[0] for version in CHECKED} >= {"0.16", "0.19"}
    assert len({frozenset(hashes) for hashes in CHECKED.values()}) == 1


# ---------------------------------------------------------------------------------------------- behaviour


@without_cuda
def test_patched_torch_behaves():
    found = run("""
import json, torch
from megamug.distributed import cpu_backend
cpu_backend.apply()
x, module = torch.ones(3), torch.nn.Linear(2, 2)
made = [
    torch.zeros(2, device="cuda"), torch.tensor([1], device=torch.device("cuda", 0)), torch.arange(3, device="cuda"),
    torch.empty_like(x, device="cuda"), torch.ones(2, device=torch.cuda.current_device()),
    torch.full((2,), 1, device="cuda"),
]
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.Event().record()
    torch.cuda.synchronize()
with torch.device("meta"):  # as other libraries build a model that is to be filled
    elsewhere = [torch.empty(2), torch.arange(3), torch.zeros_like(torch.ones(1)), torch.nn.Linear(2, 2).weight]
state = torch.cuda.get_rng_state()
a = torch.rand(2)
torch.cuda.set_rng_state(state)
print(json.dumps({
    "devices": sorted({str(t.device) for t in made}),
    "stays": [x.cuda() is x, module.cuda() is module, torch.zeros(1, device="meta").device.type == "meta"],
    "meta": [t.is_meta for t in elsewhere],
    "types": [t.type() for t in (x, x.bfloat16(), x.half())],
    "converted": x.type(torch.float64).dtype == torch.float64,
    "random": torch.equal(a, torch.rand(2)),
}))
""")
    assert found["devices"] == ["cpu"] and found["stays"] == [True] * 3 and found["meta"] == [True] * 4
    assert found["types"] == [f"torch.cuda.{t}Tensor" for t in ("Float", "BFloat16", "Half")]
    assert found["converted"] and found["random"]


@without_cuda
def test_megatrons_random_states_and_recomputation():
    """The tracker's fork leaves the outer generator as it was and goes on where it stopped; a recomputed dropout is the
    one that was computed."""
    found = run("""
import json, torch
from megamug.configuration.sections import ParallelConfig
from megamug.distributed import setup
setup.start(ParallelConfig(), seed=3)
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
outer = torch.get_rng_state()
with get_cuda_rng_tracker().fork():
    first = torch.rand(4)
with get_cuda_rng_tracker().fork():
    second = torch.rand(4)
untouched = torch.equal(outer, torch.get_rng_state())

def f(x):
    with get_cuda_rng_tracker().fork():
        return torch.nn.functional.dropout(x * x, 0.5) * torch.rand(64)

def gradient(run):
    torch.manual_seed(0)
    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add("model-parallel-rng", 9)
    x = torch.arange(64.0, requires_grad=True)
    run(x).sum().backward()
    return x.grad

plain, recomputed = gradient(f), gradient(lambda x: checkpoint(f, False, x))
print(json.dumps({"untouched": untouched, "moves": not torch.equal(first, second),
                  "same": torch.equal(plain, recomputed), "dropped": int((plain == 0).sum())}))
""")
    assert found["untouched"] and found["moves"] and found["same"]
    assert 10 < found["dropped"] < 60
