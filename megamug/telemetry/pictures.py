"""Pictures for people: a grid of images, one row a sample, with lines of text below each row, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megamug.durable import write_atomically

MARGIN = 8  # pixels around images and text
TEXT_SIZE = 16
SMALLEST_SIDE = 192  # smaller images are enlarged by a whole factor
SCREEN = (1920, 1080)  # width and height of what a page is looked at on
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


@dataclass
class PictureRow:
    """One sample: `images` uint8 [H, W, 3], in the order of the grid's columns, and `lines` of text below them."""

    images: list[np.ndarray]
    lines: list[str] = field(default_factory=list)


def draw_grid(rows: Sequence[PictureRow], columns: Sequence[str]) -> Image.Image:
    """The grid; `columns` are the titles. All images are of one size; small ones are enlarged pixel by pixel."""
    assert rows and all(len(row.images) == len(columns) for row in rows), "each row has an image per column"
    height, width, _ = rows[0].images[0].shape
    factor = max(1, -(-SMALLEST_SIDE // min(height, width)))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(TEXT_SIZE)
    line_height = sum(font.getmetrics()) + 2
    total_width = MARGIN + len(columns) * (width + MARGIN)
    texts = [[part for line in row.lines for part in wrap(line, font, total_width - 2 * MARGIN)] for row in rows]
    row_heights = [height + len(lines) * line_height + 2 * MARGIN for lines in texts]
    title_height = line_height + MARGIN

    page = Image.new("RGB", (total_width, MARGIN + title_height + sum(row_heights)), _PAPER)
    draw = ImageDraw.Draw(page)
    lefts = [MARGIN + i * (width + MARGIN) for i in range(len(columns))]
    for left, title in zip(lefts, columns, strict=True):
        draw.text((left, MARGIN), title, fill=_FAINT, font=font)
    top = MARGIN + title_height
    for row, lines, row_height in zip(rows, texts, row_heights, strict=True):
        for left, pixels in zip(lefts, row.images, strict=True):
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            page.paste(image, (left, top))
        for i, line in enumerate(lines):
            draw.text((MARGIN, top + height + MARGIN // 2 + i * line_height), line, fill=_INK, font=font)
        top += row_height
    return page


def draw_page(rows: Sequence[PictureRow], columns: Sequence[str]) -> Image.Image:
    """Grids of the rows side by side, read downwards, as many as make the page largest on a screen: twelve rows in one
    grid are five times as high as wide."""
    one = draw_grid(rows, columns)

    def share(across: int) -> float:
        """What of the page's size is left of it on a screen that shows it whole."""
        deep = -(-len(rows) // across)
        return min(SCREEN[0] / (one.width * across), SCREEN[1] / (one.height * deep / len(rows)), 1.0)

    across = max(range(1, len(rows) + 1), key=lambda number: (share(number), -number))
    if across == 1:
        return one
    deep = -(-len(rows) // across)
    grids = [draw_grid(rows[first : first + deep], columns) for first in range(0, len(rows), deep)]
    page = Image.new("RGB", (sum(grid.width for grid in grids), max(grid.height for grid in grids)), _PAPER)
    for number, grid in enumerate(grids):
        page.paste(grid, (number * one.width, 0))
    return page


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, cut between words, and inside a word only where it is too long."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            end = next(n for n in range(len(lines[-1]) - 1, 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:end], lines[-1][end:]]
    return lines


def save_grid(rows: Sequence[PictureRow], columns: Sequence[str], path: Path) -> Path:
    """Draws the page into `path` (PNG), whole or not at all; makes its folder. Returns `path`."""
    buffer = io.BytesIO()
    draw_page(rows, columns).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    return path
