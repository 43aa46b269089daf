"""NLF: exact ground truth from the stand-in, whose joints project onto dots that a test draws.

The stand-in honours the interface of the published file (tests/golden/scail_pose/README.md).
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.parity.golden import Golden
from tests.parity.pose_body import check_bodies, key_boxes
from xicon_infer.errors import InvalidRequest, OutOfMemory, WeightsError
from xicon_infer.pose.camera import default_intrinsics, project
from xicon_infer.pose.nlf import LICENCE_NOTE, Nlf, match_boxes, profiling_executor, read_result
from xicon_infer.pose.observations import Boxes

FOLDER = Path(__file__).parents[1] / "golden" / "scail_pose"
MODEL = FOLDER / "nlf_contract.torchscript"
CPU = torch.device("cpu")
DOTS = json.loads((FOLDER / "contract_colours.json").read_text())["vitpose_keypoint_rgb_uint8"]
KEYS = ((255, 0, 255), (0, 255, 255))
# COCO keypoint, SMPL joint, place in the box as shares of its width and height.
POINTS = (
    (0, 15, 0.50, 0.12), (5, 16, 0.66, 0.26), (6, 17, 0.34, 0.26), (7, 18, 0.80, 0.36),
    (8, 19, 0.20, 0.36), (9, 20, 0.84, 0.50), (10, 21, 0.16, 0.50), (11, 1, 0.62, 0.54),
    (12, 2, 0.38, 0.54), (13, 4, 0.64, 0.72), (14, 5, 0.36, 0.72), (15, 7, 0.66, 0.90),
    (16, 8, 0.34, 0.90),
)  # fmt: skip
JOINTS = [joint for _, joint, _, _ in POINTS]


def draw(size, people):
    """Returns a frame and, per person, the 13 dot centres in pixels from the corner."""
    frame = np.full((*size, 3), 128, np.uint8)
    dots = []
    for (x, y, w, h), key in zip(people, KEYS, strict=False):
        cv2.rectangle(frame, (x, y), (x + w - 1, y + h - 1), key, 2)
        centres = [(round(x + fx * w), round(y + fy * h)) for _, _, fx, fy in POINTS]
        for (number, *_), centre in zip(POINTS, centres, strict=True):
            cv2.circle(frame, centre, 2, DOTS[number], -1)
        dots.append(np.array(centres) + 0.5)
    return frame, dots


def boxes_of(*rows):
    box = np.array(rows, np.float32).reshape(-1, 4)
    return Boxes(box, np.ones(len(box), np.float32), (-1,) * len(box))


SCENES = {
    "nobody": ((96, 128), []),
    "one, tall": ((192, 112), [(20, 10, 70, 170)]),
    "one, wide": ((120, 208), [(60, 6, 80, 110)]),
    "two": ((160, 200), [(6, 8, 80, 140), (110, 20, 84, 130)]),
}


def films(*names):
    """Returns frames of one size, their boxes and their dots."""
    scenes = [draw((160, 200), SCENES[name][1]) for name in names]
    frames = np.stack([frame for frame, _ in scenes])
    return frames, [key_boxes(frame) for frame in frames], [dots for _, dots in scenes]


@pytest.fixture(scope="module")
def nlf():
    return Nlf(MODEL, CPU)


@pytest.fixture(scope="module")
def detecting():
    return Nlf(MODEL, CPU, own_detector=True)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("own_detector", [False, True])
def test_joints_lie_under_their_dots(name, own_detector, nlf, detecting):
    size, people = SCENES[name]
    frame, dots = draw(size, people)
    network = detecting if own_detector else nlf
    (bodies,) = network.estimate(frame[None], [key_boxes(frame)])
    assert bodies.joints.shape == (len(people), 24, 3)
    assert bodies.joints.dtype == np.float32
    assert bodies.uncertainties.shape == (len(people), 24)
    camera = default_intrinsics(*size)
    for joints, centres, (_, _, _, height) in zip(bodies.joints, dots, people, strict=True):
        assert np.abs(project(joints, camera)[JOINTS] - centres).max() < 0.01
        # The stand-in stands where a person of 1700 mm fills the box.
        assert joints[0, 2] == pytest.approx(camera[0, 0] * 1700 / height, abs=150)
    assert (bodies.uncertainties == 30).all()


def test_both_ways_agree_and_say_which_they_are(nlf, detecting):
    frames, boxes, _ = films("two", "nobody", "one, wide")
    assert nlf.uses_boxes
    assert not detecting.uses_boxes
    for ours, theirs in zip(
        nlf.estimate(frames, boxes), detecting.estimate(frames, boxes), strict=True
    ):
        np.testing.assert_array_equal(ours.joints, theirs.joints)


@pytest.mark.parametrize("own_detector", [False, True])
def test_rows_follow_the_boxes(own_detector, nlf, detecting):
    network = detecting if own_detector else nlf
    frames, (boxes,), _ = films("two")
    (straight,) = network.estimate(frames, [boxes])
    (swapped,) = network.estimate(frames, [boxes_of(*boxes.bboxes[::-1])])
    np.testing.assert_array_equal(straight.joints, swapped.joints[::-1])
    (second,) = network.estimate(frames, [boxes_of(boxes.bboxes[1])])
    np.testing.assert_array_equal(second.joints, straight.joints[1:])


def test_own_detector_gives_zeros_where_nobody_overlaps_the_box(detecting):
    frames, (boxes,), _ = films("two")
    empty = (90, 2, 108, 12)
    (bodies,) = detecting.estimate(frames, [boxes_of(empty, boxes.bboxes[1])])
    assert not bodies.joints[0].any()
    assert bodies.joints[1].any()
    # A frame in which the network finds nobody at all: its answer lacks the key "boxes".
    (nothing,) = detecting.estimate(np.full((1, 64, 64, 3), 128, np.uint8), [boxes_of(empty)])
    assert nothing.joints.shape == (1, 24, 3)
    assert not nothing.joints.any()
    assert not nothing.uncertainties.any()


@pytest.mark.parametrize("own_detector", [False, True])
def test_chunks_and_singles_give_the_same(own_detector):
    frames, boxes, _ = films("one, wide", "nobody", "two", "one, tall", "nobody")
    boxes[4] = boxes_of((10, 10, 60, 100))  # a box in which nobody is drawn
    whole = Nlf(MODEL, CPU, own_detector=own_detector).estimate(frames, boxes)
    small = Nlf(MODEL, CPU, chunk=2, own_detector=own_detector)
    pieces = small.estimate(frames, boxes)
    singles = [small.estimate(frames[i : i + 1], boxes[i : i + 1])[0] for i in range(5)]
    assert [len(b.joints) for b in whole] == [1, 0, 2, 1, 1]
    for a, b, c in zip(whole, pieces, singles, strict=True):
        np.testing.assert_array_equal(a.joints, b.joints)
        np.testing.assert_array_equal(a.joints, c.joints)
        np.testing.assert_array_equal(a.uncertainties, c.uncertainties)


def test_the_camera_counts(nlf):
    frames, boxes, dots = films("two")
    default = default_intrinsics(160, 200)
    (plain,) = nlf.estimate(frames, boxes)
    (same,) = nlf.estimate(frames, boxes, default)
    np.testing.assert_array_equal(plain.joints, same.joints)
    other = default.copy()
    other[[0, 1], [0, 1]] *= 2
    other[:2, 2] += (7, -5)
    (moved,) = nlf.estimate(frames, boxes, other)
    np.testing.assert_allclose(moved.joints[0, 0, 2], 2 * plain.joints[0, 0, 2], rtol=0.05)
    for joints, centres in zip(moved.joints, dots[0], strict=True):
        assert np.abs(project(joints, other)[JOINTS] - centres).max() < 0.01


def test_boxes_without_area_give_zeros(nlf):
    frames, (boxes,), _ = films("two")
    rows = [(30, 30, 30, 90), boxes.bboxes[0], (np.nan, 0, 5, 5), (60, 60, 20, 20)]
    (bodies,) = nlf.estimate(frames, [boxes_of(*rows)])
    (alone,) = nlf.estimate(frames, [boxes_of(boxes.bboxes[0])])
    np.testing.assert_array_equal(bodies.joints[1], alone.joints[0])
    assert not bodies.joints[[0, 2, 3]].any()


def test_no_frames_give_no_bodies(nlf):
    assert nlf.estimate(np.zeros((0, 32, 32, 3), np.uint8), []) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda a: (a[0].astype(np.float32) / 255, *a[1:]), "frames"),
        (lambda a: (a[0][0], *a[1:]), "frames"),
        (lambda a: (a[0][..., :1], *a[1:]), "frames"),
        (lambda a: (a[0], a[1] * 2, a[2]), "boxes"),
        (lambda a: (*a[:2], np.eye(4)), "intrinsics"),
        (lambda a: (*a[:2], np.zeros((3, 3))), "intrinsics"),
    ],
)
def test_wrong_input_is_refused(nlf, change, field):
    frames, boxes, _ = films("two")
    with pytest.raises(InvalidRequest) as caught:
        nlf.estimate(*change((frames, boxes, None)))
    assert caught.value.field == field


def test_chunk_must_be_positive():
    with pytest.raises(InvalidRequest, match="'chunk' is 0"):
        Nlf(MODEL, CPU, chunk=0)


def executor_is_on():
    state = torch._C._jit_set_profiling_executor(True)
    torch._C._jit_set_profiling_executor(state)
    return state


@pytest.mark.parametrize("before", [False, True])
def test_profiling_executor_is_on_for_the_call_and_restored(before, nlf, tmp_path):
    frames, boxes, _ = films("two")
    broken = Nlf(scripted(tmp_path, Failing()), CPU)
    was = torch._C._jit_set_profiling_executor(before)
    try:
        with profiling_executor():
            assert executor_is_on()
        assert executor_is_on() == before
        nlf.estimate(frames, boxes)
        assert executor_is_on() == before
        with pytest.raises(WeightsError):
            broken.estimate(frames, boxes)
        assert executor_is_on() == before
    finally:
        torch._C._jit_set_profiling_executor(was)


def test_licence_is_logged_at_loading(caplog):
    with caplog.at_level(logging.INFO, "xicon_infer.pose.nlf"):
        network = Nlf(MODEL, CPU)
        frames, boxes, _ = films("two", "two")
        network.estimate(frames, boxes)
    assert caplog.messages == [LICENCE_NOTE]
    assert "non-commercial" in LICENCE_NOTE


class Failing(torch.nn.Module):
    """A file whose network raises."""

    def __init__(self, message: str = "bad graph"):
        super().__init__()
        self.message = message

    @torch.jit.export
    def estimate_smpl_batched(
        self, images: torch.Tensor, boxes: list[torch.Tensor], intrinsic_matrix: torch.Tensor
    ) -> dict[str, list[torch.Tensor]]:
        if images.numel() > 0:
            raise RuntimeError(self.message)
        return {"joints3d_nonparam": boxes}


class Answering(torch.nn.Module):
    """A file with only its own detector, which answers with what it was made with."""

    def __init__(self, joints: torch.Tensor):
        super().__init__()
        self.register_buffer("joints", joints)

    @torch.jit.export
    def detect_smpl_batched(
        self, images: torch.Tensor, intrinsic_matrix: torch.Tensor
    ) -> dict[str, list[torch.Tensor]]:
        return {"joints3d_nonparam": [self.joints for _ in range(len(images))]}


class Blind(torch.nn.Module):
    """A file whose method knows no camera."""

    @torch.jit.export
    def detect_smpl_batched(self, images: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        return {"joints3d_nonparam": [images]}


class Crop(torch.nn.Module):
    """A file of another kind."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def scripted(folder, module):
    path = folder / "model.torchscript"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(WeightsError, match=r"is not there.*isarandi/nlf/releases"):
        Nlf(tmp_path / "none.torchscript", CPU)
    text = tmp_path / "page.torchscript"
    text.write_text("<html>404</html>")
    with pytest.raises(WeightsError, match="not a TorchScript file"):
        Nlf(text, CPU)
    path = scripted(tmp_path, Crop())
    with pytest.raises(WeightsError, match="estimate_smpl_batched or detect_smpl_batched"):
        Nlf(path, CPU)
    with pytest.raises(WeightsError, match="takes no intrinsic_matrix"):
        Nlf(scripted(tmp_path, Blind()), CPU)
    with pytest.raises(WeightsError, match="no method detect_smpl_batched"):
        Nlf(scripted(tmp_path, Failing()), CPU, own_detector=True)


