"""Vision transformers of other libraries: the same pixels give the same numbers, there and back is bitwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamug.checkpoint.tensors import TensorReader
from megamug.convert.conversion import from_megamug, to_megamug
from megamug.convert.registry import FORMATS
from megamug.models.blocks.positions import sincos_positions
from tests.convert.common import (
    MEAN,
    PATCH,
    SIZE,
    STD,
    assert_same_bits,
    batch,
    features,
    image_loss,
    images,
    normalised,
    shaken,
    tensors_in,
)  # fmt: skip

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")

SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=SIZE, patch_size=PATCH,
    layer_norm_eps=1e-6,
)  # fmt: skip
HEADS = ["model.heads=4", "model.decoder_heads=2"]


def vitmae():
    model = shaken(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        **SIZES, decoder_hidden_size=48, decoder_num_hidden_layers=3, decoder_num_attention_heads=2,
        decoder_intermediate_size=192, mask_ratio=0.75, norm_pix_loss=True,
    )))  # fmt: skip
    with torch.no_grad():  # the library's table and ours agree to rounding: to the bit, for there and back
        model.vit.embeddings.position_embeddings.copy_(sincos_positions(32, 4, 4, 1))
        model.decoder.decoder_pos_embed.copy_(sincos_positions(48, 4, 4, 1))
    return model


def vitmae_loss(model) -> float:
    with torch.no_grad():
        return float(model(normalised(images()), noise=batch(4)[1]).loss)


def vit():
    model = shaken(transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=False))
    with torch.no_grad():
        model.embeddings.position_embeddings.copy_(sincos_positions(32, 4, 4, 1))
    return model


@pytest.fixture(scope="module")
def mae_folder(tmp_path_factory) -> Path:
    """As transformers writes it, in several files."""
    folder = tmp_path_factory.mktemp("vitmae") / "model"
    vitmae().save_pretrained(folder, max_shard_size="100KB")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def mae_run(mae_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    assert to_megamug(FORMATS["hf_vitmae"], mae_folder, run) == []
    return run


def mae_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ViTMAE's tensors as facebook's MAE keeps them, from the public description of its model (models_mae.py)."""
    renamed = {
        "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
        "mask_token": "decoder.mask_token", "decoder_pos_embed": "decoder.decoder_pos_embed",
    }  # fmt: skip
    modules = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
        "decoder_embed": "decoder.decoder_embed", "decoder_norm": "decoder.decoder_norm",
        "decoder_pred": "decoder.decoder_pred",
    }  # fmt: skip
    result = {mine: state[other] for mine, other in renamed.items()}
    result |= {f"{mine}.{k}": state[f"{other}.{k}"] for mine, other in modules.items() for k in ("weight", "bias")}
    for mine, other, layers in (("blocks", "vit.layers", 2), ("decoder_blocks", "decoder.decoder_layers", 3)):
        for i in range(layers):
            a, b = f"{mine}.{i}", f"{other}.{i}"
            for k in ("weight", "bias"):
                result[f"{a}.attn.qkv.{k}"] = torch.cat([state[f"{b}.attention.{p}_proj.{k}"] for p in "qkv"])
                for x, y in (("norm1", "layernorm_before"), ("attn.proj", "attention.o_proj"),
                             ("norm2", "layernorm_after"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):  # fmt: skip
                    result[f"{a}.{x}.{k}"] = state[f"{b}.{y}.{k}"]
    return result


def test_vitmae_has_the_loss_of_the_library(mae_run):
    expected = vitmae_loss(vitmae())
    assert abs(image_loss(mae_run) - expected) <= 1e-5 * expected


@pytest.mark.parametrize("name", ["hf_vitmae", "hf_vitmae5"])
def test_the_library_reads_what_is_written_of_vitmae(mae_run, tmp_path, name):
    assert from_megamug(FORMATS[name], mae_run, tmp_path / "out", max_shard_bytes=100_000) == []
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_bits(dict(model.state_dict()), dict(vitmae().state_dict()))
    assert vitmae_loss(model.eval()) == vitmae_loss(vitmae())


def test_both_spellings_come_back_to_the_bit(mae_run, mae_folder, tmp_path):
    older, newer = tmp_path / "older", tmp_path / "newer"
    from_megamug(FORMATS["hf_vitmae"], mae_run, older)
    from_megamug(FORMATS["hf_vitmae5"], mae_run, newer)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in tensors_in(older)
    assert "vit.layers.0.attention.q_proj.weight" in tensors_in(newer)
    assert_same_bits(tensors_in(newer), dict(vitmae().state_dict()))
    for folder, name in ((older, "hf_vitmae"), (newer, "hf_vitmae5")):
        to_megamug(FORMATS[name], folder, tmp_path / f"run-{name}")
        from_megamug(FORMATS[name], tmp_path / f"run-{name}", tmp_path / f"again-{name}")
        assert_same_bits(tensors_in(tmp_path / f"again-{name}"), tensors_in(folder))


@pytest.mark.parametrize("kind", ["pth", "legacy.pth", "safetensors"])
def test_facebooks_mae(mae_run, tmp_path, kind):
    state = {name: tensor.contiguous() for name, tensor in mae_names(vitmae().state_dict()).items()}
    path = tmp_path / f"mae.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "pth")
    to_megamug(FORMATS["mae"], path, tmp_path / "run", HEADS)
    ours, expected = TensorReader(tmp_path / "run"), TensorReader(mae_run)
    assert_same_bits({n: ours.read(n) for n in ours.names}, {n: expected.read(n) for n in expected.names})
    from_megamug(FORMATS["mae"], tmp_path / "run", tmp_path / "out")
    assert_same_bits(tensors_in(tmp_path / "out"), state)


def test_maes_encoder_alone(tmp_path):
    state = mae_names(vitmae().state_dict())
    encoder = {name: tensor for name, tensor in state.items() if "decoder" not in name and name != "mask_token"}
    assert len(encoder) == 6 + 2 * 12
    torch.save({"model": encoder}, tmp_path / "mae.pth")
    to_megamug(FORMATS["mae"], tmp_path / "mae.pth", tmp_path / "run", ["model.heads=4"])
    assert all(name.startswith("encoder.") for name in TensorReader(tmp_path / "run").names)
    from_megamug(FORMATS["mae"], tmp_path / "run", tmp_path / "out")
    assert_same_bits(tensors_in(tmp_path / "out"), encoder)


def test_positions_are_maes_own():
    """MAE's numpy code, written again: fixed tables of its files equal ours, most of them to the bit."""
    import numpy as np

    def one(width: int, coordinate: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(width // 2, dtype=float) / (width / 2.0))
        out = np.einsum("m,d->md", coordinate.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    axis = np.arange(14, dtype=np.float32)
    columns, rows = np.meshgrid(axis, axis)
    table = torch.from_numpy(np.concatenate([one(384, columns), one(384, rows)], axis=1)).float()
    difference = (table - sincos_positions(768, 14, 14, 0)).abs()
    assert float(difference.max()) <= 1.2e-7 and float((difference > 0).float().mean()) < 1e-3


@pytest.mark.parametrize("name", ["hf_vit", "hf_vit5"])
def test_vit_has_the_features_of_the_library(tmp_path, name):
    model = vit()
    model.save_pretrained(tmp_path / "model")
    to_megamug(FORMATS[name], tmp_path / "model", tmp_path / "run")
    with torch.no_grad():
        expected = model(normalised(images()).float()).last_hidden_state
    # Our patches come in the order of `visible_ids`, which is the image's own where all are visible.
    torch.testing.assert_close(features(tmp_path / "run"), expected, rtol=1e-4, atol=1e-4)
    from_megamug(FORMATS[name], tmp_path / "run", tmp_path / "out")
    again, info = transformers.ViTModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))
    pixels = transformers.ViTImageProcessor.from_pretrained(tmp_path / "out")
    assert list(pixels.image_mean) == pytest.approx([0.485, 0.456, 0.406])


def test_a_classifier_is_named_to_be_left_out(tmp_path):
    from megamug.errors import UserError

    model = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)))
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.copy_(sincos_positions(32, 4, 4, 1))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    with pytest.raises(UserError, match="2 unknown keys: classifier.bias, classifier.weight"):
        to_megamug(FORMATS["hf_vit"], tmp_path / "model", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    remarks = to_megamug(FORMATS["hf_vit"], tmp_path / "model", tmp_path / "run", allow=["classifier.*"])
    assert remarks == ["left out: 2 tensors, classifier.bias, classifier.weight"]
    with torch.no_grad():
        expected = model.vit(normalised(images())).last_hidden_state
    torch.testing.assert_close(features(tmp_path / "run"), expected, rtol=1e-4, atol=1e-4)


def timm_model(registers: int, **options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=0,
        reg_tokens=registers, **options,
    )  # fmt: skip
    model = shaken(model)
    prefix = model.pos_embed.shape[1] - 16
    with torch.no_grad():
        model.pos_embed.copy_(sincos_positions(32, 4, 4, prefix))
    return model


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_has_the_features_of_the_library(tmp_path, registers):
    model = timm_model(registers)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    to_megamug(FORMATS["timm"], tmp_path / "model.safetensors", tmp_path / "run", ["model.heads=4"])
    with torch.no_grad():
        expected = model.forward_features(normalised(images()))
    torch.testing.assert_close(features(tmp_path / "run"), expected, rtol=1e-4, atol=1e-4)
    from_megamug(FORMATS["timm"], tmp_path / "run", tmp_path / "out")
    again = timm_model(registers)
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    again.load_state_dict(tensors_in(tmp_path / "out"))
    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))


