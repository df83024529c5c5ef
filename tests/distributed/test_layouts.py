"""The layout is not part of the science: every layout gives the one-process loss curve, to 1e-5 relative, in float32.

Ten steps of a tiny MUG (and of MAE: caption weight 0), from initialisation and from a one-process checkpoint. Layouts
of the same number of processes share one launch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch_forked

WORKER = str(Path(__file__).with_name("layout_worker.py"))
TOLERANCE = 1e-5
STEPS, CUT = 10, 5
MAE = {"caption_loss_weight": 0.0}
CUT_DECODERS = {"layers": 1, "decoder_layers": 4, "text_unimodal_layers": 2, "text_multimodal_layers": 2}

LAYOUTS: dict[int, dict[str, dict]] = {
    1: {
        "accumulation": {"data": {"micro_batch_size": 1}},
        "no accumulation": {"data": {"micro_batch_size": 8}},
        "recompute": {"parallel": {"recompute": "full"}},
    },
    2: {
        "TP2": {"parallel": {"tensor": 2}},
        "TP2 + SP": {"parallel": {"tensor": 2, "sequence": True}},
        "TP2 + SP + recompute": {"parallel": {"tensor": 2, "sequence": True, "recompute": "full"}},
        "PP2": {"parallel": {"pipeline": 2}},
        "DP2": {},
        "DP2 + distributed optimizer": {"parallel": {"distributed_optimizer": True}},
        "DP2 + overlap": {
            "parallel": {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
        },
    },
    3: {"PP3": {"parallel": {"pipeline": 3}, "model": CUT_DECODERS}},
    4: {
        "TP2 x PP2": {"parallel": {"tensor": 2, "pipeline": 2}},
        "TP2 + SP x DP2 + distributed optimizer": {
            "parallel": {"tensor": 2, "sequence": True, "distributed_optimizer": True}
        },
    },
}


def variant(options: dict, **more) -> dict:
    """`options` with more of them, models merged."""
    return {**options, **more, "model": {**options.get("model", {}), **more.get("model", {})}}


def run(options: list[dict], processes: int) -> list[dict]:
    results = launch_forked([WORKER, json.dumps(options)], processes, timeout=300)
    for rank, (code, output) in enumerate(results):
        assert code == 0, f"rank {rank} of {processes} exits {code}:\n{output[-4000:]}"
    per_rank = [[json.loads(line[7:]) for line in out.splitlines() if line.startswith("RESULT ")] for _, out in results]
    for others in per_rank[1:]:
        assert others == per_rank[0], "the ranks report different losses"
    assert len(per_rank[0]) == len(options)
    return per_rank[0]


def worst(records: list, reference: list) -> float:
    assert len(records) == len(reference) > 0
    pairs = [(a, b) for x, y in zip(records, reference, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict]:
    """One process: the curves to compare with, and checkpoints after CUT steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = {"mug": {}, "mae": {"model": MAE}, "cut": {"model": CUT_DECODERS}, "cut mae": {"model": CUT_DECODERS | MAE}}
    jobs, names = [], []
    for name, options in kinds.items():
        jobs += [variant(options, steps=CUT, save=str(folder / name)), variant(options, steps=STEPS)]
        names.append(name)
    results = run(jobs, 1)
    return {
        name: {"folder": str(folder / name), "records": results[2 * i + 1]["records"], "early": results[2 * i]}
        for i, name in enumerate(names)
    }


def test_the_reference_learns_and_its_first_half_is_reproduced_to_the_bit(reference):
    for name in reference:
        records = reference[name]["records"]
        assert records[:CUT] == reference[name]["early"]["records"]
        assert records[-1][0] < records[0][0]


@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_gives_the_one_process_curve(reference, processes):
    jobs, checks = [], []
    for name, options in LAYOUTS[processes].items():
        family = "cut" if options.get("model") == CUT_DECODERS else "mug"
        for model, kind in (({}, family), (MAE, "mae" if family == "mug" else "cut mae")):
            expected = reference[kind]
            jobs.append(variant(options, model=model, steps=STEPS))
            checks.append((f"{name}, {kind}, from initialisation", expected["records"]))
            jobs.append(variant(options, model=model, steps=STEPS, first=CUT, load=expected["folder"]))
            checks.append((f"{name}, {kind}, from a checkpoint", expected["records"][CUT:]))
    found = {}
    for (label, expected), result in zip(checks, run(jobs, processes), strict=True):
        found[label] = worst(result["records"], expected)
        if label.startswith("PP3, cut, "):
            assert [start.split(".")[0] for start in result["stage_starts"][1:]] == ["image", "text"]
            assert result["vocabulary"] == [1, 2], "the tied vocabulary weight should stand in two stages"
    assert max(found.values()) <= TOLERANCE, found


def test_a_run_moves_from_layout_to_layout(reference, tmp_path):
    """TP2 -> PP2 -> DP2 with distributed optimizer -> one process, two steps each: one curve."""
    legs = [
        (2, {"parallel": {"tensor": 2, "sequence": True}}),
        (2, {"parallel": {"pipeline": 2}}),
        (2, {"parallel": {"distributed_optimizer": True}}),
        (1, {}),
    ]
    records, first, load = [], 0, None
    for number, (processes, options) in enumerate(legs):
        last = STEPS if number == len(legs) - 1 else first + 2
        save = str(tmp_path / str(number))
        job = variant(options, first=first, steps=last, save=save, **({"load": load} if load else {}))
        records += run([job], processes)[0]["records"]
        first, load = last, save
    assert worst(records, reference["mug"]["records"]) <= TOLERANCE
