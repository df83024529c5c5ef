"""python tools/benchmark.py jam [--layers 8 --width 512 ...] [--dtypes fp32 bf16] [--steps 5] [--output FILE.json]

Tokens/s of a whole training step (forward, backward, AdamW) of DecoderLM with LLaMA's block, against transformers'
LlamaForCausalLM of the same sizes, and of JAM-Cross with two such towers. With --generate also tokens/s of greedy
writing with a key-value cache, against transformers' `generate`. Each contestant is a process of its own and takes a
step when it is told to, in turns, so that a busy machine slows all; medians are printed.

The peer runs as its users run it: eager, SDPA attention, its own loss, torch's fused AdamW; in bf16 under autocast with
fp32 weights. Ours in bf16 holds bf16 weights with fp32 main weights and gradients.

Floor: the step's matrix products (3 x forward, attention counted as a full square) at the rate of one large product
(2048^3) measured in the same run. JAM-Cross should reach the rate of its towers: its cost is then that of its FLOPs.
"""

from __future__ import annotations

import argparse
import types

import torch

from megamug.benchmarks import _contest
from megamug.command_line import COUNT, FROM_ZERO, Parser

PROMPT = 32  # tokens before those that are written


def main(argv: list[str]) -> None:
    as_it_stands = argparse.RawTextHelpFormatter
    parser = Parser("benchmark jam", description=__doc__, formatter_class=as_it_stands)
    sizes = dict(layers=8, width=512, heads=8, ffn_width=1376, vocabulary=32000, tokens=1024, batch=2)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=COUNT, default=default, help=f"(default {default})")
    parser.add_argument("--generate", type=FROM_ZERO, default=0, metavar="N", help="also write N tokens (default 0)")
    _contest.add_options(parser)
    options = parser.parse_args(argv)
    print(_contest.hardware())
    print(", ".join(f"{name} {getattr(options, name)}" for name in sizes))
    results, contestants = [], ("megamug", "transformers", "jam_cross")
    for dtype in options.dtypes:
        units = options.batch * options.tokens
        figures = _contest.compare(__name__, contestants, options, dtype, "tokens", units)
        share = figures["jam_cross"]["flops_per_second"] / figures["megamug"]["flops_per_second"]
        print(f"  JAM-Cross works at {share:.2f} of the rate of one tower")
        results.append(figures)
    if options.generate:
        print(f"\nwriting {options.generate} tokens behind {PROMPT}, one at a time:")
        writers = ("writer", "transformers_writer")
        results.append(_contest.compare(__name__, writers, options, "fp32", "tokens", options.generate))
    _contest.write(options, results)


def settings(options: argparse.Namespace, dtype: str, kind: str):
    from megamug.config import Config, resolve

    config = Config()
    config.model.kind, config.precision.dtype = kind, dtype
    config.model.preset = {"decoder_lm": "llama_7b", "jam_cross": "jam_demo"}[kind]
    tower = dict(
        layers=options.layers, width=options.width, heads=options.heads, query_groups=options.heads,
        ffn_width=options.ffn_width, norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias=False, positions="rotary",
        rotary_base=10000.0, tie_vocabulary=False, init_std=0.02,
    )  # fmt: skip
    for section in ("lm",) if kind == "decoder_lm" else ("text_tower", "image_tower"):
        getattr(config, section).__dict__.update(tower)
    config.data.context_length = options.tokens
    config.data.global_batch_size = config.data.micro_batch_size = options.batch
    return resolve(config)


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
    from megamug.models import specs
    from megamug.models.init import initialise
    from megamug.models.lm_task import model_of

    plan_type, model_type = model_of(config.model.kind)
    world = setup.start(config.parallel, config.seed)
    plan = plan_type(config, options.vocabulary, specs.choose("auto")[0])
    model = model_type(plan, 0).to(world.device)
    initialise(model.sharded_state_dict(), config.seed, plan.init_std)
    return model, world


def _build(options: argparse.Namespace, dtype: str, kind: str):
    config = settings(options, dtype, kind)
    model, world = _model(config, options)
    from megamug.data.token_loader import TokenBatch
    from megamug.optim import Optimizer, wrap_chunks
    from megamug.pipeline import reduce_losses, run_batch

    models = wrap_chunks([model], config)
    optimizer, names = Optimizer(config, models), list(model.plan.loss_weights)
    tokens = torch.randint(0, options.vocabulary, (options.batch, options.tokens + 1), device=world.device)
    batch, done = TokenBatch(tokens[:, :-1], tokens[:, 1:].contiguous(), None, None), 0
    totals = dict.fromkeys(names, float(options.batch * options.tokens))

    def step() -> None:
        nonlocal done
        done += 1
        optimizer.zero_grad()
        sums = run_batch(models, [batch], totals, backward=True)
        reduce_losses(sums, names, world)["lm"].item()
        norm, _ = optimizer.prepare(done)
        optimizer.apply(norm)

    return step, options.batch * 3 * model.plan.forward_flops


def _llama(options: argparse.Namespace):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.ffn_width,
            num_hidden_layers=options.layers, num_attention_heads=options.heads, max_position_embeddings=options.tokens,
        )
    ).to("cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip


def build_transformers(options: argparse.Namespace, dtype: str):
    """(step, its FLOPs) of transformers' LlamaForCausalLM."""
    from megamug.models.lm_plan import LmPlan

    flops = options.batch * 3 * LmPlan(settings(options, dtype, "decoder_lm"), options.vocabulary).forward_flops
    model = _llama(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    tokens = torch.randint(0, options.vocabulary, (options.batch, options.tokens), device=model.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step, flops


def _writing_flops(options: argparse.Namespace) -> float:
    """Of writing with a cache: each token passes every weight once."""
    from megamug.models.lm_plan import LmPlan

    plan = LmPlan(settings(options, "fp32", "decoder_lm"), options.vocabulary)
    return options.generate * plan.forward_flops / options.tokens


def build_writer(options: argparse.Namespace, dtype: str):
    """(writing of `generate` tokens, its FLOPs) by `megamug generate`'s own loop, in a vocabulary of text alone."""
    model, _ = _model(settings(options, dtype, "decoder_lm"), options)
    from megamug.generation.decoding import Sampling, write_documents

    vocabulary = types.SimpleNamespace(
        text_pieces=options.vocabulary, codes=0, first_code=options.vocabulary, image_tokens=0, pad_id=0, bos_id=1,
        eos_id=2, break_id=-1, mask_id=-1, is_image=lambda ids: ids < 0,
    )  # fmt: skip
    prompt, limit = [1, *range(3, PROMPT + 2)], PROMPT + options.generate
    model.eval()

    def step() -> None:
        row = write_documents(model, vocabulary, [prompt], Sampling(temperature=0), limits=[limit])[0]
        assert len(row.tokens) == limit, "an untrained model ended its text; take another seed"

    return step, _writing_flops(options)


def build_transformers_writer(options: argparse.Namespace, dtype: str):
    """(writing of `generate` tokens, its FLOPs) by transformers' `generate`, greedy."""
    model = _llama(options).eval()
    prompt = torch.tensor([[1, *range(3, PROMPT + 2)]], device=model.device)

    def step() -> None:
        with torch.inference_mode():
            model.generate(
                prompt, do_sample=False, min_new_tokens=options.generate, max_new_tokens=options.generate,
                pad_token_id=0,
            )

    return step, _writing_flops(options)
