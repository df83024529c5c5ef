"""How well captions are written, and whether the image is used for it.

The caption loss is taken with the right image's latent and with another image's (the pair before it in the batch): a
decoder that only knows what captions are like has the same loss with both. The likeliest captions are compared with the
true ones by `caption_figures`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from megamug.durable import write_atomically
from megamug.errors import UserError
from megamug.evaluate.caption_figures import TOKENIZATION, caption_figures
from megamug.evaluate.references import References
from megamug.generation.captions import all_visible, encode, generate_tokens
from megamug.generation.pictures import columns, held_out_samples, sample_rows, select
from megamug.models.mug.model import MugBatch
from megamug.telemetry.pictures import save_grid

EXAMPLES = 12  # samples listed and shown
COCO = "captioning.coco.json"  # what was written with all patches visible, in COCO's format of results


@dataclass
class View:
    """Sums of one way of showing the images to the encoder."""

    counted: ClassVar[str] = "tokens"  # what `tokens` are: what losses and accuracy are over

    visible_patches: int
    loss: float = 0.0
    other_loss: float = 0.0
    exact: int = 0
    right_tokens: int = 0
    tokens: int = 0
    pairs: int = 0
    written: list[str] = field(default_factory=list)
    spare: Tensor | None = None  # the latent [., 1, h] of an image of the batch before

    def losses(self, model, batch: MugBatch) -> Tensor:
        """Adds the losses of `batch` with the latent of its images, which it returns, and with others'."""
        latent = encode(model, batch)
        other = latent.roll(1, dims=1) if latent.shape[1] > 1 else self.spare
        if other is None:
            raise UserError("two held-out pairs or more are needed, to take another image's latent")
        self.spare = latent[:, :1]
        self.loss += _loss(model, batch, latent)
        self.other_loss += _loss(model, batch, other)
        return latent

    def add(self, model, tokenizer, batch: MugBatch) -> list[dict]:
        """Counts the pairs of `batch`; returns what was written of each."""
        latent = self.losses(model, batch)
        written = generate_tokens(model, latent)
        true, pad = batch.tokens[:, 1:], model.plan.marks.pad
        self.right_tokens += right_tokens(written, true, pad)
        self.tokens += sum(self.terms(model, batch))
        texts = [tokenizer.decode(row) for row in written.tolist()]
        exact = [text == tokenizer.decode(row) for text, row in zip(texts, true.tolist(), strict=True)]
        self.exact += sum(exact)
        self.pairs += len(texts)
        self.written += texts[: EXAMPLES - len(self.written)]
        return [
            {"caption": text, "exact": same, "right_tokens": right_tokens(written[i : i + 1], true[i : i + 1], pad)}
            for i, (text, same) in enumerate(zip(texts, exact, strict=True))
        ]

    def terms(self, model, batch: MugBatch) -> list[int]:
        """Of each pair, the tokens that count: those of its caption and its end."""
        return (batch.tokens[:, 1:] != model.plan.marks.pad).sum(dim=1).tolist()

    def figures(self) -> dict:
        loss, other = self.loss / self.tokens, self.other_loss / self.tokens
        return {
            "visible_patches": self.visible_patches, "caption_loss": loss, "caption_loss_other_image": other,
            "gap": other - loss, "exact_match": self.exact / self.pairs,
            "token_accuracy": self.right_tokens / self.tokens,
        }  # fmt: skip


