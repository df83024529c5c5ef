"""The layout is not part of the science: every layout gives the one-process loss curve and the one-process
gradient of every parameter, to 1e-5 relative, in float32.

Ten steps of a tiny MUG (and of MAE: caption weight 0; where the layout concerns it, with a masked text decoder), from
initialisation and from a one-process checkpoint. Layouts of the same number of processes share one launch.
"""

from __future__ import annotations

import pytest

from tests.distributed.layouts import TOLERANCE, references, run, worst, worst_gradient

STEPS, CUT = 10, 5
MAE = {"caption_loss_weight": 0.0}
MASKED = {"text_objective": "masked", "text_mask_ratio": 0.5}
# The layouts that concern it, and whether it goes on there from a checkpoint of one process, too.
MASKED_IN = {"accumulation": False, "TP2": False, "TP2 + SP + recompute": True, "PP2": False, "PP3": True,
             "DP2 + distributed optimizer": False, "TP2 + SP x DP2 + distributed optimizer": False}  # fmt: skip
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


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict]:
    """One process: curves and gradients to compare with, and checkpoints after CUT steps."""
    kinds = {"mug": {}, "mae": {"model": MAE}, "cut": {"model": CUT_DECODERS}, "cut mae": {"model": CUT_DECODERS | MAE},
             "masked": {"model": MASKED}, "cut masked": {"model": CUT_DECODERS | MASKED}}  # fmt: skip
    jobs = {name: variant(options, steps=STEPS) for name, options in kinds.items()}
    return references(jobs, CUT, tmp_path_factory.mktemp("reference"))


def test_the_reference_learns_and_its_first_half_is_reproduced_to_the_bit(reference):
    for name in reference:
        records = reference[name]["records"]
        assert records[:CUT] == reference[name]["early"]
        assert records[-1][0] < records[0][0]


@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_gives_the_one_process_curve_and_gradients(reference, processes, tmp_path):
    jobs, checks = [], []
    for name, options in LAYOUTS[processes].items():
        family = "cut" if options.get("model") == CUT_DECODERS else "mug"
        kinds = [({}, family), (MAE, "mae" if family == "mug" else "cut mae")]
        if name in MASKED_IN:
            kinds.append((MASKED, "masked" if family == "mug" else "cut masked"))
        for model, kind in kinds:
            expected = reference[kind]
            file = tmp_path / f"{len(jobs)}.pt"
            jobs.append(variant(options, model=model, steps=STEPS, gradients=str(file)))
            checks.append((f"{name}, {kind}, from initialisation", expected, 0, file))
            if model == MASKED and not MASKED_IN[name]:
                continue
            jobs.append(variant(options, model=model, steps=STEPS, first=CUT, load=expected["checkpoint"]))
            checks.append((f"{name}, {kind}, from a checkpoint", expected, CUT, None))
    curves, gradients = {}, {}
    for (label, expected, first, file), result in zip(checks, run(jobs, processes), strict=True):
        curves[label] = worst(result["records"], expected["records"][first:])
        if file is not None:
            gradients[label] = worst_gradient(file, expected["gradients"])
        if label.startswith(("PP3, cut, ", "PP3, cut masked, ")):
            assert [start.split(".")[0] for start in result["stage_starts"][1:]] == ["image", "text"]
            assert result["vocabulary"] == [1, 2], "the tied vocabulary weight should stand in two stages"
    assert max(curves.values()) <= TOLERANCE, curves
    assert max(error for error, _ in gradients.values()) <= TOLERANCE, gradients


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
