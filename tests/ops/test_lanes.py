"""What a CUDA device is told about host memory, with a stand-in for its driver."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest
import torch

from xicon_infer.ops.lanes import CudaLanes
from xicon_infer.ops.packing import own_pages


@pytest.mark.parametrize("size", [0, 1, mmap.PAGESIZE, mmap.PAGESIZE + 1])
def test_a_buffer_shares_no_page(size):
    found = own_pages(size)
    assert (found.dtype, found.shape) == (torch.uint8, (size,))
    assert found.data_ptr() % mmap.PAGESIZE == 0
    room, whole = found.untyped_storage(), -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    assert room.data_ptr() + room.nbytes() - found.data_ptr() >= whole


@pytest.mark.parametrize(("answer", "kernels"), [(0, 0), (2, 1)])
def test_the_error_of_a_lock_that_failed_is_taken_out(answer, kernels, monkeypatch):
    """CUDA would report it at the next kernel."""
    calls = []

    def ones(*size, device):
        calls.append(device)
        raise torch.AcceleratorError("out of memory")

    lanes = CudaLanes.__new__(CudaLanes)
    lanes.device = torch.device("cuda")
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: answer)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", ones)
    assert lanes.pin(own_pages(8)) == (answer == 0)
    assert calls == [lanes.device] * kernels
