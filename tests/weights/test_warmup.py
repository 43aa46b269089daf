"""The warm-up: reads what it should, stays in bounds, stops, and never fails."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from xicon_infer.weights import warmup
from xicon_infer.weights.warmup import READ_BYTES, free_memory, warm_files

MIB = 2**20


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    sizes = {"a": 3 * READ_BYTES + 5, "b": 1000, "c": 0}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    return [tmp_path / name for name in sizes]


@pytest.fixture
def reads(monkeypatch):
    """Returns the parts read so far, as name, start and end."""
    parts = []
    real = warmup._warm

    def spy(part, scratch):
        parts.append((part.path.name, part.start, part.end))
        real(part, scratch)

    monkeypatch.setattr(warmup, "_warm", spy)
    return parts


def threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("reader-", "warmup"))]


@pytest.mark.parametrize("number", [1, 4])
def test_every_byte_is_read_once(files, reads, number):
    warming = warm_files([*files, files[0]], threads=number)
    assert warming.wait(60)
    assert warming.done
    assert warming.bytes_read == 3 * READ_BYTES + 5 + 1000
    assert warming.skipped == {}
    assert sorted(reads) == [
        *(("a", n * READ_BYTES, (n + 1) * READ_BYTES) for n in range(3)),
        ("a", 3 * READ_BYTES, 3 * READ_BYTES + 5),
        ("b", 0, 1000),
    ]
    assert threads() == []


@pytest.mark.parametrize("limit", [0, 7, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES + 6])
def test_no_more_than_the_limit(files, reads, limit):
    warming = warm_files(files, limit_bytes=limit)
    assert warming.wait(60)
    assert warming.bytes_read == limit == sum(end - start for _, start, end in reads)


def test_no_more_than_fits_into_memory(files, monkeypatch):
    monkeypatch.setattr(warmup, "free_memory", lambda: 4 * MIB)
    warming = warm_files(files, limit_bytes=100 * MIB)
    assert warming.wait(60)
    assert warming.bytes_read == 3 * MIB


def test_a_file_that_cannot_be_read_does_not_stop_the_others(files, tmp_path):
    (tmp_path / "folder").mkdir()
    odd = [tmp_path / "missing", tmp_path / "folder"]
    warming = warm_files([*odd, *files], threads=1)
    assert warming.wait(60)
    assert warming.bytes_read == 3 * READ_BYTES + 5 + 1000
    assert list(warming.skipped) == [tmp_path / "folder"]


def test_stopping_ends_after_the_reads_in_hand(files, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    parts = []

    def slow(part, scratch):
        parts.append(part)
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr(warmup, "_warm", slow)
    warming = warm_files(files, threads=1)
    assert begun.wait(60)
    assert not warming.done
    assert not warming.wait(0)
    timer = threading.Timer(0.05, go.set)
    timer.start()
    warming.stop()
    timer.join()
    assert warming.done
    assert len(parts) <= 2 < 5
    assert threads() == []
    warming.stop()  # a second time does nothing


def test_a_file_that_shrinks_is_skipped(files, monkeypatch):
    real = warmup._warm

    def shrink(part, scratch):
        os.truncate(files[0], 10)
        real(part, scratch)

    monkeypatch.setattr(warmup, "_warm", shrink)
    warming = warm_files(files[:1], threads=1)
    assert warming.wait(60)
    assert warming.bytes_read == 0
    assert "ends at byte 10" in warming.skipped[files[0]]


def test_threads_must_be_some(files):
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        warm_files(files, threads=0)


def machine(root: Path, available_kib: int, **group: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(
        f"MemTotal: 99999 kB\nMemAvailable:  {available_kib} kB\nHugePages_Total: 0\n"
    )
    (root / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in group.items():
        (root / "sys/fs/cgroup" / name.replace("_", ".")).write_text(text)
    return root


def test_free_memory_of_a_machine(tmp_path):
    assert free_memory(machine(tmp_path, 1000)) == 1000 * 1024


@pytest.mark.parametrize(
    ("limit", "expected"), [("3000", 3000 - 2000 + 500), ("max", 10**6), ("1200", 0), ("1", 0)]
)
def test_free_memory_of_a_container(tmp_path, limit, expected):
    stat = "anon 1500\nfile 500\nkernel 3\n"
    root = machine(
        tmp_path, 10**6 // 1024 + 1, memory_max=limit, memory_current="2000", memory_stat=stat
    )
    assert min(free_memory(root), 10**6) == expected


def test_free_memory_is_zero_where_it_cannot_be_told(tmp_path):
    assert free_memory(tmp_path) == 0
    assert free_memory() > 0
