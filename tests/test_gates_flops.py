"""The work of our own models at full size, counted on the meta device: equal to the closed forms.

A recomputed key or value, a head over tokens that nobody reads, or a second branch would show as
FLOP that no formula has. No weight exists here, and no number is computed.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xicon_infer import formulas
from xicon_infer.formulas import SCAIL_14B, WAN_I2V_14B, WAN_T2V_14B, DitShape
from xicon_infer.models import scail, steady_dancer, wan
from xicon_infer.models.passes import TimeEmbedding

FRAMES, HEIGHT, WIDTH = 21, 672, 416
HW = formulas.frame_tokens(WIDTH, HEIGHT)
NOISE = FRAMES * HW


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def on_meta(build):
    with torch.device("meta"):
        model = build()
    model.attention_request = "math"
    return model


def latents(frames: int = FRAMES, channels: int = 16, scale: int = 8) -> torch.Tensor:
    return torch.empty(1, channels, frames, HEIGHT // scale, WIDTH // scale, device="meta")


def context_of(model, texts: int = 1):
    """Returns the context of prompts beside one picture."""
    text = [torch.empty(77, 4096, device="meta") for _ in range(texts)]
    image = None
    if model.config.image_dim is not None:
        image = torch.empty(1, 257, model.config.image_dim, device="meta")
    return model.encode_context(text[:1], image)


def time_of(model) -> TimeEmbedding:
    return model.embed_time(torch.empty(1, device="meta"))


def outer_flops(shape: DitShape, tokens: int) -> int:
    """Returns the FLOP of patch embedding and head, which the closed form leaves out."""
    return 2 * (4 * shape.in_channels + 64) * shape.dim * tokens


def trimmed_flops(shape: DitShape, tokens: int, kept: int) -> int:
    """Returns the FLOP that the last block does not spend on tokens that nobody reads."""
    left_out = tokens - kept
    linear = 2 * (4 * shape.dim**2 + 2 * shape.dim * shape.ffn_dim)
    attention = 4 * shape.dim * (tokens + shape.context_tokens)
    return left_out * (linear + attention)


@pytest.mark.parametrize("shape", [WAN_T2V_14B, WAN_I2V_14B], ids=["t2v", "i2v"])
def test_a_wan_forward_is_the_closed_form(shape: DitShape) -> None:
    config = wan.WAN_I2V_14B if shape.image_tokens else wan.WAN_T2V_14B
    model = on_meta(lambda: wan.WanTransformer(config))
    context, time = context_of(model), time_of(model)
    condition = latents(channels=20) if shape.image_tokens else None
    found = counted(lambda: model(latents(), time, context, condition))
    assert found == formulas.forward_flops(shape, NOISE) + outer_flops(shape, NOISE)


@pytest.mark.parametrize("pose", [True, False])
@pytest.mark.parametrize("reference", [True, False])
def test_a_scail_forward_is_the_closed_form(pose: bool, reference: bool) -> None:
    model = on_meta(lambda: scail.ScailTransformer(scail.SCAIL_14B))
    context, time = context_of(model), time_of(model)
    told = {
        "reference": model.embed_reference(latents(1)) if reference else None,
        "pose": model.embed_pose(latents(scale=16)) if pose else None,
    }
    found = counted(lambda: model(latents(), time, context, **told))
    tokens = formulas.scail_tokens(FRAMES, HW, pose=pose, reference=reference)
    whole = formulas.forward_flops(SCAIL_14B, tokens) + outer_flops(SCAIL_14B, NOISE)
    assert found == whole - trimmed_flops(SCAIL_14B, tokens, NOISE)


def test_a_steady_dancer_forward_is_the_closed_form() -> None:
    model = on_meta(lambda: steady_dancer.SteadyDancerTransformer(steady_dancer.STEADY_DANCER_14B))
    context, time = context_of(model), time_of(model)
    signal = steady_dancer.PoseSignal(
        latents(), model.embed_reference(latents(1)), model.embed_first_pose(latents(1))
    )
    alignment = counted(lambda: model.align_pose(latents(), latents()))
    found = counted(lambda: model(latents(), time, context, latents(channels=20), pose=signal))
    tokens = formulas.steady_dancer_tokens(FRAMES, HW)
    fused = 2 * 4 * 2 * 16 * WAN_I2V_14B.dim * NOISE  # fused and aligned pose in the patches
    whole = formulas.forward_flops(WAN_I2V_14B, tokens) + outer_flops(WAN_I2V_14B, NOISE)
    assert found == whole + fused + alignment - trimmed_flops(WAN_I2V_14B, tokens, NOISE)
    assert alignment < whole / 1000


def test_the_conditioning_is_projected_once_by_the_closed_form() -> None:
    shape, model = SCAIL_14B, on_meta(lambda: scail.ScailTransformer(scail.SCAIL_14B))
    dim, wide = shape.dim, shape.image_dim
    text_mlp = 2 * 512 * (shape.text_dim * dim + dim * dim)
    image_mlp = 2 * 257 * (wide * wide + wide * dim)
    found = counted(lambda: context_of(model))
    assert found == formulas.cross_kv_flops(shape) + text_mlp + image_mlp


def test_the_last_block_saves_what_the_specification_says() -> None:
    """3.8: up to 1/40 of a quarter of the linears; the reference and the pose are 19 % here."""
    tokens = formulas.scail_tokens(FRAMES, HW)
    share = trimmed_flops(SCAIL_14B, tokens, NOISE) / formulas.forward_flops(SCAIL_14B, tokens)
    assert 0.003 < share < 1 / 40


def test_a_skipped_pass_runs_no_block() -> None:
    model = on_meta(lambda: scail.ScailTransformer(scail.SCAIL_14B))
    context, time = context_of(model), time_of(model)

    class Kept:
        def recall(self, entering):
            assert entering.shape == (1, NOISE, 5120)
            return entering

        def keep(self, entering, leaving):
            raise AssertionError("nothing was computed")

    told = {"reference": model.embed_reference(latents(1)), "reuse": Kept()}
    found = counted(lambda: model(latents(), time, context, **told))
    assert found == outer_flops(SCAIL_14B, NOISE)
