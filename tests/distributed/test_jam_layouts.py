"""JamCross in every layout gives the one-process curve and the one-process gradient of every parameter, to 1e-5
relative, in float32: towers of equal sizes, and towers of other widths, depths, norms and positions.

Layouts of the same number of processes share one launch.
"""

from __future__ import annotations

import pytest

from tests.distributed.layouts import TOLERANCE, references, run, worst, worst_gradient

STEPS, CUT = 10, 5
PAIRS = ("equal", "unlike")

LAYOUTS: dict[int, dict[str, dict]] = {
    2: {
        "TP2": {"tensor": 2},
        "TP2 + SP": {"tensor": 2, "sequence": True},
        "PP2": {"pipeline": 2},
        "PP2, 2 virtual stages": {"pipeline": 2, "virtual": 2},
        "DP2 + distributed optimizer": {"distributed_optimizer": True},
    },
    4: {
        "PP4": {"pipeline": 4},
        "TP2 x PP2": {"tensor": 2, "pipeline": 2},
        "TP2 + SP x PP2, recomputed": {"tensor": 2, "sequence": True, "pipeline": 2, "recompute": "full"},
    },
}
RESUMED = {2: {"pipeline": 2, "virtual": 2}, 4: {"tensor": 2, "sequence": True, "pipeline": 2}}


def job(pair: str, **more) -> dict:
    return {"case": "tests.distributed.cases.jam_case", "pair": pair, "steps": STEPS, **more}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict]:
    """One process: curves and gradients to compare with, and checkpoints after CUT steps."""
    return references({pair: job(pair) for pair in PAIRS}, CUT, tmp_path_factory.mktemp("reference"))


def test_every_parameter_has_a_gradient_and_the_model_learns(reference):
    from megamug.models.jam.plan import JamPlan
    from tests.distributed.cases import jam_case

    for pair in PAIRS:
        plan = JamPlan(jam_case.tiny({"pair": pair}), jam_case.VOCABULARY)
        gradients = reference[pair]["gradients"]
        assert {name: tuple(g.shape) for name, g in gradients.items()} == plan.shapes
        assert all(g.abs().max() > 0 for g in gradients.values())
        gates = {name: float(g.abs()) for name, g in gradients.items() if name.endswith(".gate")}
        assert gates and min(gates.values()) > 0.005, f"choose another seed of jam_case: {gates}"
        assert reference[pair]["records"][:CUT] == reference[pair]["early"]
        assert reference[pair]["records"][-1] != reference[pair]["records"][0]


@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_gives_the_one_process_curve_and_gradients(reference, processes, tmp_path):
    jobs, checks = [], []
    for name, parallel in LAYOUTS[processes].items():
        for pair in PAIRS:
            file = tmp_path / f"{len(jobs)}.pt"
            jobs.append(job(pair, parallel=parallel, gradients=str(file)))
            checks.append((f"{name}, {pair}", pair, 0, file))
    # The checkpoint of one process goes on in this number of them.
    resumed = {"first": CUT, "load": reference["unlike"]["checkpoint"]}
    jobs.append(job("unlike", parallel=RESUMED[processes], **resumed))
    checks.append((f"{RESUMED[processes]}, unlike, from a checkpoint", "unlike", CUT, None))
    curves, gradients = {}, {}
    for (label, pair, first, file), result in zip(checks, run(jobs, processes), strict=True):
        curves[label] = worst(result["records"], reference[pair]["records"][first:])
        if file is not None:
            gradients[label] = worst_gradient(file, reference[pair]["gradients"])
    assert max(curves.values()) <= TOLERANCE, curves
    assert max(error for error, _ in gradients.values()) <= TOLERANCE, gradients
