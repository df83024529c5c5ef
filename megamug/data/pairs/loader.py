"""Batches of image-caption pairs, made ahead of the step by a background thread, for which another one reads ahead.

The global batch that starts at cursor c is positions c .. c + global_batch_size of the one order; data-parallel rank r
of D takes the r-th of D contiguous parts and cuts it into micro-batches. So sample j of a global batch is the same
sample, with the same crop and flip, in every layout.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from megamug.data.dali import WHITE, CropDecoder, load_dali
from megamug.data.order import Cursor, GlobalOrder
from megamug.data.pairs.batch import GlobalBatch, PairBatch
from megamug.data.pairs.images import centre_squares, decode_or_none, random_flips, random_resized_crops
from megamug.data.pairs.text import Tokenizer
from megamug.data.random import uniform
from megamug.data.shards.reading import OpenShards
from megamug.data.shards.sources import Source, check_labels
from megamug.data.spans import span
from megamug.errors import UserError, printable

log = logging.getLogger(__name__)

MAX_DECODE_BATCH = 128  # images that DALI holds at a time
_GRACE = 10_000  # the failure rate is that of at least so many samples, so that one early failure does not end a run


class TooManyFailures(RuntimeError):
    """More samples failed at run time than `max_failure_rate` allows."""


@dataclass
class Samples:
    """This rank's samples of one global batch; `indices` change where a sample is replaced."""

    sources: np.ndarray  # int64 [n], as are epochs and indices
    epochs: np.ndarray
    indices: np.ndarray
    draws: np.ndarray  # float64 [n] in [0, 1): which of several captions
    valid: np.ndarray  # bool [n]
    labels: np.ndarray  # int64 [n], as they are read
    end: int  # the cursor behind the batch
    maps: np.ndarray | None = None  # of a loader of those


def order_of(sources: list[Source], seed: int) -> GlobalOrder:
    """The one order of all samples of these sources."""
    weights = None if sources[0].weight is None else [source.weight for source in sources]
    fingerprints = [source.fingerprint() for source in sources]
    return GlobalOrder([len(s) for s in sources], weights=weights, seed=seed, fingerprints=fingerprints)


