"""A segmenter in every layout that it takes gives the one-process curve to 1e-5 relative, in float32, and the gradient
of every parameter: BatchNorm's statistics are those of a micro-batch of all replicas."""

from __future__ import annotations

import torch

from tests.distributed.layouts import TOLERANCE, run, worst

STEPS = 6
LAYOUTS = {
    "DP2": {}, "DP2 + distributed optimizer": {"distributed_optimizer": True}, "TP2": {"tensor": 2},
    "TP2 + SP": {"tensor": 2, "sequence": True},
}  # fmt: skip


def job(replicas: int, **more) -> dict:
    """Of two replicas each has half of a micro-batch; in a layout of one it is whole."""
    data = {"image_size": 32, "global_batch_size": 8, "micro_batch_size": 4 // replicas}
    return {"case": "tests.distributed.cases.segmenter_case", "steps": STEPS, "data": data,
            "segmenter": {"drop_path": 0.3, "layer_decay": 0.5}, "validate": True, **more}  # fmt: skip


def test_every_layout_gives_the_one_process_curve_and_gradients(tmp_path):
    files = [tmp_path / f"{n}.pt" for n in range(1 + len(LAYOUTS))]
    (alone,) = run([job(1, gradients=str(files[0]))], 1)
    jobs = [
        job(1 if "tensor" in parallel else 2, parallel=parallel, gradients=str(file))
        for parallel, file in zip(LAYOUTS.values(), files[1:], strict=True)
    ]
    others = dict(zip(LAYOUTS, run(jobs, 2), strict=True))
    expected = torch.load(files[0])
    assert alone["records"][-1][0] < alone["records"][0][0]
    curves = {name: worst(other["records"], alone["records"]) for name, other in others.items()}
    assert max(curves.values()) <= TOLERANCE, curves
    held_out = {name: abs(other["validation"]["segmentation"] / alone["validation"]["segmentation"] - 1)
                for name, other in others.items()}  # fmt: skip
    assert max(held_out.values()) <= TOLERANCE, held_out
    # A bias before a BatchNorm has no gradient but rounding.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    still = {name for name, gradient in expected.items() if gradient.abs().max() < 1e-6 * largest}
    assert still == {f"head.pyramid.{name}.bias" for name in ("first", "second", "doubled")}
    for name, file in zip(LAYOUTS, files[1:], strict=True):
        found = torch.load(file)
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            scale = largest if parameter in still else float(gradient.abs().max())
            # Tensor parallelism sums in another order before ReLUs, of which some switch.
            within = 10 * TOLERANCE if "TP" in name else TOLERANCE
            assert float((found[parameter] - gradient).abs().max()) <= within * scale, (name, parameter)
