"""Figures of a trained run on held-out data.

    megamug evaluate RUN --task reconstruction|captioning|retrieval|masked_text      (MUG)
    megamug evaluate RUN --task perplexity|choices                                   (language models)
    megamug evaluate RUN --task classification                                       (classifiers)
    megamug evaluate RUN --task segmentation                                         (segmenters)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megamug.errors import UserError
from megamug.evaluate.caption_figures import NAMES

# the loss weight that the task's decoder is trained with
DECODERS = {
    "reconstruction": "image_loss_weight", "captioning": "caption_loss_weight", "retrieval": "caption_loss_weight",
    "masked_text": "caption_loss_weight",
}  # fmt: skip
# model.text_objective of the tasks that read captions
OBJECTIVES = {"captioning": "autoregressive", "retrieval": "autoregressive", "masked_text": "masked"}
TASKS = (*DECODERS, "perplexity", "choices", "classification", "segmentation")
OF_KIND = {
    "mug": tuple(DECODERS), "decoder_lm": ("perplexity", "choices"), "jam_cross": ("perplexity", "choices"),
    "classifier": ("classification",), "segmenter": ("segmentation",),
}  # fmt: skip


def run_task(
    run_dir: str | Path,
    task: str,
    *,
    step: int | None = None,
    samples: int | None = None,
    data: object = None,
    output: str | Path | None = None,
    references: str | Path | None = None,
    suite: str | None = None,
    predictions: bool = False,
) -> dict:
    """Measures the newest checkpoint of `run_dir` (or that of `step`) on held-out data, each sample counted once.

    Args:
        task: `reconstruction`, `captioning`, `retrieval` or `masked_text` of MUG, `perplexity` or `choices` of a
            language model, `classification`, `segmentation`.
        samples: pairs, or documents, at most (default: data.validation_samples of the run; of classification,
            segmentation and choices, all).
        data: instead of the run's data.validation, in the same forms: shards, or folders of tokenised documents. Of
            choices: files of the suite, or folders of lm-eval's task files.
        predictions: of segmentation: write the classes of every image as a PNG.
        output: folder of `TASK.json` and pictures (default: RUN/evaluate/step-XXXXXXXX).
        references: of captioning, a list of captions as COCO writes it, in the place of the data's own.
        suite: of choices, see `megamug.evaluate.choices`.

    Prints a short table on stderr; returns what TASK.json holds. In several processes (language models) the first one
    writes and prints. Raises `UserError`: a run that cannot be read, of another kind than the task's, without held-out
    data or without the task's decoder; a library that is missing; what the task itself refuses. All but the last before
    a model is built.
    """
    check(run_dir, task, data=data, references=references, suite=suite)
    from megamug.durable import write_atomically
    from megamug.evaluate import (
        captioning,
        choices,
        classification,
        masked_text,
        perplexity,
        reconstruction,
        retrieval,
        segmentation,
    )
    from megamug.generation.loading import load_run

    questions, unanswered = choices.check(suite, data) if task == "choices" else ([], 0)
    matched = None
    if references is not None:
        from megamug.data.shards.sources import resolve_sources
        from megamug.evaluate.references import match
        from megamug.generation.loading import read_config

        held_out = read_config(Path(run_dir)).data.validation if data is None else data
        matched = match(Path(references), resolve_sources(held_out, captions=True))
    with load_run(run_dir, step) as run:
        config = run.config
        if data is not None:
            config.data.validation = data
        folder = Path(output) if output is not None else Path(run_dir) / "evaluate" / f"step-{run.step:08d}"
        most = config.data.validation_samples if samples is None else samples
        if task == "perplexity":
            measured = perplexity.measure(run, most)
        elif task == "choices":
            measured = choices.run_suite(run, suite, data, questions, samples, folder) | {"unanswered": unanswered}
        elif task == "classification":
            measured = classification.measure(run, samples, folder)
        elif task == "segmentation":
            measured = segmentation.measure(run, samples, folder, predictions)
        elif task == "captioning":
            measured = captioning.measure(run, most, folder, matched)
        else:
            module = {"reconstruction": reconstruction, "retrieval": retrieval, "masked_text": masked_text}[task]
            measured = module.measure(run, most, folder)
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


def check(
    run_dir: str | Path,
    task: str,
    *,
    data: object = None,
    references: str | Path | None = None,
    suite: str | None = None,
) -> None:
    """Raises UserError for what `run_task` would refuse of these, as far as that needs no model: first what the run is,
    then what it is to be measured on."""
    from megamug.configuration.reading import load_config

    if task not in TASKS:
        raise UserError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml; give run_dir of the configuration")
    config = load_config(path)
    check_kind(task, config.model.kind, run_dir)
    check_decoder(task, config.model, run_dir)
    if references is not None and task != "captioning":
        raise UserError(f"--references is for --task captioning, and the task is {task}; leave it out")
    if suite is not None and task != "choices":
        raise UserError(f"--suite is of --task choices, not of {task}; leave it out")
    if task == "choices":  # its files are read once, in `run_task`
        return
    if data is None and config.data.validation is None:
        raise UserError(f"{run_dir} was trained without data.validation; name held-out shards with --data")
    if data is not None:
        try:
            _check_data(task, data)
        except UserError as error:
            raise UserError(f"--data: {error}") from None
    if task == "perplexity":
        _check_documents(Path(run_dir), data)
    if task == "captioning":
        from megamug.evaluate.caption_figures import check_libraries

        check_libraries()


def _check_data(task: str, data: object) -> None:
    if task == "perplexity":
        from megamug.data.documents.indexed import document_folders, read_header

        for folder, _ in document_folders(data):
            read_header(Path(folder))
    else:
        from megamug.data.shards.sources import resolve_sources

        resolve_sources(data, captions=task in OBJECTIVES)


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


def check_decoder(task: str, model, run_dir: str | Path) -> None:
    """Raises UserError where a MUG of the section `model` has no decoder that the task could measure."""
    if task in DECODERS and getattr(model, DECODERS[task]) == 0:
        raise UserError(f"--task {task}: {run_dir} was trained with model.{DECODERS[task]}=0, so it has no such"
                        " decoder; choose another task")
    if OBJECTIVES.get(task, model.text_objective) != model.text_objective:
        does, other = {
            "masked": ("fills in hidden words of a caption and writes none", "masked_text"),
            "autoregressive": ("writes captions and has no mask to fill in", "captioning"),
        }[model.text_objective]
        raise UserError(f"--task {task}: {run_dir} was trained with model.text_objective={model.text_objective}, whose"
                        f" decoder {does}; choose --task {other}")


def table(figures: dict) -> list[str]:
    """The figures that matter, a line each."""
    if figures["task"] == "perplexity":
        return _perplexity_table(figures)
    if figures["task"] == "classification":
        return _classification_table(figures)
    if figures["task"] == "segmentation":
        return _segmentation_table(figures)
    if figures["task"] == "retrieval":
        return _retrieval_table(figures)
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

    def row(title: str, style: str, values: list) -> str:
        return f"  {title:<30}{''.join(f'{value:>10{style}}' for value in values)}"

    rows = [("visible patches", "visible_patches", "d")]
    if figures["task"] == "masked_text":
        head += f", {figures['hidden_tokens']:,} hidden tokens"
        rows += [("loss, nat a hidden token", "masked_token_loss", ".3f"),
                 ("  with another image's latent", "masked_token_loss_other_image", ".3f"),
                 ("  gap", "gap", ".3f"), ("hidden tokens right", "masked_token_accuracy", ".1%")]  # fmt: skip
    else:
        rows += [("caption loss, nat a token", "caption_loss", ".3f"),
                 ("  with another image's latent", "caption_loss_other_image", ".3f"), ("  gap", "gap", ".3f"),
                 ("captions exactly right", "exact_match", ".1%"),
                 ("tokens right", "token_accuracy", ".1%")]  # fmt: skip
    lines = [row(title, style, [view[key] for view in views]) for title, key, style in rows]
    if "compared" in figures:
        told = figures["compared"]
        of = "" if told["samples"] == figures["samples"] else f"of {told['samples']} pairs, "
        lines.append(f"  {of}beside {told['references'] / told['samples']:.3g} true captions each:")
        lines += [row(title, ".3f", [view["text"][key] for view in views]) for key, title in NAMES.items()]
    return [head, *lines]


def _retrieval_table(figures: dict) -> list[str]:
    def row(title: str, one: dict) -> str:
        rank = f"{one['median_rank']:>13g}" if "median_rank" in one else ""
        return f"  {title:<38}" + "".join(f"{one[name]:>9.1%}" for name in ("r1", "r5", "r10")) + rank

    texts, images = figures["image_to_text"], figures["text_to_image"]
    titles = {
        "likelihood": "log p(text | image)", "likelihood_per_token": "  per token", "half_prior": "  - 0.5 log p(text)",
        "prior": "  - log p(text)", "prior_per_token": "  - log p(text), per token", "chance": "a random order",
    }  # fmt: skip
    return [
        f"retrieval among {figures['samples']:,} images and {figures['texts']:,} texts, step {figures['step']}",
        f"  {'image to text':<38}{'R@1':>9}{'R@5':>9}{'R@10':>9}{'median rank':>13}",
        *(row(f"  {title}", texts[name]) for name, title in titles.items()),
        "  text to image",
        row("  log p(text | image)", images), row("  a random order", images["chance"]),
    ]  # fmt: skip


def _classification_table(figures: dict) -> list[str]:
    rows = {f"top-{key[3:]}": figures[key] for key in figures if key.startswith("top")}
    rows["mean of classes"] = figures["mean_per_class"]
    return [
        f"classification of {figures['samples']:,} held-out images, step {figures['step']}"
        + (" (averages of the weights)" if figures["weights"] == "averages" else ""),
        *(f"  {title:<20}{share:>10.2%}" for title, share in rows.items()),
        f"  {'loss, nat':<20}{figures['loss']:>10.4f}",
    ]


def _segmentation_table(figures: dict) -> list[str]:
    rows = {"mean IoU": "mean_iou", "pixel accuracy": "pixel_accuracy", "mean of classes": "mean_accuracy"}
    return [
        f"segmentation of {figures['samples']:,} held-out images, step {figures['step']}",
        *(f"  {title:<20}{figures[key]:>10.2%}" for title, key in rows.items()),
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
