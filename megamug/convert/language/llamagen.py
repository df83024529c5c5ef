"""LlamaGen's class-conditional GPT (arXiv 2406.06525; `autoregressive/models/gpt.py` of the published code), and
DecoderLM with RMSNorm, SwiGLU and `rotary_grid` positions.

A row is a class, then the codes of an image, line by line. Classes have embeddings of their own, the last one for "no
class": here they are the ids behind the codes, whose rows of the output are zero, so logits of codes are what they were
and those of classes are 0.

Numbers 2i and 2i + 1 of a head turn together there, i and i + d/2 here: rows of queries and keys change places.
Axes: n heads, d head width, h width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megamug.configuration.sections import Config, TowerConfig
from megamug.convert import parts
from megamug.convert.formats import View
from megamug.data.padding import padded_vocabulary
from megamug.errors import UserError

NAME = "llamagen_gpt"
TABLES = 2  # of embeddings
CODES, CLASSES = "tok_embeddings.weight", "cls_embedding.embedding_table.weight"
QKV, GATE = "layers.{}.attention.wqkv.weight", "layers.{}.feed_forward.w1.weight"
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}  # of the published widths
NORM_EPS, ROTARY_BASE = 1e-5, 10000.0  # of all published models


def settings(view: View) -> dict[str, object]:
    """What the shapes tell. Raises UserError for a model that a caption conditions, and for what is no such GPT."""
    if any(name.startswith(("cls_embedding.cap_proj.", "cls_embedding.uncond_embedding")) for name in view.actual):
        raise UserError("a caption's features from a text encoder condition this GPT (t2i), and DecoderLM has no place"
                        " for them; class-conditional models (c2i) can be converted")  # fmt: skip
    for name in (CODES, CLASSES, QKV.format(0), GATE.format(0)):
        if name not in view or len(view.shape(name)) != 2:
            raise UserError(f"it holds no matrix {name}: no class-conditional GPT of LlamaGen; give another --from")
    layers = 0
    while QKV.format(layers) in view:
        layers += 1
    return {
        "model.kind": "decoder_lm", "lm.layers": layers, "lm.width": view.shape(CODES)[1],
        "lm.ffn_width": view.shape(GATE.format(0))[0], "lm.norm": "rmsnorm", "lm.norm_eps": NORM_EPS,
        "lm.activation": "swiglu", "lm.bias": False, "lm.positions": "rotary_grid", "lm.rotary_base": ROTARY_BASE,
        "lm.qk_norm": False, "lm.qk_norm_per_head": False, "lm.res_post_norm": False, "lm.tie_vocabulary": False,
        "lm.init_std": 0.02,
    }  # fmt: skip


def complete(config: Config, view: View) -> None:
    """Heads, query groups, and rows no longer than an image. Raises UserError for what shapes do not tell, the grid and
    heads of widths that were not published, and for heads that do not fit."""
    tower = config.lm
    if not tower.grid:
        raise UserError("a GPT of LlamaGen does not say how many codes its images have; give --config lm.grid=SIDE: 16"
                        " for 256 x 256 pixels, 24 for 384 x 384")  # fmt: skip
    if tower.heads is None and tower.width not in HEADS:
        raise UserError(f"shapes do not tell the number of attention heads, and {tower.width} is no published width;"
                        " give --config lm.heads=NUMBER")  # fmt: skip
    tower.heads = tower.heads or HEADS[tower.width]
    keys_and_values = view.shape(QKV.format(0))[0] - tower.width
    tower.query_groups = tower.query_groups or max(1, keys_and_values * tower.heads // (2 * tower.width))
    if tower.width % (4 * tower.heads) or tower.heads % tower.query_groups:
        raise UserError(f"its width {tower.width} does not make {tower.heads} heads with {tower.query_groups} of keys"
                        " and values; give --config lm.heads=NUMBER")  # fmt: skip
    config.data.context_length = min(config.data.context_length, tower.grid**2)  # a class, and all codes but the last


def pieces(tower: TowerConfig, codes: int, classes: int) -> list[parts.Piece]:
    """The table, which both directions follow from."""
    Piece, vocabulary = parts.Piece, codes + classes
    padding = padded_vocabulary(vocabulary) - vocabulary
    found = [
        Piece(
            "embedding.word_embeddings.weight", [CODES, CLASSES],
            lambda code, label: torch.cat([code, label, code.new_zeros(padding, code.shape[1])]),
            lambda table: [table[:codes], table[codes:vocabulary]],
        ),
        Piece("stack.final_layernorm.weight", ["norm.weight"]),
        Piece(
            "output_layer.weight", ["output.weight"],
            lambda output: torch.cat([output, output.new_zeros(classes + padding, output.shape[1])]),
            lambda table: [table[:codes]],
        ),
    ]  # fmt: skip
    for i in range(tower.layers):
        ours, theirs = f"stack.layers.{i}", f"layers.{i}"
        found += [
            Piece(f"{ours}.self_attention.linear_qkv.layer_norm_weight", [f"{theirs}.attention_norm.weight"]),
            _qkv(f"{ours}.self_attention.linear_qkv.weight", QKV.format(i), tower),
            Piece(f"{ours}.self_attention.linear_proj.weight", [f"{theirs}.attention.wo.weight"]),
            Piece(f"{ours}.mlp.linear_fc1.layer_norm_weight", [f"{theirs}.ffn_norm.weight"]),
            parts.stacked(f"{ours}.mlp.linear_fc1.weight", [f"{theirs}.feed_forward.{w}.weight" for w in ("w1", "w3")]),
            Piece(f"{ours}.mlp.linear_fc2.weight", [f"{theirs}.feed_forward.w2.weight"]),
        ]
    return found


def _qkv(name: str, other: str, tower: TowerConfig) -> parts.Piece:
    """Theirs: all queries, all keys, all values, one above the other."""
    head = tower.width // tower.heads
    keys = head * tower.query_groups
    turned, back = (partial(_reordered, shape=shape) for shape in ((-1, head // 2, 2), (-1, 2, head // 2)))
    apart = parts.fused_qkv(name, [other], tower)

    def join(whole: Tensor) -> Tensor:
        query, key, value = whole.split([tower.width, keys, keys])
        return apart.join(turned(query), turned(key), value)

    def split(own: Tensor) -> list[Tensor]:
        query, key, value = apart.split(own)
        return [torch.cat([back(query), back(key), value])]

    return parts.Piece(name, [other], join, split)


def _reordered(rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Rows [n d, h] with both parts of d, the last two of `shape`, in the other order."""
    return rows.view(*shape, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
