"""Classifiers in other libraries: their logits are the run's, whatever the head reads."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import megamug
from megamug.checkpoint.tensors import LazyTensor, write_run
from megamug.convert.conversion import from_megamug
from megamug.convert.registry import FORMATS
from megamug.convert.vision import classifier
from megamug.errors import UserError
from megamug.models.classifier.model import STANDARDISED_EPS, ClassBatch, Classifier
from megamug.models.classifier.plan import ClassifierPlan
from megamug.models.init import initialise
from tests.distributed.cases.classifier_case import CLASSES, sample, tiny

HEADS = {
    "mean": {"pool": "mean"}, "class_token": {"pool": "class_token"},
    "probe": {"pool": "class_token", "frozen": True}, "probe of the mean": {"pool": "mean", "frozen": True},
    "plain probe": {"pool": "class_token", "frozen": True, "batch_norm": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> dict[tuple, tuple]:
    """By head and number of registers: (run folder, its images as timm takes them, its logits, its classifier)."""
    found = {}
    for name, head in HEADS.items():
        for registers in (0, 3):
            config = tiny({"classifier": {"classes": CLASSES, **head}, "model": {"register_tokens": registers}})
            plan = ClassifierPlan(config, 0)
            model = Classifier(plan).eval()
            initialise(model.sharded_state_dict(), seed=3)
            entries = {entry.key: entry.data for entry in model.sharded_state_dict().values()}
            with torch.no_grad():
                for key, tensor in entries.items():
                    noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(key)))
                    tensor.add_(0.3 * noise)
                bytes_ = torch.stack([sample(i, plan)[0] for i in range(4)])
                logits = model.logits(ClassBatch(bytes_, torch.zeros(4, dtype=torch.int64)))
            run = tmp_path_factory.mktemp("runs") / "run"
            lazy = [LazyTensor(key, tuple(t.shape), t.dtype, lambda t=t: t) for key, t in entries.items()]
            write_run(run, config, lazy)
            (run / "classes.txt").write_text("".join(f"kind {n}\n" for n in range(CLASSES)))
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.data.mean, config.data.std))
            found[name, registers] = run, (bytes_ / 255 - mean) / std, logits.detach(), entries
    return found


def timm_logits(tensors: dict, described: dict, images: torch.Tensor) -> torch.Tensor:
    """timm's VisionTransformer written down: of its tensors and arguments."""
    arguments, pool = described["model_args"], described["global_pool"]
    pooled_norm = arguments.get("fc_norm", pool == "avg")
    patch, heads, registers = arguments["patch_size"], arguments["num_heads"], arguments["reg_tokens"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    x = F.conv2d(images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], patch)
    x = x.flatten(2).transpose(1, 2)
    prefix = [tensors["cls_token"], *([tensors["reg_token"]] if registers else [])]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], 1) + tensors["pos_embed"]
    for i in range(arguments["depth"]):
        at = f"blocks.{i}."
        q, k, v = linear(norm(x, at + "norm1"), at + "attn.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), at + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, at + "norm2"), at + "mlp.fc1")), at + "mlp.fc2")
    x = x if pooled_norm else norm(x, "norm")
    x = x[:, 1 + registers :].mean(1) if pool == "avg" else x[:, 0]
    return linear(norm(x, "fc_norm") if pooled_norm else x, "head")


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_timm(runs, tmp_path, name, registers):
    run, images, logits, entries = runs[name, registers]
    from_megamug(FORMATS["timm"], run, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["num_classes"] == CLASSES and described["label_names"][2] == "kind 2"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(timm_logits(tensors, described, images), logits, rtol=1e-4, atol=1e-4)
    assert float(logits.std()) > 0.1
    for one, other in zip(*(vars(megamug.load_encoder(path)(images)).values() for path in (run, tmp_path / "out")),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    timm = pytest.importorskip("timm", reason="timm is not installed, or torchvision is not")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)
        alone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
        features = megamug.load_encoder(run)(images)
        wanted = features.mean if "mean" in name else features.class_token
        torch.testing.assert_close(alone(images), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_its_encoder_gives_what_the_linear_reads(runs, name):
    run, images, logits, entries = runs[name, 3]
    features = megamug.load_encoder(run)(images)
    read = features.mean if "mean" in name else features.class_token
    if "head.standardised.running_mean" in entries:
        read = (read - entries["head.standardised.running_mean"]) * (
            entries["head.standardised.running_var"] + STANDARDISED_EPS
        ).rsqrt()
    found = F.linear(read, entries["head.linear.weight"], entries["head.linear.bias"])
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert classifier.EPS == STANDARDISED_EPS


@pytest.mark.parametrize("name", ["class_token", "probe", "plain probe"])
@pytest.mark.parametrize("form", ["hf_vit", "hf_vit5"])
def test_logits_are_those_of_transformers(runs, tmp_path, name, form):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    run, images, logits, _ = runs[name, 0]
    from_megamug(FORMATS[form], run, tmp_path / "out")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, logits, rtol=1e-4, atol=1e-4)
    assert model.config.id2label[2] == "kind 2" and model.config.num_labels == CLASSES


def test_what_a_format_does_not_have_is_told(runs, tmp_path):
    with pytest.raises(UserError, match=r"hf_vit classifies by the class token, and the model by classifier.pool=mean"):
        from_megamug(FORMATS["hf_vit"], runs["mean", 0][0], tmp_path / "out")
    with pytest.raises(UserError, match="mae has no register tokens, and the model has 3"):
        from_megamug(FORMATS["mae"], runs["mean", 3][0], tmp_path / "out")
    with pytest.raises(UserError, match="is a model of kind classifier; hf_vitmae is one of kind mug"):
        from_megamug(FORMATS["hf_vitmae"], runs["mean", 0][0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pth_is_what_maes_scripts_read(runs, tmp_path):
    run, images, logits, _ = runs["mean", 0]
    from_megamug(FORMATS["mae"], run, tmp_path / "out", pth=True)
    found = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert found.keys() == {"model"} and [path.name for path in (tmp_path / "out").iterdir()] == ["model.pth"]
    arguments = {"patch_size": 8, "num_heads": 4, "reg_tokens": 0, "depth": 3}
    described = {"model_args": arguments, "global_pool": "avg"}
    torch.testing.assert_close(timm_logits(found["model"], described, images), logits, rtol=1e-4, atol=1e-4)
