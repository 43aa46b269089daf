"""Tensors read by threads: the right bytes, wherever they go; and an end to everything wrong."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.weights import formats
from tests.weights.test_checkpoint import raw, same
from xicon_infer.errors import Cancelled, OutOfMemory, WeightsError
from xicon_infer.types import SilentProgress
from xicon_infer.weights import reader, reader_memory
from xicon_infer.weights.checkpoint import open_checkpoint, read_tensors
from xicon_infer.weights.reader import stream_tensors
from xicon_infer.weights.reader_extents import OWN_BYTES

CPU = torch.device("cpu")
HOSTS = ("mapped", "copied")
MIB = 2**20


def big_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns tensors of every dtype, some with memory of their own: about 15 MB."""
    rng = np.random.default_rng(seed)

    def tensor(dtype, *shape):
        data = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
        return torch.from_numpy(data).view(dtype).reshape(shape)

    return {
        "blocks.0.cross_attn.k.weight": tensor(torch.float8_e4m3fn, 2100, 2048),
        "blocks.0.cross_attn.k.scale_weight": torch.tensor(0.5),
        "blocks.0.ffn.0.weight": tensor(torch.float8_e5m2, 3000, 2048),
        "blocks.0.norm": tensor(torch.float32, 5120),
        "blocks.1.o.weight": tensor(torch.bfloat16, 700, 2048),
        "blocks.1.q.weight": tensor(torch.float16, 501, 3),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
        "odd": tensor(torch.uint8, 13),
        "ids": torch.arange(7),
        "scale64": tensor(torch.float64, 3),
    }


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return big_state()


@pytest.fixture
def file(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


class Steps(SilentProgress):
    """Keeps the counts; does something at the first."""

    def __init__(self, act=lambda: None) -> None:
        super().__init__()
        self.act = act
        self.counts: list[tuple[int, int, str]] = []

    def step(self, done: int, total: int, unit: str = "step") -> None:
        self.counts.append((done, total, unit))
        if len(self.counts) == 1:
            self.act()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_every_byte_is_that_of_the_file(file, state, threads, host):
    progress = Steps()
    checkpoint = open_checkpoint(file)
    found = stream_tensors(checkpoint, device=CPU, threads=threads, host=host, progress=progress)
    assert list(found) == list(checkpoint.shapes)
    assert same(found, state)
    assert same(found, read_tensors(checkpoint))
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in found.values())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())
    assert progress.counts[-1][0] == progress.counts[-1][1] == file.stat().st_size // 1_000_000
    assert {unit for *_, unit in progress.counts} == {"MB"}
    assert readers() == []


@pytest.mark.parametrize("host", HOSTS)
def test_shards_and_subsets(tmp_path, state, host):
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, inside in parts.items():
        save_file({name: state[name] for name in inside}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, inside in parts.items() for name in inside}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert same(stream_tensors(checkpoint, device=CPU, host=host), state)
    some = ["blocks.1.o.weight", "ids", "blocks.0.norm", "ids"]
    found = stream_tensors(checkpoint, some, device=CPU, host=host)
    assert list(found) == ["blocks.1.o.weight", "ids", "blocks.0.norm"]
    assert same(found, {name: state[name] for name in some})
    assert stream_tensors(checkpoint, [], device=CPU, host=host) == {}
    with pytest.raises(WeightsError, match="holds no tensor x, y"):
        stream_tensors(checkpoint, ["y", "ids", "x"], device=CPU, host=host)


@pytest.mark.parametrize("host", HOSTS)
def test_a_subset_reads_only_its_bytes(file, host):
    total = file.stat().st_size
    progress = Steps()
    stream_tensors(
        open_checkpoint(file), ["blocks.1.q.weight"], device=CPU, host=host, progress=progress
    )
    assert progress.counts == [(0, 1, "MB")]
    progress = Steps()
    some = ["blocks.0.ffn.0.weight"]
    stream_tensors(open_checkpoint(file), some, device=CPU, host=host, progress=progress)
    assert progress.counts[-1][1] == 3000 * 2048 // 1_000_000 < total // 1_000_000


