"""MUG without captions against the public MAE of `transformers`: the same weights, mask and pixels, loss and gradients.

And what "without captions" means: nothing of the text decoder's configuration reaches the loss or a gradient.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamug.models.blocks.positions import sincos_positions
from tests.distributed.cases.layout_worker import micro_batches, tiny

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")

SIZES = {
    "tiny": dict(
        patch_size=8, layers=2, width=32, heads=4, ffn_width=64, decoder_layers=3, decoder_width=48, decoder_heads=4
    ),
    "mid": dict(
        patch_size=16, layers=4, width=192, heads=3, ffn_width=768, decoder_layers=2, decoder_width=128, decoder_heads=8
    ),
}
IMAGE_SIZE = {"tiny": 32, "mid": 128}


def configuration(size: str, norm_pix: bool, **model):
    options = {**SIZES[size], "norm_pix_loss": norm_pix, "register_tokens": 0, "decoder_register_tokens": 0, **model}
    return tiny({
        "model": {"caption_loss_weight": 0.0, **options},
        "data": {"image_size": IMAGE_SIZE[size], "micro_batch_size": 4, "global_batch_size": 4},
    })  # fmt: skip


def ours(config, dtype=torch.float32, vocabulary: int = 70):
    from megamug.models.init import initialise
    from megamug.models.mug.model import Mug
    from megamug.models.mug.plan import MugPlan

    plan = MugPlan(config, vocabulary)
    plan.dtype = dtype
    model = Mug(plan)
    initialise(model.sharded_state_dict(), seed=7)
    return model


def theirs(config):
    """A ViTMAE of the same sizes with random weights, biases and norms included."""
    m = config.model
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        hidden_size=m.width, num_hidden_layers=m.layers, num_attention_heads=m.heads, intermediate_size=m.ffn_width,
        decoder_hidden_size=m.decoder_width, decoder_num_hidden_layers=m.decoder_layers,
        decoder_num_attention_heads=m.decoder_heads, decoder_intermediate_size=4 * m.decoder_width,
        image_size=config.data.image_size, patch_size=m.patch_size, mask_ratio=m.mask_ratio,
        norm_pix_loss=m.norm_pix_loss, layer_norm_eps=1e-6, hidden_act="gelu",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    grid = config.data.image_size // m.patch_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight") or "layernorm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                scale = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(scale * noise)
        # The positions are a table, and tables differ between versions of the library: ours, with a zero row in front.
        for table, width in (
            (model.vit.embeddings.position_embeddings, m.width),
            (model.decoder.decoder_pos_embed, m.decoder_width),
        ):
            table.copy_(sincos_positions(width, grid, grid, prefix=1))
    return model


def layer_in_our_names(layer: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """One transformer layer (parameters or gradients). Megatron's fused rows run [q, k, v] within each head."""
    def fused(kind: str) -> Tensor:
        parts = [layer[f"attention.{p}_proj.{kind}"] for p in "qkv"]
        per_head = [part.view(heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(per_head, dim=1).flatten(0, 1)

    renamed = {
        "input_layernorm": "layernorm_before", "self_attention.linear_proj": "attention.o_proj",
        "pre_mlp_layernorm": "layernorm_after", "mlp.linear_fc1": "mlp.fc1", "mlp.linear_fc2": "mlp.fc2",
    }  # fmt: skip
    kinds = ("weight", "bias")
    return {
        **{f"self_attention.linear_qkv.{kind}": fused(kind) for kind in kinds},
        **{f"{mine}.{kind}": layer[f"{their}.{kind}"] for mine, their in renamed.items() for kind in kinds},
    }


def in_our_names(values: dict[str, Tensor], config) -> dict[str, Tensor]:
    """ViTMAE's parameters or gradients under MUG's names and in MUG's shapes. Every value must find its place."""
    values = {n: v for n, v in values.items() if "position_embeddings" not in n and "pos_embed" not in n}
    result = {}

    def take(name: str) -> Tensor:
        return values.pop(name)

    projection = take("vit.embeddings.patch_embeddings.projection.weight")  # [width, channel, row, column]
    result["encoder.patch_embedding.weight"] = projection.permute(0, 2, 3, 1).flatten(1)
    result["encoder.patch_embedding.bias"] = take("vit.embeddings.patch_embeddings.projection.bias")
    result["encoder.cls_token"] = take("vit.embeddings.cls_token")[0]
    result["image_decoder.mask_token"] = take("decoder.mask_token")[0]
    for kind in ("weight", "bias"):
        result[f"encoder.stack.final_layernorm.{kind}"] = take(f"vit.layernorm.{kind}")
        result[f"image_decoder.stack.final_layernorm.{kind}"] = take(f"decoder.decoder_norm.{kind}")
        result[f"image_decoder.latent_embedding.{kind}"] = take(f"decoder.decoder_embed.{kind}")
        result[f"image_decoder.prediction.{kind}"] = take(f"decoder.decoder_pred.{kind}")
    m = config.model
    for mine, their, layers, heads in (
        ("encoder.stack.layers", "vit.layers", m.layers, m.heads),
        ("image_decoder.stack.layers", "decoder.decoder_layers", m.decoder_layers, m.decoder_heads),
    ):
        for i in range(layers):
            prefix = f"{their}.{i}."
            layer = {n.removeprefix(prefix): take(n) for n in list(values) if n.startswith(prefix)}
            result.update({f"{mine}.{i}.{n}": v for n, v in layer_in_our_names(layer, heads).items()})
    assert not values, f"unmapped: {list(values)}"
    return result


def test_patches_stand_behind_registers(world):
    """Of either stack: which rows of the latent are patches, and which rows of the decoder's output are painted."""
    model = ours(configuration("tiny", True, register_tokens=2, decoder_register_tokens=3))
    decoder, plan = model.image_decoder, model.plan
    torch.nn.init.normal_(decoder.register_tokens)
    latent = torch.randn(1 + 2 + plan.visible, 2, plan.encoder_config.hidden_size)
    visible_ids = torch.stack([torch.randperm(plan.patches)[: plan.visible] for _ in range(2)])
    with torch.no_grad():
        tokens, embedded = decoder.embed(latent, visible_ids), decoder.latent_embedding(latent)
        painted = decoder.predict(tokens)
        assert tokens.shape[0] == plan.decoder_tokens == 1 + 3 + plan.patches
        for row in range(2):
            assert torch.equal(tokens[0, row], embedded[0, row])
            assert torch.equal(tokens[1:4, row], decoder.register_tokens)
            patches = decoder.mask_token.repeat(plan.patches, 1)
            for place, patch in enumerate(visible_ids[row].tolist()):
                patches[patch] = embedded[3 + place, row]
            assert torch.equal(tokens[4:, row], patches + decoder.positions)
            torch.testing.assert_close(painted[row], decoder.prediction(tokens[4:, row]))


def relative(mine: Tensor, their: Tensor) -> float:
    return float((mine - their).norm() / their.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw_pixels"])
@pytest.mark.parametrize("size", list(SIZES))
def test_loss_and_gradients_equal_vitmae(world, size, norm_pix, dtype):
    config = configuration(size, norm_pix)
    reference, model = theirs(config).to(dtype), ours(config, dtype)
    with torch.no_grad():
        mapped = in_our_names(dict(reference.named_parameters()), config)
        parameters = dict(model.named_parameters())
        assert mapped.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert parameter.shape == mapped[name].shape, name
            parameter.copy_(mapped[name])

    (batch,), _ = micro_batches(0, model.plan, config, world)
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (config.data.mean, config.data.std))
    noise = torch.ones(4, model.plan.patches, dtype=dtype).scatter_(1, batch.visible_ids, 0.0)
    noise += torch.linspace(0, 0.5, model.plan.patches, dtype=dtype)  # no ties; the visible patches stay the smallest
    expected = reference(((batch.images.to(dtype) / 255) - mean) / std, noise=noise)
    assert expected.mask.sum() == batch.masked_ids.numel()
    assert expected.mask.gather(1, batch.masked_ids).all()
    expected.loss.backward()

    output, losses = model(batch)
    assert output is None and list(losses) == ["image"]
    total, count = losses["image"]
    loss = total / count
    loss.backward()

    # A fault of convention (biased variance, another eps, another row order) is far above these bounds.
    assert abs(loss.item() - expected.loss.item()) <= 1e-5 * abs(expected.loss.item())
    gradients = in_our_names({n: p.grad for n, p in reference.named_parameters() if p.requires_grad}, config)
    assert gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, gradients[name]) < 1e-4, name


def test_reference_normalises_by_the_unbiased_variance(world):
    """Which convention the reference follows, and that the parity bound above tells the two apart."""
    config = configuration("tiny", True)
    reference = theirs(config)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        output = reference(pixels)
    patches = reference.patchify(pixels)

    def loss(correction: int) -> float:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=correction)
        target = (patches - mean) / (variance + 1e-6).sqrt()
        return float(((output.logits - target).square().mean(-1) * output.mask).sum() / output.mask.sum())

    assert loss(1) == pytest.approx(float(output.loss), rel=1e-6)
    assert abs(loss(0) - float(output.loss)) > 1e-4 * float(output.loss)


