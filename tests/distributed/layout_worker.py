"""Trains a tiny MUG for some steps under one layout after another; a JSON line for each: losses and gradient norms.

    python layout_worker.py '[{"parallel": {...}, "model": {...}, "steps": 10, "save": DIR, "load": DIR, ...}, ...]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megamug.config import Config
from megamug.distributed import setup


def tiny(options: dict) -> Config:
    """A MUG small enough for ten steps in a second, whose sizes divide by 2 everywhere."""
    config = Config()
    config.model.__dict__.update(
        patch_size=8, layers=2, width=32, heads=4, ffn_width=64, decoder_layers=3, decoder_width=32, decoder_heads=4,
        text_unimodal_layers=1, text_multimodal_layers=2, text_width=48, text_heads=4,
        register_tokens=3, decoder_register_tokens=3, caption_loss_weight=0.3,
    )
    config.data.__dict__.update(image_size=32, caption_length=8, global_batch_size=8, micro_batch_size=2)
    config.optimizer.__dict__.update(learning_rate=2e-3, warmup_steps=3)
    config.train.steps = 10
    for section, values in options.items():
        if isinstance(values, dict):
            getattr(config, section).__dict__.update(values)
    return config


def sample(index: int, plan):
    """Pixels, mask and caption of sample `index`: a pure function of it."""
    from megamug.models.mug import PAD

    g = torch.Generator().manual_seed(1000 + index)
    size = plan.grid[0] * plan.patch_size
    image = torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8)
    order = torch.randperm(plan.patches, generator=g)
    tokens = torch.randint(1, plan.vocabulary, (plan.caption_length + 1,), generator=g)
    tokens[int(torch.randint(3, plan.caption_length + 1, (), generator=g)) + 1 :] = PAD
    return image, order[: plan.visible].sort()[0], order[plan.visible :].sort()[0], tokens


def micro_batches(step: int, plan, config: Config, world):
    from megamug.models.mug import PAD, MugBatch

    count = config.data.global_batch_size
    samples = [sample(step * count + i, plan) for i in range(count)]
    totals = {"image": float(count * plan.masked), "caption": float(sum((s[3][1:] != PAD).sum() for s in samples))}
    mine = samples[world.dp_rank * count // world.dp_size : (world.dp_rank + 1) * count // world.dp_size]
    size = config.data.micro_batch_size
    batches = []
    for start in range(0, len(mine), size):
        image, visible, masked, tokens = (torch.stack(x) for x in zip(*mine[start : start + size], strict=True))
        batches.append(MugBatch(visible, masked, image, tokens))
    return batches, totals


def copies_equal(stage, world) -> list[bool]:
    """Of each rank: is its vocabulary weight (where its stage has one) the same as the first one found?"""
    has_weight = stage.text_decoder is not None and hasattr(stage.text_decoder, "shared_weight")
    mine = stage.text_decoder.shared_weight().detach().clone() if has_weight else None
    weights = [None] * world.size
    torch.distributed.all_gather_object(weights, mine)
    first = next(weight for weight in weights if weight is not None)
    return [weight is None or torch.equal(weight, first) for weight in weights]


def main() -> None:
    options = json.loads(sys.argv[1])
    for one in options if isinstance(options, list) else [options]:
        run(one)
    setup.stop()


def run(options: dict) -> None:
    config = tiny(options)
    from megamug.distributed import cpu_backend

    cpu_backend.apply()
    from megamug.checkpoint import state
    from megamug.models.init import initialise
    from megamug.models.mug import Mug
    from megamug.models.mug_plan import MugPlan
    from megamug.optim import Optimizer, wrap_model
    from megamug.pipeline import reduce_losses, run_batch

    plan = MugPlan(config, vocabulary=70)
    world = setup.start(config.parallel, config.seed, plan.vocabulary_stages)
    plan.place_tensor(world.tp_rank, world.tp_group if world.tp_size > 1 else None)
    stage = Mug(plan, world.pp_rank)
    initialise(stage.sharded_state_dict(), config.seed)
    model = wrap_model(stage, config)
    optimizer = Optimizer(config, model)
    first = options.get("first", 0)
    if options.get("load"):
        state.load_tensors(stage, optimizer, world, Path(options["load"]), step=first)
    names = [n for n, used in (("image", plan.paints), ("caption", plan.writes)) if used]
    records = []
    for step in range(first, options.get("steps", 10)):
        batches, totals = micro_batches(step, plan, config, world)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        sums = run_batch(model, batches, totals, backward=True)
        losses = {k: v.item() for k, v in reduce_losses(sums, names, world).items()}
        norm, _ = optimizer.prepare(step + 1)
        optimizer.apply(norm)
        records.append([*(losses[n] / losses[f"{n}_count"] for n in names), norm])
    validation = None
    if options.get("validate"):
        batches, _ = micro_batches(1000, plan, config, world)
        with torch.no_grad():
            sums = run_batch(model, batches, dict.fromkeys(plan.loss_weights, 1.0), backward=False)
        validation = {k: v.item() for k, v in reduce_losses(sums, names, world).items()}
    if options.get("save"):
        folder = Path(options["save"])
        folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        state.save_tensors(state.sharded_state(stage, optimizer, world), folder)
    starts = [plan.blocks[run[0]] for run in plan.stages]
    blocks = [f"{block.part}.{block.name}.{block.index}" for block in starts]
    result = {"records": records, "stage_starts": blocks, "vocabulary": plan.vocabulary_stages}
    if validation is not None:
        result["validation"] = validation
    if options.get("copies"):
        result["copies_equal"] = copies_equal(stage, world)
    print("RESULT " + json.dumps(result))
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
