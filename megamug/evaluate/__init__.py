"""Figures of a trained run on held-out data.

    megamug evaluate RUN --task reconstruction|captioning      (MUG)
    megamug evaluate RUN --task perplexity|choices             (language models)
    megamug evaluate RUN --task classification                 (classifiers)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megamug.errors import UserError

# the loss weight that the task's decoder is trained with
DECODERS = {"reconstruction": "image_loss_weight", "captioning": "caption_loss_weight"}
TASKS = (*DECODERS, "perplexity", "choices", "classification")
OF_KIND = {
    "mug": tuple(DECODERS), "decoder_lm": ("perplexity", "choices"), "jam_cross": ("perplexity", "choices"),
    "classifier": ("classification",),
}  # fmt: skip


def run_task(
    run_dir: str | Path,
    task: str,
    *,
    step: int | None = None,
    samples: int | None = None,
    data: object = None,
    output: str | Path | None = None,
    suite: str | None = None,
) -> dict:
    """Measures the newest checkpoint of `run_dir` (or that of `step`) on held-out data, each sample counted once.

    Args:
        task: `reconstruction` or `captioning` of MUG, `perplexity` or `choices` of a language model, `classification`.
        samples: pairs, or documents, at most (default: data.validation_samples of the run; of classification and
            choices, all).
        data: instead of the run's data.validation, in the same forms: shards, or folders of tokenised documents. Of
            choices: files of the suite, or folders of lm-eval's task files.
        suite: of choices, see `megamug.evaluate.choices`.
        output: folder of `TASK.json` and pictures (default: RUN/evaluate/step-XXXXXXXX).

    Prints a short table on stderr; returns what TASK.json holds. In several processes (language models) the first one
    writes and prints. Raises `UserError`: a run that cannot be read, of another kind than the task's, without held-out
    data or without the task's decoder; what the task itself refuses.
    """
    from megamug.durable import write_atomically
    from megamug.evaluate import captioning, choices, classification, perplexity, reconstruction
    from megamug.generation.loading import load_run

    if task not in TASKS:
        raise UserError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    if task == "perplexity":
        _check_documents(Path(run_dir), data)
    if suite is not None and task != "choices":
        raise UserError(f"--suite is of --task choices, not of {task}; leave it out")
    questions, unanswered = choices.check(suite, data) if task == "choices" else ([], 0)
    with load_run(run_dir, step) as run:
        config = run.config
        check_kind(task, config.model.kind, run_dir)
        if task in DECODERS and getattr(config.model, DECODERS[task]) == 0:
            raise UserError(f"{run_dir} was trained with model.{DECODERS[task]}=0: nothing to measure for task {task}")
        if data is not None:
            config.data.validation = data
        if config.data.validation is None and task != "choices":
            raise UserError(f"{run_dir} was trained without data.validation; name held-out shards")
        folder = Path(output) if output is not None else Path(run_dir) / "evaluate" / f"step-{run.step:08d}"
        most = config.data.validation_samples if samples is None else samples
        if task == "perplexity":
            measured = perplexity.measure(run, most)
        elif task == "choices":
            measured = choices.run_suite(run, suite, data, questions, samples, folder) | {"unanswered": unanswered}
        elif task == "classification":
            measured = classification.measure(run, samples, folder)
        else:
            measured = {"reconstruction": reconstruction.measure, "captioning": captioning.measure}[task](
                run, most, folder
            )
        figures = {
            "task": task, "checkpoint": str(run.checkpoint), "step": run.step,
            "data": choices.paths_of(data) if task == "choices" else config.data.validation, **measured,
        }
        if not run.world.is_first:
            return figures
    path = folder / f"{task}.json"
    write_atomically(path, (json.dumps(figures, indent=1) + "\n").encode())
    lines = [*table(figures), f"figures: {path}"]
    lines += [f"every sample: {figures['results']}"] if "results" in figures else []
    lines += [*(f"picture: {picture}" for picture in figures.get("pictures", []))]
    print("\n".join(lines), file=sys.stderr)
    return figures


def _check_documents(run_dir: Path, data: object) -> None:
    """Raises UserError where the documents cannot be read, or are of another vocabulary than the run."""
    from megamug.configuration import validate_lm
    from megamug.data.documents.indexed import open_documents
    from megamug.data.documents.vocabulary import Vocabulary
    from megamug.generation.loading import read_config

    config = read_config(run_dir)
    validate_lm.reading(config, run_dir)
    sets = config.data.validation if data is None else data
    if config.model.kind != "mug" and sets is not None:
        open_documents(sets, Vocabulary.load(config.data.tokenizer), config.data.verify)


def check_kind(task: str, kind: str, run_dir: str | Path) -> None:
    """Raises UserError where a model of this kind has no such task."""
    own = OF_KIND.get(kind, ())
    if task not in own:
        if not own:
            raise UserError(f"{run_dir} is a run of {kind}, which no task measures")
        raise UserError(f"--task {task}: {run_dir} is a run of {kind}, whose tasks are: {', '.join(own)}; choose one")


def table(figures: dict) -> list[str]:
    """The figures that matter, a line each."""
    if figures["task"] == "perplexity":
        return _perplexity_table(figures)
    if figures["task"] == "classification":
        return _classification_table(figures)
    if figures["task"] == "choices":
        from megamug.evaluate import choices

        return choices.table(figures)
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


def _classification_table(figures: dict) -> list[str]:
    rows = {f"top-{key[3:]}": figures[key] for key in figures if key.startswith("top")}
    rows["mean of classes"] = figures["mean_per_class"]
    return [
        f"classification of {figures['samples']:,} held-out images, step {figures['step']}",
        *(f"  {title:<20}{share:>10.2%}" for title, share in rows.items()),
        f"  {'loss, nat':<20}{figures['loss']:>10.4f}",
    ]


def _perplexity_table(figures: dict) -> list[str]:
    lines = [
        f"perplexity of {figures['samples']} held-out documents, step {figures['step']}",
        f"  {'':<20}{'tokens':>12}{'nat a token':>14}{'perplexity':>14}",
    ]
    for name, row in {**figures["modalities"], "all": figures["all"]}.items():
        if row["tokens"]:
            title = name.replace("_", " ")
            lines.append(f"  {title:<20}{row['tokens']:>12,}{row['loss']:>14.4f}{row['perplexity']:>14.3f}")
    return lines
