"""A classifier in every layout gives the one-process curve and the one-process gradient of every parameter, to 1e-5
relative, in float32; its checkpoints go on in other layouts. One has layer-wise learning rates and stochastic depth."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import TOLERANCE, references, run, worst, worst_gradient

STEPS, CUT = 10, 5
POOLS = ("mean", "class_token")
OPTIONS = {"mean": {"layer_decay": 0.5, "drop_path": 0.3}, "class_token": {}}
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
}
RESUMED = {1: {}, 2: {"tensor": 2, "sequence": True}}  # a checkpoint of one process goes on in these


def job(pool: str, **more) -> dict:
    return {"case": "tests.distributed.cases.classifier_case", "steps": STEPS,
            "classifier": {"classes": 7, "pool": pool, **OPTIONS[pool]}, **more}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict]:
    """One process: curves and gradients to compare with, and checkpoints after CUT steps."""
    return references({pool: job(pool) for pool in POOLS}, CUT, tmp_path_factory.mktemp("reference"))


def test_every_parameter_has_a_gradient_and_the_model_learns(reference):
    for pool in POOLS:
        gradients, records = reference[pool]["gradients"], reference[pool]["records"]
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        assert ("head.norm.weight" in gradients) == (pool == "mean")
        assert ("encoder.stack.final_layernorm.weight" in gradients) == (pool == "class_token")
        assert records[:CUT] == reference[pool]["early"]
        assert records[-1][0] < records[0][0]


@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_gives_the_one_process_curve_and_gradients(reference, processes, tmp_path):
    jobs, checks = [], []
    for name, parallel in LAYOUTS[processes].items():
        for pool in POOLS:
            file = tmp_path / f"{len(jobs)}.pt"
            jobs.append(job(pool, parallel=parallel, gradients=str(file)))
            checks.append((f"{name}, {pool}", pool, 0, file))
    for pool in POOLS:
        jobs.append(job(pool, parallel=RESUMED[processes], first=CUT, load=reference[pool]["checkpoint"]))
        checks.append((f"{RESUMED[processes]}, {pool}, from a checkpoint", pool, CUT, None))
    curves, gradients = {}, {}
    for (label, pool, first, file), result in zip(checks, run(jobs, processes), strict=True):
        curves[label] = worst(result["records"], reference[pool]["records"][first:])
        if file is not None:
            gradients[label] = worst_gradient(file, reference[pool]["gradients"])
    assert max(curves.values()) <= TOLERANCE, curves
    assert max(error for error, _ in gradients.values()) <= TOLERANCE, gradients


def test_averages_are_the_same_in_every_layout(tmp_path):
    """Those of an eager average are near the weights, those of a lazy one near the start; behind, training goes on."""
    lazy, eager = ({"classifier": {"classes": 7, "ema": decay}, "validate": True} for decay in (0.9, 0.01))
    start = {"case": "tests.distributed.cases.classifier_case", "steps": STEPS, **lazy}
    alone, other, plain, _ = run([
        start, {**start, **eager}, {**start, "classifier": {"classes": 7}},
        {**start, "steps": CUT, "save": str(tmp_path / "start")},
    ], 1)  # fmt: skip
    assert alone["records"] == plain["records"] == other["records"]
    losses = [one["validation"]["class"] for one in (plain, other, alone)]
    assert abs(losses[1] / losses[0] - 1) < 1e-3 < abs(losses[2] / losses[0] - 1)
    layouts = [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"distributed_optimizer": True},
               {"distributed_optimizer": True, "overlap_param_gather": True, "overlap_grad_reduce": True}]  # fmt: skip
    jobs = [{**start, "parallel": parallel} for parallel in layouts]
    jobs.append({**start, "parallel": layouts[2], "first": CUT, "load": str(tmp_path / "start")})
    for found in run(jobs, 2):
        assert abs(found["validation"]["class"] / alone["validation"]["class"] - 1) <= TOLERANCE


def test_lars_knows_norms_of_what_ranks_share(tmp_path):
    """Its factors are those of whole parameters; its buffers go on in another layout."""
    options = {"optimizer": {"name": "lars", "learning_rate": 2.0, "trust_coefficient": 0.02, "warmup_steps": 3}}
    start = job("mean", **options)
    alone, _ = run([start, {**start, "steps": CUT, "save": str(tmp_path / "start")}], 1)
    assert alone["records"][-1][0] < alone["records"][0][0] - 0.05
    layouts = {"TP2": {"tensor": 2}, "TP2 + SP": {"tensor": 2, "sequence": True}, "PP2": {"pipeline": 2}, "DP2": {}}
    jobs = [{**start, "parallel": parallel} for parallel in layouts.values()]
    jobs.append({**start, "parallel": layouts["TP2 + SP"], "first": CUT, "load": str(tmp_path / "start")})
    *others, later = run(jobs, 2)
    found = [worst(other["records"], alone["records"]) for other in others]
    found.append(worst(later["records"], alone["records"][CUT:]))
    assert max(found) <= TOLERANCE, found


def test_a_frozen_encoder_keeps_its_weights_and_standardises_over_all_replicas(tmp_path):
    """A micro-batch of one process is as many samples as those of two together; running means are in a checkpoint."""

    def probe(name: str, micro: int, pool: str = "class_token", **more) -> dict:
        return {"case": "tests.distributed.cases.classifier_case", "steps": STEPS, "save": str(tmp_path / name),
                "classifier": {"classes": 7, "pool": pool, "frozen": True}, "validate": True,
                "data": {"image_size": 32, "global_batch_size": 8, "micro_batch_size": micro}, **more}  # fmt: skip

    alone, start, later, attentive = run([
        probe("one", 8), probe("start", 8, steps=CUT), probe("later", 8, first=CUT, load=str(tmp_path / "start")),
        probe("attentive", 8, "attention"),
    ], 1)  # fmt: skip
    layouts = [probe("dp", 4), probe("distributed", 4, parallel={"distributed_optimizer": True}),
               probe("tp", 8, parallel={"tensor": 2, "sequence": True})]  # fmt: skip
    spread = {"tensor": 2, "sequence": True}
    *others, both, shared = run([*layouts, probe("both", 4, "attention"),
                                 probe("shared", 8, "attention", parallel=spread)], 2)  # fmt: skip
    assert start["records"] + later["records"] == alone["records"] and later["validation"] == alone["validation"]
    assert alone["records"][-1][0] < alone["records"][0][0]
    for other in others:
        assert worst(other["records"], alone["records"]) <= TOLERANCE
        assert abs(other["validation"]["class"] / alone["validation"]["class"] - 1) <= TOLERANCE
    assert attentive["records"][-1][0] < attentive["records"][0][0]
    for other in (both, shared):
        assert worst(other["records"], attentive["records"]) <= TOLERANCE
        assert abs(other["validation"]["class"] / attentive["validation"]["class"] - 1) <= TOLERANCE