def measure(run, samples: int, folder: Path, references: References | None = None) -> dict:
    """Figures of at most `samples` held-out pairs, examples, and a picture of them; FOLDER/captioning.jsonl has all.

    `masked`: with the patches hidden that training hides; `all_visible`: with none hidden. In each: `caption_loss` and
    `caption_loss_other_image` in nat a token, the end token included, `gap` between them; of the likeliest captions
    (greedy), `exact_match` is the share that reads as the true one, `token_accuracy` the share of the true tokens, end
    included, that stand in their places; `text` is what `caption_figures` says of them, beside all true captions of the
    samples, or those of `references`. With these, FOLDER/captioning.coco.json has what was written with none hidden as
    COCO's server takes it. Raises UserError where no sample has a reference.
    """
    figures, results = measure_views(run, samples, folder, "captioning", View, references)
    compared = [result for result in results if result["references"]]
    if not compared:
        raise UserError(f"--references {references.path}: none of the {len(results)} samples that were measured is in"
                        " there; raise --samples")  # fmt: skip
    told = {"samples": len(compared), "references": sum(len(r["references"]) for r in compared),
            "tokenization": TOKENIZATION}  # fmt: skip
    if references is not None:
        told["list"] = references.figures()
        told["coco_results"] = str(folder / COCO)
        answers = [{"image_id": r["image_id"], "caption": r["all_visible"]["caption"]} for r in compared]
        write_atomically(folder / COCO, json.dumps(answers, ensure_ascii=False).encode())
    for view in ("masked", "all_visible"):
        figures[view]["text"] = caption_figures(
            [r[view]["caption"] for r in compared], [r["references"] for r in compared]
        )
    return {**figures, "compared": told}


def measure_views(
    run, samples: int, folder: Path, task: str, view: type[View], references: References | None = None
) -> tuple[dict, list[dict]]:
    """The figures of a task that tells captions, by a `view` for each way of showing the images, and every sample: its
    true captions (or those of `references`) and what was told, which FOLDER/TASK.jsonl has, too, a line each."""
    model, plan, tokenizer = run.model, run.task.plan, run.task.tokenizer
    masked, whole = view(plan.visible), view(plan.patches)
    captions, rows, results = [], [], []
    with torch.inference_mode():
        for batch, pairs, valid in held_out_samples(run.task, run.world, samples):
            captions_of, places, texts_of = pairs.captions(), pairs.places(), pairs.references()
            true = [captions_of[i] for i in valid]
            seen = masked.add(model, tokenizer, batch)
            unmasked = whole.add(model, tokenizer, all_visible(batch, plan.patches))
            terms = masked.terms(model, batch)
            for place, caption in enumerate(true):
                image = None if references is None else references.of(places[valid[place]])
                own = texts_of[valid[place]] if references is None else image and image.captions
                results.append({
                    "sample": len(results), "key": places[valid[place]][1], "caption": caption, "references": own,
                    "image_id": image and image.id, view.counted: terms[place], "all_visible": unmasked[place],
                    "masked": seen[place],
                })  # fmt: skip
            missing = EXAMPLES - len(rows)
            if missing > 0:
                first, start = select(batch, torch.arange(min(missing, len(true)))), len(rows)
                captions += true[:missing]
                texts = [
                    [f"true: {captions[i]}", f"all visible: {whole.written[i]}", f"masked: {masked.written[i]}"]
                    for i in range(start, len(captions))
                ]
                rows += sample_rows(model, first, texts)
    examples = [
        {"caption": true, "all_visible": a, "masked": b}
        for true, a, b in zip(captions, whole.written, masked.written, strict=True)
    ]
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    write_atomically(folder / f"{task}.jsonl", lines.encode())
    figures = {
        "samples": masked.pairs, view.counted: masked.tokens, "patches": plan.patches,
        "units": "losses in nat a token; the other image is the pair before in the batch",
        "masked": masked.figures(), "all_visible": whole.figures(), "examples": examples,
        "results": str(folder / f"{task}.jsonl"),
        "pictures": [str(save_grid(rows, columns(model), folder / f"{task}.png"))],
    }  # fmt: skip
    return figures, results


def right_tokens(written: Tensor, true: Tensor, pad: int) -> int:
    """True tokens (padding, `pad`, is none) that `written` [b, t] has in the same place; `true` is [b, T], T >= t."""
    return int(((written == true[:, : written.shape[1]]) & (written != pad)).sum())


def _loss(model, batch: MugBatch, latent: Tensor) -> float:
    """Summed over the tokens of the captions."""
    decoder = model.text_decoder
    return decoder.loss(batch, decoder(batch, latent, None))[0].item()
