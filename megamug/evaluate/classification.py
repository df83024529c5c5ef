"""How many held-out images a classifier gives their class: the likeliest, or one of the five likeliest."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from megamug.checkpoint import tokenizer_copy
from megamug.data.shards.sources import Source, check_labels, resolve_sources
from megamug.durable import write_atomically
from megamug.errors import UserError

RESULTS = "classification.jsonl"
MOST = 5  # answers that top-5 looks at; all classes where there are fewer


def measure(run, samples: int | None, folder: Path) -> dict:
    """Figures of at most `samples` held-out images (None: all), each once; FOLDER/classification.jsonl has every one.

    `weights` says whether they are those of the last step or their averages (`classifier.ema`). `loss` is the mean
    cross-entropy in nat, without label smoothing; `top1` and `top5` are shares of the images whose class is the
    likeliest or among the five likeliest, `per_class` the same of the images of each class that is there and
    `mean_per_class` its mean. Images are seen as in validation. Raises UserError where the data have other classes than
    the run.
    """
    names = check_classes(run.task.plan.classes, resolve_sources(run.config.data.validation), run.config.run_dir)
    classes, top = run.task.plan.classes, min(MOST, run.task.plan.classes)
    counts = torch.zeros(3, classes, dtype=torch.int64)  # images, right ones, right among the first
    total, results = 0.0, []
    loader = run.task.loader(run.world, train=False, max_samples=samples)
    try:
        with torch.inference_mode():
            for micro in (micro for pairs in loader for micro in pairs.micro_batches):
                rows = micro.valid.nonzero()[0].tolist()
                if not rows:
                    continue
                batch = run.task.batch(micro)
                logits, labels = run.model.logits(batch)[rows].cpu(), batch.labels[rows].cpu()
                losses, answers = F.cross_entropy(logits, labels, reduction="none"), logits.topk(top).indices
                right = answers == labels.unsqueeze(1)
                for row, of in enumerate((torch.ones_like(labels), right[:, 0], right.any(dim=1))):
                    counts[row].index_add_(0, labels, of.long())
                total += losses.double().sum().item()
                keys = micro.keys()
                results += [
                    {"key": keys[row], "label": label, "answers": some, "loss": loss}
                    for row, label, some, loss in zip(
                        rows, labels.tolist(), answers.tolist(), losses.tolist(), strict=True
                    )
                ]
    finally:
        loader.close()
    write_atomically(folder / RESULTS, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in results).encode())
    per_class = [
        {"class": number, "name": None if names is None else names[number], "samples": images, "top1": first / images,
         f"top{top}": some / images}
        for number, (images, first, some) in enumerate(counts.T.tolist()) if images
    ]  # fmt: skip
    count, first, some = counts.sum(dim=1).tolist()
    return {
        "weights": "averages" if run.averaged else "last",
        "samples": count, "classes": classes, "loss": total / count, "top1": first / count, f"top{top}": some / count,
        "mean_per_class": sum(one["top1"] for one in per_class) / len(per_class), "per_class": per_class,
        "results": str(folder / RESULTS),
    }  # fmt: skip


def check_classes(classes: int, sources: list[Source], run_dir: str) -> list[str] | None:
    """The names of the data's classes, None where there are none. Raises UserError: images without a class, more
    classes than the run has, or classes of other names."""
    check_labels(sources)
    return check_names(max(source.classes for source in sources), classes, sources, run_dir)


def check_names(found: int, classes: int, sources: list[Source], run_dir: str) -> list[str] | None:
    """The names of the `found` classes of these data, None where there are none. Raises UserError: more than the run
    has, or other names."""
    names, own = sources[0].class_names(), tokenizer_copy.kept_classes(Path(run_dir))
    if found > classes:
        raise UserError(f"{sources[0].name}: {found} classes, and {run_dir} was trained on {classes}; give data of the"
                        " same classes")
    if names is not None and own is not None and names != own:
        raise UserError(f"{sources[0].name}: its classes.txt is another than that of {run_dir}, so classes have other"
                        " numbers; number them alike")
    return names if names is not None else own
