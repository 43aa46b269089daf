"""Finding persons: parity with the reference, layouts, overlaps, batches, options, errors."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.parity import pose_detect
from tests.parity.golden import Golden
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.detector import (
    YoloDetector,
    detection_rows,
    person_boxes,
    reference_box,
    stretch,
    suppress_overlaps,
)

CPU = torch.device("cpu")
FOLDER = Path(__file__).parents[1] / "golden" / "scail_pose"
YOLO = FOLDER / "yolov10_contract.onnx"
VITPOSE = FOLDER / "vitpose_contract.onnx"
MAGENTA, CYAN, YELLOW = (255, 0, 255), (0, 255, 255), (255, 255, 0)
PERSON, DOG = 0, 16


def scene(boxes: list[tuple[tuple[int, int, int, int], tuple[int, int, int]]], *, hw=(320, 192)):
    """Returns one frame, grey, with boxes x1 y1 x2 y2 outlined in colours."""
    frame = np.full((*hw, 3), 128, np.uint8)
    for (x1, y1, x2, y2), colour in boxes:
        frame[y1:y2, x1:x2] = colour
        frame[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4] = 128
    return frame


def rows(*entries: tuple[float, ...]) -> np.ndarray:
    return np.array(entries, np.float32).reshape(-1, 6)


def as_anchors(detections: np.ndarray, anchors: int = 20) -> np.ndarray:
    """Returns rows as the other output layout: float32 [84, anchors]."""
    out = np.zeros((84, anchors), np.float32)
    for column, (x1, y1, x2, y2, score, kind) in enumerate(detections):
        out[:4, column] = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        out[4:, column] = score / 3
        out[4 + int(kind), column] = score
    return out


def write_constant(path: Path, output: np.ndarray) -> Path:
    """Writes a network that answers every frame with `output`, whatever it shows."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
            helper.make_node("ReduceMean", ["mean"], ["one"], axes=[1], keepdims=1),
            helper.make_node("Unsqueeze", ["one", "last"], ["spread"]),
            helper.make_node("Mul", ["spread", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "answer"], ["output0"]),
        ],
        "constant",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 640, 640])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["N", *output.shape])],
        [
            numpy_helper.from_array(output[None], "answer"),
            numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
            numpy_helper.from_array(np.array([2]), "last"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, str(path))
    return path


@pytest.mark.parametrize("name", ["yolo_select.json", "contract_colours.json"])
def test_goldens_are_met(name):
    golden = Golden(FOLDER / name, [FOLDER])
    found = [checks for r in pose_detect.REPLAYS if (checks := r(golden)) is not None]
    assert len(found) == 1
    assert found[0]
    assert [c for c in found[0] if not c.ok] == []


def test_a_changed_golden_fails(tmp_path):
    cases = json.loads((FOLDER / "yolo_select.json").read_text())
    cases[0]["chosen_xyxy_score"][0] += 1
    (tmp_path / "renamed.json").write_text(json.dumps(cases))
    checks = pose_detect.replay_yolo_select(Golden(tmp_path / "renamed.json", []))
    assert [c.ok for c in checks].count(False) == 1


def test_colours_without_networks_beside_them_take_those_of_the_tests(tmp_path):
    (tmp_path / "c.json").write_text((FOLDER / "contract_colours.json").read_text())
    checks = pose_detect.replay_contract_colours(Golden(tmp_path / "c.json", []))
    assert checks
    assert all(check.ok for check in checks)


def test_all_persons_are_found_and_nothing_else():
    persons = [((20, 30, 90, 300), MAGENTA), ((110, 40, 180, 160), CYAN)]
    frame = scene([*persons, ((110, 200, 180, 300), YELLOW)])
    (found,) = YoloDetector(YOLO, CPU).detect(frame[None])
    assert np.abs(found.bboxes - [[20, 30, 90, 300], [110, 40, 180, 160]]).max() <= 1
    assert found.scores == pytest.approx([0.9, 0.8])
    assert found.ids == (-1, -1)
    assert found.bboxes.dtype == found.scores.dtype == np.float32


@pytest.mark.parametrize("select", ["persons", "reference"])
def test_an_empty_frame(select):
    (found,) = YoloDetector(YOLO, CPU, select=select).detect(scene([])[None])
    if select == "persons":
        assert found.bboxes.shape == (0, 4)
        assert found.scores.shape == (0,)
        assert found.ids == ()
    else:
        assert found.bboxes.tolist() == [[0, 0, 192, 320]]
        assert found.scores.tolist() == [0]


def test_a_box_too_small_for_the_reference_becomes_the_frame():
    rows_small = rows((100, 100, 121, 600, 0.9, PERSON))
    assert reference_box(rows_small, (320, 192)).tolist()[:4] == [30, 50, 36, 300]
    frame = scene([((30, 50, 37, 300), MAGENTA)])
    (found,) = YoloDetector(YOLO, CPU, select="reference").detect(frame[None])
    assert found.bboxes.tolist() == [[0, 0, 192, 320]]
    assert found.scores == pytest.approx([0.9])


def test_a_batch_is_its_single_frames():
    frames = np.stack(
        [scene([((20 + 9 * i, 30, 90 + 9 * i, 300), MAGENTA)] * (i != 1)) for i in range(4)]
    )
    single = [YoloDetector(YOLO, CPU).detect(f[None])[0] for f in frames]
    for chunk in (1, 3, 16):
        together = YoloDetector(YOLO, CPU, chunk=chunk).detect(frames)
        for a, b in zip(together, single, strict=True):
            assert np.array_equal(a.bboxes, b.bboxes)
            assert np.array_equal(a.scores, b.scores)
    assert [len(b.ids) for b in single] == [1, 0, 1, 1]
    assert YoloDetector(YOLO, CPU).detect(frames[:0]) == []


@pytest.mark.parametrize("hw", [(640, 640), (333, 517), (1080, 608)])
def test_boxes_follow_the_person_at_any_size(hw):
    detector = YoloDetector(YOLO, CPU)
    boxes = []
    for dx in (0, 40):
        box = (60 + dx, 50, 260 + dx, 300)
        boxes.append(detector.detect(scene([(box, MAGENTA)], hw=hw)[None])[0].bboxes)
        assert np.abs(boxes[-1] - box).max() <= 3
    assert boxes[1] - boxes[0] == pytest.approx(np.array([[40, 0, 40, 0]]), abs=2)


def test_stretch_is_the_reference_resize():
    frame = np.random.default_rng(0).integers(0, 256, (2, 200, 333, 3), np.uint8)
    expected = [cv2.resize(f.astype(np.float32) / 255, (640, 640)) for f in frame]
    ours = stretch(torch.from_numpy(frame)).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.stack(expected)).max() < 2e-5