def run(model, batch, weights: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(losses, gradients of the weighted sum of mean losses)."""
    model.zero_grad()
    _, losses = model(batch)
    means = {name: total / count for name, (total, count) in losses.items()}
    sum(weights[name] * value for name, value in means.items()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in means.items()}, gradients


def test_caption_weight_zero_is_mae_to_the_bit(world):
    """No text decoder is built, and no size of it, nor a vocabulary, changes a bit of the loss or of a gradient."""
    small = configuration("tiny", True, text_unimodal_layers=1, text_multimodal_layers=2, text_width=48)
    large = configuration("tiny", True, text_unimodal_layers=3, text_multimodal_layers=1, text_width=96, text_heads=2)
    large.model.tie_vocabulary = False
    large.data.caption_length = 64
    models = [ours(small, vocabulary=70), ours(large, vocabulary=1000)]
    (batch,), _ = micro_batches(0, models[0].plan, small, world)
    batch.tokens = None  # nothing may ask for captions
    for model in models:
        assert model.text_decoder is None
        assert not any("text" in name for name, _ in model.named_parameters())
    results = [run(model, batch, {"image": 1.0}) for model in models]
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss["image"], other_loss["image"])
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


def test_mug_approaches_mae_as_the_caption_weight_falls(world):
    """grad(w) = grad(MAE) + w grad(captions): equal to the bit at the image loss, and affine in w."""
    mae = ours(configuration("tiny", True))
    config = configuration("tiny", True, caption_loss_weight=0.5)
    mug = ours(config, vocabulary=70)
    (batch,), _ = micro_batches(0, mug.plan, config, world)
    mae_loss, mae_gradients = run(mae, batch, {"image": 1.0})
    at = {w: run(mug, batch, {"image": 1.0, "caption": w}) for w in (0.0, 1e-3, 1.0)}
    captions = {n: at[1.0][1][n] - mae_gradients[n] for n in mae_gradients}
    for losses, _ in at.values():
        assert torch.equal(losses["image"], mae_loss["image"])  # the same weights by name, the same forward pass
    for name, expected in mae_gradients.items():
        torch.testing.assert_close(at[0.0][1][name], expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(at[1e-3][1][name], expected + 1e-3 * captions[name], rtol=1e-4, atol=1e-6)
    assert all(float(captions[n].norm()) > 0 for n in captions if n.startswith("encoder."))
    assert all(float(captions[n].norm()) == 0 for n in captions if n.startswith("image_decoder."))
