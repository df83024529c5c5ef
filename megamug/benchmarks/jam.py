"""megamug benchmark jam [section.key=value ...] [--layers 8 --width 512 ...] [--dtypes fp32 bf16 fp8] ...

Tokens/s of a whole training step (forward, backward, AdamW) of DecoderLM with LLaMA's block, against transformers'
LlamaForCausalLM of the same sizes, and of JAM-Cross with two such towers. With --generate also tokens/s of greedy
writing with a key-value cache, against transformers' `generate`. Each contestant is a process of its own and takes a
step when it is told to, in turns, so that a busy machine slows all; medians are printed.

The peer runs as its users run it: eager, SDPA attention, its own loss, torch's fused AdamW; in bf16 under autocast with
fp32 weights; with `--peers eager compiled` twice, the second time under torch.compile. Ours in bf16 holds bf16 weights
with fp32 main weights and gradients. It writes in `local` layers, which alone have a key-value cache, as `megamug
generate` does.

`section.key=value` changes ours, and under torchrun ours alone runs, in the layout that is asked for, one type and
one model a run (--model jam_cross for two towers); see `megamug benchmark mug --help`.

Floor: the step's matrix products (3 x forward, attention counted as a full square) at the rate of one large product
(2048^3) measured in the same run. JAM-Cross should reach the rate of its towers: its cost is then that of its FLOPs.
"""

from __future__ import annotations

import argparse
import functools
import json
import types

import torch

from megamug.benchmarks import _contest, _report, _steps
from megamug.command_line.arguments import COUNT, FROM_ZERO
from megamug.command_line.launcher import world_size
from megamug.generation import loading as inference

