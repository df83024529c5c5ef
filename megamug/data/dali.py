"""The one door to NVIDIA DALI: two small pipelines, from encoded bytes to pixels.

DALI is used for what it does best (decode a region; on a GPU resize and flip, too); which region is decided by the
caller. A file that does not decode raises out of a pipeline and leaves it unusable: both classes drop the pipeline then
and build another one (about 20 ms) at the next call.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from megamug.data import png
from megamug.data.png import SIGNATURE, chunks
from megamug.errors import UserError

if TYPE_CHECKING:  # indexing in many processes does without torch
    import torch

# What DALI raises where a file does not decode; its own errors derive from RuntimeError, bad arguments are ValueError.
DECODE_ERRORS = (RuntimeError, ValueError)


WHITE = (255, 255, 255)
# The chunks of a PNG that pixels and their orientation come from.
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")


def without_remarks(image: bytes) -> bytes:
    """A PNG without the chunks that do not concern its pixels; anything else, and a PNG cut short, as it is.

    Decoders do not apply a profile or a gamma, but libpng writes a warning to stderr for each that it dislikes ("iCCP:
    known incorrect sRGB profile"), as often as the image is read.
    """
    kept, dropped, end = [SIGNATURE], False, len(SIGNATURE)
    for name, start, stop in chunks(image):
        end = stop + 4  # behind the checksum
        if name in PNG_PIXELS:
            kept.append(image[start - 8 : end])
        else:
            dropped = True
        if name == b"IEND":
            return b"".join(kept) + image[end:] if dropped else image
    return b"".join(kept) if dropped and end == len(image) else image


def has_transparency(image: bytes) -> bool:
    """Whether a PNG or WebP has an alpha channel or a transparent colour; False for anything else."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        kind = image[12:16]
        if kind == b"VP8X":  # the flags of the extended format
            return len(image) > 20 and bool(image[20] & 0x10)
        # lossless: one byte of signature, 14 bits each of width and height, then "alpha is used"
        return kind == b"VP8L" and len(image) > 24 and bool(image[24] & 0x10)
    return png.has_transparency(image)


def opaque(image: bytes, background: Sequence[int] = WHITE, region: Sequence[int] | None = None) -> bytes:
    """An image with transparency -> its pixels over `background` (red, green, blue), as a PPM; any other as it is.

    DALI drops the alpha channel, and what lies behind it (mostly black, often leftovers) would be seen. Pillow knows
    every kind of transparency of PNG and WebP; EXIF orientation is applied. `region`: (top, left, height, width) of the
    pixels that are wanted. Raises one of `DECODE_ERRORS`.
    """
    image = without_remarks(image)
    if not has_transparency(image):
        return image
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image), formats=("PNG", "WEBP")) as opened:
                picture = ImageOps.exif_transpose(eight_bits(opened)).convert("RGBA")
    except Exception as error:  # the parsers of two formats, on any bytes
        raise ValueError(f"does not decode: {type(error).__name__}: {error}") from error
    if region is not None:
        top, left, height, width = (int(n) for n in region)
        picture = picture.crop((left, top, left + width, top + height))
    flat = Image.new("RGB", picture.size, tuple(background))
    flat.paste(picture, mask=picture.getchannel("A"))
    return b"P6\n%d %d\n255\n" % flat.size + flat.tobytes()


def eight_bits(picture):
    """A Pillow image of 16-bit grey as one of 8 bits, with alpha where a grey of it is transparent; any other as it is.

    `convert` would cut values above 255 instead of scaling them.
    """
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    grey, clear = np.asarray(picture), picture.info.get("transparency")
    scaled = np.clip(grey >> 8, 0, 255).astype(np.uint8)
    if not isinstance(clear, int):
        return Image.fromarray(scaled, "L")
    return Image.fromarray(np.stack([scaled, np.where(grey == clear, 0, 255).astype(np.uint8)], axis=-1), "LA")


def load_dali():
    """(fn, types, pipeline_def, version). Raises `UserError` where DALI is not installed."""
    try:
        import nvidia.dali
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise UserError(
            f"images are decoded by NVIDIA DALI, which does not import ({error}); run: pip install nvidia-dali-cuda130"
        ) from error
    return fn, types, pipeline_def, nvidia.dali.__version__


def decoder_version() -> str:
    return f"nvidia-dali {load_dali()[3]}"


