"""The parts of the loader: what is read at once, threads that end, reads that are never short."""

from __future__ import annotations

import os
import random
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.weights.reader_extents import (
    ALIGNMENT,
    GAP_BYTES,
    OWN_BYTES,
    SHARED_BYTES,
    Extent,
    Piece,
    extent_bytes,
    plan_extents,
    plan_memory,
)
from xicon_infer.weights.reader_threads import read_fully, read_through, share_out

MIB = 2**20


def test_large_tensors_get_memory_of_their_own():
    sizes = {"a": 100, "big": OWN_BYTES, "b": 5, "bigger": OWN_BYTES + 7, "c": 1}
    layout = plan_memory(sizes)
    assert layout.slabs == [2 * ALIGNMENT + 1, OWN_BYTES, OWN_BYTES + 7]
    assert layout.places == {
        "a": (0, 0),
        "big": (1, 0),
        "b": (0, ALIGNMENT),
        "bigger": (2, 0),
        "c": (0, 2 * ALIGNMENT),
    }
    assert plan_memory({}) == ([], {})


def test_small_tensors_fill_slabs_of_limited_size():
    size = OWN_BYTES - 1
    layout = plan_memory({str(number): size for number in range(40)})
    assert len(layout.slabs) == 3
    assert max(layout.slabs) <= SHARED_BYTES


@settings(deadline=None)
@given(st.lists(st.integers(1, 3 * OWN_BYTES // 2), max_size=60))
def test_no_two_tensors_overlap(sizes):
    named = {str(number): size for number, size in enumerate(sizes)}
    layout = plan_memory(named)
    taken: dict[int, int] = {}
    for name, size in named.items():
        slab, offset = layout.places[name]
        assert offset % ALIGNMENT == 0
        assert offset >= taken.get(slab, 0)
        taken[slab] = offset + size
    assert [taken[slab] for slab in range(len(layout.slabs))] == layout.slabs


def test_small_gaps_are_read_along():
    pieces = [Piece(0, 10, 0, 0), Piece(20, 30, 0, 512), Piece(30 + GAP_BYTES + 1, 10**6, 1, 0)]
    assert plan_extents(pieces, MIB) == [
        Extent(0, 30, (pieces[0], pieces[1])),
        Extent(30 + GAP_BYTES + 1, 10**6, (pieces[2],)),
    ]
    assert plan_extents(reversed(pieces), MIB) == plan_extents(pieces, MIB)
    assert plan_extents([Piece(3, 3, 0, 0)], MIB) == []


def test_what_goes_on_in_file_and_memory_is_one_piece():
    goes_on = [Piece(0, 8, 0, 0), Piece(8, 20, 0, 8)]
    assert plan_extents(goes_on, MIB) == [Extent(0, 20, (Piece(0, 20, 0, 0),))]
    jumps = [Piece(0, 8, 0, 0), Piece(8, 20, 0, 256)]
    assert plan_extents(jumps, MIB) == [Extent(0, 20, tuple(jumps))]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3 * GAP_BYTES), st.integers(0, 3 * MIB)), max_size=12),
    st.sampled_from([4096, 10**5, MIB]),
)
def test_extents_cover_every_piece_once(spans, size):
    pieces, position = [], 0
    for number, (gap, length) in enumerate(spans):
        pieces.append(Piece(position + gap, position + gap + length, number, 17))
        position += gap + length
    extents = plan_extents(pieces, size)
    found: dict[int, int] = {}
    last = 0
    for extent in extents:
        assert last <= extent.start < extent.end <= extent.start // size * size + size
        last = extent.end
        assert (extent.start, extent.end) == (extent.pieces[0].start, extent.pieces[-1].end)
        for before, after in zip(extent.pieces, extent.pieces[1:], strict=False):
            assert 0 <= after.start - before.end <= GAP_BYTES
        for start, end, slab, offset in extent.pieces:
            assert start - offset == pieces[slab].start - 17
            found[slab] = found.get(slab, 0) + end - start
    assert found == {p.slab: p.end - p.start for p in pieces if p.end > p.start}


def test_every_thread_gets_several_reads():
    assert extent_bytes(0, 8, 16 * MIB) == MIB
    assert extent_bytes(64 * MIB, 4, 16 * MIB) == 4 * MIB
    assert extent_bytes(64 * MIB + 1, 4, 16 * MIB) == 5 * MIB
    assert extent_bytes(10**11, 8, 16 * MIB) == 16 * MIB


@pytest.fixture
def opened(tmp_path):
    data = random.Random(0).randbytes(50_000)
    (tmp_path / "f").write_bytes(data)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    yield SimpleNamespace(fd=fd, data=data)
    os.close(fd)


@pytest.mark.parametrize("most", [1, 7, 1000, 10**9])
def test_short_reads_go_on_where_they_ended(opened, most):
    """A read may end anywhere, also between and inside pieces of memory."""
    pieces = [bytearray(n) for n in (1, 0, 10, 3000, 2, 977)]
    asked = []

    def short(fd, buffers, offset):
        asked.append(offset)
        return os.preadv(fd, cut(buffers, most), offset)

    read_fully(opened.fd, [memoryview(piece) for piece in pieces], 123, read=short)
    assert b"".join(pieces) == opened.data[123 : 123 + 3990]
    assert asked == list(range(123, 123 + 3990, min(most, 3990)))


def cut(buffers, most):
    """Returns memory for at most so many bytes."""
    out = []
    for buffer in buffers:
        out.append(buffer[:most])
        most -= len(out[-1])
    return [part for part in out if len(part)]


def test_more_pieces_than_one_call_takes(opened):
    pieces = [bytearray(3) for _ in range(3000)]
    read_fully(opened.fd, [memoryview(piece) for piece in pieces], 5)
    assert b"".join(pieces) == opened.data[5:9005]


def test_the_end_of_the_file_is_an_error(opened):
    with pytest.raises(EOFError, match="ends at byte 50000"):
        read_fully(opened.fd, [memoryview(bytearray(100))], 49_950)


def test_reading_for_the_page_cache_reads_everything(opened):
    scratch = memoryview(bytearray(4096))
    read_through(opened.fd, 10, 50_000, scratch)
    assert bytes(scratch).startswith(opened.data[10 + 12 * 4096 :][: 50_000 - 10 - 12 * 4096])
    with pytest.raises(EOFError):
        read_through(opened.fd, 10, 50_001, scratch)


def test_all_tasks_are_done_and_told():
    told: list[int] = []
    caller = threading.current_thread()
    share_out(
        range(100),
        lambda task: task,
        threads=5,
        after=lambda n: told.append(n) if threading.current_thread() is caller else None,
    )
    assert sorted(told) == list(range(100))
    share_out([], lambda task: task, threads=5, after=told.append)
    assert len(told) == 100


@pytest.mark.parametrize("threads", [1, 4, 50])
def test_the_first_error_stops_the_rest(threads):
    begun = []

    def work(task):
        begun.append(task)
        if task == 5:
            raise KeyError("five")
        time.sleep(0.002)
        return task

    with pytest.raises(KeyError, match="five"):
        share_out(range(1000), work, threads=threads, after=lambda n: None)
    assert len(begun) < 150
    assert not [t for t in threading.enumerate() if t.name.startswith("reader-")]


def test_work_is_done_at_the_same_time():
    together = threading.Barrier(3, timeout=10)
    share_out(range(3), lambda task: together.wait() * 0, threads=3, after=lambda n: None)
