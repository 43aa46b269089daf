"""Names of text and image encoder files: every known naming loads, everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.golden import Golden
from xicon_infer.errors import WeightsError
from xicon_infer.models.text import build_text_encoder
from xicon_infer.models.text import config_from_shapes as text_config
from xicon_infer.models.vision import build_image_encoder
from xicon_infer.models.vision import config_from_shapes as vision_config
from xicon_infer.weights.keymaps_encoders import (
    map_image_encoder,
    map_text_encoder,
    sentencepiece_bytes,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "wan_core"
WAN = Golden(FOLDER / "umt5_tiny.safetensors", [GOLDEN]).under("weights.")
OFFICIAL = Golden(FOLDER / "clip_visual_tiny.safetensors", [GOLDEN]).under("weights.")
TEXT = map_text_encoder(WAN)
TOWER = map_image_encoder(OFFICIAL, every_layer=True) | {
    "post_layernorm.weight": OFFICIAL["visual.post_norm.weight"],
    "post_layernorm.bias": OFFICIAL["visual.post_norm.bias"],
}
LINEAR = "encoder.block.0.layer.0.SelfAttention.q.weight"
FP8 = torch.float8_e4m3fn


def same(one, other) -> bool:
    """Returns whether two states have the same names, dtypes and values."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def shapes_of(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def loads_strictly(state, model) -> bool:
    model.load_state_dict(state, strict=True)
    return same(dict(model.state_dict()), dict(state))


def scaled(scale_name: str, scale_of=lambda w: w.abs().max() / 448):
    """Returns a Comfy-Org fp8 file: linears in fp8 with a scale, and what comes along."""
    state: dict[str, torch.Tensor] = {}
    for key, weight in TEXT.items():
        if key.startswith("encoder.block") and "norm" not in key and "bias" not in key:
            scale = scale_of(weight)
            state[key] = (weight / scale).clamp(-448, 448).to(FP8)
            state[key.replace(".weight", scale_name)] = scale
        elif key != "encoder.embed_tokens.weight":
            state[key] = weight
    state["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    state["spiece_model"] = torch.tensor(list(b"model"), dtype=torch.uint8)
    return state


def test_wan_naming_loads_strictly():
    assert loads_strictly(TEXT, build_text_encoder(text_config(shapes_of(TEXT))))
    assert len(TEXT) == len(WAN) + 1


def test_wan_names_go_where_they_belong():
    block = "encoder.block.1."
    pairs = {
        "blocks.1.attn.o.weight": block + "layer.0.SelfAttention.o.weight",
        "blocks.1.pos_embedding.embedding.weight": block
        + "layer.0.SelfAttention.relative_attention_bias.weight",
        "blocks.1.norm1.weight": block + "layer.0.layer_norm.weight",
        "blocks.1.norm2.weight": block + "layer.1.layer_norm.weight",
        "blocks.1.ffn.gate.0.weight": block + "layer.1.DenseReluDense.wi_0.weight",
        "blocks.1.ffn.fc1.weight": block + "layer.1.DenseReluDense.wi_1.weight",
        "blocks.1.ffn.fc2.weight": block + "layer.1.DenseReluDense.wo.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
    }
    for old, new in pairs.items():
        assert TEXT[new] is WAN[old]


def test_the_embedding_stays_one_tensor():
    assert TEXT["shared.weight"] is TEXT["encoder.embed_tokens.weight"]
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        one = {k: v for k, v in TEXT.items() if v is not TEXT["shared.weight"]}
        one[name] = TEXT["shared.weight"]
        assert same(map_text_encoder(one), TEXT)


def test_transformers_naming_is_kept():
    assert same(map_text_encoder(TEXT), TEXT)


@pytest.mark.parametrize("scale_name", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scaled_fp8_is_dequantised(scale_name, shape):
    state = scaled(scale_name, lambda w: (w.abs().max() / 448).reshape(shape))
    state |= {key.replace(".weight", ".scale_input"): torch.ones(1) for key in (LINEAR,)}
    state |= {key.replace(".weight", ".input_scale"): torch.ones(1) for key in (LINEAR,)}
    mark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    state[LINEAR.replace(".weight", ".comfy_quant")] = mark
    mapped = map_text_encoder(state, dtype=torch.float32)
    assert loads_strictly(mapped, build_text_encoder(text_config(shapes_of(mapped))))
    scale = state[LINEAR.replace(".weight", scale_name)]
    assert torch.equal(mapped[LINEAR], state[LINEAR].float() * scale.reshape(()))
    for key, weight in TEXT.items():
        # e4m3 keeps three bits of the mantissa: half a step is 1/16.
        limit = weight.abs() / 16 + weight.abs().max() / 448 / 256
        assert ((mapped[key] - weight).abs() <= limit).all(), key


def test_a_scale_for_each_row():
    state = scaled(".weight_scale", lambda w: w.abs().amax(1, keepdim=True) / 448)
    mapped = map_text_encoder(state, dtype=torch.float32)
    per_row = state[LINEAR.replace(".weight", ".weight_scale")]
    assert per_row.shape == (32, 1)
    assert torch.equal(mapped[LINEAR], state[LINEAR].float() * per_row)


def test_the_dtype_is_that_of_dequantised_weights_only():
    state = scaled(".scale_weight")
    half = map_text_encoder(state)
    assert half[LINEAR].dtype == torch.bfloat16
    assert half["shared.weight"].dtype == torch.float32
    # Scaled in float32, rounded once.
    full = map_text_encoder(state, dtype=torch.float32)
    assert torch.equal(half[LINEAR], full[LINEAR].bfloat16())


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_widened(fp8):
    state = {key: value.to(fp8) if ".attn." in key else value for key, value in WAN.items()}
    mapped = map_text_encoder(state, dtype=torch.float32)
    assert torch.equal(mapped[LINEAR], state["blocks.0.attn.q.weight"].float())
    assert loads_strictly(mapped, build_text_encoder(text_config(shapes_of(mapped))))


def test_the_tokenizer_inside_a_file():
    assert sentencepiece_bytes(scaled(".scale_weight")) == b"model"
    assert sentencepiece_bytes(WAN) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.x.weight": torch.ones(1)}, r"1 tensor names .*blocks\.0\.attn\.x\.weight"),
        ({"blocks.0.attn.q.bias": torch.ones(1)}, r"blocks\.0\.attn\.q\.bias"),
        ({"shared.weight": torch.ones(1)}, r"shared\.weight"),
        ({"blocks.0.attn.y.scale_weight": torch.ones(1)}, "1 x scale without a weight"),
        ({"norm.weight": torch.ones(48, dtype=torch.uint8)}, "neither a float nor fp8"),
        ({"blocks.0.attn.q.scale_weight": torch.ones(32)}, "1 x scale without a weight"),
    ],
)
def test_what_does_not_fit_a_text_encoder_is_refused(change, message):
    with pytest.raises(WeightsError, match=message):
        map_text_encoder(WAN | change)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(31), r"wrong shape: blocks\.0\.attn\.q\.scale_weight \(31,\) for 32 rows"),
        (torch.tensor(float("nan")), r"not finite: blocks\.0\.attn\.q\.scale_weight"),
        (torch.tensor(0.0), r"zero, .* blocks\.0\.attn\.q\.scale_weight"),
    ],
)
def test_odd_scales_are_named(scale, message):
    fp8 = {"blocks.0.attn.q.weight": WAN["blocks.0.attn.q.weight"].to(FP8)}
    with pytest.raises(WeightsError, match=message):
        map_text_encoder(WAN | fp8 | {"blocks.0.attn.q.scale_weight": scale})


