"""Labelled shards and configurations of classifiers for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megamug.data.shards.indexing import index_paths

NAMES = ("red", "green", "blue")
SIZES = {"patch_size": 8, "layers": 2, "width": 32, "heads": 4, "ffn_width": 64}


def make_shards(folder: Path, counts: dict[str, int], names: tuple[str, ...] | None = NAMES) -> Path:
    """`folder/SET` for each set, of so many pictures without captions; the class is the colour that is strongest."""
    from tests.data.conftest import encoded, write_tar

    for seed, (name, count) in enumerate(counts.items()):
        members = []
        for n in range(count):
            label = n % len(NAMES)
            members += [(f"{n:03d}.png", encoded(coloured(label, 100 * seed + n), "PNG")),
                        (f"{n:03d}.cls", b"%d" % label)]  # fmt: skip
        (folder / name).mkdir(parents=True)
        if names is not None:
            (folder / name / "classes.txt").write_text("".join(f"{one}\n" for one in names))
        write_tar(folder / name / "0.tar", members)
        index_paths([folder / name], processes=1)
    return folder


def coloured(label: int, seed: int):
    from PIL import Image

    pixels = np.random.RandomState(seed).randint(0, 150, (40, 40, 3), dtype=np.uint8)
    pixels[..., label] += 100
    return Image.fromarray(pixels)


def options(folder: Path, run: Path, /, **sections) -> dict:
    """A configuration as YAML holds it; `sections` as {section: {key: value}}."""
    config = {
        "run_dir": str(run), "model": {"kind": "classifier", **SIZES},
        "data": {
            "train": str(folder / "train"), "validation": str(folder / "heldout"), "image_size": 32,
            "global_batch_size": 8, "micro_batch_size": 4, "threads": 1,
        },
        "optimizer": {"learning_rate": 3e-3, "beta2": 0.999}, "train": {"steps": 8}, "checkpoint": {"every": 4},
        "log": {"every": 2, "tensorboard": False},
    }  # fmt: skip
    for name, keys in sections.items():
        config[name] = {**config.get(name, {}), **keys}
    return config
