"""The checks of the GPU, on machines that are broken in one way each."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from tests.check_probes import GIB, GOOD, GPU, raising, with_gpu
from xicon_infer.checks import CheckNeeds, run_checks, sets_of
from xicon_infer.checks_gpu import SMI_LIMIT_S, conv3d_trap, provider_trap

NOTHING = CheckNeeds()


def result_of(name: str, probes=GOOD, needs: CheckNeeds = NOTHING):
    (result,) = [r for r in run_checks(needs, probes=probes) if r.name == name]
    return result


def modes(*names: str, **more) -> CheckNeeds:
    return CheckNeeds(modes={name: sets_of(name, None) for name in names}, **more)


def test_a_driver_that_hangs():
    hung = replace(GOOD, nvidia_smi=raising(subprocess.TimeoutExpired("nvidia-smi", 10)))
    assert result_of("nvidia-smi", hung).state == "fail"
    assert "10 s" in result_of("nvidia-smi", hung).text
    assert result_of("nvidia-smi", hung, CheckNeeds(gpu=False)).state == "warn"


def test_nvidia_smi_has_ten_seconds():
    seen = []
    probes = replace(GOOD, nvidia_smi=lambda limit_s: seen.append(limit_s) or "H100, 570.1")
    result_of("nvidia-smi", probes)
    assert seen == [SMI_LIMIT_S] == [10.0]


@pytest.mark.parametrize("error", [FileNotFoundError("nvidia-smi"), RuntimeError("code 9")])
def test_no_nvidia_smi_is_no_reason_to_stop(error):
    result = result_of("nvidia-smi", replace(GOOD, nvidia_smi=raising(error)))
    assert (result.state, str(error) in result.text) == ("warn", True)


def test_nvidia_smi_that_names_nothing():
    assert result_of("nvidia-smi", replace(GOOD, nvidia_smi=lambda _: "\n")).state == "warn"


@pytest.mark.parametrize(
    ("built_for", "driver", "state"),
    [
        ("12.8", "570.86", "ok"),
        ("12.8", "525.60", "ok"),
        ("12.8", "520.61", "fail"),
        ("13.0", "580.65", "ok"),
        ("13.2", "570.86", "fail"),
        ("", "470.1", "ok"),
        ("13.0", "[N/A]", "ok"),
    ],
)
def test_a_driver_that_is_too_old_for_pytorch(built_for, driver, state):
    smi = replace(GOOD, built_for=lambda: built_for, nvidia_smi=lambda _: f"H100, {driver}")
    result = result_of("nvidia-smi", smi)
    assert result.state == state
    assert ("too old" in result.text) == (state == "fail")


@pytest.mark.parametrize(
    ("capability", "state"), [((7, 5), "fail"), ((8, 0), "ok"), ((12, 0), "ok")]
)
def test_bfloat16_is_needed(capability, state):
    assert result_of("gpu", with_gpu(capability=capability)).state == state


def test_a_build_without_kernels_for_the_gpu():
    message = "CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA"
    result = result_of("kernels", replace(GOOD, matmul=raising(RuntimeError(message))))
    assert result.state == "fail"
    assert "no kernel image is available" in result.text
    assert "DSA" not in result.text
    assert "RTX 50" in result.fix


@pytest.mark.parametrize("mode", ["scail", "steady_dancer", "wan_i2v", "wan_t2v"])
def test_memory_for_every_mode(mode):
    plenty = result_of("memory", needs=modes(mode))
    assert (plenty.state, f"{mode} resident" in plenty.text) == ("ok", True)
    little = with_gpu(total_bytes=3 * GIB, free_bytes=3 * GIB)
    refused = result_of("memory", little, modes(mode))
    assert refused.state == "fail"
    assert f"{mode}: 'memory'" in refused.text
    assert "larger GPU" in refused.fix


def test_memory_follows_how_the_networks_shall_lie():
    card = with_gpu(total_bytes=24 * GIB, free_bytes=23 * GIB)
    assert result_of("memory", card, modes("scail")).state == "ok"
    assert result_of("memory", card, modes("scail", memory="stream")).text.endswith("scail stream")
    assert result_of("memory", card, modes("scail", memory="resident")).state == "fail"


def test_memory_of_wider_weights_and_of_the_small_model():
    card = with_gpu(total_bytes=24 * GIB, free_bytes=23 * GIB)
    narrow, wide = (
        result_of("memory", card, CheckNeeds(modes={"scail": (f"scail/{preset}",)})).text
        for preset in ("fp8", "bf16")
    )
    assert narrow != wide
    small = CheckNeeds(modes={"wan_t2v": ("wan_t2v/1.3b",)})
    assert "wan_t2v resident" in result_of("memory", card, small).text
    assert "wan_t2v resident" not in result_of("memory", card, modes("wan_t2v")).text


def test_modes_without_known_needs_are_not_refused_for_memory():
    card = with_gpu(total_bytes=4 * GIB, free_bytes=4 * GIB)
    assert result_of("memory", card, modes("pose_only")).state == "ok"
    assert result_of("memory", card, CheckNeeds(modes={"scail": ()})).state == "ok"


def test_one_mode_that_fits_is_enough_where_all_are_on_offer():
    card = with_gpu(total_bytes=8 * GIB, free_bytes=8 * GIB)
    sets = {"wan_t2v": ("wan_t2v/1.3b",), "scail": ("scail/bf16",)}
    strict = CheckNeeds(modes=sets, memory="resident")
    tiny_card = with_gpu(total_bytes=20 * GIB, free_bytes=20 * GIB)
    assert result_of("memory", tiny_card, strict).state == "fail"
    assert result_of("memory", tiny_card, replace(strict, any_mode=True)).state == "warn"
    assert result_of("memory", card, replace(strict, any_mode=True)).state == "fail"


def test_memory_that_something_else_holds():
    shared = with_gpu(total_bytes=80 * GIB, free_bytes=70 * GIB)
    result = result_of("memory", shared, modes("scail"))
    assert (result.state, "something else" in result.text) == ("warn", True)


@pytest.mark.parametrize(
    ("torch", "cudnn", "trapped"),
    [
        ("2.8.0", 90000, False),
        ("2.9.0", 91400, True),
        ("2.9.1+cu130", 91499, True),
        ("2.9.1", 91500, False),
        ("2.10.0", 91002, True),
        ("2.15.0+cu132", 91400, True),
        ("2.15.0", 92000, False),
        ("nightly", 0, False),
    ],
)
def test_slow_convolutions(torch, cudnn, trapped):
    assert bool(conv3d_trap(torch, cudnn)) == trapped
    result = result_of("cudnn", with_gpu(torch=torch, cudnn=cudnn))
    assert result.state == ("warn" if trapped else "ok")
    assert ("nvidia-cudnn-cu12" in result.fix) == trapped


def test_attention_kernels_and_why_not():
    result = result_of("attention")
    assert result.text == "cudnn, math; not flash3 (no such package)"
    assert result_of("attention", needs=CheckNeeds(attention=("cudnn",))).state == "ok"
    other = result_of("attention", needs=CheckNeeds(attention=("flash3", "flash2")))
    assert (other.state, "XICON_ATTENTION" in other.text) == ("warn", True)
    none = replace(GOOD, attention=lambda: [("math", "broken")])
    assert result_of("attention", none).state == "fail"


def test_fp8_ways_and_why_not():
    assert result_of("fp8").text == "dequant, scaled_mm_row, scaled_mm_tensor"
    ways = {"dequant": "", "scaled_mm_row": "needs 8.9"}
    without = replace(GOOD, fp8=lambda: ways)
    assert result_of("fp8", without).state == "warn"
    older = replace(without, gpu=lambda: replace(GPU, capability=(8, 6)))
    assert result_of("fp8", older).state == "ok"
    assert "scaled_mm_row (needs 8.9)" in result_of("fp8", older).text
    broken = replace(GOOD, fp8=lambda: {"dequant": "no float8"})
    assert result_of("fp8", broken).state == "fail"


def test_onnxruntime_that_falls_back():
    result = result_of("onnxruntime", replace(GOOD, onnx=lambda: ("cpu", "no kernel image")))
    assert (result.state, "no kernel image" in result.text) == ("warn", True)
    assert result_of("onnxruntime").state == "ok"


@pytest.mark.parametrize(
    ("providers", "gpu", "trapped"),
    [
        (["CUDAExecutionProvider", "CPUExecutionProvider"], True, False),
        (["CPUExecutionProvider"], True, True),
        (["CPUExecutionProvider"], False, False),
    ],
)
def test_onnxruntime_without_the_gpu(providers, gpu, trapped):
    assert ("onnxruntime-gpu" in provider_trap(providers, gpu=gpu)) == trapped