class PairLoader:
    """Training: endless, shuffled, augmented. Validation (`train=False`): one pass, fixed order, centre squares.

    A validation pass covers the first `max_samples` samples of the order (all where None), but ends before any sample
    would come twice; `total_samples` says how many that are. Each comes exactly once; the last global batch is filled
    up with pairs whose `valid` is False.

    A sample that fails although it was verified is replaced by the next one of its source (index + 1, and so on), in
    every layout alike, counted and logged; past `max_failure_rate` `next` raises `TooManyFailures`.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        tokenizer: Tokenizer | None,
        image_size: int,
        caption_length: int,
        caption_lines: str = "join",
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        train: bool = True,
        need_images: bool = True,
        need_captions: bool = True,
        need_labels: bool = False,
        crop_scale: Sequence[float] = (0.2, 1.0),
        flip: bool = True,
        background: Sequence[int] = WHITE,
        share: float = 1.0,
        augment: Callable[[torch.Tensor, np.ndarray, np.ndarray], torch.Tensor] | None = None,
        device: torch.device | str = "cpu",
        threads: int = 2,
        prefetch: int = 2,
        max_failure_rate: float = 0.001,
        state: dict | None = None,
        max_samples: int | None = None,
    ) -> None:
        """`state`: what `state()` gave, or None to start at the first sample. `background`: red, green, blue (0..255)
        behind what is transparent. `share`: of the shorter side that a validation pass sees. `augment`: (images,
        epochs, indices) -> images, of a training pass.

        Raises `UserError`: no tokenizer for captions, no DALI for images, samples without the caption or the label that
        is needed, a state of other data or of another seed.
        """
        assert global_batch_size % (dp_size * micro_batch_size) == 0, (global_batch_size, dp_size, micro_batch_size)
        assert 0 <= dp_rank < dp_size and prefetch >= 1
        assert train or state is None, "a validation pass always starts at its first sample"
        if need_captions and tokenizer is None:
            raise UserError("data.tokenizer is not set, but captions are trained on; run megamug data tokenizer")
        for source in sources if need_captions else ():
            if not source.captioned and (missing := source.without_caption()):
                raise UserError(f"{source.name}: {missing:,} of {len(source):,} samples have no caption")
        if need_labels:
            check_labels(sources)
        if need_images:
            load_dali()  # its absence is told here, not by the background thread
        self.sources, self.tokenizer, self.device = sources, tokenizer, torch.device(device)
        self.image_size, self.caption_length, self.caption_lines = image_size, caption_length, caption_lines
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.seed, self.dp_rank, self.dp_size, self.train = seed, dp_rank, dp_size, train
        self.need_images, self.need_captions, self.need_labels = need_images, need_captions, need_labels
        self.crop_scale, self.flip, self.threads = crop_scale, flip, threads
        self.max_failure_rate, self.background, self.share = max_failure_rate, background, share
        self.augment = augment if train else None

        self.order = order_of(sources, seed)
        start = 0
        if state is not None:
            cursor = Cursor.from_dict(state)
            self.order.check(cursor)
            start = cursor.samples
        self.total_samples: int | None = None  # of a validation pass
        if not train:
            first_pass = self.order.first_pass()
            self.total_samples = first_pass if max_samples is None else min(max_samples, first_pass)
        self.samples = start  # consumed: the cursor of the next batch
        self._failures = self._served = 0
        self._queue: queue.Queue = queue.Queue(maxsize=prefetch)
        self._stop, self._working = threading.Event(), threading.Lock()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._produce, args=(start,), name="megamug-loader", daemon=True)
        # At exit too, and before DALI's own hook (later registered runs earlier), which wants all pipelines gone.
        atexit.register(self.close)
        self._thread.start()

    def next(self) -> GlobalBatch:
        """The next global batch. Raises `StopIteration` at the end of a validation pass, `TooManyFailures`."""
        started = time.perf_counter()
        if self._ended is None:
            item = self._queue.get()
            if isinstance(item, BaseException):
                self._ended = item
        if self._ended is not None:
            raise self._ended
        item.wait_seconds = time.perf_counter() - started
        self.samples = item.samples
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for batch in item.micro_batches:  # made on another stream
                for tensor in (batch.images, batch.tokens, batch.labels, batch.maps):
                    if tensor is not None:
                        tensor.record_stream(stream)
        return item

    def __iter__(self) -> PairLoader:
        return self

    __next__ = next

    def paused(self) -> AbstractContextManager:
        """Inside, nothing is decoded in the background (it finishes the chunk in hand first)."""
        return self._working

    def close(self) -> None:
        """End the background thread. A loader that is not closed lives until the interpreter exits."""
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(timeout=60)
        atexit.unregister(self.close)

    def state(self) -> dict:
        """The cursor of the next batch, for a checkpoint: JSON."""
        return self.order.cursor(self.samples).to_dict()

    def _produce(self, start: int) -> None:
        """Background thread: puts global batches into the queue, and at the end the exception that ended it."""
        shards = OpenShards()
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                with torch.cuda.stream(torch.cuda.Stream(self.device)):
                    self._produce_batches(start, shards)
            else:
                self._produce_batches(start, shards)
        except BaseException as error:  # handed to the caller of `next`, whatever it is
            _put(self._queue, self._stop, error)
        finally:
            shards.close()

    def _produce_batches(self, start: int, shards: OpenShards) -> None:
        part = self.global_batch_size // self.dp_size
        step, decoder = min(part, MAX_DECODE_BATCH), None
        if self.need_images:
            decoder = self._decoder(step)
        pixels: list[torch.Tensor] = []
        captions: list[str] = []
        with ThreadPoolExecutor(1, "megamug-reader") as reader:  # reads the next chunk while this one is decoded
            for (samples, rows), found in _one_ahead(reader, self._read_chunk, self._chunks(start, part, step), shards):
                with span("loader: wait for bytes"):
                    read = found.result()
                for position, outcome in enumerate(read):
                    if isinstance(outcome, Exception):
                        read[position] = self._read_another(samples, rows.start + position, outcome, shards)
                captions.extend(caption for _, caption, *_ in read)
                with self._working:
                    if decoder is not None:
                        pixels.append(self._decode(samples, rows, read, captions, decoder, shards))
                    samples.labels[rows] = [label for *_, label in read]
                    if rows.stop < part:
                        continue
                    batch = self._make_batch(samples, pixels, captions)
                if not _put(self._queue, self._stop, batch):
                    return
                pixels, captions = [], []
        raise StopIteration

    def _decoder(self, step: int) -> CropDecoder:
        return CropDecoder(self.image_size, step, self.threads, self.device, self.background)

    def _chunks(self, start: int, part: int, step: int) -> Iterator[tuple[Samples, slice]]:
        """This rank's samples of the global batches from `start` on, `step` at a time, until asked to stop."""
        while not self._stop.is_set() and (self.total_samples is None or start < self.total_samples):
            with span("loader: order"):
                samples = self._samples(start, part)
            for first in range(0, part, step):
                yield samples, slice(first, min(first + step, part))
            start += self.global_batch_size

    def _samples(self, start: int, part: int) -> Samples:
        end, mine = start + self.global_batch_size, start + part * self.dp_rank
        positions = np.arange(mine, mine + part)
        valid = np.ones(part, bool)
        if self.total_samples is not None:
            end = min(end, self.total_samples)
            valid = positions < end
        if valid.any():
            order = self.order.slice(mine, int(valid.sum()))
        else:  # a rank without a share of the last batch: padding alone
            order = self.order.slice(self.total_samples - 1, 1)
        fill = np.minimum(np.arange(part), len(order[0]) - 1)  # padding repeats the last sample
        sources, epochs, indices = (column[fill] for column in order)
        unique = self.order.unique(sources, indices)
        draws = uniform(self.seed, "caption line", epochs, unique, 1)[:, 0]
        return Samples(sources, epochs, indices, draws, valid, np.full(part, -1, np.int64), end)

    def _make_batch(self, samples: Samples, pixels: list[torch.Tensor], captions: list[str]) -> GlobalBatch:
        part = len(samples.valid)
        images = tokens = labels = None
        if self.need_images:
            images = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        if self.need_captions:
            with span("loader: tokens"):
                tokens = self.tokenizer.encode_batch(captions, self.caption_length).to(self.device)
        if self.need_labels:
            labels = torch.from_numpy(samples.labels).to(self.device)
        self._served += part
        micro_batches = []
        unique = self.order.unique(samples.sources, samples.indices)
        for i in range(0, part, self.micro_batch_size):
            rows = slice(i, i + self.micro_batch_size)
            places = zip(samples.sources[rows], samples.indices[rows], strict=True)
            locations = [(self.sources[s], int(n)) for s, n in places]
            micro_batches.append(PairBatch(
                None if images is None else images[rows], None if tokens is None else tokens[rows],
                samples.epochs[rows], unique[rows], samples.valid[rows], None if labels is None else labels[rows],
                self.train, _locations=locations, _lines=(self.caption_lines, samples.draws[rows]),
            ))  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return GlobalBatch(micro_batches, samples.end, failures=self._failures)

    def _read_chunk(self, chunk: tuple[Samples, slice], shards: OpenShards) -> list[tuple | Exception]:
        """(image bytes, caption, (width, height), label) of each sample, or why it cannot be read. Changes nothing."""
        samples, rows = chunk
        with span("loader: bytes (ahead)"):
            return [self._read(samples, row, shards) for row in range(rows.start, rows.stop)]

    def _read(self, samples: Samples, row: int, shards: OpenShards) -> tuple | Exception:
        source, index, draw = self.sources[samples.sources[row]], samples.indices[row], samples.draws[row]
        shard, i = source.locate(index)
        own = self.need_captions and source.given is None
        try:
            with shards.lock:  # or the other thread might close the shard meanwhile
                image, caption, record = shards.use(shard).read(
                    i, image=self.need_images, caption=own, lines=self.caption_lines, draw=draw
                )
                if self.need_captions and not own:
                    shard, i = source.locate_caption(index)
                    caption = shards.use(shard).caption(i, self.caption_lines, draw)
            return image, caption, (int(record["width"]), int(record["height"])), int(record["label"])
        except (OSError, ValueError) as error:
            return error

    def _read_another(self, samples: Samples, row: int, error: Exception, shards: OpenShards) -> tuple:
        """What `_read` gives of the first sample behind the one of `row` that can be read."""
        for _ in range(len(self.sources[samples.sources[row]])):
            self._replace(samples, row, f"cannot be read: {error}")
            found = self._read(samples, row, shards)
            if not isinstance(found, Exception):
                return found
            error = found
        raise TooManyFailures(f"no sample of {self.sources[samples.sources[row]].name} can be read")

    def _decode(
        self, samples: Samples, rows: slice, read: list, captions: list[str], decoder: CropDecoder, shards: OpenShards
    ) -> torch.Tensor:
        """Images uint8 [n, 3, S, S]. A sample that does not decode is replaced, in `samples`, `read`, `captions`."""
        regions, flips = self._views(samples, rows, read)
        with span("loader: decode and resize"):
            pixels, failed = decode_or_none(decoder, [r[0] for r in read], regions, flips)
        while failed:
            for position, reason in failed.items():
                row = rows.start + position
                self._replace(samples, row, f"does not decode: {reason}")
                found = self._read(samples, row, shards)
                if isinstance(found, Exception):
                    found = self._read_another(samples, row, found, shards)
                read[position], captions[row] = found, found[1]
            again = sorted(failed)
            regions, flips = self._views(samples, rows, read)
            replaced, still = decode_or_none(decoder, [read[p][0] for p in again], regions[again], flips[again])
            pixels[again] = replaced
            failed = {again[p]: reason for p, reason in still.items()}
        return self._finished(samples, rows, read, pixels, regions, flips)

    def _finished(
        self, samples: Samples, rows: slice, read: list, pixels: torch.Tensor, regions: np.ndarray, flips: np.ndarray
    ) -> torch.Tensor:
        """The pixels of samples that have been read and seen as `regions` and `flips` say, as they are trained on."""
        if self.augment is not None:
            with span("loader: augment"):
                unique = self.order.unique(samples.sources[rows], samples.indices[rows])
                pixels = self.augment(pixels, samples.epochs[rows], unique)
        return pixels

    def _views(self, samples: Samples, rows: slice, read: list) -> tuple[np.ndarray, np.ndarray]:
        """Regions [b, 4] and flips [b] of some samples."""
        widths, heights = np.array([r[2] for r in read]).T
        if not self.train:
            return centre_squares(widths, heights, self.share), np.zeros(len(read), bool)
        with span("loader: crops"):
            epochs, unique = samples.epochs[rows], self.order.unique(samples.sources[rows], samples.indices[rows])
            regions = random_resized_crops(self.seed, epochs, unique, widths, heights, self.crop_scale)
            flips = random_flips(self.seed, epochs, unique) if self.flip else np.zeros(len(read), bool)
        return regions, flips

    def _replace(self, samples: Samples, row: int, reason: str) -> None:
        source = self.sources[samples.sources[row]]
        shard, i = source.locate(samples.indices[row])
        samples.indices[row] = (samples.indices[row] + 1) % len(source)
        self._failures += 1
        path, why = printable(shard.path), printable(" ".join(reason.split())[:300])
        log.warning("%s, sample %d %s; the next sample takes its place", path, i, why)
        if self._failures > self.max_failure_rate * max(self._served, _GRACE):
            raise TooManyFailures(
                f"{self._failures} samples failed at run time, more than data.max_failure_rate="
                f"{self.max_failure_rate}; the last is sample {i} of {path} ({why}); check the "
                "storage, or index the shards again"
            )


def _one_ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterator, *arguments) -> Iterator[tuple]:
    """(item, future of `function(item, *arguments)`) of each item, with the next one under way already."""
    waiting = None
    for item in items:
        coming = item, pool.submit(function, item, *arguments)
        if waiting is not None:
            yield waiting
        waiting = coming
    if waiting is not None:
        yield waiting


def _put(target: queue.Queue, stop: threading.Event, item: object) -> bool:
    """Put `item` unless asked to stop meanwhile."""
    while not stop.is_set():
        try:
            target.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
