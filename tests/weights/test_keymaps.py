"""Names of every layout become the names our modules use, and nothing gets lost."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.golden import Golden, rel_max
from tests.parity.weights import replay_sat_names
from xicon_infer.errors import WeightsError
from xicon_infer.models.scail import ScailTransformer
from xicon_infer.models.wan import WanConfig, WanTransformer
from xicon_infer.weights.keymaps import (
    SAT_TABLE,
    drop_markers,
    find_naming,
    to_vae_names,
    to_wan_names,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SAT_FILE = GOLDEN / "scail" / "scail_sat_to_wan_keys.safetensors"
TINY = WanConfig(
    dim=16, ffn_dim=24, num_heads=1, num_layers=2, in_dim=36, text_dim=8, image_dim=8, freq_dim=8
)


def meta(build):
    with torch.device("meta"):
        return build()


def numbered(module):
    """A state dict in which every tensor is filled with its own number."""
    state = module.state_dict()
    return {k: torch.full(v.shape, float(i)) for i, (k, v) in enumerate(state.items())}


def sat_state():
    return {k[4:]: v for k, v in load_file(SAT_FILE).items() if k.startswith("sat.")}


def test_sat_golden():
    """The official SCAIL tree and the wrapper's, one block, exact."""
    checks = replay_sat_names(Golden(SAT_FILE, []))
    assert len(checks) > 50
    assert [check for check in checks if not check.ok] == []


def test_every_rule_of_the_sat_table_is_used():
    for pattern, _ in SAT_TABLE:
        assert any(re.match(pattern, name) for name in sat_state()), pattern


def test_sat_blocks_are_cut_in_order():
    fused = torch.arange(12.0).reshape(6, 2)
    state = {"transformer.layers.3.attention.query_key_value.weight": fused}
    found = to_wan_names(state)
    assert found["blocks.3.self_attn.q.weight"].tolist() == [[0, 1], [2, 3]]
    assert found["blocks.3.self_attn.v.weight"].tolist() == [[8, 9], [10, 11]]
    state = {"transformer.layers.3.attention.query_key_value.weight": fused[:5]}
    with pytest.raises(WeightsError, match="5 rows cannot be cut into 3"):
        to_wan_names(state)


def test_sat_files_with_other_models_inside():
    state = {f"model.diffusion_model.{k}": v for k, v in sat_state().items()}
    state |= {"first_stage_model.conv1.weight": torch.ones(1), "conditioner.x": torch.ones(1)}
    assert to_wan_names(state).keys() == to_wan_names(sat_state()).keys()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_prefixes(prefix):
    state = {"patch_embedding.weight": torch.ones(1), "head.modulation": torch.ones(2)}
    found = to_wan_names({prefix + name: value for name, value in state.items()})
    assert set(found) == set(state)


def test_wan_names_pass_through_untouched():
    state = numbered(meta(lambda: ScailTransformer(TINY)))
    found = to_wan_names(state)
    assert list(found) == list(state)
    assert all(found[name] is value for name, value in state.items())
    unknown = {**state, "something.new": torch.ones(1)}
    assert "something.new" in to_wan_names(unknown)  # strict loading names it


def test_marks_go_and_scales_get_one_name():
    fp8 = torch.ones(2, 2).to(torch.float8_e4m3fn)
    mark = torch.tensor(list(json.dumps({"format": "float8_e5m2"}).encode()), dtype=torch.uint8)
    state = {
        "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn),
        "a.weight": fp8,
        "a.weight_scale": torch.ones(()),
        "a.input_scale": torch.ones(()),
        "a.comfy_quant": mark,
        "b.weight": fp8,
        "b.scale_weight": torch.ones(1),
        "b.scale_input": torch.ones(1),
    }
    found = drop_markers(state)
    assert list(found) == ["a.weight", "a.scale_weight", "b.weight", "b.scale_weight"]
    assert found["a.scale_weight"] is state["a.weight_scale"]
    prefixed = {f"model.diffusion_model.{k}": v for k, v in state.items() if k != "scaled_fp8"}
    assert set(to_wan_names({**prefixed, "scaled_fp8": state["scaled_fp8"]})) == set(found)


