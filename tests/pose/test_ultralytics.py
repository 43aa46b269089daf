"""The ultralytics detector: with the package itself, a tiny network of random weights, and with a
model that stands in for it. Nothing here may reach the network.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xicon_infer.errors import BackendUnavailable, InvalidRequest, WeightsError
from xicon_infer.pose.ultralytics_detector import UltralyticsDetector, load_ultralytics

CPU = torch.device("cpu")
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 96, 64, 3), np.uint8)

TINY_YAML = """
nc: 80
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [[2], 1, Detect, [nc]]
"""


class StandIn:
    """Answers with one box whose left edge is the red of the first pixel, and the call's number."""

    def __init__(self, *, follows: bool = True) -> None:
        self.calls: list[tuple[str, int, dict[str, object]]] = []
        self.follows = follows
        self.predictor = SimpleNamespace(trackers=[SimpleNamespace(reset=self.note_reset)])
        self.resets = 0

    def note_reset(self) -> None:
        self.resets += 1

    def predict(self, source, **settings):
        return self._answer("predict", source, settings)

    def track(self, source, **settings):
        return self._answer("track", source, settings)

    def _answer(self, kind, source, settings):
        self.calls.append((kind, len(source), settings))
        torch.set_num_threads(2)
        return [self._result(kind, frame) for frame in source]

    def _result(self, kind, frame):
        red = float(frame[0, 0, 2])  # BGR
        followed = kind == "track" and self.follows
        boxes = SimpleNamespace(
            xyxy=torch.tensor([[red, 1.0, red + 10, 20.0]]),
            conf=torch.tensor([0.75]),
            id=torch.tensor([7.0]) if followed else None,
        )
        return SimpleNamespace(boxes=boxes)


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "any.pt"
    path.write_bytes(b"weights")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Returns a saved network that sees persons everywhere; no connection can be opened."""
    folder = tmp_path_factory.mktemp("yolo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(folder))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        # The package sets it when it is imported; this puts it back afterwards.
        patch.setenv("OMP_NUM_THREADS", "1")

        def refuse(*_):
            raise AssertionError("ultralytics tried to reach the network")

        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        (folder / "tiny.yaml").write_text(TINY_YAML)
        ultralytics = pytest.importorskip("ultralytics")
        torch.manual_seed(0)
        model = ultralytics.YOLO(str(folder / "tiny.yaml"), task="detect", verbose=False)
        with torch.no_grad():
            for branch in model.model.model[-1].cv3:
                branch[-1].bias[0] = 3.0
        model.save(str(folder / "tiny.pt"))
        yield folder / "tiny.pt"


def test_the_real_package_finds_boxes(tiny):
    threads = torch.get_num_threads()
    found = UltralyticsDetector(tiny, CPU).detect(FRAMES)
    assert len(found) == 3
    for boxes in found:
        assert len(boxes.ids) == len(boxes.bboxes) == len(boxes.scores) > 0
        assert set(boxes.ids) == {-1}
        assert boxes.bboxes.dtype == boxes.scores.dtype == np.float32
        assert (boxes.bboxes >= 0).all()
        assert (boxes.bboxes <= [64, 96, 64, 96]).all()
        assert ((boxes.scores > 0.25) & (boxes.scores <= 1)).all()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("tracker", ["botsort", "bytetrack"])
def test_the_real_trackers_give_ids(tiny, tracker):
    still = np.repeat(FRAMES[:1], 4, axis=0)
    detector = UltralyticsDetector(tiny, CPU, tracker, chunk=2)
    first = detector.detect(still)
    assert all(i > 0 for boxes in first for i in boxes.ids)
    assert first[0].ids
    assert set(first[0].ids) & set(first[3].ids)
    # Identities go on over calls, and begin anew after a reset.
    assert set(detector.detect(still)[0].ids) & set(first[3].ids)
    detector.reset()
    assert min(detector.detect(still)[0].ids) == 1


def test_the_threshold_reaches_the_package(tiny):
    few, many = (
        sum(len(b.ids) for b in UltralyticsDetector(tiny, CPU, score_thr=t).detect(FRAMES))
        for t in (0.97, 0.5)
    )
    assert few < many


def test_a_damaged_file_is_refused(tiny, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"not a network")
    with pytest.raises(WeightsError, match=r"bad\.pt cannot be read"):
        UltralyticsDetector(tmp_path / "bad.pt", CPU)


def test_frames_go_in_as_bgr_in_chunks(weights):
    model = StandIn()
    frames = np.zeros((5, 8, 8, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(5)[:, None, None]
    found = UltralyticsDetector(weights, CPU, chunk=2, load=lambda _: model).detect(frames)
    assert [b.bboxes[0, 0] for b in found] == [0, 1, 2, 3, 4]
    assert [(kind, count) for kind, count, _ in model.calls] == [("predict", n) for n in (2, 2, 1)]
    settings = model.calls[0][2]
    assert settings["classes"] == [0]
    assert settings["device"] == CPU
    assert "conf" not in settings


@pytest.mark.parametrize("tracker", ["botsort", "bytetrack"])
def test_a_tracker_is_used_when_named(weights, tracker):
    model = StandIn()
    detector = UltralyticsDetector(weights, CPU, tracker, score_thr=0.3, load=lambda _: model)
    assert detector.detect(FRAMES)[0].ids == (7,)
    kind, _, settings = model.calls[0]
    assert kind == "track"
    assert settings["tracker"] == f"{tracker}.yaml"
    assert settings["persist"] is True
    assert settings["conf"] == 0.3
    detector.reset()
    assert model.resets == 1


def test_nobody_followed_yet_has_no_id(weights):
    model = StandIn(follows=False)
    detector = UltralyticsDetector(weights, CPU, "botsort", load=lambda _: model)
    assert detector.detect(FRAMES)[0].ids == (-1,)


def test_threads_of_the_process_stay(weights):
    before = torch.get_num_threads()
    UltralyticsDetector(weights, CPU, load=lambda _: StandIn()).detect(FRAMES)
    assert torch.get_num_threads() == before


def test_reset_before_the_first_frame(weights):
    UltralyticsDetector(weights, CPU, "botsort", load=lambda _: object()).reset()


def test_a_missing_package_is_said_with_its_licence(weights, monkeypatch):
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(BackendUnavailable, match=r"pip install ultralytics lap.*AGPL-3\.0"):
        load_ultralytics(weights)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tracker": "deepsort"}, "tracker"),
        ({"score_thr": 0.0}, "score_thr"),
        ({"score_thr": 1.5}, "score_thr"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_options_out_of_range_are_refused(weights, options, field):
    with pytest.raises(InvalidRequest) as caught:
        UltralyticsDetector(weights, CPU, load=lambda _: StandIn(), **options)
    assert caught.value.field == field


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="is not there"):
        UltralyticsDetector(tmp_path / "yolo11n.pt", CPU)
    (tmp_path / "yolo.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"\.pt, \.onnx, \.engine are allowed"):
        UltralyticsDetector(tmp_path / "yolo.safetensors", CPU)


def test_frames_of_another_kind_are_refused(weights):
    with pytest.raises(InvalidRequest, match="uint8"):
        UltralyticsDetector(weights, CPU, load=lambda _: StandIn()).detect(FRAMES[0])
