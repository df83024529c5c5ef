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
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

DTYPES = ("fp32", "bf16")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--worker"]:
        serve(argv[1], argv[2], argv[3], int(argv[4]))
        return
    as_it_stands = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("benchmark mug", description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--preset", default="vit_b16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    results = [compare(options, dtype) for dtype in options.dtypes]
    if options.output:
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def compare(options: argparse.Namespace, dtype: str) -> dict:
    """One dtype: alternating steps of both contestants, and the product rate between them."""
    workers = {name: Worker(name, dtype, options) for name in ("megamug", "transformers")}
    seconds = {name: [] for name in workers}
    rates = []
    for _ in range(options.steps):
        for name, worker in workers.items():
            seconds[name].append(worker.step())
        rates.append(product_rate(dtype))
    rate, result = statistics.median(rates), {"dtype": dtype, "preset": options.preset, "batch": options.batch}
    print(f"\n{options.preset}, batch {options.batch}, {dtype}; 2048^3 product: {rate / 1e9:.0f} GFLOP/s")
    for name, worker in workers.items():
        flops, memory = worker.close()
        median = statistics.median(seconds[name])
        spread = (max(seconds[name]) - min(seconds[name])) / median
        images = options.batch / median
        share = images * flops / rate
        result[name] = {
            "images_per_second": images, "spread": spread, "share_of_product_rate": share, "peak_gib": memory,
        }  # fmt: skip
        print(f"  {name:<13} {images:7.2f} images/s (spread {spread:.0%})  {images * flops / 1e9:6.0f} GFLOP/s, "
              f"{share:.0%} of the product rate  peak {memory:.2f} GiB")  # fmt: skip
    result["ratio"] = result["megamug"]["images_per_second"] / result["transformers"]["images_per_second"]
    print(f"  ratio         {result['ratio']:7.2f}")
    return result


class Worker:
    """A contestant's process."""

    def __init__(self, name: str, dtype: str, options: argparse.Namespace):
        command = [sys.executable, "-c", "import sys; from megamug.benchmarks.mug import main; main(sys.argv[1:])"]
        command += ["--worker", name, dtype, options.preset, str(options.batch)]
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.flops = float(self._answer())

    def _answer(self) -> str:
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return line[7:]
        raise RuntimeError("a contestant of the benchmark ended with an error, see above")

    def step(self) -> float:
        """Seconds of one training step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> tuple[float, float]:
        """(training FLOPs per image, peak memory in GiB)."""
        self.process.stdin.close()
        memory = float(self._answer())
        self.process.wait()
        return self.flops, memory


def serve(name: str, dtype: str, preset: str, batch: int) -> None:
    """A contestant: warms up, then one step for each line read."""
    step, flops = (build_megamug if name == "megamug" else build_transformers)(preset, batch, dtype)
    for _ in range(2):
        step()
    print(f"ANSWER {flops}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        synchronize()
        print(f"ANSWER {time.perf_counter() - start}", flush=True)
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"ANSWER {memory / 2**30}", flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(dtype: str, size: int = 2048) -> float:
    """FLOP/s of one size^3 product, median of three."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    a, b = torch.randn(size, size, dtype=kind, device=device), torch.randn(size, size, dtype=kind, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def settings(preset: str, batch: int, dtype: str):
    from megamug.config import Config, resolve

    config = Config()
    config.model.preset, config.model.caption_loss_weight, config.precision.dtype = preset, 0.0, dtype
    config.data.global_batch_size = config.data.micro_batch_size = batch
    return resolve(config)


def build_megamug(preset: str, batch: int, dtype: str):
    """(step, FLOPs per image): the trainer's own step on pixels that are there already."""
    from megamug.distributed import cpu_backend, setup

    cpu_backend.apply()
    from megamug.models.mug import MugBatch
    from megamug.models.tasks import make_task
    from megamug.optim import Optimizer, wrap_chunks
    from megamug.pipeline import reduce_losses, run_batch

    config = settings(preset, batch, dtype)
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

    return step, task.flops_per_sample


def build_transformers(preset: str, batch: int, dtype: str):
    """(step, FLOPs per image) of transformers' ViTMAEForPreTraining with the preset's sizes."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from megamug.models.mug_plan import MugPlan

    config = settings(preset, batch, dtype)
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

    return step, 3 * MugPlan(config, 0).forward_flops
