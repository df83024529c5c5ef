"""JamCross: towers are the parents while gates are shut; what the cross blocks let through; sizes; the cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.configuration.shapes import count, tower_shapes
from megamug.models.jam.plan import JamPlan
from megamug.models.partition import depth_slots

VOCABULARY, TOKENS, ROWS = 200, 16, 2
LLAMA = dict(
    layers=4, width=128, heads=4, query_groups=2, ffn_width=192, norm="rmsnorm", norm_eps=1e-5, activation="swiglu",
    bias=False, positions="rotary", max_positions=1, rotary_base=10000.0, qk_norm=True, tie_vocabulary=True,
    init_std=0.05,
)  # fmt: skip
GPT = dict(
    layers=6, width=192, heads=6, query_groups=6, ffn_width=256, norm="layernorm", norm_eps=1e-5, activation="gelu",
    bias=True, positions="learned", max_positions=TOKENS, rotary_base=10000.0, qk_norm=False, tie_vocabulary=True,
    init_std=0.05,
)  # fmt: skip
CM3LEON = GPT | dict(layers=4, width=128, heads=4, query_groups=4, norm="layernorm_plain", bias=False)
PAIRS = {"unlike": (LLAMA, GPT), "unlike, deeper first": (GPT, LLAMA), "equal": (CM3LEON, CM3LEON)}


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    most_documents: int | None = None


def jam_config(text: dict, image: dict, fusion: dict | None = None, **sections) -> Config:
    config = Config()
    config.model.kind = "jam_cross"
    config.text_tower.__dict__.update(text)
    config.image_tower.__dict__.update(image)
    config.fusion.__dict__.update(fusion or {})
    config.data.__dict__.update(context_length=TOKENS, micro_batch_size=ROWS)
    for section, values in sections.items():
        getattr(config, section).__dict__.update(values)
    return resolve(config)


def build(config: Config, seed: int = 1, gates: float | None = None):
    """The model in one stage, all gates at `gates` where given."""
    from megamug.models.init import initialise
    from megamug.models.jam.cross import JamCross

    plan = JamPlan(config, VOCABULARY)
    model = JamCross(plan)
    initialise(model.sharded_state_dict(), seed, plan.init_std)
    if gates is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".gate"):
                    parameter.fill_(gates)
    return model


def parent(model, name: str, config: Config, seed: int = 1):
    """The DecoderLM whose weights the model's tower `name` has."""
    from megamug.models.init import initialise
    from megamug.models.language.decoder_lm import DecoderLM
    from megamug.models.language.plan import LmPlan

    alone = Config()
    alone.model.kind, alone.data = "decoder_lm", config.data
    alone.lm.__dict__.update(vars(getattr(config, f"{name}_tower")))
    lm = DecoderLM(LmPlan(resolve(alone), VOCABULARY))
    initialise(lm.sharded_state_dict(), seed + 7)
    source = global_tensors(model)
    with torch.no_grad():
        for key, tensor in global_tensors(lm).items():
            tensor.copy_(source[f"{name}_tower.{key}"])
    return lm


def global_tensors(model) -> dict[str, torch.Tensor]:
    return {entry.key: entry.data for entry in model.sharded_state_dict().values()}


def random_batch(seed: int = 0, documents: bool = False) -> Batch:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=g)
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = -100
    if not documents:
        return Batch(tokens, labels)
    segments = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4, [0] * 11 + [1] * 5], dtype=torch.int32)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 7, 4), (11, 5))])
    return Batch(tokens, labels, segments, positions)


def states(model, batch: Batch) -> dict[str, torch.Tensor]:
    return model.run(model.embed(batch.tokens, batch.positions), batch.tokens, batch.segments)


# ---------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(("text", "image"), [(False, True), (True, False), (False, False)])
def test_gradients_of_head_norms_are_summed_over_tensor_ranks_where_either_tower_has_them(text, image):
    plan = JamPlan(jam_config(GPT | {"qk_norm": text}, GPT | {"qk_norm": image}), VOCABULARY)
    assert plan.schedule_config.qk_layernorm == (text or image)  # what Megatron's finalize_model_grads asks


