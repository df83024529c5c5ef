"""Other projects' image tokenizers: the same codes and the same images, by their own code or by one written here."""

import pytest
import torch
import torch.nn.functional as F

from megamug.convert.image_tokenizer import (
    LAYOUTS,
    find_layout,
    foreign_config,
    from_foreign,
    import_image_tokenizer,
    to_foreign,
)
from megamug.errors import UserError
from megamug.models.image_tokenizer.model import ImageTokenizer, ImageTokenizerConfig

SIZES = dict(
    image_size=16, channels=32, channel_multipliers=(1, 1, 2), residual_blocks=1, attention_resolutions=(4,),
    latent_channels=8, code_width=4, codes=64,
)  # fmt: skip


def make(**changes) -> ImageTokenizer:
    """Random, with norms and codes that matter."""
    torch.manual_seed(3)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(**{**SIZES, **changes}))
    for name, parameter in tokenizer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.3)
    return tokenizer.eval()


def pictures(count=6, side=16):
    cells = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return F.interpolate(cells, side, mode="bilinear")


def codes_of(tokenizer, images):
    """Ours; they must not all be one code, or the comparison would say nothing."""
    codes = tokenizer.encode(images)
    assert len(codes.unique()) > 4
    return codes


@torch.no_grad()
def decoded(tokenizer, codes):
    return tokenizer.images(tokenizer.quantize.lookup(codes))  # not clamped


# The family's network once more, from the papers and the names alone: functions over a state dict of LlamaGen's names.
def conv(p, name, x, **options):
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options)


def norm(p, name, x):
    return F.group_norm(x, 32, p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def swish(x):
    return x * torch.sigmoid(x)


def residual(p, name, x):
    h = conv(p, f"{name}.conv1", swish(norm(p, f"{name}.norm1", x)), padding=1)
    h = conv(p, f"{name}.conv2", swish(norm(p, f"{name}.norm2", h)), padding=1)
    return (conv(p, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in p else x) + h


def attend(p, name, x):
    q, k, v = (conv(p, f"{name}.{part}", norm(p, f"{name}.norm", x)).flatten(2) for part in "qkv")
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, dim=2)
    return x + conv(p, f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))


def llamagen_level(p, name, x):
    block = 0
    while f"{name}.res.{block}.conv1.weight" in p:
        x = residual(p, f"{name}.res.{block}", x)
        if f"{name}.attn.{block}.q.weight" in p:
            x = attend(p, f"{name}.attn.{block}", x)
        block += 1
    return x


def llamagen_middle(p, side, x):
    return residual(p, f"{side}.mid.2", attend(p, f"{side}.mid.1", residual(p, f"{side}.mid.0", x)))


