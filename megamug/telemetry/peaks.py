"""Peak arithmetic rate of a device, the denominator of MFU (model FLOP/s utilisation)."""

from __future__ import annotations

# Dense tensor-core peaks in FLOP/s (no sparsity), from NVIDIA's data sheets (A100 2021, H100 2023, H200 2024). The
# first name that the device's name contains counts, so the special forms stand before the general one.
PEAK_FLOPS: list[tuple[str, dict[str, float]]] = [
    ("H200 NVL", {"bf16": 835.5e12, "fp8": 1670.5e12}),
    ("H200", {"bf16": 989.4e12, "fp8": 1978.9e12}),
    ("H100 NVL", {"bf16": 835.5e12, "fp8": 1670.5e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp8": 1513e12}),
    ("H100", {"bf16": 989.4e12, "fp8": 1978.9e12}),
    ("A100", {"bf16": 312e12}),
]


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """Peak FLOP/s of one device.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it; None for a CPU.
        precision: "bf16" or "fp8"; the precision of the matrix products.

    Returns None where the peak is not known (every CPU, other GPUs, fp32): MFU is then not given.
    """
    for name, peaks in PEAK_FLOPS:
        if device_name is not None and name.lower() in device_name.lower():
            return peaks.get(precision)
    return None
