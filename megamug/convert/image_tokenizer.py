"""Image tokenizers of other projects: their parameter names, to and from ours.

| layout | whose | what differs from ours |
|---|---|---|
| taming | taming-transformers, latent diffusion (`first_stage_model.`), Meta's Chameleon `vqgan.ckpt` | nothing |
| chameleon | transformers' Chameleon (`model.vqmodel.`) | has no decoder: written, not read |
| janus | transformers' Janus (`model.vqmodel.`) | the decoder's levels run deepest first |
| llamagen | LlamaGen, DeepSeek's Janus | that, `conv_blocks.L.{res,attn}`, `mid.{0,1,2}` |
| diffusers | diffusers' `VQModel` | that, `down_blocks.L.{resnets,attentions}`, attention in linear layers |

LlamaGen and Janus normalise latents and codes. For a layout that does not, a normalised codebook is written with unit
vectors: its nearest code is then the same, because |z - e|^2 = |z|^2 + 1 - 2 z e falls as the cosine grows.
(transformers' Janus normalises when it decodes but not when it encodes; with unit vectors it makes no difference.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megamug.convert.described import Described, check
from megamug.convert.source import ForeignTensors
from megamug.errors import UserError
from megamug.models.image_tokenizer.model import ImageTokenizer, ImageTokenizerConfig

LAYOUTS = ("taming", "chameleon", "janus", "llamagen", "diffusers")
_NORMALISED = ("janus", "llamagen")
_DEEPEST_FIRST = ("janus", "llamagen", "diffusers")
_CODEBOOK = "quantize.embedding.weight"
_DROPPED = re.compile(r"loss\.|quantize\.codebook_used$|model_ema\.|discriminator\.")  # what only training needs

# What of their configurations our tokenizer computes; sizes follow from the tensors.
DIFFUSERS = Described(
    ("VQModel",), frozenset({"norm_num_groups"}),
    {"act_fn": ("silu",), "norm_type": ("group",), "in_channels": (3,), "out_channels": (3,)},
    frozenset("""
        _diffusers_version down_block_types up_block_types block_out_channels layers_per_block latent_channels
        sample_size num_vq_embeddings vq_embed_dim mid_block_add_attention scaling_factor force_upcast
        lookup_from_codebook
    """.split()), type_key="_class_name",
)  # fmt: skip
JANUS = Described(
    ("janus_vqgan",), frozenset({"num_patches", "channel_multiplier"}),
    {"double_latent": (False,), "in_channels": (3,), "out_channels": (3,)},
    frozenset("""
        embed_dim num_embeddings latent_channels base_channels num_res_blocks dropout projection_dim num_hidden_layers
        hidden_act image_token_embed_dim
    """.split()),  # the last four are of the layers between the codes and Janus' language model
)  # fmt: skip

# taming's name -> the layout's, piece by piece; the numbers of decoder levels are turned round elsewhere
_RULES = {
    "llamagen": (
        (r"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.", r"\1.conv_blocks.\2.res."),
        (r"(encoder|decoder)\.(?:down|up)\.", r"\1.conv_blocks."),
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
    ),
    "diffusers": (
        (r"\.attn(\.\d+|_1)\.norm\.", r".attn\1.group_norm."),
        (r"\.attn(\.\d+|_1)\.([qkv])\.", r".attn\1.to_\2."),
        (r"\.attn(\.\d+|_1)\.proj_out\.", r".attn\1.to_out.0."),
        (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
        (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
        (r"\.(down|up)\.(\d+)\.(down|up)sample\.conv\.", r".\1_blocks.\2.\3samplers.0.conv."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ),
}
# diffusers before 0.18 wrote attention so
_OLD_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def foreign_name(name: str, layout: str, levels: int) -> str:
    """Our name of a parameter -> that of `layout`, for a tokenizer of `levels` resolutions."""
    if layout in _DEEPEST_FIRST:
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
    for pattern, replacement in _RULES.get(layout, ()):
        name = re.sub(pattern, replacement, name)
    return name


def find_layout(names: Iterable[str]) -> tuple[str, str]:
    """(layout, prefix) of the tokenizer among the parameters `names`. Raises `UserError` where there is none."""
    names = list(names)
    codebooks = [name for name in names if name.endswith(_CODEBOOK)]
    if not codebooks:
        if any(name.endswith("quantize.embed.weight") for name in names):
            raise UserError("a Gumbel-softmax tokenizer (quantize.embed.weight): it has no nearest code; not supported")
        raise UserError(f"no image tokenizer in there: no parameter is called {_CODEBOOK}")
    if len(codebooks) > 1:
        raise UserError(f"several image tokenizers in there: {', '.join(sorted(codebooks))}; give a file of one")
    prefix = codebooks[0].removesuffix(_CODEBOOK)
    inner = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if any(name.startswith("encoder.conv_blocks.") for name in inner):
        return "llamagen", prefix
    if any(name.startswith("encoder.down_blocks.") for name in inner):
        return "diffusers", prefix
    if not any(name.startswith("decoder.") for name in inner):
        return "chameleon", prefix
    return ("janus" if "decoder.up.0.upsample.conv.weight" in inner else "taming"), prefix


def from_foreign(
    tensors: dict[str, Tensor], image_size: int, *, normalise_codes: bool | None = None, norm_groups: int = 32
) -> tuple[ImageTokenizerConfig, dict[str, Tensor]]:
    """Another project's parameters -> (sizes, our parameters), the tensors shared where they need no new shape.

    Parameters do not tell `image_size` (pixels a side), `normalise_codes` (None: True for LlamaGen and Janus) and
    `norm_groups`. Raises `UserError`: no tokenizer, no decoder, parameters missing, left over or of another shape.
    """
    layout, prefix = find_layout(tensors)
    if layout == "chameleon":
        raise UserError(
            "this image tokenizer has no decoder (transformers' Chameleon leaves it out), so it cannot make images; "
            "convert the vqgan.ckpt that Chameleon is published with"
        )
    inner = {
        _modern(name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not _DROPPED.match(name.removeprefix(prefix))
    }
    config = _sizes(inner, layout, image_size, normalise_codes, norm_groups)
    with torch.device("meta"):
        wanted = ImageTokenizer(config).state_dict()
    ours = {}
    for name, parameter in wanted.items():
        foreign = foreign_name(name, layout, len(config.channel_multipliers))
        if foreign not in inner:
            raise UserError(f"{prefix}{foreign} is missing; the file is cut short, or not of the {layout} layout")
        tensor = inner.pop(foreign)
        if tensor.dim() == 2 and parameter.dim() == 4:  # a linear layer is a 1x1 convolution
            tensor = tensor[:, :, None, None]
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{prefix}{foreign} is {list(tensor.shape)}, but {list(parameter.shape)} by the sizes of the others"
            )
        ours[name] = tensor
    if inner:
        raise UserError(f"{prefix}{min(inner)} and {len(inner) - 1} more have no place in a tokenizer of this family")
    return config, ours


def to_foreign(config: ImageTokenizerConfig, tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Our parameters -> those of `layout`. Raises `UserError` where it cannot hold a tokenizer of these sizes."""
    _check_representable(config, layout)
    levels = len(config.channel_multipliers)
    foreign = {}
    for name, tensor in tensors.items():
        if layout == "chameleon" and name.startswith("decoder."):
            continue
        if name == _CODEBOOK and config.normalise_codes:
            tensor = F.normalize(tensor.float(), dim=-1)
        if layout == "diffusers" and re.search(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$", name):
            tensor = tensor[:, :, 0, 0]
        foreign[foreign_name(name, layout, levels)] = tensor
    return foreign


def foreign_config(config: ImageTokenizerConfig, layout: str) -> dict:
    """What the library of `layout` calls these sizes: keyword arguments of its configuration, or of its class.

    `ChameleonVQVAEConfig`, `JanusVQVAEConfig` (transformers), `VQModel` (diffusers), `ModelArgs` (LlamaGen, which
    has no name for `channels` 128 and `residual_blocks` 2), `VQModel` (taming: `n_embed`, `embed_dim` and `ddconfig`).
    """
    _check_representable(config, layout)
    multipliers, attention = list(config.channel_multipliers), list(config.attention_resolutions)
    if layout in ("chameleon", "janus"):
        common = {
            "embed_dim": config.code_width, "num_embeddings": config.codes, "latent_channels": config.latent_channels,
            "base_channels": config.channels, "channel_multiplier": multipliers,
            "num_res_blocks": config.residual_blocks,
        }  # fmt: skip
        if layout == "janus":
            return common | {"num_patches": config.grid}
        kind = "vanilla" if config.middle_attention else "none"
        return common | {"resolution": config.image_size, "attn_resolutions": attention or None, "attn_type": kind}
    if layout == "llamagen":
        return {
            "codebook_size": config.codes, "codebook_embed_dim": config.code_width, "codebook_l2_norm": True,
            "encoder_ch_mult": multipliers, "decoder_ch_mult": multipliers, "z_channels": config.latent_channels,
        }  # fmt: skip
    if layout == "diffusers":
        has = [config.image_size >> level in attention for level in range(len(multipliers))]
        return {
            "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in has],
            "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(has)],
            "block_out_channels": [config.channels * m for m in multipliers],
            "layers_per_block": config.residual_blocks, "latent_channels": config.latent_channels,
            "sample_size": config.image_size, "num_vq_embeddings": config.codes, "vq_embed_dim": config.code_width,
            "norm_num_groups": config.norm_groups, "mid_block_add_attention": config.middle_attention,
        }  # fmt: skip
    ddconfig = {
        "double_z": False, "z_channels": config.latent_channels, "resolution": config.image_size, "in_channels": 3,
        "out_ch": 3, "ch": config.channels, "ch_mult": multipliers, "num_res_blocks": config.residual_blocks,
        "attn_resolutions": attention, "dropout": 0.0,
    }  # fmt: skip
    return {"n_embed": config.codes, "embed_dim": config.code_width, "ddconfig": ddconfig}


def import_image_tokenizer(
    path: str | Path, output: str | Path, image_size: int, *, normalise_codes: bool | None = None,
    norm_groups: int | None = None, allow: Iterable[str] = (),
) -> ImageTokenizer:  # fmt: skip
    """Convert the tokenizer in `path` (safetensors, a torch checkpoint, a folder of transformers) into folder `output`.

    Of a larger model only the tokenizer's parameters are read. `norm_groups`: None is what config.json says,
    else 32; `allow`: unknown keys of it to go on with. Raises `UserError` as `from_foreign` does, where a config.json
    of diffusers or of Janus tells of what our tokenizer does not compute, and where `path` is missing or damaged, or
    `output` holds a tokenizer of other sizes.
    """
    source = ForeignTensors(path)
    try:
        layout, prefix = find_layout(source.names)
        norm_groups = _described(source.config or {}, layout, image_size, norm_groups, allow)
        tensors = {name: source.read(name) for name in source.names if name.startswith(prefix)}
        config, ours = from_foreign(tensors, image_size, normalise_codes=normalise_codes, norm_groups=norm_groups)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with torch.device("meta"):
        tokenizer = ImageTokenizer(config)
    tokenizer.load_state_dict({name: tensor.float() for name, tensor in ours.items()}, assign=True)
    tokenizer.save(output)
    return ImageTokenizer.load(output)


def _described(
    config: dict, layout: str, image_size: int, norm_groups: int | None, allow: Iterable[str]
) -> int:  # fmt: skip
    """Groups of the norms, once what config.json tells beside the tensors was compared. Raises `UserError`.

    Files of taming, Chameleon and LlamaGen have none that tells of the tokenizer.
    """
    if layout == "diffusers" and config:
        check({DIFFUSERS.type_key: DIFFUSERS.model_types[0]} | config, DIFFUSERS, "vq_diffusers", allow)
        groups = config.get("norm_num_groups") or 32
        if norm_groups not in (None, groups):
            raise UserError(f"its config.json says norm_num_groups {groups}, and --config norm_groups={norm_groups}")
        return groups
    if layout == "janus" and config:
        own = config.get("vq_config", config)  # of the whole model, or of the tokenizer alone
        if not isinstance(own, dict) or config.get("model_type") not in (None, "janus", "janus_vqgan"):
            raise UserError(f"its config.json says model_type {config.get('model_type')!r}, and vq_janus computes janus"
                            " and janus_vqgan alone; it does not convert")  # fmt: skip
        check({"model_type": "janus_vqgan"} | own, JANUS, "vq_janus", allow)
        levels, patches = own.get("channel_multiplier"), own.get("num_patches")
        pixels = patches << (len(levels) - 1) if levels and patches else image_size
        if image_size != pixels:
            raise UserError(f"its config.json says {patches} codes a side at {len(levels)} resolutions, images of"
                            f" {pixels} pixels, and --config image_size={image_size}")  # fmt: skip
    return norm_groups or 32


def _modern(name: str) -> str:
    """A name of diffusers' old attention as it is today; other names as they are."""
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda m: _OLD_DIFFUSERS[m[1]], name)


