"""DALI's `mixed` decoding and resizing on a GPU against its CPU operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.conftest import encoded, picture

pytestmark = pytest.mark.gpu
MEAN = 2.0  # of 255: the two have inverse transforms, colour conversions and resampling kernels of their own


@pytest.fixture(scope="module")
def decoders():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from megamug.data.dali import CropDecoder

    return [CropDecoder(48, 4, 2, torch.device(*place)) for place in (("cpu",), ("cuda", 0))]


@pytest.mark.parametrize("size", [(120, 90), (640, 480)], ids=str)
@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
def test_mixed_decoding_equals_the_cpu(decoders, extension, size):
    data = [encoded(picture(i, *size), extension, quality=95) for i in range(4)]
    scale = size[0] // 120
    regions, flips = np.tile([5, 10, 60 * scale, 80 * scale], (4, 1)), np.array([True, False, True, False])
    on_cpu, on_gpu = (decoder(data, regions, flips) for decoder in decoders)
    assert on_gpu.device.type == "cuda" and on_gpu.dtype == torch.uint8 and on_gpu.shape == on_cpu.shape
    apart = (on_gpu.cpu().float() - on_cpu.float()).abs().mean(dim=(1, 2, 3))
    assert apart.max() < MEAN, apart
    assert (on_cpu[0].float() - on_cpu[1].float()).abs().mean() > 5 * MEAN, "pictures that are alike test nothing"


def test_a_bad_file_does_not_stop_the_others(decoders):
    from megamug.data.pairs.images import decode_or_none

    good = [encoded(picture(i), "PNG") for i in range(3)]
    regions, flips = np.tile([0, 0, 30, 30], (4, 1)), np.zeros(4, bool)
    pixels, failed = decode_or_none(decoders[1], [good[0], b"<html>", good[1], good[2]], regions, flips)
    assert list(failed) == [1] and not pixels[1].any()
    assert torch.equal(pixels[[0, 2, 3]], decoders[1](good, regions[:3], flips[:3]))
