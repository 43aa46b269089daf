"""Cameras and the affine between a driving frame and a canvas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xicon_infer.errors import InvalidRequest
from xicon_infer.pose.camera import (
    Affine,
    default_intrinsics,
    fit_affine,
    map_intrinsics,
    map_points,
    project,
)

sides = st.integers(16, 2000)


def test_default_camera_spans_the_longer_side():
    for height, width in ((896, 512), (512, 896), (300, 300)):
        camera = default_intrinsics(height, width)
        assert math.degrees(2 * math.atan(max(height, width) / 2 / camera[0, 0])) == (
            pytest.approx(55.0)
        )
        assert camera[0, 0] == camera[1, 1]
        assert (camera[0, 2], camera[1, 2]) == (width / 2, height / 2)
    assert default_intrinsics(100, 100, 90.0)[0, 0] == pytest.approx(50.0)


@settings(derandomize=True, max_examples=50)
@given(st.tuples(sides, sides), st.tuples(sides, sides))
def test_fits_keep_the_centre_and_cover_or_contain(source, canvas):
    corners = np.array([[0, 0], [source[1], source[0]]])
    for fit in ("crop", "pad"):
        low, high = map_points(corners, fit_affine(source, canvas, fit))
        assert low + high == pytest.approx(np.array([canvas[1], canvas[0]]), abs=1e-6)
        gaps = np.array([canvas[1], canvas[0]]) - (high - low)
        if fit == "crop":
            assert (gaps <= 1e-6).all()
        else:
            assert (gaps >= -1e-6).all()
        assert np.abs(gaps).min() < 1e-6


def test_same_aspect_needs_no_shift():
    assert fit_affine((448, 256), (896, 512), "crop") == Affine(2.0, 0.0, 0.0)
    assert fit_affine((448, 256), (896, 512), "pad") == Affine(2.0, 0.0, 0.0)
    assert fit_affine((100, 100), (100, 100)) == Affine(1.0, 0.0, 0.0)


@settings(derandomize=True, max_examples=25)
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.sampled_from(["crop", "pad"]))
def test_projecting_then_mapping_is_mapping_then_projecting(source, canvas, fit):
    random = np.random.default_rng(0)
    joints = random.normal([0, 0, 3000], [500, 500, 100], (24, 3))
    camera, affine = default_intrinsics(*source), fit_affine(source, canvas, fit)
    through_points = map_points(project(joints, camera), affine)
    through_camera = project(joints, map_intrinsics(camera, affine))
    assert through_camera == pytest.approx(through_points, abs=1e-6)


def test_cropping_first_gives_the_reference_camera():
    camera = map_intrinsics(default_intrinsics(1280, 720), fit_affine((1280, 720), (896, 504)))
    assert camera == pytest.approx(default_intrinsics(896, 504))


def test_points_behind_the_camera_have_no_image():
    points = np.array([[10.0, 20.0, 100.0], [10.0, 20.0, -100.0], [0.0, 0.0, 0.0]])
    image = project(points, np.array([[100.0, 0, 5], [0, 50.0, 7], [0, 0, 1]]))
    assert image[0] == pytest.approx([15.0, 17.0])
    assert np.isnan(image[1:]).all()


def test_other_fits_are_refused():
    with pytest.raises(InvalidRequest, match="'stretch'") as caught:
        fit_affine((10, 10), (10, 10), "stretch")
    assert caught.value.field == "fit"
