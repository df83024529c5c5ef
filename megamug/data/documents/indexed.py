"""A folder of tokenised documents: Megatron's indexed dataset, and what it was made of.

`documents.bin` and `documents.idx` are what `megatron.core.datasets.indexed_dataset` writes and reads: the sequences of
a document are its segments, and one after another they are the document, `<bos> ... <break> ... <eos>`. A segment holds
its tokens and the `<break>` or `<eos>` behind it; the first also `<bos>`. The mode of a sequence has bit `IMAGE` for an
image and bit `RESPONSE` for a response. `documents.json` names the vocabulary by its fingerprint, the counts, the
SHA-256 of the tokens and the shards; it is written last, so a folder that holds one is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megamug.command_line.console import import_megatron
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.shards.sources import parse_sets
from megamug.durable import fsync_folder, read_record, write_atomically
from megamug.errors import UserError

DOCUMENTS_VERSION = 1
NAME, MARKER = "documents", "documents.json"
IMAGE, RESPONSE = 1, 2  # bits of a sequence's mode


@dataclass
class DocumentsHeader:
    """What `documents.json` holds."""

    vocabulary: str  # fingerprint
    vocabulary_folder: str  # where it lay
    documents: int
    text_segments: int
    images: int
    responses: int  # segments
    tokens: int
    quarantined: int
    bytes: int  # of documents.bin
    sha256: str  # of documents.bin, then documents.idx
    request: dict = field(default_factory=dict)  # what was asked for: shards with their SHA-256, order of pairs, seed
    version: int = DOCUMENTS_VERSION

    def shards(self) -> list[dict]:
        """What was tokenised, each with its `path`. Raises ValueError where `request` says none of it."""
        found = self.request.get("shards", [])
        if not isinstance(found, list):
            raise ValueError("request: its shards are no list")
        return found


def tokenize_command(shards: str, vocabulary: Path, output: Path | str) -> str:
    return f"megamug data documents {shards} --vocabulary {vocabulary} --output {output}"


class Part:
    """A run of tokenised documents in memory, and as one file: what a process makes of its share of a shard.

    Megatron-core is imported where parts are joined, not in each process: its import takes longer than many a part.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self.dtype = token_dtype(vocabulary_size)
        self.tokens: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.modes: list[int] = []
        self.ends: list[int] = []  # of the documents, in segments

    def add(self, segments: list[np.ndarray], modes: list[int]) -> None:
        self.tokens += [segment.astype(self.dtype) for segment in segments]
        self.lengths += [len(segment) for segment in segments]
        self.modes += modes
        self.ends.append(len(self.lengths))

    def write(self, path: Path, report: dict) -> None:
        """`report`: anything that JSON holds."""
        buffer = io.BytesIO()
        np.savez(
            buffer, tokens=np.concatenate([np.empty(0, self.dtype), *self.tokens]),
            lengths=np.array(self.lengths, np.int64), modes=np.array(self.modes, np.int8),
            ends=np.array(self.ends, np.int64), report=np.frombuffer(json.dumps(report).encode(), np.uint8),
        )  # fmt: skip
        write_atomically(path, buffer.getvalue())


def token_dtype(vocabulary_size: int) -> type:
    """Megatron's choice: two bytes where they do."""
    return np.uint16 if vocabulary_size < 65500 else np.int32


def join_parts(paths: list[Path], folder: Path, vocabulary_size: int) -> list[dict]:
    """Write `documents.bin` and `documents.idx` of all parts, aside, fsynced, renamed; returns the parts' reports."""
    import_megatron()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    aside = [folder / f".{NAME}.{os.getpid()}.{kind}.tmp" for kind in ("bin", "idx")]
    builder = IndexedDatasetBuilder(str(aside[0]), dtype=token_dtype(vocabulary_size), multimodal=True)
    reports = []
    for path in paths:
        with np.load(path) as part:  # what `add_index` does with another dataset
            builder.document_indices.extend((len(builder.sequence_lengths) + part["ends"]).tolist())
            builder.sequence_lengths.extend(part["lengths"].tolist())
            builder.sequence_modes.extend(part["modes"].tolist())
            builder.data_file.write(part["tokens"].tobytes())
            reports.append(json.loads(part["report"].tobytes()))
    builder.finalize(str(aside[1]))
    for temporary, kind in zip(aside, ("bin", "idx"), strict=True):
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"{NAME}.{kind}")
    fsync_folder(folder)
    return reports


def write_header(folder: Path, header: DocumentsHeader) -> None:
    write_atomically(folder / MARKER, (json.dumps(asdict(header), indent=1) + "\n").encode())


def read_header(folder: Path) -> DocumentsHeader:
    """Raises `UserError` where `folder` holds no complete set of tokenised documents."""
    if not (folder / MARKER).is_file():
        begun = (folder / "parts").is_dir()
        unfinished = " (tokenising was begun but not finished: repeat its command)" if begun else ""
        raise UserError(
            f"{folder}: no tokenised documents in there{unfinished}; run: "
            f"{tokenize_command('SHARDS', Path('VOCABULARY'), folder)}"
        )
    try:
        header = read_record((folder / MARKER).read_bytes(), DocumentsHeader)
        if not all(isinstance(x, dict) and isinstance(x.get("path"), str) for x in header.shards()):
            raise ValueError("request: its shards have no path")
    except ValueError as error:
        raise UserError(f"{folder / MARKER}: broken ({error}); tokenise the documents again") from error
    if header.version != DOCUMENTS_VERSION:
        raise UserError(f"{folder / MARKER}: version {header.version}, this program reads {DOCUMENTS_VERSION}")
    return header


