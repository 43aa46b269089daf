"""RTMW3D: known responses give known joints, and every joint lies on its 2-D point.

The fake network answers with given bins. A small ONNX file, built here, looks at the crop, so the
way through onnxruntime is tested too. The published file is not at hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pose.people import standing
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.camera import default_intrinsics, project
from xicon_infer.pose.lift import JOINT_WEIGHTS, SEGMENTS, lift, root_depth, to_smpl
from xicon_infer.pose.observations import Boxes
from xicon_infer.pose.rtmw3d import Rtmw3d, crop_of, cut, decode, normalise

CPU = torch.device("cpu")
SIZE = (240, 320)
CAMERA = default_intrinsics(*SIZE)
BOX = (100.0, 20.0, 190.0, 212.0)
# COCO keypoint -> the SMPL joint that is that point alone.
SAME = {
    5: 16, 6: 17, 7: 18, 8: 19, 9: 20, 10: 21, 11: 1, 12: 2, 13: 4, 14: 5, 15: 7, 16: 8,
}  # fmt: skip


class Fake:
    """A network that answers every crop in turn with given bins, and keeps what it was shown."""

    def __init__(self, *bins, score=0.8):
        self.bins, self.score = list(bins), score
        self.batches = []

    def run(self, batch):
        done = sum(len(b) for b in self.batches)
        self.batches.append(batch)
        rows = [self.bins[(done + i) % len(self.bins)] for i in range(len(batch))]
        return [self.rows(rows, axis, width) for axis, width in enumerate((576, 768, 576))]

    def rows(self, rows, axis, width):
        out = torch.zeros(len(rows), 133, width)
        index = torch.tensor(np.array([row[:, axis] for row in rows]))[..., None]
        return out.scatter_(2, index, float(self.score))


def random_bins(seed):
    rng = np.random.default_rng(seed)
    low, high = [60, 80, 240], [516, 690, 336]
    return rng.integers(low, high, (133, 3))


def boxes_of(*rows):
    box = np.array(rows, np.float32).reshape(-1, 4)
    return Boxes(box, np.ones(len(box), np.float32), (-1,) * len(box))


def frames_of(count=1):
    return np.full((count, *SIZE, 3), 90, np.uint8)


def network(*bins, **options):
    return Rtmw3d(Path("unused.onnx"), CPU, model=Fake(*bins), **options)


def expected_points(bins, box=BOX):
    """Returns pixels [133, 2] and depths [133] of bins, worked out from the box itself."""
    x1, y1, x2, y2 = box
    height = 1.25 * max(y2 - y1, (x2 - x1) * 4 / 3)
    width = height * 3 / 4
    left, top = (x1 + x2) / 2 - width / 2, (y1 + y2) / 2 - height / 2
    x = left + bins[:, 0] / 576 * width
    y = top + bins[:, 1] / 768 * height
    return np.stack([x, y], axis=1), (bins[:, 2] - 288) / 288 * 2174.4869


def test_joints_lie_on_their_points():
    bins = random_bins(1)
    points, depths = expected_points(bins)
    (bodies,) = network(bins).estimate(frames_of(), [boxes_of(BOX)])
    assert bodies.joints.dtype == np.float32
    assert not bodies.uncertainties.any()
    joints = bodies.joints[0]
    pixels = project(joints, CAMERA)
    for point, joint in SAME.items():
        np.testing.assert_allclose(pixels[joint], points[point], atol=2e-3)
    np.testing.assert_allclose(pixels, JOINT_WEIGHTS @ points, atol=2e-3)
    # One root depth for the whole body: the rest of every depth is the network's.
    roots = joints[list(SAME.values()), 2] - depths[list(SAME)]
    np.testing.assert_allclose(roots, roots[0], rtol=1e-5)


def test_a_person_of_known_size_is_found_where_it_stands():
    """Bones of exactly the assumed lengths: the distance and every joint come back."""
    points = skeleton()
    for distance, turn in ((2500.0, 0.0), (4000.0, 0.9), (3200.0, 2.0)):
        placed = points @ rotation(turn) + np.array([300.0, -100.0, distance])
        depths = placed[:, 2] - distance
        pixels = project(placed, CAMERA)
        found = root_depth(pixels, depths, np.ones(133, bool), intrinsics=CAMERA, box_height=100.0)
        assert found == pytest.approx(distance, rel=1e-9)
        np.testing.assert_allclose(lift(pixels, depths, found, CAMERA), placed, atol=1e-6)


def skeleton(stature=1700.0):
    """Returns 133 points of a figure around the hips' middle, every segment of its length."""
    points = np.zeros((133, 3))
    points[[5, 6]] = [(170, 0, 30), (-170, 0, -30)]
    points[[11, 12]] = [(100, 0, 20), (-100, 0, -20)]
    bends = {(5, 11): (0.1, 1, 0.1), (6, 12): (0.1, 1, 0.1)}
    rng = np.random.default_rng(3)
    for start, end, share in SEGMENTS:
        way = np.array(bends.get((start, end), (*rng.normal(0, 0.4, 1), 1, *rng.normal(0, 0.4, 1))))
        points[end] = points[start] + way / np.linalg.norm(way) * share * stature
    return points - points[[11, 12]].mean(axis=0)


