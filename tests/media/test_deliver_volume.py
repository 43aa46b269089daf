"""Files onto the network volume: complete, or not there."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from xicon_infer.errors import Cancelled, MediaError
from xicon_infer.media.deliver_types import BLOCK_BYTES
from xicon_infer.media.deliver_volume import is_writable, remove_leftovers, store, told_path


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(os.urandom(3 * BLOCK_BYTES + 7))
    return path


def test_a_file_gets_its_name_when_it_is_complete(film, tmp_path):
    target, seen = tmp_path / "v" / "job" / "a.mp4", []

    def look():
        seen.append([p.name for p in target.parent.iterdir()])

    store(film, target, stop=look)
    assert target.read_bytes() == film.read_bytes()
    assert len(seen) == 4
    assert all(len(names) == 1 and names[0].startswith(".") for names in seen)
    assert [p.name for p in target.parent.iterdir()] == ["a.mp4"]
    assert told_path(target, tmp_path / "v") == "job/a.mp4"


def test_an_older_file_stays_until_the_new_one_is_complete(film, tmp_path):
    target = tmp_path / "a.mp4"
    target.write_bytes(b"old")

    def stop():
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        store(film, target, stop=stop)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "film.mp4"]
    store(film, target)
    assert target.read_bytes() == film.read_bytes()


def test_a_place_that_cannot_be_written_to_is_told_without_its_path(film, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MediaError) as caught:
        store(film, tmp_path / "file" / "job" / "a.mp4")
    assert caught.value.code == "MEDIA_WRITE"
    assert str(tmp_path) not in str(caught.value)
    assert not is_writable(tmp_path / "file" / "job")
    assert is_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_killed_worker_leaves_no_half_file_under_a_name(film, tmp_path):
    volume = tmp_path / "v"
    code = f"""
import os, signal
from pathlib import Path
from xicon_infer.media.deliver_volume import store
calls = []
def stop():
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
store(Path({str(film)!r}), Path({str(volume)!r}) / "job" / "a.mp4", stop=stop)
"""
    run = subprocess.run([sys.executable, "-c", code], check=False)
    assert run.returncode == -9
    (left,) = (volume / "job").iterdir()
    assert left.name.startswith(".")
    # Another worker may be writing it: only an old one is taken away.
    assert remove_leftovers(volume) == 0
    day_ago = time.time() - 90_000
    os.utime(left, (day_ago, day_ago))
    other = volume / "job" / ".keep-me"
    other.write_text("")
    os.utime(other, (day_ago, day_ago))
    assert remove_leftovers(volume) == 1
    assert [p.name for p in (volume / "job").iterdir()] == [".keep-me"]
    assert remove_leftovers(tmp_path / "missing") == 0
