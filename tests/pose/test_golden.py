"""The pose stage against pictures and numbers made by running the references.

Sources and tolerances: README of the golden folder; taichi 1.7.4 and OpenCV 5.0.0 on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity import pose
from tests.parity.golden import Golden
from xicon_infer.pose.camera import default_intrinsics
from xicon_infer.pose.cylinders import render_bodies

FOLDER = Path(__file__).parents[1] / "golden" / "scail_pose"
# Several issues share the folder; these are the files that hold drawings or their points.
FILES = (
    "render3d.npz",
    "draw2d.npz",
    "kp133_to_dwpose.safetensors",
    "render_node.npz",
    "render_node.json",
    "e2e_contract.npz",
)


def replay(path: Path):
    golden = Golden(path, [FOLDER])
    found = [checks for r in pose.REPLAYS if (checks := r(golden)) is not None]
    assert len(found) == 1, f"{path.name}: {len(found)} replays claim it"
    return found[0]


@pytest.mark.parametrize("name", FILES)
def test_files_replay_within_tolerance(name):
    checks = replay(FOLDER / name)
    assert checks
    assert [c for c in checks if not c.ok] == []


def test_every_output_of_a_file_is_checked():
    names = {c.name for c in replay(FOLDER / "draw2d.npz")}
    stored = [k for k in np.load(FOLDER / "draw2d.npz").files if k.startswith("out.")]
    assert len(names) == len(stored)
    names = {c.name.split(":")[1] for c in replay(FOLDER / "kp133_to_dwpose.safetensors")}
    golden = Golden(FOLDER / "kp133_to_dwpose.safetensors", [])
    assert names == {k.removeprefix("out.") for k in golden.keys if k.startswith("out.")}


def test_other_files_are_left_to_others(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "other.json").write_text("{}")
    for path in tmp_path.iterdir():
        assert all(r(Golden(path, [])) is None for r in pose.REPLAYS)


@pytest.mark.parametrize("wrong", ["camera", "points", "hands", "person"])
def test_drawing_check_notices_a_wrong_drawing(wrong):
    arrays = np.load(FOLDER / "render_node.npz")
    case = "no_ref"
    expected = arrays[f"out.{case}.frames"]
    people = [arrays[f"in.{case}.joints_{i}"] for i in range(len(expected))]
    points = {k: arrays[f"in.{case}.dw.{k}"] for k in ("candidate", "subset", "hands", "faces")}
    camera = default_intrinsics(*expected.shape[1:3])
    if wrong == "camera":
        camera[0, 2] += 1
    if wrong == "points":
        points["faces"] = points["faces"] + 0.02
    if wrong == "person":
        people = [p + np.float32(40) for p in people]
    frames, _ = pose.draw_node(
        people, camera, points, expected.shape[1:3], draw_hands=wrong != "hands"
    )
    different = (np.abs(frames.astype(int) - expected).max(axis=-1) > pose.P99_LEVELS).mean()
    assert different > pose.NODE_SHARE


@pytest.mark.parametrize("wrong", ["palette", "depths", "outline"])
def test_capsule_check_notices_a_wrong_picture(wrong):
    arrays = np.load(FOLDER / "render3d.npz")
    expected = arrays["out.standing.rgba_taichi"]
    people, camera = [arrays["in.standing.joints_0"]], arrays["in.standing.K"].copy()
    camera[1, 2] += wrong == "outline"
    rgba = render_bodies(
        people,
        camera,
        height=expected.shape[1],
        width=expected.shape[2],
        palettes=("pale" if wrong == "palette" else "single",),
        depths=(1000.0, 4000.0) if wrong == "depths" else None,
    )
    assert any(not c.ok for c in pose.picture_checks("standing", rgba, expected))


def test_persons_keep_their_slots_when_their_order_changes():
    near, far = np.full((1, 24, 3), 100.0), np.full((1, 24, 3), 900.0)
    people = [np.concatenate([near, far]), np.concatenate([far, near]), far, near]
    ordered = pose.slots([p.astype(np.float32) for p in people])
    assert ordered[1][0, 0, 0] == 100
    assert ordered[1][1, 0, 0] == 900
    # One person left: the first slot takes it, as in the reference.
    assert ordered[2][0, 0, 0] == 900
    assert not ordered[2][1].any()
