"""The planner against what it speaks of: the models' own plans, what autograd keeps, torch's FLOP counter; and the
command. Its times: test_time.py."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megamug import cli
from megamug.configuration import validate, validate_precision
from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config
from megamug.errors import UserError
from megamug.models.blocks import cpu_linear
from megamug.models.mug.model import Mug, MugBatch
from megamug.models.mug.plan import MugPlan
from megamug.planner import parameters
from megamug.planner import search as planner
from megamug.planner.memory import (
    GIB,
    Layout,
    in_flight,
    kept_bytes,
    memory,
    rank_parameters,
    stage_bytes,
    stages_of,
)
from megamug.planner.model import model_of

VOCABULARY = 256
ROOT = Path(__file__).parents[2]
JAM = str(ROOT / "examples/jam/jam_2x7b_64node.yaml")
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "tie_vocabulary": False, "query_groups": 2,
         "qk_norm": True}  # fmt: skip
PER_HEAD = LLAMA | {"qk_norm_per_head": True, "res_post_norm": True}
OPT = {"bias": True, "norm": "layernorm", "activation": "relu"}
SMALL = {"layers": 4, "width": 64, "heads": 4, "ffn_width": 256}
UNEQUAL = {"layers": 3, "width": 48, "heads": 4, "ffn_width": 96, "bias": True, "norm": "layernorm"}


def configuration(kind: str, dtype: str = "fp32", recompute: str = "none", **sections) -> Config:
    """A small model; `sections` as {section: {key: value}}."""
    config = Config()
    preset = {"decoder_lm": "lm_tiny", "jam_cross": "jam_demo"}.get(kind, "demo")
    config.model.__dict__.update(kind=kind, preset=preset, register_tokens=3, decoder_register_tokens=2)
    config.data.__dict__.update(context_length=64, image_size=64, caption_length=24, micro_batch_size=2)
    config.precision.dtype, config.parallel.recompute = dtype, recompute
    if kind in ("mug", "classifier", "segmenter"):
        config.model.__dict__.update(layers=3, width=96, ffn_width=384)
    if kind == "jam_cross":
        config.text_tower.__dict__.update(SMALL)
        config.image_tower.__dict__.update(SMALL)
    for section, keys in sections.items():
        getattr(config, section).__dict__.update(keys)
    return resolve(config)


def built(config: Config, stage: int = 0):
    """(plan, the model's stage)."""
    if config.model.kind == "mug":
        plan = MugPlan(config, VOCABULARY if config.model.caption_loss_weight > 0 else 0)
        return plan, Mug(plan, stage)
    from megamug.models.tasks import model_of as classes_of

    plan_class, model_class = classes_of(config.model.kind)
    plan = plan_class(config, VOCABULARY)
    return plan, model_class(plan, stage)


def planned(config: Config):
    captions = config.model.kind != "mug" or config.model.caption_loss_weight > 0
    return model_of(config, VOCABULARY if captions else 0)


MODELS = [
    ("mug", {}),
    ("mug", {"model": {"caption_loss_weight": 0.0}}),
    ("mug", {"model": {"image_loss_weight": 0.0, "tie_vocabulary": False}}),
    ("mug", {"model": {"text_objective": "masked"}}),
    ("decoder_lm", {}),
    ("decoder_lm", {"lm": LLAMA}),
    ("decoder_lm", {"lm": OPT}),
    ("decoder_lm", {"lm": {**PER_HEAD, "norm": "layernorm"}}),
    ("decoder_lm", {"lm": {"positions": "rotary_grid", "grid": 8}}),
    ("jam_cross", {}),
    ("jam_cross", {"text_tower": UNEQUAL, "fusion": {"cross_ffn": False, "gate": False}}),
    ("jam_cross", {"fusion": {"freeze": "text"}, "image_tower": OPT}),
    ("jam_cross", {"fusion": {"shared_embedding": True, "freeze": "both"}, "image_tower": LLAMA}),
    ("jam_cross", {"text_tower": SMALL | {"qk_norm": True, "qk_norm_per_head": True}}),
]


CLASSIFIERS = [("classifier", {"classifier": {"classes": 10, "pool": pool}}) for pool in ("mean", "class_token")]


@pytest.mark.parametrize(("kind", "sections"), MODELS + CLASSIFIERS)
def test_sizes_are_those_of_the_models_plans(kind, sections):
    config = configuration(kind, **sections)
    model = planned(config)
    for pipeline, virtual in ((1, 1), (2, 1), (3, 1), (2, 2)):
        if pipeline * virtual > len(model.blocks):
            continue
        config.parallel.__dict__.update(pipeline=pipeline, virtual=virtual)
        if kind == "mug":
            plan = MugPlan(config, VOCABULARY if config.model.caption_loss_weight > 0 else 0)
        else:
            from megamug.models.tasks import model_of as classes_of

            plan = classes_of(kind)[0](config, VOCABULARY)
        assert [block.flops for block in model.blocks] == [block.flops for block in plan.blocks]
        assert stages_of(model, pipeline * virtual) == plan.stages
        for stage, run in enumerate(plan.stages[1:], start=1):
            assert model.boundary[run.start] * config.data.micro_batch_size == plan.boundary(stage).packed_shape[2]
        for tensor in (1, 2):
            layout = Layout(tensor=tensor, pipeline=pipeline, virtual=virtual)
            for rank in range(pipeline):
                own = [parameters.stage_counts(plan, s) for s in range(rank, len(plan.stages), pipeline)]
                counts = tuple(sum(c.on_rank(tensor) for c in some) for some in zip(*own, strict=True))
                assert rank_parameters(model, layout, rank) == counts


@pytest.mark.parametrize("auxiliary", [0.4, 0.0])
def test_a_segmenter_has_the_sizes_of_its_plan(auxiliary):
    config = configuration("segmenter", segmenter={"classes": 10, "channels": 32, "auxiliary_weight": auxiliary})
    from megamug.models.segmenter.plan import SegmenterPlan

    model, plan = planned(config), SegmenterPlan(config, 0)
    assert [block.flops for block in model.blocks] == [block.flops for block in plan.blocks]
    for tensor in (1, 2):
        counts = tuple(count.on_rank(tensor) for count in parameters.stage_counts(plan, 0))
        assert rank_parameters(model, Layout(tensor=tensor), 0) == counts


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_layouts_of_fine_tuned_models_are_not_planned(kind):
    with pytest.raises(UserError, match=f"model.kind={kind} are not planned; .* --dry-run"):
        planner.plan(configuration(kind), 8, "h100")


# ---------------------------------------------------------------------------------------------- what a run keeps


def batch_of(plan, config: Config):
    torch.manual_seed(0)
    rows = config.data.micro_batch_size
    if config.model.kind == "mug":
        ids = torch.stack([torch.randperm(plan.patches) for _ in range(rows)])
        visible, masked = ids[:, : plan.visible].sort().values, ids[:, plan.visible :].sort().values
        tokens = torch.randint(1, VOCABULARY, (rows, plan.caption_length + 1)) if plan.writes else None
        size = config.data.image_size
        images = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8)
        hidden = torch.rand(rows, plan.caption_length) < 0.5 if plan.writes and plan.masked_text else None
        return MugBatch(visible, masked, images, tokens, text_mask=hidden)
    tokens = torch.randint(0, VOCABULARY, (2, rows, config.data.context_length))
    return SimpleNamespace(tokens=tokens[0], labels=tokens[1], segments=None, positions=None)


