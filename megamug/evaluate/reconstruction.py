"""How well hidden patches are painted: pixel error against painting them with the visible patches' mean colour."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megamug.errors import UserError
from megamug.generation.captions import TRUE_STATISTICS, encode, reconstruct, true_patches
from megamug.generation.pictures import columns, held_out, sample_rows, select, true_and_written
from megamug.models.mug.model import MugBatch, patchify, take
from megamug.telemetry.pictures import save_grid

PICTURES = 12  # samples shown


def measure(run, samples: int, folder: Path) -> dict:
    """Figures of at most `samples` held-out pairs, and a picture of the first.

    `pixel_error` and `baseline_error`: squared error, mean over the values of all masked patches; pixels from 0 (black)
    to 1 (white), predictions not clipped. `ratio` divides the one by the other. `image_loss` is the training loss.
    """
    model, plan = run.model, run.task.plan
    if plan.masked == 0:
        raise UserError(f"model.mask_ratio is {run.config.model.mask_ratio:g}: no patch is hidden, nothing is painted")
    sums = torch.zeros(3, dtype=torch.float64)
    count, rows = 0, []
    with torch.inference_mode():
        for batch, captions in held_out(run.task, run.world, samples, tokens=False):
            latent = encode(model, batch)
            truth = true_patches(batch, plan.patch_size)
            painted = reconstruct(model, batch, latent)
            loss, _ = model.image_decoder.loss(batch, model.image_decoder(batch, latent, None))
            errors = (squared_error(painted, truth), squared_error(mean_colour(batch, plan.patch_size), truth))
            sums += torch.stack([*errors, loss.double()]).cpu()
            count += len(captions)
            missing = PICTURES - len(rows)
            if missing > 0:
                first = select(batch, torch.arange(min(missing, len(captions))))
                texts = true_and_written(model, run.task.tokenizer, first, captions[:missing])
                rows += sample_rows(model, first, texts)
    pixel_error, baseline_error, image_loss = (sums / (count * plan.masked)).tolist()
    figures = {
        "samples": count, "patches": plan.patches, "masked_patches": plan.masked,
        "units": "squared error, mean over all values of the masked patches; pixels from 0 to 1, not clipped",
        "baseline": "each image's masked patches in the mean colour of its visible patches",
        "pixel_error": pixel_error, "baseline_error": baseline_error, "ratio": pixel_error / baseline_error,
        "image_loss": image_loss, "norm_pix_loss": plan.norm_pix,
        "pictures": [str(save_grid(rows, columns(model), folder / "reconstruction.png"))],
    }  # fmt: skip
    return {**figures, "note": TRUE_STATISTICS} if plan.norm_pix else figures


def squared_error(painted: Tensor, truth: Tensor) -> Tensor:
    """Mean over each patch's values, summed over patches and images; float64."""
    return (painted - truth).double().square().mean(dim=-1).sum()


def mean_colour(batch: MugBatch, patch_size: int) -> Tensor:
    """The mean colour of each image's visible patches as a patch, [b, 1, p * p * 3] float64; pixels from 0 to 1."""
    visible = take(patchify(batch.images, patch_size), batch.visible_ids).double() / 255
    colour = visible.unflatten(-1, (-1, 3)).mean(dim=(1, 2))  # [b, 3]
    return colour.repeat(1, patch_size**2).unsqueeze(1)
