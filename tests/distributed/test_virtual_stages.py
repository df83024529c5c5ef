"""Virtual pipeline stages and frozen parameters: the numbers of one process, gradient by gradient, and its checkpoints.

A rank holds several chunks; Megatron's interleaved schedule sends one shape over all boundaries, so they are padded.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.distributed.layouts import TOLERANCE, run, worst

STEPS, CUT = 4, 2
VIRTUAL = {"pipeline": 2, "virtual": 2}
# Six stages: the tied vocabulary weight stands in the fourth and the last, both on the second of two ranks.
SAME_RANK = {"image_loss_weight": 0.0, "layers": 3, "text_unimodal_layers": 1, "text_multimodal_layers": 1}
MASKED = {"text_objective": "masked"}
FROZEN = r"^(encoder|text_decoder\.word_embeddings)\."


def assert_same_gradients(file: Path, expected: Path) -> None:
    """Each parameter's gradient to 1e-5 of its norm (of 1e-4 of the whole gradient's, where that is larger)."""
    mine, other = torch.load(file), torch.load(expected)
    assert mine.keys() == other.keys() and len(mine) > 20
    floor = 1e-4 * torch.stack([g.norm() for g in other.values()]).norm()
    assert all(g.isfinite().all() and g.any() for g in other.values())
    errors = {name: float((mine[name] - other[name]).norm() / max(other[name].norm(), floor)) for name in mine}
    assert max(errors.values()) <= TOLERANCE, {name: e for name, e in errors.items() if e > TOLERANCE}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dist_checkpointing.load_plain_tensors(str(folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world) -> tuple[Path, dict[str, dict]]:
    """(folder of checkpoints and gradients, results by name)."""
    root, results = tmp_path_factory.mktemp("virtual"), {}

    def all_of(processes: int, **options: dict) -> None:
        files = {name: {"save": str(root / name), "gradients": str(root / f"{name}.pt")} for name in options}
        jobs = [{"steps": STEPS, **files[name], **one} for name, one in options.items()]
        results.update(zip(options, run(jobs, processes), strict=True))

    def later(name: str, **more) -> dict:
        return {"load": str(root / name), "first": CUT, **more}

    all_of(
        2,
        virtual={"parallel": VIRTUAL, "validate": True},
        virtual_half={"parallel": VIRTUAL, "steps": CUT},
        virtual_resumed=later("virtual_half", parallel=VIRTUAL),
        plain={"parallel": {"pipeline": 2}, "validate": True},
        virtual_same={"parallel": {"pipeline": 2, "virtual": 3}, "model": SAME_RANK, "copies": True},
        virtual_frozen={"parallel": VIRTUAL, "freeze": FROZEN},
        virtual_masked={"parallel": VIRTUAL, "model": MASKED},
    )
    all_of(
        1,
        one={},
        half={"steps": CUT},
        one_same={"model": SAME_RANK},
        one_frozen={"freeze": FROZEN},
        one_masked={"model": MASKED},
        start={"steps": 0, "gradients": None},
        one_from_virtual=later("virtual_half"),
        one_same_from_virtual=later("virtual_same", first=STEPS, gradients=None, model=SAME_RANK),
    )
    return root, results


@pytest.mark.parametrize("name, alone, stages", [
    ("virtual", "one", 4), ("virtual_same", "one_same", 6), ("virtual_frozen", "one_frozen", 4),
    ("virtual_masked", "one_masked", 4),
])  # fmt: skip
def test_losses_norms_and_gradients_are_those_of_one_process(runs, name, alone, stages):
    root, results = runs
    assert len(results[name]["stage_starts"]) == stages
    assert worst(results[name]["records"], results[alone]["records"]) <= TOLERANCE
    assert_same_gradients(root / f"{name}.pt", root / f"{alone}.pt")


def test_both_copies_of_a_tied_weight_may_stand_on_one_rank(runs):
    root, results = runs
    assert results["virtual_same"]["vocabulary"] == [3, 5]
    assert results["virtual_same"]["copies_equal"] == [True, True]
    mine, other = tensors(root / "one_same_from_virtual"), tensors(root / "virtual_same")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_checkpoint_of_virtual_stages_goes_on_there_and_in_one_process(runs):
    _, results = runs
    assert results["virtual_resumed"]["records"] == results["virtual"]["records"][CUT:]  # to the bit
    assert worst(results["one_from_virtual"]["records"], results["one"]["records"][CUT:]) <= TOLERANCE


def test_validation_runs_through_all_chunks(runs):
    _, results = runs
    assert results["virtual"]["validation"] == pytest.approx(results["plain"]["validation"], rel=TOLERANCE)


def test_frozen_parameters_stay_and_have_no_state(runs):
    root, results = runs
    assert results["one_frozen"]["records"][0][-1] < results["one"]["records"][0][-1]  # they are not in the norm
    before = tensors(root / "start")
    for name in ("one_frozen", "virtual_frozen"):
        after = tensors(root / name)
        for key in (key for key in before if not key.startswith("optimizer.")):
            frozen = key.startswith(("encoder.", "text_decoder.word_embeddings."))
            assert (f"optimizer.exp_avg.{key}" in after) != frozen, key
            assert not frozen or torch.equal(after[key], before[key]), key
        assert any(not torch.equal(after[key], before[key]) for key in before if key.startswith("image_decoder."))


def test_virtual_stages_go_with_the_other_ways_to_share(runs):
    """Sequence parallelism, which divides the schedule's shape by its ranks, from the checkpoint of one process; the
    distributed optimizer and overlapped reductions, which work chunk by chunk."""
    root, results = runs
    sequence, shared = run(
        [
            {
                "parallel": {**VIRTUAL, "tensor": 2, "sequence": True}, "steps": STEPS, "first": CUT,
                "load": str(root / "half"), "gradients": str(root / "sequence.pt"),
            },
            {
                "parallel": {
                    **VIRTUAL, "distributed_optimizer": True, "overlap_grad_reduce": True,
                    "overlap_param_gather": True,
                },
                "steps": STEPS,
            },
        ],
        4,
    )  # fmt: skip
    assert worst(sequence["records"], results["one"]["records"][CUT:]) <= TOLERANCE
    assert_same_gradients(root / "sequence.pt", root / "one_from_virtual.pt")
    assert worst(shared["records"], results["one"]["records"]) <= TOLERANCE
