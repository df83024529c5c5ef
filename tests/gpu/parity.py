"""Tiny models of every family, trained for some steps on whatever device this process has: what the tests compare
between a GPU and a CPU, between kinds of layers, and between precisions.

Models, weights and batches are those of `tests/distributed/cases`, so a curve is a pure function of the case. Rows
(tokens x micro-batch) of every stack are multiples of 16, widths too: FP8 products want both.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings

from tests.distributed.cases import layout_worker, lm_case

STEPS, CUT = 6, 3
WIDE = dict(width=64, ffn_width=128)
CASES: dict[str, dict] = {
    "mug-with-captions": {
        "case": "mug",
        "model": dict(width=64, ffn_width=128, decoder_width=64, text_width=64, decoder_register_tokens=7),
    },
    "lm-cm3leon": {"case": "lm", "family": "cm3leon", "lm": WIDE},
    "lm-llama-separate-documents": {"case": "lm", "family": "llama"},
    "lm-chameleon": {"case": "lm", "family": "chameleon"},
    "jam-equal-towers": {"case": "jam", "pair": "equal"},
    "jam-unlike-towers-separate-documents": {"case": "jam", "pair": "unlike"},
}
TE, DISTRIBUTED = {"dtype": "bf16", "layers": "te"}, {"distributed_optimizer": True}
VARIANTS: dict[str, dict] = {
    "fp32-local": {"precision": {"dtype": "fp32", "layers": "local"}},
    "fp32-te": {"precision": {"dtype": "fp32", "layers": "te"}},
    "fp32-te-distributed-optimizer": {"precision": {"dtype": "fp32", "layers": "te"}, "parallel": DISTRIBUTED},
    "bf16-local": {"precision": {"dtype": "bf16", "layers": "local"}},
    "bf16-te": {"precision": TE},
    "bf16-local-recompute": {"precision": {"dtype": "bf16", "layers": "local"}, "parallel": {"recompute": "full"}},
    "bf16-te-recompute": {"precision": TE, "parallel": {"recompute": "full"}},
    "bf16-te-distributed-optimizer": {"precision": TE, "parallel": DISTRIBUTED},
    "fp32-local-compiled": {"precision": {"dtype": "fp32", "layers": "local", "compile": "always"}},
    "bf16-local-compiled": {"precision": {"dtype": "bf16", "layers": "local", "compile": "always"}},
    "bf16-local-graph": {"precision": {"dtype": "bf16", "layers": "local"}, "parallel": {"cuda_graphs": True}},
    "bf16-te-graph": {"precision": TE, "parallel": {"cuda_graphs": True}},
    "bf16-local-compiled-graph": {
        "precision": {"dtype": "bf16", "layers": "local", "compile": "always"}, "parallel": {"cuda_graphs": True},
    },
    "fp8-delayed": {"precision": {**TE, "fp8": "delayed"}},
    "fp8-current": {"precision": {**TE, "fp8": "current"}},
    "fp8-blockwise": {"precision": {**TE, "fp8": "blockwise"}},
    "fp8-parameters": {"precision": {**TE, "fp8": "current", "fp8_parameters": True}, "parallel": DISTRIBUTED},
    "fp8-bf16-ends": {"precision": {**TE, "fp8": "current", "first_layers_bf16": 1}},
}


def options(case: str, variant: str, **more) -> dict:
    """Of `layout_worker`: a case in a variant; `more`: first, steps, load, save."""
    found = {"steps": STEPS, **CASES[case], **VARIANTS[variant], **more}
    if found.get("family") in ("llama", "chameleon"):  # the tests of layouts have them narrower
        found["lm"] = {**lm_case.FAMILIES[found["family"]]["lm"], **WIDE}
    return {**found, "case": f"tests.distributed.cases.{found['case']}_case"}


def train(case: str, variant: str, **more) -> list[list[float]]:
    """Of each step [loss of each kind, gradient norm before clipping], on this process's device."""
    try:
        return layout_worker.run(options(case, variant, **more))["records"]
    finally:
        layout_worker.leave_groups()
        forget_fp8()


@functools.cache
def curve(case: str, variant: str) -> list[list[float]]:
    """`train` from initialisation, once a process."""
    return train(case, variant)


def forget_fp8() -> None:
    """Transformer Engine keeps amax histories of delayed scaling for all models of a process."""
    if "transformer_engine.pytorch" in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its name in newer versions
            importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager.reset()


def worst(found: list[list[float]], expected: list[list[float]], first: int = 0) -> tuple[float, float]:
    """The largest relative differences of a loss and of a gradient norm, from step `first` on. NaN is infinite."""
    assert len(found) == len(expected) > first and all(len(a) == len(b) for a, b in zip(found, expected, strict=True))
    rows = list(zip(found, expected, strict=True))[first:]
    losses = [difference(a, b) for x, y in rows for a, b in zip(x[:-1], y[:-1], strict=True)]
    return max(losses), max(difference(x[-1], y[-1]) for x, y in rows)


def difference(found: float, expected: float) -> float:
    relative = abs(found - expected) / abs(expected)
    return relative if relative == relative else float("inf")
