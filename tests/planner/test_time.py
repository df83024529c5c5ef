"""Predicted times and memory against what was measured and published (`measured`), and what the model of time
does when something changes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megamug import cli
from megamug.configuration.reading import load_config, resolve
from megamug.planner import search as planner
from megamug.planner.execution import EXECUTIONS, FP8, GPUS, layers_of
from megamug.planner.memory import Layout
from megamug.planner.model import model_of
from megamug.planner.time import execution, phases, step_time
from tests.planner.measured import (
    DOCUMENT,
    MEASURED,
    NEMO,
    PUBLISHED,
    constants_table,
    gpt,
    mug,
    predicted,
    published_table,
    table,
)

ROOT = Path(__file__).parents[2]
LARGE = str(ROOT / "examples/mug/vit_l16_1gpu.yaml")


def named(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


@named(MEASURED)
def test_measured_steps_are_predicted(row):
    milliseconds, gib = predicted(row)
    assert milliseconds == pytest.approx(row.milliseconds, rel=0.25)
    assert gib == pytest.approx(row.gib, rel=0.10)


@named(PUBLISHED)
def test_published_throughput_is_predicted(row):
    assert row.tflops() == pytest.approx(row.rate, rel=0.17)
    if "Llama3" in row.name:
        assert row.flops() / row.tokens == pytest.approx(744e12 / 14451, rel=0.01)


@named(NEMO)
def test_other_published_throughput_is_met(row):
    assert row.tokens_per_second() == pytest.approx(row.rate, rel=0.25)


def test_the_document_tells_these_errors_and_constants():
    text = DOCUMENT.read_text()
    for line in [*table(), *published_table(), *constants_table()]:
        assert line in text, "python -m tests.planner.measured --write"


# ---------------------------------------------------------------------------------------------- what changes it

LARGE_VIT = model_of(resolve(load_config(None, mug("vit_l16", 256))), 0)
NARROW, WIDE = gpt(8, 1024, 16, 4096, 2048, 32000), gpt(8, 8192, 64, 32768, 2048, 32000)
GPU = GPUS["h200"]


def times(model, layout: Layout):
    return step_time(model, layout, GPU, overlap_gradients=False, overlap_parameters=False)


def test_a_step_takes_as_long_as_device_or_host():
    """In each phase whichever is longer; what the device waits is told apart."""
    layout = Layout(micro_batch=256, layers="te")
    work, update, update_host = phases(LARGE_VIT, layout, GPU)
    told = times(LARGE_VIT, layout)
    longer = sum(max(work.device(phase), work.host[phase]) for phase in (0, 1)) + max(update, update_host)
    assert told.total == pytest.approx(longer) and told.update == update
    assert told.compute == pytest.approx(work.device(0) + work.device(1))
    assert work.host[0] > work.device(0) and told.waiting > 0.2 * told.total
    small = times(LARGE_VIT, replace(layout, micro_batch=8)).total
    assert small == pytest.approx(times(LARGE_VIT, replace(layout, micro_batch=16)).total)  # both are the host's
    assert times(LARGE_VIT, replace(layout, micro_batch=2048)).total > 6 * told.compute


def test_compiled_layers_and_graphs_take_the_host_out_of_the_way():
    layout = Layout(micro_batch=32, layers="te")
    te, local, compiled = (times(LARGE_VIT, replace(layout, layers=name)) for name in ("te", "local", "compiled"))
    graphs = times(LARGE_VIT, replace(layout, graphs=True))
    assert te.total > local.total > compiled.total
    assert graphs.compute == te.compute and graphs.waiting < te.waiting / 3
    launched = [phases(LARGE_VIT, replace(layout, layers=name), GPU)[0].host for name in EXECUTIONS]
    assert [sum(host) for host in launched] == sorted((sum(host) for host in launched), reverse=True)
    assert compiled.compute < local.compute  # fewer passes over memory
    wide = Layout(micro_batch=4)
    assert times(WIDE, wide).waiting < 0.05 * times(WIDE, wide).total  # products of this width outlast their launches


def test_fp8_pays_for_wide_layers_alone():
    layout = Layout(micro_batch=8, layers="te")
    for recipe in FP8:
        eight = replace(layout, fp8=recipe)
        assert times(NARROW, eight).total > 0.95 * times(NARROW, layout).total
        assert times(WIDE, eight).total < 0.8 * times(WIDE, layout).total
        work, plain = phases(WIDE, eight, GPU)[0], phases(WIDE, layout, GPU)[0]
        assert work.casts[0] > 0 and plain.casts == (0, 0) and sum(work.host) > sum(plain.host)
    assert times(NARROW, replace(layout, fp8="delayed")).total < times(NARROW, replace(layout, fp8="current")).total


def test_short_rows_and_narrow_heads_make_slow_attention():
    """Time a FLOP of 50 tokens is many times that of 2,048; a head of 32 takes as long as one of 64."""
    layout = Layout(micro_batch=64, layers="te")

    def attention(context: int, heads: int = 8) -> float:
        model = gpt(4, 1024, heads, 4096, context, 32000)
        flops = sum(a.flops for block in model.blocks for unit in block.units for a in unit.attentions)
        return phases(model, layout, GPU)[0].attention[0] / flops

    assert attention(50) > 8 * attention(2048) and attention(197) > 2 * attention(2048)
    assert attention(64, heads=32) == pytest.approx(2 * attention(64, heads=16))
    tile = replace(EXECUTIONS["te"], tile=64)
    with pytest.MonkeyPatch.context() as patch:
        before = attention(50)
        patch.setitem(EXECUTIONS, "te", tile)
        assert execution(layout) is tile and attention(50) < before / 2


def test_an_h200_is_quicker_where_memory_is_the_limit():
    layout = Layout(micro_batch=256, layers="compiled")
    for name in ("products", "elementwise"):
        first, second = (sum(getattr(phases(LARGE_VIT, layout, GPUS[gpu])[0], name)) for gpu in ("h100", "h200"))
        wanted = {"products": GPUS["h200"].products / GPUS["h100"].products, "elementwise": 4.25 / 3.0}[name]
        assert first / second == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(
    ("overrides", "tensor", "fp8", "wanted"),
    [([], 1, "none", "compiled"), ([], 2, "none", "te"), ([], 1, "current", "te"), (["te"], 1, "none", "te"),
     (["local"], 1, "none", "compiled"), (["local"], 2, "none", "local")],
)  # fmt: skip
def test_layers_are_those_that_a_run_takes(overrides, tensor, fp8, wanted):
    config = load_config(None, [f"precision.layers={name}" for name in overrides])
    assert layers_of(config, tensor, fp8) == wanted


# ---------------------------------------------------------------------------------------------- what the command says


def told(capsys, *arguments: str) -> str:
    assert cli.main(["plan", LARGE, "--gpus", "1", "--gpu", "h200", "--top", "1", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_says_where_the_host_is_the_limit(capsys):
    small = ["precision.layers=te", "data.micro_batch_size=64", "precision.fp8=none"]
    out = told(capsys, *small)
    seconds, others = re.search(r"wait [\d.]+ of ([\d.]+) s for kernels to be launched: (.*)", out).groups()
    quicker = {key: float(number) for key, number in re.findall(r"([a-z][^;]*?) would make it ([\d.]+) s", others)}
    # (No graphs: those of a MUG with Transformer Engine's layers are refused.)
    assert {*quicker} == {"compiled layers (precision.layers=auto)", "data.micro_batch_size=128"}
    assert all(number < 0.95 * float(seconds) for number in quicker.values())
    # What it promises is what a plan of that says.
    for key in ("data.micro_batch_size=128",):
        config = load_config(LARGE, [*small, key])
        fixed = ("precision.fp8", "data.micro_batch_size", "parallel.recompute")
        best = planner.plan(config, 1, "h200", fixed=fixed).choices[0]
        assert best.times.total == pytest.approx(quicker[key], abs=6e-4)
    assert "for kernels to be launched" not in told(capsys, "data.micro_batch_size=256", "precision.layers=auto")


def test_the_command_says_whether_fp8_pays(capsys):
    eight, plain = map(float, re.search(r"FP8 does not pay at these widths: ([\d.]+) s a step against ([\d.]+) without",
                                        told(capsys)).groups())  # fmt: skip
    assert eight > plain
    keys = {"parallel.tensor": 2, "parallel.pipeline": 4, "parallel.virtual": 1, "parallel.recompute": "none"}
    config = load_config(ROOT / "examples/jam/jam_2x7b_64node.yaml", [f"{key}={value}" for key, value in keys.items()])
    wide = planner.plan(config, 64, "h100", fixed=keys)
    assert wide.choices[0].layout.fp8 != "none" and wide.choices[0].layout.layers == "te"
    from megamug.planner.report import text

    assert "FP8 (delayed) pays at these widths" in text(wide, 1)
    assert "FP8" not in told(capsys, "precision.fp8=none").split("FP8 or not.")[1]
