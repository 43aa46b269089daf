"""Checkpoints are told apart by content alone, and their sizes read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from xicon_infer.errors import WeightsError
from xicon_infer.models.scail import SCAIL_14B, ScailTransformer
from xicon_infer.models.wan import WAN_I2V_14B, WAN_T2V_1_3B, WAN_T2V_14B, WanTransformer
from xicon_infer.weights.detect import detect

GOLDEN = Path(__file__).parents[1] / "golden"


def shapes_of(build):
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build().state_dict().items()}


def golden_shapes(name, prefix="weights."):
    with safe_open(GOLDEN / name, "pt") as file:
        return {
            key.removeprefix(prefix): tuple(file.get_slice(key).get_shape())
            for key in file.keys()  # noqa: SIM118
            if key.startswith(prefix)
        }


def small_i2v():
    config = replace(WAN_I2V_14B, num_layers=2, dim=256, ffn_dim=64, num_heads=2)
    return shapes_of(lambda: WanTransformer(config))


REAL = {
    "wan_t2v 1.3B": (WanTransformer, WAN_T2V_1_3B),
    "wan_t2v 14B": (WanTransformer, WAN_T2V_14B),
    "wan_i2v 14B": (WanTransformer, WAN_I2V_14B),
    "scail 14B": (ScailTransformer, SCAIL_14B),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sizes(name):
    model, config = REAL[name]
    found = detect(shapes_of(lambda: model(config)))
    assert (found.kind, found.naming, found.prefix) == (name.split()[0], "wan", "")
    assert found.dims == {
        field: getattr(config, field) for field in found.dims
    }  # every size, under the name the configuration has for it
    assert ("image_dim" in found.dims) == (config.image_dim is not None)
    assert {"dim", "ffn_dim", "num_heads", "num_layers", "in_dim"} <= found.dims.keys()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", ""])
def test_prefixes(prefix):
    plain = small_i2v()
    found = detect({prefix + name: shape for name, shape in plain.items()})
    assert (found.kind, found.prefix) == ("wan_i2v", prefix)
    assert found.dims == detect(plain).dims
    with_mark = {prefix + name: shape for name, shape in plain.items()} | {"scaled_fp8": (2,)}
    assert detect(with_mark).dims == found.dims


EXTRA = {
    "wan_flf2v": {"img_emb.emb_pos": (1, 514, 1280)},
    "scail": {"patch_embedding_pose.weight": (256, 20, 1, 2, 2)},
    "scail2": {
        "patch_embedding_pose.weight": (256, 20, 1, 2, 2),
        "patch_embedding_mask.weight": (256, 28, 1, 2, 2),
    },
    "steady_dancer": {"condition_embedding_align.cross_attn.in_proj_bias": (384,)},
}


@pytest.mark.parametrize("kind", EXTRA)
def test_variants(kind):
    plain = small_i2v()
    assert detect(plain).kind == "wan_i2v"
    assert detect(plain | EXTRA[kind]).kind == kind


def test_without_image_keys_it_is_text_to_video():
    plain = {name: shape for name, shape in small_i2v().items() if "img" not in name}
    found = detect(plain)
    assert found.kind == "wan_t2v"
    assert "image_dim" not in found.dims


def test_heads_may_be_given():
    plain = small_i2v()
    assert detect(plain).dims["num_heads"] == 2
    assert detect(plain, num_heads=8).dims["num_heads"] == 8


def test_sat_naming():
    found = detect(golden_shapes("scail/scail_sat_to_wan_keys.safetensors", "sat."), num_heads=2)
    assert (found.kind, found.naming) == ("scail", "sat")
    wan = detect(golden_shapes("scail/scail_sat_to_wan_keys.safetensors", "wan."), num_heads=2)
    assert (wan.kind, wan.naming, wan.dims) == ("scail", "wan", found.dims)
    assert found.dims["dim"] == 64
    assert found.dims["ffn_dim"] == 96


def test_diffusers_naming():
    names = {
        "patch_embedding.weight": (256, 16, 1, 2, 2),
        "scale_shift_table": (1, 2, 256),
        "proj_out.weight": (64, 256),
        "condition_embedder.text_embedder.linear_1.weight": (256, 4096),
        "condition_embedder.time_embedder.linear_1.weight": (256, 256),
        "blocks.0.ffn.net.0.proj.bias": (512,),
        "blocks.1.ffn.net.0.proj.bias": (512,),
    }
    found = detect(names)
    assert (found.kind, found.naming) == ("wan_t2v", "diffusers")
    assert found.dims == {
        "dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2,
        "in_dim": 16, "out_dim": 16, "text_dim": 4096, "freq_dim": 256,
    }  # fmt: skip


def test_text_encoder():
    found = detect(golden_shapes("wan_core/umt5_tiny.safetensors"))
    assert (found.kind, found.naming) == ("text_encoder", "wan")
    assert found.dims == {
        "vocab_size": 320, "d_model": 48, "d_kv": 8, "d_ff": 96,
        "num_layers": 3, "num_heads": 4, "num_buckets": 32,
    }  # fmt: skip
    block = "encoder.block.0.layer."
    found = detect(
        {
            "shared.weight": (256384, 4096),
            "scaled_fp8": (0,),
            "spiece_model": (100,),
            f"{block}0.SelfAttention.q.weight": (4096, 4096),
            f"{block}0.SelfAttention.relative_attention_bias.weight": (32, 64),
            f"{block}1.DenseReluDense.wi_0.weight": (10240, 4096),
        }
    )
    assert (found.kind, found.naming) == ("text_encoder", "transformers")
    assert found.dims["d_kv"] == 64


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_image_encoder(prefix):
    names = {
        f"{prefix}embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        f"{prefix}embeddings.position_embedding.weight": (257, 1280),
        f"{prefix}encoder.layers.0.mlp.fc1.weight": (5120, 1280),
        f"{prefix}encoder.layers.31.mlp.fc1.weight": (5120, 1280),
    }
    found = detect(names)
    assert (found.kind, found.naming, found.prefix) == ("image_encoder", "transformers", prefix)
    assert found.dims == {
        "width": 1280, "d_ff": 5120, "num_layers": 2, "image_size": 224, "patch_size": 14,
    }  # fmt: skip


def test_openclip_image_encoder():
    shapes = golden_shapes("wan_core/clip_visual_tiny.safetensors")
    found = detect(shapes | {"textual.token_embedding.weight": (10, 4), "log_scale": ()})
    assert (found.kind, found.naming) == ("image_encoder", "openclip")
    assert found.dims == {
        "width": 48, "d_ff": 192, "num_layers": 3, "image_size": 28, "patch_size": 7,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model."])
def test_vae(prefix):
    shapes = golden_shapes("wan_core/vae_tiny.safetensors")
    found = detect({prefix + name: shape for name, shape in shapes.items()})
    assert (found.kind, found.naming, found.prefix) == ("vae", "original", prefix)
    assert found.dims == {"dim": 4, "decoder_dim": 16, "z_dim": 4}
    diffusers = {
        "encoder.conv_in.weight": (96, 3, 3, 3, 3),
        "decoder.conv_in.weight": (384, 16, 3, 3, 3),
        "post_quant_conv.weight": (16, 16, 1, 1, 1),
    }
    found = detect(diffusers)
    assert (found.naming, found.dims) == ("diffusers", {"dim": 96, "decoder_dim": 384, "z_dim": 16})


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.ffn.0.lora_down.weight",
        "lora_unet__blocks_0_ffn_0.alpha",
        "a.diff_b",
    ],
)
def test_lora(name):
    assert detect({name: (4, 4)}).kind == "lora"


@pytest.mark.parametrize("names", [{}, {"a.weight": (2, 2), "b.bias": (2,)}])
def test_unknown_checkpoints_are_described(names):
    with pytest.raises(WeightsError, match="unknown checkpoint") as caught:
        detect(names)
    assert all(name in caught.value.message for name in names)


@pytest.mark.parametrize(
    "gone", ["blocks.0.ffn.0.bias", "head.head.weight", "text_embedding.0.weight"]
)
def test_incomplete_checkpoints_name_what_is_missing(gone):
    shapes = small_i2v()
    del shapes[gone]
    with pytest.raises(WeightsError, match=gone):
        detect(shapes)
