"""Applying LoRAs: beside or into the weights, exactly, and off again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.parity.golden import Golden
from tests.parity.weights import replay_lora_merge
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.ops.linear import FP8_DTYPES, Fp8Linear, dequantize, quantize_weight
from xicon_infer.ops.lora import MODES, LoraLinear, apply_loras, merge_state_dict, remove_loras
from xicon_infer.ops.lora_keys import LoraDelta, LoraFile

GOLDEN = Path(__file__).parents[1] / "golden"
D, R = 16, 3
Q, K, FFN, HEAD = "blocks.0.self_attn.q", "blocks.0.self_attn.k", "blocks.0.ffn.0", "head.head"


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_model(*, fp8=(), fused=False, dtype=torch.float32):
    """A module tree with Wan's names: one block, a head, a patch embedding."""
    torch.manual_seed(1)
    names = ("qkv",) if fused else ("q", "k", "v")
    attention = nn.ModuleDict({n: nn.Linear(D, D * (3 if fused else 1)) for n in names})
    attention["norm_q"] = nn.LayerNorm(D)
    block = nn.ModuleDict({"self_attn": attention, "norm3": nn.LayerNorm(D)})
    block["ffn"] = nn.ModuleDict({"0": nn.Linear(D, 24), "2": nn.Linear(24, D, bias=False)})
    block.modulation = nn.Parameter(torch.zeros(1, 6, D))
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    model["head"] = nn.ModuleDict({"head": nn.Linear(D, 8)})
    model["patch_embedding"] = nn.Conv3d(4, D, (1, 2, 2), stride=(1, 2, 2))
    model = model.to(dtype).requires_grad_(False)
    for name in fp8:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        layer = Fp8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight.data, layer.scale_weight = quantize_weight(linear.weight)
        layer.bias = linear.bias
        model.get_submodule(parent)[leaf] = layer
    return model


def low_rank(out, width, *, seed=0, factor=1.0, scale=0.1):
    down, up = random(R, width, seed=seed), random(out, R, seed=seed + 1, scale=scale)
    return LoraDelta(down=down, up=up, factor=factor)


def full_lora(name="full", seed=0):
    deltas = {
        Q: low_rank(D, D, seed=seed, factor=0.5),
        FFN: LoraDelta(
            down=random(R, D, seed=seed), up=random(24, R, seed=9), diff_b=random(24, seed=seed + 2)
        ),
        HEAD: LoraDelta(diff=random(8, D, seed=seed + 3), diff_b=random(8, seed=seed + 4)),
        "blocks.0.norm3": LoraDelta(diff=random(D, seed=seed + 5), diff_b=random(D, seed=6)),
        "blocks.0": LoraDelta(diff_m=random(1, 6, D, seed=seed + 7)),
        "patch_embedding": LoraDelta(
            down=random(R, 4, 1, 2, 2, seed=seed + 8), up=random(D, R, 1, 1, 1, seed=9)
        ),
    }
    return LoraFile(name, deltas)


def snapshot(model):
    return {
        name: (value.dtype, value.clone().contiguous().view(torch.uint8))
        for name, value in model.state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name][0] == b[name][0] and torch.equal(a[name][1], b[name][1]) for name in a
    )


def outputs(model, dtype=torch.float32):
    x = random(5, D, seed=42).to(dtype)
    names = [name for name in (Q, "blocks.0.self_attn.qkv", FFN, HEAD) if has(model, name)]
    values = [model.get_submodule(name)(x) for name in names]
    values.append(model["patch_embedding"](random(1, 4, 2, 4, 4, seed=3).to(dtype)))
    norm = model["blocks"][0]["norm3"]
    return [*values, norm.weight, norm.bias, model["blocks"][0].modulation]


def has(model, name):
    return name in dict(model.named_modules())


def close(a, b, atol=2e-5):
    return all(torch.allclose(x, y, atol=atol, rtol=1e-5) for x, y in zip(a, b, strict=True))


def test_golden():
    """ComfyUI comfy/lora.py after the wrapper's key standardisation; float32, 1e-5."""
    checks = replay_lora_merge(Golden(GOLDEN / "wan_core" / "lora_merge.safetensors", []))
    assert len(checks) > 80
    assert [check for check in checks if not check.ok] == []


