"""YOLOX: the letterbox, raw anchors, thresholds, overlaps, and a network built here."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.yolox import (
    STRIDES,
    YoloxDetector,
    decode_anchors,
    letterbox,
    select_persons,
)

CPU = torch.device("cpu")
PERSON, DOG = 0, 16
BOX_PX = (48.0, 96.0)
"""(W, H) in input pixels of every box that the network below answers with."""
CELLS = 80


def write_blue_finder(path: Path, *, kind: int = PERSON, batch: object = "N") -> Path:
    """Writes a YOLOX that sees a person around every cell of 8 pixels that is blue.

    The objectness of a cell is the mean of the first channel, which is blue in BGR.
    """
    raw = np.zeros((1, 8400, 4), np.float32)
    raw[..., :2] = 0.5
    raw[..., 2:] = np.log(np.array(BOX_PX) / 8)
    classes = np.zeros((1, 8400, 80), np.float32)
    classes[..., kind] = 1
    constants = {
        "raw": raw,
        "classes": classes,
        "blue": np.array(0),
        "column": np.array([0, -1, 1]),
        "levels": np.array(255, np.float32),
        "rest": np.array([0, 0, 0, 0, 8400 - CELLS**2, 0]),
        "zero": np.array(0, np.float32),
    }
    nodes = [
        helper.make_node("AveragePool", ["images"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Gather", ["p", "blue"], ["b"], axis=1),
        helper.make_node("Reshape", ["b", "column"], ["c"]),
        helper.make_node("Div", ["c", "levels"], ["d"]),
        helper.make_node("Pad", ["d", "rest"], ["objectness"]),
        helper.make_node("Mul", ["objectness", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "raw"], ["boxes"]),
        helper.make_node("Add", ["nothing", "classes"], ["scores"]),
        helper.make_node("Concat", ["boxes", "objectness", "scores"], ["output"], axis=2),
    ]
    graph = helper.make_graph(
        nodes,
        "blue",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 640, 640])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 8400, 85])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, str(path))
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return write_blue_finder(tmp_path_factory.mktemp("yolox") / "yolox_l.onnx")


def anchors(*entries: tuple[int, int, int, float, float, int]) -> torch.Tensor:
    """Returns an output with some anchors: grid, row, column, objectness, class score, class."""
    out = torch.zeros(1, 8400, 85)
    starts = np.cumsum([0, *((640 // stride) ** 2 for stride in STRIDES)])
    for grid, row, column, objectness, score, kind in entries:
        anchor = starts[grid] + row * (640 // STRIDES[grid]) + column
        out[0, anchor, 4], out[0, anchor, 5 + kind] = objectness, score
    return out


def blue_squares(size: tuple[int, int], *corners: tuple[int, int], side: int) -> np.ndarray:
    """Returns one frame [1, H, W, 3], black, with pure blue squares at corners x, y."""
    frame = np.zeros((1, *size, 3), np.uint8)
    for x, y in corners:
        frame[0, y : y + side, x : x + side, 2] = 255
    return frame


def test_the_letterbox_keeps_the_aspect_and_is_grey_bgr():
    frame = np.zeros((1, 100, 50, 3), np.uint8)
    frame[..., 0], frame[..., 1] = 200, 30
    pixels, scale = letterbox(torch.from_numpy(frame))
    assert pixels.shape == (1, 3, 640, 640)
    assert scale == 6.4
    assert pixels[0, :, 639, 319].tolist() == [0, 30, 200]
    assert pixels[0, :, 0, 320].tolist() == [114, 114, 114]
    wide, scale = letterbox(torch.from_numpy(frame.swapaxes(1, 2).copy()))
    assert scale == 6.4
    assert wide[0, :, 319, 639].tolist() == [0, 30, 200]
    assert wide[0, :, 320, 0].tolist() == [114, 114, 114]


@pytest.mark.parametrize("size", [(640, 640), (360, 640), (333, 517), (1280, 720)])
def test_the_letterbox_is_the_usual_resize(size):
    frame = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    pixels, scale = letterbox(torch.from_numpy(frame))
    inner = int(size[1] * scale), int(size[0] * scale)
    expected = cv2.resize(frame[0, ..., ::-1], inner, interpolation=cv2.INTER_LINEAR)
    ours = pixels[0].permute(1, 2, 0).numpy()[: inner[1], : inner[0]]
    assert np.abs(ours - expected).max() <= 1
    assert (pixels[0, :, inner[1] :] == 114).all()
    assert (pixels[0, :, :, inner[0] :] == 114).all()


@pytest.mark.parametrize(("grid", "row", "column"), [(0, 3, 70), (1, 39, 0), (2, 5, 19)])
def test_an_anchor_becomes_its_box(grid, row, column):
    output = anchors((grid, row, column, 0.8, 0.9, DOG))
    start = int(np.cumsum([0, *((640 // stride) ** 2 for stride in STRIDES)])[grid])
    anchor = start + row * (640 // STRIDES[grid]) + column
    output[0, anchor, :4] = torch.tensor([0.25, 0.5, 1.0, 2.0])
    x1, y1, x2, y2, score, kind = decode_anchors(output)[0][anchor]
    stride = STRIDES[grid]
    assert (x1 + x2) / 2 == pytest.approx((column + 0.25) * stride)
    assert (y1 + y2) / 2 == pytest.approx((row + 0.5) * stride)
    assert x2 - x1 == pytest.approx(np.e * stride, rel=1e-5)
    assert y2 - y1 == pytest.approx(np.e**2 * stride, rel=1e-5)
    assert score == pytest.approx(0.72)
    assert kind == DOG


def test_rows_that_are_no_numbers_are_dropped():
    output = anchors((0, 0, 0, 0.9, 0.9, PERSON), (0, 0, 1, 0.9, 0.9, PERSON))
    output[0, 0, 2] = 1000
    assert len(decode_anchors(output)[0]) == 8399


@pytest.mark.parametrize("size", [(640, 640), (320, 320), (480, 200)])
def test_persons_are_found_where_they_are(network, size):
    scale = 640 / max(size)
    side = int(8 / scale)
    corners = [(side * 4, side * 10), (side * 16, side * 30)]
    frame = blue_squares(size, *corners, side=side)
    (found,) = YoloxDetector(network, CPU).detect(frame)
    centres = (found.bboxes[:, :2] + found.bboxes[:, 2:]) / 2
    expected = np.array(corners) + side / 2
    assert np.abs(centres[np.argsort(centres[:, 0])] - expected).max() < 1.5
    sides = found.bboxes[:, 2:] - found.bboxes[:, :2]
    np.testing.assert_allclose(sides, np.tile(np.array(BOX_PX) / scale, (2, 1)), rtol=1e-3)
    assert found.ids == (-1, -1)
    assert found.bboxes.dtype == found.scores.dtype == np.float32
    # Red is not blue: the network is shown BGR.
    assert YoloxDetector(network, CPU).detect(frame[..., ::-1].copy())[0].ids == ()


def test_a_batch_is_its_single_frames_and_a_fixed_batch_works(network, tmp_path):
    frames = np.concatenate(
        [blue_squares((320, 320), (16 * i, 40), side=4 if i != 2 else 0) for i in range(5)]
    )
    single = [YoloxDetector(network, CPU).detect(f[None])[0] for f in frames]
    fixed = write_blue_finder(tmp_path / "fixed.onnx", batch=1)
    for detector in (
        YoloxDetector(network, CPU, chunk=2),
        YoloxDetector(network, CPU),
        YoloxDetector(fixed, CPU),
    ):
        for a, b in zip(detector.detect(frames), single, strict=True):
            np.testing.assert_array_equal(a.bboxes, b.bboxes)
    assert [len(found.ids) for found in single] == [1, 1, 0, 1, 1]
    assert YoloxDetector(network, CPU).detect(frames[:0]) == []


def test_an_empty_frame_is_empty_or_the_whole_box(network):
    empty = np.zeros((1, 60, 40, 3), np.uint8)
    assert YoloxDetector(network, CPU).detect(empty)[0].bboxes.shape == (0, 4)
    (whole,) = YoloxDetector(network, CPU, select="reference").detect(empty)
    assert whole.bboxes.tolist() == [[0, 0, 40, 60]]
    assert whole.scores.tolist() == [0]


def test_the_threshold_counts_and_other_classes_do_not(network, tmp_path):
    frame = blue_squares((640, 640), (80, 80), side=8)
    frame[0, 400:408, 400:408, 2] = 150
    counts = [
        len(YoloxDetector(network, CPU, score_thr=thr).detect(frame)[0].ids)
        for thr in (0.3, 0.5, 0.7, 0.99)
    ]
    assert counts == [2, 2, 1, 1]
    dogs = write_blue_finder(tmp_path / "dogs.onnx", kind=DOG)
    assert YoloxDetector(dogs, CPU).detect(frame)[0].ids == ()


def test_persons_are_selected_as_the_authors_do():
    boxes = np.array(
        [[0, 0, 100, 100], [0, 0, 100, 96], [200, 0, 300, 100], [400, 0, 500, 100], [9, 9, 9, 50]]
    )
    scores = np.array([0.6, 0.9, 0.5, 0.99, 0.8])
    labels = np.array([PERSON, PERSON, PERSON, DOG, PERSON])
    assert select_persons(boxes, scores, labels).tolist() == [1]
    assert select_persons(boxes, scores, labels, score_thr=0.4).tolist() == [1, 2]
    # Small boxes: the pixels of the borders count in the second pass.
    tiny = np.array([[0, 0, 3.0, 3.0], [0, 0, 3.0, 1.9]])
    pair = select_persons(tiny, np.array([0.9, 0.8]), np.zeros(2))
    assert pair.tolist() == [0]
    larger = select_persons(tiny * 10, np.array([0.9, 0.8]), np.zeros(2))
    assert larger.tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_of_overlapping_boxes_the_best_stays(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    low = rng.uniform(0, 60, (count, 2))
    boxes = np.hstack([low, low + rng.uniform(5, 60, (count, 2))])
    scores = rng.uniform(0.51, 1, count)
    kept = select_persons(boxes, scores, np.zeros(count))
    assert kept[0] == scores.argmax()
    assert (np.diff(scores[kept]) <= 0).all()

    def overlap(a, b):
        shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
        areas = [(box[2:] - box[:2]).prod() for box in (a, b)]
        return shared / (sum(areas) - shared)

    for index, row in enumerate(kept):
        assert all(overlap(boxes[row], boxes[other]) <= 0.65 for other in kept[:index])
    for row in set(range(count)) - set(kept.tolist()):
        better = [other for other in kept if scores[other] >= scores[row]]
        assert any(overlap(boxes[row], boxes[other]) > 0.5 for other in better)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"select": "largest"}, "select"),
        ({"score_thr": 1.0}, "score_thr"),
        ({"score_thr": -0.1}, "score_thr"),
        ({"chunk": 0}, "chunk"),
        ({"threads": 0}, "threads"),
    ],
)
def test_options_out_of_range_are_refused(network, options, field):
    with pytest.raises(InvalidRequest) as caught:
        YoloxDetector(network, CPU, **options)
    assert caught.value.field == field


def test_another_network_is_refused():
    other = Path(__file__).parents[1] / "golden" / "scail_pose" / "yolov10_contract.onnx"
    with pytest.raises(WeightsError, match=r"8400, 85\] is needed"):
        YoloxDetector(other, CPU)
    with pytest.raises(WeightsError, match="without suppression"):
        decode_anchors(torch.zeros(1, 100, 5))
