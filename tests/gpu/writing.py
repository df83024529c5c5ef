"""What trained models write and how well they predict, on whatever device this process has. Runs of random weights,
fp32, `local` layers."""

from __future__ import annotations

from pathlib import Path

import torch

from megamug import evaluate
from megamug.generation.captions import encode, generate_tokens, reconstruct
from megamug.generation.decoding import Sampling, write_documents
from megamug.generation.loading import load_run
from megamug.models.mug.model import MugBatch
from tests.data.language import image
from tests.evaluate import tiny_run
from tests.generation import language_run
from tests.generation.language_run import MODELS

LIMIT = 60
SAMPLINGS = {
    "nucleus": Sampling(top_p=0.9, seed=5),
    "greedy": Sampling(temperature=0.0),
    "guided": Sampling(guidance=2.5, seed=1),
}


def make_language_runs(folder: Path) -> None:
    """`folder/NAME` of each of `MODELS`, their vocabulary and documents."""
    language_run.make_data(folder)
    for name in MODELS:
        language_run.make_run(name, folder)


def documents(folder: Path, name: str, cache: bool = True) -> dict[str, list[list[int]]]:
    """By sampling, the tokens of four documents of different beginnings: texts short and long, an image, a mark."""
    with load_run(folder / name) as run:
        v = run.task.vocabulary
        text = v.encode_text("first draw, then look")
        starts = [
            [v.bos_id, *text[:2]], [v.bos_id, *image(v).tolist(), v.break_id], [v.bos_id, *text, *text],
            [v.bos_id, *text[:5], v.break_id],
        ]  # fmt: skip
        limits = [LIMIT] * len(starts)
        return {
            label: [row.tokens for row in write_documents(run.model, v, starts, how, limits=limits, cache=cache)]
            for label, how in SAMPLINGS.items()
        }


def perplexity(folder: Path, name: str, output: Path) -> dict[str, float]:
    """Mean loss, nat a token, by modality."""
    figures = evaluate.run_task(folder / name, "perplexity", output=output)
    return {label: row["loss"] for label, row in figures["modalities"].items() if row["tokens"]}


def make_mug_run(folder: Path) -> None:
    tiny_run.make_run(tiny_run.tiny_config(tiny_run.make_data(folder), folder / "mug"))


def captions(folder: Path, cache: bool = True) -> dict[str, list]:
    """Of images of noise: the tokens of their captions, likeliest and drawn; the pixels painted."""
    with load_run(folder / "mug") as run, torch.inference_mode():
        plan, device = run.task.plan, run.world.device
        g = torch.Generator().manual_seed(0)
        side = run.config.data.image_size
        images = torch.randint(0, 256, (4, 3, side, side), generator=g, dtype=torch.uint8)
        order = torch.rand(4, plan.patches, generator=g).argsort(dim=1)
        visible, masked = order[:, : plan.visible].sort()[0], order[:, plan.visible :].sort()[0]
        batch = MugBatch(visible.to(device), masked.to(device), images.to(device))
        latent = encode(run.model, batch)
        return {
            "greedy": generate_tokens(run.model, latent, cache=cache).tolist(),
            "nucleus": generate_tokens(run.model, latent, cache=cache, top_p=0.9, seed=3).tolist(),
            "pixels": reconstruct(run.model, batch, latent).flatten().tolist(),
        }


def on_this_device(folder: Path, output: Path) -> dict[str, dict]:
    """All of it, by run."""
    found = {
        name: {"documents": documents(folder, name), "perplexity": perplexity(folder, name, output / name)}
        for name in MODELS
    }
    return {**found, "mug": captions(folder)}


def make_runs_and_write(folder: Path) -> dict[str, dict]:
    """Makes the runs first."""
    make_language_runs(folder)
    make_mug_run(folder)
    return on_this_device(folder, folder / "by the maker")
