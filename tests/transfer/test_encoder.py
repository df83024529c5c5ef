"""An encoder in three lines: what the trained model computes, and what the libraries compute of what is exported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import megamug
from megamug.convert.conversion import from_megamug, to_megamug
from megamug.convert.registry import FORMATS
from megamug.errors import UserError
from megamug.generation.captions import all_visible, encode
from megamug.generation.loading import load_run
from megamug.models.mug.model import MugBatch
from megamug.transfer.encoder import load_encoder, resampled_positions
from tests.distributed.launch import ROOT, environment
from tests.transfer.common import LAYERS, PATCH, SIZE, WIDTH, photograph, write_encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("run") / "run")


def pixels(count: int = 3, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("registers", [0, 2])
def test_features_are_those_of_the_model_that_was_trained(tmp_path, registers):
    folder = write_encoder(tmp_path / "run", f"model.register_tokens={registers}")
    with load_run(folder) as loaded, torch.no_grad():
        nothing_hidden = all_visible(MugBatch(None, None, pixels()), (SIZE // PATCH) ** 2)
        expected = encode(loaded.model, nothing_hidden).transpose(0, 1)
    encoder = megamug.load_encoder(folder)
    found = encoder(pixels(), layers=[0, -1])
    assert (found.class_token - expected[:, 0]).abs().max() < 2e-6
    patches = expected[:, 1 + registers :]
    assert (found.patches.flatten(1, 2) - patches).abs().max() < 2e-6
    assert (found.mean - patches.mean(1)).abs().max() < 2e-6
    assert found.registers.shape == (3, registers, WIDTH)
    assert [tuple(layer.shape) for layer in found.layers] == [(3, 4, 4, WIDTH)] * 2
    assert (encoder.norm(found.layers[1]) - found.patches).abs().max() < 2e-6
    assert torch.equal(encoder(encoder.preprocess.normalised(pixels())).mean, encoder(pixels()).mean)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["timm", "hf_vit", "hf_vit5", "mae"])
def test_an_exported_encoder_is_read_back_to_the_bit(run, tmp_path, name):
    from_megamug(FORMATS[name], run, tmp_path / "out")
    if name == "mae":  # the file alone does not tell the heads of a width that no public model has
        with pytest.raises(UserError, match="heads"):
            load_encoder(tmp_path / "out")
        return
    expected, found = load_encoder(run)(pixels()), load_encoder(tmp_path / "out")(pixels())
    assert torch.equal(found.class_token, expected.class_token) and torch.equal(found.patches, expected.patches)


def test_a_run_a_checkpoint_and_a_step_are_the_same(run):
    expected = load_encoder(run)(pixels()).mean
    assert torch.equal(load_encoder(run / "checkpoints" / "step-00000000")(pixels()).mean, expected)
    assert torch.equal(load_encoder(run, step=0)(pixels()).mean, expected)


JPEGS = [photograph(50, 36), photograph(36, 50, seed=1), photograph(90, 61, seed=2), photograph(32, 32, seed=3)]


def close(found, encoder, bound: float) -> None:
    """`found`: tokens [b, 1 + N, h] behind the final norm, of `JPEGS`."""
    expected = encoder(encoder.preprocess(JPEGS))
    tokens = torch.cat([expected.class_token[:, None], expected.patches.flatten(1, 2)], dim=1)
    distance = (found - tokens).abs().max()
    assert distance < bound, distance


def test_transformers_makes_the_same_of_the_same_files(run, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `dev`)")
    from PIL import Image

    from_megamug(FORMATS["hf_vit"], run, tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    import io

    pictures = [Image.open(io.BytesIO(data)) for data in JPEGS]
    with torch.no_grad():
        found = model(processor(pictures, return_tensors="pt")["pixel_values"]).last_hidden_state
    close(found, load_encoder(run), 1e-4)


@pytest.mark.parametrize("registers", [0, 2])
def test_timm_makes_the_same_of_the_same_files(tmp_path, registers):
    timm = pytest.importorskip("timm", reason="timm is not installed (extra `eval`)")
    import io

    from PIL import Image

    run = write_encoder(tmp_path / "run", f"model.register_tokens={registers}", "data.mean=[0.5,0.4,0.3]")
    from_megamug(FORMATS["timm"], run, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    assert (*data["input_size"], *data["mean"], data["crop_pct"]) == (3, SIZE, SIZE, 0.5, 0.4, 0.3, 0.875)
    transform = timm.data.create_transform(**data, is_training=False)
    images = torch.stack([transform(Image.open(io.BytesIO(data))) for data in JPEGS])
    with torch.no_grad():
        found = model.forward_features(images)
    close(torch.cat([found[:, :1], found[:, 1 + registers :]], dim=1), load_encoder(run), 1e-4)
    encoder = load_encoder(run)
    assert (encoder.preprocess(JPEGS) - images).abs().max() < 1e-6
    with torch.no_grad():
        expected = model.forward_features(images)[:, 0]
    assert (encoder(images).class_token - expected).abs().max() < 1e-5


def test_three_lines_and_nothing_left_behind(run, tmp_path):
    (tmp_path / "cat.png").write_bytes(photograph(40, 40, mode="RGBA", kind="PNG"))
    script = f"""