def test_failures_of_the_network_are_explained(tmp_path):
    frames, boxes, _ = films("two")
    with pytest.raises(WeightsError, match=r"the network failed: .*bad graph"):
        Nlf(scripted(tmp_path, Failing()), CPU).estimate(frames, boxes)
    path = scripted(tmp_path, Failing("CUDA out of memory"))
    frames, boxes, _ = films("two", "two", "two")
    for chunk, together in ((2, 2), (16, 3)):
        said = rf"{together} frames of 200x160.*'chunk' \(it is {chunk}\)"
        with pytest.raises(OutOfMemory, match=said):
            Nlf(path, CPU, chunk=chunk).estimate(frames, boxes)


def test_a_file_without_boxes_is_matched_by_its_joints(tmp_path, nlf):
    frames, (boxes,), _ = films("two")
    (expected,) = nlf.estimate(frames, [boxes])
    # The file answers in the other order, with a third person who is not a number, and gives
    # neither boxes nor uncertainties.
    joints = np.concatenate([expected.joints[::-1], np.full((1, 24, 3), np.nan, np.float32)])
    network = Nlf(scripted(tmp_path, Answering(torch.from_numpy(joints))), CPU)
    assert not network.uses_boxes
    (bodies,) = network.estimate(frames, [boxes])
    np.testing.assert_array_equal(bodies.joints, expected.joints)
    assert not bodies.uncertainties.any()


