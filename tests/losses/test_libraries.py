"""The libraries: every instruction set gives the right numbers; the stand-in without them; memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megamug.benchmarks.losses import peak_resident_bytes, peak_tensor_bytes
from megamug.errors import UserError
from megamug.losses import linear_cross_entropy, masked_patch_loss, ops, vocab_parallel_cross_entropy
from tests.distributed.launch import python_path
from tests.losses.common import need

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@pytest.mark.parametrize("kernels", ["generic", "avx2"])
def test_narrower_instruction_sets(kernels):
    """The float64 comparisons once more, in a process that is told to use an older instruction set."""
    need("compiled")
    chosen = "import sys; from megamug.losses import ops; sys.exit('kernels %s' not in ops.libraries().reason)"
    environment = {**os.environ, "MEGAMUG_CPU_KERNELS": kernels, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, "-c", chosen % kernels], env=environment, cwd=ROOT).returncode:
        pytest.skip(f"this processor has no {kernels}")
    tests = [f"tests/losses/test_{name}.py" for name in ("cross_entropy", "masked_patch")]
    select = "compiled and (float64 or half or extreme or layouts or colour)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", select]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_threads_do_not_change_a_bit():
    need("compiled")
    torch.manual_seed(0)
    logits, targets = torch.randn(300, 999), torch.randint(999, (300,))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = logits.clone().requires_grad_()
            total, _ = vocab_parallel_cross_entropy(x, targets, impl="compiled")
            results.append((total.detach(), *torch.autograd.grad(total, x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_torch_stands_in_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "FOLDER", tmp_path)
    missing = ops._load()
    assert not missing.cpu and "not built" in missing.reason
    (tmp_path / "megamug_cpu.so").write_bytes(b"not a library")
    broken = ops._load()
    assert not broken.cpu and "does not load" in broken.reason
    monkeypatch.setattr(ops, "_LIBRARIES", missing)
    logits, targets = torch.randn(3, 5), torch.tensor([0, 1, 4])
    total, _ = vocab_parallel_cross_entropy(logits, targets)
    torch.testing.assert_close(total, F.cross_entropy(logits, targets, reduction="sum"))
    with pytest.raises(UserError, match="not built"):
        vocab_parallel_cross_entropy(logits, targets, impl="compiled")


def test_said_once_in_the_log(tmp_path):
    code = "import logging; logging.basicConfig(level='INFO'); import megamug.losses; import megamug.losses.ops"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.count("losses: ") == 1, result.stderr
    assert logging.getLogger("megamug.losses.ops") is ops._log


def make_graph_tensor(tensor):
    """A tensor inside a graph, as a layer's result is."""

    class Produced(torch.autograd.Function):
        @staticmethod
        def forward(ctx, handle):
            return tensor.detach()

        @staticmethod
        def backward(ctx, gradient):
            return None

    return Produced.apply(torch.zeros((), requires_grad=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_beyond_the_inputs():
    need("compiled")
    torch.manual_seed(0)
    slack = 1 * MIB

    logits, targets = torch.randn(1024, 32768), torch.randint(32768, (1024,))  # 128 MiB

    def cross_entropy():
        x = make_graph_tensor(logits)
        vocab_parallel_cross_entropy(x, targets, label_smoothing=0.1, impl="compiled")[0].backward()

    images, order = torch.randint(256, (64, 3, 224, 224), dtype=torch.uint8), torch.rand(64, 196).argsort(dim=1)
    predictions = torch.randn(64, 196, 768).bfloat16()  # 18 MiB; so is the gradient
    ids = order[:, :147].contiguous()

    def masked_patch():
        x = make_graph_tensor(predictions)
        options = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "impl": "compiled"}
        (masked_patch_loss(images, x, ids, patch_size=16, **options)[0] * 0.3).backward()

    hidden = torch.randn(4096, 64, requires_grad=True)
    weight = torch.randn(32768, 64, requires_grad=True)  # logits would take 512 MiB
    many = torch.randint(32768, (4096,))

    def linear():
        linear_cross_entropy(hidden, weight, many, max_bytes=32 * MIB, impl="compiled")[0].backward()
        hidden.grad = weight.grad = None

    for step, limit in (
        (cross_entropy, slack),
        (masked_patch, predictions.nbytes + slack),
        (linear, 32 * MIB + hidden.nbytes + weight.nbytes + 16 * slack),  # and the matrix product's scratch
    ):
        step()
        assert peak_tensor_bytes(step) < limit, step.__name__
        if step is linear:  # large enough for resident memory to tell
            assert min(peak_resident_bytes(step) for _ in range(2)) < limit