def test_beside_equals_merged_equals_formula():
    beside, merged = make_model(), make_model()
    expected = F.linear(random(5, D, seed=42), *_formula(beside, full_lora(), FFN, 0.7))
    apply_loras(beside, [(full_lora(), 0.7)], "full")
    apply_loras(merged, [(full_lora(), 0.7)], "merge")
    assert isinstance(beside.get_submodule(FFN), LoraLinear)
    assert type(merged.get_submodule(FFN)) is nn.Linear
    torch.testing.assert_close(beside.get_submodule(FFN)(random(5, D, seed=42)), expected)
    assert close(outputs(beside), outputs(merged))
    assert not close(outputs(beside), outputs(make_model()))


def _formula(model, lora, path, strength):
    layer, delta = model.get_submodule(path), lora.deltas[path]
    weight = layer.weight + strength * delta.factor * (delta.up @ delta.down)
    return weight, layer.bias + strength * delta.diff_b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_compute_dtypes(dtype):
    beside, merged = make_model(dtype=dtype), make_model(dtype=dtype)
    apply_loras(beside, [(full_lora(), 0.7)], "full")
    apply_loras(merged, [(full_lora(), 0.7)], "merge")
    found, expected = outputs(beside, dtype), outputs(merged, dtype)
    assert {value.dtype for value in found} == {dtype}
    limit = 1e-6 if dtype == torch.float64 else 2e-2
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= limit * b.double().norm()


def test_layers_take_any_number_of_axes():
    model = make_model()
    apply_loras(model, [(full_lora(), 1.0)])
    x, layer = random(2, 3, D), model.get_submodule(Q)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fp8", [(), (Q, FFN, HEAD)])
def test_removing_restores_every_bit(mode, fp8):
    model = make_model(fp8=fp8)
    before, types = snapshot(model), [type(m) for m in model.modules()]
    parameters = dict(model.named_parameters())
    for requantize in ("row", "tensor", "none"):
        apply_loras(
            model, [(full_lora(), 1.0), (full_lora("b", 9), -0.3)], mode, requantize=requantize
        )
        gone = set(before) ^ set(model.state_dict())
        assert all(name.endswith(".scale_weight") for name in gone)
        remove_loras(model)
        assert same(snapshot(model), before)
        assert [type(m) for m in model.modules()] == types
        assert all(parameters[name] is p for name, p in model.named_parameters())
    remove_loras(model)  # nothing left to remove


@pytest.mark.parametrize("mode", MODES)
def test_several_add_and_strength_zero_is_left_out(mode):
    a, b = full_lora("a"), full_lora("b", seed=20)
    model, alone, sum_of = make_model(fp8=(Q,)), make_model(fp8=(Q,)), make_model(fp8=(Q,))
    base = outputs(model)
    report = apply_loras(model, [(a, 0.5), (b, 1.0), (a, 0.0)], mode, requantize="none")
    apply_loras(sum_of, [(b, 1.0), (a, 0.25), (a, 0.25)], mode, requantize="none")
    apply_loras(alone, [(a, 0.5)], mode, requantize="none")
    assert close(outputs(model), outputs(sum_of))
    assert not close(outputs(model), outputs(alone))
    assert {item.lora for item in report.skipped} <= {"a", "b"}
    apply_loras(model, [(a, 0.0)], mode)
    assert close(outputs(model), base, atol=0)


@settings(max_examples=25, deadline=None)
@given(s=st.floats(-2, 2, allow_nan=False), seed=st.integers(0, 50))
def test_opposite_strengths_cancel(s, seed):
    model, lora = make_model(), full_lora(seed=seed)
    base = outputs(model)
    apply_loras(model, [(lora, s), (lora, -s)])
    assert close(outputs(model), base, atol=1e-4)


def test_applying_again_replaces():
    model, once = make_model(fp8=(Q,)), make_model(fp8=(Q,))
    for mode in ("full", "merge", "full"):
        apply_loras(model, [(full_lora(), 1.0)], mode)
    apply_loras(once, [(full_lora(), 1.0)], "full")
    assert close(outputs(model), outputs(once), atol=0)
    apply_loras(model, [])
    assert close(outputs(model), outputs(make_model(fp8=(Q,))), atol=0)