def content_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for kind in ("bin", "idx"):
        with open(folder / f"{NAME}.{kind}", "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class DocumentSet:
    """Tokenised documents, opened and memory-mapped.

    D documents of S segments together, T tokens:
    `tokens` [T]; `segment_starts` int64 [S + 1] in tokens; `modes` int8 [S]; `first_segments` int64 [D + 1];
    `starts` int64 [D + 1] in tokens; `has_response` bool [D].
    """

    def __init__(self, folder: str | Path, vocabulary: Vocabulary, weight: float | None = None) -> None:
        """Raises `UserError`: incomplete, another vocabulary, files that are not those that were written, no document,
        an image with more or fewer codes than the vocabulary's images have."""
        self.folder, self.weight, self.name = Path(folder), weight, str(folder)
        self.header = read_header(self.folder)
        shards = " ".join(shard["path"] for shard in self.header.shards()) or "SHARDS"
        again = tokenize_command(shards, vocabulary.folder, "NEW_FOLDER")
        if self.header.vocabulary != vocabulary.fingerprint():
            raise UserError(
                f"{folder}: tokenised with another vocabulary (fingerprint {self.header.vocabulary[:12]}, from "
                f"{self.header.vocabulary_folder}) than data.tokenizer={vocabulary.folder} "
                f"({vocabulary.fingerprint()[:12]}); set data.tokenizer to that one, or run: {again}"
            )
        if self.header.documents == 0:
            raise UserError(f"{folder}: not one document; {self.folder / 'quarantine.jsonl'} says why; run: {again}")
        self._map(again)
        self._check_images(vocabulary, again)

    def _map(self, again: str) -> None:
        import_megatron()
        from megatron.core.datasets.indexed_dataset import _IndexReader  # the .idx alone; the .bin is mapped below

        prefix = self.folder / NAME
        missing = [kind for kind in ("bin", "idx") if not prefix.with_suffix(f".{kind}").is_file()]
        if missing:
            raise UserError(f"{prefix}.{missing[0]} is missing; restore it, or run: {again}")
        size = os.path.getsize(f"{prefix}.bin")
        try:
            index = _IndexReader(f"{prefix}.idx", multimodal=True)
        except (AssertionError, ValueError, OSError) as error:
            raise UserError(f"{prefix}.idx: not a whole index ({error}); restore it, or run: {again}") from error
        lengths = index.sequence_lengths
        total = int(lengths.sum(dtype=np.int64))
        wanted = (self.header.bytes, self.header.documents, self.header.tokens)
        if (size, len(index.document_indices) - 1, total) != wanted or total * index.dtype_size != size:
            raise UserError(
                f"{prefix}.bin has {size:,} bytes and the index {total:,} tokens, but {MARKER} says "
                f"{self.header.bytes:,} and {self.header.tokens:,}; restore the files, or run: {again}"
            )
        self.tokens = np.memmap(f"{prefix}.bin", index.dtype, "r")
        self.segment_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.modes = np.array(index.sequence_modes)
        self.first_segments = np.array(index.document_indices)
        self.starts = self.segment_starts[self.first_segments]
        self.has_response = np.bitwise_or.reduceat(self.modes, self.first_segments[:-1]) & RESPONSE > 0

    def _check_images(self, vocabulary: Vocabulary, again: str) -> None:
        """Each image segment holds one image's codes, and at most `<bos>` before and one mark behind."""
        images = np.flatnonzero(self.modes & IMAGE)
        starts = np.isin(images, self.first_segments)
        lengths = self.segment_starts[images + 1] - self.segment_starts[images] - starts - 1
        wrong = np.flatnonzero(lengths != vocabulary.image_tokens)
        if len(wrong):
            document = int(np.searchsorted(self.first_segments, images[wrong[0]], side="right")) - 1
            raise UserError(
                f"{self.folder}, document {document}: an image of {int(lengths[wrong[0]])} codes, but an image of "
                f"{vocabulary.folder} has {vocabulary.image_tokens}; run: {again}"
            )

    def __len__(self) -> int:
        return self.header.documents

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Document `number`, whole -> (tokens int64 [n], mode of each token's segment int8 [n])."""
        first, last = self.first_segments[number : number + 2]
        lengths = np.diff(self.segment_starts[first : last + 1])
        tokens = self.tokens[self.starts[number] : self.starts[number + 1]].astype(np.int64)
        return tokens, np.repeat(self.modes[first:last], lengths)

    def fingerprint(self) -> str:
        """Of the contents: tokens, segments and vocabulary."""
        return hashlib.sha256(f"{self.header.vocabulary} {self.header.sha256}".encode()).hexdigest()


def open_documents(value: object, vocabulary: Vocabulary) -> list[DocumentSet]:
    """The sets that `data.train` or `data.validation` of a language model names: folders, with weights or without.

    Raises `UserError`, see `DocumentSet`.
    """
    return [DocumentSet(path, vocabulary, weight) for path, weight in parse_sets(value)]