def test_one_number_that_is_none_makes_a_body_zeros(tmp_path, nlf):
    frames, (boxes,), _ = films("two")
    (expected,) = nlf.estimate(frames, [boxes])
    joints = expected.joints.copy()
    joints[0, 7, 2] = np.inf
    network = Nlf(scripted(tmp_path, Answering(torch.from_numpy(joints))), CPU)
    (bodies,) = network.estimate(frames, [boxes])
    assert not bodies.joints[0].any()
    np.testing.assert_array_equal(bodies.joints[1], expected.joints[1])


def test_answers_in_another_form_are_refused():
    joints, spread = torch.zeros(2, 24, 3), torch.zeros(2, 24)
    good = {"joints3d_nonparam": [joints], "joint_uncertainties": [spread]}
    assert read_result(good, 1)[0][0].shape == (2, 24, 3)
    with pytest.raises(WeightsError, match="no 'joints3d_nonparam', it holds pose"):
        read_result({"pose": [joints]}, 1)
    with pytest.raises(WeightsError, match="2 frames gave 1 answers"):
        read_result(good, 2)
    with pytest.raises(WeightsError, match=r"\[2, 55, 3\]"):
        read_result({"joints3d_nonparam": [torch.zeros(2, 55, 3)]}, 1)
    with pytest.raises(WeightsError, match=r"uncertainties \[3, 24\]"):
        read_result({**good, "joint_uncertainties": [torch.zeros(3, 24)]}, 1)


