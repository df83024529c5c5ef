import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megamug.data.dali import CropDecoder, FullDecoder, has_transparency, opaque, without_remarks
from megamug.data.pairs.images import centre_squares, decode_or_none, random_flips, random_resized_crops


def test_crops_are_inside_and_as_asked():
    n = 20000
    widths, heights = np.full(n, 640), np.full(n, 480)
    crops = random_resized_crops(1, np.zeros(n, int), np.arange(n), widths, heights)
    top, left, h, w = crops.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 480).all() and (left + w <= 640).all()
    share = h * w / (640 * 480)
    assert 0.197 < share.min() < 0.21 and share.max() > 0.95
    ratio = w / h
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    # areas are uniform in [0.2, 1) before those that do not fit are drawn again: small ones always fit
    small = np.histogram(share[share < 0.5], bins=6, range=(0.2, 0.5))[0]
    assert abs(small / small.mean() - 1).max() < 0.1
    assert abs(np.log(ratio[share < 0.4]).mean()) < 0.01
    assert abs((top / np.maximum(480 - h, 1)).mean() - 0.5) < 0.01


def test_crops_are_pure_functions_of_the_sample():
    epochs, indices = np.array([0, 1, 0]), np.array([5, 5, 9])
    widths, heights = np.array([100, 100, 300]), np.array([200, 200, 50])
    together = random_resized_crops(1, epochs, indices, widths, heights)
    for i in range(3):
        one = random_resized_crops(1, epochs[i : i + 1], indices[i : i + 1], widths[i : i + 1], heights[i : i + 1])
        assert np.array_equal(one[0], together[i])
    assert not np.array_equal(together[0], together[1])


def test_long_pictures_fall_back_to_the_centre():
    crops = random_resized_crops(1, np.zeros(2, int), np.arange(2), np.array([1000, 10]), np.array([10, 1000]))
    assert crops.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10]]
    one = random_resized_crops(1, np.zeros(1, int), np.arange(1), np.array([1]), np.array([1]))
    assert one.tolist() == [[0, 0, 1, 1]]


def test_flips_are_half():
    assert abs(random_flips(1, np.zeros(20000, int), np.arange(20000)).mean() - 0.5) < 0.015


def test_centre_squares():
    assert centre_squares(np.array([40, 30]), np.array([30, 41])).tolist() == [[0, 5, 30, 30], [5, 0, 30, 30]]


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
def test_decoding_equals_pillow(extension, helpers):
    data = [helpers.encoded(helpers.picture(i, 120 + i, 90), extension) for i in range(3)]
    regions = np.array([[10, 20, 60, 80], [0, 0, 90, 121], [40, 5, 48, 40]])
    flips = np.array([False, True, False])
    pixels = CropDecoder(48, 4, 1, torch.device("cpu"))(data, regions, flips)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, 48, 48)
    for i, (top, left, h, w) in enumerate(regions):
        image = Image.open(io.BytesIO(data[i])).convert("RGB").crop((left, top, left + w, top + h))
        want = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
        want = want[:, ::-1] if flips[i] else want
        assert abs(pixels[i].permute(1, 2, 0).numpy() - want).mean() < 1


def test_fine_patterns_are_averaged_and_not_sampled(helpers):
    noise = np.random.RandomState(0).randint(0, 256, (96, 96), dtype=np.uint8)  # standard deviation 74
    data = helpers.encoded(Image.fromarray(noise), "PNG")
    pixels = CropDecoder(24, 1, 1, torch.device("cpu"))([data], np.array([[0, 0, 96, 96]]), np.zeros(1, bool))
    assert pixels.float().std() < 30  # 16 pixels go into one


