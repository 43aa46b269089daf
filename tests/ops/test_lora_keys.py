"""Reading LoRA files: every naming, every scaling rule, every refusal."""

from __future__ import annotations

import math

import pytest
import torch

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.ops.lora_keys import (
    BLOCK_MODULES,
    DIFFUSERS_TOP,
    RANK_STABILIZED_MARK,
    is_lora_key,
    read_lora,
    wan_module,
)

R = 4
MODULES = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0",
    "blocks.12.cross_attn.v": "blocks.12.attn2.to_v",
    "blocks.12.cross_attn.k_img": "blocks.12.attn2.add_k_proj",
    "blocks.3.ffn.0": "blocks.3.ffn.net.0.proj",
    "blocks.3.ffn.2": "blocks.3.ffn.net.2",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
"""Original path -> diffusers path."""


def pair(index):
    return torch.full((R, 6), float(index)), torch.full((5, R), index + 0.5)


def flat(path):
    return path.replace(".", "_")


NAMINGS = {
    "plain": ("", "wan", ".lora_down.weight", ".lora_up.weight"),
    "AB": ("", "wan", ".lora_A.weight", ".lora_B.weight"),
    "kijai": ("diffusion_model.", "wan", ".lora_down.weight", ".lora_up.weight"),
    "comfy": ("model.diffusion_model.", "wan", ".lora_down.weight", ".lora_up.weight"),
    "transformer": ("transformer.", "wan", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("transformer.", "diffusers", ".lora_A.weight", ".lora_B.weight"),
    "diffusers bare": ("", "diffusers", ".lora_A.weight", ".lora_B.weight"),
    "peft": ("base_model.model.", "wan", ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft diffusers": ("base_model.model.", "diffusers", ".lora_A.weight", ".lora_B.weight"),
    "peft nested": ("base_model.model.diffusion_model.", "wan", ".lora_A.weight", ".lora_B.weight"),
    "diffsynth": ("pipe.dit.", "wan", ".lora_A.default.weight", ".lora_B.default.weight"),
    "unet": ("unet.", "wan", ".lora.down.weight", ".lora.up.weight"),
    "linear layer": (
        "unet.",
        "diffusers",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
    "old comfy": ("", "wan", "_lora.down.weight", "_lora.up.weight"),
    "no weight": ("diffusion_model.", "wan", ".lora_down", ".lora_up"),
    "kohya double": ("lora_unet__", "flat wan", ".lora_down.weight", ".lora_up.weight"),
    "kohya single": ("lora_unet_", "flat wan", ".lora_down.weight", ".lora_up.weight"),
    "kohya diffusers": ("lora_unet_", "flat diffusers", ".lora_down.weight", ".lora_up.weight"),
    "lycoris": ("lycoris_", "flat wan", ".lora_down.weight", ".lora_up.weight"),
    "lycoris diffusers": ("lycoris_", "flat diffusers", ".lora_down.weight", ".lora_up.weight"),
    "transformer flat": ("lora_transformer_", "flat wan", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming(naming):
    prefix, layout, down_end, up_end = NAMINGS[naming]
    state = {}
    for index, (wan, diffusers) in enumerate(MODULES.items()):
        path = wan if layout.endswith("wan") else diffusers
        path = prefix + (flat(path) if layout.startswith("flat") else path)
        state[path + down_end], state[path + up_end] = pair(index)
    deltas = read_lora(state, rank_stabilized="no")
    assert set(deltas) == set(MODULES)
    for index, wan in enumerate(MODULES):
        down, up = pair(index)
        assert torch.equal(deltas[wan].down, down)
        assert torch.equal(deltas[wan].up, up)
        assert deltas[wan].factor == 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("blocks.0.attn1.to_k", "blocks.0.self_attn.k"),
        ("blocks.0.attn2.to_k", "blocks.0.cross_attn.k"),  # the wrapper sends both here
        ("blocks.7.attn2.add_v_proj", "blocks.7.cross_attn.v_img"),
        ("blocks.7.attn2.norm_added_k", "blocks.7.cross_attn.norm_k_img"),
        ("blocks.7.norm2", "blocks.7.norm3"),
        ("blocks.7.scale_shift_table", "blocks.7.modulation"),
        ("blocks_7_cross_attn_norm_k_img", "blocks.7.cross_attn.norm_k_img"),
        ("blocks_0_self_attn_to_out_0", "blocks.0.self_attn.o"),
        ("scale_shift_table", "head.modulation"),
        ("head_head", "head.head"),
        ("img_emb_proj_1", "img_emb.proj.1"),
        ("patch_embedding", "patch_embedding"),
        ("patch_embedding_pose", "patch_embedding_pose"),
        ("condition_embedding_align.proj_p", "condition_embedding_align.proj_p"),
        ("blocks.7", "blocks.7"),
        ("blocks.x.self_attn.q", None),
        ("blocks.7.self_attn.k_imgs", None),
        ("double_blocks.0.img_attn.qkv", None),
        ("vace_blocks.0.self_attn.q", None),
        ("", None),
    ],
)
def test_module_paths(path, expected):
    assert wan_module(path) == expected


def test_no_two_names_become_one_when_dots_turn_into_underscores():
    for table in (BLOCK_MODULES, DIFFUSERS_TOP):
        targets = {}
        for name, target in table.items():
            assert targets.setdefault(flat(name), target) == target


def test_differences_and_modulation():
    x = torch.ones(3)
    for modulation in ("blocks.1.diff_m", "blocks.1.modulation.diff"):
        deltas = read_lora(
            {
                "diffusion_model.blocks.1.norm3.diff": x,
                "diffusion_model.blocks.1.norm3.diff_b": x * 2,
                f"diffusion_model.{modulation}": x * 3,
                "diffusion_model.head.diff_m": x * 4,
            }
        )
        assert set(deltas) == {"blocks.1.norm3", "blocks.1", "head"}
        assert deltas["blocks.1.norm3"].diff is x
        assert torch.equal(deltas["blocks.1.norm3"].diff_b, x * 2)
        assert torch.equal(deltas["blocks.1"].diff_m, x * 3)
        assert torch.equal(deltas["head"].diff_m, x * 4)


UNKNOWN = [
    "diffusion_model.blocks.0.self_attn.q.lokr_w1",
    "diffusion_model.blocks.0.self_attn.q.hada_w1_a",
    "diffusion_model.blocks.0.self_attn.q.dora_scale",
    "diffusion_model.blocks.0.self_attn.q.lora_mid.weight",
    "diffusion_model.blocks.0.self_attn.q.weight",
    "diffusion_model.blocks.0.self_attn.z.lora_up.weight",
    "diffusion_model.vace_blocks.0.self_attn.q.lora_up.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
    "text_encoder.encoder.block.0.lora_A.weight",
    "something.else",
    "blocks.0.modulation.diff_b",
    "dwpose_embedding.0.weight",
]


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_keys_are_named(key):
    good = {
        "blocks.0.ffn.0.lora_down.weight": pair(1)[0],
        "blocks.0.ffn.0.lora_up.weight": pair(1)[1],
    }
    with pytest.raises(WeightsError, match="1 unknown keys") as caught:
        read_lora({**good, key: torch.ones(2, 2)})
    assert key in caught.value.message


def test_many_unknown_keys_are_counted():
    with pytest.raises(WeightsError, match=r"30 unknown keys: .* and 22 more"):
        read_lora({f"k{index}": torch.ones(1) for index in range(30)})


DOWN, UP = "blocks.0.ffn.0.lora_down.weight", "blocks.0.ffn.0.lora_up.weight"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "holds no tensors"),
        ({DOWN: torch.ones(R, 6)}, "no up"),
        ({UP: torch.ones(5, R)}, "no down"),
        ({DOWN: torch.ones(R, 6), UP: torch.ones(5, R + 1)}, "differ in rank"),
        ({DOWN: torch.ones(R), UP: torch.ones(5, R)}, "differ in rank"),
        (
            {
                DOWN: torch.ones(R, 6),
                UP: torch.ones(5, R),
                f"diffusion_model.{UP}": torch.ones(5, R),
            },
            "occurs twice",
        ),
        (
            {DOWN: torch.ones(R, 6), UP: torch.ones(5, R), "blocks.0.ffn.0.alpha": torch.ones(2)},
            "must be one number",
        ),
    ],
)
def test_damaged_files(state, message):
    with pytest.raises(WeightsError, match=message) as caught:
        read_lora(state, name="my.safetensors")
    assert caught.value.message.startswith("my.safetensors: ")


