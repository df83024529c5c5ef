"""Fusions: uniform is the mean, width's blocks are the parents, cross starts as its parents; a tensor at a time."""

from __future__ import annotations

import runpy
import sys
import weakref
from pathlib import Path

import pytest
import torch

from megamug.checkpoint.tensors import LazyTensor, TensorReader, write_run
from megamug.configuration.reading import load_config, resolve
from megamug.configuration.sections import Config, FusionConfig
from megamug.configuration.shapes import count, parameter_shapes, tower_shapes
from megamug.errors import UserError
from megamug.models.jam import fuse
from tests.data.language import tiny_vocabulary
from tests.models.jam.test_cross import CM3LEON, GPT, LLAMA, TOKENS

TOOL = str(Path(__file__).parents[3] / "tools" / "fuse_towers.py")
SMALL = dict(layers=2, width=32, ffn_width=48)
TOWERS = {
    "llama": LLAMA | SMALL, "llama, untied": LLAMA | SMALL | dict(tie_vocabulary=False),
    "chameleon": LLAMA | SMALL | dict(qk_norm=True, qk_norm_per_head=True, res_post_norm=True),
    "gpt": GPT | SMALL | dict(heads=4, query_groups=4), "cm3leon": CM3LEON | SMALL | dict(layers=3, width=64),
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tiny_vocabulary(tmp_path_factory.mktemp("vocabulary"))


class Parents:
    """Runs of random parents, made once each."""

    def __init__(self, folder: Path, vocabulary):
        self.folder, self.vocabulary, self.models = folder, vocabulary, {}

    def model(self, tower: str, seed: int):
        from megamug.models.init import initialise
        from megamug.models.language.decoder_lm import DecoderLM
        from megamug.models.language.plan import LmPlan

        if (tower, seed) not in self.models:
            config = Config()
            config.model.kind = "decoder_lm"
            config.lm.__dict__.update(TOWERS[tower])
            config.data.__dict__.update(
                tokenizer=str(self.vocabulary.folder), context_length=TOKENS, micro_batch_size=2
            )
            config = resolve(config)
            model = DecoderLM(LmPlan(config, self.vocabulary.size))
            initialise(model.sharded_state_dict(), seed, model.plan.init_std)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name or name.endswith("bias"):
                        g = torch.Generator().manual_seed(seed)
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
            entries = model.sharded_state_dict().values()
            tensors = [LazyTensor(e.key, tuple(e.data.shape), e.data.dtype, lambda e=e: e.data) for e in entries]
            identity = {"data.tokenizer": self.vocabulary.fingerprint(), "precision.dtype": "fp32"}
            path = self.folder / f"{tower.replace(', ', '_')}_{seed}"
            write_run(path, config, tensors, identity)
            self.models[tower, seed] = model, path
        return self.models[tower, seed]

    def pair(self, text: str, image: str) -> tuple[fuse.Parent, fuse.Parent]:
        return fuse.Parent.load(self.model(text, 1)[1]), fuse.Parent.load(self.model(image, 2)[1])


@pytest.fixture(scope="module")
def parents(world, vocabulary, tmp_path_factory):
    return Parents(tmp_path_factory.mktemp("parents"), vocabulary)


def load(run: Path, vocabulary, world):
    """The model that a fused run holds."""
    from megamug.checkpoint.state import load_tensors
    from megamug.models.tasks import model_of

    config = resolve(load_config(run / "config.yaml"))
    plan, model = model_of(config.model.kind)
    chunk = model(plan(config, vocabulary.size))
    load_tensors([chunk], None, world, run / "checkpoints" / "step-00000000" / "model", 0)
    return chunk


def tokens(vocabulary) -> torch.Tensor:
    return torch.randint(0, vocabulary.size, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.run(model.embed(ids), ids))


def made(fusion: fuse.Fusion) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.read() for tensor in fusion.tensors}


# ---------------------------------------------------------------------------------------------- uniform and width


@pytest.mark.parametrize("tower", ["llama, untied", "gpt", "cm3leon"])
def test_uniform_is_the_mean(parents, world, vocabulary, tmp_path, tower):
    text, image = parents.pair(tower, tower)
    fuse.write(fuse.uniform(text, image), tmp_path / "run", text)
    model = load(tmp_path / "run", vocabulary, world)
    one, other = (dict(parents.model(tower, seed)[0].named_parameters()) for seed in (1, 2))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, (one[name] + other[name]) / 2), name
    assert load_config(tmp_path / "run" / "config.yaml").lm == text.config.lm


