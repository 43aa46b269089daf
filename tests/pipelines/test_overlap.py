"""The transformer is read while the encoders work: the order of events, errors, and stopping."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from pipelines import loading
from pipelines.loading import LoadOptions, load_preset
from pipelines.scail import ScailOptions, ScailPipeline
from tests.every_preset import write_preset
from xicon_infer.errors import WeightsError
from xicon_infer.types import Clip, SilentProgress

WAIT_S = 120.0
"""Longest wait for something that happens at once; only a hang lasts so long."""
SIZE = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 1, "seed": 3}
IMAGE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
POSE = Clip(np.random.default_rng(1).integers(0, 255, (5, 64, 64, 3), np.uint8), 16)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> LoadOptions:
    folder = write_preset(tmp_path_factory.mktemp("weights"), "scail", "fp8")
    return LoadOptions(search_dirs=(folder,), ahead=True)


@pytest.fixture
def slow(monkeypatch):
    """The transformer's file is read only when told; what happened is in the list."""
    go, events = threading.Event(), []
    real = loading.stream_tensors

    def read(checkpoint, *, progress=None, **given):
        if progress is None:
            events.append("read encoder")
            return real(checkpoint, **given)
        events.append("read transformer")
        while not go.wait(0.01):
            progress.step(0, 1, "MB")
        return real(checkpoint, progress=progress, **given)

    monkeypatch.setattr(loading, "stream_tensors", read)
    yield go, events
    go.set()


class Told(SilentProgress):
    def __init__(self, events):
        super().__init__()
        self.events = events

    def stage(self, name):
        self.events.append(name)
        return super().stage(name)


def ahead_threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def test_encoders_work_while_the_transformer_is_read(options, slow):
    go, events = slow
    parts = load_preset("scail", "fp8", options)
    assert not parts.complete
    assert "storage" not in parts.facts

    class Waiting(Told):
        def stage(self, name):
            if name == "project conditioning":  # the first that needs the transformer
                assert not parts.complete
                events.append("go on")
                go.set()
            return super().stage(name)

    clip = ScailPipeline(parts)(IMAGE, POSE, ScailOptions(**SIZE), Waiting(events)).clip
    start = events.index("read transformer")
    assert events[:start].count("read encoder") == 3, "the others are read first"
    order = ["encode text", "encode image", "encode reference and pose", "go on", "sample"]
    assert [event for event in events[start:] if event in order] == order
    assert parts.complete
    assert parts.facts["storage"]
    plain = load_preset("scail", "fp8", replace(options, ahead=False))
    assert plain.notes == parts.notes
    again = ScailPipeline(plain)(IMAGE, POSE, ScailOptions(**SIZE)).clip
    np.testing.assert_array_equal(clip.frames, again.frames)
    assert ahead_threads() == 0


def test_what_needs_the_transformer_is_done_when_it_is_here(options, slow):
    go, events = slow
    parts = load_preset("scail", "fp8", options)
    parts.when_here(lambda: events.append("arrived"))
    assert "arrived" not in events
    go.set()
    assert parts.transformer is parts.transformer
    assert events.count("arrived") == 1
    parts.when_here(lambda: events.append("at once"))
    assert events[-1] == "at once"


def test_a_transformer_that_cannot_be_read_stops_the_encoders(options, monkeypatch):
    def broken(*given):
        raise WeightsError("big.safetensors: cannot be read: it ends early")

    monkeypatch.setattr(loading, "_load_transformer", broken)
    parts = load_preset("scail", "fp8", options)
    parts._coming._thread.join(WAIT_S)
    assert not parts.usable
    events: list[str] = []
    for _ in range(2):
        parts.cache.clear()
        with pytest.raises(WeightsError, match="it ends early"):
            ScailPipeline(parts)(IMAGE, POSE, ScailOptions(**SIZE), Told(events))
    assert "encode text" in events
    assert "encode image" not in events, "the first encoder that asks for the device ends it"


def test_reading_can_be_stopped(options, slow):
    parts = load_preset("scail", "fp8", options)
    assert ahead_threads() == 1
    parts.stop_reading()
    assert ahead_threads() == 0
    assert not parts.usable
