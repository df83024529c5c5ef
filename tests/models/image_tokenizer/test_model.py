"""The image tokenizer: shapes, the nearest code, files, mistakes. Parity with other projects: tests/convert."""

import hashlib
import json
import random
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamug.errors import UserError
from megamug.models.image_tokenizer.model import GroupNorm, ImageTokenizer, ImageTokenizerConfig, from_bytes, to_bytes
from megamug.models.image_tokenizer.vq import Codebook

SIZES = dict(
    image_size=16, channels=8, channel_multipliers=(1, 2), residual_blocks=1, attention_resolutions=(8,),
    latent_channels=6, code_width=3, codes=20, norm_groups=4,
)  # fmt: skip


def make(**changes):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**{**SIZES, **changes})).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer


@pytest.mark.parametrize("multipliers, factor", [((1, 2, 2, 4), 8), ((1, 1, 2, 2, 4), 16)])
@pytest.mark.parametrize("normalise", [False, True])
def test_shapes_of_f8_and_f16(multipliers, factor, normalise):
    tokenizer = make(
        image_size=32, channel_multipliers=multipliers, attention_resolutions=(32 // factor,), normalise_codes=normalise
    )
    config = tokenizer.config
    assert (config.factor, config.grid, config.tokens) == (factor, 32 // factor, (32 // factor) ** 2)
    codes = tokenizer.encode(torch.rand(3, 3, 32, 32) * 2 - 1)
    assert codes.shape == (3, config.grid, config.grid) and codes.dtype == torch.int64
    images = tokenizer.decode(codes)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert tokenizer.encode(torch.empty(0, 3, 32, 32)).shape == (0, config.grid, config.grid)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_norms_against_float64_in_both_orders_of_pixels(dtype, tolerance, memory):
    torch.manual_seed(2)
    norm, exact = GroupNorm(4, 8, eps=1e-6), torch.nn.GroupNorm(4, 8, eps=1e-6).double()
    torch.nn.init.normal_(norm.weight)
    exact.load_state_dict(norm.state_dict())
    x = (torch.randn(2, 8, 6, 6) + 1).to(dtype).contiguous(memory_format=memory).requires_grad_()
    y, gradient = x.detach().double().requires_grad_(), torch.randn(2, 8, 6, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        made = norm(x)
    wanted = exact(y)
    assert made.dtype == dtype and made.is_contiguous(memory_format=memory)
    made.backward(gradient)
    wanted.backward(gradient.double())
    pairs = [(made, wanted), (x.grad, y.grad), (norm.weight.grad, exact.weight.grad), (norm.bias.grad, exact.bias.grad)]
    for found, expected in pairs:
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_published_sizes():
    """Parameters of LlamaGen's VQ-16, as the published checkpoint has them."""
    config = ImageTokenizerConfig(code_width=8, normalise_codes=True)
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config)
    assert sum(p.numel() for p in tokenizer.parameters()) == 71_883_403
    assert config.tokens == 256


@pytest.mark.parametrize("normalise", [False, True])
def test_nearest_code_against_all_distances_in_float64(normalise, monkeypatch):
    monkeypatch.setattr("megamug.models.image_tokenizer.vq._DISTANCES", 64)  # parts of a few rows
    torch.manual_seed(1)
    book = Codebook(20, 5, normalise)
    torch.nn.init.normal_(book.embedding.weight)
    latents = torch.randn(50, 5)
    a, b = latents.double(), book.embedding.weight.detach().double()
    if normalise:
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    wanted = (a[:, None] - b[None]).square().sum(2).argmin(1)
    assert len(wanted.unique()) > 10
    prepared = book.prepare(latents)
    assert torch.equal(book.nearest(prepared), wanted)
    torch.testing.assert_close(book.lookup(wanted).double(), b[wanted], atol=1e-6, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.nearest(prepared), wanted)


def test_files_hold_the_whole_tokenizer(tmp_path):
    tokenizer = make(normalise_codes=True)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokenizer.save(tmp_path / "a")
    loaded = ImageTokenizer.load(tmp_path / "a")
    assert loaded.config == tokenizer.config and loaded.fingerprint() == tokenizer.fingerprint()
    codes = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), codes) and torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias[0] += 1e-3
    assert loaded.fingerprint() != tokenizer.fingerprint()
    tokenizer.save(tmp_path / "a")  # of the same sizes: replaced
    assert ImageTokenizer.load(tmp_path / "a").fingerprint() == tokenizer.fingerprint()
    with pytest.raises(UserError, match="other sizes"):
        make(codes=21).save(tmp_path / "a")


