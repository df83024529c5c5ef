"""megamug benchmark mug [section.key=value ...] [--preset vit_b16] [--batch 32] [--dtypes fp32 bf16 fp8] ...

Images/s of a whole training step (forward, backward, AdamW) of MUG without captions, which is MAE, against the public
ViTMAE of `transformers` with the same sizes, on this device. Each contestant is a process of its own and does one step
when it is told to, in turns, so that a busy machine slows both; medians are printed. Peak memory is the process's.

The peer runs as its users run it: eager, SDPA attention, torch's fused AdamW; in bf16 (and where ours is in FP8) under
autocast with fp32 weights; with `--peers eager compiled` twice, the second time under torch.compile. Ours in bf16 holds
bf16 weights with fp32 main weights and gradients.

`section.key=value` changes ours: parallel.*, precision.*, data.micro_batch_size, ... With model.caption_loss_weight=0.1
it writes captions, too (drawn ones, of a vocabulary of --vocabulary words), and runs alone. With data.train=SHARDS its
images come from there by the loader, and the share of the step that waits for them is told. Under torchrun ours alone
runs, in the layout that is asked for, one type a run:

    torchrun --nproc-per-node 8 -m megamug benchmark mug --preset vit_l16 --batch 1024 --dtypes bf16 parallel.tensor=2

Floor: the step's matrix products (3 x forward) at the rate of one large product (2048^3) measured in the same run; MFU
is against the device's peak where that is known.
"""

from __future__ import annotations

import argparse

import torch

from megamug.benchmarks import _contest, _report, _steps
from megamug.command_line.arguments import COUNT
from megamug.command_line.launcher import world_size
from megamug.errors import UserError

VOCABULARY = 32000


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _report.parser("mug", __doc__)
    parser.add_argument("--preset", default="vit_b16")
    parser.add_argument("--batch", type=COUNT, default=32, help="images of a step, over all processes (default 32)")
    add_vocabulary(parser)
    _contest.add_options(parser)
    _contest.add_peers(parser)
    return _steps.parse(parser, argv)


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocabulary", type=COUNT, default=VOCABULARY, metavar="N",
                        help=f"words of captions, where no data.tokenizer is named (default {VOCABULARY})")  # fmt: skip


def main(argv: list[str]) -> None:
    options = parse(argv)
    configs = [settings(options, dtype) for dtype in options.dtypes]
    if world_size() > 1:
        _contest.in_layout("mug", options, configs[0], build_megamug, "images", options.batch)
        return
    report = _report.Report("mug", options, _steps.layout(configs[0]))
    names = ["megamug", *_contest.peers(options)]
    if configs[0].model.caption_loss_weight > 0 and len(names) > 1:
        report.say("# transformers' ViTMAE writes no captions: it is left out")
        names = names[:1]
    for dtype in options.dtypes:
        _contest.race(report, __name__, tuple(names), dtype, "images", options.batch)
    report.finish()


def settings(options: argparse.Namespace, dtype: str):
    own = [f"model.preset={options.preset}", "model.caption_loss_weight=0"]
    return _steps.settings(own, options.batch, dtype, options.overrides)


def task_of(config, vocabulary: int):
    """The task of `config`, whose captions may be of a vocabulary that has only a size. Raises UserError."""
    from megamug.models.mug.model import Mug
    from megamug.models.mug.plan import MugPlan
    from megamug.models.task import Task
    from megamug.models.tasks import make_task

    class TaskWithoutFiles(Task):
        model = Mug

        def __init__(self):
            super().__init__(config)
            self.vocabulary = vocabulary
            self.plan = MugPlan(config, vocabulary, self.spec)
            self.loss_names = ["image"] * self.plan.paints + ["caption"]

    if config.model.caption_loss_weight == 0 or config.data.tokenizer is not None:
        return make_task(config)
    if config.data.train is not None:
        raise UserError(f"data.train={config.data.train}: its captions need a tokenizer; set data.tokenizer=FILE, or"
                        " model.caption_loss_weight=0")
    return TaskWithoutFiles()


def build_megamug(options: argparse.Namespace, dtype: str):
    """(step, its FLOPs): the trainer's own step, on pixels that are there already unless `data.train` is set."""
    from megamug.distributed import cpu_backend

    cpu_backend.apply()
    from megamug.models.mug.model import MugBatch
    from megamug.models.mug.text_masks import caption_terms, hidden_tokens

    config = settings(options, dtype)
    task = task_of(config, options.vocabulary)
    plan, data = task.plan, config.data

    def made(world):
        torch.manual_seed(world.dp_rank)  # the same batches on all ranks of a replica
        batches = []
        for _ in range(data.global_batch_size // world.dp_size // data.micro_batch_size):
            b = data.micro_batch_size
            order = torch.rand(b, plan.patches, device=world.device).argsort(dim=1)
            shape = (b, 3, data.image_size, data.image_size)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, device=world.device)
            tokens = None
            if plan.writes:
                tokens = torch.randint(4, task.vocabulary, (b, data.caption_length + 1), device=world.device)
            visible, masked = order[:, : plan.visible].sort()[0], order[:, plan.visible :].sort()[0]
            text_mask = None
            if plan.writes and plan.masked_text:
                noise = torch.randint(0, 1 << 32, (b, data.caption_length), device=world.device)
                text_mask = hidden_tokens(tokens, noise, plan.marks, plan.text_mask_ratio)
            batches.append(MugBatch(visible, masked, images, tokens, text_mask=text_mask))
        terms = sum(caption_terms(batch, plan.marks.pad) for batch in batches) if plan.writes else 0
        images = float(data.global_batch_size)
        return batches, {"image": images * plan.masked, "caption": float(terms * world.dp_size)}

    return _steps.training_step(task, config, made)


def build_transformers_compiled(options: argparse.Namespace, dtype: str):
    """`build_transformers` under torch.compile."""
    return build_transformers(options, dtype, torch.compile)


def build_transformers(options: argparse.Namespace, dtype: str, how=lambda model: model):
    """(step, its FLOPs) of transformers' ViTMAEForPreTraining with the preset's sizes."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from megamug.models.mug.plan import MugPlan

    config = settings(options, dtype)
    m, device = config.model, "cuda" if torch.cuda.is_available() else "cpu"
    model = how(ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=m.width, num_hidden_layers=m.layers, num_attention_heads=m.heads, intermediate_size=m.ffn_width,
            layer_norm_eps=m.layer_norm_eps, image_size=config.data.image_size, patch_size=m.patch_size,
            decoder_num_attention_heads=m.decoder_heads, decoder_hidden_size=m.decoder_width,
            decoder_num_hidden_layers=m.decoder_layers, decoder_intermediate_size=4 * m.decoder_width,
            mask_ratio=m.mask_ratio, norm_pix_loss=m.norm_pix_loss,
        )
    ).to(device))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    pixels = torch.randn(options.batch, 3, config.data.image_size, config.data.image_size, device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype != "fp32"):
            loss = model(pixels).loss
        loss.backward()
        optimizer.step()
        loss.item()

    return step, options.batch * 3 * MugPlan(config, 0).forward_flops