def _sizes(
    inner: dict[str, Tensor], layout: str, image_size: int, normalise_codes: bool | None, norm_groups: int
) -> ImageTokenizerConfig:
    """The sizes that the parameters' names and shapes tell."""

    def shape(name: str) -> torch.Size:
        foreign = foreign_name(name, layout, 1)  # names of the encoder do not depend on the number of levels
        if foreign not in inner:
            raise UserError(f"{foreign} is missing; the file is cut short, or not of the {layout} layout")
        return inner[foreign].shape

    def count(pattern: str) -> int:
        """How many numbers, from 0 on, make `pattern` the name of a parameter."""
        number = 0
        while foreign_name(pattern.format(number), layout, 1) in inner:
            number += 1
        return number

    channels = shape("encoder.conv_in.weight")[0]
    levels = count("encoder.down.{}.block.0.conv1.weight")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if not widths or any(width % channels for width in widths):
        raise UserError(f"levels of {widths} channels are no multiples of the first convolution's {channels}")
    attention = [n for n in range(levels) if foreign_name(f"encoder.down.{n}.attn.0.q.weight", layout, 1) in inner]
    codes, code_width = shape(_CODEBOOK)
    return ImageTokenizerConfig(
        image_size=image_size, channels=channels, channel_multipliers=tuple(width // channels for width in widths),
        residual_blocks=count("encoder.down.0.block.{}.conv1.weight"),
        attention_resolutions=tuple(image_size >> level for level in attention),
        middle_attention=foreign_name("encoder.mid.attn_1.q.weight", layout, 1) in inner,
        latent_channels=shape("encoder.conv_out.weight")[0], code_width=code_width, codes=codes,
        normalise_codes=layout in _NORMALISED if normalise_codes is None else normalise_codes, norm_groups=norm_groups,
    )  # fmt: skip


def _check_representable(config: ImageTokenizerConfig, layout: str) -> None:
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r} of image tokenizers; the layouts are {', '.join(LAYOUTS)}")
    reason = None
    if layout in _NORMALISED and not config.normalise_codes:
        reason = "its codes are not normalised"
    elif layout in _NORMALISED and (config.attention_resolutions != (config.grid,) or not config.middle_attention):
        reason = "its attention is not at the lowest resolution and in the middle"
    elif layout == "taming" and not config.middle_attention:
        reason = "it has no attention in the middle"
    elif layout == "chameleon" and config.attention_resolutions and not config.middle_attention:
        reason = "it has attention, but not in the middle"
    elif layout != "diffusers" and config.norm_groups != 32:
        reason = f"its norms have {config.norm_groups} groups, not 32"
    if reason:
        raise UserError(f"this image tokenizer cannot be written in the {layout} layout: {reason}")