def test_boxes_are_matched_best_first():
    theirs = np.array([(0, 0, 10, 20), (40, 0, 50, 20), (2, 0, 12, 20)], float)
    assert match_boxes(theirs, theirs) == [0, 1, 2]
    assert match_boxes(theirs[::-1], theirs) == [2, 1, 0]
    # Both of ours fit the first of theirs; the better one gets it, the other the next best.
    assert match_boxes(np.array([(1, 0, 11, 20), (0, 0, 10, 20)]), theirs) == [2, 0]
    # 4 of 16 columns shared: an overlap of 0.25 is too little, 5 of 15 is enough.
    assert match_boxes(np.array([(46, 0, 56, 20)]), theirs) == [-1]
    assert match_boxes(np.array([(45, 0, 55, 20)]), theirs) == [1]
    assert match_boxes(np.zeros((0, 4)), theirs) == []
    assert match_boxes(theirs, np.zeros((0, 4))) == [-1, -1, -1]


def test_the_end_to_end_file_replays(tmp_path):
    checks = check_bodies(Golden(FOLDER / "e2e_contract.npz", [FOLDER]))
    assert len(checks) == 3
    assert [c for c in checks if not c.ok] == []
    arrays = dict(np.load(FOLDER / "e2e_contract.npz"))
    arrays["mid.nlf_joints_2"] = arrays["mid.nlf_joints_2"] * 1.001
    np.savez(tmp_path / "changed.npz", **arrays)
    changed = check_bodies(Golden(tmp_path / "changed.npz", [FOLDER]))
    assert [c.ok for c in changed] == [False, False, False]
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    assert check_bodies(Golden(tmp_path / "other.npz", [])) == []