KINDS = ("decoder_lm", "jam_cross")
PROMPT = 32  # tokens before those that are written


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _report.parser("jam", __doc__)
    sizes = dict(layers=8, width=512, heads=8, ffn_width=1376, vocabulary=32000, tokens=1024, batch=2)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=COUNT, default=default, help=f"(default {default})")
    parser.add_argument("--model", choices=KINDS, default=KINDS[0], help="under torchrun")
    parser.add_argument("--generate", type=FROM_ZERO, default=0, metavar="N", help="also write N tokens (default 0)")
    _contest.add_options(parser, nargs="*")  # none: only writing
    _contest.add_peers(parser)
    return _steps.parse(parser, argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    units = options.batch * options.tokens
    if world_size() > 1:
        config = settings(options, (options.dtypes or ["fp32"])[0], options.model)
        build = functools.partial(_build, kind=options.model)
        _contest.in_layout("jam", options, config, build, "tokens", units)
        return
    config = [settings(options, dtype, kind) for dtype in options.dtypes or ["fp32"] for kind in KINDS][0]
    report = _report.Report("jam", options, _steps.layout(config))
    trained = ("megamug", *_contest.peers(options), "jam_cross")
    for dtype in options.dtypes:
        figures = _contest.race(report, __name__, trained, dtype, "tokens", units)
        _say_share(report, figures, "jam_cross", "megamug")
    if options.generate:
        report.say(f"\nwriting {options.generate} tokens behind {PROMPT}, one at a time (ours in local layers):")
        writers = ("writer", "transformers_writer", "jam_writer")
        figures = _contest.race(report, __name__, writers, "fp32", "tokens", options.generate)
        _say_share(report, figures, "jam_writer", "writer")
    report.finish()


def _say_share(report: _report.Report, figures: dict[str, dict], two: str, one: str) -> None:
    share = figures[two]["tflops_per_device"] / figures[one]["tflops_per_device"]
    report.say(f"  JAM-Cross works at {share:.2f} of the rate of one tower")


def settings(options: argparse.Namespace, dtype: str, kind: str):
    tower = dict(
        layers=options.layers, width=options.width, heads=options.heads, query_groups=options.heads,
        ffn_width=options.ffn_width, norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias=False, positions="rotary",
        rotary_base=10000.0, tie_vocabulary=False, init_std=0.02,
    )  # fmt: skip
    preset = {"decoder_lm": "llama_7b", "jam_cross": "jam_demo"}[kind]
    own = [f"model.kind={kind}", f"model.preset={preset}", f"data.context_length={options.tokens}"]
    for section in ("lm",) if kind == "decoder_lm" else ("text_tower", "image_tower"):
        own += [f"{section}.{key}={json.dumps(value)}" for key, value in tower.items()]
    return _steps.settings(own, options.batch, dtype, options.overrides)


def build_megamug(options: argparse.Namespace, dtype: str):
    """(step, its FLOPs) of DecoderLM."""
    return _build(options, dtype, "decoder_lm")


def build_jam_cross(options: argparse.Namespace, dtype: str):
    """(step, its FLOPs) of two towers that read each other every two layers."""
    return _build(options, dtype, "jam_cross")


def _model(config, options: argparse.Namespace):
    """(the initialised model in one stage, this process's place)."""
    from megamug.distributed import cpu_backend, setup

    cpu_backend.apply()
    from megamug.models.blocks import specs
    from megamug.models.init import initialise
    from megamug.models.tasks import model_of

    plan_type, model_type = model_of(config.model.kind)
    world = setup.start(config.parallel, config.seed)
    plan = plan_type(config, options.vocabulary, specs.choose(config)[0])
    model = model_type(plan, 0).to(world.device)
    initialise(model.sharded_state_dict(), config.seed, plan.init_std)
    return model, world


def _build(options: argparse.Namespace, dtype: str, kind: str):
    from megamug.distributed import cpu_backend

    cpu_backend.apply()
    from megamug.data.documents.loader import TokenBatch, no_fewer
    from megamug.models.task import Task
    from megamug.models.tasks import make_task, model_of

    class TaskWithoutFiles(Task):
        """Of a vocabulary that has only a size."""

        def __init__(self):
            super().__init__(config)
            plan, self.model = model_of(kind)
            self.plan = plan(config, options.vocabulary, self.spec)
            self.loss_names = list(self.plan.loss_weights)

    config = settings(options, dtype, kind)
    task = make_task(config) if config.data.train is not None else TaskWithoutFiles()

    def made(world):
        torch.manual_seed(world.dp_rank)  # the same batches on all ranks of a replica
        b, batches = config.data.micro_batch_size, []
        for _ in range(options.batch // world.dp_size // b):
            tokens = torch.randint(0, options.vocabulary, (b, options.tokens + 1), device=world.device)
            segments = most = None
            if config.data.separate_documents:  # four a row in the mean
                ends = torch.rand(b, options.tokens) < 3 / options.tokens
                segments = ends.cumsum(1).int().to(world.device)
                most = no_fewer(b + int(ends[:, 1:].sum()))
            batches.append(TokenBatch(tokens[:, :-1], tokens[:, 1:].contiguous(), segments, None, most))
        return batches, dict.fromkeys(task.loss_names, float(options.batch * options.tokens))

    return _steps.training_step(task, config, made)


def _llama(options: argparse.Namespace):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.ffn_width,
            num_hidden_layers=options.layers, num_attention_heads=options.heads, max_position_embeddings=options.tokens,
        )
    ).to("cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip


def build_transformers_compiled(options: argparse.Namespace, dtype: str):
    """`build_transformers` under torch.compile."""
    return build_transformers(options, dtype, torch.compile)


def build_transformers(options: argparse.Namespace, dtype: str, how=lambda model: model):
    """(step, its FLOPs) of transformers' LlamaForCausalLM."""
    from megamug.models.language.plan import LmPlan

    flops = options.batch * 3 * LmPlan(settings(options, dtype, "decoder_lm"), options.vocabulary).forward_flops
    model = how(_llama(options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    tokens = torch.randint(0, options.vocabulary, (options.batch, options.tokens), device=model.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype != "fp32"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step, flops


def _writing_flops(plan, options: argparse.Namespace) -> float:
    """Of writing with a cache: each token passes every weight once."""
    return options.generate * plan.forward_flops / options.tokens


def build_writer(options: argparse.Namespace, dtype: str):
    """(writing of `generate` tokens, its FLOPs) by DecoderLM."""
    return _build_writer(options, dtype, "decoder_lm")


def build_jam_writer(options: argparse.Namespace, dtype: str):
    """(writing of `generate` tokens, its FLOPs) by two towers that read each other every two layers."""
    return _build_writer(options, dtype, "jam_cross")


def _build_writer(options: argparse.Namespace, dtype: str, kind: str):
    """By `megamug generate`'s own loop, in a vocabulary of text alone."""
    model, _ = _model(inference.one_process(settings(options, dtype, kind)), options)
    from megamug.generation.decoding import Sampling, write_documents

    vocabulary = types.SimpleNamespace(
        text_pieces=options.vocabulary, codes=0, first_code=options.vocabulary, image_tokens=0, pad_id=0, bos_id=1,
        eos_id=2, break_id=-1, mask_id=-1,
    )  # fmt: skip
    prompt, limit = [1, *range(3, PROMPT + 2)], PROMPT + options.generate
    model.eval()

    def step() -> None:
        row = write_documents(model, vocabulary, [prompt], Sampling(temperature=0), limits=[limit])[0]
        assert len(row.tokens) == limit, "an untrained model ended its text; take another seed"

    return step, _writing_flops(model.plan, options)


def build_transformers_writer(options: argparse.Namespace, dtype: str):
    """(writing of `generate` tokens, its FLOPs) by transformers' `generate`, greedy."""
    from megamug.models.language.plan import LmPlan

    plan = LmPlan(settings(options, dtype, "decoder_lm"), options.vocabulary)
    model = _llama(options).eval()
    prompt = torch.tensor([[1, *range(3, PROMPT + 2)]], device=model.device)

    def step() -> None:
        with torch.inference_mode():
            model.generate(
                prompt, do_sample=False, min_new_tokens=options.generate, max_new_tokens=options.generate,
                pad_token_id=0,
            )

    return step, _writing_flops(plan, options)
