"""DWPose: crops, the two rows of responses, batches, errors, and a network built here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pipelines.pose import PoseModels, observe
from tests.pose.test_yolox import BOX_PX, write_blue_finder
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.dwpose import BINS_X, BINS_Y, DwPose, decode_simcc
from xicon_infer.pose.observations import Bodies
from xicon_infer.pose.rtmw3d import crop_of
from xicon_infer.pose.yolox import YoloxDetector
from xicon_infer.types import SilentProgress

CPU = torch.device("cpu")
BOX = (60.0, 20.0, 180.0, 200.0)
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def write_dot_finder(path: Path, *, channel: int = 0, batch: object = "N") -> Path:
    """Writes a DWPose that finds the brightest spot of a channel of its crop for every keypoint.

    The response of a bin is the brightest pixel of its column or row, from 0 to 1.
    """
    constants = {
        "std": np.array(STD, np.float32).reshape(1, 3, 1, 1),
        "mean": np.array(MEAN, np.float32).reshape(1, 3, 1, 1),
        "levels": np.array(255, np.float32),
        "channel": np.array(channel),
        "row": np.array([0, 1, -1]),
        "last": np.array([2]),
        "all": np.ones((1, 133, 1), np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["input", "std"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mean"], ["pixels"]),
        helper.make_node("Div", ["pixels", "levels"], ["shares"]),
        helper.make_node("Gather", ["shares", "channel"], ["one"], axis=1),
    ]
    for name, axis in (("x", 1), ("y", 2)):
        nodes += [
            helper.make_node("ReduceMax", ["one"], [f"m{name}"], axes=[axis], keepdims=0),
            helper.make_node("Unsqueeze", [f"m{name}", "last"], [f"u{name}"]),
            helper.make_node("Concat", [f"u{name}", f"u{name}"], [f"c{name}"], axis=2),
            helper.make_node("Reshape", [f"c{name}", "row"], [f"r{name}"]),
            helper.make_node("Mul", [f"r{name}", "all"], [f"simcc_{name}"]),
        ]
    graph = helper.make_graph(
        nodes,
        "dots",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 384, 288])],
        [
            helper.make_tensor_value_info(f"simcc_{name}", TensorProto.FLOAT, [batch, 133, bins])
            for name, bins in (("x", BINS_X), ("y", BINS_Y))
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, str(path))
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return write_dot_finder(tmp_path_factory.mktemp("dwpose") / "dw-ll_ucoco_384.onnx")


def dotted(*places: tuple[int, int], size=(240, 240)) -> np.ndarray:
    """Returns frames [B, H, W, 3] with one red dot of 3 x 3 pixels around x, y each."""
    frames = np.zeros((len(places), *size, 3), np.uint8)
    for frame, (x, y) in zip(frames, places, strict=True):
        frame[y - 1 : y + 2, x - 1 : x + 2, 0] = 255
    return frames


def responses(x: np.ndarray, y: np.ndarray, score_x=0.8, score_y=0.8) -> list[torch.Tensor]:
    """Returns outputs with peaks at bins x and y [N, 133]."""
    outputs = []
    for bins, width, score in ((x, BINS_X, score_x), (y, BINS_Y, score_y)):
        rows = torch.full((*bins.shape, width), -1.0)
        values = torch.full((*bins.shape, 1), float(score))
        outputs.append(rows.scatter_(2, torch.from_numpy(bins)[..., None], values))
    return outputs


@pytest.mark.parametrize("place", [(120, 110), (70, 40), (170, 190)])
@pytest.mark.parametrize("box", [BOX, (50.0, 30.0, 190.0, 199.0), (0.0, 0.0, 240.0, 240.0)])
def test_a_dot_is_found_where_it_is(network, place, box):
    points, scores = DwPose(network, CPU).estimate(dotted(place), [0], np.float32([box]))
    assert points.shape == (1, 133, 2)
    assert scores.shape == (1, 133)
    assert points.dtype == scores.dtype == np.float32
    # The middle of the pixel, found to about one pixel: the first of equal bins counts.
    assert np.abs(points[0] - (np.array(place) + 0.5)).max() < 1.6
    assert (scores > 0.9).all()


def test_the_network_is_shown_rgb(network, tmp_path):
    frames, box = dotted((100, 100)), np.float32([BOX])
    assert DwPose(network, CPU).estimate(frames, [0], box)[1].max() > 0.9
    blue = write_dot_finder(tmp_path / "blue.onnx", channel=2)
    assert DwPose(blue, CPU).estimate(frames, [0], box)[1].max() < 0.01


def test_a_batch_is_its_single_boxes_and_a_fixed_batch_works(network, tmp_path):
    frames = dotted((100, 90), (120, 150), (80, 60))
    boxes = np.float32([BOX, (40, 10, 200, 220), BOX, (70, 30, 150, 180)])
    which = [2, 0, 1, 1]
    single = [
        DwPose(network, CPU).estimate(frames[[i]], [0], boxes[[n]])[0][0]
        for n, i in enumerate(which)
    ]
    fixed = write_dot_finder(tmp_path / "fixed.onnx", batch=1)
    for model in (DwPose(network, CPU, chunk=3), DwPose(network, CPU), DwPose(fixed, CPU)):
        np.testing.assert_allclose(model.estimate(frames, which, boxes)[0], single, atol=1e-4)
    points, scores = DwPose(network, CPU).estimate(frames, [], np.zeros((0, 4), np.float32))
    assert points.shape == (0, 133, 2)
    assert scores.shape == (0, 133)


def test_moving_the_picture_moves_the_points(network):
    model, box = DwPose(network, CPU), np.float32([BOX])
    base = model.estimate(dotted((100, 100)), [0], box)[0]
    moved = model.estimate(dotted((117, 109)), [0], box + np.float32([17, 9, 17, 9]))[0]
    np.testing.assert_allclose(moved - base, np.tile([17, 9], (1, 133, 1)), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_bins_become_places_in_the_crop(seed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(-50, 300, 2)
    box = np.concatenate([low, low + rng.uniform(1, 400, 2)])
    x, y = rng.integers(0, BINS_X, (1, 133)), rng.integers(0, BINS_Y, (1, 133))
    points, scores = decode_simcc(responses(x, y, 0.9, 0.4), [crop_of(box)])
    tall = 1.25 * max(box[3] - box[1], (box[2] - box[0]) * 4 / 3)
    wide = tall * 3 / 4
    left, top = (box[0] + box[2] - wide) / 2, (box[1] + box[3] - tall) / 2
    np.testing.assert_allclose(points[0, :, 0], left + x[0] / BINS_X * wide)
    np.testing.assert_allclose(points[0, :, 1], top + y[0] / BINS_Y * tall)
    np.testing.assert_allclose(scores, 0.4, rtol=1e-6)


@pytest.mark.parametrize("score", [0.0, -0.2])
def test_a_point_without_response_goes_to_the_corner(score):
    bins = np.full((1, 133), 200)
    points, scores = decode_simcc(responses(bins, bins, 0.7, score), [crop_of(np.array(BOX))])
    crop = crop_of(np.array(BOX))
    corner = [crop.centre_x - 144.5 / crop.scale, crop.centre_y - 192.5 / crop.scale]
    np.testing.assert_allclose(points[0], np.tile(corner, (133, 1)))
    np.testing.assert_allclose(scores, score)


@pytest.mark.parametrize(
    ("index", "boxes", "field"),
    [
        ([0], [(9, 9, 9, 50)], "bboxes"),
        ([0], [(0, 0, np.nan, 50)], "bboxes"),
        ([0], [(0, 0, 1e7, 50)], "bboxes"),
        ([0], [(0, 0, 10)], "bboxes"),
        ([1], [BOX], "frame_index"),
        ([-1], [BOX], "frame_index"),
        ([0, 0], [BOX], "frame_index"),
    ],
)
def test_what_does_not_fit_is_refused(network, index, boxes, field):
    with pytest.raises(InvalidRequest) as caught:
        DwPose(network, CPU).estimate(dotted((9, 9)), index, np.float32(boxes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("options", "field"), [({"chunk": 0}, "chunk"), ({"threads": 0}, "threads")]
)
def test_options_out_of_range_are_refused(network, options, field):
    with pytest.raises(InvalidRequest) as caught:
        DwPose(network, CPU, **options)
    assert caught.value.field == field


def test_another_network_is_refused():
    other = Path(__file__).parents[1] / "golden" / "scail_pose" / "vitpose_contract.onnx"
    with pytest.raises(WeightsError, match=r"384, 288\]"):
        DwPose(other, CPU)
    good = responses(np.zeros((1, 133), int), np.zeros((1, 133), int))
    for outputs in (good[::-1], good[:1], [good[0], good[0]]):
        with pytest.raises(WeightsError, match="whole-body RTMPose"):
            decode_simcc(outputs, [crop_of(np.array(BOX))])


class NoBodies:
    """Stands for the 3-D network."""

    def estimate(self, frames, boxes, intrinsics):
        counts = [len(found.bboxes) for found in boxes]
        return [
            Bodies(np.zeros((n, 24, 3), np.float32), np.zeros((n, 24), np.float32)) for n in counts
        ]


def test_both_networks_serve_the_pose_stage(network, tmp_path):
    """A blue square makes a person, the red dot in its box all of its keypoints."""
    detector = YoloxDetector(write_blue_finder(tmp_path / "yolox_l.onnx"), CPU)
    models = PoseModels(detector, DwPose(network, CPU), NoBodies())
    film = np.zeros((3, 640, 640, 3), np.uint8)
    film[0, 200:208, 160:168, 2] = 255
    film[0, 230:233, 170:173, 0] = 255
    film[2, 400:408, 400:408, 2] = 255
    film[2, 380:383, 390:393, 0] = 255
    seen = observe(iter(film), models, SilentProgress(), len(film))
    assert [len(observation.boxes.bboxes) for observation in seen] == [1, 0, 1]
    for frame, dot in ((0, (171.5, 231.5)), (2, (391.5, 381.5))):
        (box,) = seen[frame].boxes.bboxes
        np.testing.assert_allclose(box[2:] - box[:2], BOX_PX, rtol=1e-3)
        assert np.abs(seen[frame].keypoints[0] - np.array(dot)).max() < 1.0
        assert (seen[frame].keypoint_scores[0] > 0.9).all()
