"""Image-caption pairs rendered on the spot: two coloured shapes, and the one sentence that describes them.

Everything the caption says can be seen, and what can be seen decides how it is said: on a light background the left or
upper shape comes first, on a dark one the right or lower shape does, in another phrase. So there is one right caption
for each scene, and exact match is a fair measure. A scene is a pure function of (seed, split, number of the scene).
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megamug.data.random import uniform
from megamug.data.shards.tar_writer import write_shard
from megamug.data.tooling import Progress, default_processes, parallel_map
from megamug.durable import write_atomically
from megamug.errors import UserError

DEMO_VERSION = 3
SCENES_PER_SHARD = 2000
COLOURS = {
    "red": (222, 42, 40), "green": (38, 160, 62), "blue": (44, 84, 224), "yellow": (244, 212, 44),
    "orange": (246, 136, 28), "purple": (138, 58, 186),
}  # fmt: skip
SHAPES = ("circle", "ring", "cross")
RADII = {"small": (0.135, 0.145), "large": (0.215, 0.225)}  # of the picture's side
TIDY_RADII = {"small": 0.169, "large": 0.23}  # both inside one cell of the grid
BACKGROUNDS = ("gradient", "gradient", "clouds", "stripes")  # a gradient lies under the others too
TIDY_GREYS = {False: 210.0, True: 48.0}  # the background of a tidy scene, by `Scene.dark`
_GRID = 2  # cells a side of a tidy scene: of 32 pixels, the patches of an image tokenizer of factor 16
_HOLE = 0.5  # radius of a ring's hole, of its own
_ARM = 0.3  # half the width of a cross's arms, of its radius
_SUPERSAMPLING = 4
_NUMBERS = 48  # random numbers for the layout of one scene
_CLOUDS = 7  # cells a side


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    x: float  # centre and radius as shares of the picture's side
    y: float
    radius: float
    angle: float  # radians

    def words(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    first: Thing  # left, or upper
    second: Thing
    horizontal: bool
    dark: bool
    background: str  # of BACKGROUNDS, or "plain"

    def caption(self) -> str:
        if self.dark:
            relation = "to the right of" if self.horizontal else "under"
            return f"there is a {self.second.words()} {relation} a {self.first.words()}"
        relation = "left of" if self.horizontal else "above"
        return f"a {self.first.words()} {relation} a {self.second.words()}"


def compose(u: np.ndarray, tidy: bool = False) -> Scene:
    """The scene that the uniform numbers `u` [_NUMBERS] stand for. The things do not touch; their colours differ.

    `tidy`: upright on a grid, of two radii, before one of two greys. What one caption stands for are few pictures then,
    made of few different patches: minutes are enough to learn to draw them.
    """
    numbers = iter(u[:20].tolist())

    def pick(values):
        return values[int(next(numbers) * len(values))]

    horizontal, dark, background = next(numbers) < 0.5, next(numbers) < 0.5, pick(BACKGROUNDS)
    things = []
    colours = list(COLOURS)
    for _ in range(2):
        size, colour, shape = pick(list(RADII)), pick(colours), pick(SHAPES)
        colours.remove(colour)
        low, high = RADII[size]
        radius = low + (high - low) * next(numbers)
        turn = (next(numbers) - 0.5) * 0.1
        things.append((size, colour, shape, TIDY_RADII[size] if tidy else radius, 0.0 if tidy else turn))
    places = _cells(numbers) if tidy else _places(things[0][3], things[1][3], numbers)
    placed = [
        Thing(size, colour, shape, *(place if horizontal else place[::-1]), radius, turn)
        for (size, colour, shape, radius, turn), place in zip(things, places, strict=True)
    ]
    return Scene(placed[0], placed[1], horizontal, dark, "plain" if tidy else background)


def _places(r1: float, r2: float, numbers: Iterator[float]) -> list[tuple[float, float]]:
    """(along the relation, across it) of the centres of two things with these radii, as shares of the side."""
    margin, gap = 0.03, 0.03
    # along the relation: first + distance = second; across it: less than 0.4 of that distance apart
    longest = 1 - 2 * margin - r1 - r2
    shortest = max(r1 + r2 + gap, 0.3)
    distance = shortest + (longest - shortest) * next(numbers)
    along1 = margin + r1 + (longest - distance) * next(numbers)
    widest = max(r1, r2) + margin
    across1 = widest + (1 - 2 * widest) * next(numbers)
    across2 = np.clip(across1 + (next(numbers) - 0.5) * 0.8 * distance, widest, 1 - widest)
    return [(along1, across1), (along1 + distance, float(across2))]


def _cells(numbers: Iterator[float]) -> list[tuple[float, float]]:
    """As `_places`, in the middles of cells of the grid, a cell to each thing."""
    pairs = list(itertools.combinations(range(_GRID), 2))
    along = pairs[int(next(numbers) * len(pairs))]
    across = int(next(numbers) * _GRID)  # of both, so that one relation is the plainest
    return [((place + 0.5) / _GRID, (across + 0.5) / _GRID) for place in along]


def render(scene: Scene, u: np.ndarray, clouds: np.ndarray, size: int) -> np.ndarray:
    """Pixels uint8 [size, size, 3]. `u`: the scene's numbers; `clouds`: [_CLOUDS, _CLOUDS] in [0, 1)."""
    picture = _background(scene, u[20:], clouds, size)  # float [size, size, 3]
    for thing in (scene.first, scene.second):
        cover = _cover(thing, size)[..., None]  # share of each pixel that the thing covers
        colour = np.array(COLOURS[thing.colour], np.float64)
        picture = picture * (1 - cover) + colour * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def read_tidy(picture: np.ndarray) -> Scene | None:
    """The tidy scene that a picture uint8 [S, S, 3] shows, S a multiple of the grid; None where it is none.

    Each cell is read as the nearest of all that it can be, by squared error. A scene has two things of two colours,
    side by side or one above the other.
    """
    side = len(picture) // _GRID
    names, patterns = _patterns(side)
    cells = picture.reshape(_GRID, side, _GRID, side, 3).swapaxes(1, 2).reshape(_GRID**2, -1).astype(np.float32)
    nearest = ((cells[:, None] - patterns) ** 2).sum(-1).argmin(1)
    dark = 2 * sum(names[i][1] for i in nearest) > len(nearest)
    places = [((n % _GRID + 0.5) / _GRID, (n // _GRID + 0.5) / _GRID) for n in range(_GRID**2)]
    things = [replace(names[i][0], x=x, y=y) for i, (x, y) in zip(nearest, places, strict=True) if names[i][0]]
    if len(things) != 2 or things[0].colour == things[1].colour:
        return None
    first, second = things  # row by row: the first is the left or the upper one
    if first.y != second.y and first.x != second.x:
        return None
    return Scene(first, second, first.y == second.y, dark, "plain")


@functools.cache
def _patterns(side: int) -> tuple[list[tuple[Thing | None, bool]], np.ndarray]:
    """All that a cell of a tidy scene can be, [(thing or None, dark)], and its pixels, float32 [n, side * side * 3]."""
    names, patterns = [], []
    for dark, grey in TIDY_GREYS.items():
        names.append((None, dark))
        patterns.append(np.full((side, side, 3), grey))
        for size, colour, shape in itertools.product(RADII, COLOURS, SHAPES):
            thing = Thing(size, colour, shape, 0.5, 0.5, TIDY_RADII[size], 0.0)
            cover = _cover(replace(thing, radius=thing.radius * _GRID), side)[..., None]
            names.append((thing, dark))
            patterns.append(grey * (1 - cover) + np.array(COLOURS[colour]) * cover)
    return names, np.stack(patterns).reshape(len(names), -1).astype(np.float32)


def _background(scene: Scene, u: np.ndarray, clouds: np.ndarray, size: int) -> np.ndarray:
    if scene.background == "plain":
        return np.full((size, size, 3), TIDY_GREYS[scene.dark])
    level = (50 + 24 * u[0]) if scene.dark else (186 + 24 * u[0])
    tint = (u[1:4] - 0.5) * 36
    angle, depth = 2 * math.pi * u[4], 36 + 24 * u[5]
    axis = np.linspace(-1, 1, size)
    slope = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]  # [size, size]
    light = level + depth * slope
    if scene.background == "clouds":
        image = Image.fromarray(clouds.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        light = light + 28 * (np.asarray(image, np.float64) - 0.5)
    elif scene.background == "stripes":
        turn, waves = math.pi * u[6], 2.5 + 2.5 * u[7]
        position = math.cos(turn) * axis[None, :] + math.sin(turn) * axis[:, None]
        light = light + 9 * np.sin(waves * math.pi * position + 2 * math.pi * u[8])
    return light[..., None] + tint


def _cover(thing: Thing, size: int) -> np.ndarray:
    """Anti-aliased mask in [0, 1], [size, size]: drawn at four times the size and averaged."""
    scale = size * _SUPERSAMPLING
    mask = Image.new("L", (scale, scale), 0)
    draw = ImageDraw.Draw(mask)
    x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
    if thing.shape == "cross":
        draw.polygon([(x + r * px, y + r * py) for px, py in _corners(thing.angle)], fill=255)
    else:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    if thing.shape == "ring":
        r *= _HOLE
        draw.ellipse((x - r, y - r, x + r, y + r), fill=0)
    return np.asarray(mask.reduce(_SUPERSAMPLING), np.float64) / 255


def _corners(angle: float) -> list[tuple[float, float]]:
    """The twelve corners of a cross of radius 1, turned by `angle`."""
    arm = [(1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)]
    turns = [angle + quarter * math.pi / 2 for quarter in range(4)]
    return [(x * math.cos(a) - y * math.sin(a), x * math.sin(a) + y * math.cos(a)) for a in turns for x, y in arm]


def scenes(
    seed: int, split: str, start: int, count: int, size: int, tidy: bool = False
) -> list[tuple[str, str, bytes, bytes]]:
    """(key, extension, image bytes, caption) of scenes start .. start + count; one in ten is a PNG, the rest JPEGs."""
    numbers = np.arange(start, start + count)
    layout = uniform(seed, f"demo/{split}/scene", 0, numbers, _NUMBERS)
    clouds = uniform(seed, f"demo/{split}/clouds", 0, numbers, _CLOUDS * _CLOUDS).reshape(-1, _CLOUDS, _CLOUDS)
    made = []
    for number, u, cells in zip(numbers, layout, clouds, strict=True):
        scene = compose(u, tidy)
        image = Image.fromarray(render(scene, u, cells, size))
        buffer = io.BytesIO()
        extension = "png" if u[-1] < 0.1 else "jpg"
        if extension == "png":
            image.save(buffer, "PNG")
        else:
            image.save(buffer, "JPEG", quality=92, subsampling=0)
        made.append((f"{number:08d}", extension, buffer.getvalue(), scene.caption().encode()))
    return made


@dataclass(frozen=True)
class _Job:
    path: Path
    split: str
    start: int
    count: int


def _make_shard(job: _Job, seed: int, size: int, tidy: bool) -> int:
    return write_shard(job.path, scenes(seed, job.split, job.start, job.count, size, tidy))


@dataclass(frozen=True)
class DemoParameters:
    train: int = 20000
    heldout: int = 512
    seed: int = 1
    size: int = 72  # pixels a side: a little more than the 64 that a crop is resized to
    tidy: bool = False  # see `compose`
    version: int = DEMO_VERSION


def make_demo_data(output: str | Path, parameters: DemoParameters, processes: int | None = None) -> list[Path]:
    """Write `output/train/*.tar` and `output/heldout/*.tar`; returns their paths. The same parameters, the same bytes.

    A call that was interrupted is continued by the next one. Raises `UserError` where `output` holds anything else.
    """
    output = Path(output)
    if parameters.train < 1 or parameters.heldout < 1 or parameters.size < 32:
        raise UserError(
            f"train={parameters.train}, heldout={parameters.heldout}, size={parameters.size}: "
            "both splits need a scene or more, and pictures at least 32 pixels"
        )
    claim_folder(output, "demo.json", parameters)
    jobs = []
    for split, total in (("train", parameters.train), ("heldout", parameters.heldout)):
        for number, start in enumerate(range(0, total, SCENES_PER_SHARD)):
            path = output / split / f"{split}-{number:06d}.tar"
            jobs.append(_Job(path, split, start, min(SCENES_PER_SHARD, total - start)))
    missing = [job for job in jobs if not job.path.exists()]
    progress = Progress("scenes", sum(job.count for job in missing))
    work = functools.partial(_make_shard, seed=parameters.seed, size=parameters.size, tidy=parameters.tidy)
    for _, count in parallel_map(work, missing, processes or default_processes()):
        progress.update(count)
    return [job.path for job in jobs]


def claim_folder(output: Path, name: str, parameters: object) -> None:
    """File `name` says what the folder holds, the parameters (a dataclass); it is written before the shards."""
    marker = output / name
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found != asdict(parameters):
            raise UserError(
                f"{output} holds demo data made with other parameters ({found}, asked for {asdict(parameters)}); "
                "give another folder, or remove this one"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is no folder of demo data; give a new folder")
    write_atomically(marker, (json.dumps(asdict(parameters), indent=1) + "\n").encode())
