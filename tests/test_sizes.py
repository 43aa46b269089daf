"""The size of a video after a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xicon_infer.sizes import LARGE_AREA, SMALL_AREA, area_class, area_size, choose_size

RESOLUTIONS = Path(__file__).parent / "golden" / "steady_dancer" / "resolution.json"


def test_exact_and_no_picture_keep_the_size():
    assert choose_size("exact", 512, 896, (100, 100), 16) == (512, 896)
    assert choose_size("area", 512, 896, None, 16) == (512, 896)
    assert choose_size("bucket", 512, 896, None, 16) == (512, 896)


def test_area_sizes_of_the_authors():
    # Source: MCG-NJU/SteadyDancer: wan/image2video_dancer.py, evaluated there.
    for row in json.loads(RESOLUTIONS.read_text())["rows"]:
        for name, size in row.items():
            if "*" in name:
                area = int(name.split("*")[0]) * int(name.split("*")[1])
                assert area_size(area, tuple(row["ref_wh"]), 16) == tuple(size)

    # A root comes out as 479.99.
    assert area_size(SMALL_AREA, (832, 480), 16) == (832, 464)
    assert area_size(SMALL_AREA, (480, 832), 16) == (480, 832)


@pytest.mark.parametrize(
    ("wanted", "picture", "size"),
    [
        ((832, 480), (1000, 600), (832, 480)),
        ((832, 480), (600, 1000), (480, 832)),
        ((480, 832), (1000, 600), (832, 480)),
        ((1280, 720), (1000, 600), (1280, 720)),
        ((1280, 720), (600, 1000), (720, 1280)),
        ((1280, 720), (900, 1000), (1024, 1024)),
    ],
)
def test_buckets(wanted, picture, size):
    found = choose_size("bucket", *wanted, picture, 16)
    assert found == size
    # 720 is no multiple of 32.
    assert all(side % 32 == 0 for side in choose_size("bucket", *wanted, picture, 32))


def test_the_class_of_an_area():
    assert area_class(SMALL_AREA) == SMALL_AREA
    assert area_class(512 * 896) == SMALL_AREA
    assert area_class(LARGE_AREA) == LARGE_AREA
    assert area_class(1024 * 800) == LARGE_AREA


@given(st.integers(64, 2000), st.integers(64, 2000), st.sampled_from([16, 32]))
def test_area_size_divides_and_is_no_larger(width, height, multiple):
    wide, high = area_size(SMALL_AREA, (width, height), multiple)
    assert wide % multiple == high % multiple == 0
    assert wide >= multiple
    assert high >= multiple
    if min(wide, high) > multiple:
        assert wide * high <= SMALL_AREA