@pytest.mark.parametrize("host", HOSTS)
def test_data_that_are_not_aligned(tmp_path, host):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "F64", "shape": [1], "data_offsets": [11, 19]},
    }
    text = json.dumps(header).encode()
    data = b"abc" + struct.pack("<2fd", 1.5, -2.0, 7.25)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = stream_tensors(open_checkpoint(path), device=CPU, host=host)
    assert found["b"].tolist() == [1.5, -2.0]
    assert found["c"].tolist() == [7.25]
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


def test_pytorch_files_are_left_to_the_plain_reader(tmp_path):
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    torch.save(state, tmp_path / "m.pth")
    checkpoint = open_checkpoint(tmp_path / "m.pth")
    assert same(stream_tensors(checkpoint, ["b", "a.weight"], device=CPU), state)
    with pytest.raises(WeightsError, match="holds no tensor x"):
        stream_tensors(checkpoint, ["x"], device=CPU)


def test_gguf_files_are_left_to_the_plain_reader(tmp_path):
    weight = {"blocks.0.ffn.0.weight": torch.linspace(-1, 1, 512).reshape(2, 256)}
    formats.write_gguf(weight, tmp_path / "m.gguf", "Q8_0", choose=lambda *_: True)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for dtype in (torch.float32, torch.float16):
        found = stream_tensors(checkpoint, device=CPU, dtype=dtype)
        assert found["blocks.0.ffn.0.weight"].dtype == dtype
        assert same(found, read_tensors(checkpoint, dtype=dtype))


@pytest.mark.parametrize("host", HOSTS)
def test_tensors_can_be_changed_and_the_file_stays(file, state, host):
    before = file.read_bytes()
    with torch.inference_mode():
        found = stream_tensors(open_checkpoint(file), device=CPU, host=host)
    norm, ids = found["blocks.0.norm"], found["ids"]
    versions = ids._version
    norm.fill_(2.0)
    assert not norm.is_inference()
    assert ids._version == versions  # no tensor counts the changes of another
    assert torch.equal(ids, state["ids"])
    assert copy.deepcopy(norm).untyped_storage().nbytes() == norm.numel() * 4
    assert file.read_bytes() == before


def test_a_dropped_tensor_gives_its_memory_back(file):
    def mapped_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmSize"))

    found = stream_tensors(open_checkpoint(file), device=CPU, threads=1, host="copied")
    gc.collect()
    start = mapped_kib()
    size = found["blocks.0.cross_attn.k.weight"].numel()
    assert size >= OWN_BYTES
    del found["blocks.0.cross_attn.k.weight"]
    assert start - mapped_kib() >= size // 1024
    del found["odd"]  # lies with others: nothing to give back
    assert start - mapped_kib() < size // 1024 + 64


def test_mapped_tensors_share_the_file(file, state):
    """Private memory would not follow a write to the file; views of it do."""
    checkpoint = open_checkpoint(file)
    views = stream_tensors(checkpoint, ["odd"], device=CPU, host="mapped")
    copies = stream_tensors(checkpoint, ["odd"], device=CPU, host="copied")
    with file.open("r+b") as opened:
        opened.seek(checkpoint.offsets["odd"])
        opened.write(bytes(13))
    assert views["odd"].tolist() == [0] * 13
    assert torch.equal(copies["odd"], state["odd"])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("how", ["shorter", "longer", "other header", "touched", "gone"])
def test_a_file_that_changes_between_opening_and_reading(file, state, how, host):
    checkpoint = open_checkpoint(file)
    if how == "shorter":
        os.truncate(file, file.stat().st_size - 100)
    elif how == "longer":
        with file.open("ab") as opened:
            opened.write(bytes(8))
    elif how == "other header":
        save_file({**state, "odd": torch.zeros(14, dtype=torch.uint8)}, file)
    elif how == "gone":
        file.unlink()
    else:  # the same tensors in another file: what counts is what is read now
        save_file(big_state(seed=1), file)
        assert not same(stream_tensors(checkpoint, device=CPU, host=host), state)
        return
    with pytest.raises(WeightsError, match=r"m\.safetensors.*(incomplete|damaged|changed|read)"):
        stream_tensors(checkpoint, device=CPU, host=host)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("how", ["cut", "touched"])