def llamagen_encode(p, images, levels):
    x = conv(p, "encoder.conv_in", images, padding=1)
    for level in range(levels):
        x = llamagen_level(p, f"encoder.conv_blocks.{level}", x)
        if level < levels - 1:
            x = conv(p, f"encoder.conv_blocks.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = swish(norm(p, "encoder.norm_out", llamagen_middle(p, "encoder", x)))
    z = F.normalize(conv(p, "quant_conv", conv(p, "encoder.conv_out", x, padding=1)), dim=1)
    book = F.normalize(p["quantize.embedding.weight"], dim=1)
    return torch.cdist(z.flatten(2).transpose(1, 2), book).argmin(2).view(z.shape[0], *z.shape[2:])


def llamagen_decode(p, codes, levels):
    book = F.normalize(p["quantize.embedding.weight"], dim=1)
    x = conv(p, "decoder.conv_in", conv(p, "post_quant_conv", book[codes].permute(0, 3, 1, 2)), padding=1)
    x = llamagen_middle(p, "decoder", x)
    for level in range(levels):
        x = llamagen_level(p, f"decoder.conv_blocks.{level}", x)
        if level < levels - 1:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(p, f"decoder.conv_blocks.{level}.upsample.conv", x, padding=1)
    return conv(p, "decoder.conv_out", swish(norm(p, "decoder.norm_out", x)), padding=1)


def test_llamagen_gives_the_codes_and_images_of_an_implementation_of_its_own():
    tokenizer, images = make(normalise_codes=True), pictures()
    foreign = to_foreign(tokenizer.config, tokenizer.state_dict(), "llamagen")
    with torch.no_grad():
        codes = codes_of(tokenizer, images)
        assert torch.equal(llamagen_encode(foreign, images, 3), codes)
        torch.testing.assert_close(llamagen_decode(foreign, codes, 3), decoded(tokenizer, codes), atol=1e-4, rtol=1e-4)


def test_transformers_chameleon_gives_the_same_codes():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer, images = make(), pictures()
    config = transformers.ChameleonVQVAEConfig(**foreign_config(tokenizer.config, "chameleon"))
    theirs = transformers.ChameleonVQVAE(config).eval()
    theirs.load_state_dict(to_foreign(tokenizer.config, tokenizer.state_dict(), "chameleon"), strict=True)
    with torch.no_grad():
        codes = theirs.encode(images).image_tokens.view(-1, 4, 4)
    assert torch.equal(codes, codes_of(tokenizer, images))


def test_transformers_janus_gives_the_same_codes_and_images():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    tokenizer, images = make(normalise_codes=True), pictures()
    theirs = JanusVQVAE(JanusVQVAEConfig(**foreign_config(tokenizer.config, "janus"))).eval()
    theirs.load_state_dict(to_foreign(tokenizer.config, tokenizer.state_dict(), "janus"), strict=True)
    with torch.no_grad():
        codes = codes_of(tokenizer, images)
        assert torch.equal(theirs.encode(images).image_tokens.view(-1, 4, 4), codes)
        torch.testing.assert_close(theirs.decode(codes.flatten(1)), decoded(tokenizer, codes), atol=1e-4, rtol=1e-4)
    # and back: what transformers saves is what we had, its codes being on the unit sphere now
    _, ours = from_foreign({f"model.vqmodel.{n}": t for n, t in theirs.state_dict().items()}, 16)
    for name, tensor in tokenizer.state_dict().items():
        wanted = F.normalize(tensor, dim=-1) if "embedding" in name else tensor
        torch.testing.assert_close(ours[name], wanted)


@pytest.mark.parametrize("changes", [{}, dict(norm_groups=8, channels=16, attention_resolutions=(8, 4), code_width=8)])
def test_diffusers_gives_the_same_codes_and_images(changes):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    tokenizer, images = make(**changes), pictures()
    theirs = diffusers.VQModel(**foreign_config(tokenizer.config, "diffusers")).eval()
    theirs.load_state_dict(to_foreign(tokenizer.config, tokenizer.state_dict(), "diffusers"), strict=True)
    with torch.no_grad():
        codes = codes_of(tokenizer, images)
        latents = theirs.encode(images).latents
        assert torch.equal(theirs.quantize(latents)[2][2].view(-1, 4, 4), codes)
        torch.testing.assert_close(theirs.decode(latents).sample, decoded(tokenizer, codes), atol=1e-4, rtol=1e-4)
    config, ours = from_foreign(theirs.state_dict(), 16, norm_groups=tokenizer.config.norm_groups)
    assert config == tokenizer.config
    assert all(torch.equal(ours[name], tensor) for name, tensor in tokenizer.state_dict().items())


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "chameleon"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "model.vqmodel."])
def test_there_and_back(layout, prefix):
    tokenizer = make(normalise_codes=layout in ("janus", "llamagen"))
    tensors = tokenizer.state_dict()
    if tokenizer.config.normalise_codes:
        tensors["quantize.embedding.weight"] = F.normalize(tensors["quantize.embedding.weight"], dim=-1)
    foreign = {prefix + name: tensor for name, tensor in to_foreign(tokenizer.config, tensors, layout).items()}
    assert len(foreign) == len(tensors) and find_layout(foreign) == (layout, prefix)
    foreign |= {prefix + "loss.discriminator.main.0.weight": torch.ones(1), "quantize.codebook_used": torch.zeros(4)}
    if prefix:
        foreign["model.layers.0.weight"] = torch.ones(2)  # of the model around it
    config, ours = from_foreign(foreign, 16)
    assert config == tokenizer.config and list(ours) == list(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(ours[name], tensor)


def test_names_are_those_that_are_published():
    """From the published checkpoints' lists of keys."""
    normal, unit = make(), make(normalise_codes=True)
    taming = to_foreign(normal.config, normal.state_dict(), "taming")
    llamagen = to_foreign(unit.config, unit.state_dict(), "llamagen")
    diffusers = to_foreign(normal.config, normal.state_dict(), "diffusers")
    assert {"encoder.down.0.downsample.conv.weight", "encoder.down.2.attn.0.proj_out.bias",
            "decoder.mid.attn_1.q.weight", "decoder.up.2.upsample.conv.bias",
            "encoder.down.2.block.0.nin_shortcut.weight"} <= set(taming)  # fmt: skip
    assert "decoder.up.0.upsample.conv.weight" not in taming
    assert {"encoder.conv_blocks.2.res.0.nin_shortcut.bias", "encoder.mid.1.proj_out.weight",
            "decoder.conv_blocks.0.attn.1.norm.weight",
            "decoder.conv_blocks.0.upsample.conv.weight"} <= set(llamagen)  # fmt: skip
    assert {"encoder.down_blocks.2.attentions.0.to_out.0.weight", "encoder.mid_block.attentions.0.group_norm.weight",
            "decoder.up_blocks.1.resnets.0.conv_shortcut.weight", "decoder.conv_norm_out.bias",
            "decoder.up_blocks.0.upsamplers.0.conv.weight"} <= set(diffusers)  # fmt: skip
    assert diffusers["encoder.mid_block.attentions.0.to_q.weight"].dim() == 2


def test_old_diffusers_attention_is_read():
    tokenizer = make()
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    foreign = {}
    for name, tensor in to_foreign(tokenizer.config, tokenizer.state_dict(), "diffusers").items():
        for today, before in new.items():
            name = name.replace(f".{today}.", f".{before}.")
        foreign[name] = tensor
    config, ours = from_foreign(foreign, 16)
    assert config == tokenizer.config
    assert torch.equal(ours["encoder.mid.attn_1.k.bias"], tokenizer.encoder.mid.attn_1.k.bias)


def test_a_normalised_codebook_means_the_same_without_normalisation():
    unit, images = make(normalise_codes=True), pictures()
    config, tensors = from_foreign(to_foreign(unit.config, unit.state_dict(), "taming"), 16)
    assert not config.normalise_codes
    plain = ImageTokenizer(config).eval()
    plain.load_state_dict(tensors)
    codes = codes_of(unit, images)
    assert torch.equal(plain.encode(images), codes)
    torch.testing.assert_close(plain.decode(codes), unit.decode(codes), atol=1e-5, rtol=1e-5)


def test_a_file_becomes_a_folder(tmp_path):
    from safetensors.torch import save_file

    tokenizer, images = make(), pictures()
    taming = {f"first_stage_model.{n}": t.contiguous() for n, t in tokenizer.state_dict().items()}
    torch.save({"state_dict": taming}, tmp_path / "last.ckpt")
    save_file(taming, tmp_path / "model.safetensors")
    for file in ("last.ckpt", "model.safetensors"):
        made = import_image_tokenizer(tmp_path / file, tmp_path / f"{file}-out", 16)
        assert torch.equal(made.encode(images), tokenizer.encode(images))
        assert made.fingerprint() == tokenizer.fingerprint()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="cut.safetensors"):
        import_image_tokenizer(tmp_path / "cut.safetensors", tmp_path / "never", 16)
    with pytest.raises(UserError, match="nowhere"):
        import_image_tokenizer(tmp_path / "nowhere.ckpt", tmp_path / "never", 16)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("layout, config, said", [
    ("diffusers", {"norm_type": "spatial"}, "norm_type 'spatial', and vq_diffusers computes 'group'"),
    ("diffusers", {"act_fn": "gelu"}, "act_fn 'gelu'"),
    ("diffusers", {"_class_name": "AutoencoderKL"}, "_class_name 'AutoencoderKL', and vq_diffusers computes VQModel"),
    ("diffusers", {"latents_mean": [1.0]}, "latents_mean"),
    ("diffusers", {"norm_num_groups": 8}, "norm_num_groups 8, and --config norm_groups=32"),
    ("janus", {"vq_config": {"double_latent": True}, "model_type": "janus"}, "double_latent True"),
    ("janus", {"model_type": "llava"}, "model_type 'llava'"),
    ("janus", {"num_patches": 8}, "8 codes a side at 3 resolutions, images of 32 pixels, and --config image_size=16"),
])  # fmt: skip
def test_a_config_json_of_what_ours_does_not_compute_is_refused(tmp_path, layout, config, said):
    import json

    from safetensors.torch import save_file

    tokenizer = make(normalise_codes=layout == "janus")
    foreign = to_foreign(tokenizer.config, tokenizer.state_dict(), layout)
    save_file({name: tensor.contiguous() for name, tensor in foreign.items()}, tmp_path / "model.safetensors")
    own = foreign_config(tokenizer.config, layout)
    (tmp_path / "config.json").write_text(json.dumps(own))
    import_image_tokenizer(tmp_path, tmp_path / "out", 16)
    (tmp_path / "config.json").write_text(json.dumps(own | config))
    with pytest.raises(UserError, match=said):
        import_image_tokenizer(tmp_path, tmp_path / "never", 16, norm_groups=32)
    assert not (tmp_path / "never").exists()


