"""A trained image encoder in plain torch: no process group, no Megatron-core, any device and dtype.

    encoder = megamug.load_encoder("runs/mug")
    images = encoder.preprocess([Image.open("cat.jpg"), Image.open("dog.jpg")])
    features = encoder(images)

Axes: b images, c channels, N patches, h width, p patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamug.configuration.sections import Config
from megamug.errors import UserError
from megamug.models.blocks.positions import resampled_positions
from megamug.transfer.preprocessing import Preprocessor


@dataclass
class Features:
    """What an encoder says of b images. All but `layers` are behind the final norm. (Of a classifier that learned by
    the mean of the patches, `mean` alone is normalised, as its linear reads it.)"""

    class_token: Tensor  # [b, h]
    mean: Tensor  # [b, h]: mean of the patches, without class and register tokens
    patches: Tensor  # [b, rows, columns, h]
    registers: Tensor  # [b, registers, h]
    layers: tuple[Tensor, ...] = ()  # of the blocks that were asked for, [b, rows, columns, h] each, before any norm


class Block(nn.Module):
    """A pre-norm transformer layer (ViT, Dosovitskiy et al. 2021); qkv rows lie as (head, query | key | value, d)."""

    def __init__(self, width: int, heads: int, ffn_width: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, ffn_width), nn.Linear(ffn_width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, self.heads, 3, h // self.heads).permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, h)
        x = x + self.projection(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionEncoder(nn.Module):
    """The encoder of a MUG (or of any MAE that converts) on whole images.

    `preprocess` makes images into what it takes; `forward` gives `Features`. In evaluation mode and without gradients
    of its parameters; `requires_grad_()` and `train()` change that as in any module (there is nothing random in it).
    """

    def __init__(self, config: Config, image_size: int | None = None):
        super().__init__()
        model, data = config.model, config.data
        self.image_size = image_size or data.image_size
        if self.image_size < 1 or self.image_size % model.patch_size:
            raise UserError(
                f"image_size: {self.image_size} is no multiple of the patch size {model.patch_size}; the nearest below"
                f" is {max(self.image_size // model.patch_size, 1) * model.patch_size}"
            )
        self.width, self.patch_size, self.depth, self.heads = model.width, model.patch_size, model.layers, model.heads
        self.remarks: list[str] = []  # what was taken for granted where it was read, a sentence each
        self.mean, self.std = tuple(data.mean), tuple(data.std)
        self.preprocess = Preprocessor(self.image_size, self.mean, self.std, background=tuple(data.background))
        self.patch_embedding = nn.Linear(3 * model.patch_size**2, model.width)
        self.class_token = nn.Parameter(torch.zeros(1, model.width))
        self.register_tokens = nn.Parameter(torch.zeros(model.register_tokens, model.width))
        self.blocks = nn.ModuleList(
            Block(model.width, model.heads, model.ffn_width, model.layer_norm_eps) for _ in range(model.layers)
        )
        self.eps, final, pooled = model.layer_norm_eps, nn.LayerNorm(model.width, model.layer_norm_eps), nn.Identity()
        self.norm, self.pooled_norm = (pooled, final) if norm_of_the_mean(config) else (final, pooled)
        trained, here = (side // model.patch_size for side in (data.image_size, self.image_size))
        self.register_buffer("positions", resampled_positions(model.width, trained, here), persistent=False)
        self.grid = (here, here)

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """The features of images [b, 3, S, S].

        Floating-point images are taken as `preprocess` leaves them, normalised; bytes (0..255) are normalised here.
        `layers`: numbers of the blocks whose outputs are wanted as well, from 0; negative ones count from the last.
        Raises UserError: images of another size or type, a block that is not there.
        """
        wanted = self.wanted(layers)
        x, found = self._embed(images), {}
        prefix = 1 + len(self.register_tokens)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in wanted:
                found[number] = x[:, prefix:].unflatten(1, self.grid)
        x = self.norm(x)
        patches = x[:, prefix:]
        return Features(
            x[:, 0], self.pooled_norm(patches.mean(1)), patches.unflatten(1, self.grid), x[:, 1:prefix],
            tuple(found[number] for number in wanted),
        )  # fmt: skip

    def _embed(self, images: Tensor) -> Tensor:
        """-> [b, 1 + registers + N, h]"""
        size, dtype = self.image_size, self.class_token.dtype
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1:] != (3, size, size):
            shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f"images: [b, 3, {size}, {size}] wanted, not {shape}; encoder.preprocess makes them, and"
                            " load_encoder takes another image_size")  # fmt: skip
        if images.dtype == torch.uint8:
            images = self.preprocess.normalised(images)
        elif not images.dtype.is_floating_point:
            raise UserError(f"images: bytes or normalised floating-point numbers wanted, not {images.dtype}")
        b, p = len(images), self.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 3 * p * p)
        patches = self.patch_embedding(patches.to(dtype)) + self.positions
        return torch.cat([self.class_token.expand(b, -1, -1), self.register_tokens.expand(b, -1, -1), patches], dim=1)

    def wanted(self, layers: Sequence[int]) -> list[int]:
        for layer in layers:
            if not -self.depth <= layer < self.depth:
                raise UserError(f"layers: there is no block {layer}; there are 0 to {self.depth - 1}")
        return [layer % self.depth for layer in layers]


# Names of this module's parameters by megamug's global names, without "encoder." and "stack.layers.I.".
_OUTSIDE = {
    "cls_token": "class_token", "register_tokens": "register_tokens",
    "patch_embedding.weight": "patch_embedding.weight", "patch_embedding.bias": "patch_embedding.bias",
    "stack.final_layernorm.weight": "norm.weight", "stack.final_layernorm.bias": "norm.bias",
}  # fmt: skip
_IN_BLOCKS = {
    "self_attention.linear_qkv.layer_norm_": "norm1.", "self_attention.linear_qkv.": "qkv.",
    "self_attention.linear_proj.": "projection.", "mlp.linear_fc1.layer_norm_": "norm2.", "mlp.linear_fc1.": "fc1.",
    "mlp.linear_fc2.": "fc2.",
}  # fmt: skip


def norm_of_the_mean(config: Config) -> bool:
    """Whether the one norm behind the blocks is that of the mean of the patches, in the head (`pool: mean` of a
    classifier whose encoder learned, MAE's fc_norm)."""
    return config.model.kind == "classifier" and config.classifier.pool == "mean" and not config.classifier.frozen


def global_names(model, norm_of_the_mean: bool = False) -> dict[str, str]:
    """{name in a `VisionEncoder`: global name in megamug's checkpoints}; `model`: that section of the configuration."""
    names = {mine: f"encoder.{theirs}" for theirs, mine in _OUTSIDE.items()}
    if not model.register_tokens:
        del names["register_tokens"]
    if norm_of_the_mean:
        for kind in ("weight", "bias"):
            del names[f"norm.{kind}"]
            names[f"pooled_norm.{kind}"] = f"head.norm.{kind}"
    for i in range(model.layers):
        for theirs, mine in _IN_BLOCKS.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{i}.{mine}{kind}"] = f"encoder.stack.layers.{i}.{theirs}{kind}"
    return names


def load_encoder(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    step: int | None = None,
    untrained: bool = False,
) -> VisionEncoder:
    """The encoder of a run, a checkpoint, or an exported folder or file, in evaluation mode.

    Args:
        path: a run folder of a MUG or a classifier (its newest complete checkpoint, or that of `step`), a checkpoint
            `step-XXXXXXXX`, or what `megamug convert` writes and reads: a folder of timm or transformers, a file of
            MAE.
        untrained: instead of the trained numbers those that the run began with, by its seed: what training is held
            against.
        image_size: side of the images in pixels; default: what it was trained with. Positions are resampled for others.

    Every byte of a checkpoint is checked first. Raises UserError: nothing there, a damaged file, a model that is no
    image encoder, positions that were learned (a foreign model's: megamug's are fixed), a size that patches do not
    divide.
    """
    path = Path(path)
    if path.is_dir() and ((path / "checkpoints").is_dir() or path.name.startswith("step-")):
        config, read, remarks = _of_a_run(path, step, untrained)
    else:
        if step is not None:
            raise UserError(f"step: {path} is no run folder, and holds one set of weights; leave step out")
        from megamug.convert.encoder import foreign_encoder

        if untrained:
            raise UserError(f"untrained: {path} does not tell what it began with; name a run that was trained here")
        config, read, remarks = foreign_encoder(path)
    encoder, names = VisionEncoder(config, image_size), global_names(config.model, norm_of_the_mean(config))
    encoder.remarks = remarks
    if untrained:
        from megamug.models.init import draw

        if config.model.initial is not None:
            raise UserError(f"{path} began with the weights of {config.model.initial} (model.initial); name that")
        shapes = {theirs: encoder.get_parameter(name).shape for name, theirs in names.items()}

        def read(name: str) -> Tensor:
            return draw(name, shapes[name], config.seed)

    with torch.no_grad():
        for name, theirs in names.items():
            mine, stored = encoder.get_parameter(name), read(theirs)
            if mine.shape != stored.shape:
                raise UserError(f"{path}: {theirs} is {list(stored.shape)}, and {list(mine.shape)} by its"
                                " configuration; put back the config.yaml that it was trained with")  # fmt: skip
            mine.copy_(stored)
    return encoder.to(device=device, dtype=dtype).requires_grad_(False).eval()


def _of_a_run(path: Path, step: int | None, untrained: bool):
    """(configuration, what reads a tensor by its global name, remarks)"""
    from megamug.checkpoint import configured
    from megamug.checkpoint.tensors import TensorReader

    if step is not None:
        if not (path / "checkpoints").is_dir():
            raise UserError(f"step: {path} is a checkpoint already; name the run folder, or leave step out")
        from megamug.checkpoint.store import CheckpointStore

        folder = CheckpointStore(path, keep=0).path(step)
        if not folder.is_dir():
            raise UserError(f"{path} has no checkpoint of step {step}: there is no {folder}; name another, or none")
        path = folder
    reader = TensorReader(path)
    state = reader.state()
    config, _ = configured.read(reader.folder.parent.parent, reader.folder, state)
    if untrained and state.get("origin"):
        raise UserError(f"untrained: {path} began with weights of another library; name a run that was trained here")
    if config.model.kind not in ("mug", "classifier"):
        raise UserError(f"{path} is a run of {config.model.kind}, which has no image encoder; name a run of a MUG or of"
                        " a classifier")  # fmt: skip
    averages = reader.take_averages()
    return config, reader.read, [] if averages is None else [averages]