def test_fp8_stays_exact_beside_and_changes_when_merged():
    lora = LoraFile("q", {Q: low_rank(D, D)})
    model = make_model(fp8=(Q,))
    layer, x = model.get_submodule(Q), random(5, D, seed=4)
    bytes_before = layer.weight.clone().view(torch.uint8)
    wide = dequantize(layer.weight, layer.scale_weight, torch.float32)
    exact = F.linear(x, wide + lora.deltas[Q].up @ lora.deltas[Q].down, layer.bias)
    apply_loras(model, [(lora, 1.0)])
    assert torch.equal(layer.weight.view(torch.uint8), bytes_before)
    torch.testing.assert_close(layer(x), exact)
    errors = {}
    for requantize in ("row", "tensor", "none"):
        apply_loras(model, [(lora, 1.0)], "merge", requantize=requantize)
        shape = None if layer.scale_weight is None else tuple(layer.scale_weight.shape)
        errors[requantize] = ((layer(x) - exact).norm() / exact.norm()).item()
        assert shape == {"row": (D, 1), "tensor": (1,), "none": None}[requantize]
        assert (layer.weight.dtype in FP8_DTYPES) == (requantize != "none")
    assert errors["none"] < 1e-6 < errors["row"] < 0.05
    assert errors["tensor"] not in (errors["row"], errors["none"])


def test_full_difference_on_an_fp8_weight_makes_it_wide():
    lora = LoraFile("d", {Q: LoraDelta(down=random(R, D), up=random(D, R), diff=random(D, D))})
    model, plain = make_model(fp8=(Q,)), make_model()
    layer = model.get_submodule(Q)
    plain.get_submodule(Q).weight.data = dequantize(layer.weight, layer.scale_weight, torch.float32)
    apply_loras(model, [(lora, 0.5)])
    apply_loras(plain, [(lora, 0.5)])
    assert layer.weight.dtype == torch.float32
    assert torch.allclose(layer(random(4, D)), plain.get_submodule(Q)(random(4, D)), atol=1e-5)


def test_comfy_modes_change_linear_weights_outside_the_head_only():
    full, comfy = make_model(), make_model()
    whole = apply_loras(full, [(full_lora(), 1.0)], "full")
    report = apply_loras(comfy, [(full_lora(), 1.0)], "comfy_unmerged")
    assert whole.skipped == ()
    assert report.applied == (f"{FFN}.weight", f"{Q}.weight")
    skipped = {item.name for item in report.skipped}
    assert skipped == set(whole.applied) - set(report.applied)
    assert "norm3.bias" in report.warnings()[0]
    assert "and 1 more" in report.warnings()[0]
    assert not close(outputs(full), outputs(comfy))


def test_comfy_parity_loses_the_lora_on_short_inputs_only():
    lora = LoraFile("q", {Q: low_rank(D, D)})
    model = make_model(fp8=(Q,))
    layer, short, long = model.get_submodule(Q), random(4, D), random(4 * D, D)
    base = layer(short)
    apply_loras(model, [(lora, 1.0)])
    right_short, right_long = layer(short), layer(long)
    apply_loras(model, [(lora, 1.0)], "comfy_parity")
    assert torch.equal(layer(long), right_long)
    lost = base + (right_short - base) * layer.scale_weight
    torch.testing.assert_close(layer(short), lost, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(short), right_short, atol=1e-3)


def test_what_does_not_fit_is_reported_by_name():
    """A LoRA of the 36-channel model has another patch embedding than SCAIL."""
    lora = full_lora("i2v")
    lora.deltas["patch_embedding"] = LoraDelta(
        down=random(R, 36, 1, 2, 2), up=random(D, R, 1, 1, 1), diff_b=random(D)
    )
    lora.deltas["blocks.0.cross_attn.k_img"] = low_rank(D, D)
    lora.deltas["blocks.0.ffn.2"] = LoraDelta(diff_b=random(D))
    model = make_model()
    report = apply_loras(model, [(lora, 1.0)])
    reasons = {item.name: item.reason for item in report.skipped}
    assert reasons == {
        "patch_embedding.weight": "shape (16, 36, 1, 2, 2) does not fit (16, 4, 1, 2, 2)",
        "blocks.0.cross_attn.k_img.weight": "the model has no such tensor",
        "blocks.0.ffn.2.bias": "the model has no such tensor",
    }
    assert "patch_embedding.bias" in report.applied
    (line,) = report.warnings()
    assert line.startswith("LoRA i2v: 3 parts not applied: ")
    assert all(name in line for name in reasons)


def test_a_lora_of_which_nothing_fits_is_an_error_and_changes_nothing():
    model = make_model()
    apply_loras(model, [(full_lora(), 1.0)])
    applied = outputs(model)
    stranger = LoraFile("other", {Q: low_rank(D + 1, D)})
    with pytest.raises(WeightsError, match=r"other: none of its 1 parts .*\(17, 16\) does not fit"):
        apply_loras(model, [(full_lora(), 0.5), (stranger, 1.0)])
    assert close(outputs(model), applied, atol=0)
    with pytest.raises(WeightsError, match="it is empty"):
        apply_loras(model, [(LoraFile("nothing", {}), 1.0)])


