"""python tools/benchmark.py mug [--preset vit_b16] [--batch 32] [--dtypes fp32 bf16] [--steps 5] [--output FILE.json]

Images/s of a whole training step (forward, backward, AdamW) of MUG without captions, which is MAE, against the public
ViTMAE of `transformers` with the same sizes, on this device. Each contestant is a process of its own and does one step
when it is told to, in turns, so that a busy machine slows both; medians are printed. Peak memory is the process's.

The peer runs as its users run it: eager, SDPA attention, torch's fused AdamW; in bf16 under autocast with fp32 weights.
Ours in bf16 holds bf16 weights with fp32 main weights and gradients.

Floor: the step's matrix products (3 x forward) at the rate of one large product (2048^3) measured in the same run.
"""

from __future__ import annotations

import argparse

import torch

from megamug.benchmarks import _contest
from megamug.command_line import COUNT, Parser


def main(argv: list[str]) -> None:
    as_it_stands = argparse.RawTextHelpFormatter
    parser = Parser("benchmark mug", description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--preset", default="vit_b16")
    parser.add_argument("--batch", type=COUNT, default=32)
    _contest.add_options(parser)
    options = parser.parse_args(argv)
    print(f"{_contest.hardware()}\n{options.preset}, batch {options.batch}")
    contestants = ("megamug", "transformers")
    results = [
        _contest.compare(__name__, contestants, options, dtype, "images", options.batch) for dtype in options.dtypes
    ]
    _contest.write(options, results)


def settings(preset: str, batch: int, dtype: str):
    from megamug.config import Config, resolve

    config = Config()
    config.model.preset, config.model.caption_loss_weight, config.precision.dtype = preset, 0.0, dtype
    config.data.global_batch_size = config.data.micro_batch_size = batch
    return resolve(config)


def build_megamug(options: argparse.Namespace, dtype: str):
    """(step, its FLOPs): the trainer's own step on pixels that are there already."""
    from megamug.distributed import cpu_backend, setup

    cpu_backend.apply()
    from megamug.models.mug import MugBatch
    from megamug.models.tasks import make_task
    from megamug.optim import Optimizer, wrap_chunks
    from megamug.pipeline import reduce_losses, run_batch

    batch = options.batch
    config = settings(options.preset, batch, dtype)
    task = make_task(config)
    world = setup.start(config.parallel, config.seed)
    task.join(world)
    models = wrap_chunks(task.build(world), config)
    optimizer = Optimizer(config, models)
    plan, size = task.plan, config.data.image_size
    order = torch.rand(batch, plan.patches, device=world.device).argsort(dim=1)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=world.device)
    visible, masked = order[:, : plan.visible].sort()[0], order[:, plan.visible :].sort()[0]
    micro_batch, done = MugBatch(visible, masked, images), 0

    def step() -> None:
        nonlocal done
        done += 1
        optimizer.zero_grad()
        sums = run_batch(models, [micro_batch], {"image": float(batch * plan.masked), "caption": 0.0}, backward=True)
        reduce_losses(sums, task.loss_names, world)["image"].item()
        norm, _ = optimizer.prepare(done)
        optimizer.apply(norm)

    return step, batch * task.flops_per_sample


def build_transformers(options: argparse.Namespace, dtype: str):
    """(step, its FLOPs) of transformers' ViTMAEForPreTraining with the preset's sizes."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from megamug.models.mug_plan import MugPlan

    batch = options.batch
    config = settings(options.preset, batch, dtype)
    m, device = config.model, "cuda" if torch.cuda.is_available() else "cpu"
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=m.width, num_hidden_layers=m.layers, num_attention_heads=m.heads, intermediate_size=m.ffn_width,
            layer_norm_eps=m.layer_norm_eps, image_size=config.data.image_size, patch_size=m.patch_size,
            decoder_num_attention_heads=m.decoder_heads, decoder_hidden_size=m.decoder_width,
            decoder_num_hidden_layers=m.decoder_layers, decoder_intermediate_size=4 * m.decoder_width,
            mask_ratio=m.mask_ratio, norm_pix_loss=m.norm_pix_loss,
        )
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    pixels = torch.randn(batch, 3, config.data.image_size, config.data.image_size, device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(pixels).loss
        loss.backward()
        optimizer.step()
        loss.item()

    return step, batch * 3 * MugPlan(config, 0).forward_flops
