"""How well a segmenter gives each pixel its class: windows over the whole image, compared at its own size."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megamug.configuration.checks import segmenter
from megamug.data.dali import DECODE_ERRORS, CropDecoder
from megamug.data.segmentation.crops import without_zero
from megamug.data.shards.maps import NO_CLASS
from megamug.data.shards.reading import OpenShards
from megamug.data.shards.sources import Source, check_maps, resolve_sources
from megamug.durable import write_atomically
from megamug.errors import UserError, printable
from megamug.evaluate.classification import check_names
from megamug.models.segmenter.figures import of_confusion
from megamug.models.segmenter.model import confusion
from megamug.telemetry.pictures import PictureRow, save_grid

PICTURES = 4  # images shown
OPACITY = 0.6  # of classes over an image


def measure(run, samples: int | None, folder: Path, predictions: bool = False) -> dict:
    """Figures of at most `samples` held-out images (None: all), in the order of the shards, each once.

    An image is resized so that its shorter side is `data.image_size`; the logits of windows of that size, half of it
    apart, are averaged where they overlap, and resized to the image's own size, where its map is. Pixels are counted
    over all images; a class that is in no map and in no prediction is left out of `mean_iou`.

    FOLDER/segmentation.png shows the first images; with `predictions` FOLDER/predictions/SHARD/KEY.png holds the
    classes of each, numbered as in the data's maps. Raises UserError: data without maps, of other or more classes than
    the run; an image that cannot be read; logits that are not finite.
    """
    plan, config = run.task.plan, run.config
    sources = resolve_sources(config.data.validation, config.data.verify)
    names = check_classes(run, sources)
    stems = [shard.path.stem for source in sources for shard in source.shards]
    if predictions and len(set(stems)) < len(stems):
        raise UserError(f"--predictions: two shards are called {max(stems, key=stems.count)}.tar, and their predictions"
                        " would be, too; measure the sets one after another")
    counts = torch.zeros(plan.classes, plan.classes, dtype=torch.int64)
    rows, seen, zero = [], 0, config.segmenter.reduce_zero_label
    with torch.inference_mode():
        for shard, key, image, truth in read(sources, run, samples):
            guessed = classes_of(window_logits(run, image), truth.shape)
            truth = torch.from_numpy(without_zero(truth) if zero else truth.copy())
            counts += confusion(truth, guessed, plan.classes)
            seen += 1
            if predictions:
                png = _png((guessed.numpy() + zero).astype(np.uint8))
                write_atomically(folder / "predictions" / shard / f"{key}.png", png)
            if len(rows) < PICTURES:
                rows.append(_shown(key, image, truth, guessed, config.data.image_size))
    figures = of_confusion(counts)
    save_grid(rows, ["image", "truth", "prediction"], folder / "segmentation.png")
    true, predicted = counts.sum(1).tolist(), counts.sum(0).tolist()
    per_class = [
        {"class": number, "name": None if names is None else names[number], "pixels": true[number],
         "predicted": predicted[number], "iou": figures.iou[number],
         "accuracy": figures.accuracy[number] if true[number] else None}
        for number in range(plan.classes) if true[number] or predicted[number]
    ]  # fmt: skip
    return {
        "samples": seen, "classes": plan.classes, "pixels": sum(true), "mean_iou": figures.mean_iou,
        "pixel_accuracy": figures.pixel_accuracy, "mean_accuracy": figures.mean_accuracy, "per_class": per_class,
        "pictures": [str(folder / "segmentation.png")],
        **({"predictions": str(folder / "predictions")} if predictions else {}),
    }  # fmt: skip


def check_classes(run, sources: list[Source]) -> list[str] | None:
    """The names of the data's classes, None where there are none. Raises UserError: images without a map, maps of more
    classes than the run has, or classes of other names."""
    check_maps(sources)
    found = max(segmenter.classes_of(source, run.config) for source in sources)
    return check_names(found, run.task.plan.classes, sources, run.config.run_dir)


def read(sources: list[Source], run, most: int | None) -> Iterator[tuple[str, str, Tensor, np.ndarray]]:
    """(shard's name, key, image uint8 [3, h, w] whose shorter side is `data.image_size`, its map [H, W] as it is)."""
    data, shards = run.config.data, OpenShards()
    cpu = torch.device("cpu")
    decoder = CropDecoder(data.image_size, 1, 1, cpu, data.background, padding=(0, 0, 0))
    places = ((source, index) for source in sources for index in range(len(source)))
    try:
        for number, (source, index) in enumerate(places):
            if number == most:
                return
            shard, i = source.locate(index)
            try:
                image, _, record = shards.use(shard).read(i, caption=False)
                truth, key = shard.map(record), shard.key(i)
                height, width = truth.shape
                factor = data.image_size / min(height, width)
                size = [max(round(side * factor), data.image_size) for side in (height, width)]
                decoder.image_size = max(size)  # of the canvas that the image is laid on
                whole = np.array([[0, 0, height, width, *size]])
                yield shard.path.stem, key, decoder([image], whole, [False])[0, :, : size[0], : size[1]], truth
            except (OSError, *DECODE_ERRORS) as error:
                raise UserError(f"{printable(shard.path)}, sample {i} cannot be read: {printable(str(error)[:300])};"
                                " check the storage, or index the shards again") from error  # fmt: skip
    finally:
        shards.close()


def window_logits(run, image: Tensor) -> Tensor:
    """Of an image [3, h, w], no side below `data.image_size`: [C, h, w] float32 on the model's device, the mean of all
    windows that a pixel lies in."""
    size, device = run.config.data.image_size, run.world.device
    places = [(y, x) for y in steps(image.shape[1], size) for x in steps(image.shape[2], size)]
    total = torch.zeros(run.task.plan.classes, *image.shape[1:], device=device)
    count = torch.zeros(image.shape[1:], device=device)
    batch = run.config.data.micro_batch_size
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        windows = torch.stack([image[:, y : y + size, x : x + size] for y, x in some]).to(device)
        for (y, x), logits in zip(some, run.model.logits(windows), strict=True):
            total[:, y : y + size, x : x + size] += logits
            count[y : y + size, x : x + size] += 1
    if not total.isfinite().all():  # the likeliest of no numbers would be the first class
        raise UserError(f"step {run.step}: the logits of an image are not finite; name another --checkpoint")
    return total / count


def steps(side: int, window: int) -> list[int]:
    """Where windows begin, half a window apart; the last one ends with the image."""
    stride = max(window // 2, 1)
    count = -(-(side - window) // stride) + 1
    return [min(number * stride, side - window) for number in range(count)]


def classes_of(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, h, w] -> the likeliest class of each pixel at another size, int64 [*size] on the CPU. Class after class, as
    those of a large photograph, resized, would fill the memory."""
    best = torch.full(size, float("-inf"), device=logits.device)
    found = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for number, own in enumerate(logits):
        own = F.interpolate(own[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        better = own > best
        found[better], best = number, torch.where(better, own, best)
    return found.cpu()


def _png(values: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _shown(key: str, image: Tensor, truth: Tensor, guessed: Tensor, side: int) -> PictureRow:
    """A row of the picture: all on squares of `side`, the longer side filling one."""
    factor = side / max(image.shape[1:])
    size = [max(round(n * factor), 1) for n in image.shape[1:]]
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    pictures = [small]
    for classes in (truth, guessed):
        own = F.interpolate(classes[None, None].float(), size, mode="nearest-exact")[0, 0].long().numpy()
        mixed = (1 - OPACITY) * small + OPACITY * COLOURS[own]
        pictures.append(np.where((own == NO_CLASS)[..., None], small, mixed))
    squares = []
    for picture in pictures:
        square = np.full((side, side, 3), 255, np.uint8)
        square[: size[0], : size[1]] = np.clip(np.rint(picture), 0, 255)
        squares.append(square)
    return PictureRow(squares, [key])


# Of classes: hues a golden section apart, so that neighbours differ.
COLOURS = np.array([
    colorsys.hsv_to_rgb(number * 0.618034 % 1, (1.0, 0.6)[number // 7 % 2], (1.0, 0.7)[number // 14 % 2])
    for number in range(NO_CLASS + 1)
]) * 255  # fmt: skip
