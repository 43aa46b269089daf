"""8-bit attention on the CPU: the kernel's twin, the gate, and the kernel in the interpreter."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.ops.attention_cases import drawn, error_of, exact, with_outlier
from xicon_infer.ops import attention_int8
from xicon_infer.ops.attention_gate import TOLERANCE, gate_error, gate_inputs, gate_reason
from xicon_infer.ops.attention_int8 import emulate, int8_attention

CPU = torch.device("cpu")
ROUGH = functools.partial(emulate, smooth=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_twin_is_near_the_formula_and_not_the_formula(dtype):
    q, k, v = drawn(600, 77, width=128, dtype=dtype)
    found = emulate(q, k, v)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert 1e-3 < error_of(found, exact(q, k, v)) < 0.02


def test_an_outlier_channel_needs_the_mean_taken_off():
    q, k, v = with_outlier(*drawn(40, 130))
    smooth, rough = (error_of(call(q, k, v), exact(q, k, v)) for call in (emulate, ROUGH))
    assert smooth < 0.02 < 5 * smooth < rough


def test_the_queries_own_scales_are_worth_their_place(monkeypatch):
    """The stated difference from the paper: a scale per query instead of one per 128."""
    each = gate_error(emulate, CPU, torch.float32, 128)
    quantize = attention_int8._quantize
    monkeypatch.setattr(
        attention_int8, "_quantize", lambda x, block: quantize(x, 128 if block == 1 else block)
    )
    assert each < 0.75 * gate_error(emulate, CPU, torch.float32, 128)


@pytest.mark.parametrize("width", [64, 128])
def test_the_gate_lets_the_kernel_through_and_not_one_without_smoothing(width):
    assert gate_reason(emulate, CPU, torch.float32, width) == ""
    assert gate_error(emulate, CPU, torch.float32, width) < 0.4 * TOLERANCE
    told = gate_reason(ROUGH, CPU, torch.float32, width)
    assert "more than the 0.05" in told


def test_the_gate_refuses_what_is_not_a_number():
    assert gate_reason(lambda q, k, v: q * float("nan"), CPU, torch.float32, 64)


def test_the_gate_always_measures_the_same():
    first, second = gate_inputs(64), gate_inputs(64)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert gate_inputs(128)[0].shape[-1] == 128


def test_it_is_one_operator():
    q, k, v = drawn(9, 12)
    assert torch.equal(int8_attention(q, k, v), emulate(q, k, v))
    with torch.device("meta"):
        shapes = [torch.empty(part.shape) for part in (q, k, v)]
    assert int8_attention(*shapes).shape == q.shape
    torch.library.opcheck(
        torch.ops.xicon_infer.int8_attention.default,
        (q, k, v),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="64 or 128, not 32"):
        int8_attention(*drawn(4, 4, width=32))


SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB that one program can have, by capability."""


def compiled(kernel, capability, types, constants, **options):
    """Returns a kernel compiled for a GPU that need not be there."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    return build(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Triton tells of a default that will change
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_listed_cut_compiles_for_its_gpu(capability, width):
    """With int8 products on tensor cores, and within the shared memory."""
    kernels = pytest.importorskip("xicon_infer.ops.attention_int8_triton")
    pointers = {"q": "*i8", "k": "*i8", "v": "*bf16", "out": "*bf16"}
    pointers |= {"q_scale": "*fp32", "k_scale": "*fp32", "stride_vb": "i64"}
    for config in kernels.configs_for(divmod(capability, 10), width):
        constants = {"WIDTH": width, "QUERIES": config.queries, "KEYS": 64}
        made = compiled(
            kernels.attention_kernel,
            capability,
            pointers,
            constants,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        assert "s8.s8" in made.asm["ptx"]
        assert made.metadata.shared <= 1024 * SHARED_MEMORY[capability]
    pointers = {"x": "*bf16", "mean": "*fp32", "out": "*i8", "scales": "*fp32", "factor": "fp32"}
    for smooth in (True, False):
        constants = {"WIDTH": width, "ROWS": 64, "SMOOTH": smooth, "BY_ROW": not smooth}
        assert compiled(kernels.quantize_kernel, capability, pointers, constants).asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_on_a_gpu_is_its_twin(width, dtype):
    parts = [part.cuda() for part in drawn(1100, 777, width=width, dtype=dtype, heads=4)]
    found = int8_attention(*parts)
    assert error_of(found.cpu(), emulate(*(part.cpu() for part in parts))) < 5e-3
    assert gate_reason(int8_attention, torch.device("cuda"), dtype, width) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_every_listed_cut_runs_on_this_gpu(width):
    kernels = pytest.importorskip("xicon_infer.ops.attention_int8_triton")
    parts = [part.cuda() for part in drawn(300, 200, width=width, dtype=torch.bfloat16)]
    mean = attention_int8.key_mean(parts[1])
    results = [
        kernels.launch(*parts, mean, config)
        for config in kernels.configs_for(torch.cuda.get_device_capability(), width)
    ]
    assert all(error_of(other, results[0]) < 1e-4 for other in results)
