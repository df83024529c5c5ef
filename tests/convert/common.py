"""Vision transformers of other libraries with random weights, and what megamug makes of the same pixels."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

SIZE, PATCH, BATCH = 32, 8, 3
PATCHES = (SIZE // PATCH) ** 2
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Random numbers everywhere, biases and norms included, so that each has to reach its place; positions stay."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "pos" in name:
                continue
            if name.endswith("norm.weight") or "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_((0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5) * noise)
    return model.eval()


def images() -> Tensor:
    """[b, 3, H, W] uint8."""
    return torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (pixels / 255 - mean) / std


def batch(visible: int = PATCHES):
    """Megamug's batch of `images()`, and noise by which MAE chooses the same patches."""
    from megamug.models.mug.model import MugBatch

    order = torch.stack([torch.randperm(PATCHES, generator=torch.Generator().manual_seed(i)) for i in range(BATCH)])
    seen, hidden = (ids.sort(dim=1)[0] for ids in (order[:, :visible], order[:, visible:]))
    noise = torch.ones(BATCH, PATCHES).scatter_(1, seen, 0.0) + torch.linspace(0, 0.5, PATCHES)
    return MugBatch(seen, hidden, images()), noise


@contextmanager
def loaded(run_dir: Path):
    """The model of a run folder, read by the loader that everything uses."""
    from megamug.generation.loading import load_run

    with load_run(run_dir) as run, torch.no_grad():
        yield run.model


def features(run_dir: Path) -> Tensor:
    """The encoder's output for all patches, [b, tokens, h]."""
    with loaded(run_dir) as model:
        return model.encoder(batch()[0], None).transpose(0, 1)


def image_loss(run_dir: Path, visible: int = PATCHES // 4) -> float:
    with loaded(run_dir) as model:
        total, count = model(batch(visible)[0])[1]["image"]
        return float(total / count)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of safetensors files, by safetensors' own reader."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in found if found[name].dtype != expected[name].dtype
                 or not torch.equal(found[name], expected[name])]  # fmt: skip
    assert not different, different
