"""Block swap: the same numbers, the same tensors, and nothing left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from tests.models.builders import fill, normal, tiny_scail, tiny_wan
from tests.ops.lanes import QueueLanes
from xicon_infer.errors import InvalidRequest
from xicon_infer.models.wan import WanConfig, WanTransformer
from xicon_infer.ops.linear import Fp8Linear, quantize_weight
from xicon_infer.ops.lora import apply_loras, remove_loras
from xicon_infer.ops.lora_keys import LoraFile, read_lora
from xicon_infer.ops.offload import BlockSwap, projecting, streaming
from xicon_infer.ops.placing import KV_PROJECTIONS, kv_layers, outside, placed

CPU = torch.device("cpu")
LAYERS = 5


def model(fp8=False) -> WanTransformer:
    config = WanConfig(
        dim=64, ffn_dim=96, num_heads=2, num_layers=LAYERS, in_dim=16, text_dim=24, text_len=12
    )
    found = fill(WanTransformer(config))
    if fp8:
        for block in found.layers:
            block.ffn[0] = fp8_copy(block.ffn[0])
            block.self_attn.o = fp8_copy(block.self_attn.o)
    return found


def fp8_copy(layer: nn.Linear) -> Fp8Linear:
    copy = Fp8Linear(layer.in_features, layer.out_features)
    copy.weight.data, copy.scale_weight = quantize_weight(layer.weight)
    copy.bias.data = layer.bias.data.clone()
    return copy


def forward(found):
    context = found.encode_context([normal(5, 24)])
    return found(normal(1, 16, 2, 4, 4), torch.tensor([500.0]), context)


def snapshot(module):
    """Everything that can be seen of the tensors, and the tensors themselves."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: (id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.detach().clone())
        for name, t in tensors
    }


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(before, after, *, storage=True):
    assert before.keys() == after.keys()
    for name, (identity, pointer, *facts, value) in before.items():
        assert after[name][0] == identity, name
        assert after[name][2:5] == tuple(facts), name
        assert torch.equal(bits(after[name][5]), bits(value)), name
        if storage:
            assert after[name][1] == pointer, name


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize("swapped", range(LAYERS + 1))
def test_results_are_those_of_the_resident_model_bit_by_bit(swapped, buffers, fp8):
    found = model(fp8)
    with torch.inference_mode():
        expected = forward(found)
        swap = BlockSwap(found.layers, swapped, CPU, buffers=buffers)
        with swap.attached():
            for _ in range(3):  # an odd number of blocks takes other buffers in the next pass
                assert torch.equal(forward(found), expected)
        assert torch.equal(forward(found), expected)


def test_attached_tensors_are_the_same_objects_in_the_buffers():
    found = model(fp8=True)
    swap = BlockSwap(found.layers, 3, CPU)
    before, where = snapshot(found), {}
    with swap.attached():
        buffers = [slot.buffer for slot in swap._attached.slots]

        def look(block, index):
            for tensor in (*block.parameters(), *block.buffers()):
                inside = [
                    b.data_ptr() <= tensor.data_ptr() < b.data_ptr() + b.nbytes for b in buffers
                ]
                where.setdefault(index, set()).add(inside.index(True) if any(inside) else None)
                assert tensor.data_ptr() % 64 == 0 or not any(inside)

        for index, block in enumerate(found.layers):
            block.ffn[1].register_forward_hook(lambda *_, b=block, i=index: look(b, i))
        forward(found)
        assert where == {i: {None} for i in (1, 3)} | {0: {0}, 2: {1}, 4: {0}}
        assert swap.order == [0, 2, 4]
        assert_same(before, snapshot(found), storage=False)


def test_detaching_restores_every_tensor_and_its_storage():
    found = model(fp8=True)
    swap = BlockSwap(found.layers, 3, CPU)
    plain = snapshot(found)
    with swap.attached():
        pass
    packed = snapshot(found)
    assert_same(plain, packed, storage=False)  # swapped blocks moved to the packed host memory
    with torch.inference_mode(), swap.attached():
        forward(found)
    assert_same(packed, snapshot(found))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in found.layers)