def test_a_file_that_changes_while_it_is_read(file, how, host):
    def act() -> None:
        if how == "cut":
            os.truncate(file, MIB)
        else:
            os.utime(file, ns=(1, 1))

    with pytest.raises(WeightsError, match=r"m\.safetensors: changed while it was read"):
        stream_tensors(open_checkpoint(file), device=CPU, threads=1, host=host, progress=Steps(act))
    assert readers() == []


def test_a_file_that_is_replaced_while_it_is_read_is_the_one_that_was_opened(file, state):
    other = file.with_name("other")
    save_file(big_state(seed=1), other)
    progress = Steps(lambda: other.replace(file))
    found = stream_tensors(open_checkpoint(file), device=CPU, threads=1, progress=progress)
    assert same(found, state)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_read_error_names_the_file(file, threads, monkeypatch):
    """The disk fails in the middle: at our own interface to it, for there is no broken disk."""
    real = reader_memory.read_fully
    calls = []

    def broken(fd, views, offset):
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        real(fd, views, offset)

    monkeypatch.setattr(reader_memory, "read_fully", broken)
    with pytest.raises(WeightsError, match=r"m\.safetensors: cannot be read: .*Input/output"):
        stream_tensors(open_checkpoint(file), device=CPU, threads=threads, host="copied")
    assert readers() == []
    assert len(calls) == 3 if threads == 1 else len(calls) < file.stat().st_size // MIB


def test_no_files_stay_open(file, monkeypatch):
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    checkpoint = open_checkpoint(file)
    before = count()
    stream_tensors(checkpoint, device=CPU, host="copied")
    assert count() == before
    with pytest.raises(Cancelled):
        stream_tensors(checkpoint, device=CPU, host="copied", progress=Steps(cancel))
    assert count() == before


def cancel() -> None:
    raise Cancelled("stopped")


@pytest.mark.parametrize("host", HOSTS)
def test_cancelling_stops_within_one_read_of_each_thread(file, host, monkeypatch):
    monkeypatch.setattr(reader, "HOST_READ_BYTES", MIB)
    begun = []
    cancelled = threading.Event()
    name = "bring_in" if host == "mapped" else "fill_slabs"
    real = getattr(reader, name)

    def slow(memory):
        take = real(memory)

        def taking(fd, extent):
            begun.append(extent)
            if len(begun) > 1:
                assert cancelled.wait(60)
                time.sleep(0.3)  # until the caller has told the others to stop
            take(fd, extent)

        return taking

    def act() -> None:
        cancelled.set()
        cancel()

    monkeypatch.setattr(reader, name, slow)
    with pytest.raises(Cancelled):
        stream_tensors(open_checkpoint(file), device=CPU, threads=2, host=host, progress=Steps(act))
    assert readers() == []
    assert len(begun) <= 3 < file.stat().st_size // MIB


def test_ctrl_c_stops_the_reading(file):
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # the signal ends the sleep

    # A test runner started in the background ignores SIGINT, and so would this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            stream_tensors(open_checkpoint(file), device=CPU, progress=Steps(interrupt))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 1
    assert readers() == []


def test_no_host_memory_is_an_error_of_ours(monkeypatch):
    with pytest.raises(OutOfMemory, match="host memory for weights"):
        reader_memory.host_slab(2**62)


@pytest.mark.parametrize("code", ["EINVAL", "EFAULT"])
def test_a_system_that_cannot_populate(file, state, code, monkeypatch):
    """An older kernel reads the file instead; a page that cannot be had is an error."""
    import errno

    monkeypatch.setattr(reader_memory, "_madvise", lambda address, size: getattr(errno, code))
    if code == "EINVAL":
        assert same(stream_tensors(open_checkpoint(file), device=CPU, host="mapped"), state)
        return
    with pytest.raises(WeightsError, match=r"m\.safetensors: cannot be read"):
        stream_tensors(open_checkpoint(file), device=CPU, host="mapped")


def test_threads_must_be_some(file):
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        stream_tensors(open_checkpoint(file), device=CPU, threads=0)


def test_other_devices_get_the_tensors_by_way_of_the_host(file, state):
    found = stream_tensors(open_checkpoint(file), device=torch.device("meta"))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    assert all(tensor.is_meta for tensor in found.values())
    assert raw(state["odd"]).numel() == 13
