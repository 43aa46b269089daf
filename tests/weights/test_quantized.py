"""Scales find their weights under every spelling, and nothing that is no number gets past."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xicon_infer.errors import WeightsError
from xicon_infer.ops.linear import FP8_DTYPES, quantize_weight
from xicon_infer.weights.checkpoint import open_checkpoint
from xicon_infer.weights.quantized import (
    check_finite,
    check_metadata,
    check_scales,
    dequantize_state,
    find_scales,
    list_names,
    not_finite,
    refuse_integers,
    scale_names,
)

E4, E5 = FP8_DTYPES
PATH = Path("m.safetensors")
ALIGN = "condition_embedding_align.cross_attn"


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ("blocks.0.ffn.0.weight", "blocks.0.ffn.0.scale_weight"),
        ("blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight_scale"),
        ("blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight.scale_weight"),
        (f"{ALIGN}.in_proj_weight", f"{ALIGN}.in_proj_scale_weight"),
        (f"{ALIGN}.in_proj_weight", f"{ALIGN}.in_proj_weight_scale"),
        (f"{ALIGN}.in_proj_weight", f"{ALIGN}.in_proj_weight.scale_weight"),
        (f"{ALIGN}.in_proj_weight", f"{ALIGN}.in_proj_weight.weight_scale"),
        ("blocks.0.modulation", "blocks.0.modulation.scale_weight"),
        ("blocks.0.modulation", "blocks.0.modulation_scale"),
    ],
)
@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_spellings_of_a_scale(weight, scale, dtype):
    assert scale in scale_names(weight)
    assert find_scales({weight: dtype, scale: torch.float32}) == {weight: scale}
    assert find_scales({weight: torch.bfloat16, scale: torch.float32}) == {}
    assert find_scales({weight: dtype, f"other.{scale}": torch.float32}) == {}
    value = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    stored, factor = quantize_weight(value, dtype, per_row=True)
    found = dequantize_state({weight: stored, scale: factor}, torch.float32, "m")
    assert found.keys() == {weight}
    assert torch.equal(found[weight], stored.float() * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_dequantised_once_in_float32(dtype, scale_dtype):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(E4)
    scale = torch.tensor([0.3], dtype=scale_dtype)
    state = {"a.weight": weight, "a.scale_weight": scale, "b": torch.ones(2, dtype=torch.bfloat16)}
    found = dequantize_state(state, dtype, "m")
    assert torch.equal(found["a.weight"], (weight.float() * scale.float()).to(dtype))
    assert found["b"] is state["b"]
    plain = dequantize_state({"a.weight": weight}, dtype, "m")
    assert torch.equal(plain["a.weight"], weight.to(dtype))


ODD = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1e-9]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_scales_are_named(value, shape, dtype):
    scale = torch.ones(shape, dtype=dtype)
    scale.view(-1)[-1] = value
    state = {"a.weight": torch.ones(4, 2).to(E4), "a.scale_weight": scale}
    with pytest.raises(WeightsError, match=r"m: scales that are zero.*: a\.scale_weight\."):
        check_scales("m", state, {"a.weight": "a.scale_weight"})
    scale.view(-1)[-1] = 1e-30
    check_scales("m", state, {"a.weight": "a.scale_weight"})


@pytest.mark.parametrize("shape", [(3,), (2,), (4, 2), (1, 4), (0,)])
def test_scales_of_a_wrong_shape_are_named(shape):
    state = {"a.weight": torch.ones(4, 2).to(E4), "s": torch.ones(shape)}
    with pytest.raises(WeightsError, match=r"wrong shape: s \(.*\) for 4 rows"):
        check_scales("m", state, {"a.weight": "s"})


def test_many_odd_scales_are_counted():
    state, scales = {}, {}
    for n in range(11):
        state |= {f"{n}.weight": torch.ones(2, 2).to(E4), f"{n}.scale_weight": torch.zeros(())}
        scales[f"{n}.weight"] = f"{n}.scale_weight"
    with pytest.raises(WeightsError, match=r"7\.scale_weight and 3 more\."):
        check_scales("m", state, scales)
    assert list_names(map(str, range(8))) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert list_names([]) == ""


def test_scales_without_values_pass():
    state = {
        "a.weight": torch.ones(4, 2, device="meta").to(E4),
        "s": torch.zeros((), device="meta"),
    }
    check_scales("m", state, {"a.weight": "s"})


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_every_byte_of_fp8_is_judged_right(dtype):
    """Against the conversion to float32, which knows every NaN and infinity."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every.float().isfinite()
    for number, expected in zip(every, finite, strict=True):
        assert (not_finite({"a": number.reshape(1)}) == []) == bool(expected)
    assert not_finite({"a": every[finite]}) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 2**22 - 1, 2**22, -1])
def test_one_bad_number_among_many(dtype, value, place):
    tensor = torch.zeros(2**22 + 3, dtype=dtype)
    assert not_finite({"a": tensor}) == []
    tensor[place] = value
    assert not_finite({"a": tensor, "b": torch.ones(2)}) == ["a"]
    with pytest.raises(WeightsError, match="m: 1 tensors hold NaN or infinity: a"):
        check_finite("m", {"a": tensor})


def test_integers_are_finite():
    check_finite("m", {"a": torch.ones(2, dtype=torch.uint8), "b": torch.zeros(0)})


def metadata(layers):
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def test_metadata_of_mixed_precision():
    layers = {"a": {"format": "float8_e4m3fn"}, "b": {"format": "float8_e5m2"}}
    check_metadata(PATH, metadata(layers), {"a.weight": E4, "b.weight": E5, "c.weight": E4})
    check_metadata(PATH, metadata(layers), {"c.weight": torch.float32})
    check_metadata(PATH, {"format": "pt"}, {})
    for wrong in (E5, torch.bfloat16, torch.uint8):
        with pytest.raises(WeightsError, match=r"layer a should be float8_e4m3fn .* stored as"):
            check_metadata(PATH, metadata(layers), {"a.weight": wrong, "b.weight": E5})
    with pytest.raises(WeightsError, match="layer a is quantised as nvfp4, allowed: float8_e4m3fn"):
        check_metadata(PATH, metadata({"a": {"format": "nvfp4"}}), {})


@pytest.mark.parametrize("name", ["blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight._data"])
def test_integer_weights_are_refused(tmp_path, name):
    """quanto's files (`_data`, `_scale`) and LightX2V's int8."""
    refuse_integers(PATH, {name: torch.bfloat16, "ids": torch.int8})
    with pytest.raises(WeightsError, match=r"1 weights are quantised as int8.*ffn\.0\.weight"):
        refuse_integers(PATH, {name: torch.int8})
    save_file({name: torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=r"Use a bf16, fp8 or GGUF file"):
        open_checkpoint(tmp_path / "m.safetensors")
