"""The closed-form camera: exact on reachable targets, best of all permitted cameras elsewhere.

Golden: align_solver.* made by running rookiestar28/ComfyUI-SCAIL-Pose2 NLFPoseExtract/align3d.py
(scipy 1.17.1, L-BFGS-B); tolerance 0.02 px as the golden README says.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import pose, pose_align
from tests.parity.golden import Golden
from xicon_infer.errors import PoseError
from xicon_infer.pose.align import joint_weights
from xicon_infer.pose.align_solver import BOUNDS, WIDE_BOUNDS, Bounds, solve_camera
from xicon_infer.pose.camera import default_intrinsics, project

FOLDER = Path(__file__).parents[1] / "golden" / "scail_pose"
SIZE = (224, 128)
CAMERA = default_intrinsics(*SIZE)
# An oblong, shifted lens: what a cropped driving frame can give.
ODD_CAMERA = np.array([[210.0, 0.0, 50.0], [0.0, 190.0, 130.0], [0.0, 0.0, 1.0]])


def people(seed: int, count: int = 10):
    rng = np.random.default_rng(seed)
    points = rng.normal(0, [300, 600, 150], (count, 3))
    points[:, 2] += 3500
    return points


def changed(camera, m, s, p, q):
    return np.array(
        [
            [camera[0, 0] * m, 0, camera[0, 2] + p],
            [0, camera[1, 1] * m * s, camera[1, 2] + q],
            [0, 0, 1],
        ]
    )


def solve(points, targets, *, weights=None, camera=CAMERA, size=SIZE, bounds=BOUNDS):
    weights = np.ones(len(points)) if weights is None else weights
    return solve_camera(points, targets, weights, intrinsics=camera, size=size, bounds=bounds)


def cost(points, targets, weights, camera):
    return float((weights[:, None] * (project(points, camera) - targets) ** 2).sum())


@pytest.mark.parametrize("name", ["align_solver.safetensors", "align_solver.json"])
def test_golden_cases_replay(name):
    golden = Golden(FOLDER / name, [FOLDER])
    replays = (*pose.REPLAYS, *pose_align.REPLAYS)
    found = [checks for r in replays if (checks := r(golden)) is not None]
    assert len(found) == 1
    assert len(found[0]) == 16
    assert [c for c in found[0] if not c.ok] == []


def test_golden_check_notices_a_wrong_weighting(tmp_path):
    shutil.copy(FOLDER / "align_solver.safetensors", tmp_path)
    text = (FOLDER / "align_solver.json").read_text()
    (tmp_path / "align_solver.json").write_text(text.replace('"central"', '"down"'))
    checks = pose_align.replay_solver(Golden(tmp_path / "align_solver.safetensors", []))
    assert any(not c.ok for c in checks)


def test_other_files_are_left_to_others(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for path in tmp_path.iterdir():
        assert all(r(Golden(path, [])) is None for r in pose_align.REPLAYS)


@pytest.mark.parametrize("camera", [CAMERA, ODD_CAMERA])
@pytest.mark.parametrize("count", [3, 5, 10])
def test_targets_at_the_projection_change_nothing(camera, count):
    points = people(0, count)
    fit = solve(points, project(points, camera), camera=camera)
    assert np.allclose([fit.m, fit.s, fit.p, fit.q], [1, 1, 0, 0], atol=1e-9)
    assert np.allclose(fit.intrinsics, camera, atol=1e-9)
    assert fit.error_px < 1e-9


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    m=st.floats(0.71, 1.39),
    s=st.floats(0.81, 1.14),
    p=st.floats(-120, 120),
    q=st.floats(-220, 220),
)
def test_a_permitted_change_is_found_again(seed, m, s, p, q):
    points = people(seed)
    fit = solve(points, project(points, changed(ODD_CAMERA, m, s, p, q)), camera=ODD_CAMERA)
    assert np.allclose([fit.m, fit.s, fit.p, fit.q], [m, s, p, q], atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    m=st.floats(0.3, 3),
    s=st.floats(0.5, 2),
    p=st.floats(-300, 300),
    q=st.floats(-400, 400),
)
def test_no_permitted_camera_is_better(seed, m, s, p, q):
    rng = np.random.default_rng(seed)
    points = people(seed)
    targets = project(points, changed(CAMERA, m, s, p, q)) + rng.normal(0, 5, (10, 2))
    weights = joint_weights((1, 9, 10, 12, 13, 0, 2, 3, 5, 6), "central")
    fit = solve(points, targets, weights=weights)
    least = cost(points, targets, weights, fit.intrinsics)
    found = np.array([fit.m, fit.s, fit.p, fit.q])
    low = np.array([BOUNDS.m[0], BOUNDS.s[0], -SIZE[1], -SIZE[0]])
    high = np.array([BOUNDS.m[1], BOUNDS.s[1], SIZE[1], SIZE[0]])
    assert (found >= low - 1e-6).all() and (found <= high + 1e-6).all()
    for step in (0.3, 0.03, 0.003):
        for _ in range(20):
            other = np.clip(found + rng.normal(0, step, 4) * [1, 1, 50, 50], low, high)
            assert cost(points, targets, weights, changed(CAMERA, *other)) >= least - 1e-6


def test_far_targets_end_at_the_bounds_and_wide_bounds_reach_them():
    points = people(1)
    targets = project(points, changed(CAMERA, 2.5, 1.8, 5, -5))
    fit, wide = solve(points, targets), solve(points, targets, bounds=WIDE_BOUNDS)
    assert (fit.m, fit.s) == pytest.approx((BOUNDS.m[1], BOUNDS.s[1]))
    assert np.allclose([wide.m, wide.s, wide.p, wide.q], [2.5, 1.8, 5, -5])
    assert wide.error_px < 1e-9 < fit.error_px


def test_a_range_of_one_value_holds_it():
    points = people(2)
    targets = project(points, changed(CAMERA, 1.2, 1.1, 3, 4))
    fit = solve(points, targets, bounds=Bounds((1.0, 1.0), (1.0, 1.0)))
    assert (fit.m, fit.s) == pytest.approx((1.0, 1.0))


def test_shifts_stay_within_one_picture():
    points = people(3)
    fit = solve(points, project(points, CAMERA) + np.array([500, -700]))
    assert (fit.p, fit.q) == pytest.approx((SIZE[1], -SIZE[0]))


def test_every_argument_counts():
    points, rng = people(4), np.random.default_rng(4)
    targets = project(points, CAMERA) + rng.normal(0, 8, (10, 2)) + np.array([60, 0])
    usual = solve(points, targets)
    heavy = np.ones(10)
    heavy[0] = 50
    others = [
        solve(points + np.array([0, 100, 0]), targets),
        solve(points, targets + 1),
        solve(points, targets, weights=heavy),
        solve(points, targets, camera=ODD_CAMERA),
        solve(points, targets, size=(30, 30)),
        solve(points, targets, bounds=Bounds((0.99, 1.0), (1.0, 1.01))),
    ]
    for other in others:
        assert not np.allclose(other[1:5], usual[1:5], atol=1e-3)


def test_one_point_is_met_exactly():
    fit = solve(people(5, 1), np.array([[64.0, 100.0]]))
    assert fit.error_px < 1e-9


def test_inputs_are_not_changed():
    points = people(6)
    targets = project(points, CAMERA) + 3
    copies = points.copy(), targets.copy()
    solve(points, targets)
    assert np.array_equal(points, copies[0]) and np.array_equal(targets, copies[1])


@pytest.mark.parametrize(
    ("points", "targets", "weights"),
    [
        (np.zeros((0, 3)), np.zeros((0, 2)), np.zeros(0)),
        (people(0, 4), np.zeros((5, 2)), np.ones(4)),
        (people(0, 4), np.zeros((4, 3)), np.ones(4)),
        (people(0, 4), np.zeros((4, 2)), np.ones(3)),
        (people(0, 4) * [1, 1, -1], np.zeros((4, 2)), np.ones(4)),
        (people(0, 4), np.full((4, 2), np.nan), np.ones(4)),
        (people(0, 4) * np.inf, np.zeros((4, 2)), np.ones(4)),
        (people(0, 4), np.zeros((4, 2)), np.zeros(4)),
    ],
)
def test_unusable_points_are_refused(points, targets, weights):
    with pytest.raises(PoseError) as caught:
        solve(points, targets, weights=weights)
    assert caught.value.code == "TRACK_INVALID"