class FullDecoder:
    """Decodes whole images on the CPU, to see whether they decode and how large they are."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._pipeline = None

    def _build(self):
        fn, types, pipeline_def, _ = load_dali()

        @pipeline_def(batch_size=self.batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def pipeline():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

        built = pipeline()
        built.build()
        return built

    def __call__(self, images: list[bytes]) -> list[tuple[int, int]]:
        """(height, width) of each image as decoded. Raises one of `DECODE_ERRORS` where any of them does not decode."""
        assert 0 < len(images) <= self.batch_size
        pipeline, self._pipeline = self._pipeline or self._build(), None
        pipeline.feed_input("encoded", [np.frombuffer(opaque(image), np.uint8) for image in images])
        (decoded,) = pipeline.run()
        sizes = [tuple(decoded[i].shape()[:2]) for i in range(len(images))]
        self._pipeline = pipeline  # only after a success
        return sizes


class CropDecoder:
    """Encoded bytes and regions -> uint8 [b, 3, size, size] (RGB): decode the region, resize (cubic, antialias), flip.

    On a GPU all of it is DALI's (`mixed` decoding), and the tensor is there. On the CPU DALI decodes and torch resizes:
    its kernel for bytes takes a fifth of the time of DALI's, which took two thirds of the whole (docs/benchmarks).
    What is transparent is laid over `background` first (red, green, blue in 0..255), see `opaque`.
    """

    def __init__(
        self, image_size: int, batch_size: int, threads: int, device: torch.device, background: Sequence[int] = WHITE,
        padding: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """`padding`: the colour of what regions that are given a size leave free; on the CPU alone."""
        assert padding is None or device.type == "cpu"
        self.padding = padding
        self.image_size, self.batch_size, self.threads, self.device = image_size, batch_size, threads, device
        self.background = tuple(background)
        self._pipeline = None
        self._pool = ThreadPoolExecutor(threads, "megamug-resize")

    def _build(self):
        fn, types, pipeline_def, _ = load_dali()
        on_gpu = self.device.type == "cuda"
        device_id = (self.device.index or 0) if on_gpu else None

        @pipeline_def(
            batch_size=self.batch_size, num_threads=self.threads, device_id=device_id, prefetch_queue_depth=1
        )
        def pipeline():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            pixels = fn.decoders.image_slice(
                encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, start=anchor, shape=shape,
                axes=[0, 1],
            )
            if not on_gpu:
                return pixels
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            size = [self.image_size, self.image_size]
            pixels = fn.resize(pixels, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            # mean 0 and std 1: only the mirror and the layout; pixels travel as bytes and are normalised by the model
            return fn.crop_mirror_normalize(pixels, dtype=types.UINT8, output_layout="CHW", mirror=flip)

        built = pipeline()
        built.build()
        return built

    def __call__(self, images: list[bytes], regions: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        """`regions`: int [b, 4] of (top, left, height, width) in pixels, or with `padding` [b, 6], where height and
        width of what each becomes follow; `flips`: bool [b].

        Raises one of `DECODE_ERRORS` where any image does not decode.
        """
        import torch

        assert 0 < len(images) <= self.batch_size
        pipeline, self._pipeline = self._pipeline or self._build(), None
        sizes = None if self.padding is None else np.asarray(regions)[:, 4:].tolist()
        encoded, regions = self._opaque(images, np.array(regions, np.int32)[:, :4])
        pipeline.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in encoded])
        pipeline.feed_input("anchor", np.ascontiguousarray(regions[:, :2]))
        pipeline.feed_input("shape", np.ascontiguousarray(regions[:, 2:]))
        # DALI reuses its buffer in the next run: copy
        if self.device.type == "cuda":
            pipeline.feed_input("flip", np.asarray(flips, np.int32))
            stream = torch.cuda.current_stream(self.device)
            (pixels,) = pipeline.run(stream)
            tensor = torch.from_dlpack(pixels.as_tensor()).clone()
            stream.synchronize()
        else:
            (pixels,) = pipeline.run()
            tensor = self._resized([np.asarray(pixels[i]) for i in range(len(images))], flips, sizes)
        self._pipeline = pipeline  # only after a success
        return tensor

    def _opaque(self, images: list[bytes], regions: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """`images` without transparency; of those that had some the region alone, which is then all of them."""
        images = list(images)
        clear = [i for i, image in enumerate(images) if has_transparency(image)]

        def flatten(i: int) -> bytes:
            return opaque(images[i], self.background, regions[i])

        flat = dict(zip(clear, self._pool.map(flatten, clear), strict=True))
        regions[clear, :2] = 0
        return [flat[i] if i in flat else without_remarks(image) for i, image in enumerate(images)], regions

    def _resized(self, pixels: list[np.ndarray], flips: np.ndarray, sizes: list | None) -> torch.Tensor:
        """Decoded regions, uint8 [height, width, 3] each, in `threads` threads (kernels and copies release the GIL)."""
        import torch
        from torch.nn.functional import interpolate

        size = self.image_size
        tensor = torch.empty(len(pixels), 3, size, size, dtype=torch.uint8)
        target = tensor.numpy()
        if sizes is None:
            sizes = [(size, size)] * len(pixels)
        else:
            target[:] = np.array(self.padding, np.uint8)[:, None, None]

        def resize(first: int) -> None:
            for i in range(first, len(pixels), self.threads):
                image = torch.from_numpy(pixels[i]).permute(2, 0, 1).unsqueeze(0)
                height, width = sizes[i]
                new = interpolate(image, (height, width), mode="bicubic", antialias=True)[0].numpy()
                new = new[:, :, ::-1] if flips[i] else new
                target[i, :, :height, :width] = new  # not torch's copy, which would ask for threads

        list(self._pool.map(resize, range(self.threads)))
        return tensor