def off_diagonal(name: str, shape: tuple[int, ...], gated: bool) -> torch.Tensor:
    """Where a matrix of a width fusion joins one parent's inputs to the other's outputs, by indices."""
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    if gated and "linear_fc1" in name:  # gate of the text parent, of the image parent, linear part of each
        of_image = (rows // (shape[0] // 4)) % 2 == 1
    else:
        of_image = rows >= shape[0] // 2
    return of_image.unsqueeze(1) != (columns >= shape[1] // 2)


@pytest.mark.parametrize("how", ["copy", "average"])
@pytest.mark.parametrize("tower", ["llama", "chameleon", "gpt"])
def test_widths_blocks_are_the_parents(parents, tower, how):
    text, image = parents.pair(tower, tower)
    fusion = fuse.width(text, image, how)
    heads, groups = text.config.lm.heads, text.config.lm.query_groups
    doubled = fusion.config.lm
    assert (doubled.width, doubled.heads, doubled.query_groups, doubled.layers) == (64, 2 * heads, 2 * groups, 2)
    expected_shapes = tower_shapes(doubled, parents.vocabulary.padded_size)
    assert {tensor.name: tensor.shape for tensor in fusion.tensors} == expected_shapes
    assert fusion.parameters == count(expected_shapes.values())
    gated = doubled.activation == "swiglu"
    for name, tensor in made(fusion).items():
        a, b = text.reader.read(name), image.reader.read(name)
        assert tuple(tensor.shape) == expected_shapes[name]
        if "embedding" in name:
            assert torch.equal(tensor[:, :32], a) and torch.equal(tensor[:, 32:], b), name
        elif ("q_layernorm" in name or "k_layernorm" in name) and not doubled.qk_norm_per_head:
            assert torch.equal(tensor, (a + b) / 2)
        elif tensor.dim() == 1 or "layernorm" in name:
            assert torch.equal(tensor, torch.cat([a, b])), name
        else:
            off = off_diagonal(name, tensor.shape, gated)
            left = torch.arange(tensor.shape[1]) < tensor.shape[1] // 2
            image_row = off & left | ~off & ~left  # output of the image parent
            of_image = image_row[:, 0]
            rows, cols = tensor.shape[0] // 2, tensor.shape[1] // 2
            top, bottom = tensor[~of_image], tensor[of_image]
            mean = (a + b) / 2
            assert torch.equal(top[:, :cols], a) and torch.equal(bottom[:, cols:], b) and len(top) == rows, name
            assert torch.equal(top[:, cols:], a if how == "copy" else mean), name
            assert torch.equal(bottom[:, :cols], b if how == "copy" else mean), name


@pytest.mark.parametrize("tower", ["llama", "gpt", "llama, untied", "chameleon"])
def test_with_nothing_between_the_parents_width_of_one_parent_with_itself_is_that_parent(
    parents, world, vocabulary, tmp_path, tower
):
    """Norms of (x, x) are (norm x, norm x), so with zeros off the diagonal both halves are the parent: heads, query
    groups and gates have to lie where the model looks for them. The output reads both halves: twice the logits."""
    text = parents.pair(tower, tower)[0]
    fusion = fuse.width(text, text)
    gated = text.config.lm.activation == "swiglu"

    def cut(tensor: LazyTensor) -> LazyTensor:
        def read():
            weight = tensor.read()
            if weight.dim() == 2 and tensor.name not in fuse.EMBEDDINGS and "layernorm" not in tensor.name:
                weight = weight.masked_fill(off_diagonal(tensor.name, tensor.shape, gated), 0.0)
            return weight

        return tensor._replace(read=read)

    fusion = fuse.Fusion(fusion.config, [cut(tensor) for tensor in fusion.tensors])
    fuse.write(fusion, tmp_path / "run", text)
    ids = tokens(vocabulary)
    found = logits(load(tmp_path / "run", vocabulary, world), ids)
    assert torch.allclose(found, 2 * logits(parents.model(tower, 1)[0], ids), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- cross


CROSSES = {"unlike": ("llama, untied", "cm3leon"), "equal": ("gpt", "gpt")}


@pytest.mark.parametrize("pair", CROSSES)
@pytest.mark.parametrize("all_directions", [False, True])
def test_cross_starts_as_its_parents(parents, world, vocabulary, tmp_path, pair, all_directions):
    names = CROSSES[pair]
    text, image = parents.pair(*names)
    widths = [parent.config.lm.width for parent in (text, image)]
    options = FusionConfig(cross_every=1, output_width=sum(widths) + 8 if all_directions else None)
    fusion = fuse.cross(text, image, options, vocabulary.first_code, seed=5)
    fuse.write(fusion, tmp_path / "run", text)
    model, ids = load(tmp_path / "run", vocabulary, world), tokens(vocabulary)
    assert {t.name: t.shape for t in fusion.tensors} == parameter_shapes(fusion.config, vocabulary.padded_size)
    alone = [parents.model(name, seed)[0] for name, seed in zip(names, (1, 2), strict=True)]
    with torch.no_grad():
        states = model.normed(model.run(model.embed(ids), ids))
        for state, lm in zip(states.values(), alone, strict=True):
            assert torch.equal(state, lm.run(lm.embed(ids), ids))
    found, own = logits(model, ids), [logits(lm, ids) for lm in alone]
    expected = torch.cat([own[0][..., : vocabulary.first_code], own[1][..., vocabulary.first_code :]], dim=-1)
    if all_directions:
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
        return
    # As near as a linear of this width can come (Eckart and Young): the rest of the singular values.
    rows = [lm.vocabulary_weight().detach().double() for lm in alone]
    wanted = torch.block_diag(rows[0][: vocabulary.first_code], rows[1][vocabulary.first_code :])
    product = model.output_layer.weight.double() @ model.mix.weight.double()
    left = torch.linalg.svdvals(wanted)[max(widths) :].square().sum().sqrt()
    assert torch.allclose((product - wanted).norm(), left, rtol=1e-5) and left < 0.75 * wanted.norm()


def test_the_seed_draws_the_cross_blocks_as_the_model_would(parents, vocabulary):
    from megamug.models.init import draw

    text, image = parents.pair("gpt", "cm3leon")
    fusions = [made(fuse.cross(text, image, FusionConfig(), vocabulary.first_code, seed)) for seed in (1, 1, 2)]
    name = "cross.0.image.reading.attention.linear_kv.weight"
    assert torch.equal(fusions[0][name], fusions[1][name]) and not torch.equal(fusions[0][name], fusions[2][name])
    assert torch.equal(fusions[0][name], draw(name, (128, 32), 1, image.config.lm.init_std))
    gates = {key: tensor for key, tensor in fusions[0].items() if key.endswith(".gate")}
    assert len(gates) == 4 and not any(gate.any() for gate in gates.values())


def test_a_shared_embedding_has_the_rows_of_both(parents, vocabulary):
    text, image = parents.pair("gpt", "llama")
    fusion = fuse.cross(text, image, FusionConfig(shared_embedding=True), vocabulary.first_code, seed=1)
    table = made(fusion)["text_tower." + fuse.WORDS]
    assert "image_tower." + fuse.WORDS not in {tensor.name for tensor in fusion.tensors}
    first = vocabulary.first_code
    assert torch.equal(table[:first], text.reader.read(fuse.WORDS)[:first])
    assert torch.equal(table[first:], image.reader.read(fuse.WORDS)[first:])


# ---------------------------------------------------------------------------------------------- one at a time, errors


@pytest.mark.parametrize("kind", ["uniform", "width", "cross"])
def test_one_parameter_of_the_parents_is_in_memory_at_a_time(parents, vocabulary, tmp_path, monkeypatch, kind):
    text, image = parents.pair("gpt", "gpt")
    fusion = {
        "uniform": lambda: fuse.uniform(text, image), "width": lambda: fuse.width(text, image),
        "cross": lambda: fuse.cross(text, image, FusionConfig(), vocabulary.first_code, 1),
    }[kind]()  # fmt: skip
    alive: list[tuple[str, weakref.ref]] = []
    names = []
    read = TensorReader.read

    def watched(reader, name):
        others = {n for n, ref in alive if ref() is not None and n != name}
        assert not others, f"{others} still held when {name} is read"
        tensor = read(reader, name)
        alive.append((name, weakref.ref(tensor)))
        names.append(name)
        return tensor

    monkeypatch.setattr(TensorReader, "read", watched)
    fuse.write(fusion, tmp_path / "run", text)
    assert set(names) == set(text.reader.names)


def test_parents_that_do_not_fit_are_told(parents, vocabulary, tmp_path):
    text, image = parents.pair("gpt", "cm3leon")
    for fusing in (fuse.uniform, fuse.width):
        with pytest.raises(UserError, match=r"lm\.layers is 2 in .* and 3 in .*--kind cross does not"):
            fusing(text, image)
    with pytest.raises(UserError, match=r"equal widths: lm\.width is 32 in .* and 64 in"):
        fuse.cross(text, image, FusionConfig(shared_embedding=True), 1, 1)
    other = fuse.Parent(image.path, image.config, image.reader, {"data.tokenizer": "another"})
    with pytest.raises(UserError, match="has vocabulary .* has another; ids must mean the same"):
        fuse.one_vocabulary(text, other)
    assert fuse.one_vocabulary(text, image).first_code == vocabulary.first_code
    with pytest.raises(UserError, match="neither a run folder"):
        fuse.Parent.load(tmp_path / "nothing")


def test_vocabularies_of_other_sizes_are_told(parents, tmp_path):
    text, image = parents.pair("gpt", "gpt")
    tensors = [t._replace(shape=(128, 32)) if t.name == fuse.WORDS else t for t in image.reader.tensors()]
    cut = [
        t._replace(read=lambda t=t: image.reader.read(t.name)[:128].clone()) if t.name == fuse.WORDS else t
        for t in tensors
    ]
    write_run(tmp_path / "cut", image.config, cut, image.identity)
    with pytest.raises(UserError, match="vocabulary of 384 rows and .* of 128; ids must mean the same"):
        fuse.one_vocabulary(text, fuse.Parent.load(tmp_path / "cut"))


def tool(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    try:
        runpy.run_path(TOOL, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    out = capsys.readouterr()
    return code, out.out + out.err


def test_the_tool_writes_a_run_that_starts_a_training(parents, world, vocabulary, tmp_path, monkeypatch, capsys):
    from megamug.checkpoint import initial
    from megamug.models.tasks import make_task

    one, other = parents.model("llama", 1)[1], parents.model("cm3leon", 2)[1]
    fused = tmp_path / "fused"
    arguments = ("--kind", "cross", "--cross-every", 1, "--no-ffn", "--output", fused)
    code, said = tool(monkeypatch, capsys, one, other / "checkpoints" / "step-00000000", *arguments)
    assert code == 0 and "jam_cross" in said and "model.initial" in said, said
    config = resolve(load_config(fused / "config.yaml"))
    assert (config.fusion.cross_every, config.fusion.cross_ffn, config.fusion.gate) == (1, False, True)
    config.model.initial = str(fused)
    task = make_task(config)
    initial.check(config, task)
    chunks = task.build(world)
    initial.load(config, chunks, world)
    weight = chunks[0].image_tower.embedding.word_embeddings.weight
    assert torch.equal(weight, parents.model("cm3leon", 2)[0].embedding.word_embeddings.weight)
    code, said = tool(monkeypatch, capsys, one, other, *arguments)
    assert code == 2 and "holds a run already" in said
    code, said = tool(monkeypatch, capsys, one, other, "--kind", "uniform", "--output", tmp_path / "u")
    assert code == 2 and "error: lm.layers is 2" in said and not (tmp_path / "u").exists()
    code, said = tool(monkeypatch, capsys, one, other, "--kind", "cross", "--cross-every", 9, "--output",
                      tmp_path / "c")  # fmt: skip
    assert code == 2 and "cross_every(9) is more than the shallower tower's layers" in said
    assert not (tmp_path / "c").exists()
    code, said = tool(monkeypatch, capsys, one, one, "--kind", "width", "--no-ffn", "--output", tmp_path / "w")
    assert code == 2 and "--no-ffn means nothing to --kind width" in said
