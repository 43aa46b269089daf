"""Keypoints: parity of crop and decoding, batches, movement, options, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter

from tests.parity import pose_detect
from tests.parity.golden import Golden
from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.pose.vitpose import VitPose, crop_geometry, cut_crops
from xicon_infer.pose.vitpose_decode import decode_heatmaps, find_peaks

CPU = torch.device("cpu")
FOLDER = Path(__file__).parents[1] / "golden" / "scail_pose"
YOLO = FOLDER / "yolov10_contract.onnx"
VITPOSE = FOLDER / "vitpose_contract.onnx"
COLOURS = json.loads((FOLDER / "contract_colours.json").read_text())
SIZE_WH = (300, 420)
BOX = (30, 40, 240, 330)
OTHERS = [(0, 0, 10, 10), (0, 0, 10, 10)]


def dotted(dx: int = 0, dy: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns a frame [H, W, 3] with all dots, moved, and their places."""
    frames, dots = pose_detect.draw_scene(COLOURS, SIZE_WH, [BOX, *OTHERS])
    return np.roll(frames[1], (dy, dx), (0, 1)), dots + np.array([dx, dy])


def peaks(places: torch.Tensor, sigma: float = 2.0) -> torch.Tensor:
    """Returns heatmaps [1, K, 64, 48] with one Gaussian peak each at places [K, 2]."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
    squared = (x - places[:, 0, None, None]) ** 2 + (y - places[:, 1, None, None]) ** 2
    return torch.exp(-squared / (2 * sigma**2))[None].float()


def cells(heatmaps: torch.Tensor, **options) -> torch.Tensor:
    """Returns decoded points [N, K, 2] in heatmap cells, for the dark and the UDP convention."""
    last = 1 if options.get("decode") == "udp" else 0
    size = torch.tensor([[48.0 - last, 64.0 - last]], dtype=torch.float64)
    size = size.expand(len(heatmaps), 2)
    return decode_heatmaps(heatmaps, size / 2, size, **options)[0]


@pytest.mark.parametrize("name", ["vitpose_crop.safetensors", "vitpose_decode.safetensors"])
def test_goldens_are_met(name):
    golden = Golden(FOLDER / name, [FOLDER])
    found = [checks for r in pose_detect.REPLAYS if (checks := r(golden)) is not None]
    assert len(found) == 1
    assert found[0]
    assert [c for c in found[0] if not c.ok] == []


@pytest.mark.parametrize(
    ("name", "key", "factor"),
    [
        ("vitpose_crop", "out.input_0", 1.001),
        ("vitpose_crop", "out.scale", 1.000001),
        ("vitpose_crop", "out.crop_rect_xywh", 2),
        ("vitpose_decode", "out.A.keypoints", 1.0001),
        ("vitpose_decode", "out.B.keypoints", 1.0001),
        ("vitpose_decode", "in.B.center", 1.0001),
    ],
)
def test_a_changed_golden_fails(tmp_path, name, key, factor):
    tensors = load_file(FOLDER / f"{name}.safetensors")
    tensors[key] = tensors[key] * factor
    path = tmp_path / "renamed.safetensors"
    save_file(tensors, path)
    found = [c for r in pose_detect.REPLAYS for c in r(Golden(path, [])) or []]
    assert any(not c.ok for c in found)


def test_the_whole_chain_meets_the_stored_boxes_and_points():
    checks = pose_detect.chain_checks(Golden(FOLDER / "e2e_contract.npz", [FOLDER]))
    assert len(checks) == 9
    assert [c for c in checks if not c.ok] == []
    # Closer than the README asks: the boxes are whole pixels, so every crop must be the same.
    assert max(c.rel_err for c in checks) < 1e-6


def test_dots_are_found_where_they_are():
    frame, dots = dotted()
    points, scores = VitPose(VITPOSE, CPU).estimate(frame[None], [0], np.float32([BOX]))
    assert points.shape == (1, 133, 2)
    assert scores.shape == (1, 133)
    assert points.dtype == scores.dtype == np.float32
    seen = scores[0] > 0.3
    assert seen.sum() == 130
    assert np.abs(points[0] - dots)[seen].max() < 2.5


def test_a_batch_is_its_single_boxes():
    frames = np.stack([dotted(dx)[0] for dx in (0, 7, 20)])
    boxes = np.float32([(50, 40, 260, 330), BOX, (37, 40, 247, 330), (5, 0, 290, 400)])
    which = [2, 0, 1, 1]
    model = VitPose(VITPOSE, CPU)
    single = [model.estimate(frames[[i]], [0], boxes[[n]])[0][0] for n, i in enumerate(which)]
    for chunk in (1, 3, 16):
        points, _ = VitPose(VITPOSE, CPU, chunk=chunk).estimate(frames, which, boxes)
        assert np.abs(points - single).max() < 1e-4
    wrong, _ = model.estimate(frames, [0, 0, 1, 1], boxes)
    assert np.abs(wrong[0] - single[0]).max() > 5


def test_points_move_with_the_picture():
    model = VitPose(VITPOSE, CPU)
    still, scores = model.estimate(dotted()[0][None], [0], np.float32([BOX]))
    moved, _ = model.estimate(
        dotted(12, 9)[0][None], [0], np.float32([BOX]) + np.float32([12, 9, 12, 9])
    )
    seen = scores[0] > 0.3
    assert (moved - still)[0][seen] == pytest.approx(np.tile([12.0, 9.0], (130, 1)), abs=1e-3)


def test_no_boxes_give_no_points():
    points, scores = VitPose(VITPOSE, CPU).estimate(
        dotted()[0][None], [], np.zeros((0, 4), np.float32)
    )
    assert points.shape == (0, 133, 2)
    assert scores.shape == (0, 133)


def test_crops_have_the_aspect_of_the_network_and_a_margin():
    crops = crop_geometry(np.array([(10, 20, 40, 140), (0, 0, 300, 40)]))
    assert crops.sizes == pytest.approx(np.array([(112.5, 150), (375, 500)]))
    assert crops.centers.tolist() == [[25, 80], [150, 20]]
    assert crops.rects_xywh[0].tolist() == [-31, 5, 112, 150]


def test_corners_are_rounded_as_after_inverting_the_matrix():
    rng = np.random.default_rng(0)
    low = rng.integers(0, 600, (500, 2))
    boxes = np.hstack([low, low + rng.integers(1, 700, (500, 2))])
    crops = crop_geometry(boxes)
    for center, size, rect in zip(crops.centers, crops.sizes, crops.rects_xywh, strict=True):
        sizes = np.array([size[1] / (4 / 3), size[1]])
        matrix = np.diag([*(np.array([192, 256]) / sizes), 1.0])
        matrix[:2, 2] = np.array([192, 256]) * (-center / sizes + 0.5)
        corners = np.rint(np.linalg.inv(matrix) @ np.array([[0, 192], [0, 256], [1, 1]]))[:2]
        assert [*rect[:2], *(rect[:2] + rect[2:])] == corners.T.ravel().tolist()


def test_outside_the_frame_lies_black():
    frame = torch.full((1, 40, 30, 3), 255, dtype=torch.uint8)
    black = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    far = cut_crops(frame, torch.zeros(1, dtype=torch.int64), np.array([[500, 500, 30, 40]]))
    assert torch.allclose(far, black[None, :, None, None].expand_as(far), atol=1e-6)
    half = cut_crops(frame, torch.zeros(1, dtype=torch.int64), np.array([[-30, 0, 60, 40]]))
    assert torch.allclose(half[0, :, 100, 5], black, atol=1e-6)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(half[0, :, 100, -5], white, atol=1e-5)


def test_bytes_and_floats_give_the_same_crop():
    frame = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 50, 40, 3), np.uint8))
    rects, first = np.array([[-5, -7, 44, 59]]), torch.zeros(1, dtype=torch.int64)
    assert torch.allclose(
        cut_crops(frame, first, rects), cut_crops(frame.float() / 255, first, rects), atol=1e-5
    )


def test_a_box_below_a_pixel_still_gives_points():
    points, _ = VitPose(VITPOSE, CPU).estimate(
        dotted()[0][None], [0], np.float32([(10, 10, 10.2, 10.2)])
    )
    assert np.isfinite(points).all()


@pytest.mark.parametrize("decode", ["dark", "udp"])
def test_peaks_between_cells_are_found(decode):
    places = 3 + torch.rand(40, 2, generator=torch.manual_seed(0)) * torch.tensor([40.0, 56.0])
    # Black outside, or a mirror, bends the blurred peaks near the border: 5 cells of blur.
    inner = (places > 8).all(1) & (places[:, 0] < 39) & (places[:, 1] < 55)
    assert inner.sum() > 10
    found = cells(peaks(places), decode=decode)[0]
    assert (found - places).abs()[inner].max() < 0.02


def test_decodings_differ_by_a_cell_at_the_far_end():
    size = torch.tensor([[480.0, 640.0]], dtype=torch.float64)
    maps = peaks(torch.tensor([[10.0, 12.0], [38.0, 52.0]]))
    dark, udp = (decode_heatmaps(maps, size / 2, size, decode=d)[0][0] for d in ("dark", "udp"))
    # Cells of 10 px, and of 480 / 47 and 640 / 63.
    assert dark[1] == pytest.approx([380, 520], abs=0.2)
    assert udp[1] == pytest.approx([38 * 480 / 47, 52 * 640 / 63], abs=0.2)


def test_udp_follows_its_formulas_on_any_map():
    maps = torch.rand(2, 3, 64, 48, generator=torch.manual_seed(1))
    maps[0, 0, 0, 0] = maps[0, 1, 63, 47] = 2.0
    found = cells(maps, decode="udp").double()
    _, places = find_peaks(maps.double())
    for n, k in np.ndindex(2, 3):
        x, y = (int(c) for c in places[n, k])
        smooth = gaussian_filter(maps[n, k].double().numpy(), 2.0, mode="mirror", radius=5)
        logs = np.pad(np.log(smooth.clip(1e-3, 50)), 1, mode="edge")[y : y + 3, x : x + 3]
        (lu, u, _), (left, m, right), (_, d, rd) = logs
        mixed = (rd - right - d + 2 * m - left - u + lu) / 2
        hessian = [[right - 2 * m + left, mixed], [mixed, d - 2 * m + u]]
        step = np.linalg.solve(hessian, [(right - left) / 2, (d - u) / 2])
        assert found[n, k].numpy() == pytest.approx([x - step[0], y - step[1]], abs=1e-3)


def test_a_clamped_point_stays_within_a_cell_of_its_peak():
    maps = torch.rand(4, 133, 64, 48, generator=torch.manual_seed(0))
    _, places = find_peaks(maps.double())
    free, kept = cells(maps), cells(maps, clamp_offset=True)
    assert (free - places).abs().max() > 1.5
    assert (kept - places).abs().max() <= 1 + 1e-5
    near = (free - places).abs() < 1
    assert torch.equal(free[near], kept[near])


@pytest.mark.parametrize("decode", ["dark", "udp"])
def test_maps_without_a_peak_point_outside(decode):
    maps = torch.stack([torch.zeros(64, 48), torch.full((64, 48), -0.5)])[None]
    found = cells(maps, decode=decode)
    assert found.tolist() == [[[-1, -1], [-1, -1]]]


def test_options_change_the_points():
    # Noise gives answers with no clear peak, on which a free step runs far.
    noise = np.random.default_rng(0).integers(0, 256, (1, 300, 200, 3), np.uint8)
    points = [
        VitPose(VITPOSE, CPU, **options).estimate(noise, [0], np.float32([(20, 20, 180, 280)]))[0]
        for options in ({}, {"decode": "udp"}, {"clamp_offset": True})
    ]
    assert not np.array_equal(points[0], points[1])
    assert not np.array_equal(points[0], points[2])


@pytest.mark.parametrize(
    ("options", "field"),
    [({"decode": "unbiased"}, "decode"), ({"chunk": 0}, "chunk"), ({"threads": -1}, "threads")],
)
def test_options_out_of_range_are_refused(options, field):
    with pytest.raises(InvalidRequest) as caught:
        VitPose(VITPOSE, CPU, **options)
    assert caught.value.field == field
    if field == "decode":
        with pytest.raises(InvalidRequest, match="dark, udp"):
            cells(torch.zeros(1, 1, 64, 48), **options)


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 9), (9, 5, 5, 9), (0, 0, np.nan, 9), (0, 0, np.inf, 9), (0, 0, 9)]
)
def test_boxes_that_are_none_are_refused(box):
    with pytest.raises(InvalidRequest) as caught:
        VitPose(VITPOSE, CPU).estimate(dotted()[0][None], [0], np.float32([box]))
    assert caught.value.field == "bboxes"


@pytest.mark.parametrize("index", [[1], [-1], [], [0, 0]])
def test_indices_that_fit_no_frame_are_refused(index):
    with pytest.raises(InvalidRequest) as caught:
        VitPose(VITPOSE, CPU).estimate(dotted()[0][None], index, np.float32([BOX]))
    assert caught.value.field == "frame_index"


def test_another_network_is_refused():
    with pytest.raises(WeightsError, match=r"\[\?, 133, 64, 48\] is needed"):
        VitPose(YOLO, CPU)


@pytest.mark.gpu
def test_the_gpu_finds_the_same_points():
    frame, box = dotted()[0][None], np.float32([BOX])
    ours, scores = VitPose(VITPOSE, torch.device("cuda")).estimate(frame, [0], box)
    expected, _ = VitPose(VITPOSE, CPU).estimate(frame, [0], box)
    # onnxruntime may round to TF32 there.
    assert np.abs(ours - expected)[scores > 0.3].max() < 0.5
