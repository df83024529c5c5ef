"""LlamaGen's GPT: its published forward, written down here in float64, and DecoderLM give the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megamug.checkpoint.tensors import TensorReader
from megamug.convert.conversion import config_of, from_megamug, to_megamug
from megamug.convert.registry import FORMATS
from megamug.errors import UserError
from tests.convert.common import assert_same_bits, tensors_in

FORM = FORMATS["llamagen_gpt"]
CODES, CLASSES, WIDTH, HEADS, FFN, LAYERS, SIDE = 90, 11, 64, 4, 160, 3, 5
TOLD = [f"lm.grid={SIDE}", f"lm.heads={HEADS}"]


def weights(groups: int = HEADS) -> dict[str, Tensor]:
    """Random; `groups` key-value heads."""
    generator, head = torch.Generator().manual_seed(7), WIDTH // HEADS
    shapes = {
        "tok_embeddings.weight": (CODES, WIDTH), "cls_embedding.embedding_table.weight": (CLASSES, WIDTH),
        "norm.weight": (WIDTH,), "output.weight": (CODES, WIDTH),
    }  # fmt: skip
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in {
            "attention.wqkv": (WIDTH + 2 * groups * head, WIDTH), "attention.wo": (WIDTH, WIDTH),
            "feed_forward.w1": (FFN, WIDTH), "feed_forward.w3": (FFN, WIDTH), "feed_forward.w2": (WIDTH, FFN),
            "attention_norm": (WIDTH,), "ffn_norm": (WIDTH,),
        }.items()}  # fmt: skip
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * x if x.dim() == 1 else 0.2 * x for name, x in noise.items()}


def published_forward(w: dict[str, Tensor], labels: Tensor, codes: Tensor) -> Tensor:
    """Logits [b, 1 + s, codes] for labels [b] and codes [b, s], in float64: position 0 is the class, whose query and
    key the published table of zeros turns into zeros; cell p of the grid turns the complex numbers (x[2i], x[2i + 1])
    of a head, the first half of them by its row, the others by its column."""
    w = {name: x.double() for name, x in w.items()}
    condition = w["cls_embedding.embedding_table.weight"][labels].unsqueeze(1)
    x = torch.cat([condition, w["tok_embeddings.weight"][codes]], dim=1)
    rows, length, head = len(x), x.shape[1], WIDTH // HEADS
    groups = (len(w["layers.0.attention.wqkv.weight"]) - WIDTH) // (2 * head)
    factors = torch.zeros(length, head // 2, dtype=torch.complex128)
    for cell in range(length - 1):
        for plane in range(head // 2):
            place, index = (cell // SIDE, plane) if plane < head // 4 else (cell % SIDE, plane - head // 4)
            angle = torch.tensor(place / 10000 ** (2 * index / (head // 2)), dtype=torch.float64)
            factors[cell + 1, plane] = torch.complex(angle.cos(), angle.sin())

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    def turned(x: Tensor) -> Tensor:  # [b, s, n, d]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * factors[:, None]).flatten(-2)

    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(LAYERS):
        own = {name.removeprefix(f"layers.{i}."): x for name, x in w.items() if name.startswith(f"layers.{i}.")}
        qkv = norm(x, own["attention_norm.weight"]) @ own["attention.wqkv.weight"].T
        query, key, value = qkv.split([WIDTH, groups * head, groups * head], dim=-1)
        query = turned(query.reshape(rows, length, HEADS, head))
        key, value = turned(key.reshape(rows, length, groups, head)), value.reshape(rows, length, groups, head)
        key, value = (y.repeat_interleave(HEADS // groups, dim=2) for y in (key, value))
        scores = torch.einsum("bsnd,btnd->bnst", query, key) / head**0.5
        shares = scores.masked_fill(ahead, -torch.inf).softmax(dim=-1)
        x = x + torch.einsum("bnst,btnd->bsnd", shares, value).flatten(2) @ own["attention.wo.weight"].T
        y = norm(x, own["ffn_norm.weight"])
        gate = y @ own["feed_forward.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ own["feed_forward.w3.weight"].T)) @ own["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def batch(length: int = SIDE**2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.tensor([4, CLASSES - 1]), torch.randint(0, CODES, (2, length), generator=generator)


def our_logits(run_dir: Path, tokens: Tensor, steps: list[int] | None = None) -> Tensor:
    """[b, s, padded vocabulary] of DecoderLM, read by the trainer's loader; `steps`: through a cache, so many tokens at
    a time."""
    from megamug.checkpoint import state
    from megamug.distributed import cpu_backend, setup

    cpu_backend.apply()
    from megamug.models.blocks.layers import key_value_cache
    from megamug.models.language.decoder_lm import DecoderLM
    from megamug.models.language.plan import LmPlan

    reader = TensorReader(run_dir)
    config = config_of(reader)
    world = setup.start(config.parallel, seed=0)
    try:
        model = DecoderLM(LmPlan(config, CODES + CLASSES)).eval()
        state.load_tensors([model], None, world, reader.folder / "model", step=0)
        with torch.no_grad():
            if steps is None:
                return model.logits(model.run(model.embed(tokens), tokens)).transpose(0, 1)
            found, first = [], 0
            with key_value_cache(model, tokens.shape[1]):
                for count in steps:
                    part = tokens[:, first : first + count]
                    found.append(model.logits(model.run(model.embed(part, first=first), part, first=first)))
                    first += count
            return torch.cat(found).transpose(0, 1)
    finally:
        setup.stop()


@pytest.mark.parametrize("groups", [HEADS, 2])
def test_logits_are_those_of_the_published_forward_and_back_is_bitwise(tmp_path, groups):
    theirs = weights(groups)
    torch.save({"model": theirs, "steps": 7}, tmp_path / "c2i.pt")
    to_megamug(FORM, tmp_path / "c2i.pt", tmp_path / "run", TOLD)
    config = config_of(TensorReader(tmp_path / "run"))
    assert (config.lm.heads, config.lm.query_groups, config.lm.grid) == (HEADS, groups, SIDE)
    assert config.data.context_length == SIDE**2
    labels, codes = batch()
    tokens = torch.cat([labels[:, None] + CODES, codes], dim=1)  # classes are the ids behind the codes
    expected = published_forward(theirs, labels, codes)
    found = our_logits(tmp_path / "run", tokens)
    assert expected.std() > 0.1
    assert float((found[..., :CODES] - expected).abs().max()) < 1e-4
    assert not found[..., CODES:].any()  # rows of classes and of the padding
    written = our_logits(tmp_path / "run", tokens, steps=[2, *[1] * (SIDE**2 - 1)])
    assert float((written[..., :CODES] - expected).abs().max()) < 1e-4

    from_megamug(FORM, tmp_path / "run", tmp_path / "out", max_shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_same_bits(tensors_in(tmp_path / "out"), theirs)
    to_megamug(FORM, tmp_path / "out", tmp_path / "again", TOLD)  # shards of safetensors
    one, two = TensorReader(tmp_path / "run"), TensorReader(tmp_path / "again")
    assert_same_bits({n: one.read(n) for n in one.names}, {n: two.read(n) for n in two.names})


def test_the_reference_sees_positions():
    """Rows and columns, order, and the class's key of zeros matter to what is compared with."""
    theirs, (labels, codes) = weights(), batch()
    expected = published_forward(theirs, labels, codes)
    swapped = codes.clone()
    swapped[:, [1, 5]] = codes[:, [5, 1]]  # cells (0, 1) and (1, 0)
    assert (published_forward(theirs, labels, swapped)[:, -1] - expected[:, -1]).abs().max() > 1e-2


