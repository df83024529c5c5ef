"""The command that repaints and captions pictures by a trained MUG.

    megamug generate RUN --images PATH... [--mask-ratio r] [--top-p p]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megamug.data.dali import DECODE_ERRORS, CropDecoder, FullDecoder
from megamug.data.pairs.images import centre_squares
from megamug.data.random import random_masks
from megamug.data.shards.verify import DEFAULT_LIMITS, Rejected, check_header
from megamug.durable import write_atomically
from megamug.errors import UserError
from megamug.generation.captions import TRUE_STATISTICS, encode, generate_captions
from megamug.generation.pictures import columns, sample_rows
from megamug.models.mug.model import MugBatch
from megamug.telemetry.pictures import save_grid

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
ROWS_PER_PICTURE = 16


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
    from megamug.generation.loading import load_run, read_config

    if top_p is None and temperature != 1.0:
        raise UserError(f"--temperature is {temperature:g} but nothing is drawn at random; give --top-p as well")
    model = read_config(Path(run_dir)).model
    fills_in = model.caption_loss_weight > 0 and model.text_objective == "masked"
    if fills_in and (top_p is not None or model.image_loss_weight == 0):
        found, fix = "there is nothing else to generate", ""
        if model.image_loss_weight > 0:
            found, fix = "--top-p draws the words of captions", "leave it out, or "
        raise UserError(f"{run_dir} was trained with model.text_objective=masked: its text decoder fills in hidden"
                        f" words of a caption and writes none, and {found}; {fix}measure it by megamug evaluate"
                        f" {run_dir} --task masked_text")  # fmt: skip
    paths = find_images(images)
    regions = centre_squares(*image_sizes(paths))
    with load_run(run_dir, step) as run:
        plan, model = run.task.plan, run.model
        ratio = run.config.model.mask_ratio if mask_ratio is None else mask_ratio
        visible = visible_patches(plan.patches, ratio, "--mask-ratio")
        folder = Path(output) if output is not None else new_folder(Path(run_dir) / "generate", f"step-{run.step:08d}")
        folder.mkdir(parents=True, exist_ok=True)
        entries, rows, pictures = [], [], []

        def save_rows(count: int) -> None:
            path = folder / f"pictures-{len(pictures) + 1:03d}.png"
            pictures.append(str(save_grid(rows[:count], columns(model), path)))
            del rows[:count]

        for numbers, batch in batches(run, paths, regions, visible):
            captions = [None] * len(numbers)
            if plan.writes and not plan.masked_text:
                captions = captions_of(run, batch, numbers, top_p, temperature, run.config.seed)
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
        if fills_in:
            figures["no_captions"] = "model.text_objective is masked: the text decoder fills in words, it writes none"
        write_atomically(folder / "captions.json", (json.dumps(figures, indent=1) + "\n").encode())
    for line in [*pictures, str(folder / "captions.json"), *([figures["note"]] if "note" in figures else [])]:
        print(line, file=sys.stderr)
    return figures


def visible_patches(patches: int, ratio: float, option: str) -> int:
    """How many patches a mask of this ratio leaves. Raises UserError where none, naming the `option`."""
    visible = int(patches * (1 - ratio))
    if visible == 0 or not 0 <= ratio < 1:
        raise UserError(
            f"{option} is {ratio:g}: of {patches} patches {visible} stay visible; give a ratio from 0 to "
            f"{1 - 1 / patches:.4g}"
        )
    return visible


def batches(
    run, images: Sequence[Path | bytes], regions: np.ndarray, visible: int
) -> Iterator[tuple[np.ndarray, MugBatch]]:
    """(numbers of the images, their batch): the centre of each image (`regions` [n, 4], see `centre_squares`) of a file
    or its bytes, with `visible` patches that are a pure function of the run's seed and the image's number."""
    data, plan = run.config.data, run.task.plan
    decoder = CropDecoder(data.image_size, 1, data.threads, run.world.device, data.background)
    for start in range(0, len(images), data.micro_batch_size):
        numbers = np.arange(start, min(start + data.micro_batch_size, len(images)))
        files = [image if isinstance(image, bytes) else image.read_bytes() for image in (images[i] for i in numbers)]
        pixels = torch.cat(
            [decoder([file], regions[i : i + 1], np.zeros(1, bool)) for i, file in zip(numbers, files, strict=True)]
        )
        masks = random_masks(run.config.seed, np.zeros_like(numbers), numbers, plan.patches, visible)
        yield numbers, MugBatch(*(torch.from_numpy(ids).to(pixels.device) for ids in masks), pixels)


def captions_of(
    run, batch: MugBatch, numbers: np.ndarray, top_p: float | None, temperature: float, seed: int
) -> list[str]:
    """Captions that the run's model writes of a batch of images; see `captions.generate_tokens`."""
    with torch.inference_mode():
        latent = encode(run.model, batch)
    return generate_captions(
        run.model, run.task.tokenizer, latent, top_p=top_p, temperature=temperature, seed=seed, samples=numbers
    )


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


def image_sizes(images: Sequence[Path | bytes], option: str = "--images: ") -> tuple[list[int], list[int]]:
    """(widths, heights) of the images: files, or bytes of files. Decodes each whole; raises `UserError` for the first
    that does not decode, or that indexing would not take; `option` stands before its name."""
    decoder, widths, heights = FullDecoder(1), [], []
    for number, image in enumerate(images):
        path = f"image {number}" if isinstance(image, bytes) else image
        try:
            data = image if isinstance(image, bytes) else image.read_bytes()
        except OSError as error:
            raise UserError(f"{option}{path} cannot be read: {error.strerror}") from error
        try:
            check_header(data, DEFAULT_LIMITS)
            [(height, width)] = decoder([data])
        except Rejected as reason:
            raise UserError(
                f"{option}{path} ({len(data)} bytes) does not decode, or would cost too much: {reason}; leave it out"
            ) from reason
        except DECODE_ERRORS as error:  # which names the operator and a number, not what is wrong with the file
            raise UserError(
                f"{option}{path} ({len(data)} bytes) does not decode: broken, or no {', '.join(EXTENSIONS)} image; "
                "leave it out"
            ) from error
        widths.append(width)
        heights.append(height)
    return widths, heights


def new_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or with -2, -3, ... behind where that is taken: earlier results stay."""
    candidates = (parent / (name if n == 1 else f"{name}-{n}") for n in range(1, 1_000_000))
    return next(folder for folder in candidates if not folder.exists())
