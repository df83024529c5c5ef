"""Checkpoints and copies of state over ranks: what one layout wrote, another reads to the bit.

Checkpoints are compared through Megatron's own reader of plain tensors, not through ours.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch_forked

WORKER = str(Path(__file__).with_name("cases") / "layout_worker.py")
DISTRIBUTED = {"distributed_optimizer": True}
OVERLAP = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
BF16 = {"precision": {"dtype": "bf16"}}
# The second of two stages begins inside the text decoder: its vocabulary weight stands on both.
CUT_TEXT = {"image_loss_weight": 0.0, "layers": 1, "text_unimodal_layers": 2, "text_multimodal_layers": 3}


def run(options: list[dict], processes: int) -> list[dict]:
    results = launch_forked([WORKER, json.dumps(options)], processes, timeout=200)
    for rank, (code, output) in enumerate(results):
        assert code == 0, f"rank {rank} of {processes} exits {code}:\n{output[-4000:]}"
    return [json.loads(line[7:]) for line in results[0][1].splitlines() if line.startswith("RESULT ")]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dist_checkpointing.load_plain_tensors(str(folder))


def assert_same_bits(folder: Path, expected: Path) -> None:
    mine, other = tensors(folder), tensors(expected)
    assert mine.keys() == other.keys()
    different = [name for name in mine if not torch.equal(mine[name], other[name])]
    assert not different, different


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    """(folder of checkpoints by name, results by name): three steps in several layouts, and loads without a step."""
    root = tmp_path_factory.mktemp("states")
    results = {}

    def all_of(processes: int, **options: dict) -> None:
        finished = run([{"steps": 3, "save": str(root / name), **o} for name, o in options.items()], processes)
        results.update(zip(options, finished, strict=True))

    def load(name: str, **more) -> dict:
        return {"load": str(root / name), "first": 3, **more}

    all_of(1, single={}, single_bf16=BF16, cut_text={"steps": 4, "save": None, "model": CUT_TEXT})
    all_of(
        2,
        dp2={"parallel": {}},
        dp2_distributed={"parallel": DISTRIBUTED},
        dp2_overlap={"parallel": OVERLAP},
        bf16_distributed={"parallel": DISTRIBUTED, **BF16},
        bf16_overlap={"parallel": OVERLAP, **BF16},
        validated={"parallel": DISTRIBUTED, "validate": True, "save": None},
        validated_overlap={"parallel": OVERLAP, "validate": True, "save": None},
        bf16_tp2_sp={"parallel": {"tensor": 2, "sequence": True}, **BF16},
        single_in_distributed=load("single", parallel=DISTRIBUTED),
        single_bf16_in_distributed=load("single_bf16", parallel=DISTRIBUTED, **BF16),
        single_bf16_in_tp2=load("single_bf16", parallel={"tensor": 2, "sequence": True}, **BF16),
    )
    all_of(1, distributed_in_single=load("dp2_distributed"), bf16_in_single=load("bf16_distributed", **BF16))
    return root, results


def test_checkpoint_holds_every_parameter_and_its_moments(runs):
    root, _ = runs
    for name, kinds in (("single", ["exp_avg", "exp_avg_sq"]), ("single_bf16", ["exp_avg", "exp_avg_sq", "main"])):
        found = tensors(root / name)
        model = {key for key in found if not key.startswith("optimizer.")}
        assert len(model) > 80 and "text_decoder.word_embeddings.weight" in model
        assert found.keys() == model | {f"optimizer.{kind}.{key}" for kind in kinds for key in model}
        assert all(found[key].shape == found[f"optimizer.{kind}.{key}"].shape for kind in kinds for key in model)
        assert all(found[f"optimizer.exp_avg_sq.{key}"].any() for key in model if key.endswith("weight"))


@pytest.mark.parametrize("loaded, written", [
    ("single_in_distributed", "single"),
    ("distributed_in_single", "dp2_distributed"),
    ("single_bf16_in_distributed", "single_bf16"),
    ("single_bf16_in_tp2", "single_bf16"),
    ("bf16_in_single", "bf16_distributed"),
])  # fmt: skip
def test_loading_under_another_layout_keeps_every_bit(runs, loaded, written):
    root, _ = runs
    assert_same_bits(root / loaded, root / written)


@pytest.mark.parametrize(
    "overlapped, plain", [("dp2_overlap", "dp2_distributed"), ("bf16_overlap", "bf16_distributed")]
)
def test_overlapped_gathering_saves_what_was_updated(runs, overlapped, plain):
    """With `overlap_param_gather` the other ranks' shards arrive only with the next forward pass: a checkpoint written
    before that must not hold last step's."""
    root, results = runs
    assert results[overlapped]["records"] == results[plain]["records"]
    assert_same_bits(root / overlapped, root / plain)


def test_overlapped_gathering_validates_what_was_updated(runs):
    """The same for a validation, which no zeroing of gradients precedes."""
    _, results = runs
    assert results["validated_overlap"]["records"] == results["validated"]["records"]
    assert results["validated_overlap"]["validation"] == results["validated"]["validation"]


def test_moments_are_the_same_sums_in_every_layout(runs):
    root, _ = runs
    expected = tensors(root / "single")
    for name in ("dp2", "dp2_distributed"):
        found = tensors(root / name)
        assert found.keys() == expected.keys()
        # Not the parameters: the biases of keys have no gradient but rounding, and Adam takes full steps by its sign.
        for key in (key for key in expected if key.startswith("optimizer.")):
            assert (found[key] - expected[key]).norm() <= 1e-4 * expected[key].norm() + 1e-9, f"{name} {key}"


@pytest.mark.parametrize("layout", ["bf16_tp2_sp", "bf16_distributed"])
def test_bf16_is_close_to_one_process(runs, layout):
    _, results = runs
    torch.testing.assert_close(
        torch.tensor(results[layout]["records"]), torch.tensor(results["single_bf16"]["records"]), rtol=1e-2, atol=0
    )
    # and bf16 itself is the same training as float32
    torch.testing.assert_close(
        torch.tensor(results["single_bf16"]["records"]), torch.tensor(results["single"]["records"]), rtol=5e-2, atol=0
    )


def test_both_copies_of_a_tied_vocabulary_stay_equal(runs):
    """PP2 x DP2 under the distributed optimizer, text decoder cut: gradients are summed over both copies, the norm
    counts them once, and each data-parallel rank updates the same part of both."""
    single = runs[1]["cut_text"]
    options = {"steps": 4, "model": CUT_TEXT, "copies": True}
    plain, distributed = run(
        [{**options, "parallel": {"pipeline": 2}}, {**options, "parallel": {"pipeline": 2, **DISTRIBUTED}}], 4
    )
    for result in (plain, distributed):
        assert result["vocabulary"] == [0, 1] and result["stage_starts"][1].startswith("text.")
        assert result["copies_equal"] == [True] * 4
        torch.testing.assert_close(torch.tensor(result["records"]), torch.tensor(single["records"]), rtol=1e-5, atol=0)
