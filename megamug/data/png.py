"""What a PNG file says of itself (https://www.w3.org/TR/png-3/): chunks, and how many bytes its pixels are."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
# Adam7: first column and row of each pass, and the steps between its columns and rows.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_SLACK = 1 << 20  # encoders that fill up their last block are not meant


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte of its content, first byte behind that) of each whole chunk; nothing of what is no PNG."""
    start = len(SIGNATURE)
    if not data.startswith(SIGNATURE):
        return
    while start + 12 <= len(data):  # length, name, content, checksum
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if end + 4 > len(data):
            return
        yield data[start + 4 : start + 8], start + 8, end
        start = end + 4


def has_transparency(data: bytes) -> bool:
    """Whether a PNG has an alpha channel or a transparent colour; False for what is no PNG."""
    for name, start, _ in chunks(data):
        if name == b"IHDR" and data[start + 9 : start + 10] in (b"\4", b"\6") or name == b"tRNS":
            return True
        if name == b"IDAT":
            break
    return False


def too_long(data: bytes) -> int:
    """The bytes that the pixels of a PNG are, if its compressed data hold (far) more than those; else 0.

    A decoder inflates the rest, too, only to throw it away: two megabytes may be two gigabytes. Nothing is kept here,
    and inflating stops at the first byte too many. What is no PNG, or damaged, is left to the decoder.
    """
    wanted, made, inflate = 0, 0, zlib.decompressobj()
    for name, start, end in chunks(data):
        if name == b"IHDR":
            wanted = _raw_bytes(data[start:end])
        elif name == b"IDAT" and wanted:
            rest = data[start:end]
            while rest and not inflate.eof:
                try:
                    made += len(inflate.decompress(rest, 1 << 20))
                except zlib.error:
                    return 0
                rest = inflate.unconsumed_tail
                if made > wanted + _SLACK:
                    return wanted
    return 0


def _raw_bytes(header: bytes) -> int:
    """Bytes of the rows that IHDR describes, each with the one that names its filter; 0 where it is not understood."""
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    if len(header) != 13 or header[9] not in _SAMPLES:
        return 0
    bits = header[8] * _SAMPLES[header[9]]
    passes = _PASSES if header[12] else ((0, 0, 1, 1),)
    total = 0
    for column, row, across, down in passes:
        columns, rows = -(-(width - column) // across), -(-(height - row) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total
