"""The way to a GPU: the ring with a stand-in for the device, and on a real one (marked gpu).

The stand-in copies as late as it may: when its event is waited for, or at the end, in any order.
A slot that is filled again too early would then send the wrong bytes.
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.weights.test_checkpoint import same
from tests.weights.test_reader import Steps, big_state, cancel
from xicon_infer.errors import Cancelled, WeightsError
from xicon_infer.weights import reader
from xicon_infer.weights.checkpoint import open_checkpoint
from xicon_infer.weights.reader import device_tensor, stream_tensors
from xicon_infer.weights.reader_ring import make_ring

CUDA = torch.device("cuda")
MIB = 2**20


class LateEvent:
    """A copy that happens when it is first waited for; later waits return after it."""

    def __init__(self, act) -> None:
        self.lock = threading.Lock()
        self.act = act
        self.done = False

    def synchronize(self) -> None:
        with self.lock:
            if not self.done:
                self.act()
                self.done = True


class LateDevice:
    """Slabs in host memory. early: finishes a random copy under way at each new one."""

    def __init__(self, slabs, slot_bytes, *, early=False) -> None:
        self.slabs = slabs
        self.slot_bytes = slot_bytes
        self.slots: dict[int, bytearray] = {}
        self.under_way: list[LateEvent] = []
        self.random = random.Random(0) if early else None
        self.finished = 0
        self.fail_at = -1

    def slot(self, index):
        return memoryview(self.slots.setdefault(index, bytearray(self.slot_bytes)))

    def copy(self, index, extent):
        if len(self.under_way) == self.fail_at:
            raise RuntimeError("the device fell off the bus")

        def act() -> None:
            for start, end, slab, offset in extent.pieces:
                data = self.slots[index][start - extent.start : end - extent.start]
                target = self.slabs[slab].numpy()
                target[offset : offset + end - start] = np.frombuffer(data, np.uint8)

        event = LateEvent(act)
        self.under_way.append(event)
        if self.random is not None:
            self.random.choice(self.under_way).synchronize()
        return event

    def finish(self) -> None:
        self.finished += 1
        for event in reversed(self.under_way):
            event.synchronize()


@pytest.fixture(scope="module")
def state():
    full = big_state()
    del full["empty"]  # made by PyTorch on the device itself
    return full


@pytest.fixture
def file(tmp_path, state):
    save_file(state, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.fixture
def fake(monkeypatch):
    """Has CUDA tensors go to a `LateDevice`; returns the options and the devices made."""
    made: list[LateDevice] = []
    options = {"early": False, "fail_at": -1}

    def make(device, slabs, slot_bytes):
        assert device.type == "cuda"
        made.append(LateDevice(slabs, slot_bytes, early=options["early"]))
        made[-1].fail_at = options["fail_at"]
        return made[-1]

    monkeypatch.setattr(reader, "CudaDevice", make)
    monkeypatch.setattr(reader, "device_slab", lambda size, device: host_slab(size))
    monkeypatch.setattr(reader, "SLOT_BYTES", MIB)
    return options, made


def host_slab(size):
    return torch.full((size,), 0xAA, dtype=torch.uint8)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_slots_are_filled_again_only_after_their_copy(
    file, state, fake, early, slots, threads, monkeypatch
):
    options, made = fake
    options["early"] = early
    monkeypatch.setattr(reader, "make_ring", lambda device: make_ring(device, slots))
    found = stream_tensors(open_checkpoint(file), device=CUDA, threads=threads)
    assert same(found, state)
    (device,) = made
    assert all(event.done for event in device.under_way)
    assert len(device.under_way) > slots  # slots were used again
    assert len(device.slots) <= slots
    assert device.finished == 1


def test_a_subset_copies_no_gaps(file, state, fake):
    names = ["blocks.0.norm", "blocks.1.q.weight", "ids"]
    found = stream_tensors(open_checkpoint(file), names, device=CUDA)
    assert same(found, {name: state[name] for name in names})
    (device,) = fake[1]
    assert len(device.slabs) == 1
    assert (device.slabs[0] == 0xAA).any()  # alignment: bytes between tensors are not touched


@pytest.mark.parametrize("threads", [1, 4])
def test_copies_under_way_end_before_an_error_leaves(file, fake, threads):
    options, made = fake
    options["fail_at"] = 4
    with pytest.raises(RuntimeError, match="fell off the bus"):
        stream_tensors(open_checkpoint(file), device=CUDA, threads=threads)
    assert made[0].finished == 1
    assert all(event.done for event in made[0].under_way)
    with pytest.raises(Cancelled):
        stream_tensors(open_checkpoint(file), device=CUDA, progress=Steps(cancel))
    assert made[1].finished == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("reader-")]


def test_a_truncated_file_gives_its_slots_back(file, fake):
    def act() -> None:
        with file.open("r+b") as opened:
            opened.truncate(2 * MIB)

    with pytest.raises(WeightsError, match="changed while it was read"):
        stream_tensors(open_checkpoint(file), device=CUDA, threads=4, progress=Steps(act))
    assert fake[1][0].finished == 1


def test_tensors_of_a_slab_are_no_views_to_autograd():
    slab = torch.zeros(1024, dtype=torch.uint8)
    a = device_tensor(slab, 0, torch.float32, (2, 3))
    b = device_tensor(slab, 256, torch.float8_e4m3fn, (4,))
    scalar = device_tensor(slab, 512, torch.bfloat16, ())
    version = b._version
    a.fill_(1.0)
    assert a.is_contiguous()
    assert (a._base, b._base, b._version) == (None, None, version)
    assert (scalar.shape, b.dtype) == ((), torch.float8_e4m3fn)
    assert slab[:24].view(torch.float32).tolist() == [1.0] * 6
    assert slab[24:].sum() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [1, 8])
def test_on_a_gpu(file, state, threads):
    found = stream_tensors(open_checkpoint(file), device=CUDA, threads=threads)
    assert all(tensor.is_cuda for tensor in found.values())
    assert same({name: tensor.cpu() for name, tensor in found.items()}, state)


@pytest.mark.gpu
def test_memory_in_use_on_a_gpu_is_not_overwritten(file):
    """Freed memory may still be read by work that is queued; the copies wait for it."""
    for _ in range(3):
        old = torch.ones(64 * MIB, device=CUDA)
        for _ in range(50):
            old = old * 1.0
        total = old.sum()
        del old
        stream_tensors(open_checkpoint(file), device=CUDA)
        assert total.item() == 64 * MIB