def test_a_scale_under_both_names_is_refused():
    with pytest.raises(WeightsError, match=r"called a\.scale_weight"):
        drop_markers({"a.scale_weight": torch.ones(1), "a.weight_scale": torch.ones(1)})


@pytest.mark.parametrize("mark", ['{"format": "nvfp4"}', "{", '{"form": 1}', "[1]"])
def test_other_formats_of_a_layer_are_refused(mark):
    state = {"a.comfy_quant": torch.tensor(list(mark.encode()), dtype=torch.uint8)}
    with pytest.raises(WeightsError, match=r"a\.comfy_quant: .*quantis"):
        drop_markers(state)


def test_scales_of_fused_sat_layers_are_shared():
    name = "transformer.layers.0.attention.query_key_value"
    for scale, expected in ((torch.tensor(2.0), [2.0]), (torch.arange(3.0), [0.0])):
        state = {f"{name}.weight": torch.ones(3, 2), f"{name}.scale_weight": scale}
        found = to_wan_names(state)["blocks.0.self_attn.q.scale_weight"]
        assert found.reshape(-1).tolist() == expected


def test_two_names_that_become_one_are_refused():
    state = {
        "condition_embedder.time_proj.weight": torch.ones(1),
        "time_projection.1.weight": torch.ones(1),
    }
    with pytest.raises(WeightsError, match=r"called time_projection\.1\.weight"):
        to_wan_names(state)
    vae = {"quant_conv.weight": torch.ones(1), "conv1.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"called conv1\.weight"):
        to_vae_names(vae)


def inverted(module, convert):
    """Our name -> the library's name, found by sending numbered tensors through the map."""
    names = list(module.state_dict())
    found = convert(numbered(module))
    assert len(found) == len(names)
    return {ours: names[int(value.flatten()[0])] for ours, value in found.items()}


@pytest.mark.parametrize("image", [True, False])
def test_the_real_diffusers_transformer(image):
    """huggingface/diffusers WanTransformer3DModel with our weights gives our velocity."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    ours = WanTransformer(TINY if image else replace(TINY, image_dim=None))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=16,
        in_channels=36,
        ffn_dim=24,
        num_layers=2,
        text_dim=8,
        freq_dim=8,
        image_dim=8 if image else None,
        added_kv_proj_dim=16 if image else None,
    )
    assert find_naming(theirs.state_dict().keys()) == "diffusers"
    names = inverted(theirs, to_wan_names)
    theirs.load_state_dict({names[k]: v for k, v in ours.state_dict().items()})
    x, text, clip = torch.randn(1, 36, 2, 4, 4), torch.randn(512, 8), torch.randn(1, 5, 8)
    t = torch.tensor([500.0])
    with torch.no_grad():
        states = clip if image else None
        velocity = ours(x, t, ours.encode_context([text], states))
        expected = theirs(x, t, text[None], states, return_dict=False)[0]
    assert (velocity - expected).norm() < 1e-4 * expected.norm()


def test_the_real_diffusers_vae():
    """huggingface/diffusers AutoencoderKLWan with the golden's weights; README tolerance 1e-5."""
    from diffusers import AutoencoderKLWan

    golden = Golden(GOLDEN / "wan_core" / "vae_tiny.safetensors", [])
    config, weights = golden.meta["config"], golden.under("weights.")
    theirs = AutoencoderKLWan(
        base_dim=config["dim"], z_dim=config["z_dim"], dim_mult=config["dim_mult"]
    )
    names = inverted(theirs, to_vae_names)
    theirs.load_state_dict({names[k]: v for k, v in weights.items()})
    mean, std = (golden.tensors[f"in.{name}"].reshape(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        decoded = theirs.decode(golden.tensors["in.latent"] * std + mean).sample
    assert rel_max(decoded, golden.tensors["out.decode"].clamp(-1, 1)) < 1e-5
    for state in (weights, {f"model.{name}": value for name, value in weights.items()}):
        assert to_vae_names(state).keys() == weights.keys()