def test_mistakes_are_told():
    tokenizer = make()
    tensors = dict(tokenizer.state_dict())

    def refused(changed, message, **options):
        with pytest.raises(UserError, match=message):
            from_foreign(changed, 16, **options)

    without = {name: tensor for name, tensor in tensors.items() if name != "decoder.up.1.block.0.conv1.weight"}
    refused(without, "decoder.up.1.block.0.conv1.weight is missing")
    refused({n: t for n, t in tensors.items() if "encoder.conv_in" not in n}, "encoder.conv_in.weight is missing")
    refused(tensors | {"encoder.extra.weight": torch.ones(1)}, "encoder.extra.weight and 0 more have no place")
    refused(tensors | {"quant_conv.weight": torch.ones(4, 16, 1, 1)}, r"quant_conv.weight is \[4, 16, 1, 1\], but")
    refused({n: t for n, t in tensors.items() if not n.startswith("decoder.")}, "has no decoder")
    refused({"quantize.embed.weight": torch.ones(4, 4)}, "Gumbel")
    refused({"a": torch.ones(1)}, "no image tokenizer in there")
    refused(tensors | {"b.quantize.embedding.weight": torch.ones(4, 4)}, "several image tokenizers")
    for changes, layout, message in [
        ({}, "llamagen", "not normalised"),
        (dict(normalise_codes=True, attention_resolutions=()), "janus", "attention"),
        (dict(norm_groups=8), "taming", "8 groups"), (dict(middle_attention=False), "taming", "in the middle"),
        (dict(middle_attention=False), "chameleon", "in the middle"), ({}, "dalle", "no layout 'dalle'"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            to_foreign(ImageTokenizerConfig(**{**SIZES, **changes}), {}, layout)