def loss_of(model, batch) -> torch.Tensor:
    return sum(total.float() for total, _ in model(batch)[1].values())


def initialised(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def bytes_kept(model, batch) -> int:
    """Of all storages that autograd holds between forward and backward, parameters and the batch apart; and of what
    arrived and is sent on, which Megatron's schedules hold."""
    others = [*model.parameters(), *model.buffers(), *(x for x in vars(batch).values() if x is not None)]
    known, kept = {x.untyped_storage().data_ptr() for x in others}, {}
    if model.received is not None:
        kept[model.received.untyped_storage().data_ptr()] = model.received

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor  # held, so that no address comes again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sent, losses = model(batch)
    assert all(total.isfinite() for total, _ in losses.values())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + (0 if sent is None else sent.nbytes)


@pytest.mark.parametrize(("dtype", "recompute"), [("fp32", "none"), ("bf16", "none"), ("bf16", "full")])
@pytest.mark.parametrize(
    ("kind", "sections"),
    [model for model in MODELS if model[1].get("lm") is not LLAMA and model[1].get("image_tower") is not LLAMA]
    + [("decoder_lm", {"lm": {**LLAMA, "norm": "layernorm"}}), ("decoder_lm", {"model": {"z_loss_weight": 1e-3}})],
)
def test_activations_are_what_autograd_keeps(world, monkeypatch, kind, sections, dtype, recompute):
    """Linears are torch's, as on a GPU: those for CPUs keep the input of a frozen weight, too.

    RMSNorm is left out here: torch's for CPUs is composed of steps that keep more than the one kernel on a GPU."""
    monkeypatch.setattr(cpu_linear, "AVAILABLE", False)
    config = configuration(kind, dtype, recompute, **sections)
    plan, model = built(config)
    real = bytes_kept(initialised(model), batch_of(plan, config))
    rows, layout = config.data.micro_batch_size, Layout(dtype=dtype, micro_batch=config.data.micro_batch_size)
    units = [unit for block in planned(config).blocks for unit in block.units]
    told = memory(planned(config), replace(layout, recompute=recompute == "full")).activations
    if recompute == "full":  # the planner's peak has one layer computed again in it; forward has none
        told -= rows * max(kept_bytes(unit, layout) for unit in units if unit.layer)
    told += sum(rows * kept_bytes(u, layout, True) + kept_bytes(u, layout, True, constant=True) for u in units)
    if config.model.z_loss_weight:  # what forward keeps of it: the logits; two gradients come in backward
        told -= 2 * rows * config.data.context_length * VOCABULARY * parameters.BYTES[dtype]
    assert told == pytest.approx(real, rel=0.10)


@pytest.mark.parametrize("kind", ["mug", "decoder_lm", "jam_cross"])
def test_a_stage_keeps_what_it_is_sent(world, kind):
    """The activations of each of three pipeline stages, logits apart."""
    config = configuration(kind, "bf16")
    config.parallel.pipeline = 3
    rows, whole = config.data.micro_batch_size, planned(config)
    layout = Layout(pipeline=3, micro_batch=rows)
    for stage, run in enumerate(stages_of(whole, 3)):
        plan, model = built(config, stage)
        if model.incoming:
            shape = model.incoming.packed_shape
            model.set_input_tensor([torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)])
        real = bytes_kept(initialised(model), batch_of(plan, config))
        units = [unit for index in run for unit in whole.blocks[index].units]
        logits = sum(rows * kept_bytes(u, layout, True) + kept_bytes(u, layout, True, constant=True) for u in units)
        assert rows * stage_bytes(whole, layout)[stage] + logits == pytest.approx(real, rel=0.10)


