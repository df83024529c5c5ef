"""An image tokenizer in the place of the trained one: a code says how bright a cell of the picture is."""

import hashlib
import json
import types
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass
class StandInConfig:
    image_size: int = 32
    codes: int = 16
    cell: int = 8  # pixels a side


class StandInTokenizer:
    """`megamug.models.image_tokenizer.ImageTokenizer`'s interface."""

    def __init__(self, config=None):
        self.config = config or StandInConfig()

    def encode(self, images):  # [b, 3, H, W] in [-1, 1] -> int64 [b, H / cell, W / cell]
        size = self.config.image_size
        assert images.shape[1:] == (3, size, size) and images.min() >= -1 and images.max() <= 1
        cells = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), self.config.cell)[:, 0]
        return ((cells + 1) / 2 * self.config.codes).long().clamp(0, self.config.codes - 1)

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(asdict(self.config)))

    @staticmethod
    def load(folder, device="cpu"):
        return StandInTokenizer(StandInConfig(**json.loads((Path(folder) / "config.json").read_text())))

    def fingerprint(self):
        return hashlib.sha256(json.dumps(asdict(self.config)).encode()).hexdigest()


def module():
    """What stands in for the package's module; tests put it into `sys.modules`."""
    made = types.ModuleType("megamug.models.image_tokenizer")
    made.ImageTokenizer = StandInTokenizer
    return made
