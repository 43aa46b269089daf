"""`doctor --selftest` and `--parity`: what is computed, and that a wrong result is found."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xicon_infer import doctor_selftest
from xicon_infer.doctor_parity import read_lines, replay
from xicon_infer.doctor_selftest import (
    ROUNDING,
    attention_numbers,
    convolution_rounding,
    fp8_numbers,
    pick,
    relative,
    rope_number,
    self_test,
    transformer_number,
    vae_numbers,
)
from xicon_infer.doctor_text import Number, format_numbers
from xicon_infer.errors import BackendUnavailable
from xicon_infer.run import main

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def numbers():
    return {dtype: self_test(CPU, dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_agrees_with_itself_well_within_the_tolerance(numbers, dtype):
    for number in numbers[dtype]:
        assert number.skip or number.error * 3 <= number.tolerance, number


def test_what_is_compared(numbers):
    names = {number.name for number in numbers[torch.float32]}
    expected = {"attention math", "attention flash3", "position embedding", "fp8 dequant"}
    expected |= {"fp8 scaled_mm_row", "transformer", "vae decode", "vae encode"}
    assert expected | {"vae pieces of 1 and 4"} <= names
    assert all(number.tolerance > 0 for number in numbers[torch.float32])


def test_the_dtype_decides(numbers):
    wide, narrow = ({n.name: n for n in numbers[d]} for d in (torch.float32, torch.bfloat16))
    for name in ("attention math", "position embedding", "transformer", "vae decode"):
        assert narrow[name].error > 10 * wide[name].error
        assert narrow[name].tolerance > wide[name].tolerance


def test_every_kernel_that_is_absent_says_why(numbers):
    absent = [n for n in numbers[torch.float32] if n.skip]
    assert absent
    assert not any(number.ok for number in absent)


def wrong(monkeypatch, name: str, change) -> None:
    """Makes what a function of the self-test returns wrong."""
    right = getattr(doctor_selftest, name)
    monkeypatch.setattr(doctor_selftest, name, lambda *a, **k: change(right(*a, **k)))


def failed(found) -> bool:
    return any(not number.ok and not number.skip for number in found)


def test_a_wrong_attention_is_found(monkeypatch):
    wrong(monkeypatch, "attention", lambda out: out * 1.001)
    assert failed(attention_numbers(CPU, torch.float32))


def test_a_wrong_position_embedding_is_found(monkeypatch):
    wrong(monkeypatch, "grid_rope", lambda rope: rope._replace(sin=-rope.sin))
    right = doctor_selftest.apply_rope
    monkeypatch.setattr(
        doctor_selftest, "apply_rope", lambda x, rope: right(x, rope._replace(sin=-rope.sin))
    )
    assert failed([rope_number(CPU, torch.float32)])


def test_a_wrong_scale_is_found(monkeypatch):
    right = doctor_selftest.quantize_weight
    monkeypatch.setattr(
        doctor_selftest.Fp8Linear, "forward", lambda self, x: x @ self.weight.to(x.dtype).T
    )
    monkeypatch.setattr(doctor_selftest, "quantize_weight", right)
    assert failed(fp8_numbers(CPU, torch.float32))


def test_a_wrong_network_is_found(monkeypatch):
    wrong(monkeypatch, "relative", lambda error: error + 0.5)
    assert failed([transformer_number(CPU, torch.float32)])
    assert failed(vae_numbers(CPU, torch.float32))


def test_numbers_that_are_none_fail():
    assert not Number("a", float("nan"), 1.0).ok
    assert not Number("a", float("inf"), 1.0).ok
    assert not Number("a", 2.0, 1.0).ok
    assert Number("a", 1.0, 1.0).ok
    assert relative(torch.full((2,), float("nan")), torch.ones(2)) != 0
    skipped = Number("b", float("nan"), 1.0, "no GPU")
    fail, skip = format_numbers([Number("a", 2.0, 1.0), skipped])
    assert "nan" not in skip
    assert fail.endswith("FAIL")
    assert skip.endswith("skip: no GPU")


def test_device_and_dtype_by_name():
    assert pick("cpu", "fp16") == (CPU, torch.float16)
    assert pick("cpu", "auto") == (CPU, torch.float32)


def test_float32_convolutions_of_a_gpu_are_rounded():
    assert convolution_rounding(CPU, torch.float32) == ROUNDING[torch.float32]
    gpu = torch.device("cuda")
    assert convolution_rounding(gpu, torch.float32) == ROUNDING[torch.float16]
    assert convolution_rounding(gpu, torch.bfloat16) == ROUNDING[torch.bfloat16]


def test_the_command_gives_json_and_a_code(monkeypatch, capsys):
    given = [Number("a", 1e-7, 1e-5), Number("b", float("nan"), 1.0, "no GPU")]
    monkeypatch.setattr(doctor_selftest, "self_test", lambda device, dtype: given)
    assert main(["doctor", "--selftest", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["device"], report["dtype"], report["ok"]) == ("cpu", "float32", True)
    assert [check["error"] for check in report["checks"]] == [1e-7, None]
    given[0] = replace(given[0], error=1.0)
    assert main(["doctor", "--selftest", "--device", "cpu"]) == 6
    out = capsys.readouterr().out
    assert "1.00e+00   1.00e-05  FAIL" in out
    assert "DOES NOT COMPUTE" in out


# ---- parity --------------------------------------------------------------------------------


def test_lines_of_the_replays_are_read():
    text = "x:y z  1.20e-07   1.00e-05  ok\nq.json        nan   0.00e+00  SKIP other kind\n"
    text += "bad       3.00e-01   1.00e-05  FAIL\n2 ok  1 FAIL  1 SKIP\n"
    first, second, third = read_lines(text)
    assert (first.name, first.error, first.tolerance, first.ok) == ("x:y z", 1.2e-7, 1e-5, True)
    assert (second.skip, second.ok) == ("other kind", False)
    assert (third.skip, third.ok) == ("", False)


def test_a_folder_of_reference_outputs_is_replayed():
    numbers = replay(ROOT / "tests" / "golden" / "keys")
    assert numbers
    assert not failed(numbers)


def test_parity_needs_the_source(tmp_path):
    with pytest.raises(BackendUnavailable, match="--selftest"):
        replay(None, root=tmp_path)
    with pytest.raises(BackendUnavailable, match="nothing was replayed"):
        replay(tmp_path)


def test_parity_is_told_with_the_self_test(monkeypatch, capsys):
    def told(golden, device, dtype):
        return [Number(f"{device} {dtype}", 0.0, 1.0)]

    monkeypatch.setattr("xicon_infer.doctor_parity.replay", told)
    monkeypatch.setattr(doctor_selftest, "self_test", lambda device, dtype: [])
    for dtype, name in (("fp32", "cpu float32"), ("bf16", "cpu bfloat16")):
        assert main(["doctor", "--parity", "--device", "cpu", "--dtype", dtype, "--json"]) == 0
        assert [c["name"] for c in json.loads(capsys.readouterr().out)["checks"]] == [name]


def test_the_dtype_changes_what_is_allowed(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "x  1.20e-07   1.00e-05  ok\n", "")

    monkeypatch.setattr("xicon_infer.doctor_parity.subprocess.run", run)
    replay(None, device="cuda", dtype="bfloat16")
    replay(None)
    assert commands[0][3:7] == ["--device", "cuda", "--dtype", "bf16"]
    assert commands[1][3:7] == ["--device", "cpu", "--dtype", "fp32"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gpu_computes_what_the_cpu_does(dtype):
    assert not failed(self_test(torch.device("cuda"), dtype))
