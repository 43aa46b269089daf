"""Tracks as NPZ files."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from xicon_infer.errors import MediaError
from xicon_infer.media.npz import read_npz, write_npz

ARRAYS = {
    "keypoints": np.arange(24, dtype=np.float32).reshape(2, 6, 2),
    "size": np.array([48, 64]),
    "fps": np.float64(24),
}


def test_what_is_written_is_read_back(tmp_path):
    write_npz(tmp_path / "a.npz", ARRAYS)
    read = read_npz(tmp_path / "a.npz", required=("keypoints", "fps"))
    assert set(read) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert np.array_equal(read[name], array)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_missing_names_are_listed(tmp_path):
    write_npz(tmp_path / "a.npz", ARRAYS)
    with pytest.raises(MediaError, match=r"joints.*it has fps, keypoints, size") as caught:
        read_npz(tmp_path / "a.npz", required=("joints", "fps"), field="pose")
    assert (caught.value.code, caught.value.field) == ("UNSUPPORTED_MEDIA", "pose")


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", evil=np.array([{"a": 1}], dtype=object))
    with pytest.raises(MediaError) as caught:
        read_npz(tmp_path / "a.npz")
    assert caught.value.code == "MEDIA_CORRUPT"


def test_claimed_sizes_are_added_up_before_unpacking(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_2_0(file, header)
    with pytest.raises(MediaError, match="unpacks to") as caught:
        read_npz(path)
    assert caught.value.code == "MEDIA_TOO_LARGE"
    write_npz(path, ARRAYS)
    assert read_npz(path, max_bytes=2000)
    with pytest.raises(MediaError):
        read_npz(path, max_bytes=100)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"<html>", "UNSUPPORTED_MEDIA"),
        (b"\x93NUMPY", "UNSUPPORTED_MEDIA"),
        (b"PK\3\4 and no more", "MEDIA_CORRUPT"),
        (b"", "MEDIA_CORRUPT"),
    ],
)
def test_other_files_are_refused(tmp_path, content, code):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(MediaError) as caught:
        read_npz(path)
    assert caught.value.code == code


def test_an_unwritable_place(tmp_path):
    with pytest.raises(MediaError) as caught:
        write_npz(tmp_path / "no" / "a.npz", ARRAYS)
    assert caught.value.code == "MEDIA_WRITE"
