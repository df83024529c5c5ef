"""A checkpoint does not know what wrote it: written on the CPU a run goes on on the GPU, and the other way round, as if
it had stayed where it was."""

from __future__ import annotations

import pytest

from tests.gpu import parity
from tests.gpu.parity import CUT

pytestmark = pytest.mark.gpu
CASES = ["mug-with-captions", "lm-llama-separate-documents", "jam-unlike-towers-separate-documents"]
TOLERANCES = {"fp32-local": 1e-6, "fp32-te": 1e-4, "fp32-te-distributed-optimizer": 1e-4}  # as of whole curves


@pytest.fixture(scope="module")
def written_on_the_cpu(without_gpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    return {
        case: (folder / case, without_gpu.submit(parity.train, case, "fp32-local", steps=CUT, save=str(folder / case)))
        for case in CASES
    }


@pytest.mark.parametrize("variant", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_from_the_cpu_to_the_gpu(case, variant, written_on_the_cpu, cpu_curves, request):
    if "te" in variant.split("-"):
        request.getfixturevalue("transformer_engine")
    folder, written = written_on_the_cpu[case]
    expected = cpu_curves[case].result(timeout=300)
    assert written.result(timeout=300) == expected[:CUT]
    found = parity.train(case, variant, first=CUT, load=str(folder))
    assert max(parity.worst(found, expected[CUT:])) <= TOLERANCES[variant]


@pytest.mark.parametrize("variant", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_from_the_gpu_to_the_cpu(case, variant, without_gpu, cpu_curves, tmp_path, request):
    if "te" in variant.split("-"):
        request.getfixturevalue("transformer_engine")
    parity.train(case, variant, steps=CUT, save=str(tmp_path))
    found = without_gpu.submit(parity.train, case, "fp32-local", first=CUT, load=str(tmp_path)).result(timeout=300)
    assert max(parity.worst(found, cpu_curves[case].result(timeout=300)[CUT:])) <= TOLERANCES[variant]
