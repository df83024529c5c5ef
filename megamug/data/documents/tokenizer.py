"""Documents in shards -> a folder of tokenised documents. Stopped at any moment, the next call goes on.

A shard is taken in chunks of `CHUNK` samples, each chunk in a process. A finished chunk is one file, a part, with its
tokens, counts and what was quarantined. When all parts are there they are joined in the order of the shards, so the
result does not depend on how often it was interrupted, nor on how many processes worked.

What turns images into ids belongs to the image tokenizer and is handed in: `megamug.models.image_tokenizer.encoder`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamug.command_line.console import counted
from megamug.data.documents.indexed import (
    IMAGE,
    MARKER,
    NAME,
    RESPONSE,
    DocumentsHeader,
    Part,
    content_sha256,
    join_parts,
    read_header,
    write_header,
)
from megamug.data.documents.reading import (
    PAIR_ORDERS,
    Document,
    DocumentShard,
    Picture,
    Sample,
    open_shard,
    read_documents,
    read_pairs,
)
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.shards.captions import LINES
from megamug.data.shards.sources import find_shards
from megamug.data.shards.tar_members import problem
from megamug.data.tooling import Progress, default_processes, parallel_map
from megamug.durable import write_atomically
from megamug.errors import UserError, printable

CHUNK = 1024  # samples; what an interruption loses at most, per process
IMAGES = 32  # through the image tokenizer at a time
_REQUEST, _PARTS, _QUARANTINE = "request.json", "parts", "quarantine.jsonl"


# Pictures, at most IMAGES of them -> ids of each (int64), or the reason why it does not decode.
Encoder = Callable[[list[Picture]], list[np.ndarray | str]]
# (vocabulary, device, threads, most pictures at a time) -> an encoder. A function or class of a module: it is sent to
# other processes by name.
OpenEncoder = Callable[[Vocabulary, str, int, int], Encoder]


@dataclass(frozen=True)
class Settings:
    """The same for every chunk."""

    open_encoder: OpenEncoder

    vocabulary: Path
    output: Path
    pair_order: str
    caption_lines: str
    seed: int
    device: str
    threads: int  # of one process


@dataclass
class Chunk:
    name: str
    shard: Path
    sha256: str
    first: int
    count: int
    samples: list[Sample] | None  # None: pairs, read by the shard's index

    def __str__(self) -> str:
        return f"{self.shard.name}, samples {self.first} to {self.first + self.count - 1}"


@dataclass
class Report:
    """What became of one call."""

    header: DocumentsHeader
    quarantine: list[dict]  # {"shard", "key", "member", "reason"}
    action: str  # "tokenised" | "up to date"


def tokenize_documents(
    shards: list[str | Path],
    vocabulary: str | Path,
    output: str | Path,
    open_encoder: OpenEncoder,
    *,
    pair_order: str = "random",
    caption_lines: str = "join",
    seed: int = 1,
    workers: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Report:
    """Tokenise the documents of `shards` (folders, globs, tar files) into folder `output`.

    `open_encoder`: what encodes images, opened once in each process, and only where the vocabulary knows images.
    `pair_order`: how a pair becomes a document, `caption_first`, `image_first`, or `random` for each by `seed`;
    `caption_lines`: what of a caption of several lines, see `read_pairs`.
    Raises `UserError`: nothing there, another vocabulary's or other shards' documents in `output`, not one document.
    """
    output, vocabulary = Path(output), Path(vocabulary)
    if pair_order not in PAIR_ORDERS:
        raise UserError(f"--pair-order is {pair_order!r}; it is one of {', '.join(PAIR_ORDERS)}")
    if caption_lines not in LINES:
        raise UserError(f"--caption-lines is {caption_lines!r}; it is one of {', '.join(LINES)}")
    opened = Vocabulary.load(vocabulary)
    paths = list(dict.fromkeys(shard for path in shards for shard in find_shards(path)))
    found = [open_shard(path) for path in paths]
    if all(shard.pairs and shard.count == 0 for shard in found):
        raise UserError(f"{paths[0]}: no sample with a caption in {counted(len(found), 'shard')}; documents are made of"
                        " image-caption pairs or of texts")  # fmt: skip
    request = {
        "vocabulary": opened.fingerprint(), "pair_order": pair_order, "caption_lines": caption_lines, "seed": seed,
        "chunk": CHUNK,
        "shards": [{"path": str(shard.path), "sha256": shard.sha256, "samples": shard.count} for shard in found],
    }  # fmt: skip
    _claim(output, request, overwrite)
    if (output / MARKER).is_file():
        shutil.rmtree(output / _PARTS, ignore_errors=True)  # of a call that ended after its last rename
        return Report(read_header(output), _read_lines(output / _QUARANTINE), "up to date")
    chunks = _chunks(found)
    missing = [chunk for chunk in chunks if not (output / _PARTS / f"{chunk.name}.npz").is_file()]
    workers = min(workers or default_processes(), max(len(missing), 1))
    threads = max(1, default_processes() // workers)
    settings = Settings(open_encoder, vocabulary, output, pair_order, caption_lines, seed, device, threads)
    _run(missing, settings, workers, sum(chunk.count for chunk in chunks))
    return _join(output, found, chunks, opened, request)


def _claim(output: Path, request: dict, overwrite: bool) -> None:
    """`request.json` says what the folder is to hold; it is written before anything else."""
    marker = output / _REQUEST
    wanted = json.loads(json.dumps(request))
    if marker.is_file():
        old = json.loads(marker.read_text(encoding="utf-8"))
        if _identity(old) == _identity(wanted):
            return
        if not overwrite:
            what = next(key for key in (*wanted, *old) if _identity(old).get(key) != _identity(wanted).get(key))
            detail = f" ({old[what][:12]}, asked for {wanted[what][:12]})" if what == "vocabulary" else ""
            raise UserError(
                f"{output} holds documents tokenised with other {what}{detail}; give another --output, or --overwrite"
            )
        for name in (MARKER, _QUARANTINE, f"{NAME}.bin", f"{NAME}.idx"):
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / _PARTS, ignore_errors=True)
    elif output.exists() and (not output.is_dir() or any(path.name[0] != "." for path in output.iterdir())):
        raise UserError(f"{output} exists and is no folder of tokenised documents; give a new folder")
    write_atomically(marker, (json.dumps(request, indent=1) + "\n").encode())


def _identity(request: dict) -> dict:
    """A request without what may change between calls: where the shards lie. One written before there were
    `caption_lines` joined them."""
    shards = [(shard["sha256"], shard["samples"]) for shard in request["shards"]]
    return {"caption_lines": "join", **request, "shards": shards}


def _chunks(shards: list[DocumentShard]) -> list[Chunk]:
    chunks = []
    for number, shard in enumerate(shards):
        for first in range(0, shard.count, CHUNK):
            count = min(CHUNK, shard.count - first)
            samples = None if shard.pairs else shard.samples[first : first + count]
            name = f"{number:06d}-{first // CHUNK:06d}"
            chunks.append(Chunk(name, shard.path, shard.sha256, first, count, samples))
    return chunks


def _run(missing: list[Chunk], settings: Settings, workers: int, total: int) -> None:
    progress = Progress("samples", total)
    progress.done = total - sum(chunk.count for chunk in missing)
    counts: Counter = Counter()
    for chunk, part in parallel_map(functools.partial(_tokenize_chunk, settings=settings), missing, workers):
        counts.update(part)
        note = f"{counts['documents']} documents, {counts['images']} images, {counts['quarantined']} quarantined"
        progress.update(chunk.count, note=note)


def _tokenize_chunk(chunk: Chunk, settings: Settings) -> dict:
    """Write the part of one chunk; returns its counts."""
    vocabulary, encoder = _tools(settings)
    quarantine: list[dict] = []
    if chunk.samples is None:
        documents = read_pairs(
            chunk.shard, chunk.first, chunk.count, chunk.sha256, settings.pair_order, settings.seed, quarantine,
            settings.caption_lines,
        )  # fmt: skip
    else:
        documents = read_documents(chunk.shard, chunk.samples, quarantine)
    made = Part(vocabulary.size)
    counts = Counter(documents=0, text_segments=0, images=0, responses=0, tokens=0)
    for segments, modes in _encode(documents, vocabulary, encoder, quarantine):
        made.add(segments, modes)
        images = sum(mode & IMAGE for mode in modes)
        counts.update(
            documents=1, images=images, text_segments=len(modes) - images,
            responses=sum(mode & RESPONSE > 0 for mode in modes), tokens=sum(map(len, segments)),
        )  # fmt: skip
    report = {"counts": dict(counts), "quarantine": quarantine}
    made.write(settings.output / _PARTS / f"{chunk.name}.npz", report)
    return {**counts, "quarantined": len(quarantine)}


@functools.lru_cache(maxsize=1)  # once a process
def _tools(settings: Settings) -> tuple[Vocabulary, Encoder | None]:
    import torch

    torch.set_num_threads(settings.threads)
    vocabulary = Vocabulary.load(settings.vocabulary)
    if not vocabulary.codes:
        return vocabulary, None
    return vocabulary, settings.open_encoder(vocabulary, settings.device, settings.threads, IMAGES)


def _encode(
    documents: Iterable[Document], vocabulary: Vocabulary, encoder: Encoder | None, quarantine: list[dict]
) -> Iterator[tuple[list[np.ndarray], list[int]]]:
    """(segments with their marks, modes) of the documents, in order; images of neighbours go through in one batch."""
    waiting: list[Document] = []
    images = 0
    for document in documents:
        count = sum(segment.image is not None for segment in document.segments)
        if count and encoder is None:
            reason = "an image, but the vocabulary is of text alone; make one with --image-tokenizer"
            quarantine.append(problem(document.key, "", reason))
            continue
        waiting.append(document)
        images += count
        if images >= IMAGES or len(waiting) >= CHUNK:
            yield from _encode_batch(waiting, vocabulary, encoder, quarantine)
            waiting, images = [], 0
    yield from _encode_batch(waiting, vocabulary, encoder, quarantine)


def _encode_batch(
    documents: list[Document], vocabulary: Vocabulary, encoder: Encoder | None, quarantine: list[dict]
) -> Iterator[tuple[list[np.ndarray], list[int]]]:
    pictures = [segment.image for document in documents for segment in document.segments if segment.image]
    codes: list[np.ndarray | str] = []
    for i in range(0, len(pictures), IMAGES):
        codes += encoder(pictures[i : i + IMAGES])
    images = iter(codes)
    for document in documents:
        ids, reason = [], None
        for segment in document.segments:
            made = next(images) if segment.image else np.array(vocabulary.encode_text(segment.text), np.int64)
            if isinstance(made, str):
                reason = reason or problem(document.key, segment.image.member, made)
            ids.append(made)
        if reason:
            quarantine.append(reason)
        else:
            yield assemble(ids, [s.image is not None for s in document.segments],
                           [s.response for s in document.segments], vocabulary)  # fmt: skip


def assemble(
    ids: list[np.ndarray], images: list[bool], responses: list[bool], vocabulary: Vocabulary
) -> tuple[list[np.ndarray], list[int]]:
    """Ids of each segment -> (segments with marks, modes): `<bos>` before the first, `<eos>` behind the last, `<break>`
    behind a segment where it or the next one is an image; text follows text directly."""
    segments = []
    for i, tokens in enumerate(ids):
        last = i == len(ids) - 1
        mark = [vocabulary.eos_id] if last else [vocabulary.break_id] if images[i] or images[i + 1] else []
        segments.append(np.concatenate([[vocabulary.bos_id] if i == 0 else [], tokens, mark]).astype(np.int64))
    return segments, [IMAGE * image | RESPONSE * response for image, response in zip(images, responses, strict=True)]


def _join(
    output: Path, shards: list[DocumentShard], chunks: list[Chunk], vocabulary: Vocabulary, request: dict
) -> Report:
    """All parts -> the dataset; the marker last, then the parts go."""
    counts: Counter = Counter(documents=0, text_segments=0, images=0, responses=0, tokens=0)
    quarantine = [{"shard": printable(shard.path), **entry} for shard in shards for entry in shard.quarantine]
    for leftover in output.glob(f".{NAME}.*.tmp"):
        leftover.unlink()
    reports = join_parts([output / _PARTS / f"{chunk.name}.npz" for chunk in chunks], output, vocabulary.size)
    for chunk, report in zip(chunks, reports, strict=True):
        counts.update(report["counts"])
        quarantine += [{"shard": printable(chunk.shard), **entry} for entry in report["quarantine"]]
    write_atomically(output / _QUARANTINE, "".join(json.dumps(entry) + "\n" for entry in quarantine).encode())
    if not counts["documents"]:
        reason = f"; the first reason: {quarantine[0]['reason']}" if quarantine else ""
        raise UserError(f"not one document in {len(shards)} shards{reason}; {output / _QUARANTINE} lists all")
    header = DocumentsHeader(
        vocabulary=vocabulary.fingerprint(), vocabulary_folder=str(vocabulary.folder), quarantined=len(quarantine),
        bytes=os.path.getsize(output / f"{NAME}.bin"), sha256=content_sha256(output), request=request, **counts,
    )  # fmt: skip
    write_header(output, header)
    shutil.rmtree(output / _PARTS)
    return Report(header, quarantine, "tokenised")


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
