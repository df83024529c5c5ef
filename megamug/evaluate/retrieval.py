"""Which caption belongs to which image, ranked by the caption decoder's likelihood p(text | image).

N images are scored with all T texts of the set. A caption that is likely beside any image would be ranked first for all
of them, so log p(text | image) is also taken less alpha times log p(text), where p(text) is the mean of p(text | image)
over the N images: alpha 1 ranks by pointwise mutual information (Lin et al., *VisualGPTScore*, arXiv 2306.01879). Both
also per token, as a sum over tokens favours short texts. Neither changes in which order a text ranks images.

Counted as for COCO: of an image's captions the one that is ranked highest counts, each caption is a query for its
image; R@K is the share of the queries whose rank is K or better. A text that several images have is one candidate, and
is right for each of them. Of two equal scores the wrong one is ranked first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megamug.data.tooling import Progress
from megamug.durable import write_atomically
from megamug.errors import UserError
from megamug.generation.captions import all_visible, encode
from megamug.generation.pictures import held_out_samples
from megamug.models.blocks.layers import kept_latent
from megamug.models.mug.model import Mug, MugBatch
from megamug.telemetry.pictures import PictureRow, save_grid

RESULTS = "retrieval.jsonl"  # every query, a line each
SHARES = (1, 5, 10)  # K of R@K
TOP = 10  # candidates listed of each query
EXAMPLES, SHOWN = 6, 4  # queries in the pictures, and candidates of each
THUMBNAIL = 96  # pixels of a side: all images are kept so small until they are drawn
LOGITS_BYTES = 256 * 2**20  # of the logits that exist at once
PAIRS = 256  # of images and texts in a forward, where one image block is smaller
SCORE_BYTES = 8 * 2**30  # of all scores

# How texts are ranked for an image: (alpha of the prior, whether per token)
RANKINGS = {
    "likelihood": (0.0, False), "likelihood_per_token": (0.0, True), "half_prior": (0.5, False), "prior": (1.0, False),
    "prior_per_token": (1.0, True),
}  # fmt: skip
SHOWN_RANKING = "prior"


@dataclass
class Set:
    """The held-out images and texts."""

    places: list[tuple[Path, str]]  # shard and key of each of the N images
    texts: list[str]  # the T that are different
    own: list[list[int]]  # the texts of each image

    def owners(self) -> list[list[int]]:
        """The images of each text."""
        found: list[list[int]] = [[] for _ in self.texts]
        for image, texts in enumerate(self.own):
            for text in texts:
                found[text].append(image)
        return found


def measure(run, samples: int, folder: Path) -> dict:
    """Figures of at most `samples` held-out images and all their captions; FOLDER/retrieval.jsonl has every query.

    `text_to_image`, and under `image_to_text` each of `RANKINGS`: `r1`, `r5`, `r10` (0..1), `median_rank`, `mean_rank`,
    and `chance`, the R@K of a random order. Images are seen whole. The encoder runs once for each image; its keys and
    values are kept while the decoder takes all texts. Raises UserError: fewer than two images or texts, more scores
    than `SCORE_BYTES`, scores that are not finite, a sample that could not be read.
    """
    model, device = run.model, run.world.device
    data = read_texts(run, samples)
    images, texts = len(data.places), len(data.texts)
    if min(images, texts) < 2:
        raise UserError(f"retrieval needs two images and two different texts or more, and the data have {images} and"
                        f" {texts}; name more with --data, or raise --samples")  # fmt: skip
    if 8 * images * texts > SCORE_BYTES:
        raise UserError(f"retrieval keeps a score for each of {images:,} images with each of {texts:,} texts,"
                        f" {8 * images * texts / 2**30:.0f} GiB; lower --samples")  # fmt: skip
    tokens = run.task.tokenizer.encode_batch(data.texts, run.config.data.caption_length).to(device)
    scores, thumbnails = np.empty((images, texts)), []
    progress, first, seconds = Progress("pairs", images * texts), 0, 0.0
    with torch.inference_mode():
        for batch, pairs, rows in held_out_samples(run.task, run.world, samples):
            found = pairs.places()
            if (there := [found[row] for row in rows]) != (before := data.places[first : first + len(rows)]):
                path, key = next(b for b, t in zip(before, there, strict=True) if b != t)
                raise UserError(f"{path}, sample {key}: cannot be read or does not decode, so another one took its"
                                " place; run megamug data index again on its shard")  # fmt: skip
            began = time.monotonic()
            latent = encode(model, all_visible(batch, model.plan.patches))
            for part, of_part in blocks(latent, tokens, model):
                scores[first : first + part] = of_part.numpy()
                first += part
                progress.update(part * texts)
            seconds += time.monotonic() - began
            thumbnails.append(_small(batch.images))
    if not np.isfinite(scores).all():
        raise UserError(f"step {run.step}: the likelihoods of {int((~np.isfinite(scores)).sum()):,} pairs are not"
                        " finite; name another --checkpoint")  # fmt: skip
    lengths = (tokens[:, 1:] != model.plan.marks.pad).sum(dim=1).cpu().numpy()
    figures, queries = rank_all(data, scores, lengths)
    lines = "".join(json.dumps(query, ensure_ascii=False) + "\n" for query in queries)
    write_atomically(folder / RESULTS, lines.encode())
    return {
        "samples": images, "texts": texts, "captions": sum(map(len, data.own)), **figures,
        "pairs_per_second": images * texts / seconds, "results": str(folder / RESULTS),
        "pictures": _draw(data, queries, torch.cat(thumbnails), folder),
    }  # fmt: skip


def read_texts(run, samples: int) -> Set:
    """The held-out set that `held_out_samples` gives, without its pixels."""
    loader = run.task.pairs(run.world, False, None, samples, True, need_images=False)
    places, captions = [], []
    try:
        for micro in (micro for batch in loader for micro in batch.micro_batches):
            rows = micro.valid.nonzero()[0].tolist()
            found, references = (micro.places(), micro.references()) if rows else ([], [])
            places += [found[row] for row in rows]
            captions += [references[row] for row in rows]
    finally:
        loader.close()
    numbers: dict[str, int] = {}
    own = [list(dict.fromkeys(numbers.setdefault(text, len(numbers)) for text in some)) for some in captions]
    return Set(places, list(numbers), own)


def blocks(latent: Tensor, tokens: Tensor, model: Mug) -> Iterator[tuple[int, Tensor]]:
    """(n, log p(text | image) of n images [n, T], float64 on the CPU) for the b images of `latent` [., b, h], in their
    order.

    `tokens` [T, t + 1]. A forward takes n images with k texts, as many as `LOGITS_BYTES` and `PAIRS` allow, texts of
    about one length together; padding behind the longest of them is cut off.
    """
    plan, decoder = model.plan, model.text_decoder
    pad, texts = plan.marks.pad, len(tokens)
    lengths = (tokens[:, 1:] != pad).sum(dim=1)
    most = max(1, LOGITS_BYTES // (4 * int(lengths.max()) * plan.padded_vocabulary))
    order = lengths.argsort(stable=True)
    for some in latent.split(most, dim=1):
        n = some.shape[1]
        k = max(1, min(most, PAIRS) // n)
        scores = torch.empty(n, texts, dtype=torch.float64)
        with kept_latent(decoder):
            context = some.repeat(1, k, 1)  # row j * n + i is image i with text j
            for first in range(0, texts, k):
                chosen = order[first : first + k]
                fill = chosen[torch.arange(k, device=chosen.device).clamp(max=len(chosen) - 1)]
                own = tokens[fill, : int(lengths[fill].max()) + 1].repeat_interleave(n, dim=0)
                batch = MugBatch(None, None, tokens=own)
                losses = decoder.loss(batch, decoder(batch, context, None), per_token=True)[2]  # [t, k * n]
                scores[:, chosen.cpu()] = -losses.double().sum(dim=0).view(k, n)[: len(chosen)].T.cpu()
        yield n, scores


def log_prior(scores: np.ndarray) -> np.ndarray:
    """log p(text) [T] of log p(text | image) [N, T]: the mean of p over the images."""
    highest = scores.max(axis=0)
    return highest + np.log(np.exp(scores - highest).mean(axis=0))


def rank_all(data: Set, scores: np.ndarray, lengths: np.ndarray) -> tuple[dict, list[dict]]:
    """Figures and queries, by log p(text | image) `scores` [N, T] and the texts' lengths [T], in tokens."""
    owners, prior = data.owners(), log_prior(scores)
    images, texts = scores.shape
    keys = [key for _, key in data.places]
    queries = [{"query": "image", "key": keys[i], "captions": [data.texts[t] for t in own], "ranks": {}}
               for i, own in enumerate(data.own)]  # fmt: skip
    figures = {}
    for name, (alpha, per_token) in RANKINGS.items():
        ranked = (scores - alpha * prior) / (lengths if per_token else 1)
        for query, row, own in zip(queries, ranked, data.own, strict=True):
            query["ranks"][name] = rank(row, own)
            if name == SHOWN_RANKING:
                query["top"] = [{"text": data.texts[t], "score": row[t], "right": t in own} for t in best(row)]
        figures[name] = shares([query["ranks"][name] for query in queries])
    chance = {f"r{k}": float(np.mean([by_chance(texts, len(own), k) for own in data.own])) for k in SHARES}
    by_text = []
    for text, own in enumerate(owners):
        column = scores[:, text]
        top = [{"key": keys[i], "image": i, "score": column[i], "right": i in own} for i in best(column)]
        by_text.append({"query": "text", "caption": data.texts[text], "keys": [keys[i] for i in own],
                        "rank": rank(column, own), "top": top})  # fmt: skip
    of_captions = [by_text[text]["rank"] for own in data.own for text in own]
    wanted = [len(owners[text]) for own in data.own for text in own]
    return {
        "image_to_text": {**figures, "chance": chance},
        "text_to_image": {
            **shares(of_captions),
            "chance": {f"r{k}": float(np.mean([by_chance(images, n, k) for n in wanted])) for k in SHARES},
        },
    }, queries + by_text  # fmt: skip