import sys
import megamug
assert not {{"torch", "PIL", "numpy"}} & {{*sys.modules}}, "loaded before it was used"
encoder = megamug.load_encoder({str(run)!r})
images = encoder.preprocess([{str(tmp_path / "cat.png")!r}])
features = encoder(images)
import torch.distributed
assert not torch.distributed.is_initialized() and "megatron" not in sys.modules
print(*features.mean.shape)
"""
    result = subprocess.run([sys.executable, "-W", "error::UserWarning:megamug", "-c", script], env=environment(),
                            cwd=ROOT, capture_output=True, text=True, timeout=100)  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, f"1 {WIDTH}\n", "")


def test_gradients_and_other_types(run):
    encoder = load_encoder(run)
    assert not encoder(pixels()).mean.requires_grad and not encoder.training
    images = encoder.preprocess.normalised(pixels()).requires_grad_()
    encoder(images).class_token.sum().backward()
    assert images.grad.abs().sum() > 0 and encoder.class_token.grad is None
    encoder.requires_grad_()(pixels()).mean.sum().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if name != "register_tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = load_encoder(run, dtype=torch.bfloat16)(pixels()).mean
    assert half.dtype == torch.bfloat16
    assert (half.float() - load_encoder(run)(pixels()).mean).abs().max() < 0.1


def test_other_sizes_see_the_picture_on_a_resampled_grid(run):
    encoder = load_encoder(run, image_size=64)
    features = encoder(encoder.preprocess([photograph(80, 70)]))
    assert features.patches.shape == (1, 8, 8, WIDTH)
    assert encoder.positions.shape == (64, WIDTH)
    assert torch.equal(resampled_positions(WIDTH, 4, 4), load_encoder(run).positions)
    if importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision"):  # which it imports
        from timm.layers import resample_abs_pos_embed

        table = resampled_positions(WIDTH, 4, 4)[None]
        expected = resample_abs_pos_embed(table, [8, 8], num_prefix_tokens=0)[0]
        assert (encoder.positions - expected).abs().max() < 1e-6


def test_untrained_it_is_what_the_run_began_with(tmp_path):
    """Another seed, another beginning; the numbers are those that a model is built with."""
    from megamug.models.init import draw

    encoder = load_encoder(write_encoder(tmp_path / "a", "seed=5"), untrained=True)
    name = "encoder.stack.layers.1.mlp.linear_fc1.weight"
    assert torch.equal(encoder.blocks[1].fc1.weight, draw(name, (64, WIDTH), 5))
    assert torch.equal(encoder.norm.weight, torch.ones(WIDTH))
    other = load_encoder(write_encoder(tmp_path / "b", "seed=6"), untrained=True)
    assert not torch.equal(other.blocks[1].fc1.weight, encoder.blocks[1].fc1.weight)
    from_megamug(FORMATS["timm"], tmp_path / "a", tmp_path / "timm")
    with pytest.raises(UserError, match="does not tell what it began with"):
        load_encoder(tmp_path / "timm", untrained=True)
    assert "GELU" in load_encoder(tmp_path / "timm").remarks[0] and encoder.remarks == []
    to_megamug(FORMATS["timm"], tmp_path / "timm", tmp_path / "back")
    with pytest.raises(UserError, match="weights of another library"):
        load_encoder(tmp_path / "back", untrained=True)
    continued = write_encoder(tmp_path / "c", "model.initial=x")
    with pytest.raises(UserError, match="began with the weights of .*/x"):
        load_encoder(continued, untrained=True)


def test_mistakes_are_told(run, tmp_path):
    def refused(match: str, path=run, **options):
        with pytest.raises(UserError, match=match):
            load_encoder(path, **options)

    refused("no multiple of the patch size 8; the nearest below is 24", image_size=30)
    refused("has no checkpoint of step 7", step=7)
    refused("does not exist", tmp_path / "nowhere")
    refused("is a checkpoint already", run / "checkpoints" / "step-00000000", step=3)
    (tmp_path / "empty").mkdir()
    refused("holds none of", tmp_path / "empty")
    from_megamug(FORMATS["timm"], run, tmp_path / "timm")
    refused("leave step out", tmp_path / "timm", step=1)
    file = tmp_path / "timm" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if name != "norm.weight"}, file)
    refused("taken as timm it lacks norm.weight", tmp_path / "timm")
    save_file(tensors | {"blocks.0.ls1.gamma": torch.ones(32)}, file)
    refused("would not use, blocks.0.ls1.gamma", tmp_path / "timm")
    save_file(tensors | {"pos_embed": tensors["pos_embed"] + 0.1}, file)
    refused("it was learned", tmp_path / "timm")
    save_file({"a.weight": torch.ones(2)}, file)
    (tmp_path / "timm" / "config.json").unlink()
    refused("no image encoder that is known", tmp_path / "timm")

    encoder = load_encoder(run)
    for images, match in [
        (torch.zeros(1, 3, 16, 16), r"\[b, 3, 32, 32\] wanted, not \[1, 3, 16, 16\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "int64"),
        ([1], "not list"),
    ]:
        with pytest.raises(UserError, match=match):
            encoder(images)
    with pytest.raises(UserError, match=f"no block {LAYERS}; there are 0 to {LAYERS - 1}"):
        encoder(pixels(), layers=[LAYERS])