def test_timm_without_positions_of_the_prefix(tmp_path):
    model = timm_model(4, no_embed_class=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    to_megamug(FORMATS["timm"], tmp_path / "model.safetensors", tmp_path / "run", ["model.heads=4"])
    with torch.no_grad():
        expected = model.forward_features(normalised(images()))
    torch.testing.assert_close(features(tmp_path / "run"), expected, rtol=1e-4, atol=1e-4)


def test_the_heads_that_shapes_do_not_tell_are_the_public_models(tmp_path):
    """A wrong number of heads gives wrong features and no error: so it is known or asked for, never guessed."""
    from megamug.errors import UserError

    torch.save({"model": mae_names(vitmae().state_dict())}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="--config model.heads=HEADS"):
        to_megamug(FORMATS["mae"], tmp_path / "mae.pth", tmp_path / "run")
    to_megamug(FORMATS["mae"], tmp_path / "mae.pth", tmp_path / "run", ["model.heads=2", "model.decoder_heads=4"])
    expected = vitmae_loss(vitmae())
    assert abs(image_loss(tmp_path / "run") - expected) > 1e-4 * expected  # ten times the bar of parity


def test_config_json_that_is_not_of_these_tensors(mae_folder, tmp_path):
    import shutil

    from megamug.errors import UserError

    shutil.copytree(mae_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key, value, message in (
        ("num_hidden_layers", 3, "model: its config.json says num_hidden_layers 3 and the tensors are of 2; copy"),
        ("intermediate_size", 128, r"\[64, 32\] where the configuration wants \[128, 32\]"),
        ("hidden_act", "relu", "hidden_act 'relu'"),
        ("decoder_intermediate_size", 100, "4 x its width = 192; .* save its encoder alone"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=message):
            to_megamug(FORMATS["hf_vitmae"], tmp_path / "model", tmp_path / "run")


@pytest.mark.parametrize("form, key, value, said", [
    ("hf_vit", "model_type", "dinov2", "says model_type 'dinov2', and hf_vit computes vit and vit_mae alone"),
    ("hf_vit", "model_type", "vit_msn", "vit_msn"),
    ("hf_vitmae", "model_type", "vit", "says model_type 'vit', and hf_vitmae computes vit_mae alone"),
    ("hf_vit", "hidden_act", "gelu_new", "hidden_act 'gelu_new', and hf_vit computes 'gelu'"),
    ("hf_vit", "qkv_bias", 1, "qkv_bias 1, and hf_vit computes True"),
    ("hf_vit", "layerscale_value", 1.0, "layerscale_value 1.0, which hf_vit does not know"),
    ("hf_vitmae", "norm_pix_loss", "yes", "norm_pix_loss 'yes' where true or false"),
    ("hf_vitmae", "layer_norm_eps", 0, "layer_norm_eps 0 where a number above 0"),
])  # fmt: skip
def test_a_config_json_of_another_function_is_refused(mae_folder, tmp_path, form, key, value, said):
    import shutil

    from megamug.errors import UserError

    shutil.copytree(mae_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=said):
        to_megamug(FORMATS[form], tmp_path / "model", tmp_path / "run", allow=["decoder.*"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processor, mean, std", [
    ({"do_normalize": False}, [0.0] * 3, [1.0] * 3),
    ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 127.5}, [0.25] * 3, [0.125] * 3),
    ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, [0.5] * 3, [0.2] * 3),
    ({}, None, None),
])  # fmt: skip
def test_pixels_become_what_the_library_s_processor_makes_of_them(mae_folder, tmp_path, processor, mean, std):
    """do_normalize, do_rescale and rescale_factor were not looked at."""
    import shutil

    from megamug.configuration.reading import load_config

    shutil.copytree(mae_folder, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    remarks = to_megamug(FORMATS["hf_vitmae"], tmp_path / "model", tmp_path / "run")
    data = load_config(tmp_path / "run" / "config.yaml").data
    if mean is None:
        [remark] = remarks
        assert remark.startswith("nothing (preprocessor_config.json: image_mean, image_std) tells how pixels")
    else:
        assert remarks == [] and data.mean == pytest.approx(mean) and data.std == pytest.approx(std)


def test_timm_s_config_json_decides(tmp_path):
    """The same tensors under the name of another architecture are another function; timm itself is not needed."""
    from megamug.configuration.reading import load_config
    from megamug.errors import UserError

    state = {name: t for name, t in mae_names(vitmae().state_dict()).items() if "decoder" not in name}
    state.pop("mask_token")
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors")
    for described, said in (
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "architecture 'vit_base_patch16_clip_quickgelu_224'"),
        ({"architecture": "vit_base_patch8_224", "model_args": {"act_layer": "relu"}}, "model_args.act_layer 'relu'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(described))
        with pytest.raises(UserError, match=said):
            to_megamug(FORMATS["timm"], tmp_path, tmp_path / "run")
    described = {"architecture": "vit_tiny_patch8_32.mae", "model_args": {"num_heads": 4, "reg_tokens": 0},
                 "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    to_megamug(FORMATS["timm"], tmp_path, tmp_path / "run")
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.model.heads, config.data.mean, config.data.std) == (4, [0.5] * 3, [0.5] * 3)