def test_layouts_and_odd_kinds_of_tensors_survive():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.turned = nn.Parameter(torch.randn(4, 6).t(), requires_grad=False)
            self.last = nn.Parameter(
                torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), requires_grad=False
            )
            self.register_buffer("one", torch.tensor(3.5))
            self.register_buffer("none", torch.zeros(0, 4))
            self.register_buffer("flags", torch.tensor([True, False, True]))
            self.register_buffer("bytes", torch.arange(7, dtype=torch.uint8))
            self.again = self.turned

    block = Odd()
    plain = snapshot(block)
    swap = BlockSwap([block], 1, CPU)
    with swap.attached(hooks=False), swap.block(0):
        assert_same(plain, snapshot(block), storage=False)
        assert block.again is block.turned
    assert_same(plain, snapshot(block), storage=False)


def test_a_pass_that_breaks_off_leaves_the_model_usable():
    found = model()
    expected = forward(found)
    swap = BlockSwap(found.layers, 4, CPU)
    swap.attach()

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    for index in range(LAYERS):
        hook = found.layers[index].ffn[0].register_forward_hook(stop)
        with pytest.raises(Stop):
            forward(found)
        hook.remove()
        assert not any(slot.busy for slot in swap._attached.slots)
        assert torch.equal(forward(found), expected), index
    with pytest.raises(Stop), swap.attached():
        stop()
    assert swap._attached is None
    assert torch.equal(forward(found), expected)


def test_a_device_that_is_full_leaves_everything_on_the_host():
    found = model()
    plain = snapshot(found)

    class Full(QueueLanes):
        def empty(self, size):
            raise torch.OutOfMemoryError("full")

    swap = BlockSwap(found.layers, 3, CPU, lanes=Full())
    with pytest.raises(torch.OutOfMemoryError):
        swap.attach()
    assert_same(plain, snapshot(found), storage=False)
    swap = BlockSwap(found.layers, 2, torch.device("cuda:7"), lanes=QueueLanes())
    before = snapshot(found)
    with pytest.raises((RuntimeError, AssertionError)):
        swap.attach()  # no such device: the blocks that stay cannot go there
    assert_same(before, snapshot(found), storage=False)
    assert swap._attached is None


def loras(found, rank=2):
    state = {}
    for index in range(LAYERS):
        for name, layer in (("self_attn.q", 64), ("ffn.0", 96)):
            key = f"diffusion_model.blocks.{index}.{name}"
            state[f"{key}.lora_down.weight"] = normal(rank + index % 2, 64, seed=index)
            state[f"{key}.lora_up.weight"] = normal(layer, rank + index % 2, seed=index + 9)
    return [(LoraFile("side", read_lora(state)), 0.7)]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("mode", ["full", "merge"])
def test_loras_may_change_between_two_jobs(mode, fp8):
    found = model(fp8)
    plain = forward(found)
    swap = BlockSwap(found.layers, 3, CPU)
    with swap.attached():
        assert torch.equal(forward(found), plain)
    apply_loras(found, loras(found), mode)
    with_lora = forward(found)
    assert not torch.equal(with_lora, plain)
    with swap.attached():
        assert torch.equal(forward(found), with_lora)
    remove_loras(found)
    assert torch.equal(forward(found), plain)
    with swap.attached():
        assert torch.equal(forward(found), plain)


def test_an_unchanged_block_is_packed_once():
    found = model()
    lanes = QueueLanes()
    swap = BlockSwap(found.layers, 3, CPU, lanes=lanes)
    swap.attach()
    first = [packed.host.data_ptr() for packed in swap._packed.values()]
    swap.detach()
    swap.attach()
    assert first == [packed.host.data_ptr() for packed in swap._packed.values()]
    assert sorted(lanes.pinned) == sorted(first)
    assert swap.host_bytes >= 3 * sum(p.nbytes for p in found.layers[0].parameters())
    swap.close()
    assert not lanes.pinned
    assert swap._attached is None


def test_memory_is_unlocked_before_it_is_freed():
    found, lanes = model(), QueueLanes()
    swap = BlockSwap(found.layers, 3, CPU, lanes=lanes)
    with swap.attached():
        assert len(lanes.pinned) == 3
    del swap
    gc.collect()
    assert not lanes.pinned


def test_host_memory_that_cannot_be_locked_is_used_all_the_same(caplog):
    class Unlockable(QueueLanes):
        def pin(self, host):
            return False

    found = model()
    expected = forward(found)
    swap = BlockSwap(found.layers, 3, CPU, lanes=Unlockable())
    with swap.attached(hooks=False):
        pass
    assert "cannot be locked" in caplog.text
    assert not swap.pinned
    assert torch.equal(forward(found), expected)
    lanes = QueueLanes()
    with BlockSwap(found.layers, 3, CPU, lanes=lanes, pinned=False).attached(hooks=False):
        assert not lanes.pinned


