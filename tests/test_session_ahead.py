"""What a session begins while the motion is looked for: loading and the prompt; errors; stops."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from pipelines.condition_cache import content_key
from xicon_infer import service_session
from xicon_infer.errors import Cancelled, OutOfMemory, WeightsError
from xicon_infer.job import Job, make_job
from xicon_infer.media.image import load_image
from xicon_infer.runtime import Recorder
from xicon_infer.service_session import Session, expected_shape
from xicon_infer.types import SilentProgress

EXAMPLES = Path(__file__).parents[1] / "examples"
CPU = torch.device("cpu")
SHAPE = (128, 128, 5)
WAIT_S = 120.0


def job(**values) -> Job:
    given = {
        "preset": "tiny",
        "image": str(EXAMPLES / "character.png"),
        "track": str(EXAMPLES / "dance_fullbody.npz"),
        "output": "out.mp4",
        "width": 128,
        "height": 128,
        "loras": ["none"],
        "prompt": "a fox",
    }
    return make_job(given | values)


def recorder() -> Recorder:
    return Recorder(SilentProgress(), CPU)


def begin(session: Session, told: Recorder, **values) -> Job:
    wanted = job(**values)
    session.begin(wanted, CPU, torch.float32, told, SHAPE)
    return wanted


def ahead_threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


@pytest.fixture
def held(monkeypatch):
    """Loading waits until it is told; the builds are counted."""
    go, builds = threading.Event(), []
    real = service_session.build_pipeline

    def build(*given):
        builds.append(given)
        assert go.wait(WAIT_S)
        return real(*given)

    monkeypatch.setattr(service_session, "build_pipeline", build)
    yield go, builds
    go.set()


def test_loading_goes_on_while_poses_are_found(held):
    go, builds = held
    session, told = Session(), recorder()
    wanted = begin(session, told)
    told.step(1, 10, "frame")  # poses are found meanwhile
    assert ahead_threads() == 1
    go.set()
    pipeline = session.pipeline(wanted, CPU, torch.float32, told, SHAPE)
    assert len(builds) == 1
    assert [stage.name for stage in told.stages] == ["load models"]
    cache = pipeline.components.cache
    assert cache.get(content_key("text", "a fox")) is not None, "the prompt too"
    assert ahead_threads() == 0


def test_a_loaded_pipeline_encodes_the_next_prompt_meanwhile(held):
    go, builds = held
    go.set()
    session, told = Session(), recorder()
    first = session.pipeline(begin(session, told), CPU, torch.float32, told, SHAPE)
    told = recorder()
    wanted = begin(session, told, prompt="a hare", negative_prompt="fog", guidance_scale=2.0)
    assert session.pipeline(wanted, CPU, torch.float32, told, SHAPE) is first
    assert len(builds) == 1
    assert not told.stages
    for text in ("a fox", "a hare", "fog"):
        assert first.components.cache.get(content_key("text", text)) is not None


def test_what_goes_wrong_meanwhile_is_told_at_the_next_step(monkeypatch):
    def build(*given):
        raise WeightsError("big.safetensors ends early")

    monkeypatch.setattr(service_session, "build_pipeline", build)
    session, told = Session(), recorder()
    wanted = begin(session, told)
    session._begun._thread.join(WAIT_S)
    with pytest.raises(WeightsError, match="ends early"):
        told.step(1, 10, "frame")
    with pytest.raises(WeightsError, match="ends early"):
        session.pipeline(wanted, CPU, torch.float32, told, SHAPE)
    session.settle()
    told = recorder()
    told.step(1, 10, "frame")
    monkeypatch.undo()
    assert session.pipeline(wanted, CPU, torch.float32, told, SHAPE) is not None


def test_a_job_that_is_stopped_leaves_no_thread(held):
    go, _ = held
    session, told = Session(), recorder()
    begin(session, told)
    timer = threading.Timer(0.2, go.set)
    timer.start()
    session.settle()
    assert ahead_threads() == 0
    assert session._pipeline is None
    session.settle()
    timer.join()


def test_another_plan_than_the_expected_one_loads_again(held):
    go, builds = held
    go.set()
    session, told = Session(), recorder()
    begin(session, told)
    other = job(dtype="bf16")
    session.pipeline(other, CPU, torch.bfloat16, told, SHAPE)
    assert len(builds) == 2


def test_a_plan_that_leaves_no_room_for_poses_begins_nothing(monkeypatch):
    def refuse(*given, reserve=0):
        assert reserve > 0
        raise OutOfMemory("too small")

    monkeypatch.setattr(service_session, "memory_plan", refuse)
    session, told = Session(), recorder()
    begin(session, told)
    assert session._begun is None


def test_a_prompt_is_stopped_by_what_stops_the_job(held):
    go, _ = held
    go.set()
    session, told = Session(), recorder()
    first = session.pipeline(begin(session, told), CPU, torch.float32, told, SHAPE)

    def check(*_):
        raise Cancelled("stopped")

    first.components.text_encoder.register_forward_pre_hook(check)
    told = recorder()
    begin(session, told, prompt="a hare")
    session._begun._thread.join(WAIT_S)
    with pytest.raises(Cancelled):
        told.step(1, 10, "frame")


def test_the_shape_that_is_expected():
    image = load_image(EXAMPLES / "character.png", field="image")
    wanted = job()
    width, height, frames = expected_shape(wanted, image)
    assert (height, width) == image.shape[:2]
    assert frames % 4 == 1
    assert expected_shape(job(num_frames=17), image)[2] == 17
    gone = make_job({"image": "a.png", "video": "absent.mp4", "output": "o.mp4"})
    assert expected_shape(gone, image) is None
