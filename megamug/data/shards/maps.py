"""The map of an image: a class for every pixel, 0..255 as a PNG (`KEY.seg.png`) of the image's size. ADE20K, Pascal VOC
and Cityscapes come so; 255 is no class, and in some of them 0 is none either (`segmenter.reduce_zero_label`)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from megamug.data.png import SIGNATURE, too_long
from megamug.data.shards.annotations import Limits, Rejected, read_member
from megamug.data.shards.tar_members import MAP_EXTENSION, Member, Pair

NO_MAP = f"no map (.{MAP_EXTENSION}) of this key"
NO_CLASS = 255


@dataclass
class Map:
    """Of one image."""

    member: Member | None  # None: it has none that can be used
    data: bytes
    largest: int  # value but 255; -1: none
    unmapped: str  # why there is none


def find_map(file: BinaryIO, pair: Pair, size: tuple[int, int], limits: Limits) -> Map:
    """The map of an image of `size` (height, width) as decoded. Raises `Rejected` where it has none that can be used
    and `limits.maps` wants one."""
    member, reason = pair.beside.get(MAP_EXTENSION), NO_MAP
    if member is not None:
        try:
            data = read_member(file, member, limits.image_bytes)
            values = decode_map(data, size)
            known = values[values != NO_CLASS]
            return Map(member, data, int(known.max()) if known.size else -1, "")
        except (Rejected, ValueError) as error:
            reason = str(error)
    if limits.maps:
        raise Rejected(reason, member)
    return Map(None, b"", -1, reason)


def decode_map(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """The values of a map of `size` (height, width), uint8 [height, width].

    Raises `ValueError` with the reason: no PNG of one byte a pixel (grey, or a palette, whose indices count), another
    size, data that do not decode. Nothing of another size is decoded.
    """
    from PIL import Image

    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        raise ValueError(f"the map is no PNG; it begins with {data[:12]!r}")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    bits, colours = data[24], data[25]
    if not (colours == 3 or (colours, bits) == (0, 8)):
        kind = {0: "grey", 2: "colours", 4: "grey with alpha", 6: "colours with alpha"}.get(colours, "an unknown kind")
        raise ValueError(f"the map is a PNG of {kind} of {bits} bits; grey of 8 bits or a palette is wanted, a class a"
                         " pixel")  # fmt: skip
    if (height, width) != tuple(size):
        raise ValueError(f"the map is of {width} x {height} pixels, and its image of {size[1]} x {size[0]}")
    if excess := too_long(data):
        raise ValueError(f"the map's data inflate to more than the {excess:,} bytes of its pixels")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            assert opened.mode in ("L", "P"), opened.mode
            values = np.asarray(opened)
    except Exception as error:  # a parser, on any bytes
        raise ValueError(f"the map does not decode: {type(error).__name__}: {error}") from error
    return values
