"""An image as a grid of codes, and back: the VQ autoencoder of the taming family.

Esser, Rombach and Ommer 2021, "Taming transformers for high-resolution image synthesis" (VQGAN); the same network, with
other sizes, in latent diffusion's VQ models, LlamaGen, Janus and Chameleon. A convolutional encoder halves the side of
the image at every level but the last, each latent is replaced by the nearest of `codes` vectors, a mirrored decoder
makes the image again. Parameter names are taming's (`megamug.convert.image_tokenizer` knows the others).

Axes: b images, S their side in pixels, h = w = S / factor the side of the grid, c channels.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamug.data.dali import WHITE
from megamug.durable import as_record, fsync_folder, replace_text
from megamug.errors import UserError
from megamug.models.image_tokenizer.vq import Codebook
from megamug.models.image_tokenizer.weights import WEIGHTS_FILE, packed, read_weights

CONFIG_FILE = "config.json"
_FORMAT = "megamug-image-tokenizer-1"


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Sizes. The defaults are taming's f16 with 16,384 codes. Raises `UserError` where they do not fit each other."""

    image_size: int = 256  # pixels a side
    channels: int = 128  # at full resolution, before the multipliers
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of each level; n levels make f = 2^(n-1)
    residual_blocks: int = 2  # of a level of the encoder; the decoder has one more
    attention_resolutions: tuple[int, ...] = (16,)  # sides in pixels at which attention follows every residual block
    middle_attention: bool = True  # attention between the two residual blocks of the lowest resolution
    latent_channels: int = 256  # that the encoder ends with and the decoder begins with
    code_width: int = 256  # of a code: the 1x1 convolutions around the codebook lead there and back
    codes: int = 16384  # vectors in the codebook
    normalise_codes: bool = False  # codes and latents on the unit sphere (LlamaGen)
    norm_groups: int = 32  # of every GroupNorm
    background: tuple[int, ...] = WHITE  # red, green, blue (0..255) behind what is transparent in an image

    def __post_init__(self) -> None:
        for name in ("channel_multipliers", "attention_resolutions", "background"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        for name, value in [*sizes.items(), *(("channel_multipliers", m) for m in self.channel_multipliers)]:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"image tokenizer: {name} is {value!r}; give a whole number above 0")
        if len(self.background) != 3 or any(type(part) is not int or not 0 <= part < 256 for part in self.background):
            raise UserError(
                f"image tokenizer: background is {list(self.background)}; give red, green and blue, each from 0 to 255"
            )
        if not self.channel_multipliers:
            raise UserError("image tokenizer: channel_multipliers is empty; give one for each level, as 1 2 2 4 for f8")
        if self.image_size % self.factor:
            raise UserError(
                f"image tokenizer: image_size {self.image_size} is not a multiple of {self.factor}, which "
                f"{len(self.channel_multipliers)} channel_multipliers divide it by; change either"
            )
        for multiplier in self.channel_multipliers:
            if self.channels * multiplier % self.norm_groups:
                raise UserError(
                    f"image tokenizer: {self.channels} channels x {multiplier} is not a multiple of norm_groups "
                    f"{self.norm_groups}; set norm_groups to a divisor"
                )
        sides = [self.image_size >> level for level in range(len(self.channel_multipliers))]
        for side in self.attention_resolutions:
            if side not in sides:
                raise UserError(
                    f"image tokenizer: attention_resolutions holds {side}, but the levels have {sides} pixels a side"
                )

    @property
    def factor(self) -> int:
        """Pixels of the image per code, along a side."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.image_size // self.factor

    @property
    def tokens(self) -> int:
        """Codes of an image."""
        return self.grid * self.grid

    @staticmethod
    def from_dict(values: dict, where: str = "image tokenizer") -> ImageTokenizerConfig:
        """The configuration that `values` (as in config.json) hold. Raises `UserError`: unknown or missing key, a value
        of another type."""
        names = [f.name for f in fields(ImageTokenizerConfig)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, 1) or names[:1]
            raise UserError(f"{where}: unknown key {unknown[0]!r}; the nearest is {near[0]!r}")
        values = {"background": WHITE, **values}  # not in those that were written before there was a choice
        missing = [name for name in names if name not in values]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing; all of {', '.join(names)} must be there")
        try:
            return as_record(values, ImageTokenizerConfig)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None


class ResidualBlock(nn.Module):
    def __init__(self, inward: int, outward: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(inward, groups)
        self.conv1 = nn.Conv2d(inward, outward, 3, padding=1)
        self.norm2 = _norm(outward, groups)
        self.conv2 = nn.Conv2d(outward, outward, 3, padding=1)
        if inward != outward:
            self.nin_shortcut = nn.Conv2d(inward, outward, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttentionBlock(nn.Module):
    """Every place of the grid attends to every other, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))  # [b, hw, c]
        mixed = F.scaled_dot_product_attention(q, k, v)  # scale 1 / sqrt(c)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom alone, as all checkpoints of the family want it


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where configured."""

    def __init__(self, inward: int, outward: int, blocks: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(outward if i else inward, outward, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outward, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[b, 3, S, S] -> [b, latent_channels, h, w]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        groups, x = config.norm_groups, config.channels
        self.conv_in = nn.Conv2d(3, x, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            attention = config.image_size >> level in config.attention_resolutions
            self.down.append(Level(x, width, config.residual_blocks, attention, groups))
            if level < len(widths) - 1:
                self.down[level].downsample = Downsample(width)
            x = width
        self.mid = Middle(x, config.middle_attention, groups)
        self.norm_out = _norm(x, groups)
        self.conv_out = nn.Conv2d(x, config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[b, latent_channels, h, w] -> [b, 3, S, S]. `up.0` is the level of full resolution."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        groups, x = config.norm_groups, widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, x, 3, padding=1)
        self.mid = Middle(x, config.middle_attention, groups)
        levels = []
        for level in reversed(range(len(widths))):
            attention = config.image_size >> level in config.attention_resolutions
            levels.append(Level(x, widths[level], config.residual_blocks + 1, attention, groups))
            if level > 0:
                levels[-1].upsample = Upsample(widths[level])
            x = widths[level]
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(x, groups)
        self.conv_out = nn.Conv2d(x, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ImageTokenizer(nn.Module):
    """Encoder, codebook, decoder."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.quantize = Codebook(config.codes, config.code_width, config.normalise_codes)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float [b, 3, S, S] in [-1, 1] -> codes int64 [b, h, w]. Raises `UserError`: another size or type."""
        side = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, side, side):
            raise UserError(
                f"image tokenizer: images of shape {list(images.shape)}, but it was made for [b, 3, {side}, {side}]; "
                "resize and crop them first"
            )
        if not images.is_floating_point():
            raise UserError(f"image tokenizer: images are {images.dtype}; scale them to [-1, 1] with `from_bytes`")
        latents = self.latents(images)  # [b, h, w, code_width]
        return self.quantize.nearest(latents.flatten(0, 2)).view(latents.shape[:3])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [b, h, w] -> images fp32 [b, 3, S, S] in [-1, 1]. Raises `UserError`: another grid or code."""
        side = self.config.grid
        if codes.dim() != 3 or codes.shape[1:] != (side, side):
            raise UserError(f"image tokenizer: codes of shape {list(codes.shape)}; its images are [b, {side}, {side}]")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codes:
            wrong = codes[(codes < 0) | (codes >= self.config.codes)][0]
            raise UserError(
                f"image tokenizer: code {int(wrong)} is outside its codebook of {self.config.codes}; "
                "was the document made with another image tokenizer?"
            )
        return self.images(self.quantize.lookup(codes)).float().clamp(-1, 1)

    def latents(self, images: Tensor) -> Tensor:
        """Images [b, 3, S, S] -> latents fp32 [b, h, w, code_width], ready to be compared with codes."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.quantize.prepare(self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1))

    def images(self, vectors: Tensor) -> Tensor:
        """Vectors of codes [b, h, w, code_width] -> images [b, 3, S, S], not clamped."""
        vectors = vectors.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))

    def fingerprint(self) -> str:
        """SHA-256 over sizes and weights: the same codes mean the same image."""
        sizes = asdict(self.config)
        if sizes["background"] == WHITE:  # fingerprints of before there was a choice stay what they are
            del sizes["background"]
        digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (fp32). A crash leaves the weights of before or those of now.

        Raises `UserError` where `folder` holds a tokenizer of other sizes.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONFIG_FILE).exists() and read_config(folder) != self.config:
            raise UserError(f"{folder} holds an image tokenizer of other sizes; give another folder, or remove it")
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in self.state_dict().items()}
        aside = folder / f".{WEIGHTS_FILE}.partial"
        with open(aside, "wb") as file:
            file.write(packed(tensors))
            file.flush()
            os.fsync(file.fileno())
        replace_text(folder / CONFIG_FILE, json.dumps({"format": _FORMAT, **asdict(self.config)}, indent=1) + "\n")
        os.replace(aside, folder / WEIGHTS_FILE)
        fsync_folder(folder)

    @staticmethod
    def load(folder: str | Path, device: torch.device | str = "cpu") -> ImageTokenizer:
        """The tokenizer in `folder`, for evaluation. Raises `UserError`: a file missing, damaged, or of other sizes."""
        folder = Path(folder)
        config = read_config(folder)
        with torch.device("meta"):
            tokenizer = ImageTokenizer(config)
        tensors = read_weights(folder / WEIGHTS_FILE)
        wanted = tokenizer.state_dict()
        for name in sorted(set(wanted) | set(tensors)):
            if name not in tensors or name not in wanted or tensors[name].shape != wanted[name].shape:
                found, asked = (list(t[name].shape) if name in t else "nothing" for t in (tensors, wanted))
                raise UserError(
                    f"{folder / WEIGHTS_FILE}: {name} is {found} in there, {asked} in {CONFIG_FILE}'s sizes; "
                    "the two files do not belong together"
                )
        tokenizer.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        return tokenizer.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


def read_config(folder: str | Path) -> ImageTokenizerConfig:
    """The sizes in FOLDER/config.json. Raises `UserError` where there is none, or none of an image tokenizer."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; megamug data image-tokenizer makes an image tokenizer") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise UserError(f"{path}: not the configuration of an image tokenizer of this project ({_FORMAT})")
    return ImageTokenizerConfig.from_dict(values, str(path))


def from_bytes(images: Tensor) -> Tensor:
    """Pixels uint8 -> fp32 in [-1, 1], the scale that the tokenizer works in."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> the nearest pixels, uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class GroupNorm(nn.GroupNorm):
    """On a CPU computed channel by channel. Of pixels in a row (channels_last, which convolutions are fastest with)
    torch's forward and backward take 5.7 ms in bf16, channel by channel 1.7 ms with the copies ([16, 16, 64, 64]).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def _norm(channels: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, channels, eps=1e-6)