@pytest.mark.parametrize(("kind", "sections"), MODELS)
def test_flops_are_those_that_torch_counts(world, kind, sections):
    """Exact. Attention's backward is left out: its kernels compute the scores once more, which model FLOPs do not
    count. Frozen linears have no weight gradient. Pixels need no gradient, so the patch embedding has two products for
    the three that model FLOPs count. The number of parameters, each a tensor to launch work for, is exact as well."""
    config = configuration(kind, "bf16", **sections)
    plan, model = built(config)
    units = [unit for block in planned(config).blocks for unit in block.units]
    assert sum(unit.tensors for unit in units) == len(list(model.parameters()))
    batch = batch_of(plan, config)
    initialised(model)
    # torch's own attention on CPUs, which masks go to, is not among what it counts.
    of_torch = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}  # fmt: skip
    with FlopCounterMode(display=False, custom_mapping=of_torch) as counter:
        loss_of(model, batch).backward()
    counted = counter.get_flop_counts()["Global"]
    attention = {str(op): n for op, n in counted.items() if "attention" in str(op)}
    products = sum(counted.values()) - sum(attention.values())
    own = [product for block in planned(config).blocks for unit in block.units for product in unit.products]
    expected = sum((3 if product.trained else 2) * product.flops for product in own)
    expected -= own[0].flops if kind == "mug" else 0
    rows = config.data.micro_batch_size
    assert products == rows * expected
    square = sum(a.flops for block in planned(config).blocks for unit in block.units for a in unit.attentions)
    assert sum(n for op, n in attention.items() if "backward" not in op) == rows * square


def test_recomputation_and_splits_take_less():
    model = planned(configuration("decoder_lm", "bf16", lm={"layers": 8}))
    plain = Layout(micro_batch=8)
    assert memory(model, replace(plain, recompute=True)).activations < memory(model, plain).activations / 2
    both = memory(model, replace(plain, tensor=2, sequence=True)).activations
    assert both == pytest.approx(memory(model, plain).activations / 2, rel=0.01)
    assert both < memory(model, replace(plain, tensor=2)).activations < memory(model, plain).activations