def test_failure_half_way_leaves_the_model_as_it_was():
    model = make_model(fp8=(Q,))
    before = snapshot(model)
    lora = full_lora()
    lora.deltas["blocks.0.norm3"] = LoraDelta(diff=torch.empty(D, device="meta"))
    with pytest.raises(NotImplementedError):
        apply_loras(model, [(lora, 1.0)])
    assert same(snapshot(model), before)
    assert not any(isinstance(layer, LoraLinear) for layer in model.modules())


@pytest.mark.parametrize("mode", ["full", "merge"])
def test_fused_projections_take_the_deltas_of_their_parts(mode):
    lora = LoraFile("qk", {Q: low_rank(D, D), K: low_rank(D, D, seed=5)})
    lora.deltas[f"{K[:-1]}v"] = LoraDelta(diff_b=random(D, seed=8))
    split, fused = make_model(), make_model(fused=True)
    parts = [split.get_submodule(f"{Q[:-1]}{part}") for part in "qkv"]
    qkv = fused.get_submodule(f"{Q[:-1]}qkv")
    qkv.weight.data = torch.cat([part.weight for part in parts])
    qkv.bias.data = torch.cat([part.bias for part in parts])
    apply_loras(split, [(lora, 0.8)], mode)
    apply_loras(fused, [(lora, 0.8)], mode)
    x = random(6, D)
    torch.testing.assert_close(qkv(x), torch.cat([part(x) for part in parts], -1))
    remove_loras(fused)
    assert type(qkv) is nn.Linear


def test_a_layer_with_a_side_path_is_not_fused_unnoticed():
    from xicon_infer.models.wan_layers import SelfAttention

    attention = SelfAttention(D, 2, 1e-6).requires_grad_(False)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"self_attn": attention})])})
    apply_loras(model, [(LoraFile("q", {Q: low_rank(D, D)}), 1.0)])
    with pytest.raises(TypeError, match="merge LoRAs"):
        attention.fuse()
    remove_loras(model)
    attention.fuse()


def test_without_undo_there_is_no_way_back():
    model, kept = make_model(), make_model()
    apply_loras(kept, [(full_lora(), 1.0)], "merge")
    apply_loras(model, [(full_lora(), 1.0)], "merge", keep_undo=False)
    assert close(outputs(model), outputs(kept), atol=0)
    for again in (lambda: remove_loras(model), lambda: apply_loras(model, [(full_lora(), 1.0)])):
        with pytest.raises(WeightsError, match="without an undo copy"):
            again()


def test_a_copy_of_the_model_is_independent():
    model = make_model(fp8=(Q,))
    before = snapshot(model)
    apply_loras(model, [(full_lora(), 1.0)])
    twin, applied = copy.deepcopy(model), outputs(model)
    remove_loras(twin)
    assert same(snapshot(twin), before)
    assert close(outputs(model), applied, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "side"}, "mode: got 'side'"),
        ({"requantize": "block"}, "requantize: got 'block'"),
        ({"strength": float("nan")}, "strength must be a number"),
        ({"strength": float("inf")}, "strength must be a number"),
    ],
)
def test_options_are_checked(options, message):
    strength = options.pop("strength", 1.0)
    with pytest.raises(InvalidRequest, match=message):
        apply_loras(make_model(), [(full_lora(), strength)], **options)


def test_an_unloaded_model_is_refused():
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(WeightsError, match="load it first"):
        apply_loras(model, [(full_lora(), 1.0)])


@pytest.mark.parametrize("requantize", ["row", "tensor", "none"])
def test_state_dicts_merge_as_modules_do(requantize):
    model, lora = make_model(fp8=(Q, FFN)), full_lora()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    merged, report = merge_state_dict(base, lora, 0.6, requantize=requantize)
    applied = apply_loras(model, [(lora, 0.6)], "merge", requantize=requantize)
    assert report == applied
    expected = model.state_dict()
    if requantize == "none":  # a module keeps its compute dtype, a file gets bfloat16
        assert merged[f"{Q}.weight"].dtype == torch.bfloat16
        merged = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in merged.items()}
        assert merged.keys() == expected.keys()
        assert all(torch.allclose(merged[k], expected[k], rtol=8e-3) for k in expected)
        return
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(merged[name].float(), value.float()), name