def test_no_flipped_bit_of_the_weights_is_believed(tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, draw, refused = path.read_bytes(), random.Random(1), 0
    for place in [*range(0, 400, 7), *(draw.randrange(len(whole)) for _ in range(60))]:  # of the header, and anywhere
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert ImageTokenizer.load(tmp_path).fingerprint() == tokenizer.fingerprint(), place  # white space, a case
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 80


def test_weights_without_a_checksum_are_read(tmp_path):
    """Those of earlier versions."""
    tokenizer = make()
    tokenizer.save(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert ImageTokenizer.load(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_damaged_files_are_told(tmp_path):
    folder = tmp_path / "tokenizer"
    with pytest.raises(UserError, match="config.json: no such file"):
        ImageTokenizer.load(folder)
    make().save(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for damaged in (whole[: len(whole) // 2], whole[:4], b""):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="model.safetensors: damaged or cut short"):
            ImageTokenizer.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        ImageTokenizer.load(folder)
    weights.write_bytes(whole)
    for changed, message in [
        (text.replace('"codes": 20', '"codes": 21'), r"embedding.weight is \[20, 3\] in there, \[21, 3\]"),
        (text.replace('"codes"', '"code"'), "unknown key 'code'; the nearest is 'codes'"),
        (text.replace('"codes": 20,', ""), "codes is missing"),
        (text.replace("megamug-image", "another"), "not the configuration of an image tokenizer"),
        (text[:30], "cannot be read"),
        (text.replace('"norm_groups": 4', '"norm_groups": 3'), "norm_groups"),
    ]:
        assert changed != text
        config.write_text(changed)
        with pytest.raises(UserError, match=message):
            ImageTokenizer.load(folder)


def test_wrong_images_and_codes_are_told():
    tokenizer = make()
    for images, message in [
        (torch.zeros(1, 3, 16, 20), r"shape \[1, 3, 16, 20\], but it was made for \[b, 3, 16, 16\]"),
        (torch.zeros(1, 1, 16, 16), "shape"), (torch.zeros(3, 16, 16), "shape"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "scale them"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            tokenizer.encode(images)
    codes = torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"codes of shape \[1, 8, 7\]"):
        tokenizer.decode(codes[:, :, :7])
    for wrong in (20, -1):
        codes[0, 3, 3] = wrong
        with pytest.raises(UserError, match=f"code {wrong} is outside its codebook of 20"):
            tokenizer.decode(codes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=17), "multiple of 2"), (dict(norm_groups=3), "norm_groups"), (dict(codes=0), "codes is 0"),
        (dict(attention_resolutions=(7,)), r"holds 7, but the levels have \[16, 8\]"),
        (dict(channel_multipliers=()), "channel_multipliers is empty"),
        (dict(channel_multipliers=(1, 0)), "channel_multipliers is 0"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        ImageTokenizerConfig(**{**SIZES, **changes})


def test_bytes_survive_the_scale():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scaled = from_bytes(pixels)
    assert scaled.min() == -1 and scaled.max() == 1 and torch.equal(to_bytes(scaled), pixels)


def test_config_json_is_plain(tmp_path):
    make().save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["channel_multipliers"] == [1, 2] and values["codes"] == 20


def test_the_background_belongs_to_the_tokenizer():
    """White is what it was before there was a choice: fingerprints and folders of then stay good."""
    white, blue = make(), make(background=(0, 0, 255))
    blue.load_state_dict(white.state_dict())
    assert white.fingerprint() != blue.fingerprint()
    sizes = asdict(white.config)
    del sizes["background"]
    assert ImageTokenizerConfig.from_dict(sizes) == white.config
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name, tensor in sorted(white.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    assert white.fingerprint() == digest.hexdigest()
    for wrong in ((1, 2), (0, 0, 256), (0, 0, 0.5)):
        with pytest.raises(UserError, match="background is"):
            ImageTokenizerConfig(**{**SIZES, "background": wrong})
