"""Figures of a trained run on held-out data.

    megamug evaluate RUN --task reconstruction|captioning
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megamug.errors import UserError

# the loss weight that the task's decoder is trained with
DECODERS = {"reconstruction": "image_loss_weight", "captioning": "caption_loss_weight"}


def run_task(
    run_dir: str | Path,
    task: str,
    *,
    step: int | None = None,
    samples: int | None = None,
    data: object = None,
    output: str | Path | None = None,
) -> dict:
    """Measures the newest checkpoint of `run_dir` (or that of `step`) on held-out pairs, each counted once.

    Args:
        task: `reconstruction` or `captioning`.
        samples: pairs at most (default: data.validation_samples of the run).
        data: shards instead of the run's data.validation; the same forms.
        output: folder of `TASK.json` and pictures (default: RUN/evaluate/step-XXXXXXXX).

    Prints a short table on stderr; returns what TASK.json holds. Raises `UserError`: a run that cannot be read, without
    held-out data or without the task's decoder; what the task itself refuses.
    """
    from megamug.data.shards import write_atomically
    from megamug.evaluate import captioning, reconstruction
    from megamug.inference import load_run

    if task not in DECODERS:
        raise UserError(f"there is no task {task!r}; the tasks are {' and '.join(DECODERS)}")
    with load_run(run_dir, step) as run:
        config = run.config
        if getattr(config.model, DECODERS[task]) == 0:
            raise UserError(f"{run_dir} was trained with model.{DECODERS[task]}=0: nothing to measure for task {task}")
        if data is not None:
            config.data.validation = data
        if config.data.validation is None:
            raise UserError(f"{run_dir} was trained without data.validation; name held-out shards")
        folder = Path(output) if output is not None else Path(run_dir) / "evaluate" / f"step-{run.step:08d}"
        measure = {"reconstruction": reconstruction.measure, "captioning": captioning.measure}[task]
        figures = {
            "task": task, "checkpoint": str(run.checkpoint), "step": run.step, "data": config.data.validation,
            **measure(run, config.data.validation_samples if samples is None else samples, folder),
        }  # fmt: skip
    path = folder / f"{task}.json"
    write_atomically(path, (json.dumps(figures, indent=1) + "\n").encode())
    lines = [*table(figures), f"figures: {path}", *(f"picture: {picture}" for picture in figures["pictures"])]
    print("\n".join(lines), file=sys.stderr)
    return figures


def table(figures: dict) -> list[str]:
    """The figures that matter, a line each."""
    head = f"{figures['task']} of {figures['samples']} held-out pairs, step {figures['step']}"
    if figures["task"] == "reconstruction":
        return [
            head,
            f"  pixel error on masked patches   {figures['pixel_error']:.5f}",
            f"  of the visible mean colour      {figures['baseline_error']:.5f}",
            f"  ratio                           {figures['ratio']:.3f}",
            f"  image loss                      {figures['image_loss']:.5f}",
            *([f"  note: {figures['note']}"] if "note" in figures else []),
        ]
    views = [figures["masked"], figures["all_visible"]]
    rows = [
        ("visible patches", "visible_patches", "d"),
        ("caption loss, nat a token", "caption_loss", ".3f"),
        ("  with another image's latent", "caption_loss_other_image", ".3f"),
        ("  gap", "gap", ".3f"),
        ("captions exactly right", "exact_match", ".1%"),
        ("tokens right", "token_accuracy", ".1%"),
    ]
    cells = ("".join(f"{view[key]:>10{style}}" for view in views) for _, key, style in rows)
    return [head, *(f"  {title:<30}{cell}" for (title, _, _), cell in zip(rows, cells, strict=True))]
