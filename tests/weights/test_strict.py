"""Strict loading: every tensor by name, the right dtype, fp8 exactly where the file holds it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from xicon_infer.errors import WeightsError
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.wan import WanConfig
from xicon_infer.ops.linear import Fp8Linear, quantize_weight
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.keymaps import to_wan_names
from xicon_infer.weights.strict import DtypePolicy, dit_policy, load_strict

TINY = WanConfig(
    dim=16, ffn_dim=32, num_heads=1, num_layers=2, in_dim=20, text_dim=8, image_dim=8, freq_dim=8
)
BF16 = dit_policy(torch.bfloat16)
FLOAT32 = DtypePolicy(compute=torch.float32)


def build(config=TINY):
    with torch.device("meta"):
        return ScailTransformer(config)


def make_state(dtype=torch.float32):
    torch.manual_seed(0)
    return {
        name: torch.randn(value.shape).to(dtype) for name, value in build().state_dict().items()
    }


def is_block_linear(name):
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def make_fp8(state, *, choose=is_block_linear, per_row=False, scale_name="scale_weight"):
    """The layout of Kijai's scaled files: fp8 weights of the blocks, one scale beside each."""
    found = {}
    for name, value in state.items():
        if choose(name):
            weight, scale = quantize_weight(value, per_row=per_row)
            found[name] = weight
            found[name.removesuffix("weight") + scale_name] = scale
        else:
            found[name] = value
    return found


def load(state, policy=BF16, module=None, **options):
    module = build() if module is None else module
    options = {"name": "transformer", "device": "cpu", "dtype_policy": policy, **options}
    return module, load_strict(module, state, **options)


def test_everything_is_loaded_bit_by_bit():
    state = make_state()
    model, report = load(state, dit_policy(torch.float32))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert report.fp8 == report.dequantized == report.ignored == ()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_of_a_transformer(stored, compute):
    model, _ = load(make_state(stored), dit_policy(compute))
    high = {
        "patch_embedding.weight",
        "patch_embedding_pose.bias",
        "time_embedding.0.weight",
        "time_embedding.2.bias",
        "time_projection.1.weight",
        "blocks.0.modulation",
        "blocks.1.norm3.weight",
        "blocks.0.self_attn.norm_q.weight",
        "blocks.0.cross_attn.norm_k_img.weight",
        "head.head.weight",
        "head.modulation",
    }
    low = {
        "blocks.0.self_attn.q.weight",
        "blocks.0.self_attn.q.bias",
        "blocks.1.ffn.2.weight",
        "text_embedding.0.weight",
        "img_emb.proj.1.weight",
        "img_emb.proj.0.weight",
    }
    found = {name: value.dtype for name, value in model.state_dict().items()}
    assert {found[name] for name in high} == {torch.float32}
    assert {found[name] for name in low} == {compute}
    assert set(found.values()) <= {torch.float32, compute}
    assert model.dtype == compute


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_fp8_exactly_where_the_file_holds_it(per_row, scale_name):
    state = make_fp8(make_state(), per_row=per_row, scale_name=scale_name)
    model, report = load(state)
    layers = {n for n, layer in model.named_modules() if isinstance(layer, Fp8Linear)}
    assert layers == set(report.fp8) == {n[:-7] for n in state if is_block_linear(n)}
    assert len(layers) == 24
    layer = model.blocks[1].ffn[0]
    stored = state["blocks.1.ffn.0.weight"]
    assert torch.equal(layer.weight.view(torch.uint8), stored.view(torch.uint8))
    assert torch.equal(layer.scale_weight, state[f"blocks.1.ffn.0.{scale_name}"])
    assert layer.scale_weight.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16


def test_a_single_fp8_layer_and_no_scales():
    one = "blocks.1.cross_attn.k_img.weight"
    state = make_state()
    state[one] = state[one].to(torch.float8_e5m2)
    model, report = load(state)
    assert report.fp8 == (one[:-7],)
    assert model.blocks[1].cross_attn.k_img.scale_weight is None
    assert type(model.blocks[0].cross_attn.k_img) is nn.Linear