def test_what_shapes_do_not_tell_and_what_has_no_place(tmp_path):
    save_file(weights(), tmp_path / "c2i.safetensors")
    run = tmp_path / "run"
    with pytest.raises(UserError, match="lm.grid=SIDE: 16 for 256 x 256 pixels"):
        to_megamug(FORM, tmp_path / "c2i.safetensors", run)
    with pytest.raises(UserError, match="64 is no published width; give --config lm.heads=NUMBER"):
        to_megamug(FORM, tmp_path / "c2i.safetensors", run, TOLD[:1])
    with pytest.raises(UserError, match="its width 64 does not make 5 heads"):
        to_megamug(FORM, tmp_path / "c2i.safetensors", run, [*TOLD[:1], "lm.heads=5"])
    captions = {"cls_embedding.cap_proj.fc1.weight": torch.ones(2, 2), "cls_embedding.uncond_embedding": torch.ones(2)}
    theirs = {name: x for name, x in weights().items() if "embedding_table" not in name}
    save_file(theirs | captions, tmp_path / "t2i.safetensors")
    with pytest.raises(UserError, match="a caption's features from a text encoder condition this GPT"):
        to_megamug(FORM, tmp_path / "t2i.safetensors", run, TOLD)
    save_file(theirs, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no matrix cls_embedding.embedding_table.weight: no class-cond"):
        to_megamug(FORM, tmp_path / "other.safetensors", run, TOLD)
    assert not run.exists()
    to_megamug(FORM, tmp_path / "c2i.safetensors", run, TOLD)
    with pytest.raises(UserError, match="hf_llama has lm.positions rotary, and the model has rotary_grid"):
        from_megamug(FORMATS["hf_llama"], run, tmp_path / "out")


def test_only_a_converted_run_tells_codes_from_classes(tmp_path):
    from megamug.checkpoint.tensors import write_run

    save_file(weights(), tmp_path / "c2i.safetensors")
    to_megamug(FORM, tmp_path / "c2i.safetensors", tmp_path / "run", TOLD)
    reader = TensorReader(tmp_path / "run")
    origin = {"format": "other", "vocabulary": CODES + CLASSES}
    write_run(tmp_path / "other", config_of(reader), reader.tensors(), origin=origin)
    with pytest.raises(UserError, match="2 tables of embeddings, and this run does not tell which of its 101 rows"):
        from_megamug(FORM, tmp_path / "other", tmp_path / "out")
