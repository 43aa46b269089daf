"""The Wan transformer: parity with diffusers, caching, work counts, options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.builders import TINY, fill, normal, tiny_wan
from xicon_infer.errors import InvalidRequest
from xicon_infer.models.wan import (
    WAN_I2V_14B,
    WanConfig,
    WanTransformer,
    config_from_shapes,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def forward(model, latents=None, t=500.0, text=None, image=None, condition=None):
    latents = normal(1, 16, 3, 8, 6) if latents is None else latents
    text = [normal(5, 24, seed=1)] if text is None else text
    context = model.encode_context(text, image)
    return model(latents, torch.tensor([t] * len(latents)), context, condition)


def test_every_input_changes_the_velocity():
    model = tiny_wan()
    base = forward(model)
    changed = {
        "latents": forward(model, latents=normal(1, 16, 3, 8, 6, seed=9)),
        "timestep": forward(model, t=499.0),
        "text": forward(model, text=[normal(5, 24, seed=2)]),
        "text length": forward(model, text=[normal(5, 24, seed=1)[:4]]),
    }
    for name, velocity in changed.items():
        assert not torch.allclose(base, velocity, atol=1e-4), name


def test_image_and_condition_change_the_velocity():
    model = tiny_wan(image=True)
    image, condition = normal(1, 7, 20, seed=3), normal(1, 20, 3, 8, 6, seed=4)
    base = forward(model, image=image, condition=condition)
    other = forward(model, image=image.flip(-1), condition=condition)
    assert not torch.allclose(base, other, atol=1e-4)
    other = forward(model, image=image, condition=condition + 1)
    assert not torch.allclose(base, other, atol=1e-4)


def test_batch_equals_singles():
    model = tiny_wan()
    latents, texts = normal(2, 16, 2, 4, 6), [normal(5, 24, seed=1), normal(9, 24, seed=2)]
    both = model(latents, torch.tensor([900.0, 10.0]), model.encode_context(texts))
    for i, t in enumerate((900.0, 10.0)):
        alone = forward(model, latents=latents[i : i + 1], t=t, text=[texts[i]])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_fused_projections_give_the_same_result():
    model = tiny_wan()
    base = forward(model)
    model.fuse_projections()
    assert not any(name.endswith("self_attn.q.weight") for name in model.state_dict())
    torch.testing.assert_close(forward(model), base, rtol=1e-5, atol=1e-5)


def test_padding_rows_of_the_text_are_attended_to():
    """The reference pads with zeros before the text MLP; its output for them is not zero."""
    model = tiny_wan()
    projected = model.embed_text([normal(5, 24)])
    assert projected.shape == (1, TINY.text_len, TINY.dim)
    torch.testing.assert_close(projected[0, 5], projected[0, 11])
    assert projected[0, 11].abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"text": [normal(13, 24)]}, "13 tokens exceeds 12"),
        ({"latents": normal(1, 15, 3, 8, 6)}, "takes 16 channels, got 15"),
        ({"latents": normal(1, 16, 3, 7, 6)}, "3x7x6 is not a multiple"),
        ({"image": normal(1, 7, 20)}, "image"),
    ],
)
def test_wrong_inputs_are_refused(change, match):
    with pytest.raises(InvalidRequest, match=match):
        forward(tiny_wan(), **change)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="heads"):
        WanConfig(dim=10, ffn_dim=8, num_heads=3, num_layers=1, in_dim=4)
    with pytest.raises(ValueError, match="at least 1"):
        WanConfig(dim=16, ffn_dim=8, num_heads=2, num_layers=0, in_dim=4)


def test_config_is_read_from_shapes():
    for config in (
        WAN_I2V_14B,
        WanConfig(dim=256, ffn_dim=96, num_heads=2, num_layers=3, in_dim=16),
    ):
        with torch.device("meta"):
            model = WanTransformer(config)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        assert config_from_shapes(shapes) == config
    with pytest.raises(InvalidRequest, match="not a Wan transformer"):
        config_from_shapes({"patch_embedding.weight": (8, 16, 1, 2, 2)})


def test_the_work_is_the_closed_form():
    """Counts a forward on the meta device: no hidden matmul, no recomputed keys and values."""
    config = WanConfig(
        dim=256, ffn_dim=512, num_heads=2, num_layers=3, in_dim=36, text_dim=64, image_dim=80
    )
    with torch.device("meta"):
        model = WanTransformer(config)
        context = model.encode_context([torch.empty(512, 64)], torch.empty(1, 257, 80))
        tokens = 5 * 6 * 4
        model.attention_request = "math"
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 36, 5, 12, 8), torch.empty(1), context)
    d, f, n = config.dim, config.ffn_dim, config.num_layers
    blocks = 2 * n * (6 * d * d + 2 * d * f) * tokens
    attention = 4 * n * d * (tokens**2 + tokens * (512 + 257))
    patch_and_head = 2 * (4 * 36 + 64) * d * tokens
    time = 2 * (256 * d + d * d + 6 * d * d)
    assert counter.get_total_flops() == blocks + attention + patch_and_head + time


def test_tables_of_angles_are_cached_and_bounded():
    model = tiny_wan()
    for frames in range(1, 14):
        forward(model, latents=normal(1, 16, frames, 4, 4))
    assert 1 <= len(model._rope_cache) <= 9
    before = len(model._rope_cache)
    forward(model, latents=normal(1, 16, 13, 4, 4))
    assert len(model._rope_cache) == before


def test_bfloat16_stays_close_to_float32():
    model = tiny_wan(seed=3)
    base = forward(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(("time", "head")):
            module.to(torch.bfloat16)
    assert model.dtype is torch.bfloat16
    low = forward(model)
    assert low.dtype is torch.float32
    error = (low - base).norm() / base.norm()
    assert 0 < error < 2e-2


def test_equals_diffusers():
    """The same weights under diffusers' names give the same velocity."""
    from diffusers import WanTransformer3DModel

    config = WanConfig(
        dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=36, text_dim=32, image_dim=20
    )
    ours = WanTransformer(config)
    fill(ours)
    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=20,
        added_kv_proj_dim=48,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
        eps=1e-6,
    ).eval()
    renames = json.loads((Path(__file__).parent / "diffusers_names.json").read_text())
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        state[name] = value
    theirs.load_state_dict(state)
    latents, text, image = normal(1, 36, 2, 4, 6), normal(512, 32, seed=1), normal(1, 9, 20, seed=2)
    t = torch.tensor([731.0])
    with torch.no_grad():
        expected = theirs(latents, t, text[None], image, return_dict=False)[0]
        velocity = ours(latents, t, ours.encode_context([text], image))
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
