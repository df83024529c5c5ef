import pytest

from megamug.telemetry.peaks import peak_flops


@pytest.mark.parametrize(
    "name, precision, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "fp8", 1670.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
    ],
)
def test_known_devices(name, precision, tera):
    assert peak_flops(name, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("name, precision", [(None, "bf16"), ("NVIDIA A100", "fp8"), ("H100", "fp32"), ("L4", "bf16")])
def test_unknown_is_none(name, precision):
    assert peak_flops(name, precision) is None