def rank(scores: np.ndarray, own: list[int]) -> int:
    """Of the best of the candidates `own`, from 1 on; others of the same score come first."""
    wrong = np.delete(scores, own)
    return 1 + int((wrong >= scores[own].max()).sum())


def best(scores: np.ndarray) -> list[int]:
    """The first `TOP` candidates."""
    return np.argsort(-scores, kind="stable")[:TOP].tolist()


def shares(ranks: list[int]) -> dict:
    found = np.array(ranks)
    recalls = {f"r{k}": float((found <= k).mean()) for k in SHARES}
    return {**recalls, "median_rank": float(np.median(found)), "mean_rank": float(found.mean())}


def by_chance(candidates: int, right: int, k: int) -> float:
    """How often one of the `right` ones is among the first k of a random order."""
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k) if k < candidates else 1.0


def _small(images: Tensor) -> Tensor:
    """uint8 [b, 3, S, S] on the CPU, S at most `THUMBNAIL`."""
    if images.shape[-1] > THUMBNAIL:
        images = F.interpolate(images.float(), size=(THUMBNAIL, THUMBNAIL), mode="area").round().to(torch.uint8)
    return images.cpu()


def _draw(data: Set, queries: list[dict], thumbnails: Tensor, folder: Path) -> list[str]:
    """Pictures of the first images with the texts ranked first, and of texts with the images ranked first."""
    pixels = thumbnails.permute(0, 2, 3, 1).contiguous().numpy()
    count = min(EXAMPLES, len(pixels))
    by_image = []
    for image, query in zip(pixels, queries[:count], strict=False):
        lines = [f"{place}{' (right)' * one['right']}: {one['text']}" for place, one in
                 enumerate(query["top"][:SHOWN], start=1)]  # fmt: skip
        by_image.append(PictureRow(
            [image], [f"true: {query['captions'][0]}", *lines, f"rank {query['ranks'][SHOWN_RANKING]}"]
        ))  # fmt: skip
    by_text, texts = [], queries[len(data.places) :]
    shown = min(SHOWN, len(pixels))
    for query in (texts[own[0]] for own in data.own[:count]):
        right = [str(place) for place, one in enumerate(query["top"][:shown], start=1) if one["right"]]
        told = f"right: {', '.join(right) or 'none of these'}; rank {query['rank']}"
        by_text.append(PictureRow([pixels[one["image"]] for one in query["top"][:shown]], [query["caption"], told]))
    return [
        str(save_grid(by_image, ["image"], folder / "retrieval-texts.png")),
        str(save_grid(by_text, [str(place) for place in range(1, shown + 1)], folder / "retrieval-images.png")),
    ]
