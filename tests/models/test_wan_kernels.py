"""What runs between the products of a block: the choice, compiled blocks, fp8 projections."""

from __future__ import annotations

import pytest
import torch

from tests.models.builders import normal, tiny_wan
from xicon_infer.errors import BackendUnavailable
from xicon_infer.ops import fused_choice
from xicon_infer.ops.linear import Fp8Linear, quantize_weight


def velocity(model, frames=2):
    context = model.encode_context([normal(5, 24, seed=1)])
    return model(normal(1, 16, frames, 4, 6), torch.tensor([500.0]), context)


def test_the_request_reaches_the_blocks():
    model = tiny_wan()
    expected = velocity(model)
    assert {block.kernels for block in model.layers} == {"eager"}
    model.kernels_request = "eager"
    assert torch.equal(velocity(model), expected)
    for request, match in (("fast", "must be one of auto"), ("triton", "do not run on cpu")):
        model.kernels_request = request
        with pytest.raises(BackendUnavailable, match=match):
            velocity(model)


def test_compiled_blocks_give_the_same_and_need_one_graph(monkeypatch):
    monkeypatch.setattr(fused_choice, "COMPILER", "eager")
    fused_choice.compiled.cache_clear()
    torch._dynamo.reset()
    model = tiny_wan()
    expected = {frames: velocity(model, frames) for frames in (2, 3, 5)}
    model.kernels_request = "compile"
    assert torch.equal(velocity(model, 2), expected[2])
    # Another length, and the same again: no other graph.
    with torch.compiler.set_stance("fail_on_recompile"):
        for frames in (3, 5, 2):
            assert torch.equal(velocity(model, frames), expected[frames])
    fused_choice.compiled.cache_clear()
    torch._dynamo.reset()


def test_a_block_that_cannot_be_compiled_is_an_error_with_a_way_out(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fused_choice, "COMPILER", broken)
    fused_choice.compiled.cache_clear()
    model = tiny_wan()
    model.kernels_request = "compile"
    with pytest.raises(BackendUnavailable, match=r"no compiler.*use 'eager'"):
        velocity(model)
    fused_choice.compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("per_row", [False, True])
def test_fused_fp8_projections_give_the_same_bits(per_row):
    model = tiny_wan()
    for block in model.layers:
        for name in ("q", "k", "v"):
            wide = getattr(block.self_attn, name)
            layer = Fp8Linear(wide.in_features, wide.out_features)
            layer.weight.data, layer.scale_weight = quantize_weight(wide.weight, per_row=per_row)
            layer.bias = wide.bias
            setattr(block.self_attn, name, layer)
    expected = velocity(model)
    model.fuse_projections()
    assert {type(block.self_attn.qkv) for block in model.layers} == {Fp8Linear}
    torch.testing.assert_close(velocity(model), expected, rtol=1e-6, atol=1e-6)