def test_a_layer_in_another_format_is_named():
    mark = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.q\.comfy_quant.* nvfp4, allowed"):
        map_text_encoder(WAN | {"blocks.0.attn.q.comfy_quant": mark})


@pytest.mark.parametrize("prefix", ["model.", "model.diffusion_model."])
def test_a_prefix_is_stripped(prefix):
    assert same(map_text_encoder({prefix + key: value for key, value in WAN.items()}), TEXT)


def test_other_files_are_refused():
    with pytest.raises(WeightsError, match="the file is empty"):
        map_text_encoder({})
    with pytest.raises(WeightsError, match=r"fit no known naming.*umt5-xxl") as caught:
        map_text_encoder(OFFICIAL)
    assert caught.value.field == "text_encoder"
    with pytest.raises(WeightsError, match=r"fit no known naming.*clip_vision_h") as caught:
        map_image_encoder(WAN)
    assert caught.value.field == "image_encoder"
    with pytest.raises(WeightsError, match="the file is empty"):
        map_image_encoder({"visual_projection.weight": torch.ones(1)})


@given(st.sampled_from(sorted(WAN)), st.sampled_from(["_", ".x", "0"]))
@settings(max_examples=40, deadline=None)
def test_a_misspelt_name_never_passes(key, suffix):
    state = {k + suffix if k == key else k: v for k, v in WAN.items()}
    with pytest.raises(WeightsError):
        map_text_encoder(state)


