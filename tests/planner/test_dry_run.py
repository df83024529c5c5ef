"""A dry run tells what a run holds: compared with models that are built, and with numbers known from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megamug import cli
from megamug.configuration.reading import resolve, save_config
from megamug.configuration.sections import Config
from megamug.models.mug.model import Mug
from megamug.models.mug.plan import MugPlan
from megamug.planner import dry_run, parameters
from tests.evaluate.tiny_run import make_data, tiny_config

VOCABULARY = 200  # padded to 256
NOWHERE = Path("nowhere")  # nothing is read


def plan_of(pipeline: int = 1, **model) -> MugPlan:
    config = tiny_config(NOWHERE, NOWHERE, register_tokens=3, decoder_register_tokens=2, **model)
    config.parallel.pipeline = pipeline
    return MugPlan(resolve(config), VOCABULARY)


@pytest.mark.parametrize(
    ("pipeline", "model"),
    [(1, {}), (2, {}), (5, {}), (9, {}), (3, {"tie_vocabulary": False}), (2, {"image_loss_weight": 0.0}),
     (3, {"caption_loss_weight": 0.0}), (3, {"text_objective": "masked"})],
)  # fmt: skip
def test_parameters_are_those_of_the_built_stages(world, pipeline, model):
    plan = plan_of(pipeline, **model)
    built = [Mug(plan, stage) for stage in range(pipeline)]
    counted = [parameters.mug_stage(plan, stage) for stage in range(pipeline)]
    assert [c.total for c in counted] == [sum(p.numel() for p in stage.parameters()) for stage in built]
    # What tensor parallelism splits is what Megatron marks as split.
    split = [[p for p in s.parameters() if getattr(p, "tensor_model_parallel", False)] for s in built]
    assert [c.split for c in counted] == [sum(p.numel() for p in own) for own in split]
    assert parameters.total(plan) == sum(p.numel() for p in Mug(plan_of(**model)).parameters())


def plan_of_kind(kind: str, pipeline: int, virtual: int = 1, **sections):
    """A small model; `sections` as {section: {key: value}}."""
    from megamug.models.tasks import model_of

    config = Config()
    presets = {"decoder_lm": "lm_tiny", "jam_cross": "jam_demo"}
    config.model.__dict__.update(kind=kind, preset=presets.get(kind, "demo"))
    config.data.context_length = 16
    config.parallel.__dict__.update(pipeline=pipeline, virtual=virtual)
    for section, keys in sections.items():
        getattr(config, section).__dict__.update(keys)
    plan, model = model_of(kind)
    return plan(resolve(config), VOCABULARY), model


LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "tie_vocabulary": False, "query_groups": 2,
         "qk_norm": True}  # fmt: skip
PER_HEAD = LLAMA | {"qk_norm_per_head": True, "res_post_norm": True}
UNEQUAL = {"layers": 4, "width": 48, "heads": 4, "ffn_width": 96, "bias": True, "norm": "layernorm"}


@pytest.mark.parametrize(
    ("kind", "pipeline", "virtual", "sections"),
    [
        ("decoder_lm", 1, 1, {}),
        ("decoder_lm", 2, 1, {}),
        ("decoder_lm", 2, 2, {"lm": LLAMA}),
        ("decoder_lm", 2, 1, {"lm": PER_HEAD}),
        ("decoder_lm", 4, 1, {"lm": {"bias": True, "norm": "layernorm"}}),
        ("jam_cross", 1, 1, {"fusion": {"freeze": "text", "gate": False}}),
        ("jam_cross", 3, 1, {"text_tower": UNEQUAL, "fusion": {"cross_ffn": False}}),
        ("jam_cross", 2, 2, {"fusion": {"shared_embedding": True, "freeze": "both"}, "image_tower": LLAMA}),
        ("classifier", 2, 2, {"classifier": {"classes": 10}}),
        ("classifier", 1, 1, {"classifier": {"classes": 10, "pool": "class_token"}}),
        ("classifier", 1, 1, {"classifier": {"classes": 10, "frozen": True}}),
        ("classifier", 1, 1, {"classifier": {"classes": 10, "frozen": True, "pool": "attention"}}),
        ("segmenter", 1, 1, {"segmenter": {"classes": 10, "channels": 32}}),
    ],
)
def test_parameters_of_other_models_are_those_of_the_built_stages(world, kind, pipeline, virtual, sections):
    plan, model = plan_of_kind(kind, pipeline, virtual, **sections)
    for stage in range(pipeline * virtual):
        built = model(plan, stage)
        own = list(built.parameters())
        counted, trained = parameters.stage_counts(plan, stage)
        assert counted.total == sum(p.numel() for p in own)
        assert counted.split == sum(p.numel() for p in own if getattr(p, "tensor_model_parallel", False))
        assert trained.total == sum(p.numel() for p in own if p.requires_grad)
    whole = model(plan_of_kind(kind, 1, **sections)[0])
    assert parameters.total(plan) == sum(p.numel() for p in whole.parameters())


def test_vit_l_has_its_published_size():
    """ViT-L/16 with its patch embedding and class token."""
    config = Config()
    config.model.preset, config.model.caption_loss_weight = "vit_l16", 0.0
    plan = MugPlan(resolve(config), 0)
    encoder = parameters.layer(1024, 4096) * 24 + parameters.norm(1024) + parameters.linear(768, 1024)
    assert encoder.total + 1024 == 303_099_904  # timm's 304,326,632 less its head and its position table
    assert parameters.total(plan) > encoder.total


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_memory_is_what_training_allocates(world, dtype, distributed):
    """Weights, gradient buffer, main parameters and moments of a real optimizer, in bytes (one process)."""
    from megamug.training.optim import Optimizer, wrap_chunks

    config = tiny_config(NOWHERE, NOWHERE)
    config.precision.dtype, config.parallel.distributed_optimizer = dtype, distributed
    plan = MugPlan(resolve(config), VOCABULARY)
    models = wrap_chunks([Mug(plan)], config)
    optimizer = Optimizer(config, models)
    states = list(optimizer.main_states())
    count = sum(p.numel() for p in models[0].parameters())
    told = parameters.state_memory(count, count, dtype, replicas=1, distributed_optimizer=distributed)
    assert told.weights == sum(p.nbytes for p in models[0].parameters())
    assert told.gradients == sum(p.main_grad.nbytes for p in models[0].parameters())
    own = [s.main for s in states if dtype == "bf16"]
    assert told.main_parameters == sum(main.nbytes for main in own)
    assert told.moments == sum(s.moment(name).nbytes for s in states for name in ("exp_avg", "exp_avg_sq"))
    assert all(main.dtype == torch.float32 for main in own)


def test_the_distributed_optimizer_shares_out_what_only_updates_need():
    plain = parameters.state_memory(1000, 1000, "bf16", replicas=8, distributed_optimizer=False)
    shared = parameters.state_memory(1000, 1000, "bf16", replicas=8, distributed_optimizer=True)
    assert (plain.weights, plain.gradients, plain.main_parameters, plain.moments) == (2000, 4000, 4000, 8000)
    assert (shared.weights, shared.gradients, shared.main_parameters, shared.moments) == (2000, 4000, 500, 1000)


def test_the_command_tells_of_processes_that_are_not_there(tmp_path, capsys, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = tiny_config(make_data(tmp_path), tmp_path / "run", register_tokens=3, decoder_register_tokens=3)
    config.parallel.__dict__.update(tensor=2, pipeline=2, distributed_optimizer=True)
    precision = {"dtype": "bf16", "fp8": "current", "fp8_parameters": True}  # for Hopper, which need not be here
    config.precision.__dict__.update(precision)
    path = save_config(config)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", str(path), "--dry-run", "--world-size", "8"]) == 0
    told = capsys.readouterr().out
    assert "8 = tensor(2) x pipeline(2) x data(2), distributed optimizer" in told
    assert "fp8 current, layers auto; parameters kept and gathered in FP8" in told
    assert len(re.findall(r"^  stage \d", told, flags=re.MULTILINE)) == 2 and "activations" in told
    total = float(re.search(r"parameters ([\d.]+) M", told)[1])
    assert total == pytest.approx(parameters.total(MugPlan(resolve(config), 330)) / 1e6, abs=0.005)
    assert sorted(tmp_path.rglob("*")) == before
    assert cli.main(["train", str(path), "--world-size", "8"]) == 2
    assert "goes with --dry-run" in capsys.readouterr().err
    assert cli.main(["train", str(path), "--dry-run", "--world-size", "0"]) == 2
    assert cli.main(["train", str(path), "--dry-run"]) == 2  # this machine has one process


def test_shares_of_the_stages_make_up_the_whole():
    config = resolve(tiny_config(NOWHERE, NOWHERE, caption_loss_weight=0.0))
    config.parallel.pipeline = 3
    text = dry_run.layout_text(config, 3)
    shares = [int(share) for share in re.findall(r"(\d+)% of the FLOPs", text)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=2)
