"""Storage modes of a transformer: what they hold, what they cost in accuracy, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipelines.storage import STORAGES, apply_storage, swap_loras
from tests.pipelines.storage_models import (
    I2V,
    SCAIL,
    T2V,
    drift,
    load_model,
    lora_file,
    published_state,
    same,
    snapshot,
    velocity,
)
from xicon_infer.errors import BackendUnavailable, InvalidRequest, WeightsError
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.steady_dancer import SteadyDancerTransformer
from xicon_infer.ops.linear import FP8_DTYPES, MATMULS, Fp8Linear, dequantize
from xicon_infer.ops.lora import MODES
from xicon_infer.ops.lora_undo import is_swappable, undo_bytes

CPU = torch.device("cpu")
FILE = published_state()
NAMES = load_model(FILE).state_dict()
LORA = lora_file(NAMES, "one")
OTHER = lora_file(NAMES, "two", seed=9)


def true_velocity(loras):
    """One forward in float32 of weights merged by hand in float64, with plain linear layers."""
    state = {name: value for name, value in FILE.items() if name != "scaled_fp8"}
    scales = {name: state.pop(name) for name in list(state) if name.endswith("scale_weight")}
    for name, value in state.items():
        scale = scales.get(name.removesuffix("weight") + "scale_weight")
        wide = value.double() if scale is None else value.double() * scale.double()
        path, _, leaf = name.rpartition(".")
        for lora, strength in loras:
            delta = lora.deltas.get(path)
            part = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}.get(leaf)
            full = getattr(delta, part) if delta and part else None
            if full is not None:
                wide = wide + strength * full.double()
            if delta and leaf == "weight" and delta.up is not None:
                wide = wide + strength * delta.factor * (delta.up.double() @ delta.down.double())
        state[name] = wide.float()
    return velocity(load_model(state))


TRUE = true_velocity([(LORA, 0.8), (OTHER, -0.5)])
LORAS = [(LORA, 0.8), (OTHER, -0.5)]


def stored(storage, loras=LORAS, *, compute=torch.float32, fp8=True, **options):
    model = load_model(FILE if fp8 else published_state(fp8=False), compute=compute)
    return model, apply_storage(model, storage, loras, device=CPU, **options)


@pytest.mark.parametrize(
    ("storage", "compute", "limit"),
    [
        ("reference", torch.float32, 1e-5),
        ("merged-bf16", torch.float32, 1e-5),
        ("reference", torch.bfloat16, 2e-2),
        ("merged-bf16", torch.bfloat16, 1e-2),
        ("merged-fp8", torch.bfloat16, 4e-2),
        ("merged-fp8", torch.float32, 4e-2),
    ],
)
def test_drift_of_a_forward(storage, compute, limit):
    """Relative L2 of the velocity against float32 with weights merged in float64.

    What storing costs alone: fp8 layers are dequantised. Measured 5e-7, 3e-7, 1.0e-2, 0.9e-2,
    2.9e-2, 2.8e-2.
    """
    model, _ = stored(storage, compute=compute, matmul="dequant")
    error = drift(velocity(model), TRUE)
    assert error < limit
    if storage == "merged-fp8":
        assert error > 3e-3, "three bits of mantissa must be seen"


@pytest.mark.parametrize(
    ("matmul", "limit"),
    [("dequant", 4e-2), ("scaled_mm_row", 5e-2), ("scaled_mm_tensor", 6e-2)],
)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_drift_of_every_matmul(matmul, limit, compute):
    """Rounded activations come on top. Measured in bfloat16: 2.9e-2, 4.3e-2, 4.7e-2."""
    model, report = stored("merged-fp8", matmul=matmul, compute=compute)
    assert report.matmul == matmul
    y = velocity(model)
    assert y.dtype == torch.float32
    assert 2e-2 < drift(y, TRUE) < limit


def test_loras_change_the_result_more_than_any_storage():
    assert drift(velocity(load_model(FILE)), TRUE) > 0.2
    assert drift(true_velocity([(LORA, 0.8)]), TRUE) > 0.1


def test_what_each_storage_holds():
    reports = {storage: stored(storage)[1] for storage in STORAGES}
    linears = 12 * I2V.num_layers + 8  # blocks; text, time, image MLPs, head
    assert {s: r.fp8_layers for s, r in reports.items()} == {
        "reference": 12 * I2V.num_layers,
        "merged-bf16": 0,
        "merged-fp8": 12 * (I2V.num_layers - 2),
    }
    assert all(r.fp8_layers + r.wide_layers == linears for r in reports.values())
    wide, fp8 = reports["merged-bf16"], reports["merged-fp8"]
    # A block holds 10 weights of 64 x 64 and two of 64 x 96; fp8 saves three of four bytes.
    weights, rows = 10 * 64 * 64 + 2 * 64 * 96, 11 * 64 + 96
    assert wide.bytes - fp8.bytes == 3 * (3 * weights - 4 * rows)
    assert set(fp8.guarded.values()) == {
        "outside the blocks",
        "in the first block",
        "in the last block",
    }
    assert len(fp8.guarded) == fp8.wide_layers
    assert reports["reference"].guarded == wide.guarded == {}
    assert json.loads(json.dumps(fp8.as_dict()))["loras"] == [["one", 0.8], ["two", -0.5]]


def test_merged_bf16_is_plain_and_can_be_fused():
    model, _ = stored("merged-bf16", compute=torch.bfloat16)
    assert not any(isinstance(layer, Fp8Linear) for layer in model.modules())
    assert model.layers[1].ffn[0].weight.dtype == torch.bfloat16
    assert model.time_embedding[0].weight.dtype == torch.float32
    before = velocity(model)
    model.fuse_projections()
    assert drift(velocity(model), before) < 1e-2


def test_merged_fp8_has_scales_per_row():
    model, _ = stored("merged-fp8")
    layer = model.layers[2].ffn[0]
    assert layer.weight.dtype == FP8_DTYPES[0]
    assert layer.scale_weight.shape == (96, 1)
    assert type(model.layers[0].ffn[0]) is nn.Linear


def test_fp8_layers_that_no_lora_changes_keep_their_bytes():
    model, untouched = load_model(FILE), load_model(FILE)
    only = lora_file(NAMES, only="self_attn.q")
    apply_storage(model, "merged-fp8", [(only, 1.0)], device=CPU)
    for part, kept in (("k", True), ("q", False)):
        a = getattr(model.layers[2].self_attn, part)
        b = getattr(untouched.layers[2].self_attn, part)
        equal = torch.equal(a.weight.view(torch.uint8), b.weight.view(torch.uint8))
        assert equal == kept


def test_wide_models_become_fp8_and_stay_what_they_were():
    """A bf16 file: quantised where that is asked for, the same bytes in reference."""
    for storage, count in (("reference", 0), ("merged-bf16", 0), ("merged-fp8", 36)):
        model = load_model(published_state(fp8=False))
        before, expected = snapshot(model), velocity(model)
        report = apply_storage(model, storage, [], device=CPU)
        assert report.fp8_layers == count
        assert same(snapshot(model), before) == (count == 0)
        assert drift(velocity(model), expected) < 4e-2


def test_guard_names_a_layer_with_outliers():
    state = published_state(fp8=False)
    name = "blocks.2.ffn.0.weight"
    state[name] = state[name].clone()
    with pytest.MonkeyPatch.context() as patch:
        # Rows of 64 weights cannot exceed a ratio of 8: the threshold comes down to them.
        patch.setattr("xicon_infer.ops.fp8_guard.OUTLIER", 7.0)
        state[name][:2, 0] = 50.0
        model = load_model(state)
        report = apply_storage(model, "merged-fp8", [], device=CPU)
    assert [n for n in report.guarded if n.startswith("blocks.2.")] == [name]
    assert "2.1% of its rows" in report.guarded[name]
    assert type(model.layers[2].ffn[0]) is nn.Linear


def test_damaged_weights_are_named():
    state = published_state(fp8=False)
    state["blocks.2.ffn.0.weight"] = state["blocks.2.ffn.0.weight"] * torch.nan
    with pytest.raises(WeightsError, match=r"blocks\.2\.ffn\.0\.weight.*NaN"):
        apply_storage(load_model(state), "merged-fp8", [], device=CPU)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("fp8", [True, False])
def test_swapping_restores_every_bit(storage, fp8):
    model = load_model(published_state(fp8=fp8))
    before = snapshot(model)
    apply_storage(model, storage, LORAS, device=CPU, keep_undo=True)
    assert not same(snapshot(model), before)
    assert is_swappable(model)
    assert undo_bytes(model) > 0
    apply_storage(model, "reference", [], device=CPU)
    assert same(snapshot(model), before)
    assert undo_bytes(model) == 0


choices = st.tuples(
    st.sampled_from(STORAGES),
    st.lists(
        st.tuples(st.sampled_from([LORA, OTHER]), st.sampled_from([0.0, 0.5, -1.0])), max_size=2
    ),
    st.sampled_from([mode for mode in MODES if mode != "comfy_parity"]),
    st.sampled_from(("auto", *MATMULS)),
)


@settings(max_examples=12, deadline=None)
@given(steps=st.lists(choices, min_size=1, max_size=4), fp8=st.booleans())
def test_any_sequence_of_swaps_ends_where_a_fresh_model_does(steps, fp8):
    state = published_state(fp8=fp8)
    model = load_model(state)
    before = snapshot(model)
    for storage, loras, mode, matmul in steps:
        if matmul in MATMULS[1:] and (storage == "merged-bf16" or not fp8):
            matmul = "auto"
        options = {"lora_mode": mode, "matmul": matmul, "device": CPU}
        report = apply_storage(model, storage, loras, keep_undo=True, **options)
        fresh = load_model(state)
        expected = apply_storage(fresh, storage, loras, keep_undo=True, **options)
        assert same(snapshot(model), snapshot(fresh))
        assert report == expected
    assert torch.equal(velocity(model), velocity(fresh))
    apply_storage(model, "reference", [], device=CPU)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("storage", STORAGES)
def test_swap_loras_keeps_the_storage(storage):
    model, first = stored(storage, [(LORA, 1.0)], keep_undo=True)
    assert swap_loras(model, [(LORA, 1.0)]) is first, "the same LoRAs cost nothing"
    report = swap_loras(model, [(OTHER, 0.7)])
    fresh, expected = stored(storage, [(OTHER, 0.7)], keep_undo=True)
    assert report == expected
    assert same(snapshot(model), snapshot(fresh))
    assert torch.equal(velocity(model), velocity(fresh))
    other_mode = swap_loras(model, [(OTHER, 0.7)], "comfy_unmerged")
    assert other_mode.lora_warnings != report.lora_warnings


def test_a_merge_without_undo_cannot_be_swapped():
    for storage in ("merged-bf16", "merged-fp8"):
        model, report = stored(storage)
        merged = snapshot(model)
        assert (report.swappable, report.undo_bytes) == (False, 0)
        assert not is_swappable(model)
        with pytest.raises(WeightsError, match="without an undo copy; load the model again"):
            swap_loras(model, [(LORA, 1.0)])
        assert same(snapshot(model), merged)
    model, report = stored("reference", lora_mode="merge")
    assert not report.swappable


def test_beside_the_weights_is_always_swappable():
    _, report = stored("reference")
    assert report.swappable
    # Biases, norms and modulation only: 12 biases, 7 norm parameters and 6 x 64 per block.
    per_block = (11 * 64 + 96) + 7 * 64 + 6 * 64
    assert report.undo_bytes == 4 * per_block * I2V.num_layers


def test_fused_layers_cannot_be_put_back():
    model, _ = stored("merged-bf16", keep_undo=True)
    model.fuse_projections()
    assert not is_swappable(model)
    with pytest.raises(WeightsError, match=r"self_attn\.q is no longer part of the model"):
        swap_loras(model, [])


def test_swapping_needs_a_storage():
    with pytest.raises(InvalidRequest, match="call apply_storage first"):
        swap_loras(load_model(FILE), [])


@pytest.mark.parametrize(
    ("build", "config", "skipped"),
    [
        (ScailTransformer, SCAIL, 0),
        (SteadyDancerTransformer, I2V, 0),
        (None, T2V, 6 * T2V.num_layers - T2V.num_layers),
    ],
)
@pytest.mark.parametrize("storage", STORAGES)
def test_an_i2v_lora_on_every_model(build, config, skipped, storage):
    kind = {} if build is None else {"build": build}
    model = load_model(published_state(config, **kind), config, **kind)
    before = snapshot(model)
    report = apply_storage(model, storage, [(LORA, 1.0)], device=CPU, keep_undo=True)
    assert bool(report.lora_warnings) == bool(skipped)
    if skipped:  # a text model has no image keys and values: two pairs, two biases, one norm
        assert f"{skipped} parts not applied" in report.lora_warnings[0]
        assert "k_img" in report.lora_warnings[0]
    assert not same(snapshot(model), before)
    swap_loras(model, [])
    assert same(snapshot(model), before) == (storage == "reference")


def test_a_lora_that_fits_nowhere_changes_nothing():
    model, _ = stored("merged-fp8", keep_undo=True)
    before = snapshot(model)
    wider = published_state(replace(T2V, dim=128, ffn_dim=192), fp8=False)
    stranger = lora_file(wider, "stranger")
    for storage in STORAGES:
        with pytest.raises(WeightsError, match="stranger: none of its"):
            apply_storage(model, storage, [(stranger, 1.0)], device=CPU)
        assert same(snapshot(model), before)


def test_a_failure_half_way_puts_everything_back():
    model = load_model(FILE)
    before = snapshot(model)
    broken = lora_file(NAMES, "broken", only="blocks.3")
    broken.deltas["blocks.3.ffn.2"].down.fill_(torch.nan)
    with pytest.raises(WeightsError, match="NaN"):
        apply_storage(model, "merged-fp8", [(broken, 1.0)], device=CPU, keep_undo=True)
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "fp8"}, "storage: got 'fp8', allowed are reference"),
        ({"lora_mode": "side"}, "LoRA mode: got 'side'"),
        ({"matmul": "fast"}, "matmul: got 'fast'"),
        ({"storage": "merged-bf16", "lora_mode": "comfy_parity"}, "cannot be merged"),
        ({"storage": "merged-bf16", "matmul": "scaled_mm_row"}, "has none"),
        ({"loras": [(LORA, float("nan"))]}, "strength must be a number"),
        ({"storage": "merged-fp8", "loras": [(LORA, float("inf"))]}, "strength must be a number"),
    ],
)
def test_options_are_checked(options, message):
    model = load_model(FILE)
    before = snapshot(model)
    asked = {"storage": "reference", "loras": [], **options}
    with pytest.raises(InvalidRequest, match=message):
        apply_storage(model, asked.pop("storage"), asked.pop("loras"), device=CPU, **asked)
    assert same(snapshot(model), before)


def test_what_the_device_lacks():
    """The meta device multiplies nothing: asked for, an error; on auto, the next best."""
    meta = torch.device("meta")
    model = load_model(FILE)
    with pytest.raises(BackendUnavailable, match="scaled_mm_row"):
        apply_storage(model, "reference", [], matmul="scaled_mm_row", device=meta)
    assert apply_storage(model, "reference", [], device=CPU).matmul == "dequant"
    assert apply_storage(model, "merged-fp8", [], device=CPU).matmul == "scaled_mm_row"


def test_matmul_note_says_why():
    from pipelines.storage import _choose_matmul

    matmul, note = _choose_matmul("merged-fp8", "auto", torch.device("meta"))
    assert matmul == "dequant"
    assert note.count("does not work") == 2
    assert stored("merged-bf16")[1].matmul_note == "no layer is fp8"
    assert stored("reference", matmul="scaled_mm_tensor")[1].matmul_note == "as asked"


def test_dequantised_bytes_are_those_of_the_file():
    model, _ = stored("reference", [])
    layer = model.layers[1].ffn[0]
    stored_scale = FILE["blocks.1.ffn.0.scale_weight"]
    expected = FILE["blocks.1.ffn.0.weight"].float() * stored_scale
    assert torch.equal(dequantize(layer.weight, layer.scale_weight, torch.float32), expected)