def test_the_input_is_left_alone():
    state = scaled(".scale_weight")
    before = dict(state)
    map_text_encoder(state)
    assert state.keys() == before.keys()
    assert all(state[key] is before[key] for key in state)


def test_official_image_naming_loads_strictly():
    mapped = map_image_encoder(OFFICIAL)
    config = vision_config(shapes_of(mapped), num_heads=4)
    assert config.num_layers == 2
    assert loads_strictly(mapped, build_image_encoder(config))


def test_every_layer_keeps_the_last_one():
    whole, cut = map_image_encoder(OFFICIAL, every_layer=True), map_image_encoder(OFFICIAL)
    assert {key.split(".")[2] for key in whole.keys() - cut.keys()} == {"2"}
    assert vision_config(shapes_of(whole), num_heads=4).num_layers == 3


def test_official_names_go_where_they_belong():
    mapped = map_image_encoder(OFFICIAL)
    layer, old = "encoder.layers.1.", "visual.transformer.1."
    pairs = {
        "norm1.bias": "layer_norm1.bias",
        "norm2.weight": "layer_norm2.weight",
        "attn.proj.weight": "self_attn.out_proj.weight",
        "mlp.0.weight": "mlp.fc1.weight",
        "mlp.2.bias": "mlp.fc2.bias",
    }
    for key, name in pairs.items():
        assert mapped[layer + name] is OFFICIAL[old + key]
    for kind in ("weight", "bias"):
        for letter, part in zip("qkv", OFFICIAL[f"{old}attn.to_qkv.{kind}"].chunk(3), strict=True):
            tensor = mapped[f"{layer}self_attn.{letter}_proj.{kind}"]
            assert torch.equal(tensor, part)
            # Not a view: dropping two of the three must free their memory.
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["visual_projection.weight"],
        ["logit_scale", "text_projection.weight", "text_model.final_layer_norm.weight"],
        ["{prefix}embeddings.position_ids"],
    ],
)
def test_both_transformers_namings_give_the_same(prefix, extra):
    state = {prefix + key: tensor for key, tensor in TOWER.items()}
    state |= {key.format(prefix=prefix): torch.arange(3) * 1.0 for key in extra}
    assert same(map_image_encoder(state), map_image_encoder(OFFICIAL))


def test_a_stored_position_counter_is_ignored():
    state = TOWER | {"embeddings.position_ids": torch.arange(17)[None]}
    assert same(map_image_encoder(state), map_image_encoder(OFFICIAL))


def test_the_text_half_of_the_official_file_is_ignored():
    extra = {"textual.token_embedding.weight": torch.ones(1), "log_scale": torch.ones(())}
    assert "visual.head" in OFFICIAL
    assert same(map_image_encoder(OFFICIAL | extra), map_image_encoder(OFFICIAL))


@pytest.mark.parametrize("every_layer", [False, True])
def test_a_mapped_tower_maps_to_itself(every_layer):
    mapped = map_image_encoder(OFFICIAL, every_layer=every_layer)
    assert same(map_image_encoder(mapped), mapped)


def test_the_last_of_many_layers_is_found_by_number():
    def layer(number):
        return {f"encoder.layers.{number}.mlp.fc1.bias": torch.ones(1)}

    state = {k: v for n in range(12) for k, v in layer(n).items()}
    mapped = map_image_encoder(state | {"post_layernorm.weight": torch.ones(1)})
    assert sorted(int(key.split(".")[2]) for key in mapped) == list(range(11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.transformer.0.attn.x.weight": torch.ones(1)}, "attn.x.weight"),
        ({"visual.transformer.0.norm3.weight": torch.ones(1)}, "norm3.weight"),
        ({"something": torch.ones(1)}, "something"),
        ({"visual.pre_norm.bias": torch.ones(48, dtype=torch.int8)}, "neither a float nor fp8"),
    ],
)
def test_what_does_not_fit_an_image_encoder_is_refused(change, message):
    with pytest.raises(WeightsError, match=message):
        map_image_encoder(OFFICIAL | change)


def test_fp8_image_encoders_are_widened():
    key = "visual.transformer.0.mlp.0.weight"
    mapped = map_image_encoder(OFFICIAL | {key: OFFICIAL[key].to(FP8)})
    assert mapped["encoder.layers.0.mlp.fc1.weight"].dtype == torch.bfloat16


def test_the_error_lists_the_first_names_only():
    with pytest.raises(WeightsError) as caught:
        map_text_encoder({f"x{i}": torch.ones(1) for i in range(9)})
    assert "9 tensor names" in caught.value.message
    assert "x4" in caught.value.message
    assert "x5" not in caught.value.message