def test_slots_match_relative_depth():
    assert [s.text for s in depth_slots(2, 4, 1)] == [(0, 0), (0, 1), (1, 1), (1, 2)]
    assert [s.cross for s in depth_slots(4, 4, 2)] == [None, 0, None, 1]
    assert [s.cross for s in depth_slots(5, 5, 2)] == [None, None, 0, None, 1]  # after layers round(2.5) and 5
    for text, image, every in ((4, 6, 2), (6, 4, 1), (7, 8, 2), (3, 11, 1), (32, 24, 2), (5, 5, 3), (9, 4, 4)):
        slots = depth_slots(text, image, every)
        deep, shallow = max(text, image), min(text, image)
        assert len(slots) == deep
        numbers = [slot.cross for slot in slots if slot.cross is not None]
        assert numbers == list(range(shallow // every)) and slots[-1].cross == numbers[-1]
        for name, layers in (("text", text), ("image", image)):
            runs = [getattr(slot, name) for slot in slots]
            assert [i for first, last in runs for i in range(first, last)] == list(range(layers))
            for slot, (first, last) in enumerate(runs):
                assert last - first <= 1
                assert all(slot == -(-(i + 1) * deep // layers) - 1 for i in range(first, last))


def test_two_towers_of_7b_with_feed_forward_every_two_layers():
    """JAM's sizes (32 layers of 4096, vocabulary 56,320): 19.6 billion, counting one vocabulary matrix as the parents
    with their tied ones do; the output, which is the fused model's own, adds 0.23 billion."""
    config = Config()
    config.model.kind, config.model.preset, config.fusion.shared_embedding = "jam_cross", "jam_2x7b", True
    plan = JamPlan(resolve(config), 56_320)
    d, layers, v, positions = 4096, 32, 56_320, 4096
    towers = 2 * layers * 12 * d * d + 2 * positions * d
    cross = layers // 2 * 2 * (12 * d * d + 2)  # a gate before the attention and one before the feed-forward
    assert plan.parameters == towers + cross + 2 * v * d + 2 * d * d == 19_855_835_200
    assert abs(plan.parameters - v * d - 19.6e9) < 0.05e9
    for fusion, billions in (
        (dict(cross_every=1, cross_ffn=False), 17.5), (dict(cross_every=2, cross_ffn=False), 15.3),
        (dict(cross_every=1), 26.1),
    ):  # fmt: skip
        config.fusion.__dict__.update({"cross_ffn": True} | fusion)
        assert abs(JamPlan(resolve(config), v).parameters - v * d - billions * 1e9) < 0.05e9, fusion


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("fusion", [{}, dict(cross_ffn=False, gate=False, output_width=64)])
def test_names_and_shapes_are_those_of_the_plan(world, pair, fusion):
    config = jam_config(*PAIRS[pair], fusion)
    model = build(config)
    found = {}
    for entry in model.sharded_state_dict().values():
        shards = entry.build() if hasattr(entry, "build") else [entry]
        found[shards[0].key] = tuple(shards[0].global_shape)
    assert found == model.plan.shapes
    assert sum(p.numel() for p in model.parameters()) == model.plan.parameters
    for name in ("text", "image"):
        lm = parent(model, name, config)
        own = tower_shapes(getattr(config, f"{name}_tower"), 256)
        assert count(own.values()) == sum(p.numel() for p in lm.parameters()) and set(own) == set(global_tensors(lm))


def test_flops_are_what_torch_counts(world):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build(jam_config(*PAIRS["unlike"]))
    batch = random_batch()
    # The fused attention of a CPU is not known to the counter.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.logits(states(model, batch))
    assert counter.get_total_flops() == ROWS * model.plan.forward_flops


def test_stages_cut_both_towers_at_one_depth():
    plan = JamPlan(jam_config(*PAIRS["unlike"], parallel={"pipeline": 2, "virtual": 2}), VOCABULARY)
    parts = [plan.part(stage) for stage in range(4)]
    assert parts[0].embedding and parts[3].head and len(plan.stages) == 4
    for name, layers in (("text", 4), ("image", 6)):
        spans = [getattr(segment, name) for part in parts for segment in part.segments]
        assert [i for first, last in spans for i in range(first, last)] == list(range(layers))
    assert [s.cross for part in parts for s in part.segments if s.cross is not None] == [0, 1]
    assert list(plan.boundary(2).shapes) == ["text", "image"] and plan.boundary(0) is plan.boundary(4) is None


# ---------------------------------------------------------------------------------------------- shut gates


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_with_gates_at_zero_each_tower_is_its_parent_to_the_bit(world, pair, documents):
    config = jam_config(*PAIRS[pair], data={"separate_documents": documents})
    model, batch = build(config), random_batch(documents=documents)
    with torch.no_grad():
        found = model.normed(states(model, batch))
        for name in ("text", "image"):
            lm = parent(model, name, config)
            expected = lm.run(lm.embed(batch.tokens, batch.positions), batch.tokens, batch.segments)
            assert torch.equal(found[name], expected), name
        opened = build(config, gates=0.5)
        assert not torch.equal(opened.normed(states(opened, batch))["text"], found["text"])


def test_without_gates_the_blocks_act_from_the_start(world):
    batch = random_batch()
    with torch.no_grad():
        shut, free = (build(jam_config(*PAIRS["equal"], {"gate": g})) for g in (True, False))
        assert not any(name.endswith("gate") for name in free.plan.shapes)
        assert not torch.allclose(states(shut, batch)["text"], states(free, batch)["text"], atol=1e-3)


# ---------------------------------------------------------------------------------------------- cross blocks


def reference_half(half, hidden, context, hidden_mask):
    """One direction of a cross block by its formula, float64, from the module's parameters by name."""
    p = {name: parameter.double() for name, parameter in half.named_parameters()}
    rms = "reading.norm.bias" not in p

    def norm(x, name):
        if rms:
            return x / (x * x).mean(-1, keepdim=True).add(1e-5).sqrt() * p[f"{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        return x / (x * x).mean(-1, keepdim=True).add(1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    heads = half.config.num_attention_heads
    d = half.config.hidden_size // heads
    query = linear(norm(hidden, "reading.norm"), "reading.attention.linear_q").unflatten(-1, (heads, d))
    both = linear(norm(context, "reading.context_norm"), "reading.attention.linear_kv").unflatten(-1, (heads, 2 * d))
    key, value = both.chunk(2, dim=-1)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / d**0.5
    weights = scores.masked_fill(hidden_mask, -torch.inf).softmax(-1)
    read = torch.einsum("bnst,tbnd->sbnd", weights, value).flatten(2)
    hidden = hidden + torch.tanh(p["reading.gate"]) * linear(read, "reading.attention.linear_proj")
    first = linear(norm(hidden, "ffn.norm"), "ffn.mlp.linear_fc1")
    if rms:
        gate, up = first.chunk(2, dim=-1)
        first = torch.nn.functional.silu(gate) * up
    else:
        first = torch.nn.functional.gelu(first)
    return hidden + torch.tanh(p["ffn.gate"]) * linear(first, "ffn.mlp.linear_fc2")


@pytest.mark.parametrize("documents", [False, True])
def test_a_cross_block_is_its_formula(world, documents):
    from megamug.models.blocks.layers import document_mask

    block = build(jam_config(*PAIRS["unlike"]), gates=0.7).cross["1"]
    g = torch.Generator().manual_seed(2)
    text, image = (torch.randn(TOKENS, ROWS, width, generator=g) for width in (128, 192))
    with torch.no_grad():
        for parameter in block.parameters():  # biases and norms included
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
        segments = random_batch(documents=documents).segments
        mask = None if segments is None else document_mask(segments)
        hidden_mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1) if mask is None else mask
        new_text, new_image = block(text, image, mask)
        # Each direction reads the other's states as they were before the block.
        for new, half, own, other in (
            (new_text, block.text, text, image), (new_image, block.image, image, text),
        ):  # fmt: skip
            expected = reference_half(half, own.double(), other.double(), hidden_mask)
            assert torch.allclose(new.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_no_token_reads_what_is_later_or_another_document(world, documents):
    config = jam_config(*PAIRS["unlike"], data={"separate_documents": documents})
    model, batch = build(config, gates=0.7), random_batch(documents=documents)
    other = batch.tokens.clone()
    place = 5  # of row 0: the first token of its second document
    other[0, place] = (other[0, place] + 1) % VOCABULARY
    with torch.no_grad():
        before = model.logits(states(model, batch))
        batch.tokens = other
        changed = (model.logits(states(model, batch)) != before).any(-1)
    end = 12 if documents else TOKENS
    expected = torch.zeros(TOKENS, ROWS, dtype=torch.bool)
    expected[place:end, 0] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("pair", ["unlike", "equal"])
def test_evaluation_gives_the_logits_of_training(world, pair):
    model, batch = build(jam_config(*PAIRS[pair], {"cross_ffn": True}), gates=0.7), random_batch(documents=True)
    expected = model.logits(states(model.train(), batch))
    with torch.no_grad():
        assert torch.allclose(model.logits(states(model.eval(), batch)), expected, rtol=1e-6, atol=1e-6)


def test_the_cache_gives_the_logits_of_the_whole_row(world):
    from megamug.models.blocks.layers import key_value_cache

    model, batch = build(jam_config(*PAIRS["unlike"]), gates=0.7).eval(), random_batch()
    with torch.no_grad():
        whole = model.logits(states(model, batch))
        with key_value_cache(model, TOKENS):
            pieces = []
            for first, last in [(0, 9), *((i, i + 1) for i in range(9, TOKENS))]:
                tokens = batch.tokens[:, first:last]
                pieces.append(model.logits(model.run(model.embed(tokens, first=first), tokens, first=first)))
    assert torch.allclose(torch.cat(pieces), whole, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- losses and freezing


def test_losses_are_torchs(world):
    model = build(jam_config(*PAIRS["unlike"], model={"kind": "jam_cross", "z_loss_weight": 1e-4}), gates=0.7)
    plain, batch = build(jam_config(*PAIRS["unlike"]), gates=0.7), random_batch()
    packed, losses = model(batch)
    logits = model.logits(states(model, batch))[..., :VOCABULARY].transpose(0, 1)
    seen = batch.labels != -100
    expected = torch.nn.functional.cross_entropy(logits[seen], batch.labels[seen], reduction="sum")
    z = logits[seen].logsumexp(-1).square().sum()
    assert packed is None and list(losses) == ["lm", "z"] and int(losses["lm"][1]) == int(seen.sum())
    assert torch.allclose(losses["lm"][0], expected) and torch.allclose(losses["z"][0], z, rtol=1e-4)
    assert torch.allclose(plain(batch)[1]["lm"][0], expected)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("freeze", ["none", "text", "image", "both"])
def test_a_frozen_tower_gets_no_gradient_and_all_others_do(world, freeze, recompute):
    """Whatever is frozen, gradients of the others are those of the model without freezing."""
    pair, batch = PAIRS["unlike"], random_batch()
    gradients = {}
    for which, again in (("none", "none"), (freeze, recompute)):
        model = build(jam_config(*pair, {"freeze": which}, parallel={"recompute": again}), gates=0.7)
        model(batch)[1]["lm"][0].backward()
        gradients[which, again] = {name: p.grad for name, p in model.named_parameters()}
    expected, found = gradients["none", "none"], gradients[freeze, recompute]
    frozen = {"none": (), "text": ("text_tower.",), "image": ("image_tower.",)}
    prefixes = frozen.get(freeze, ("text_tower.", "image_tower."))
    for name, gradient in found.items():
        if name.startswith(prefixes):
            assert gradient is None, name
        else:
            assert expected[name].abs().max() > 0, name
            assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-7), name


def test_a_shared_embedding_is_one_table(world):
    model = build(jam_config(*PAIRS["equal"], {"shared_embedding": True}))
    tables = [name for name in model.plan.shapes if "word_embeddings" in name]
    assert tables == ["text_tower.embedding.word_embeddings.weight"]
    batch = random_batch()
    model(batch)[1]["lm"][0].backward()
    embedded = model.embed(batch.tokens)
    words = model.text_tower.embedding.words(batch.tokens)
    for name, tower in (("text", model.text_tower), ("image", model.image_tower)):
        assert torch.equal(embedded[name], words + tower.embedding.positions[:TOKENS].unsqueeze(1))
