"""Which kernels run between the products; the kernels themselves run in the interpreter."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops import fused_choice, fused_eager
from xicon_infer.ops.fused_choice import KERNELS, choose_kernels, kernels_problem, probe_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_cpu_is_eager():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        choice = choose_kernels("auto", CPU, dtype)
        assert choice.kernels == "eager" and "cpu" in choice.why
        assert choose_kernels("eager", CPU, dtype) == ("eager", "as asked")
    assert choose_kernels("triton", torch.device("meta"), torch.float32).kernels == "eager"


@pytest.mark.parametrize("requested", ["Triton", "fast", ""])
def test_unknown_names_are_refused(requested):
    with pytest.raises(BackendUnavailable, match="auto, eager, triton, compile") as caught:
        choose_kernels(requested, CPU, torch.float32)
    assert caught.value.field == "kernels"


def test_triton_needs_a_gpu_and_short_numbers():
    with pytest.raises(BackendUnavailable, match=r"cpu in float32: .*use 'auto'") as caught:
        choose_kernels("triton", CPU, torch.float32)
    assert caught.value.field == "kernels"
    assert "lose digits" in kernels_problem("triton", CPU, torch.float64)


def test_auto_takes_triton_where_it_runs(monkeypatch, caplog):
    fused_choice._say_once.cache_clear()
    monkeypatch.setattr(fused_choice, "kernels_problem", lambda *_: "")
    assert choose_kernels("auto", CUDA, torch.bfloat16).kernels == "triton"
    monkeypatch.setattr(fused_choice, "kernels_problem", lambda *_: "norm_rope is off by 3")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            choice = choose_kernels("auto", CUDA, torch.bfloat16)
    assert choice.kernels == "eager" and "norm_rope is off by 3" in choice.why
    assert [record.message for record in caplog.records] == [
        "kernels of Triton are not used on cuda: norm_rope is off by 3"
    ]
    with pytest.raises(BackendUnavailable, match="norm_rope is off by 3"):
        choose_kernels("triton", CUDA, torch.bfloat16)


def test_compile_wants_its_tools(monkeypatch):
    problem = fused_choice.kernels_problem.__wrapped__
    monkeypatch.setattr(fused_choice.shutil, "which", lambda name: None)
    assert "no C++ compiler" in problem("compile", CPU, torch.float32)
    monkeypatch.setattr(fused_choice.shutil, "which", lambda name: f"/bin/{name}")
    assert problem("compile", CPU, torch.float32) == ""
    monkeypatch.setattr(fused_choice, "find_spec", lambda name: None)
    assert "triton" in problem("compile", CUDA, torch.bfloat16)


def test_a_machine_without_triton(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(fused_choice.importlib, "import_module", missing)
    problem = fused_choice.kernels_problem.__wrapped__("triton", CUDA, torch.bfloat16)
    assert problem.startswith("Triton cannot be imported")


def test_every_kind_is_probed():
    assert [probe.kernels for probe in probe_kernels()] == list(KERNELS)
    assert probe_kernels()[0].why == ""


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_formulas_in_plain_pytorch():
    x, update, gate, scale, shift = drawn(5, 2, 3, 8)
    gate, scale, shift = (part[:, :1] for part in (gate, scale, shift))
    total, normed = fused_eager.norm_rows(x, update, gate, scale, shift, eps=1e-5, modulate=True)
    torch.testing.assert_close(total, x + gate * update)
    wide = F.layer_norm(total, (8,), eps=1e-5)
    torch.testing.assert_close(normed, wide * (1 + scale) + shift)
    weighed = fused_eager.norm_rows(x, None, None, scale, shift, eps=1e-5, modulate=False)
    assert weighed[0] is x
    torch.testing.assert_close(weighed[1], F.layer_norm(x, (8,), eps=1e-5) * scale + shift)
    plain = fused_eager.rms_rope(x, scale[0, 0], None, eps=1e-5)
    torch.testing.assert_close(plain, F.rms_norm(x, (8,), scale[0, 0], eps=1e-5))


def test_rows_come_back_to_one_step_of_e4m3():
    x = drawn(4, 64).float()
    values, scale = fused_eager.quantize(x)
    back = values.float() * scale
    assert bool(((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all())
    assert values.float().abs().amax(1).tolist() == [448.0] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype):
    assert kernels_problem("triton", CUDA, dtype) == ""
    assert choose_kernels("auto", CUDA, dtype).kernels == "triton"


def signature(kernel, *, fp8, optional):
    """Returns types of a kernel's arguments as in a block in bf16; None for those left out."""
    numbers = {"tokens": "i32", "width": "i32", "eps": "fp32"}
    pointers = {
        **dict.fromkeys(("x", "update", "more", "weight", "total"), "*bf16"),
        **dict.fromkeys(("gate", "scale", "shift", "cos", "sin", "out_scale"), "*fp32"),
        "out": "*fp8e4nv" if fp8 else "*bf16",
    }
    found = {}
    for name in kernel.arg_names:
        left_out = name in ("update", "more", "gate", "cos", "sin") and not optional
        known = numbers | pointers
        kind = "constexpr" if name.isupper() or left_out else known.get(name, "i64")
        found[name] = kind
    return found


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_kernels_become_machine_code(capability, optional, monkeypatch, tmp_path):
    """No GPU is needed to compile for one."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from xicon_infer.ops import fused_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fp8 = capability >= 89
    fixed = {"BLOCK": 8192, "SOFT": False, "NORM": 1, "FP8": fp8, "PAIRS": 64, "GELU": True}
    kernels = [fused_triton._norm_kernel, fused_triton._rms_rope_kernel]
    for kernel in kernels + [fused_triton._quantize_kernel] * fp8:
        rounds = fp8 and kernel is not fused_triton._rms_rope_kernel
        kinds = signature(kernel, fp8=rounds, optional=optional)
        constants = {n: fixed.get(n) for n, kind in kinds.items() if kind == "constexpr"}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = triton.compile(
            ASTSource(fn=kernel, signature=kinds, constexprs=places),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 8, "enable_fp_fusion": True},
        )
        assert len(made.asm["cubin"]) > 1000
