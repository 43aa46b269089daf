"""Fused projections and kernels of a loaded pipeline: when, why not, and what stays possible."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipelines import fusing
from pipelines.fusing import fuse_projections
from pipelines.loading import LoadOptions, load_tiny
from xicon_infer.errors import InvalidRequest
from xicon_infer.ops.fused_choice import Choice
from xicon_infer.ops.lora import LoraLinear, apply_loras
from xicon_infer.ops.lora_keys import LoraDelta, LoraFile
from xicon_infer.ops.offload import BlockSwap

CPU = torch.device("cpu")
Q = "blocks.1.self_attn.q"


def tiny(**options):
    return load_tiny("wan_t2v", replace(LoadOptions(), **options))


def lora(dim):
    return LoraFile("q", {Q: LoraDelta(down=torch.ones(2, dim), up=torch.ones(dim, 2))})


def fused_blocks(model):
    return [block.self_attn.qkv is not None for block in model.layers]


@pytest.mark.parametrize(("wanted", "fused"), [("auto", False), ("off", False), ("on", True)])
def test_the_option_decides(wanted, fused):
    parts = tiny(fuse_qkv=wanted)
    assert all(each == fused for each in fused_blocks(parts.transformer))
    told = parts.facts["fused_qkv"]
    assert told["fused_blocks"] == (told["blocks"] if fused else 0)
    assert told["why"] and (wanted != "off" or told["why"] == "off")


def test_auto_wants_kernels_of_triton_and_everything_on_the_device(monkeypatch):
    model = tiny().transformer
    monkeypatch.setattr(fusing, "choose_kernels", lambda *_: Choice("triton", "for this test"))
    told = fuse_projections(model, "auto", device=CPU, resident=False)
    assert told["fused_blocks"] == 0 and "not all networks" in told["why"]
    told = fuse_projections(model, "auto", device=CPU, resident=True)
    assert told["fused_blocks"] == told["blocks"]


def test_a_lora_beside_the_weights_stands_in_the_way():
    model = tiny().transformer
    dim = model.config.dim
    apply_loras(model, [(lora(dim), 1.0)])
    told = fuse_projections(model, "on", device=CPU, resident=True)
    assert fused_blocks(model)[:2] == [True, False]
    assert "block 1: only plain linear layers" in told["why"]
    everywhere = {f"blocks.{n}.self_attn.q": lora(dim).deltas[Q] for n in range(len(model.layers))}
    other = tiny().transformer
    apply_loras(other, [(LoraFile("q", everywhere), 1.0)])
    with pytest.raises(InvalidRequest, match="merge LoRAs first") as caught:
        fuse_projections(other, "on", device=CPU, resident=True)
    assert caught.value.field == "fuse_qkv"


def test_undo_copies_stand_in_the_way():
    model = tiny().transformer
    apply_loras(model, [(lora(model.config.dim), 1.0)], "merge")
    with pytest.raises(InvalidRequest, match="undo copies"):
        fuse_projections(model, "on", device=CPU, resident=True)


def test_loras_that_come_later_lie_on_the_fused_layer():
    model, split = tiny(fuse_qkv="on").transformer, tiny().transformer
    for each in (model, split):
        apply_loras(each, [(lora(each.config.dim), 0.5)])
    assert type(model.layers[1].self_attn.qkv) is LoraLinear
    x = torch.randn(3, model.config.dim, generator=torch.Generator().manual_seed(0))
    found = model.layers[1].self_attn.qkv(x)
    parts = [layer(x) for layer in split.layers[1].self_attn.inputs]
    torch.testing.assert_close(found, torch.cat(parts, -1))


@pytest.mark.parametrize("storage", ["merged-bf16", "merged-fp8"])
def test_merged_storages_are_fused_after_the_merge(storage):
    parts = tiny(fuse_qkv="on", storage=storage, dtype=torch.bfloat16)
    assert all(fused_blocks(parts.transformer))
    assert parts.facts["storage"]["storage"] == storage


def test_a_fused_model_may_leave_the_device():
    parts = tiny(fuse_qkv="on")
    text = [torch.randn(3, parts.transformer.config.text_dim)]
    latents, time = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0])
    context = parts.transformer.encode_context(text)
    expected = parts.transformer(latents, time, context)
    swap = BlockSwap(parts.transformer.layers, 2, CPU, pinned=False)
    with swap.attached():
        assert torch.equal(parts.transformer(latents, time, context), expected)