def test_micro_batches_in_flight():
    """1F1B, and the interleaved schedule of Narayanan et al. 2021, figure 4: p = 4, v = 2, m = 8."""
    assert [in_flight(4, 1, 8, rank) for rank in range(4)] == [((4,),), ((3,),), ((2,),), ((1,),)]
    assert in_flight(4, 1, 2, 0) == ((2,),)
    for rank in range(4):
        moments = in_flight(4, 2, 8, rank)
        assert {sum(live) for live in moments} == {2 * (4 - rank - 1) + 4 + 1}
    assert (4, 1) in in_flight(4, 2, 8, 3) and (7, 4) in in_flight(4, 2, 8, 0)
    assert in_flight(2, 2, 2, 0) == ((2, 2),)  # all forward passes are before the first backward


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_lists_layouts_without_torch(tmp_path):
    """What takes seconds is importing torch and Megatron."""
    code = (
        "import sys; from megamug import cli; done = cli.main(sys.argv[1:]);"
        " assert not {'torch', 'megatron'} & set(sys.modules); sys.exit(done)"
    )
    path = tmp_path / "plan.json"
    command = ["plan", JAM, "--gpus", "64", "--gpu", "h100", "--top", "3", "--json", str(path)]
    run = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    tree = json.loads(path.read_text())
    times = [layout["step_seconds"]["total"] for layout in tree["layouts"]]
    assert times == sorted(times) and len(times) > 100
    best = tree["layouts"][0]
    assert best["memory"]["total"] == sum(v for k, v in best["memory"].items() if k != "total") <= 79.1 * GIB
    assert best["step_seconds"]["total"] == pytest.approx(sum(best["step_seconds"].values()) / 2)
    assert " ".join(best["overrides"]) in run.stdout and len(tree["rejected"]) > 10
    # Weights alone of an unsplit model: 20 G parameters x 6 bytes.
    assert "tensor 1, pipeline 1, data 64" in run.stdout and "too many" in run.stdout


def test_layouts_of_a_plan_are_such_that_training_takes():
    found = planner.plan(load_config(JAM), 64, "h100")
    assert all(choice.layout.gpus == 64 and choice.memory.total <= 79.1 * GIB for choice in found.choices)
    for choice in found.choices[:: len(found.choices) // 12]:
        config = resolve(load_config(JAM, choice.overrides(found.config)))
        for check in (validate.layout, validate.batch, validate.pipeline):
            check(config, 64)
        for check in (validate.tensor_parallel, validate.sequence_parallel):
            check(config)
        validate_precision.check(config, here=False)


def test_keys_on_the_command_line_are_kept(capsys):
    fixed = ["parallel.tensor=4", "precision.fp8=none", "parallel.recompute=none", "data.micro_batch_size=1"]
    found = planner.plan(load_config(JAM, fixed), 64, "h100", fixed=[key.partition("=")[0] for key in fixed])
    assert {(c.layout.tensor, c.layout.fp8, c.layout.micro_batch) for c in found.choices} == {(4, "none", 1)}
    assert not any(c.layout.recompute for c in found.choices)
    mug = ["plan", str(ROOT / "examples/mug/vit_l16_8gpu.yaml"), "--gpus", "8", "--gpu", "a100", "--top", "1"]
    assert cli.main([*mug, "parallel.tensor=1"]) == 0
    told = capsys.readouterr().out
    assert "parallel.tensor=1 " in told and "precision.fp8=none" in told  # an A100 has no FP8


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "2"], "no layout fits 2 x H100"),
        (["--gpus", "64", "--memory", "-1"], "--memory is -1"),
        (["--gpus", "64", "--top", "0"], "--top is 0"),
        (["--gpus", "64", "--vocabulary-size", "0"], "--vocabulary-size is 0"),
        (["--gpus", "64", "parallel.tensor=5"], "no layout on 64 GPUs is possible"),
        (["--gpus", "64", "fusion.cross_every=99"], "fusion.cross_every(99)"),
    ],
)
def test_mistakes_are_told_in_a_sentence(capsys, arguments, told):
    assert cli.main(["plan", JAM, "--gpu", "h100", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1
    if "no layout fits" in told:
        assert "too many" in error and "tensor 2" in error and "weights" in error