def test_a_bad_file_does_not_stop_the_others(helpers):
    good = [helpers.encoded(helpers.picture(i), "PNG") for i in range(3)]
    decoder = CropDecoder(30, 4, 1, torch.device("cpu"))
    regions, flips = np.tile([0, 0, 30, 30], (4, 1)), np.zeros(4, bool)
    pixels, failed = decode_or_none(decoder, [good[0], b"<html>", good[1], good[2]], regions, flips)
    assert list(failed) == [1] and not pixels[1].any()
    whole = decoder(good, regions[:3], flips[:3])  # the pipeline was built anew
    assert torch.equal(pixels[[0, 2, 3]], whole)
    with pytest.raises(RuntimeError, match="none of 2"):
        decode_or_none(decoder, [b"<html>", b""], regions[:2], flips[:2])


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_what_a_png_remarks_beside_its_pixels_is_not_decoded(capfd):
    """libpng would write a warning to stderr for each chunk that it dislikes, in every epoch."""
    header = 8 + 25  # signature and IHDR
    gamma, bad = chunk(b"gAMA", struct.pack(">I", 20000)), chunk(b"iCCP", b"ICC\0\0" + zlib.compress(b"x" * 130))
    pixels = np.random.RandomState(0).randint(0, 255, (40, 40, 3), dtype=np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels).quantize(16)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        plain = buffer.getvalue()
        remarked = plain[:header] + gamma + bad + chunk(b"tEXt", b"a\0b") + plain[header:]
        assert without_remarks(plain) == plain == without_remarks(remarked)
        assert without_remarks(remarked[:-30]) == remarked[:-30]  # cut short: the decoder says so
        assert FullDecoder(1)([remarked]) == [(40, 40)]
        decoder = CropDecoder(40, 1, 1, torch.device("cpu"))
        regions = np.array([[0, 0, 40, 40]])
        decoded = [decoder([data], regions, np.zeros(1, bool)) for data in (plain, remarked)]
        assert torch.equal(*decoded)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG")
    assert without_remarks(jpeg.getvalue()) == jpeg.getvalue()
    told = capfd.readouterr()
    assert told.err == told.out == ""


def clear(mode, **options):
    """A 40 x 30 picture: left half opaque red, right half clear, with green behind it; encoded as PNG or WebP."""
    pixels = np.zeros((30, 40, 4), np.uint8)
    pixels[:, :20], pixels[:, 20:] = (200, 0, 0, 255), (0, 180, 0, 0)
    image = Image.fromarray(pixels, "RGBA")
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        corner = image.getpixel((39, 0))
        options = {"transparency": corner} | options
    elif mode == "RGB":
        image, options = image.convert("RGB"), {"transparency": (0, 180, 0)} | options
    elif mode == "I;16":
        grey = np.where(pixels[..., 0] > 0, 51200, 30000).astype(np.uint16)
        image, options = Image.fromarray(grey), {"transparency": 30000} | options
    elif mode != "RGBA":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


CLEAR = {
    "RGBA": {}, "LA": {}, "P": {}, "RGB": {}, "I;16": {}, "WebP": {"format": "WEBP", "lossless": True},
    "WebP lossy": {"format": "WEBP", "quality": 95},
}  # fmt: skip


@pytest.mark.parametrize("kind", CLEAR)
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 250)])
def test_what_is_transparent_shows_the_background(kind, background):
    """The decoder drops the alpha channel: what lies behind it, here green, was seen."""
    data = clear("RGBA" if "WebP" in kind else kind, **CLEAR[kind])
    assert has_transparency(data)
    assert FullDecoder(1)([data]) == [(30, 40)]
    decoder = CropDecoder(20, 2, 2, torch.device("cpu"), background)
    regions = np.array([[5, 20, 20, 20], [5, 0, 20, 20]])
    right, left = decoder([data, data], regions, np.zeros(2, bool)).permute(0, 2, 3, 1)
    assert abs(right.float() - torch.tensor(background)).max() <= 2
    red = [200, 0, 0] if kind not in ("LA", "I;16") else [60 if kind == "LA" else 200] * 3
    assert abs(left[:, :18].float() - torch.tensor(red)).max() <= 6
    assert regions.tolist() == [[5, 20, 20, 20], [5, 0, 20, 20]]  # the caller's


def test_half_transparency_is_mixed_and_others_stay_as_they_are(helpers):
    half = Image.new("RGBA", (8, 8), (100, 0, 0, 51))
    buffer = io.BytesIO()
    half.save(buffer, "PNG")
    assert opaque(buffer.getvalue(), (0, 0, 0)) == b"P6\n8 8\n255\n" + bytes([20, 0, 0]) * 64
    for extension in ("JPEG", "PNG", "WEBP"):
        data = helpers.encoded(format=extension)
        assert not has_transparency(data) and opaque(data) == data
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 4), dtype=np.uint8), "RGBA")
    with pytest.raises(ValueError, match="does not decode"):
        opaque(helpers.encoded(noise, "PNG")[:3000])