def rotation(angle):
    """Returns a turn about the vertical axis; (row vectors)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])


def test_segments_that_say_nothing_are_left_out():
    points = skeleton() + np.array([0, 0, 3000.0])
    depths, pixels = points[:, 2] - 3000, project(points, CAMERA)
    wrong = pixels.copy()
    wrong[9] += 60  # a misplaced wrist
    trusted = np.ones(133, bool)
    options = {"intrinsics": CAMERA, "box_height": 120.0}
    assert abs(root_depth(wrong, depths, trusted, **options) - 3000) > 50
    trusted[9] = False
    assert root_depth(wrong, depths, trusted, **options) == pytest.approx(3000)
    # Longer in depth alone than the whole arm may be.
    deep = depths.copy()
    deep[9] += 5000
    assert root_depth(pixels, deep, np.ones(133, bool), **options) == pytest.approx(3000)
    # Nothing left: the box is as high as the person.
    nothing = root_depth(pixels, depths, np.zeros(133, bool), **options)
    assert nothing == pytest.approx(CAMERA[1, 1] * 1700 / 120)
    half = root_depth(pixels, depths, np.zeros(133, bool), stature_mm=850, **options)
    assert half == pytest.approx(nothing / 2)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    root=st.floats(-500, 9000),
    focal=st.floats(80, 2000),
    shift=st.floats(-300, 300),
)
def test_lifted_points_project_onto_themselves(seed, root, focal, shift):
    rng = np.random.default_rng(seed)
    points, depths = rng.uniform(-200, 600, (24, 2)), rng.uniform(-2000, 2000, 24)
    camera = np.array([[focal, 0, 160 + shift], [0, 1.3 * focal, 120], [0, 0, 1]])
    lifted = lift(points, depths, root, camera)
    assert lifted[:, 2].min() > 99
    np.testing.assert_allclose(project(lifted, camera), points, atol=1e-6)
    np.testing.assert_allclose(np.diff(lifted[:, 2]), np.diff(depths), atol=1e-6)


def test_every_joint_is_a_mean_of_points():
    np.testing.assert_allclose(JOINT_WEIGHTS.sum(axis=1), 1)
    assert (JOINT_WEIGHTS >= 0).all()
    for point, joint in SAME.items():
        assert JOINT_WEIGHTS[joint, point] == 1
    # Left joints use no right point, and the other way round; the middle uses both alike.
    swapped = to_smpl(mirrored(np.arange(133.0))[:, None])
    expected = to_smpl(np.arange(133.0)[:, None])
    pairs = [(1, 2), (4, 5), (7, 8), (10, 11), (13, 14), (16, 17), (18, 19), (20, 21), (22, 23)]
    for left, right in pairs:
        np.testing.assert_allclose(swapped[left], expected[right])
        np.testing.assert_allclose(swapped[right], expected[left])
    for middle in (0, 3, 6, 9, 12, 15):
        np.testing.assert_allclose(swapped[middle], expected[middle])


def mirrored(values):
    """Returns the values of 133 points with left and right exchanged (the face left alone)."""
    order = np.arange(133)
    order[1:17] = order[1:17].reshape(8, 2)[:, ::-1].ravel()
    order[17:23] = [20, 21, 22, 17, 18, 19]
    order[91:112], order[112:133] = np.arange(112, 133), np.arange(91, 112)
    return values[order]


def test_invented_person_has_no_surprising_joint():
    """The joints between keypoints lie near those of the invented person of the other tests."""
    truth = standing()[0]
    points = np.zeros((133, 3))
    for point, joint in SAME.items():
        points[point] = truth[joint]
    points[[3, 4]] = truth[15]
    joints = to_smpl(points)
    for joint in (0, 3, 6, 9, 12, 13, 14, 15):
        # The invented spine is shorter below; within a hand's breadth everywhere.
        assert np.linalg.norm(joints[joint] - truth[joint]) < 130, joint


def test_chunks_and_singles_give_the_same():
    bins = [random_bins(seed) for seed in range(3)]
    boxes = [boxes_of(BOX, (10, 10, 90, 200)), boxes_of(), boxes_of((150, 5, 300, 180))]
    whole, small = network(*bins), network(*bins, chunk=2)
    results = [n.estimate(frames_of(3), boxes) for n in (whole, small)]
    assert [len(b) for b in whole._model.batches] == [3]
    assert [len(b) for b in small._model.batches] == [2, 1]
    assert [len(b.joints) for b in results[0]] == [2, 0, 1]
    single = network(bins[2]).estimate(frames_of(), boxes[2:])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.joints, b.joints)
    np.testing.assert_array_equal(results[0][2].joints, single[0].joints)
    assert network(bins[0]).estimate(frames_of(0), []) == []


def test_options_and_arguments_count():
    bins = random_bins(5)
    (plain,) = network(bins).estimate(frames_of(), [boxes_of(BOX)])
    (same,) = network(bins).estimate(frames_of(), [boxes_of(BOX)], CAMERA)
    np.testing.assert_array_equal(plain.joints, same.joints)
    tall = network(bins, stature_mm=2000).estimate(frames_of(), [boxes_of(BOX)])[0]
    assert tall.joints[0, 0, 2] > plain.joints[0, 0, 2] + 10
    camera = CAMERA.copy()
    camera[:2, 2] += 20
    moved = network(bins).estimate(frames_of(), [boxes_of(BOX)], camera)[0]
    assert np.abs(moved.joints - plain.joints).max() > 10
    # Below the score that is asked for nobody is there; with 0 everybody is.
    weak = Fake(bins, score=0.2)
    for min_score, there in ((0.3, False), (0.0, True)):
        found = Rtmw3d(Path("x"), CPU, model=weak, min_score=min_score)
        assert found.estimate(frames_of(), [boxes_of(BOX)])[0].joints.any() == there


def test_boxes_without_area_give_zeros():
    model = Fake(random_bins(1))
    found = Rtmw3d(Path("x"), CPU, model=model)
    (bodies,) = found.estimate(frames_of(), [boxes_of((5, 5, 5, 9), BOX, (9, 9, 3, 3))])
    assert not bodies.joints[[0, 2]].any()
    assert bodies.joints[1].any()
    assert len(model.batches[0]) == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda a: (a[0].astype(np.float32), *a[1:]), "frames"),
        (lambda a: (a[0], [], a[2]), "boxes"),
        (lambda a: (*a[:2], -np.eye(3)), "intrinsics"),
    ],
)
def test_wrong_input_is_refused(change, field):
    with pytest.raises(InvalidRequest) as caught:
        network(random_bins(1)).estimate(*change((frames_of(), [boxes_of(BOX)], None)))
    assert caught.value.field == field


def test_wrong_options_and_files_are_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="'chunk' is 0"):
        network(random_bins(1), chunk=0)
    with pytest.raises(InvalidRequest, match="'stature_mm' is 0"):
        network(random_bins(1), stature_mm=0)
    with pytest.raises(WeightsError, match=r"none\.onnx is not there"):
        Rtmw3d(tmp_path / "none.onnx", CPU)
    outputs = Fake(random_bins(1)).run(torch.zeros(1, 3, 384, 288))
    crops = [crop_of(np.array(BOX))]
    decode(outputs, crops)
    for wrong in (outputs[:2], [outputs[1], outputs[0], outputs[2]], [o[:, :17] for o in outputs]):
        with pytest.raises(WeightsError, match="RTMW3D: the outputs have shapes"):
            decode(wrong, crops)


def test_score_is_the_smaller_of_both_axes():
    outputs = Fake(random_bins(1), score=0.9).run(torch.zeros(1, 3, 384, 288))
    outputs[1] *= 0.5
    scores = decode(outputs, [crop_of(np.array(BOX))])[2]
    np.testing.assert_allclose(scores, 0.45, rtol=1e-6)


def test_crop_has_the_shape_of_the_network_and_holds_the_box():
    for box in ((0, 0, 30, 200), (0, 0, 200, 30), (-40, 10, 100, 300)):
        crop = crop_of(np.array(box, float))
        width, height = 288 / crop.scale, 384 / crop.scale
        assert width >= 1.25 * (box[2] - box[0]) - 1e-9
        assert height >= 1.25 * (box[3] - box[1]) - 1e-9
        tight = min(width / (box[2] - box[0]), height / (box[3] - box[1]))
        assert tight == pytest.approx(1.25)


def test_outside_of_the_frame_is_black_and_the_mean_is_zero():
    frame = np.full((40, 40, 3), 200, np.uint8)
    pixels = cut(frame, crop_of(np.array((-40.0, -40, 40, 40))))
    assert (pixels[:100, :100] == 0).all()
    assert (pixels[250:280, 200:230] == 200).all()
    grey = torch.tensor([123.675, 116.28, 103.53]).round().to(torch.uint8).expand(1, 2, 2, 3)
    batch = normalise(grey)
    assert batch.shape == (1, 3, 2, 2)
    assert batch.abs().max() < 0.01
    red = normalise(torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 2, 2, 3))
    assert red[0, 0, 0, 0] > 2 > 0 > red[0, 2, 0, 0]


def dot_network(path):
    """Writes an ONNX file: point k answers where the colour k % 3 is brightest in the crop.

    Its depth axis answers bin 288 + k.
    """
    from onnx import TensorProto, helper, numpy_helper, save

    depth = np.zeros((1, 133, 576), np.float32)
    depth[0, np.arange(133), 288 + np.arange(133)] = 1
    twice = np.array([1, 1, 2], np.float32)
    tables = {"colours": np.arange(133) % 3, "depth": depth, "twice": twice, "one": np.array([1])}
    nodes = [
        helper.make_node("ReduceMax", ["crop"], ["columns"], axes=[2], keepdims=0),
        helper.make_node("ReduceMax", ["crop"], ["rows"], axes=[3], keepdims=0),
        helper.make_node("Shape", ["crop"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "one"], ["count"]),
        helper.make_node("Concat", ["count", "one", "one"], ["repeats"], axis=0),
        helper.make_node("Tile", ["depth", "repeats"], ["simcc_z"]),
    ]
    tables["zero"] = np.array([0])
    for axis, name in (("columns", "simcc_x"), ("rows", "simcc_y")):
        wide = f"{axis} twice"
        scales = [axis, "", "twice"]
        nodes.append(helper.make_node("Resize", scales, [wide], mode="nearest"))
        nodes.append(helper.make_node("Gather", [wide, "colours"], [name], axis=1))
    out = [("simcc_x", 576), ("simcc_y", 768), ("simcc_z", 576)]
    graph = helper.make_graph(
        nodes,
        "dots",
        [helper.make_tensor_value_info("crop", TensorProto.FLOAT, ["batch", 3, 384, 288])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 133, bins])
            for name, bins in out
        ],
        [numpy_helper.from_array(value, name) for name, value in tables.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    save(model, str(path))


def test_dots_in_a_frame_are_found_through_onnxruntime(tmp_path):
    dot_network(tmp_path / "dots.onnx")
    found = Rtmw3d(tmp_path / "dots.onnx", CPU)
    frames = np.zeros((2, *SIZE, 3), np.uint8)
    centres = {0: (130.5, 60.5), 1: (150.5, 110.5), 2: (170.5, 190.5)}  # colour -> x, y
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    for colour, (x, y) in centres.items():
        apart = (columns - x) ** 2 + (rows - y) ** 2
        frames[1, ..., colour] = 255 * np.exp(-apart / 18)
    bodies = found.estimate(frames, [boxes_of(), boxes_of(BOX, BOX)])
    assert len(bodies[0].joints) == 0
    np.testing.assert_array_equal(bodies[1].joints[0], bodies[1].joints[1])
    pixels = project(bodies[1].joints[0], CAMERA)
    for point, joint in SAME.items():
        # A bin is a third of a pixel here; half a pixel off would be the wrong origin.
        assert np.abs(pixels[joint] - centres[point % 3]).max() < 0.4, point
    nearer = bodies[1].joints[0][SAME[5], 2] - bodies[1].joints[0][SAME[16], 2]
    assert nearer == pytest.approx((5 - 16) / 288 * 2174.4869, rel=1e-3)
