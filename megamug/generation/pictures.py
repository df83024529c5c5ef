"""Pictures of what a MUG makes: rows of original, visible patches and reconstruction, with true and written captions.

Of held-out pairs they are drawn while training (`TrainingPictures`) and by `megamug evaluate`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megamug.data.pairs.batch import PairBatch
from megamug.data.pairs.text import Tokenizer
from megamug.generation.captions import encode, fill_in, generate_captions, reconstruct
from megamug.models.mug.model import Mug, MugBatch, patchify, unpatchify
from megamug.telemetry.pictures import PictureRow, save_grid

logger = logging.getLogger(__name__)

GREY = 128
PAIRS = 8  # held-out pairs shown while training


def columns(model: Mug) -> list[str]:
    """The titles of the images in each row of `sample_rows`."""
    return ["original", "visible", "reconstruction"] if model.plan.paints else ["original", "visible"]


@torch.inference_mode()
def sample_rows(model: Mug, batch: MugBatch, texts: Sequence[Sequence[str]]) -> list[PictureRow]:
    """A row for each image: original, visible patches, all with the hidden ones painted; `texts` are its lines."""
    size = model.plan.patch_size
    shape = (len(batch.images), batch.masked_ids.shape[1], 3 * size**2)
    images = [batch.images, _with_patches(batch, torch.full(shape, GREY, device=batch.images.device), size)]
    if model.plan.paints:
        images.append(repainted(model, batch))
    pixels = [x.permute(0, 2, 3, 1).contiguous().cpu().numpy() for x in images]
    return [PictureRow([x[i] for x in pixels], list(texts[i])) for i in range(len(batch.images))]


@torch.inference_mode()
def repainted(model: Mug, batch: MugBatch) -> Tensor:
    """The images with the hidden patches as the model paints them, uint8 [b, 3, H, W]."""
    painted = reconstruct(model, batch, encode(model, batch)).clamp(0, 1)
    return _with_patches(batch, (painted * 255).round(), model.plan.patch_size)


def _with_patches(batch: MugBatch, patches: Tensor, patch_size: int) -> Tensor:
    """The images with `patches` [b, M, p * p * 3] (0 .. 255) in the masked places, uint8 [b, 3, H, W]."""
    places = batch.masked_ids.unsqueeze(-1).expand_as(patches)
    grid = patchify(batch.images, patch_size).scatter(1, places, patches.to(torch.uint8))
    return unpatchify(grid, patch_size, batch.images.shape[2])


def true_and_written(
    model: Mug, tokenizer: Tokenizer | None, batch: MugBatch, captions: Sequence[str]
) -> list[list[str]]:
    """Lines of text for each image: its true caption and the likeliest one, or, of a masked text decoder, the true one
    with its hidden tokens filled in; none without a text decoder."""
    if tokenizer is None:
        return [[] for _ in captions]
    with torch.inference_mode():
        latent = encode(model, batch)
    if model.plan.masked_text:
        written = [tokenizer.decode(row) for row in fill_in(model, batch, latent).tolist()]
    else:
        written = generate_captions(model, tokenizer, latent, cache=model.plan.spec == "local")
    how = "filled in" if model.plan.masked_text else "written"
    return [[f"true: {true}"] * bool(true) + [f"{how}: {own}"] for true, own in zip(captions, written, strict=True)]


def held_out(task, world, max_samples: int, tokens: bool = True) -> Iterator[tuple[MugBatch, list[str]]]:
    """`held_out_samples`, with the captions as they stand in the shards ("" for an image without)."""
    for batch, pairs, rows in held_out_samples(task, world, max_samples, tokens):
        captions = pairs.captions()
        yield batch, [captions[i] for i in rows]


def held_out_samples(
    task, world, max_samples: int, tokens: bool = True
) -> Iterator[tuple[MugBatch, PairBatch, list[int]]]:
    """Micro-batches of held-out pairs in the fixed order of validation: their rows that count, and the whole with the
    numbers of those rows. Without `tokens` images without a caption are among them.

    Masks are those of training (a pure function of seed and sample). `task` is a MugTask, `world` a single replica.
    """
    loader = task.loader(world, train=False, max_samples=max_samples, captions=None if tokens else False)
    try:
        for pairs in loader:
            for micro in pairs.micro_batches:
                if micro.valid.any():
                    batch, rows = task.batch(micro), torch.from_numpy(micro.valid.nonzero()[0])
                    yield select(batch, rows), micro, rows.tolist()
    finally:
        loader.close()


def select(batch: MugBatch, rows: torch.Tensor) -> MugBatch:
    """The rows `rows` of a batch."""
    rows = rows.to(batch.visible_ids.device)
    parts = {name: getattr(batch, name) for name in ("visible_ids", "masked_ids", "images", "tokens", "text_mask")}
    return MugBatch(**{name: None if part is None else part[rows] for name, part in parts.items()})


class TrainingPictures:
    """Pictures of a run while it trains. Of MUG alone: to write a document takes longer than a validation, so language
    models have none (`megamug generate` writes them)."""

    def __init__(self, task, run_dir: str | Path) -> None:
        self.task, self.run_dir = task, Path(run_dir)
        self.wanted = task.config.model.kind == "mug"
        self.told_of_none = False

    def draw(self, stage: Mug, world, step: int) -> Path | None:
        """Draws the first held-out pairs (original | visible | reconstruction, true and written caption) into
        RUN/pictures/step-XXXXXXXX.png and returns its path.

        All ranks call it and the first draws, alone. None on the others, and where the layout leaves no rank with the
        whole model: the log says so once, and `megamug evaluate` draws from a checkpoint.
        """
        config = self.task.config
        if not self.wanted:
            return None
        if world.tp_size * world.pp_size > 1:
            if world.is_first and not self.told_of_none:
                logger.info(
                    "no pictures while training: under parallel.tensor=%d, parallel.pipeline=%d no process holds the "
                    "whole model; draw them by: megamug evaluate %s --task reconstruction",
                    world.tp_size, world.pp_size, self.run_dir,
                )  # fmt: skip
            self.told_of_none = True
            return None
        if not world.is_first:
            return None
        data = replace(config.data, global_batch_size=PAIRS, micro_batch_size=PAIRS)
        small = copy(self.task)
        small.config = replace(config, data=data)
        was_training = stage.training
        stage.eval()
        try:
            with closing(held_out(small, replace(world, dp_rank=0, dp_size=1), PAIRS)) as pairs:
                batch, captions = next(pairs)
            fill = torch.arange(PAIRS) % len(captions)  # forward, FP8 products want rows in multiples of 8
            full, texts = select(batch, fill), [captions[i] for i in fill.tolist()]
            rows = sample_rows(stage, full, true_and_written(stage, self.task.tokenizer, full, texts))[: len(captions)]
        finally:
            stage.train(was_training)
        return save_grid(rows, columns(stage), self.run_dir / "pictures" / f"step-{step:08d}.png")
