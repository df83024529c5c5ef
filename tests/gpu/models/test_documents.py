"""Documents of a row that do not read each other, by the kernels of a GPU: against a mask of all pairs of tokens."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from megamug.configuration.reading import resolve
from megamug.configuration.sections import Config
from megamug.data.documents.loader import TokenBatch, no_fewer
from megamug.models.attention import documents
from megamug.models.blocks.layers import document_mask
from tests.models.attention.test_documents import FAMILIES, by_mask, numbered
from tests.models.jam.test_cross import GPT, LLAMA, jam_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_te = pytest.param("te", marks=pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
))  # fmt: skip
LAYERS = ["local", needs_te]
ROWS, TOKENS, VOCABULARY = 4, 384, 512
LENGTHS = [[384], [1, 200, 1, 182], [100, 284], [1] * 20 + [364]]
SEGMENTS = numbered(LENGTHS)
MOST = no_fewer(sum(map(len, LENGTHS)))


def attended(query, key, value, segments):
    """softmax(q k / sqrt(d)) v in float64, by a mask: [s, b, n, d], [s, b, g, d] -> [s, b, n * d]."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    seen = document_mask(segments).logical_not()
    heads = [x.double().permute(1, 2, 0, 3) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*heads, attn_mask=seen).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 5e-4)])
@pytest.mark.parametrize("heads, width", [((4, 4), 64), ((4, 2), 128), ((4, 1), 32), ((2, 1), 256), ((2, 2), 20)])
def test_attention_is_its_formula(dtype, rounding, heads, width):
    """Of float32 the products are TF32's where those are on."""
    torch.manual_seed(0)
    shapes = [(TOKENS, ROWS, n, width) for n in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(*shape).to(dtype) for shape in shapes]
    weight = torch.randn(TOKENS, ROWS, heads[0] * width).to(dtype)
    ours = [x.cuda().requires_grad_() for x in inputs]
    context = documents.attention(*ours, documents.starts(SEGMENTS.cuda(), MOST))
    found = [context, *torch.autograd.grad((context * weight.cuda()).sum(), ours)]
    exact = [x.double().requires_grad_() for x in inputs]
    context = attended(*exact, SEGMENTS)
    expected = [context, *torch.autograd.grad((context * weight.double()).sum(), exact)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and (a.cpu().double() - b).norm() <= 4 * rounding * b.norm()


def test_nothing_is_read_from_the_device():
    query, key, value = (
        torch.randn(TOKENS, ROWS, n, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (4, 2, 2)
    )
    segments = SEGMENTS.cuda()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        context = documents.attention(query, key, value, documents.for_attention(segments, MOST))
        context.backward(torch.ones_like(context))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.isfinite(query.grad).all()


def test_a_captured_graph_takes_other_documents():
    query, key, value = (torch.randn(TOKENS, ROWS, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    segments = SEGMENTS.cuda()

    def run():
        return documents.attention(query, key, value, documents.for_attention(segments, MOST))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for lengths in (LENGTHS, [[10, 374], [384], [200, 1, 183], [383, 1]]):
        segments.copy_(numbered(lengths))
        graph.replay()
        assert torch.equal(captured, run())


# ---------------------------------------------------------------------------------------------- the models


def made(plan_type, model_type, config, spec: str):
    """The model on the GPU; the same weights for both specs."""
    from megamug.models.init import initialise

    plan = plan_type(config, VOCABULARY, spec)
    model = model_type(plan).cuda()
    initialise(model.sharded_state_dict(), 3, plan.init_std)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(0.5)
    return model


def decoder(spec: str, options: dict, dtype: str = "bf16", recompute: str = "none", rows=ROWS, tokens=TOKENS):
    from megamug.models.language.decoder_lm import DecoderLM
    from megamug.models.language.plan import LmPlan

    config = Config()
    config.model.kind, config.model.preset = "decoder_lm", "lm_tiny"
    sizes = {"layers": 2, "width": 256, "heads": 4, "ffn_width": 512, "max_positions": tokens, "init_std": 0.05}
    config.lm.__dict__.update({**sizes, **options})
    config.data.__dict__.update(context_length=tokens, micro_batch_size=rows)
    config.precision.dtype, config.parallel.recompute = dtype, recompute
    return made(LmPlan, DecoderLM, resolve(config), spec)


def jam(spec: str, recompute: str = "none"):
    from megamug.models.jam.cross import JamCross
    from megamug.models.jam.plan import JamPlan

    data = {"context_length": TOKENS, "micro_batch_size": ROWS}
    config = jam_config(LLAMA, GPT | {"max_positions": TOKENS}, data=data, parallel={"recompute": recompute},
                        precision={"dtype": "bf16"})  # fmt: skip
    return made(JamPlan, JamCross, config, spec)


def batch(apart: bool = True, rows: int = ROWS, tokens: int = TOKENS) -> TokenBatch:
    g = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, VOCABULARY, (rows, tokens), generator=g).cuda() for _ in range(2))
    if not apart:
        return TokenBatch(ids, labels, None, None)
    return TokenBatch(ids, labels, SEGMENTS.cuda(), None, MOST)


def trained(model, rows: TokenBatch) -> tuple[float, torch.Tensor]:
    """Loss of a token, gradients one behind the other by their global names."""
    model.zero_grad()
    total, count = model(rows)[1]["lm"]
    (total / count).backward()
    by_data = {p.data_ptr(): p.grad for p in model.parameters()}
    named = sorted((e.key, part) for e in model.sharded_state_dict().values()
                   for part in [e.data.data_ptr()] if part in by_data)  # fmt: skip
    return float(total / count), torch.cat([by_data[part].flatten().float() for _, part in named])


def check(model, reference, monkeypatch) -> None:
    loss, gradient = trained(model, batch())
    with monkeypatch.context() as patch:
        by_mask(patch)
        expected_loss, expected = trained(reference, batch())
    _, whole = trained(reference, batch(apart=False))
    assert abs(loss - expected_loss) <= 1e-3 * expected_loss
    assert (gradient - expected).norm() <= 2e-2 * expected.norm() < 2e-1 * (whole - expected).norm()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_decoder_lm_trains_as_with_a_mask(world, monkeypatch, layers, family, recompute):
    options = FAMILIES[family] | ({"grid": 20} if family == "grid" else {})
    check(decoder(layers, options, recompute=recompute), decoder("local", options), monkeypatch)


@pytest.mark.parametrize("layers", LAYERS)
def test_decoder_lm_trains_in_fp32(world, monkeypatch, layers):
    options = FAMILIES["grouped, head norms"]
    check(decoder(layers, options, "fp32"), decoder("local", options, "fp32"), monkeypatch)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_jam_cross_trains_as_with_a_mask(world, monkeypatch, layers, recompute):
    check(jam(layers, recompute), jam("local"), monkeypatch)


@pytest.mark.parametrize("layers", LAYERS)
def test_documents_take_no_memory(world, layers):
    model = decoder(layers, FAMILIES["grouped, head norms"] | {"layers": 4}, rows=4, tokens=2048)
    peaks = []
    for apart in (False, True):
        rows = batch(False, 4, 2048)
        if apart:
            rows.segments = torch.arange(2048, dtype=torch.int32, device="cuda").div(500, rounding_mode="floor").expand(
                4, -1).contiguous()  # fmt: skip
            rows.most_documents = 32
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            model(rows)[1]["lm"][0].backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.1 * peaks[0]
