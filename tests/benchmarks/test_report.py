"""What a report holds, how two runs are compared, and what a profile says of names and of a step."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from megamug.benchmarks import _profile, _report
from megamug.errors import UserError


def reported(tmp_path, *argv: str, rate: float = 100.0, name: str = "bf16 megamug") -> dict:
    parser = _report.parser("mug", "text")
    parser.add_argument("--batch", type=int, default=4)
    report = _report.Report("mug", parser.parse_args(["--json", str(tmp_path / "new.json"), *argv]))
    report.add(name, images_per_second=rate, spread=0.1, mfu=None, mfu_denominator="a peak")
    report.finish()
    return json.loads((tmp_path / "new.json").read_text())


def test_fields(tmp_path):
    content = reported(tmp_path, "--batch", "8")
    assert content["benchmark"] == "mug" and content["settings"] == {"batch": 8}
    assert content["date"].endswith("+00:00") and content["command"].startswith("python ")
    assert content["hardware"]["cpus"] >= 1 and content["hardware"]["memory_gib"] > 0
    installed = content["versions"]["torch"]  # which may leave out what it was built for (+cu130)
    assert installed in (torch.__version__, torch.__version__.partition("+")[0]) and "python" in content["versions"]
    assert content["layout"] == {"processes": 1, "tensor": 1, "pipeline": 1, "virtual": 1, "data": 1}
    assert content["results"] == [
        {"name": "bf16 megamug", "images_per_second": 100.0, "spread": 0.1, "mfu_denominator": "a peak"}
    ]


def test_a_stored_run_is_compared(tmp_path, capsys):
    stored = reported(tmp_path)
    stored["hardware"]["processor"], stored["versions"]["torch"] = "another", "1.0"
    (tmp_path / "old.json").write_text(json.dumps(stored))
    compared = reported(tmp_path, "--batch", "8", "--compare", str(tmp_path / "old.json"), rate=150.0)["compared"]
    assert compared["ratios"] == {"bf16 megamug": {"images_per_second": 1.5}}  # a spread is not compared
    differences = "\n".join(compared["differences"])
    assert "hardware.processor: another -> " in differences and "versions.torch: 1.0 -> " in differences
    assert "settings.batch: 4 -> 8" in differences and len(compared["differences"]) == 3
    told = capsys.readouterr().out
    assert "bf16 megamug: images_per_second 1.50x" in told and "differs: settings.batch: 4 -> 8" in told


@pytest.mark.parametrize(
    "content, message",
    [(None, "cannot be read"), ("{", "cannot be read"), ('{"benchmark": "jam", "results": []}', "was not written by")],
)
def test_what_is_no_stored_run_is_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / "old.json").write_text(content)
    with pytest.raises(UserError, match=message):
        reported(tmp_path, "--compare", str(tmp_path / "old.json"))


def test_a_run_without_a_common_result_is_told(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(reported(tmp_path)))
    with pytest.raises(UserError, match="no result of this run is in there; it has bf16 megamug"):
        reported(tmp_path, "--compare", str(tmp_path / "old.json"), name="fp32 megamug")


@pytest.mark.parametrize(
    "part, names",
    [
        ("matrix products", ["aten::addmm", "aten::linear"]),
        ("matrix products", ["sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "aten::mm"]),
        ("matrix products", ["nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT"]),
        ("attention", ["aten::bmm", "megamug::attention_forward"]),
        ("attention", ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "FusedAttnFunc"]),
        ("norms", ["aten::mul", "autograd::engine::evaluate_function: NativeLayerNormBackward0"]),
        ("norms", ["void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<...>"]),
        ("losses", ["aten::sum", "aten::nll_loss_forward"]),
        ("losses", ["aten::_log_softmax", "aten::cross_entropy_loss"]),
        ("optimizer", ["aten::mul_", "optimizer"]),
        ("optimizer", ["multi_tensor_apply_kernel<AdamFunctor>"]),
        ("communication", ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "nccl:all_reduce"]),
        ("communication", ["gloo:all_reduce", "c10d::allreduce_", "optimizer"]),
        ("copies", ["Memcpy DtoD (Device -> Device)", "aten::copy_"]),
        ("copies", ["aten::index_select"]),
        ("elementwise", ["aten::gelu"]),
        ("elementwise", ["void at::native::vectorized_elementwise_kernel<4, AddFunctor>", "aten::add"]),
        ("other", ["aten::view"]),
    ],
)
def test_parts_are_told_by_names(part, names):
    assert _profile.part_of(names) == part


def test_a_profile_of_a_step(tmp_path):
    x, norm = torch.randn(256, 512, requires_grad=True), torch.nn.LayerNorm(512)
    weight = torch.randn(512, 2048, requires_grad=True)
    found = _profile.profile(lambda: (norm(x) @ weight).relu().sum().backward(), tmp_path / "p", "a b", lambda: None)
    assert found["trace"] == str(tmp_path / "p" / "a-b.trace.json")
    trace = json.loads((tmp_path / "p" / "a-b.trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    parts = {row["part"]: row for row in found["parts"]}
    assert {"matrix products", "norms", "elementwise"} <= {*parts} and "communication" not in parts
    assert parts["matrix products"]["largest"]["aten::mm"] > 0
    assert sum(row["seconds"] for row in found["parts"]) == pytest.approx(found["step_seconds"], rel=0.05)
    assert sum(row["share"] for row in found["parts"]) == pytest.approx(1, rel=0.05)
    assert "matrix products" in _profile.table(found)


def test_the_command_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/benchmark.py", "mug", "model.preset=a b"])
    assert reported(tmp_path)["command"] == "python tools/benchmark.py mug 'model.preset=a b'"