def test_layers_set_aside_do_not_move():
    found = tiny_scail()
    names = {f"{n}.{kind}" for n in KV_PROJECTIONS for kind in ("weight", "bias")}
    before = snapshot(found.layers[0])
    swap = BlockSwap(found.layers, 2, CPU, aside=KV_PROJECTIONS)
    with swap.attached(hooks=False), swap.block(0):
        after = snapshot(found.layers[0])
        still = {name for name in before if before[name][1] == after[name][1]}
    assert still == names
    whole = BlockSwap(found.layers, 2, CPU)
    whole.attach(hooks=False)
    kv = sum(p.nbytes for layer in kv_layers(found.layers) for p in layer.parameters())
    assert whole.host_bytes - swap.host_bytes == pytest.approx(kv, abs=2 * 8 * 256)
    whole.detach()


@pytest.mark.parametrize(("build", "count"), [(tiny_wan, 4), (tiny_scail, 8)])
def test_the_conditioning_is_projected_with_two_layers_on_the_device(build, count):
    found = build()
    text = [normal(5, 24)]
    image = normal(1, 9, 20) if count == 8 else None
    expected = found.encode_context(text, image)
    layers = kv_layers(found.layers)
    assert len(layers) == count
    swap = BlockSwap(layers, count, CPU)
    with torch.inference_mode(), projecting(found, found.layers, swap):
        projected = found.encode_context(text, image)
    for a, b in zip(expected, projected, strict=True):
        assert all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_streamed_model_is_ready_and_then_itself_again():
    found = tiny_scail()
    context = found.encode_context([normal(5, 24)], normal(1, 9, 20))
    call = (normal(1, 16, 2, 4, 4), torch.tensor([500.0]), context)
    expected = found(*call)
    swap = BlockSwap(found.layers, 2, CPU, aside=KV_PROJECTIONS)
    swap.attach()
    swap.detach()
    before = snapshot(found)
    with torch.inference_mode(), streaming(found, swap):
        assert torch.equal(found(*call), expected)
    with torch.inference_mode(), streaming(found, swap, hooks=False):
        assert not any(block._forward_hooks for block in found.layers)
    assert_same(before, snapshot(found))


def test_what_lies_outside_the_blocks():
    found = tiny_scail()
    blocks = {id(t) for block in found.layers for t in (*block.parameters(), *block.buffers())}
    rest = {id(t) for t in outside(found, found.layers)}
    everything = {id(t) for t in (*found.parameters(), *found.buffers())}
    assert rest | blocks == everything
    assert not rest & blocks


def test_a_block_that_was_not_entered_never_shows_the_weights_of_another():
    found = model()
    expected = [block.modulation.clone() for block in found.layers]
    swap = BlockSwap(found.layers, LAYERS, CPU)
    with swap.attached():
        forward(found)
        for block, value in zip(found.layers, expected, strict=True):
            assert torch.equal(block.modulation, value)


def test_placed_tensors_come_back_whatever_happens():
    layer = fp8_copy(fill(nn.Linear(16, 16)))
    tensors = [layer.weight, layer.scale_weight]
    before = snapshot(layer)
    with torch.inference_mode(), placed(tensors, CPU):
        assert_same(before, snapshot(layer))
    with pytest.raises(ValueError, match="stop"), placed(tensors, CPU):
        raise ValueError("stop")
    with pytest.raises(RuntimeError), placed(tensors, torch.device("meta")):
        raise AssertionError("a tensor with numbers cannot become one without")
    assert_same(before, snapshot(layer))


def test_limits_are_checked():
    blocks = model().layers
    for swapped in (-1, LAYERS + 1):
        with pytest.raises(InvalidRequest, match=f"0 to {LAYERS}, got {swapped}") as caught:
            BlockSwap(blocks, swapped, CPU)
        assert caught.value.field == "blocks_to_swap"
    with pytest.raises(InvalidRequest, match="2 buffers"):
        BlockSwap(blocks, 3, CPU, buffers=1)


def test_attaching_twice_and_detaching_twice_do_no_harm():
    found = model()
    swap = BlockSwap(found.layers, 3, CPU)
    swap.detach()
    swap.attach()
    swap.attach()
    hooks = [len(block._forward_hooks) for block in found.layers]
    assert sum(hooks) == 3
    swap.detach()
    swap.detach()
    assert not any(len(block._forward_hooks) for block in found.layers)
