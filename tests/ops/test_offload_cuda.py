"""Block swap on a GPU: real streams, locked memory, and how little of the device it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.builders import fill, normal, tiny_scail
from xicon_infer.ops.linear import Fp8Linear, quantize_weight
from xicon_infer.ops.offload import BlockSwap, projecting, streaming
from xicon_infer.ops.placing import KV_PROJECTIONS, kv_layers, placed

pytestmark = pytest.mark.gpu

WIDTH = 1024


def stack(count, fp8):
    blocks = []
    for seed in range(count):
        layer = fill(nn.Linear(WIDTH, WIDTH), seed)
        if fp8:
            plain, layer = layer, Fp8Linear(WIDTH, WIDTH)
            layer.weight.data, layer.scale_weight = quantize_weight(plain.weight)
            layer.bias.data = plain.bias.data
        blocks.append(layer)
    return blocks


def run(blocks, x):
    for block in blocks:
        x = torch.nn.functional.silu(block(x))
    return x


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("swapped", "buffers"), [(0, 2), (3, 2), (7, 2), (12, 2), (12, 3)])
def test_results_are_those_of_the_resident_blocks(swapped, buffers, fp8):
    device = torch.device("cuda")
    blocks = stack(12, fp8)
    x = normal(4096, WIDTH).to(device)
    tensors = [t for b in blocks for t in (*b.parameters(), *b.buffers())]
    with torch.inference_mode():
        with placed(tensors, device):
            expected = run(blocks, x)
        swap = BlockSwap(blocks, swapped, device, buffers=buffers)
        with swap.attached():
            for _ in range(20):
                assert torch.equal(run(blocks, x), expected)
        swap.close()
    assert all(not tensor.is_cuda for tensor in tensors)


def test_host_memory_is_locked_and_unlocked():
    blocks = stack(4, fp8=True)
    swap = BlockSwap(blocks, 4, torch.device("cuda"))
    with swap.attached():
        assert swap.pinned
        assert all(packed.host.is_pinned() for packed in swap._packed.values())
    hosts = [packed.host for packed in swap._packed.values()]
    swap.close()
    assert not any(host.is_pinned() for host in hosts)


def test_the_device_holds_two_blocks_and_nothing_is_allocated_in_the_loop():
    device = torch.device("cuda")
    blocks = stack(16, fp8=False)
    one = sum(p.nbytes for p in blocks[0].parameters())
    before = torch.cuda.memory_allocated()
    swap = BlockSwap(blocks, 16, device)
    with torch.inference_mode(), swap.attached():
        assert torch.cuda.memory_allocated() - before < 2.1 * one
        calls = torch.cuda.memory_stats()["allocation.all.allocated"]
        for index in range(16):
            with swap.block(index):
                pass
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == calls
    assert torch.cuda.memory_allocated() == before


def test_placed_tensors_come_back_without_a_copy():
    layer = stack(1, fp8=True)[0]
    tensors = [layer.weight, layer.bias, layer.scale_weight]
    pointers = [tensor.data_ptr() for tensor in tensors]
    with torch.inference_mode(), placed(tensors, torch.device("cuda")):
        assert all(tensor.is_cuda for tensor in tensors)
    assert pointers == [tensor.data_ptr() for tensor in tensors]


def test_a_block_that_was_not_entered_is_on_the_host():
    blocks = stack(4, fp8=False)
    with BlockSwap(blocks, 4, torch.device("cuda")).attached():
        assert not any(block.weight.is_cuda for block in blocks)
        with pytest.raises(RuntimeError):
            nn.functional.linear(normal(1, WIDTH).cuda(), blocks[2].weight)


def test_a_model_is_projected_and_sampled_with_nothing_resident():
    found, device = tiny_scail(), torch.device("cuda")
    text, image = [normal(5, 24)], normal(1, 9, 20)
    latents, time = normal(1, 16, 2, 4, 4).to(device), torch.tensor([500.0], device=device)
    with torch.inference_mode():
        with placed([*found.parameters(), *found.buffers()], device):
            expected = found(latents, time, found.encode_context(text, image))
        layers = kv_layers(found.layers)
        with projecting(found, found.layers, BlockSwap(layers, len(layers), device)):
            context = found.encode_context(text, image)
        with streaming(found, BlockSwap(found.layers, 2, device, aside=KV_PROJECTIONS)):
            assert torch.equal(found(latents, time, context), expected)
