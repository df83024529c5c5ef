"""Features of every image of a set of shards, in the order of the shards, by any number of processes, resumable.

The set is cut into chunks; process r of n does chunks r, r + n, ..., each a file of its own in OUTPUT.parts, written
whole or not at all. A run that was stopped goes on with the chunks that are missing. When all are there the first
process puts them together; an output of the same settings is done already. Processes need not talk to each other: files
are all they share.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from megamug.data.dali import CropDecoder
from megamug.data.pairs.images import SHARE, centre_squares, decode_or_none
from megamug.data.shards.reading import OpenShards
from megamug.data.shards.sources import Source
from megamug.data.tooling import Progress
from megamug.durable import replace_text, write_atomically
from megamug.errors import UserError, printable
from megamug.transfer import stored
from megamug.transfer.encoder import VisionEncoder

CHUNK = 2048  # images of a file in OUTPUT.parts
MOST_FAILURES = 0.01  # of a chunk, and at least 10 images: more are no accident
WAIT_SECONDS = 0.5  # between looks for the chunks of the other processes


@dataclass(frozen=True)
class Settings:
    """What decides the numbers: parts made with others are not put together with new ones."""

    encoder: str  # SHA-256 of its parameters, and of what else they compute with
    data: list[str]  # fingerprints of the sets
    classes: list[str]  # of each shard, the SHA-256 of the names that labels were numbered by
    images: int
    image_size: int
    share: float
    layers: list[int]
    dtype: str
    chunk: int


def extract(
    encoder: VisionEncoder, sources: list[Source], output: Path, *, batch: int = 64, layers: Sequence[int] = (),
    share: float = SHARE, threads: int = 2, chunk: int = CHUNK, rank: int = 0, size: int = 1,
) -> stored.Summary | None:  # fmt: skip
    """Writes the features of all images of `sources` to `output` (.safetensors or .npz, see `stored`); None on all
    processes but the first, and where `output` is of the same settings.

    Args:
        layers: blocks whose patches are averaged as well (`layer_N`, before any norm).
        share: of the shorter side that is seen, the centre; pixels are decoded and resized as in validation.
        rank, size: which of how many processes this is.

    An image that does not decode is left out and told; more than one in a hundred end the work. Raises UserError:
    nothing there, parts of other settings, a file that cannot be written.
    """
    parameter = next(encoder.parameters())
    settings = Settings(
        _fingerprint(encoder), [source.fingerprint() for source in sources],
        [shard.header.classes_sha256 for source in sources for shard in source.shards], sum(map(len, sources)),
        encoder.image_size, share, encoder.wanted(layers),
        str(parameter.dtype).removeprefix("torch."), chunk,
    )  # fmt: skip
    parts = output.with_name(output.name + ".parts")
    if not _claim(parts, output, settings, rank):
        return None
    reader = _Reader(sources, encoder, share, batch, threads, parameter.device)
    chunks = -(-settings.images // chunk)
    mine = [number for number in range(rank, chunks, size) if not _part(parts, number).exists()]
    progress = Progress(f"features{f' of process {rank}' if size > 1 else ''}", sum(
        min(chunk, settings.images - number * chunk) for number in mine
    ))  # fmt: skip
    started = time.monotonic()
    # Neither what is read nor the device waits for the end of a chunk: the next one's first batch is under way by then,
    # and the last one is written meanwhile.
    ranges = [range(number * chunk, min((number + 1) * chunk, settings.images)) for number in mine]
    with ThreadPoolExecutor(1, "megamug-writer") as writer:
        written: Future | None = None
        try:
            for place, batches in groupby(reader.batches(ranges), key=itemgetter(0)):
                tensors = _features(encoder, batches, len(ranges[place]), layers, progress)
                if written is not None:
                    written.result()
                written = writer.submit(_write_part, _part(parts, mine[place]), tensors)
            if written is not None:
                written.result()
        finally:
            reader.close()
    seconds = time.monotonic() - started
    if progress.done and seconds > 0:
        print(f"{progress.done / seconds:,.0f} images/s, data wait {reader.waited / seconds:.0%}", file=sys.stderr)
    if rank:
        return None
    while missing := [number for number in range(chunks) if not _part(parts, number).exists()]:
        assert size > 1, missing
        time.sleep(WAIT_SECONDS)
    summary = stored.write(output, [_part(parts, n) for n in range(chunks)], asdict(settings), _rows(sources))
    shutil.rmtree(parts)
    return summary


def _fingerprint(encoder: VisionEncoder) -> str:
    preprocess = encoder.preprocess
    computed = encoder.heads, encoder.eps, preprocess.mean, preprocess.std, preprocess.background
    digest = hashlib.sha256(repr(computed).encode())
    for name, tensor in encoder.named_parameters():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _claim(parts: Path, output: Path, settings: Settings, rank: int) -> bool:
    """Whether there is something to do. Parts of the same settings are gone on with; the first process says which they
    are. It may have put everything together before another one gets here."""
    path, wanted, started = parts / "settings.json", asdict(settings), time.monotonic()
    while True:
        try:
            before = json.loads(path.read_text())
            break
        except FileNotFoundError:
            if stored.is_of(output, wanted):
                return False
        if rank == 0:
            shutil.rmtree(parts, ignore_errors=True)  # nobody says what is in there
            parts.mkdir(parents=True)
            replace_text(path, json.dumps(wanted, indent=1))
        elif time.monotonic() - started > 60:
            raise UserError(f"{path} is not there after a minute: start the first process (RANK=0) too, on the same"
                            " file system")  # fmt: skip
        else:
            time.sleep(WAIT_SECONDS)
    if other := [key for key, value in wanted.items() if before.get(key) != value]:
        raise UserError(f"{parts} holds parts of another extraction (other {', '.join(other)}); remove it, or name"
                        " another output")  # fmt: skip
    return True


def _part(parts: Path, number: int) -> Path:
    return parts / f"chunk-{number:06d}.safetensors"


def _write_part(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomically(path, save(tensors))


def _features(
    encoder: VisionEncoder, batches: Iterable[tuple], count: int, layers: Sequence[int], progress: Progress
) -> dict[str, Tensor]:
    """The features of a chunk of `count` images, by name, and the numbers of the images (`rows`) that decode. They stay
    on the device until its end: a copy after each batch would have the host wait, and then the device."""
    found: dict[str, list[Tensor]] = {}
    failed: list[str] = []
    kept: list[int] = []
    for _, rows, pixels, reasons in batches:
        failed += reasons
        if len(failed) > max(10, MOST_FAILURES * count):
            raise UserError(f"{len(failed)} of {count} images do not decode, the first: {failed[0]}")
        progress.update(len(rows) + len(reasons), f"{len(failed)} left out" if failed else "")
        if not rows:
            continue
        with torch.inference_mode():
            features = encoder(pixels, layers=layers)
        named = {"class_token": features.class_token, "mean": features.mean}
        for number, layer in zip(encoder.wanted(layers), features.layers, strict=True):
            named[f"layer_{number}"] = layer.mean((1, 2))
        for name, value in named.items():
            found.setdefault(name, []).append(value.float())
        kept += rows
    for reason in failed[:20]:
        print(f"left out: {reason}", file=sys.stderr)
    tensors = {name: torch.cat(values).cpu() for name, values in found.items()}
    return {**tensors, "rows": torch.tensor(kept, dtype=torch.int64)}


def _rows(sources: list[Source]):
    """row -> what `stored` keeps beside its features"""
    starts = np.cumsum([0, *map(len, sources)])

    def describe(row: int) -> dict:
        at = int(np.searchsorted(starts, row, side="right")) - 1
        shard, i = sources[at].locate(row - int(starts[at]))
        label = shard.label(i)
        return {"shard": printable(shard.path.name), "key": shard.key(i), "label": label if label >= 0 else None,
                "caption": shard.caption_aside(i)}  # fmt: skip

    return describe


class _Reader:
    """Pixels by the number of the image through all sets; the next batch is read while this one is computed with.
    `waited`: seconds in which nothing was read yet."""

    def __init__(
        self, sources: list[Source], encoder: VisionEncoder, share: float, batch: int, threads: int,
        device: torch.device,
    ):  # fmt: skip
        self.sources, self.share, self.batch, self.waited = sources, share, batch, 0.0
        self.starts = np.cumsum([0, *map(len, sources)])
        background = encoder.preprocess.background
        self.decoder = CropDecoder(encoder.image_size, batch, threads, device, background)
        self.shards = OpenShards()
        self.ahead = ThreadPoolExecutor(1, "megamug-features")

    def batches(self, chunks: Sequence[range]) -> Iterator[tuple[int, list[int], Tensor, list[str]]]:
        """(which chunk, numbers of the images that decode, uint8 [b, 3, S, S], why others do not)"""
        slices = ((place, numbers[i : i + self.batch]) for place, numbers in enumerate(chunks)
                  for i in range(0, len(numbers), self.batch))  # fmt: skip
        coming = self._start(next(slices, None))
        while coming is not None:
            place, pending = coming
            started = time.monotonic()
            result = pending.result()
            self.waited += time.monotonic() - started
            coming = self._start(next(slices, None))
            yield place, *result

    def _start(self, item: tuple[int, range] | None) -> tuple[int, Future] | None:
        return None if item is None else (item[0], self.ahead.submit(self._read, item[1]))

    def _read(self, numbers: range) -> tuple[list[int], Tensor, list[str]]:
        rows, images, sizes, places, reasons = [], [], [], [], []
        for number in numbers:
            source = int(np.searchsorted(self.starts, number, side="right")) - 1
            shard, i = self.sources[source].locate(number - int(self.starts[source]))
            try:
                image, _, record = self.shards.use(shard).read(i, caption=False)
            except (OSError, ValueError) as error:
                reasons.append(str(error))
                continue
            rows.append(number)
            places.append((shard, i))
            images.append(image)
            sizes.append((int(record["width"]), int(record["height"])))
        if not rows:
            return [], torch.empty(0), reasons
        widths, heights = np.array(sizes).T
        pixels, failed = decode_or_none(
            self.decoder, images, centre_squares(widths, heights, self.share), np.zeros(len(rows), bool)
        )
        for position, reason in failed.items():
            shard, i = places[position]
            reasons.append(f"{printable(shard.path.name)}: {shard.key(i)}: {reason}")
        kept = [position for position in range(len(rows)) if position not in failed]
        return [rows[p] for p in kept], pixels[kept] if failed else pixels, reasons

    def close(self) -> None:
        self.ahead.shutdown(cancel_futures=True)
        self.shards.close()