def test_small_parts_are_dequantised_even_if_the_file_holds_fp8():
    def choose(name):
        return name.endswith("weight") and "norm" not in name and "modulation" not in name

    plain = make_state()
    state = make_fp8(plain, choose=choose)
    model, report = load(state)
    assert "head.head.weight" in report.dequantized
    assert "patch_embedding_pose.weight" in report.dequantized
    assert "img_emb.proj.1.weight" in report.dequantized
    assert "text_embedding.0" in report.fp8
    assert model.head.head.weight.dtype == torch.float32
    assert model.img_emb.proj[1].weight.dtype == torch.bfloat16
    error = (model.head.head.weight - plain["head.head.weight"]).norm()
    assert 0 < error < 0.05 * plain["head.head.weight"].norm()
    x = model.img_emb(torch.randn(1, 5, 8, dtype=torch.bfloat16))
    assert x.isfinite().all()


def test_fp8_can_be_given_up():
    state = make_fp8(make_state())
    model, report = load(state, replace(BF16, keep_fp8=False))
    assert report.fp8 == ()
    assert len(report.dequantized) == 24
    assert model.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    kept, _ = load(state)
    wide = kept.blocks[0].ffn[0].weight.float() * kept.blocks[0].ffn[0].scale_weight
    assert torch.equal(model.blocks[0].ffn[0].weight, wide.bfloat16())


SCALE_PLACES = [
    "cross.in_proj_scale_weight",
    "cross.in_proj_weight_scale",
    "cross.in_proj_weight.scale_weight",
    "cross.in_proj_weight.weight_scale",
]


@pytest.mark.parametrize("place", SCALE_PLACES)
def test_fp8_parameters_that_are_not_called_weight(place):
    """A packed attention weight, as SteadyDancer's align module has one."""
    with torch.device("meta"):
        module = nn.ModuleDict({"cross": nn.MultiheadAttention(8, 2)})
    state = {name: torch.randn(value.shape) for name, value in module.state_dict().items()}
    plain = state["cross.in_proj_weight"]
    state["cross.in_proj_weight"], state[place] = quantize_weight(plain)
    state["cross.out_proj.weight"], state["cross.out_proj.weight_scale"] = quantize_weight(
        state["cross.out_proj.weight"]
    )
    _, report = load(state, FLOAT32, module)
    assert report.dequantized == ("cross.in_proj_weight", "cross.out_proj.weight")
    assert (module["cross"].in_proj_weight - plain).norm() < 0.05 * plain.norm()


def refuse(state, message, policy=BF16, **options):
    with pytest.raises(WeightsError, match=message) as caught:
        load(state, policy, **options)
    return caught.value.message


def test_missing_unexpected_and_misshaped_are_named_together():
    state = make_state()
    del state["blocks.0.ffn.0.bias"], state["head.modulation"]
    state["blocks.9.ffn.0.bias"] = torch.ones(3)
    state["patch_embedding.weight"] = torch.randn(16, 36, 1, 2, 2)
    message = refuse(state, "transformer: the file does not fit")
    assert "2 missing: blocks.0.ffn.0.bias, head.modulation" in message
    assert "1 unexpected: blocks.9.ffn.0.bias" in message
    shape = "patch_embedding.weight (16, 36, 1, 2, 2) instead of (16, 20, 1, 2, 2)"
    assert f"1 of a wrong shape: {shape}" in message


def test_a_plain_model_is_not_taken_for_scail():
    state = {n: v for n, v in make_state().items() if "pose" not in n}
    message = refuse(state, "2 missing")
    assert "patch_embedding_pose.weight, patch_embedding_pose.bias" in message


def test_many_names_are_counted():
    state = {n: v for n, v in make_state().items() if not n.startswith("blocks.1.")}
    assert "and 24 more" in refuse(state, r"32 missing: blocks\.1\.modulation")


