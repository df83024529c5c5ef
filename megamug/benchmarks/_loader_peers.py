"""What the loader is set against: a PyTorch DataLoader with Pillow, and one with webdataset and its decoder.

Both draw torchvision's RandomResizedCrop (area 0.2 to 1, ratio 3/4 to 4/3), resize with Pillow's bicubic filter (region
and size in one call, which is faster than a crop and then a resize), flip, and encode the caption as the loader does.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from megamug.data.pairs.text import Tokenizer
from megamug.data.shards.captions import parse_caption
from megamug.data.shards.sources import resolve_sources

ENDLESS = 1 << 40


def crop(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): ten attempts at an area and a ratio, else the largest square in the middle."""
    for _ in range(10):
        area = width * height * random.uniform(0.2, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def augmented(image: Image.Image, size: int) -> torch.Tensor:
    """uint8 [3, size, size]."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=crop(*image.size))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


class Photographs(Dataset):
    """Pairs by their number, read from the shards by offset. A process opens a shard once."""

    def __init__(self, shards: str, tokenizer: str, size: int, caption_length: int):
        self.size, self.caption_length, self.files = size, caption_length, {}
        self.tokenizer_path, self.tokenizer = tokenizer, None
        self.places = []
        for source in resolve_sources(shards, captions=True):
            for shard, count in zip(source.shards, source.counts(), strict=True):
                for record in shard.samples[:count]:
                    image = int(record["image_offset"]), int(record["image_size"])
                    caption = int(record["caption_offset"]), int(record["caption_size"])
                    self.places.append((str(shard.path), image, caption, bool(record["caption_is_json"])))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tokenizer is None:  # in the worker: it does not travel
            self.tokenizer = Tokenizer(self.tokenizer_path)
        path, (image_at, image_size), (caption_at, caption_size), is_json = self.places[number]
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
        image = Image.open(io.BytesIO(os.pread(self.files[path], image_size, image_at)))
        caption = parse_caption(os.pread(self.files[path], caption_size, caption_at), is_json)
        return augmented(image, self.size), self.tokenizer.encode_batch([caption], self.caption_length)[0]


def pillow(options) -> Iterator:
    """Endless batches of a PyTorch DataLoader with Pillow."""
    pairs = Photographs(options.shards, options.tokenizer, options.image_size, options.caption_length)
    return iter(DataLoader(
        pairs, options.batch, sampler=RandomSampler(pairs, replacement=True, num_samples=ENDLESS),
        num_workers=options.workers, pin_memory=torch.cuda.is_available(),
    ))  # fmt: skip


def webdataset(options) -> Iterator:
    """Endless batches of webdataset: shards drawn with replacement, a shuffle buffer, its decoder for Pillow images."""
    import webdataset as wds

    urls = [str(shard.path) for source in resolve_sources(options.shards) for shard in source.shards]
    pairs = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(200)
        .decode("pil")
        .map(_Encoded(options.tokenizer, options.image_size, options.caption_length))
        .batched(options.batch)
    )
    return iter(wds.WebLoader(
        pairs, batch_size=None, num_workers=options.workers, pin_memory=torch.cuda.is_available()
    ))  # fmt: skip


class _Encoded:
    """A decoded sample of webdataset -> (image, tokens)."""

    def __init__(self, tokenizer: str, size: int, caption_length: int):
        self.path, self.tokenizer, self.size, self.caption_length = tokenizer, None, size, caption_length

    def __call__(self, sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tokenizer is None:
            self.tokenizer = Tokenizer(self.path)
        image = next(sample[name] for name in ("jpg", "jpeg", "png", "webp") if name in sample)
        caption = sample["txt"] if "txt" in sample else sample["json"]["caption"]
        tokens = self.tokenizer.encode_batch([" ".join(caption.split())], self.caption_length)[0]
        return augmented(image, self.size), tokens


def taking(batches: Iterator, options) -> Callable[[], None]:
    """A step: so many batches, on the device that trains."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def step() -> None:
        for _ in range(options.batches):
            for tensor in next(batches):
                assert len(tensor) == options.batch
                tensor.to(device, non_blocking=True)

    return step
