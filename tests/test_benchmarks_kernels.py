"""The benchmarks of products and of kernels, small and on the CPU."""

from __future__ import annotations

import json
from argparse import Namespace

import torch

from benchmarks import fused, gemm


def test_products(tmp_path):
    gemm.main(["--tiny", "--rounds", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "gemm_cpu_tiny.json").read_text())
    assert {"machine", "versions", "commit"} <= set(report)
    assert [case["product"] for case in report["cases"]] == list(gemm.SHAPES)
    for case in report["cases"]:
        ways = case["ways"]
        assert set(ways) == {
            *("bf16", "fp8 dequantised", "fp8 row", "fp8 tensor"),
            *("fp8 row, with the rounding pass", "fp8 tensor, with the rounding pass"),
        }
        assert ways["bf16"]["relative_error"] < 1e-2 < ways["fp8 row"]["relative_error"] < 0.1
        assert all(found["timed"] == 1 and found["tflop_per_s"] >= 0 for found in ways.values())
    assert "TFLOP/s" in gemm.table(report)


def test_kernels(tmp_path):
    fused.main(["--tiny", "--rounds", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "fused_cpu_tiny.json").read_text())
    assert set(report["left_out"]) == {"ours", "compile"}
    assert len({case["step"] for case in report["cases"]}) == 6
    for case in report["cases"]:
        assert case["forms"]["PyTorch"]["relative_error"] < 3e-2
    assert "GB/s" in fused.table(report)


def test_what_does_not_compile_is_left_out_with_its_reason(monkeypatch):
    def broken(*_):
        raise RuntimeError("no C compiler\ndetails")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    args, left_out = Namespace(device="cpu", rounds=1), {"ours": "needs a GPU"}
    step = fused.steps_of(4, fused.TINY, "cpu")[0]
    case = fused.measure_one(step, 4, left_out, args)
    assert list(case["forms"]) == ["PyTorch"]
    assert left_out["compile"] == "no C compiler"


def test_bytes_are_those_of_inputs_and_outputs():
    """What goes in and out once, without the vectors that all rows share."""
    tokens = 7
    for step in fused.steps_of(tokens, fused.TINY, "cpu"):
        read = [each for each in step.given if tokens in each.shape]
        made = step.plain(*step.given)
        made = made if isinstance(made, tuple) else (made,)
        big = [each for each in (*read, *made) if each.numel() > 2 * tokens]
        assert step.bytes == sum(each.numel() * each.element_size() for each in big), step.name


def test_a_product_that_does_not_run_is_named():
    def broken() -> torch.Tensor:
        raise RuntimeError("no such kernel\ndetails")

    assert gemm.refusal(broken) == "no such kernel"
