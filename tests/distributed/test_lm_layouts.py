"""DecoderLM in every layout gives the one-process curve and the one-process gradient of every parameter, to 1e-5
relative, in float32: CM3leon's block with a tied vocabulary, LLaMA's with grouped queries, QK-norm and z-loss, and
Chameleon's, with norms for each head and norms behind the blocks.

Layouts of the same number of processes share one launch. LLaMA's block, whose tensors are split in other ways, goes
through those that split tensors or stages, Chameleon's through those that split sequences as well; how gradients are
averaged does not depend on the block.
"""

from __future__ import annotations

import pytest

from tests.distributed.layouts import TOLERANCE, references, run, worst, worst_gradient

STEPS, CUT = 10, 5
FAMILIES = ("cm3leon", "llama", "chameleon")

LAYOUTS: dict[int, dict[str, dict]] = {
    1: {"recomputed": {"recompute": "full"}},
    2: {
        "TP2": {"tensor": 2},
        "TP2 + SP": {"tensor": 2, "sequence": True},
        "PP2": {"pipeline": 2},
        "PP2, 2 virtual stages": {"pipeline": 2, "virtual": 2},
        "DP2": {},
        "DP2 + distributed optimizer": {"distributed_optimizer": True},
    },
    4: {
        "PP4": {"pipeline": 4},
        "TP2 x PP2": {"tensor": 2, "pipeline": 2},
        "TP2 + SP x PP2, 2 virtual stages": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual": 2},
    },
}
# A checkpoint of one process goes on in these.
RESUMED = {1: {}, 2: {"tensor": 2, "sequence": True}, 4: {"tensor": 2, "pipeline": 2, "virtual": 2}}


def job(family: str, **more) -> dict:
    return {"case": "tests.distributed.cases.lm_case", "family": family, "steps": STEPS, **more}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict]:
    """One process: curves and gradients to compare with, and checkpoints after CUT steps."""
    return references({family: job(family) for family in FAMILIES}, CUT, tmp_path_factory.mktemp("reference"))


def test_every_parameter_has_a_gradient_and_the_model_learns(reference):
    for family in FAMILIES:
        gradients, records = reference[family]["gradients"], reference[family]["records"]
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        assert ("output_layer.weight" in gradients) == (family != "cm3leon")
        assert records[:CUT] == reference[family]["early"]
        assert records[-1][0] < records[0][0]


@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_gives_the_one_process_curve_and_gradients(reference, processes, tmp_path):
    jobs, checks = [], []
    for name, parallel in LAYOUTS[processes].items():
        for family in FAMILIES[: 3 if "sequence" in parallel else 2 if {"tensor", "pipeline"} & set(parallel) else 1]:
            file = tmp_path / f"{len(jobs)}.pt"
            jobs.append(job(family, parallel=parallel, gradients=str(file)))
            checks.append((f"{name}, {family}", family, 0, file))
    for family in FAMILIES[1:]:
        jobs.append(job(family, parallel=RESUMED[processes], first=CUT, load=reference[family]["checkpoint"]))
        checks.append((f"{RESUMED[processes]}, {family}, from a checkpoint", family, CUT, None))
    curves, gradients = {}, {}
    for (label, family, first, file), result in zip(checks, run(jobs, processes), strict=True):
        curves[label] = worst(result["records"], reference[family]["records"][first:])
        if file is not None:
            gradients[label] = worst_gradient(file, reference[family]["gradients"])
        if label == "PP2, 2 virtual stages, cm3leon":
            assert result["vocabulary"] == [0, 3], "the tied vocabulary weight should stand in two chunks"
    assert max(curves.values()) <= TOLERANCE, curves
    assert max(error for error, _ in gradients.values()) <= TOLERANCE, gradients