def factor(state, **options):
    return read_lora(state, **options)["blocks.0.cross_attn.k"].factor


def cross_k(prefix, rank, alpha=None):
    path = f"{prefix}blocks.0.cross_attn.k"
    state = {
        f"{path}.lora_A.weight": torch.ones(rank, 8),
        f"{path}.lora_B.weight": torch.ones(8, rank),
    }
    return state if alpha is None else {**state, f"{path}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("rank", [1, 4, 32, 64])
@pytest.mark.parametrize("alpha", [None, 0.0, 2.0, 16.0])
def test_scaling_rules(rank, alpha):
    state = cross_k("diffusion_model.", rank, alpha)
    plain = 1.0 if alpha is None else alpha / rank
    assert factor(state) == factor(state, rank_stabilized="no") == plain
    expected = (rank if alpha is None else alpha) / math.sqrt(rank)
    assert factor(state, rank_stabilized="yes") == pytest.approx(expected)


@pytest.mark.parametrize(("rank", "expected"), [(4, 2.0), (64, 8.0), (32, 181 / 32), (1, 1.0)])
def test_marked_files_are_rank_stabilised(rank, expected):
    """The wrapper's rule: alpha = floor(r * r / sqrt(r)) for files with one exact key."""
    state = cross_k("base_model.model.", rank)
    assert RANK_STABILIZED_MARK in state
    assert factor(state) == expected
    assert factor(state, rank_stabilized="no") == 1
    assert factor(cross_k("base_model.model.diffusion_model.", rank)) == 1
    # A file that states its alpha is believed.
    assert factor(cross_k("base_model.model.", rank, 2.0)) == 2.0 / rank


def test_rank_stabilized_is_checked():
    with pytest.raises(InvalidRequest, match="maybe"):
        read_lora(cross_k("", 4), rank_stabilized="maybe")


def test_alpha_alone_is_nothing():
    state = {**cross_k("", 4), "blocks.0.ffn.0.alpha": torch.tensor(4.0)}
    assert set(read_lora(state)) == {"blocks.0.cross_attn.k"}


def test_lora_keys_are_told_from_weights():
    assert is_lora_key("a.lora_A.default.weight")
    assert is_lora_key("a.diff_m")
    assert not is_lora_key("blocks.0.self_attn.q.weight")
    assert not is_lora_key("blocks.0.self_attn.q.scale_weight")
