"""A folder of tokenised documents: Megatron's indexed dataset, and what it was made of.

`documents.bin` and `documents.idx` are what `megatron.core.datasets.indexed_dataset` writes and reads: the sequences of
a document are its segments, and one after another they are the document, `<bos> ... <break> ... <eos>`. A segment holds
its tokens and the `<break>` or `<eos>` behind it; the first also `<bos>`. The mode of a sequence has bit `IMAGE` for an
image and bit `RESPONSE` for a response. `documents.json` names the vocabulary by its fingerprint, the counts, the
SHA-256 of the tokens and the shards, and its own; it is written last, so a folder that holds one is complete.

The index is read whole and compared with its SHA-256 when a set is opened, the tokens too where `data.verify` asks for
it. Tokens are read by place and not mapped into memory: a file that is cut off in mid-run is then an error that says
so, and not the end of the process (SIGBUS).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamug.command_line.console import import_megatron
from megamug.data.documents.vocabulary import Vocabulary
from megamug.data.shards.sources import expand, parse_sets
from megamug.durable import as_record, file_sha256, fsync_folder, write_atomically
from megamug.errors import UserError

DOCUMENTS_VERSION = 2
_READ = (1, 2)  # version 1 has no `index_sha256` and no checksum of itself
_MAGIC, _TYPES = b"MMIDIDX\x00\x00", {4: np.int32, 8: np.uint16}  # of Megatron's index; its codes of token types
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
    index_sha256: str = ""  # of documents.idx
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
    """Write `documents.json`; its checksum and that of the index are set here."""
    header.index_sha256 = file_sha256(folder / f"{NAME}.idx")
    values = asdict(header)
    text = json.dumps({**values, "checksum": _checksum(values)}, indent=1)
    write_atomically(folder / MARKER, (text + "\n").encode())


def _checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
        values = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        if values.get("version", DOCUMENTS_VERSION) not in _READ:
            raise UserError(
                f"{folder / MARKER}: version {values['version']!r}, this program reads {DOCUMENTS_VERSION}; tokenise "
                "the documents again"
            )
        checksum = values.pop("checksum", None)
        if values.get("version") != 1 and checksum != _checksum(values):
            raise ValueError("it does not agree with its checksum")
        header = as_record(values, DocumentsHeader)
        if not all(isinstance(x, dict) and isinstance(x.get("path"), str) for x in header.shards()):
            raise ValueError("request: its shards have no path")
        return header
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / MARKER}: broken ({error}); tokenise the documents again") from error


def content_sha256(folder: Path) -> str:
    files = [folder / f"{NAME}.{kind}" for kind in ("bin", "idx")]
    return _content_sha256(*((path, s.st_ino, s.st_size, s.st_mtime_ns) for path in files for s in [path.stat()]))


@functools.lru_cache(maxsize=256)  # a run opens its data more than once
def _content_sha256(*files: tuple) -> str:
    digest = hashlib.sha256()
    for path, *_ in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class Index(NamedTuple):
    """What `documents.idx` holds of S sequences of D documents."""

    dtype: type  # of the tokens
    lengths: np.ndarray  # int32 [S], in tokens
    documents: np.ndarray  # int64 [D + 1]: first sequence of each, and S
    modes: np.ndarray  # int8 [S]


def read_index(path: Path, sha256: str) -> Index:
    """Megatron's index, read whole. `sha256`: what its bytes must have ("": not known). Raises `ValueError`, OSError.

    (Megatron's own reader maps the file into memory.)
    """
    data = path.read_bytes()
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("it does not agree with its checksum")
    start = struct.Struct("<9sQBQQ")  # magic, version 1, type of the tokens, sequences, documents + 1
    if len(data) < start.size:
        raise ValueError(f"{len(data)} bytes")
    magic, version, code, sequences, documents = start.unpack_from(data)
    if magic != _MAGIC or version != 1 or code not in _TYPES:
        raise ValueError("not an index of Megatron's, or of other tokens")
    wanted = start.size + sequences * (4 + 8 + 1) + documents * 8
    if len(data) != wanted:
        raise ValueError(f"{len(data):,} bytes instead of {wanted:,}")
    at = start.size
    lengths = np.frombuffer(data, "<i4", sequences, at)
    at += sequences * (4 + 8)  # behind the places of the sequences, which follow from their lengths
    bounds = np.frombuffer(data, "<i8", documents, at)
    modes = np.frombuffer(data, np.int8, sequences, at + documents * 8)
    whole = len(bounds) and bounds[0] == 0 and bounds[-1] == sequences
    if not whole or (lengths < 0).any() or (np.diff(bounds) < 0).any():
        raise ValueError("its documents do not follow one another")
    return Index(_TYPES[code], lengths, bounds.astype(np.int64), modes.copy())


class TokenFile:
    """The tokens of `documents.bin`: `tokens[first:last]` reads them. Raises OSError where the file ends before."""

    def __init__(self, path: Path, dtype: type, count: int) -> None:
        self.path, self.dtype, self.count = path, np.dtype(dtype), count
        self._file = open(path, "rb", buffering=0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        first, last, step = part.indices(self.count)
        assert step == 1
        size = max(last - first, 0) * self.dtype.itemsize
        data = bytearray()
        while len(data) < size:  # one read gives at most 2 GiB
            read = os.pread(self._file.fileno(), size - len(data), first * self.dtype.itemsize + len(data))
            if not read:
                raise OSError(
                    f"{self.path} ends {size - len(data):,} bytes before the end of tokens {first:,} to {last - 1:,}: "
                    "it was cut off while it is in use; restore it, and start again"
                )
            data += read
        return np.frombuffer(data, self.dtype)


class DocumentSet:
    """Tokenised documents, opened; the tokens stay in their file.

    D documents of S segments together, T tokens:
    `tokens` [T], a `TokenFile`; `segment_starts` int64 [S + 1] in tokens; `modes` int8 [S];
    `first_segments` int64 [D + 1]; `starts` int64 [D + 1] in tokens; `has_response` bool [D].
    """

    def __init__(
        self, folder: str | Path, vocabulary: Vocabulary, weight: float | None = None, verify: bool = False
    ) -> None:
        """`verify`: read everything once, and compare it with its SHA-256.

        Raises `UserError`: incomplete, another vocabulary, files that are not those that were written, no document,
        an image with more or fewer codes than the vocabulary's images have.
        """
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
        self._open(again)
        if verify:
            check_contents(self.folder, self.header)
        self._check_images(vocabulary, again)

    def _open(self, again: str) -> None:
        prefix = self.folder / NAME
        missing = [kind for kind in ("bin", "idx") if not prefix.with_suffix(f".{kind}").is_file()]
        if missing:
            raise UserError(f"{prefix}.{missing[0]} is missing; restore it, or run: {again}")
        size = os.path.getsize(f"{prefix}.bin")
        try:
            index = read_index(prefix.with_suffix(".idx"), self.header.index_sha256)
        except (ValueError, OSError) as error:
            raise UserError(f"{prefix}.idx: not a whole index ({error}); restore it, or run: {again}") from error
        lengths = index.lengths
        total = int(lengths.sum(dtype=np.int64))
        wanted = (self.header.bytes, self.header.documents, self.header.tokens)
        if (size, len(index.documents) - 1, total) != wanted or total * np.dtype(index.dtype).itemsize != size:
            raise UserError(
                f"{prefix}.bin has {size:,} bytes and the index {total:,} tokens, but {MARKER} says "
                f"{self.header.bytes:,} and {self.header.tokens:,}; restore the files, or run: {again}"
            )
        self.tokens = TokenFile(prefix.with_suffix(".bin"), index.dtype, total)
        self.segment_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.modes, self.first_segments = index.modes, index.documents
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


def check_contents(folder: Path, header: DocumentsHeader) -> None:
    """Reads all tokens and the index (a second for each 1.5 GB). Raises `UserError` where their SHA-256 is another."""
    found = content_sha256(folder)
    if found != header.sha256:
        raise UserError(
            f"{folder}: the tokens are not those that were written (SHA-256 {found[:12]}, {MARKER} says "
            f"{header.sha256[:12]}); restore {NAME}.bin and {NAME}.idx, or tokenise the documents again"
        )


def document_folders(value: object) -> list[tuple[str, float | None]]:
    """(folder, weight or None) of each set that `data.train` or `data.validation` of a language model names; globs,
    braces, `~` and `::` as of shards. Raises `UserError`."""
    found = []
    for path, weight in parse_sets(value):
        folders = [folder for part in expand(path) for folder in _matching(part)]
        if weight is not None and len(folders) > 1:
            raise UserError(f"data: {path} is {len(folders)} folders under one weight; give each folder its own")
        found += [(folder, weight) for folder in folders]
    return found


def _matching(text: str) -> list[str]:
    """The folders that a glob names, sorted; a plain path is itself."""
    if os.path.lexists(text) or not any(character in text for character in "*?["):
        return [text]
    folders = sorted(match for match in glob.glob(text, recursive=True) if os.path.isdir(match))
    if not folders:
        raise UserError(f"{text}: no folder matches; give a folder of tokenised documents, a glob or a list of those")
    return folders


def open_documents(value: object, vocabulary: Vocabulary, verify: bool = False) -> list[DocumentSet]:
    """The sets that `data.train` or `data.validation` of a language model names: folders, with weights or without.

    Raises `UserError`, see `DocumentSet`.
    """
    return [DocumentSet(path, vocabulary, weight, verify) for path, weight in document_folders(value)]
