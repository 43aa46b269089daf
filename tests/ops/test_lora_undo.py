"""Swapping LoRAs on one model: the way back is exact, and it is said where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.ops.test_lora import (
    FFN,
    HEAD,
    D,
    Q,
    close,
    full_lora,
    low_rank,
    make_model,
    outputs,
    random,
    same,
    snapshot,
)
from xicon_infer.errors import WeightsError
from xicon_infer.ops.linear import FP8_DTYPES, MATMULS, Fp8Linear, quantize_weight
from xicon_infer.ops.lora import MODES, REQUANTIZE, apply_loras, remove_loras
from xicon_infer.ops.lora_keys import LoraFile
from xicon_infer.ops.lora_undo import is_swappable, undo_bytes

FILES = [full_lora("a"), full_lora("b", 9), LoraFile("q", {Q: low_rank(D, D, seed=3)})]

steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.sampled_from(FILES), st.sampled_from([0.0, 1.0, -0.3])), max_size=3),
        st.sampled_from(MODES),
        st.sampled_from(REQUANTIZE),
    ),
    min_size=1,
    max_size=5,
)


def rows_fp8(model):
    """Gives the fp8 layers of a model one scale per row."""
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            wide = layer.weight.float() * layer.scale_weight
            layer.weight.data, layer.scale_weight = quantize_weight(wide, per_row=True)
    return model


@settings(max_examples=30, deadline=None)
@given(
    plan=steps,
    fp8=st.sampled_from([(), (Q,), (Q, FFN, HEAD)]),
    per_row=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_sequence_gives_what_a_fresh_model_gives(plan, fp8, per_row, dtype):
    def build():
        model = make_model(fp8=fp8, dtype=dtype)
        return rows_fp8(model) if per_row else model

    model = build()
    before, types = snapshot(model), [type(m) for m in model.modules()]
    for loras, mode, requantize in plan:
        fresh = build()
        done = apply_loras(model, loras, mode, requantize=requantize)
        assert apply_loras(fresh, loras, mode, requantize=requantize) == done
        assert same(snapshot(model), snapshot(fresh))
        assert close(outputs(model, dtype), outputs(fresh, dtype), atol=0)
    assert is_swappable(model)
    remove_loras(model)
    assert same(snapshot(model), before)
    assert [type(m) for m in model.modules()] == types
    assert undo_bytes(model) == 0


@pytest.mark.parametrize("requantize", REQUANTIZE)
def test_merging_into_scales_per_row(requantize):
    model = rows_fp8(make_model(fp8=(Q,)))
    layer, x = model.get_submodule(Q), random(5, D, seed=4)
    lora = FILES[2]
    apply_loras(model, [(lora, 1.0)])
    exact = layer(x)
    apply_loras(model, [(lora, 1.0)], "merge", requantize=requantize)
    shape = {"row": (D, 1), "tensor": (1,), "none": None}[requantize]
    assert (None if layer.scale_weight is None else tuple(layer.scale_weight.shape)) == shape
    limit = 1e-6 if requantize == "none" else 0.05
    assert (layer(x) - exact).norm() / exact.norm() < limit


@pytest.mark.parametrize("matmul", MATMULS)
def test_the_way_of_multiplying_survives_a_swap(matmul):
    model = make_model(fp8=(Q,))
    model.get_submodule(Q).matmul = matmul
    for mode in MODES:
        apply_loras(model, [(FILES[0], 1.0)], mode)
        assert model.get_submodule(Q).matmul == matmul
    remove_loras(model)
    assert model.get_submodule(Q).matmul == matmul


def test_bytes_are_those_of_what_was_changed():
    model = make_model(fp8=(Q,))
    assert undo_bytes(model) == 0
    apply_loras(model, [(FILES[2], 1.0)])
    assert undo_bytes(model) == 0, "a low-rank part beside the weight changes nothing"
    apply_loras(model, [(FILES[2], 1.0)], "merge")
    assert undo_bytes(model) == D * D + 4  # fp8, and its scale
    assert model.get_submodule(Q).weight.dtype in FP8_DTYPES


def test_without_undo():
    model = make_model()
    apply_loras(model, [(FILES[2], 1.0)], keep_undo=False)
    assert is_swappable(model), "side paths can always be taken off"
    apply_loras(model, [], "merge", keep_undo=False)
    assert is_swappable(model), "nothing was changed"
    apply_loras(model, [(FILES[2], 1.0)], "merge", keep_undo=False)
    assert not is_swappable(model)
    merged = snapshot(model)
    with pytest.raises(WeightsError, match="without an undo copy; load the model again"):
        apply_loras(model, [])
    assert same(snapshot(model), merged)


def test_parts_that_are_gone_are_named():
    model = make_model()
    apply_loras(model, [(FILES[0], 1.0)], "merge")
    del model["blocks"][0]["self_attn"]["q"]
    assert not is_swappable(model)
    with pytest.raises(WeightsError, match=r"self_attn\.q is no longer part of the model"):
        remove_loras(model)


def test_a_layer_replaced_by_another_kind_is_restored_by_parameter():
    """A convolution has no scale and keeps its class."""
    model = make_model()
    before = snapshot(model)
    apply_loras(model, [(FILES[0], 1.0)], "merge")
    remove_loras(model)
    assert isinstance(model["patch_embedding"], nn.Conv3d)
    assert same(snapshot(model), before)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_undo_copies_are_on_the_host_and_restore_a_gpu(mode):
    from xicon_infer.ops.lora_undo import find_changes

    model = make_model(fp8=(Q,)).to("cuda")
    before = snapshot(model)
    apply_loras(model, [(FILES[0], 1.0)], mode)
    assert {item.data.device.type for item in find_changes(model).saved} <= {"cpu"}
    remove_loras(model)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert same(snapshot(model), before)
