"""Shards of images with maps and configurations of segmenters for tests: coloured shapes on backgrounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megamug.data.shards.annotations import Limits
from megamug.data.shards.indexing import index_paths

NAMES = ("ground", "disc", "square", "triangle")
COLOURS = np.array([(60, 60, 70), (220, 60, 50), (60, 200, 80), (70, 90, 230)])
SIZES = {"patch_size": 4, "layers": 3, "width": 48, "heads": 4, "ffn_width": 96}


def scene(seed: int, size: tuple[int, int] = (36, 44)) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [h, w, 3] and classes uint8 [h, w]: the ground and two shapes, one of them over the other."""
    draw = np.random.RandomState(seed)
    classes = np.zeros(size, np.uint8)
    y, x = np.mgrid[: size[0], : size[1]]
    for _ in range(2):
        kind, radius = draw.randint(1, 4), draw.uniform(7, 11)
        dy, dx = y - draw.uniform(6, size[0] - 6), x - draw.uniform(6, size[1] - 6)
        inside = {
            1: dy**2 + dx**2 < radius**2, 2: np.maximum(abs(dy), abs(dx)) < 0.85 * radius,
            3: (dy < 0.7 * radius) & (dy > 2 * abs(dx) - radius),
        }[kind]  # fmt: skip
        classes[inside] = kind
    noise = draw.randint(-30, 31, (*size, 3))
    return np.clip(COLOURS[classes] + noise, 0, 255).astype(np.uint8), classes


def make_shards(folder: Path, counts: dict[str, int], reduce_zero: bool = False, names: bool = True) -> Path:
    """`folder/SET` for each set, of so many scenes of several sizes. With `reduce_zero` maps are ADE20K's: class 0 is
    written as 1, and a border of 0 is of no class; else the border is 255."""
    from PIL import Image

    from tests.data.conftest import encoded, write_tar

    for number, (name, count) in enumerate(counts.items()):
        members = []
        for n in range(count):
            pixels, classes = scene(1000 * number + n, (36 + 6 * (n % 2), 44 - 6 * (n % 3)))
            classes = classes + reduce_zero
            classes[:2] = 0 if reduce_zero else 255
            members += [(f"{n:03d}.png", encoded(Image.fromarray(pixels), "PNG")),
                        (f"{n:03d}.seg.png", encoded(Image.fromarray(classes), "PNG"))]  # fmt: skip
        (folder / name).mkdir(parents=True)
        if names:
            (folder / name / "classes.txt").write_text("".join(f"{one}\n" for one in NAMES))
        write_tar(folder / name / f"{name}.tar", members)
        index_paths([folder / name], processes=1, limits=Limits(maps=True))
    return folder


def options(folder: Path, run: Path, /, **sections) -> dict:
    """A configuration as YAML holds it; `sections` as {section: {key: value}}."""
    config = {
        "run_dir": str(run), "model": {"kind": "segmenter", **SIZES},
        "segmenter": {"channels": 24, "auxiliary_channels": 16, "scale": [1.0, 1.5], "most_of_one_class": 0.9},
        "data": {
            "train": str(folder / "train"), "validation": str(folder / "heldout"), "image_size": 32,
            "global_batch_size": 8, "micro_batch_size": 4, "threads": 1,
        },
        "optimizer": {"learning_rate": 4e-3, "beta2": 0.999, "schedule": "linear"}, "train": {"steps": 8},
        "checkpoint": {"every": 4}, "log": {"every": 2, "tensorboard": False},
    }  # fmt: skip
    for name, keys in sections.items():
        config[name] = {**config.get(name, {}), **keys}
    return config