def test_both_output_layouts_give_the_same(tmp_path):
    detections = rows(
        (100, 100, 300, 500, 0.6, PERSON),
        (350, 80, 500, 600, 0.7, PERSON),
        (320, 300, 380, 380, 0.9, DOG),
        (10, 10, 60, 60, 0.04, PERSON),
    )
    frames = np.zeros((3, 64, 48, 3), np.uint8)
    found = [
        YoloDetector(write_constant(tmp_path / f"{index}.onnx", output), CPU).detect(frames)
        for index, output in enumerate((detections, as_anchors(detections)))
    ]
    for one, other in zip(*found, strict=True):
        assert one.scores == pytest.approx([0.7, 0.6])
        assert np.allclose(one.bboxes, other.bboxes, atol=1e-4)
        assert np.allclose(one.scores, other.scores)


def test_rows_that_are_no_numbers_are_dropped():
    broken = torch.from_numpy(rows((1, 2, 30, 40, 0.9, 0), (1, 2, np.nan, 40, 0.9, 0)))
    assert len(detection_rows(broken[None])[0]) == 1


def test_a_dog_deletes_a_person_in_the_reference_alone():
    overlap = rows((100, 100, 300, 500, 0.6, PERSON), (102, 101, 303, 505, 0.8, DOG))
    assert reference_box(overlap, (640, 640))[4] == -1
    assert len(person_boxes(overlap, (640, 640)).ids) == 1


def test_boxes_end_at_the_frame_and_empty_ones_go():
    found = person_boxes(
        rows((-20, -5, 700, 400, 0.9, PERSON), (650, 10, 700, 90, 0.9, PERSON)), (320, 160)
    )
    assert found.bboxes.tolist() == [[0, 0, 160, 200]]


def test_of_two_overlapping_persons_the_better_stays():
    found = person_boxes(
        rows((100, 100, 300, 500, 0.6, PERSON), (105, 102, 310, 520, 0.8, PERSON)), (640, 640)
    )
    assert found.scores.tolist() == pytest.approx([0.8])


def test_the_threshold_counts():
    frame = scene([((20, 30, 90, 300), MAGENTA), ((110, 40, 180, 160), CYAN)])[None]
    counts = [
        len(YoloDetector(YOLO, CPU, score_thr=thr).detect(frame)[0].ids) for thr in (0, 0.85, 0.95)
    ]
    assert counts == [2, 1, 0]


@pytest.mark.parametrize("seed", range(40))
def test_overlaps_are_dropped_as_opencv_does(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 14))
    boxes = np.hstack([rng.integers(0, 60, (count, 2)), rng.integers(0, 60, (count, 2))])
    choices = [0.04, 0.05, 0.06, 0.3, 0.5, 0.5, 0.9] if seed % 2 else rng.random(9)
    scores = rng.choice(choices, count).astype(np.float32)
    expected = cv2.dnn.NMSBoxes(boxes.tolist(), scores.tolist(), 0.05, 0.5)
    ours = suppress_overlaps(boxes.astype(np.int32), scores)
    assert ours.tolist() == np.array(expected).reshape(-1).tolist()


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
def test_options_out_of_range_are_refused(options, field):
    with pytest.raises(InvalidRequest) as caught:
        YoloDetector(YOLO, CPU, **options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "frames",
    [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3)), np.zeros((1, 3, 8, 8), np.uint8)],
)
def test_frames_of_another_kind_are_refused(frames):
    with pytest.raises(InvalidRequest, match="uint8"):
        YoloDetector(YOLO, CPU).detect(frames)


def test_frames_that_cannot_be_written_are_read():
    frames = scene([((20, 30, 90, 300), MAGENTA)])[None]
    frames.flags.writeable = False
    assert len(YoloDetector(YOLO, CPU).detect(frames)[0].ids) == 1


def test_another_network_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"\[\?, 3, 640, 640\].*\[\?, 84, \?\] is needed"):
        YoloDetector(VITPOSE, CPU)
    other = write_constant(tmp_path / "segment.onnx", np.zeros((116, 20), np.float32))
    with pytest.raises(WeightsError, match="Choose another file"):
        YoloDetector(other, CPU)
    with pytest.raises(WeightsError, match="trained on COCO"):
        detection_rows(torch.zeros(1, 116, 20))
