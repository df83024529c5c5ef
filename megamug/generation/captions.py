"""What a trained MUG makes of images: hidden patches painted, captions written token by token.

    megamug generate RUN --images PATH... [--mask-ratio r] [--top-p p]

Axes: b images, N patches, V visible, M masked, t tokens, h width, p patch size.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megamug.data.dali import DECODE_ERRORS, CropDecoder, FullDecoder
from megamug.data.pairs.images import centre_squares
from megamug.data.pairs.text import BOS, EOS, PAD, Tokenizer
from megamug.data.random import random_masks, uniform
from megamug.durable import write_atomically
from megamug.errors import UserError
from megamug.losses.masked_patch import VARIANCE_EPSILON
from megamug.models.blocks.layers import key_value_cache
from megamug.models.mug.model import Mug, MugBatch, patchify, take, unpatchify
from megamug.telemetry.pictures import PictureRow, save_grid

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
ROWS_PER_PICTURE = 16
GREY = 128
TRUE_STATISTICS = (
    "model.norm_pix_loss is on: patch means and deviations are the true ones, the model paints what is in between"
)


# ---------------------------------------------------------------------------------------------- the model's two answers


def encode(model: Mug, batch: MugBatch) -> Tensor:
    """The latent of the visible patches, [1 + registers + V, b, h]."""
    return model.encoder(batch, None)


def all_visible(batch: MugBatch, patches: int) -> MugBatch:
    """The same images with no patch hidden."""
    ids = torch.arange(patches, device=batch.images.device).expand(len(batch.images), -1)
    return MugBatch(ids, ids[:, :0], batch.images, batch.tokens)


def reconstruct(model: Mug, batch: MugBatch, latent: Tensor) -> Tensor:
    """Pixels that the image decoder paints into the masked patches, [b, M, p * p * 3] float32, black 0, white 1.

    Not clipped. A model trained with `norm_pix_loss` predicts each patch in units of its own mean and deviation, which
    no visible patch tells: those of the hidden patch itself are used then, as MAE's visualisation does.
    """
    plan, decoder = model.plan, model.image_decoder
    predicted = decoder.predict(decoder(batch, latent, None), batch.masked_ids).float()
    values = plan.patch_size**2
    mean, std = (torch.tensor(x, device=predicted.device).repeat(values) for x in (plan.mean, plan.std))
    if plan.norm_pix:
        truth = (true_patches(batch, plan.patch_size) - mean) / std
        variance, average = torch.var_mean(truth, dim=-1, keepdim=True, correction=1)
        predicted = predicted * (variance + VARIANCE_EPSILON).sqrt() + average
    return predicted * std + mean


def true_patches(batch: MugBatch, patch_size: int) -> Tensor:
    """Pixels of the masked patches, [b, M, p * p * 3] float32, black 0, white 1."""
    return take(patchify(batch.images, patch_size), batch.masked_ids).float() / 255


@torch.inference_mode()
def generate_tokens(
    model: Mug,
    latent: Tensor,
    *,
    top_p: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    samples: Sequence[int] | np.ndarray | None = None,
    cache: bool = True,
) -> Tensor:
    """Writes a caption for each of the b images of `latent` [., b, h] -> int64 [b, t], t <= caption_length.

    A row is the caption's tokens, the end token where it was reached, then padding; writing stops when all rows ended.
    The batch is one for one process: no tensor or pipeline parallelism.

    Args:
        top_p: None: always the likeliest token. Else draw from the smallest set of tokens that holds this share of the
            probability (nucleus sampling, Holtzman et al., arXiv 1904.09751).
        temperature: divides the logits before drawing.
        seed, samples: a draw is a pure function of (seed, sample number, position), so a caption does not depend on
            the batch it is written in; `samples` (default 0, 1, ...) are the b sample numbers.
        cache: keep the keys and values of earlier tokens and of the latent (`local` layers only); the tokens are the
            same without, where every step runs all tokens so far.
    """
    plan, decoder = model.plan, model.text_decoder
    assert plan.tensor == plan.pipeline == 1, "one process holds the whole model"
    b, steps, device = latent.shape[1], plan.caption_length, latent.device
    draws = None
    if top_p is not None:
        numbers = np.arange(b) if samples is None else np.asarray(samples)
        draws = torch.from_numpy(uniform(seed, "caption", 0, numbers, steps)).to(device)
    tokens = torch.full((b, 1), BOS, dtype=torch.int64, device=device)
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    with key_value_cache(decoder, steps) if cache else nullcontext():
        for position in range(steps):
            new, first = (tokens[:, -1:], position) if cache else (tokens, 0)
            hidden = decoder.stack(decoder.embed(new, first), attention_mask=None, context=latent)
            logits = decoder.logits(hidden[-1:])[0, :, : plan.vocabulary].float()
            logits[:, [PAD, BOS]] = -torch.inf  # no caption holds them
            if draws is None:
                chosen = logits.argmax(dim=-1)
            else:
                chosen = nucleus_choice(logits / temperature, top_p, draws[:, position])
            tokens = torch.cat([tokens, chosen.masked_fill(ended, PAD).unsqueeze(1)], dim=1)
            ended |= chosen == EOS
            if ended.all():
                break
    return tokens[:, 1:]


def nucleus_choice(logits: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """A token for each row of `logits` [b, V] from its nucleus of probability `top_p`, by `draws` [b] in [0, 1)."""
    probabilities = logits.double().softmax(dim=-1)
    falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
    inside = falling.cumsum(dim=-1) - falling < top_p  # the token that reaches top_p belongs to it
    # Drawn in the order of token ids: two tokens of almost the same probability do not change places by rounding.
    nucleus = probabilities * torch.zeros_like(inside).scatter(1, order, inside)
    total = nucleus.cumsum(dim=-1)
    place = torch.searchsorted(total, draws.unsqueeze(1) * total[:, -1:], right=True)
    last = total.argmax(dim=-1, keepdim=True)  # the first place that holds everything: rounding ends there
    return place.minimum(last).squeeze(1)


def generate_captions(model: Mug, tokenizer: Tokenizer, latent: Tensor, **sampling) -> list[str]:
    """`generate_tokens` as text."""
    return [tokenizer.decode(row) for row in generate_tokens(model, latent, **sampling).tolist()]


# ---------------------------------------------------------------------------------------------- pictures


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
        painted = reconstruct(model, batch, encode(model, batch)).clamp(0, 1)
        images.append(_with_patches(batch, (painted * 255).round(), size))
    pixels = [x.permute(0, 2, 3, 1).contiguous().cpu().numpy() for x in images]
    return [PictureRow([x[i] for x in pixels], list(texts[i])) for i in range(len(batch.images))]


def _with_patches(batch: MugBatch, patches: Tensor, patch_size: int) -> Tensor:
    """The images with `patches` [b, M, p * p * 3] (0 .. 255) in the masked places, uint8 [b, 3, H, W]."""
    places = batch.masked_ids.unsqueeze(-1).expand_as(patches)
    grid = patchify(batch.images, patch_size).scatter(1, places, patches.to(torch.uint8))
    return unpatchify(grid, patch_size, batch.images.shape[2])


def true_and_written(
    model: Mug, tokenizer: Tokenizer | None, batch: MugBatch, captions: Sequence[str]
) -> list[list[str]]:
    """Lines of text for each image: its true caption and the likeliest one; none without a text decoder."""
    if tokenizer is None:
        return [[] for _ in captions]
    with torch.inference_mode():
        latent = encode(model, batch)
    written = generate_captions(model, tokenizer, latent, cache=model.plan.spec == "local")
    return [[f"true: {true}", f"written: {own}"] for true, own in zip(captions, written, strict=True)]


# ---------------------------------------------------------------------------------------------- the command


def generate_from_images(
    run_dir: str | Path,
    images: Sequence[str | Path],
    *,
    mask_ratio: float | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    output: str | Path | None = None,
    step: int | None = None,
) -> dict:
    """Repaints and captions pictures (files, or folders of them) by the newest checkpoint of a run, or that of `step`.

    `mask_ratio`: share of hidden patches, 0 for none (default: the run's). Writes `pictures-NNN.png` and
    `captions.json` into `output` (default: a new folder in RUN/generate), prints their paths, returns the figures.
    Raises `UserError`: no picture, one that does not decode, a ratio that hides everything, a run that cannot be read.
    """
    from megamug.generation.loading import load_run

    if top_p is None and temperature != 1.0:
        raise UserError(f"--temperature is {temperature:g} but nothing is drawn at random; give --top-p as well")
    paths = find_images(images)
    regions = centre_squares(*image_sizes(paths))
    with load_run(run_dir, step) as run:
        plan, model, data = run.task.plan, run.model, run.config.data
        ratio = run.config.model.mask_ratio if mask_ratio is None else mask_ratio
        visible = int(plan.patches * (1 - ratio))
        if visible == 0 or not 0 <= ratio < 1:
            raise UserError(
                f"--mask-ratio is {ratio:g}: of {plan.patches} patches {visible} stay visible; give a ratio from 0 to "
                f"{1 - 1 / plan.patches:.4g}"
            )
        folder = Path(output) if output is not None else new_folder(Path(run_dir) / "generate", f"step-{run.step:08d}")
        folder.mkdir(parents=True, exist_ok=True)
        entries, rows, pictures = [], [], []

        def save_rows(count: int) -> None:
            path = folder / f"pictures-{len(pictures) + 1:03d}.png"
            pictures.append(str(save_grid(rows[:count], columns(model), path)))
            del rows[:count]

        decoder = CropDecoder(data.image_size, 1, data.threads, run.world.device)
        for start in range(0, len(paths), data.micro_batch_size):
            part = range(start, min(start + data.micro_batch_size, len(paths)))
            pixels = torch.cat([decoder([paths[i].read_bytes()], regions[i : i + 1], np.zeros(1, bool)) for i in part])
            numbers = np.array(part)
            masks = random_masks(run.config.seed, np.zeros_like(numbers), numbers, plan.patches, visible)
            batch = MugBatch(*(torch.from_numpy(ids).to(pixels.device) for ids in masks), pixels)
            captions = [None] * len(pixels)
            if plan.writes:
                with torch.inference_mode():
                    latent = encode(model, batch)
                captions = generate_captions(
                    model, run.task.tokenizer, latent, top_p=top_p, temperature=temperature, seed=run.config.seed,
                    samples=numbers,
                )
            new = [{"image": str(paths[n]), "caption": text} for n, text in zip(numbers, captions, strict=True)]
            entries += new
            rows += sample_rows(model, batch, [[e["image"], e["caption"] or ""] for e in new])
            while len(rows) >= ROWS_PER_PICTURE:
                save_rows(ROWS_PER_PICTURE)
        if rows:
            save_rows(len(rows))
        figures = {
            "checkpoint": str(run.checkpoint), "step": run.step, "mask_ratio": ratio, "visible_patches": visible,
            "patches": plan.patches, "top_p": top_p, "temperature": temperature if top_p else None,
            "seed": run.config.seed, "pictures": pictures, "captions": entries,
        }  # fmt: skip
        if plan.paints and plan.norm_pix:
            figures["note"] = TRUE_STATISTICS
        write_atomically(folder / "captions.json", (json.dumps(figures, indent=1) + "\n").encode())
    for line in [*pictures, str(folder / "captions.json"), *([figures["note"]] if "note" in figures else [])]:
        print(line, file=sys.stderr)
    return figures


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The image files that `paths` (files, or folders of them) name. Raises `UserError` where one names none."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not inside:
                raise UserError(f"--images: no {', '.join(EXTENSIONS)} file in folder {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--images: {path} does not exist")
    return found


def image_sizes(paths: list[Path]) -> tuple[list[int], list[int]]:
    """(widths, heights) of the images. Decodes each whole; raises `UserError` for the first that does not decode."""
    decoder, widths, heights = FullDecoder(1), [], []
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"--images: {path} cannot be read: {error.strerror}") from error
        try:
            [(height, width)] = decoder([data])
        except DECODE_ERRORS as error:  # which names the operator and a number, not what is wrong with the file
            raise UserError(
                f"--images: {path} ({len(data)} bytes) does not decode: broken, or no {', '.join(EXTENSIONS)} image; "
                "leave it out"
            ) from error
        widths.append(width)
        heights.append(height)
    return widths, heights


def new_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or with -2, -3, ... behind where that is taken: earlier results stay."""
    candidates = (parent / (name if n == 1 else f"{name}-{n}") for n in range(1, 1_000_000))
    return next(folder for folder in candidates if not folder.exists())