def test_ignore_takes_patterns_and_reports():
    state = make_state() | {"visual_projection.weight": torch.ones(2), "other.x": torch.ones(1)}
    refuse(state, "2 unexpected: visual_projection.weight, other.x")
    _, report = load(state, ignore=("visual_projection.*", "other.?"))
    assert report.ignored == ("visual_projection.weight", "other.x")
    refuse(make_state(), "missing: head.modulation", ignore=("head.modulation",))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor([float("nan")]), "zero, negative or not finite: blocks.0.ffn.0.scale_weight"),
        (torch.tensor([float("inf")]), "not finite"),
        (torch.tensor([-1.0]), "negative"),
        (torch.tensor(0.0), "zero"),
        (torch.tensor([[1.0]] * 31 + [[0.0]]), "zero"),
        (torch.tensor([[1.0]] * 31 + [[float("nan")]]), "not finite"),
        (torch.ones(5), r"wrong shape: blocks\.0\.ffn\.0\.scale_weight \(5,\) for 32 rows"),
        (torch.ones(16), r"\(16,\) for 32 rows"),
        (torch.ones(32, 16), "wrong shape"),
        (torch.ones(1, 32), "wrong shape"),
    ],
)
def test_bad_scales_are_named(scale, message):
    state = make_fp8(make_state(), choose=lambda name: name == "blocks.0.ffn.0.weight")
    state["blocks.0.ffn.0.scale_weight"] = scale
    refuse(state, message)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (32,), (32, 1)])
def test_good_scale_shapes(shape):
    state = make_fp8(make_state(), choose=lambda name: name == "blocks.0.ffn.0.weight")
    state["blocks.0.ffn.0.scale_weight"] = torch.full(shape, 0.25)
    model, _ = load(state)
    layer, x = model.blocks[0].ffn[0], torch.randn(3, 16)
    expected = x @ layer.weight.float().t() * 0.25 + layer.bias.float()
    torch.testing.assert_close(layer(x), expected)


def test_a_scale_without_fp8_is_unexpected():
    state = make_state() | {"blocks.0.ffn.0.scale_weight": torch.ones(1)}
    refuse(state, r"1 unexpected: blocks\.0\.ffn\.0\.scale_weight")


def test_integers_are_not_weights():
    state = make_state()
    state["blocks.0.ffn.0.weight"] = torch.ones(32, 16, dtype=torch.int8)
    refuse(state, r"1 of a wrong dtype: blocks\.0\.ffn\.0\.weight torch\.int8")


def test_nothing_stays_on_meta():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("positions", torch.arange(3), persistent=False)
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    refuse(state, "positions have no value", FLOAT32, module=module)


def test_integer_buffers_keep_their_dtype():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("ids", torch.zeros(3, dtype=torch.int64))
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "ids": torch.arange(3)}
    load(state, DtypePolicy(compute=torch.bfloat16), module)
    assert module.ids.dtype == torch.int64
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("field", ["compute", "float32", "never_fp8", "keep_fp8"])
def test_every_field_of_the_policy_counts(field):
    other = {
        "compute": torch.float16,
        "float32": ("blocks",),
        "never_fp8": ("cross_attn",),
        "keep_fp8": False,
    }

    def dtypes(policy):
        model, _ = load(make_fp8(make_state()), policy)
        return {name: value.dtype for name, value in model.state_dict().items()}

    assert dtypes(BF16) != dtypes(replace(BF16, **{field: other[field]}))


def test_from_file_to_model(tmp_path):
    """The whole way: a prefixed, scaled fp8 file with its marks, opened, renamed, loaded."""
    state = make_fp8(make_state(torch.bfloat16))
    prefixed = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    prefixed["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(prefixed, tmp_path / "any name.safetensors")
    checkpoint = open_checkpoint(tmp_path / "any name.safetensors")
    model, report = load(to_wan_names(read_tensors(checkpoint)))
    direct, _ = load(state)
    assert len(report.fp8) == 24
    loaded, expected = model.state_dict(), direct.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n].float(), expected[n].float()) for n in expected)
    values = model.encode_context([torch.randn(3, 8)], torch.randn(1, 5, 8))[0]
    assert values.k.dtype == torch.bfloat16
    assert values.k.isfinite().all()
